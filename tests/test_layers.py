"""Imports point one way: core <- verl_patches <- training and modal; benchmarks stand above all.

Held twice: by reading every import statement, inside functions too, and by importing the core in
a process where veRL, Ray and Modal cannot be imported.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rooms import ROOMS, ROOMS_OF

PROJECT = Path(__file__).resolve().parents[1]

# layer -> top-level packages it must not import, at any depth of any function
FORBIDDEN = {
    "cartridge_distill": {
        "verl",
        "ray",
        "modal",
        "verl_patches",
        "training",
        "benchmarks",
        "transfer_queue",
    },
    "verl_patches": {"modal", "training", "benchmarks"},
    "training": {"modal", "benchmarks"},
}

_DYNAMIC = {"import_module", "__import__", "find_spec"}

# Run in the core's own process: nothing of these may be importable, every core module must be.
_IMPORT_ALL = """
import importlib, pkgutil, sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"verl", "ray", "modal", "verl_patches", "training", "benchmarks"}:
            raise ImportError("the core must not import " + name)

sys.meta_path.insert(0, Forbid())
import cartridge_distill
names = [m.name for m in pkgutil.walk_packages(cartridge_distill.__path__, "cartridge_distill.")]
for name in names:
    # The class that another engine loads is imported where that engine is.
    if not name.endswith("__main__") and name != "cartridge_distill.engines.vllm.connector":
        importlib.import_module(name)
print(len(names))
"""


def imported_by(source: str) -> set[str]:
    """Top-level names of everything `source` imports, lazily or not, by statement or by call."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            first = node.args[0]
            if (
                called in _DYNAMIC
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                found.add(first.value.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import verl.utils", {"verl"}),
        ("def f():\n    from ray import get", {"ray"}),
        ("from .errors import ConfigError", set()),
        ("import importlib\nimportlib.import_module('modal.app')", {"importlib", "modal"}),
        ("__import__('verl')", {"verl"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(source: str, expected: set[str]) -> None:
    assert imported_by(source) == expected


@pytest.mark.parametrize("layer", sorted(FORBIDDEN))
def test_no_layer_imports_one_above_it(layer: str) -> None:
    files = sorted((PROJECT / layer).rglob("*.py"))
    assert files, f"no Python files in {layer}"
    wrong = {
        file.relative_to(PROJECT).as_posix(): sorted(names)
        for file in files
        if (names := imported_by(file.read_text(encoding="utf-8")) & FORBIDDEN[layer])
    }
    assert not wrong, f"imports that point the wrong way: {wrong}"


def test_the_core_can_be_imported_where_there_is_no_verl() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.splitlines()[-1]) > 0


def test_modal_folder_does_not_shadow_the_package() -> None:
    assert not (PROJECT / "modal" / "__init__.py").exists(), (
        "modal/__init__.py would hide the package `modal` from everything run in this folder"
    )


def _names_imported_by(path: Path) -> list[str]:
    """Full names, wherever the import stands: ``a.b.c`` of ``from a.b import c``."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def _rooms_imported_by(path: Path, package: str) -> set[str]:
    parts = [name.split(".") for name in _names_imported_by(path)]
    return {
        rest[0]
        for first, *rest in parts
        if first == package and rest[:1] and rest[0] in ROOMS_OF[package]
    }


@pytest.mark.parametrize("package", ["cartridge_distill", "verl_patches", "benchmarks"])
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    files = {}
    for path in (PROJECT / package).rglob("*.py"):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    left = {}
    for module, path in files.items():
        names = _names_imported_by(path)
        imported = {name if name in files else name.rpartition(".")[0] for name in names}
        left[module] = (imported & files.keys()) - {module}
    assert len(left) > 20
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in free}
    assert not left, f"these import each other in a circle, or a circle: {sorted(left)}"


def _tables_of_modules() -> dict[Path, set[str]]:
    """Packages whose docstring has a table of their modules, with the names that it lists."""
    tables = {}
    for init in sorted((PROJECT / "cartridge_distill").rglob("__init__.py")):
        said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        if re.search(r"^=+  =+$", said, re.M):
            tables[init.parent] = set(re.findall(r"^``(\w+)``", said, re.M))
    return tables


def test_a_table_of_modules_is_whole() -> None:
    tables = _tables_of_modules()
    assert len(tables) > 8
    wrong = {}
    for folder, listed in tables.items():
        modules = {path.stem for path in folder.glob("*.py") if path.stem[0] != "_"}
        modules |= {path.parent.name for path in folder.glob("*/__init__.py")}
        if modules != listed:
            name = folder.relative_to(PROJECT).as_posix()
            wrong[name] = f"not listed: {modules - listed}; not there: {listed - modules}"
    assert not wrong, f"the tables in these packages' docstrings: {wrong}"


def test_every_module_of_the_core_lies_in_a_room() -> None:
    core = PROJECT / "cartridge_distill"
    folders = {path.parent.name for path in core.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert [path.name for path in core.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize(
    ("package", "room"), [(package, room) for package, rooms in ROOMS_OF.items() for room in rooms]
)
def test_a_room_imports_only_rooms_below_it(package: str, room: str) -> None:
    rooms = ROOMS_OF[package]
    allowed = {*rooms[: rooms.index(room)], room}
    wrong = {
        path.relative_to(PROJECT).as_posix(): sorted(above)
        for path in sorted((PROJECT / package / room).rglob("*.py"))
        if (above := _rooms_imported_by(path, package) - allowed)
    }
    assert not wrong, f"{room} imports rooms above it: {wrong}"


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_nothing_is_imported_from_a_file_of_tests(folder: str) -> None:
    """What several of them share lies in a rig: a file of tests is moved, renamed and split."""
    files = sorted((PROJECT / folder).rglob("*.py"))
    assert len(files) > 20
    wrong = {
        path.relative_to(PROJECT).as_posix(): sorted(names)
        for path in files
        if (names := {name for name in _names_imported_by(path) if _is_of_a_test_file(name)})
    }
    assert not wrong, f"move what is shared into a module that is no test_*.py: {wrong}"


def _is_of_a_test_file(name: str) -> bool:
    """Whether a full name of an import leads there; a relative import has no package before it."""
    first, *rest = name.split(".")
    return first.startswith("test_") or (
        first in ("tests", "") and any(part.startswith("test_") for part in rest)
    )
