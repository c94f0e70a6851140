"""Applies this project's `*.patch` files to veRL or Tokasaurus, checks them, takes them back.

The patches of this folder are for veRL 0.9.1; Tokasaurus has one, beside the code that it calls. A
tree is a folder that holds `verl/` or `tokasaurus/`: the site-packages of the installed release, or
a source checkout. It is found without importing the package (which takes seconds, and fails when it
is broken). `git apply` does the work; nothing is recorded beside the tree, its files are the only
state.

Deliberately not here: fuzzy matching, other versions, and any repair of a tree that somebody else
changed. Such a tree is reported, and left as it is.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_patches.packages import PACKAGES, TOKASAURUS, VERL, Package, PatchError

PATCH_DIR = VERL.patches

EXIT_APPLIED = 0
EXIT_NOT_APPLIED = 1
EXIT_TROUBLE = 2


class State(enum.Enum):
    """How a file, or all files of a patch together, stand to a patch."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    PARTLY = "partly applied"
    CHANGED = "foreign changes"
    MISSING = "file missing"


@dataclass(frozen=True)
class Tree:
    """Where a package is: `root` holds its folder."""

    root: Path
    version: str
    option: str = ""
    """What to add to a command line to name this tree again: `" --target DIR"`, or nothing."""
    package: Package = VERL


@dataclass(frozen=True)
class PatchStatus:
    """One patch on one tree. `files` maps each patched path (`verl/...`) to its own state."""

    patch: Path
    files: dict[str, State]
    package: Package = VERL

    @property
    def name(self) -> str:
        return self.patch.relative_to(self.package.patches).as_posix()

    @property
    def state(self) -> State:
        states = set(self.files.values())
        if len(states) == 1:
            return states.pop()
        for worst in (State.MISSING, State.CHANGED):
            if worst in states:
                return worst
        return State.PARTLY

    @property
    def clean(self) -> bool:
        """Whether the patch is wholly on, or wholly off."""
        return self.state in (State.APPLIED, State.NOT_APPLIED)


def patch_files(package: Package = VERL) -> list[Path]:
    """All patches, in a fixed order. No two touch the same file, so the order does not matter."""
    return sorted(package.patches.rglob("*.patch"))


def patched_paths(patch: Path) -> list[str]:
    """The paths (`verl/...`) that `patch` changes."""
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)


def find_tree(target: Path | None = None, package: Package = VERL) -> Tree:
    """The package's tree at `target`, or the one that Python would import here.

    Raises:
        PatchError: it is not there, or another version than the patches are made for.
    """
    if target is None:
        spec = importlib.util.find_spec(package.module)
        if spec is None or spec.origin is None:
            raise PatchError(
                f"{package.name} is not installed for {sys.executable}; fix: pip install "
                f"{package.install}, or name a checkout with --target DIR"
            )
        root = Path(spec.origin).resolve().parent.parent
    else:
        root = target.expanduser().resolve()
        if not (root / package.module).is_dir() and root.name == package.module:
            root = root.parent  # the package itself was named
    version = package.version_in(root / package.module)
    named = "" if package is VERL else f" --package {package.module}"
    option = f" --target {root}" if target is not None else ""
    return Tree(root, version, named + option, package)


