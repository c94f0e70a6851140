"""README and docs say what is there: links, files, commands, options, settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import (
    ROOT,
    Command,
    anchors_of,
    commands_of,
    inline_code_of,
    links_of,
    pages,
    text_of,
)
from tests.rooms import GLUE_ROOMS, ROOMS

PAGES = pages()
BY_NAME = {"ids": lambda page: page.relative_to(ROOT).as_posix()}

# Folders of the repository, from its root and from the packages; other paths are the user's.
FOLDERS = {
    *("cartridge_distill", "verl_patches", "training", "modal", "benchmarks", "tests", "docs"),
    *("requirements", ".github", *ROOMS, "actor", "config", "trainer", "platform"),
}
# Files of veRL that a page names to say where their work is now.
FILES_OF_OTHERS = {"fsdp_workers.py", "dp_actor.py", "actor.yaml", "modeling_utils.py"}


def test_there_are_pages_and_they_have_links_and_commands() -> None:
    assert ROOT / "README.md" in PAGES and ROOT / "docs" / "index.md" in PAGES
    assert sum(len(links_of(page)) for page in PAGES) > 30
    assert sum(len(commands_of(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


def _exists(name: str, page: Path) -> bool:
    bases = [ROOT, page.parent, ROOT / "cartridge_distill", ROOT / "verl_patches"]
    return any(any(base.glob(name.rstrip("/"))) for base in bases)


@cache
def _file_names() -> frozenset[str]:
    folders = [entry for entry in ROOT.iterdir() if entry.is_dir() and entry.name[0] not in "."]
    here = {path.name for path in ROOT.iterdir()}
    return frozenset(here | {path.name for folder in folders for path in folder.rglob("*")})


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_every_row_stands_in_a_table(page: Path) -> None:
    """A row without a head above it, or with other columns, is shown as plain text or cut."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    tables = [found[0].splitlines() for found in re.finditer(r"(?:^\|.*\n)+", text, re.M)]
    wrong = []
    for table in tables:
        if len(table) < 2 or not re.fullmatch(r"\|([ :]*-+[ :]*\|)+", table[1]):
            wrong.append(table[0])
        columns = [len(re.findall(r"(?<!\\)\|", row)) for row in table]
        wrong += [row for row, n in zip(table, columns, strict=True) if n != columns[0]]
    assert not wrong, "\n".join(wrong)


# The changelog says what was where before.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], **BY_NAME)
def test_every_file_in_backquotes_is_there(page: Path) -> None:
    """Paths of code, scripts, patches and pages; and names of code files without a folder."""
    missing = []
    for code in inline_code_of(page):
        word = code.split("::")[0]
        if re.fullmatch(
            r"\.?\w[\w.*-]*(/[\w.*-]+)+\.(py|sh|patch|md|toml)|[\w.-]+(/[\w.-]+)*/", word
        ):
            if word.split("/")[0] in FOLDERS and not _exists(word, page):
                missing.append(word)
        elif re.fullmatch(r"\w+\.(py|sh|patch)", word) and word not in FILES_OF_OTHERS:
            if word not in _file_names():
                missing.append(word)
    assert not missing


# --- commands ---------------------------------------------------------------------------------


def _program(command: Command) -> tuple[str, ...] | None:
    """What to ask for ``--help``; None where there are no options to be checked."""
    words = command.words
    if words[0] == "cartridge-distill" and len(words) > 1 and words[1][0] not in "-X":
        return (sys.executable, "-m", "cartridge_distill.cli.main", words[1])
    if re.search(r"python3?$", words[0]) and len(words) > 1:
        if words[1] == "-m" and words[2].split(".")[0] in {
            "cartridge_distill",
            "verl_patches",
            "benchmarks",
        }:
            return (sys.executable, "-m", words[2])
        if words[1].endswith(".py"):
            return (sys.executable, words[1])
    return None


