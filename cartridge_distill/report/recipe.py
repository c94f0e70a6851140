"""``recipe.json``: what repeats a run, written into its folder when it starts.

The command, its overrides, the seed, the versions, the commit. Never a secret: what is written, and
what is read to be shown, passes the filter of :mod:`cartridge_distill.util.secrecy`. Environment
variables that are called like a credential are left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from cartridge_distill.cartridge.run_folder import RECIPE_FILE
from cartridge_distill.util.sealed import sealed, unsealed
from cartridge_distill.util.secrecy import HIDDEN, clean_arguments, clean_settings, is_secret
from cartridge_distill.util.shown_text import name_as_text

__all__ = [
    "HIDDEN",
    "RECIPE_FILE",
    "Commit",
    "Recipe",
    "commit",
    "seed_of",
    "versions",
    "without_secrets",
    "write_recipe",
]

without_secrets = clean_arguments
_PACKAGES = ("cartridge-distill", "torch", "transformers", "verl", "ray")


class Commit(BaseModel):
    """The checkout the run was started from."""

    commit: str
    changed: bool


class Recipe(BaseModel):
    """The contents of ``recipe.json``. ``folder`` is the run's, as it was written.

    The file holds a hash of its entries, see :mod:`cartridge_distill.util.sealed`.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    folder: str
    command: list[str]
    overrides: list[str] = []
    seed: int
    model: str | None = None
    data: str | None = None
    environment: dict[str, str] = {}
    versions: dict[str, str] = {}
    git: Commit | None = None
    started: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        return unsealed(value) if isinstance(value, dict) else value

    @field_validator("command", "overrides")
    @classmethod
    def _cleaned_arguments(cls, value: list[str]) -> list[str]:
        return clean_arguments(value)

    @field_validator("name", "folder", "model", "data", "environment")
    @classmethod
    def _cleaned(cls, value: Any) -> Any:
        return clean_settings(value)

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
    data: str | None = None,
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
        data: folder that was trained on.
        environment: variables the command reads; those called like a secret are dropped.
    """
    folder = folder.expanduser().absolute()
    recipe = Recipe(
        name=name or folder.name,
        folder=str(folder),
        command=[name_as_text(argument) for argument in command],
        overrides=[name_as_text(override) for override in overrides],
        seed=seed,
        model=model,
        data=data,
        environment={
            variable: value
            for variable, value in (environment or {}).items()
            if not is_secret(variable)
        },
        versions=versions(),
        git=commit(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    text = json.dumps(sealed(recipe.model_dump(mode="json")), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


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
