"""What a command refuses, it refuses in one form: what is wrong, ``; fix: ``, what to do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a person meets who types a command: options, paths, documents, servers, the installation.
_MODULES = (
    "cartridge_distill/cli",
    "cartridge_distill/data/documents",
    "cartridge_distill/data/prepare.py",
    "cartridge_distill/data/command.py",
    "cartridge_distill/data/dataset.py",
    "cartridge_distill/evaluation/command.py",
    "cartridge_distill/report/page.py",
    "cartridge_distill/util/server_url.py",
    "verl_patches/distill.py",
    "verl_patches/launch.py",
    "verl_patches/launching",
    "verl_patches/manage.py",
    "verl_patches/pipeline",
)
_REFUSALS = {"ConfigError", "DocumentError", "FileExistsError", "NotReady", "PatchError"}
_REFUSALS |= {"CartridgeFormatError", "ReportError"}
# The fix comes in with what they repeat, or each line of their list has its own.
_PASSED_ON = (
    "about(path)",
    "_not_a_run(folder)",
    "str(error)",
    "how_to_serve(run)",
    "_what_is_wrong(",
    "_refused_kind(path)",
    "*problems",
    "HOW_TO_START",
    "nothing was changed",
    "git apply failed",
    "veRL is not ready for cartridges: {error}",
)


def refusals(module: Path) -> Iterator[tuple[int, str]]:
    """Line and source of each refusal that a module raises."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") in _REFUSALS:
                yield node.lineno, ast.unparse(node.exc)


@pytest.mark.parametrize("place", _MODULES)
def test_every_refusal_names_its_fix(place: str) -> None:
    path = ROOT / place
    without = [
        f"{module.relative_to(ROOT)}:{line}: {said}"
        for module in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        if module.name != "doctor.py"  # its findings have a form of their own
        for line, said in refusals(module)
        if "fix: " not in said and not any(passed in said for passed in _PASSED_ON)
    ]
    assert not without, "\n".join(without)
