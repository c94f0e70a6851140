"""Pointer files of Git LFS: what a clone without LFS leaves in place of large files."""

from __future__ import annotations

from pathlib import Path

from cartridge_distill.util.errors import CartridgeDistillError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
IS_ONE = (
    "is a Git LFS pointer, not the file itself: the folder was cloned without Git LFS; fix: run "
    "`git lfs pull` there, or download the file again"
)
_LARGEST = 1024  # bytes, by the specification of Git LFS


class NotTheFile(CartridgeDistillError, ValueError):
    """A Git LFS pointer lies where a file is wanted."""


def is_pointer(beginning: bytes | bytearray) -> bool:
    """Whether a file that begins so is a pointer."""
    return bytes(beginning[: len(_BEGINNING)]) == _BEGINNING


def pointer_in(place: Path) -> Path | None:
    """The pointer that ``place`` is, or the first that lies in the folder; None where none does."""
    if place.is_dir():
        files = (file for file in sorted(place.iterdir()) if file.is_file())
        return next((file for file in files if pointer_in(file)), None)
    if not place.is_file() or place.stat().st_size > _LARGEST:
        return None
    with place.open("rb") as file:
        return place if is_pointer(file.read(len(_BEGINNING))) else None


def about(file: Path | str) -> str:
    """What is wrong with a pointer, and the fix."""
    return f"{file} {IS_ONE}"


def refuse_pointers(place: Path) -> None:
    """Looks at a file, or at every file of a folder.

    Raises:
        NotTheFile: one is a pointer; it is named.
    """
    if (found := pointer_in(place)) is not None:
        raise NotTheFile(about(found))
