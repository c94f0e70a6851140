"""Writes docs/configuration.md: every setting of a run, with its default and its comment.

The words are those of the files that hold the settings: the patches of veRL's configuration, the
Hydra config of a run, and the docstring of ``ClientSettings``. Run it again after one of them
changed; with ``--check`` it only says whether the page is current, which a test does, too.

veRL's own settings are not listed: only those that a run of this project changes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cartridge_distill.rollout.http import ClientSettings  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
ACTOR_PATCH = ROOT / "verl_patches" / "config" / "actor_config.patch"
ROLLOUT_PATCH = ROOT / "verl_patches" / "config" / "rollout_config.patch"

_ENTRY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#]*?))?(?: *# (?P<comment>.*))?")

_BEGINNING = """\
# Settings

<!-- Written by docs/generate_configuration.py: change the comments that it reads, then run it. -->

Settings are Hydra keys, without a leading `+`. `cartridge-distill train` and
`training/run_cartridge_distill.sh` take them behind their own options, for example
`actor_rollout_ref.actor.cartridge.topk=50`. If a setting is invalid, the run stops at start-up and
lists every problem with its fix.
"""

_CARTRIDGE = """
## The cartridge

`actor_rollout_ref.actor.cartridge.*`, as `verl_patches/config/actor_config.patch` adds them to
veRL. A run's own config changes some of them, [see below](#what-a-run-changes-in-verl).
"""

_ROLLOUT = """
## The rollout server

`actor_rollout_ref.rollout.custom.*`, as `verl_patches/config/rollout_config.patch` adds them.
"""

_CLIENT = """
## The client's patience

`actor_rollout_ref.rollout.custom.client.*`: how long the trainer's client waits and how often
it tries. The first column of values is the default of `ClientSettings`, the second is what a run
sets.
"""

_RUN = """
## What a run changes in veRL

`{config}` builds on veRL's `ppo_trainer`. These are the keys that it sets, and why.
"""

_PLATFORM = """
## Platforms

