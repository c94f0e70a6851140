"""``recipe.json``: what repeats a run, written into its folder when it starts.

The command, its overrides, the seed, the versions, the commit. Never a secret: environment
variables, options and overrides that are called like one are left out, URLs lose user, password and
query.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

RECIPE_FILE = "recipe.json"
HIDDEN = "(not recorded)"
_PACKAGES = ("cartridge-distill", "torch", "transformers", "verl", "ray")
# TOKENS is a setting of the run script; TOKASAURUS_API_KEY, HF_TOKEN, MODAL_PROXY_SECRET are not.
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN(?!S\b)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# In settings, data.prompt_key and num_tokens are common words: only what is surely a secret.
_SECRET_SETTING = re.compile(
    r"(?:^|[._+-])(?:token|secret|secrets|password|passwd|credentials?)$"
    r"|(?:api|access|private|proxy|secret|auth)[._-]?(?:key|token)$",
    re.IGNORECASE,
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s\"']*@")
_QUERY_OF_URL = re.compile(r"(://[^\s\"'?#]*)[?#][^\s\"'\]]*")


class Commit(BaseModel):
    """The checkout the run was started from."""

    commit: str
    changed: bool


class Recipe(BaseModel):
    """The contents of ``recipe.json``. ``folder`` is the run's, as it was written."""

    name: str
    folder: str
    command: list[str]
    overrides: list[str] = []
    seed: int
    model: str | None = None
    environment: dict[str, str] = {}
    versions: dict[str, str] = {}
    git: Commit | None = None
    started: str | None = None

    def identity(self) -> tuple[str, ...]:
        """Equal for runs that differ by seed, folder and server alone."""
        kept = []
        for override in self.overrides:
            name, _, value = override.partition("=")
            if name.rsplit(".", 1)[-1] != "seed" and "://" not in value:
                kept.append(override.replace(self.folder, "OUT"))
        return (self.name, self.model or "", *sorted(kept))


def write_recipe(
    folder: Path,
    command: Sequence[str],
    overrides: Sequence[str],
    seed: int,
    *,
    name: str | None = None,
    model: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``recipe.json``; returns its path.

    Args:
        folder: the run's; made when it is not there.
        command: what a person would type, one argument an item.
        overrides: Hydra's overrides, where the command makes them itself.
        seed: what the run's randomness follows from.
        name: of the recipe, the same for all its seeds; by default the folder's name.
        model: folder or hub id of the base model.
        environment: variables the command reads; those called like a secret are dropped.
    """
    folder = folder.expanduser().absolute()
    recipe = Recipe(
        name=name or folder.name,
        folder=str(folder),
        command=without_secrets(command),
        overrides=without_secrets(overrides),
        seed=seed,
        model=model,
        environment={
            variable: _bare_urls(value)
            for variable, value in (environment or {}).items()
            if not _SECRET_VARIABLE.search(variable)
        },
        versions=versions(),
        git=commit(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    path.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments as they may be shown: ``--api-key X``, ``a.token=X`` and URLs' users hidden."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET_SETTING.search(name)) and "://" not in name
        if hide_next and not argument.startswith("-"):
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_bare_urls(argument))
        hide_next = secret and not equals and argument.startswith("-")
    return shown


def _bare_urls(text: str) -> str:
    return _QUERY_OF_URL.sub(r"\1", _USER_IN_URL.sub("", text))


def versions() -> dict[str, str]:
    """Of Python and of the packages a run's numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> Commit | None:
    """The checkout this package runs from; None where it is installed, or git is not there."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()

    try:
        # An environment inside some other checkout is not a checkout of this project.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return Commit(commit=git("rev-parse", "HEAD"), changed=bool(git("status", "--porcelain")))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def seed_of(overrides: Sequence[str]) -> int:
    """The seed that overrides come to: the last one counts; the configuration's own is 0."""
    seeds = [value for value in overrides if value.startswith("data.seed=")]
    return int(seeds[-1].partition("=")[2]) if seeds else 0