@cache
def _help(program: tuple[str, ...]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [*program, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(program)} --help: {done.stderr[-2000:]}"
    return done.stdout


def _commands(pages: list[Path]) -> list[Command]:
    return list(dict.fromkeys(command for page in pages for command in commands_of(page)))


@cache
def _subcommands() -> frozenset[str]:
    return frozenset(
        re.findall(r"^│ (\w+) ", _help((sys.executable, "-m", "cartridge_distill.cli.main")), re.M)
    )


def test_every_subcommand_exists() -> None:
    assert "doctor" in _subcommands()
    asked = [c for c in _commands(PAGES) if c.words[0] == "cartridge-distill" and len(c.words) > 1]
    unknown = [
        str(command)
        for command in asked
        if re.match(r"[a-z]", command.words[1]) and command.words[1] not in _subcommands()
    ]
    assert not unknown, "\n".join(unknown)


def _imports_torch(program: tuple[str, ...]) -> bool:
    """Whether its --help takes seconds: it imports torch and transformers first."""
    return program[-1].startswith(("benchmarks", "verl_patches.rollout", "verl_patches/rollout"))


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_option_exists(slow: bool) -> None:
    """Of our commands and scripts: each option of a page stands in the program's own --help."""
    wrong = []
    checked = 0
    for command in _commands(PAGES):
        program = _program(command)
        if program is None or not command.options:
            continue
        if _imports_torch(program) != slow:
            continue
        known = set(re.findall(r"--\w[\w-]*", _help(program))) | {"--help"}
        checked += len(command.options)
        if unknown := [option for option in command.options if option not in known]:
            wrong.append(f"{command}: {', '.join(unknown)}")
    assert checked > 10
    assert not wrong, "\n".join(wrong)


def test_every_script_module_and_make_target_exists() -> None:
    makefile = text_of(ROOT / "Makefile")
    wrong = []
    for command in _commands(PAGES):
        words = command.words
        if words[0] == "make":
            targets = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
            good = all(re.search(rf"^{t}( [\w -]+)?:", makefile, re.M) for t in targets)
        elif words[0] in ("bash", "modal"):
            files = [w for w in words if re.fullmatch(r"[\w/.-]+\.(sh|py)", w)]
            ours = [file for file in files if file.split("/")[0] in FOLDERS]
            good = all((ROOT / file).is_file() for file in ours)
        elif (program := _program(command)) and program[1] == "-m":
            module = ROOT / Path(*program[2].split("."))
            good = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        elif program:
            good = any((base / program[1]).is_file() for base in (ROOT, command.page.parent))
        else:
            continue
        if not good:
            wrong.append(str(command))
    assert not wrong, "\n".join(wrong)


def test_every_test_that_a_page_names_exists() -> None:
    """Paths behind ``pytest``, and the names behind ``-k``."""
    wrong = []
    for command in _commands(PAGES):
        words = list(command.words)
        if "pytest" not in words:
            continue
        words = words[words.index("pytest") + 1 :]
        paths = [ROOT / word.split("::")[0] for word in words if word.startswith("tests/")]
        names = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-k"]
        files = [
            f for path in paths for f in ([path] if path.is_file() else path.rglob("test_*.py"))
        ]
        said = "\n".join(f"{file.name} {text_of(file)}" for file in files).lower()
        if any(not path.exists() for path in paths) or any(n.lower() not in said for n in names):
            wrong.append(str(command))
    assert not wrong, "\n".join(wrong)


# --- words and settings -----------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= 1200


def test_the_readme_says_at_once_how_far_it_is_proven() -> None:
    first_screen = "\n".join(text_of(ROOT / "README.md").splitlines()[:40])
    for name in ("CPU", "GPU", "Modal", "LongHealth"):
        assert re.search(rf"^\| {name}", first_screen, re.M), name


def test_the_demo_has_one_table() -> None:
    """README shows it, and the page of results explains it."""
    table = re.compile(r"^\| condition \|.*\n(?:\|.*\n)+", re.M)
    shown = table.findall(text_of(ROOT / "README.md"))
    assert len(shown) == 1
    assert shown == table.findall(text_of(ROOT / "docs" / "results.md"))


def test_the_settings_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate_configuration.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_rooms_of_the_page_are_those_that_are_held() -> None:
    page = text_of(ROOT / "docs" / "architecture.md")
    core = page.split("## Rooms")[1].split("`verl_patches/` has rooms")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", core, re.M)) == ROOMS
    glue = page.split("`verl_patches/` has rooms")[1].split("## ")[0]
    folders = {path.parent.name for path in (ROOT / "verl_patches").glob("*/__init__.py")}
    assert tuple(re.findall(r"^\| `(\w+)` \|", glue, re.M)) == GLUE_ROOMS
    assert folders == set(GLUE_ROOMS)


def test_every_page_is_found_from_the_index() -> None:
    linked = {link.partition("#")[0] for link in links_of(ROOT / "docs" / "index.md")}
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert names <= linked
