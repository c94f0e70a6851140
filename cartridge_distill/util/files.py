"""Files and directories that are there whole or not at all.

A temporary one beside the target is filled, flushed to the disk and renamed: a reader at any
moment, or after a crash, finds the old one or the new one.

A rename replaces a file, but no directory that holds something. Directories are exchanged, which
Linux does in one step on local file systems. A link to the newest directory would do it anywhere,
but what is written here is also copied, uploaded and named by hand, as a directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import ConfigError

OWNED = ".written-by-cartridge-distill"
"""A folder with this file in it was made by :func:`fresh_folder`, and may be made anew."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def fresh_folder(folder: Path, written: Sequence[str]) -> None:
    """An empty folder, in place of one that an earlier call made.

    The mark says who made the folder, the patterns what was written into it. What matches none of
    them is somebody's own, and then nothing at all is deleted.

    Args:
        written: what the command writes, as patterns of paths below the folder: ``*.log`` for
            files there, ``data/*.parquet``, and ``checkpoints/**`` for all below it.

    Raises:
        FileExistsError: something is there that this project did not make; nothing is touched.
    """
    if folder.exists() or folder.is_symlink():
        empty = folder.is_dir() and not any(folder.iterdir())
        if not empty:
            check_own(folder, written)
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNED).touch()


def check_own(folder: Path, written: Sequence[str]) -> None:
    """Is all of a folder this project's, so that it may be deleted? See :func:`fresh_folder`.

    Raises:
        FileExistsError: it is not.
    """
    if folder.is_symlink() or not (folder / OWNED).is_file():
        raise FileExistsError(
            f"{folder} is there and holds files that this command did not write; fix: name "
            "another folder with --out, or move it away"
        )
    strange = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or not path.is_dir())
        and not _is_of(path.relative_to(folder), written)
    ]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise FileExistsError(
            f"{folder} is this program's and holds files that it did not write: "
            f"{', '.join(strange[:3])}{more}; fix: move them away, or name another folder with "
            "--out"
        )


def _is_of(path: PurePath, written: Sequence[str]) -> bool:
    if path.name == OWNED:
        return True
    for pattern in written:
        head, all_below, _ = pattern.partition("/**")
        if all_below and path.parts[0] == head:
            return True
        # Part by part: a * does not reach into a folder.
        parts = pattern.split("/")
        if len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts)):
            return True
    return False


def check_writable(folder: Path, option: str) -> None:
    """Can a folder be made, and written to? Asked before the work; nothing is left behind.

    The rights of a folder do not tell: root has them in ``/proc`` and on a disk that is read-only,
    where nobody can write. So a file without a name is made where the folder is, or is to be.

    Args:
        option: that named it, for the message.

    Raises:
        ConfigError: it cannot.
    """
    there = folder.expanduser().absolute()
    while not (there.exists() or there.is_symlink()) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} {folder}: {there} is no folder; fix: give another {option}")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(
            f"{option} {folder}: {there} cannot be written to ({error.strerror}); fix: give "
            f"another {option}"
        ) from None


def replace_directory(target: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Fills a temporary directory beside ``target``, then renames it into place.

    Raises:
        FileExistsError: ``target`` is there and ``overwrite`` is false.
        DiskFull: there is no room for it; what was there before is untouched.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} is already there, and a written version is never changed; fix: name "
            "another, or --overwrite it where the command has that option"
        )
    with named_disk(target.parent):
        _replace_directory(target, write)


def _replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(scratch)
        if target.exists():
            _flush_files(scratch)
            _exchange(scratch, target)
            _flush(target.parent)
            shutil.rmtree(scratch)  # the old one
        else:
            move_into_place(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _exchange(one: Path, other: Path) -> None:
    """Each gets the other's name.

    In one step where kernel and file system can (not NFS, not macOS). Else in three, and who comes
    between the first two finds nothing at ``other``: an error, not half a directory.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
        if libc.renameat2(*names, _RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) not in _CANNOT_EXCHANGE:
            raise OSError(number, os.strerror(number), str(other))
    aside = one.with_name(f"{one.name}.old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def move_into_place(scratch: Path, target: Path) -> None:
    """Flushes a filled directory and renames it; ``target`` is not there, on the same disk."""
    _flush_files(scratch)
    os.replace(scratch, target)
    _flush(target.parent)


def replace_file(
    target: Path, write: Callable[[Path], None], overwrite: bool, flush: bool = True
) -> None:
    """The same for one file.

    Args:
        flush: False leaves the time of writing to the system, for what tells itself whether it is
            whole: after a crash of the machine the name may stand for half a file.

    Raises:
        FileExistsError: ``target`` is there and ``overwrite`` is false.
        IsADirectoryError: it is a directory.
        DiskFull: there is no room for it; what was there before is untouched.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; name a file")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} is already there; fix: name another, or overwrite it (--overwrite)"
        )
    with named_disk(target.parent):
        _replace_file(target, write, flush)


def _replace_file(target: Path, write: Callable[[Path], None], flush: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        write(scratch)
        scratch.chmod(0o644)
        if flush:
            _flush(scratch)
        os.replace(scratch, target)
        if flush:
            _flush(target.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _flush_files(directory: Path) -> None:
    for file in directory.iterdir():
        _flush(file)
    directory.chmod(0o755)  # mkdtemp makes it 0700; the server may run as another user


def _flush(path: Path) -> None:
    """After a crash of the machine a name must not stand for half a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