def _git_apply(root: Path, *arguments: str, stdin: bytes | None = None) -> tuple[bool, str]:
    """Run `git apply` in `root` as if no repository existed; returns (success, what git said).

    Inside a work tree git skips every path outside it, or outside the folder it was started in,
    *and reports success*. A virtual environment usually lies inside somebody's repository, so git
    must not look for one: GIT_DIR names something that is none.
    """
    git = shutil.which("git")
    if git is None:
        raise PatchError("git is not on the PATH; fix: install git, which applies the patches")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {
        "GIT_DIR": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,  # apply.whitespace and the like must not matter
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
    done = subprocess.run(
        [git, "apply", "-p1", "--whitespace=nowarn", *arguments],
        cwd=root,
        env=environment,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
    )
    return done.returncode == 0, done.stderr.decode(errors="replace").strip()


def _file_state(tree: Tree, patch: Path, path: str) -> State:
    if not (tree.root / path).is_file():
        return State.MISSING
    only = (f"--include={path}", "--check")
    if _git_apply(tree.root, *only, str(patch))[0]:
        return State.NOT_APPLIED
    if _git_apply(tree.root, *only, "--reverse", str(patch))[0]:
        return State.APPLIED
    return State.CHANGED


def status(tree: Tree) -> list[PatchStatus]:
    """How each patch stands on `tree`. Changes nothing."""
    return [
        PatchStatus(
            patch,
            {path: _file_state(tree, patch, path) for path in patched_paths(patch)},
            tree.package,
        )
        for patch in patch_files(tree.package)
    ]


def _move(tree: Tree, wanted: State) -> list[PatchStatus]:
    """Bring all patches into the state `wanted` (APPLIED or NOT_APPLIED), or change nothing.

    Returns the patches that were moved.

    Raises:
        PatchError: a patch is neither wholly on nor wholly off, or git could not write.
    """
    before = status(tree)
    trouble = [item for item in before if not item.clean]
    if trouble:
        lines = [line for item in trouble for line in _explain(tree, item)]
        raise PatchError("nothing was changed:\n" + "\n".join(lines))
    moving = [item for item in before if item.state is not wanted]
    if not moving:
        return []
    # One stream, not several arguments: git checks a whole stream before it writes the first file,
    # and writes argument by argument.
    stream = b"\n".join(item.patch.read_bytes() for item in moving)
    direction = ("--reverse",) if wanted is State.NOT_APPLIED else ()
    succeeded, said = _git_apply(tree.root, *direction, "-", stdin=stream)
    wrong = [item.name for item in status(tree) if item.state is not wanted]
    if not succeeded or wrong:
        raise PatchError(
            f"git apply failed in {tree.root} ({', '.join(wrong) or 'no patch left over'}): {said}"
        )
    return moving


def apply(tree: Tree) -> list[PatchStatus]:
    """Apply every patch that is not applied yet; returns those. All or none."""
    return _move(tree, State.APPLIED)


def revert(tree: Tree) -> list[PatchStatus]:
    """Take back every patch that is applied; returns those. All or none."""
    return _move(tree, State.NOT_APPLIED)


def _explain(tree: Tree, item: PatchStatus) -> list[str]:
    """Why `item` is in trouble, file by file, and the fix."""
    package = tree.package
    lines = [f"  {item.name}: {item.state.value}"]
    for path, state in item.files.items():
        match state:
            case State.CHANGED:
                what = (
                    f"is neither as {package.name} {package.version} ships it nor as this patch "
                    "leaves it"
                )
            case State.MISSING:
                what = "does not exist"
            case _:
                what = f"is {state.value}"
        lines.append(f"    {tree.root / path} {what}")
    if (tree.root / ".git").exists():
        fix = f"git -C {tree.root} checkout {package.checkout} -- {' '.join(item.files)}"
    else:
        fix = f"pip install --force-reinstall --no-deps {package.install}"
    lines.append(f"    fix: {fix}   (throws local changes away)")
    lines.append(f"    then: python -m verl_patches apply{tree.option}")
    return lines


def _command_check(tree: Tree) -> int:
    items = status(tree)
    for item in items:
        if item.clean:
            print(f"  {item.name}: {item.state.value}")
        else:
            print("\n".join(_explain(tree, item)))
    if any(not item.clean for item in items):
        print("trouble: see the fix above")
        return EXIT_TROUBLE
    missing = [item for item in items if item.state is State.NOT_APPLIED]
    if missing:
        fix = f"python -m verl_patches apply{tree.option}"
        print(f"{len(missing)} of {len(items)} not applied. fix: {fix}")
        return EXIT_NOT_APPLIED
    print(f"all {len(items)} patches are applied")
    return EXIT_APPLIED


def _command_apply(tree: Tree) -> int:
    moved = apply(tree)
    for item in moved:
        print(f"  {item.name}: applied to {', '.join(item.files)}")
    print(f"{len(moved)} applied now, {len(patch_files(tree.package)) - len(moved)} before")
    return EXIT_APPLIED


def _command_revert(tree: Tree) -> int:
    moved = revert(tree)
    for item in moved:
        print(f"  {item.name}: reverted in {', '.join(item.files)}")
    if moved:
        print(f"{len(moved)} reverted; {tree.package.name}'s files are as they came")
    else:
        print("nothing to revert")
    return EXIT_APPLIED


_COMMANDS = {
    "apply": (_command_apply, "apply the patches: all of them, or none"),
    "check": (_command_check, "say for each patch whether it is applied; changes nothing"),
    "revert": (_command_revert, "take the patches back: all of them, or none"),
}

_DESCRIPTION = f"""\
Ties this project into veRL {VERL.version}: adds actor_rollout_ref.actor.cartridge to its
configuration, "tokasaurus" to its rollouts, a cartridge engine, and what a CPU needs.

The patches hold hooks, not logic. A patched veRL works as before while
actor.cartridge.enabled is false.

With --package tokasaurus: repairs a server that is to be sent thousands of cartridges, the branch
geoff/cartridges of Tokasaurus at {TOKASAURUS.version}. A patched Tokasaurus needs this package.
"""

_EPILOG = f"""\
examples:
  python -m verl_patches apply                    the veRL that this Python imports
  python -m verl_patches check --target ~/verl    a source checkout of v{VERL.version}
  python -m verl_patches apply --package tokasaurus      in the environment of that server

Each command is safe to run twice.
exit status: 0 done, or all applied; 1 check: not applied; 2 trouble, nothing was changed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m verl_patches",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{apply,check,revert}")
    for name, (_, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--target",
            type=Path,
            metavar="DIR",
            help="folder that holds verl/ (default: where this Python finds veRL)",
        )
        command.add_argument(
            "--package",
            choices=PACKAGES,
            default=VERL.module,
            help="what is patched (default: %(default)s)",
        )
    options = parser.parse_args(arguments)
    try:
        tree = find_tree(options.target, PACKAGES[options.package])
        print(f"{tree.package.name} {tree.version} in {tree.root}")
        return _COMMANDS[options.command][0](tree)
    except PatchError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return EXIT_TROUBLE
