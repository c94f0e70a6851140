"""What is patched: veRL, and the branch of Tokasaurus that serves cartridges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cartridge_distill.engines.tokasaurus import guard
from cartridge_distill.util.errors import CartridgeDistillError

VERL_VERSION = "0.9.1"


class PatchError(CartridgeDistillError, RuntimeError):
    """The patches cannot be applied, checked or reverted on this tree."""


@dataclass(frozen=True)
class Package:
    """What is patched.

    Attributes:
        name: for people.
        module: as it is imported, and the folder of it in a tree.
        version: the one that the patches are made for.
        patches: the folder below which they lie.
        install: what installs it, for pip.
        checkout: what git checks out in a clone.
        version_in: the version in a folder `module/`, or a PatchError.
    """

    name: str
    module: str
    version: str
    patches: Path
    install: str
    checkout: str
    version_in: Callable[[Path], str]


def _version_of_verl(folder: Path) -> str:
    version_file = folder / "version" / "version"
    if not version_file.is_file():
        raise PatchError(
            f"no veRL in {folder.parent}: {version_file} does not exist; fix: name the folder "
            "that holds verl/, a checkout or a site-packages folder"
        )
    version = version_file.read_text(encoding="utf-8").strip()
    if version != VERL_VERSION:
        raise PatchError(
            f"other veRL version: {folder.parent} holds veRL {version}, the patches are for "
            f"{VERL_VERSION}; fix: pip install --no-deps verl=={VERL_VERSION}, or check out its "
            f"tag v{VERL_VERSION}"
        )
    return version


def _version_of_tokasaurus(folder: Path) -> str:
    """Releases and branches of Tokasaurus all call themselves 0.0.4: its sources tell them."""
    if not folder.is_dir():
        raise PatchError(
            f"no Tokasaurus in {folder.parent}: {folder} does not exist; fix: name the folder "
            "that holds tokasaurus/, a checkout or a site-packages folder"
        )
    if guard.state_of(folder) == "unknown":
        raise PatchError(guard.unknown(folder))
    return f"commit {guard.COMMIT[:7]}"


VERL = Package(
    "veRL",
    "verl",
    VERL_VERSION,
    Path(__file__).resolve().parent,
    f"verl=={VERL_VERSION}",
    f"v{VERL_VERSION}",
    _version_of_verl,
)
TOKASAURUS = Package(
    "Tokasaurus",
    "tokasaurus",
    f"commit {guard.COMMIT[:7]}",
    Path(guard.__file__).resolve().parent,
    guard.INSTALL.removeprefix("pip install "),
    guard.COMMIT,
    _version_of_tokasaurus,
)
PACKAGES = {package.module: package for package in (VERL, TOKASAURUS)}
