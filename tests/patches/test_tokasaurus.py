"""Tokasaurus' patch: on and off by the same command, on files made of the lines that it quotes.

The branch itself is not at hand; ``tests/engines/tokasaurus/test_real_branch.py`` has it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
from pathlib import Path

import pytest

from cartridge_distill.engines.tokasaurus import allocator, guard, loading
from verl_patches import manage
from verl_patches.manage import EXIT_APPLIED, EXIT_NOT_APPLIED, EXIT_TROUBLE, main
from verl_patches.packages import TOKASAURUS

[PATCH] = manage.patch_files(TOKASAURUS)
KNOWN_PATCH = "3ac44617c1f82168b7af08d48c9154c16422311209f7885c7d531279b894687d"
"""The patch for which ``guard.REPAIRED`` holds."""


def run(command: str, tree: Path) -> int:
    return main([command, "--package", "tokasaurus", "--target", str(tree)])


def contents(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*.py")}


def quoted(patch: str) -> dict[str, str]:
    """By path: the lines that a patch quotes in their places, with comments between them."""
    found = {}
    for part in patch.split("diff --git ")[1:]:
        lines: list[str] = []
        for first, hunk in re.findall(r"^@@ -(\d+),\d+ .*\n((?:[ +-].*\n)+)", part, re.MULTILINE):
            lines += [f"# line {len(lines) + n + 1}" for n in range(int(first) - 1 - len(lines))]
            lines += [line[1:] for line in hunk.splitlines() if line[0] in " -"]
        lines += ["# the rest"] * 3
        [path] = re.findall(r"^\+\+\+ b/(\S+)$", part, re.MULTILINE)
        found[path] = "\n".join(lines) + "\n"
    return found


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that counts as the pinned commit, and with the patch as the repaired one."""
    root = tmp_path / "tree"
    for path, text in quoted(PATCH.read_text()).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    other = tmp_path / "other"
    shutil.copytree(root, other)
    assert manage._git_apply(other, str(PATCH)) == (True, "")
    monkeypatch.setattr(guard, "PLAIN", guard.sources_sha256(root / "tokasaurus"))
    monkeypatch.setattr(guard, "REPAIRED", guard.sources_sha256(other / "tokasaurus"))
    return root


def test_there_and_back_is_byte_identical(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(tree)
    assert run("check", tree) == EXIT_NOT_APPLIED
    assert "apply --package tokasaurus --target" in capsys.readouterr().out
    for _ in range(2):
        assert run("apply", tree) == EXIT_APPLIED
        assert guard.state_of(tree / "tokasaurus") == "repaired"
    assert run("check", tree / "tokasaurus") == EXIT_APPLIED
    for _ in range(2):
        assert run("revert", tree) == EXIT_APPLIED
        assert contents(tree) == before
    said = capsys.readouterr().out
    assert "Tokasaurus commit 845f115" in said and "Tokasaurus's files are as they came" in said


def test_another_tokasaurus_is_left_as_it_is(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "tokasaurus" / "more.py").write_text("")
    before = contents(tree)
    for command in ("apply", "check", "revert"):
        assert run(command, tree) == EXIT_TROUBLE
        assert "not the one that the repairs were written for" in capsys.readouterr().err
    assert contents(tree) == before
    shutil.rmtree(tree / "tokasaurus")
    assert run("apply", tree) == EXIT_TROUBLE
    assert "no Tokasaurus in" in capsys.readouterr().err


def test_verl_is_what_is_patched_unless_another_is_named(tree: Path) -> None:
    assert main(["apply", "--target", str(tree)]) == EXIT_TROUBLE  # there is no veRL
    assert guard.state_of(tree / "tokasaurus") == "plain"
    assert PATCH not in manage.patch_files()


def test_every_hook_calls_what_is_there() -> None:
    added = [line[1:] for line in PATCH.read_text().splitlines() if line.startswith("+")]
    imports = [line.strip() for line in added if "from cartridge_distill" in line]
    assert len(imports) == 7
    for line in imports:
        [statement] = ast.parse(line).body
        assert isinstance(statement, ast.ImportFrom)
        module = {allocator.__name__: allocator, loading.__name__: loading}[str(statement.module)]
        assert all(callable(getattr(module, alias.name)) for alias in statement.names)


def test_the_hash_of_the_repaired_sources_belongs_to_this_patch() -> None:
    """Another patch: run ``test_real_branch.py``, put the hash that it finds into the guard, and
    this one here."""
    assert hashlib.sha256(PATCH.read_bytes()).hexdigest() == KNOWN_PATCH
    assert len(guard.PLAIN) == len(guard.REPAIRED) == 64