`platform=cuda` is the default; `platform=cpu` runs without a GPU. Each sets these keys:
"""


@dataclass(frozen=True)
class Setting:
    """One leaf of a YAML file: its dotted key, its value as written, its comment."""

    key: str
    value: str
    comment: str


def settings_of(text: str) -> Iterator[Setting]:
    """The leaves of a YAML text, each with the comment above it and the one behind it.

    It reads the plain block style of our files: nested keys, values on one line.

    Raises:
        ValueError: a line is neither a key, a comment nor a list entry.
    """
    path: list[tuple[int, str]] = []
    above: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        stripped = line.strip()
        if not stripped:
            above = []
        elif stripped.startswith("#"):
            above.append(stripped.lstrip("# "))
        elif not stripped.startswith("- "):
            match = _ENTRY.fullmatch(line)
            if match is None:
                raise ValueError(f"line {number + 1} is no key: {line!r}")
            indent = len(match["indent"])
            path = [(depth, name) for depth, name in path if depth < indent]
            path.append((indent, match["key"]))
            if match["value"]:
                words = [*above, match["comment"] or ""]
                key = ".".join(name for _, name in path)
                yield Setting(key, match["value"], " ".join(filter(None, words)))
            above = []


def added_lines(patch: Path, file: str) -> str:
    """What a patch adds to one file, as text."""
    parts = re.split(r"^diff --git .*$", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (part,) = [part for part in parts if f"+++ b/{file}\n" in part]
    lines = part.splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("+") and line[1:3] != "++")


def cartridge_types() -> dict[str, str]:
    """Field names of ``CartridgeConfig`` and their types, as the patch declares them."""
    text = added_lines(ACTOR_PATCH, "verl/workers/config/actor.py")
    beginning = text.index("@dataclass\nclass CartridgeConfig")
    end = text.index("    def __post_init__", beginning)
    (declared,) = ast.parse(text[beginning:end]).body
    assert isinstance(declared, ast.ClassDef)
    fields = [line for line in declared.body if isinstance(line, ast.AnnAssign)]
    return {ast.unparse(line.target): ast.unparse(line.annotation) for line in fields}


def client_words() -> dict[str, str]:
    """What the docstring of ``ClientSettings`` says of each field."""
    text = (ClientSettings.__doc__ or "").split("Attributes:")[1]
    words: dict[str, str] = {}
    for names, said in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", text, re.MULTILINE):
        for name in names.split(", "):
            words[name] = " ".join(said.split())
    return words


def _cell(text: str) -> str:
    """Words as a cell of a Markdown table; ``<name>`` would be taken for HTML."""
    return text.replace("|", "\\|").replace("``", "`").replace("<", "&lt;")


def _value(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cartridge() -> str:
    types = cartridge_types()
    text = added_lines(ACTOR_PATCH, "verl/trainer/config/actor/actor.yaml")
    found = [s for s in settings_of(text) if not s.key.endswith("_target_")]
    names = [setting.key.removeprefix("cartridge.") for setting in found]
    if set(names) != set(types):
        raise ValueError(f"YAML and dataclass differ: {sorted(set(names) ^ set(types))}")
    rows = [
        (f"`{name}`", _value(types[name]), _value(setting.value), _cell(setting.comment))
        for name, setting in zip(names, found, strict=True)
    ]
    return _CARTRIDGE + table(("Key", "Type", "Default", "What it does"), rows)


def _rollout(config: list[Setting]) -> str:
    start = "custom."
    patch = added_lines(ROLLOUT_PATCH, "verl/trainer/config/rollout/rollout.yaml")
    found = {s.key.removeprefix(start): s for s in settings_of(patch) if s.key.startswith(start)}
    own = "actor_rollout_ref.rollout.custom."
    for setting in config:
        name = setting.key.removeprefix(own)
        if setting.key.startswith(own) and "." not in name:
            found.setdefault(name, setting)
    rows = [(f"`{k}`", _value(s.value), _cell(s.comment)) for k, s in found.items()]
    return _ROLLOUT + table(("Key", "Default", "What it does"), rows)


def _client(config: list[Setting]) -> str:
    start = "actor_rollout_ref.rollout.custom.client."
    run = {s.key.removeprefix(start): s.value for s in config if s.key.startswith(start)}
    words = client_words()
    rows = [
        (
            f"`{field.name}`",
            _value(str(field.default)),
            _value(run[field.name]),
            _cell(words[field.name]),
        )
        for field in dataclasses.fields(ClientSettings)
    ]
    return _CLIENT + table(("Key", "Default", "In a run", "What it does"), rows)


def _run(config: list[Setting], path: Path) -> str:
    custom = "actor_rollout_ref.rollout.custom."
    rows = [
        (f"`{s.key}`", _value(s.value), _cell(s.comment))
        for s in config
        if not s.key.startswith(("hydra.", "defaults", custom))
    ]
    beginning = _RUN.format(config=path.relative_to(ROOT).as_posix())
    return beginning + table(("Key", "Value", "Why"), rows)


def _platforms(folder: Path) -> str:
    rows = [
        (f"`{path.stem}`", f"`{s.key}`", _value(s.value), _cell(s.comment))
        for path in sorted(folder.glob("*.yaml"))
        for s in settings_of(path.read_text(encoding="utf-8"))
    ]
    return _PLATFORM + table(("Platform", "Key", "Value", "Why"), rows)


def page() -> str:
    """The whole page, as it should be."""
    (path,) = ROOT.glob("*/config/cartridge_distill.yaml")
    config = list(settings_of(path.read_text(encoding="utf-8")))
    return "".join(
        [
            _BEGINNING,
            _cartridge(),
            _rollout(config),
            _client(config),
            _run(config, path),
            _platforms(path.parent / "platform"),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if it is not current"
    )
    options = parser.parse_args(arguments)
    wanted = page()
    current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
    if options.check:
        if not current:
            print(
                f"{PAGE} is not current: run python docs/generate_configuration.py", file=sys.stderr
            )
        return 0 if current else 1
    PAGE.write_text(wanted, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
