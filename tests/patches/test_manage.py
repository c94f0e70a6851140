"""apply, check, revert: what they do to a tree, and what they say of one that was tampered with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from verl_patches import manage
from verl_patches.manage import EXIT_APPLIED, EXIT_NOT_APPLIED, EXIT_TROUBLE, State, main

# Where users look for them.
KNOWN_PATCHES = {
    "actor/dp_actor.patch",
    "config/actor_config.patch",
    "fsdp_workers.patch",
    "rollout/replica.patch",
}


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }


def run(command: str, tree: Path) -> int:
    return main([command, "--target", str(tree)])


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_there_and_back_is_byte_identical(tree: Path) -> None:
    before = contents(tree)
    assert run("check", tree) == EXIT_NOT_APPLIED
    assert run("apply", tree) == EXIT_APPLIED
    after = contents(tree)
    assert run("check", tree) == EXIT_APPLIED
    changed = {path for path in after if after[path] != before.get(path)}
    named = {path for patch in manage.patch_files() for path in manage.patched_paths(patch)}
    assert changed == named
    assert run("apply", tree) == EXIT_APPLIED
    assert contents(tree) == after
    assert run("revert", tree) == EXIT_APPLIED
    assert contents(tree) == before
    assert run("revert", tree) == EXIT_APPLIED
    assert contents(tree) == before


def test_all_patches_are_found_and_touch_different_files() -> None:
    patches = manage.patch_files()
    assert {patch.relative_to(manage.PATCH_DIR).as_posix() for patch in patches} >= KNOWN_PATCHES
    paths = [path for patch in patches for path in manage.patched_paths(patch)]
    assert len(paths) == len(set(paths)), "order would matter"


def test_plain_git_apply_takes_each_patch_alone_and_in_any_order(tree: Path) -> None:
    """What a user does by hand in a checkout: git init, git apply, without our command."""
    git(tree, "init", "-q")
    for patch in reversed(manage.patch_files()):
        git(tree, "apply", str(patch))
    assert run("check", tree) == EXIT_APPLIED


def test_check_names_each_patch(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = manage.patch_files()[0]
    manage._git_apply(tree, str(first))
    assert run("check", tree) == EXIT_NOT_APPLIED
    said = capsys.readouterr().out
    assert "actor/dp_actor.patch: applied" in said
    assert "cpu.patch: not applied" in said
    assert "fix: python -m verl_patches apply --target" in said
    assert run("apply", tree) == EXIT_APPLIED
    assert f"{len(manage.patch_files()) - 1} applied now, 1 before" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["enclosing repository", "checkout", "GIT_DIR in environment"])
def test_repositories_around_the_tree_do_not_matter(
    tree: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside somebody's work tree a bare `git apply` skips every file and reports success."""
    if where == "enclosing repository":
        git(tree.parent, "init", "-q")
        (tree.parent / ".gitignore").write_text("tree/\n")
    elif where == "checkout":
        git(tree, "init", "-q")
        git(tree, "add", ".")
        git(tree, "commit", "-qm", "v0.9.1")
    else:
        other = tree.parent / "other"
        other.mkdir()
        git(other, "init", "-q")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
        monkeypatch.setenv("GIT_WORK_TREE", str(other))
    before = contents(tree)
    assert run("apply", tree) == EXIT_APPLIED
    assert contents(tree) != before
    assert run("check", tree) == EXIT_APPLIED
    assert run("revert", tree) == EXIT_APPLIED
    assert contents(tree) == before


def test_other_version_is_refused_by_name(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "verl/version/version").write_text("0.8.0\n")
    before = contents(tree)
    for command in ("apply", "check", "revert"):
        assert run(command, tree) == EXIT_TROUBLE
        said = capsys.readouterr().err
        assert "other veRL version" in said and "0.8.0" in said and "verl==0.9.1" in said
    assert contents(tree) == before


def test_no_verl_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", tmp_path) == EXIT_TROUBLE
    assert "no veRL in" in capsys.readouterr().err


def test_the_package_folder_itself_may_be_named(tree: Path) -> None:
    assert manage.find_tree(tree / "verl").root == tree.resolve()


@pytest.mark.parametrize("patched_first", [False, True])
def test_foreign_change_stops_everything(
    tree: Path, capsys: pytest.CaptureFixture[str], patched_first: bool
) -> None:
    if patched_first:
        assert run("apply", tree) == EXIT_APPLIED
    victim = tree / "verl/utils/distributed.py"
    text = victim.read_text()
    spot = '{get_device_name()}:{get_nccl_backend()}"' if not patched_first else "_default_backend"
    assert spot in text
    victim.write_text(text.replace(spot, "somebody_elses_edit"))
    before = contents(tree)
    capsys.readouterr()
    for command in ("apply", "revert", "check"):
        assert run(command, tree) == EXIT_TROUBLE
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert "cpu.patch: foreign changes" in said
        assert str(victim) in said and "pip install --force-reinstall" in said
        assert contents(tree) == before, "nothing half applied"


def test_missing_file(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "verl/workers/rollout/base.py").unlink()
    assert run("apply", tree) == EXIT_TROUBLE
    said = capsys.readouterr().err
    assert "rollout/replica.patch: file missing" in said and "does not exist" in said


def test_half_applied_patch(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = manage.PATCH_DIR / "rollout/replica.patch"
    manage._git_apply(tree, "--include=verl/workers/rollout/base.py", str(patch))
    item = next(i for i in manage.status(manage.find_tree(tree)) if i.patch == patch)
    assert item.state is State.PARTLY
    assert run("check", tree) == EXIT_TROUBLE
    said = capsys.readouterr().out
    assert "partly applied" in said
    assert "base.py is applied" in said and "replica.py is not applied" in said


def test_change_elsewhere_in_a_patched_file_is_no_obstacle(tree: Path) -> None:
    victim = tree / "verl/utils/distributed.py"
    victim.write_text("# a line of the user's own\n" + victim.read_text())
    before = contents(tree)
    assert run("apply", tree) == EXIT_APPLIED
    assert run("revert", tree) == EXIT_APPLIED
    assert contents(tree) == before


def test_hard_linked_files_are_replaced_not_written_through(tree: Path) -> None:
    """uv links packages from its cache: patching one environment must not patch the cache."""
    source = tree / "verl/utils/config.py"
    cached = tree.parent / "cached.py"
    os.link(source, cached)
    before = cached.read_bytes()
    assert run("apply", tree) == EXIT_APPLIED
    assert cached.read_bytes() == before != source.read_bytes()


def test_git_missing(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tree))
    assert run("apply", tree) == EXIT_TROUBLE
    assert "install git" in capsys.readouterr().err


def test_users_git_configuration_does_not_matter(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tree.parent / "gitconfig"
    config.write_text("[apply]\n\twhitespace = error-all\n\tignoreWhitespace = change\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    before = contents(tree)
    assert run("apply", tree) == EXIT_APPLIED
    assert run("revert", tree) == EXIT_APPLIED
    assert contents(tree) == before
