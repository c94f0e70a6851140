"""A file of rows that survives the end of its writer at any moment: JSON lines, only appended.

The first line says what the rows were made with; a run that goes on must say the same. A line
counts when it ends: one that was cut off by a kill is taken away on opening, and its row is made
again. Each line holds a hash of itself (``sealed``), so that one with another number is refused.
One writer at a time; a second one is refused while the first lives.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.same_settings import check_same_settings
from cartridge_distill.util.sealed import is_sealed, sealed, unsealed


class Journal:
    """Rows read and rows to be appended; a context manager.

    >>> with Journal(path, {"seed": 0}) as journal:
    ...     done = {row["task"] for row in journal.rows}
    ...     journal.append({"task": 3, "text": "..."})

    Args:
        path: the file; made, with its folder, when it is not there.
        made_with: JSON values that must be the same when a run goes on.

    Attributes:
        rows: all rows, those appended by this writer included.
        torn: a cut-off line was taken away on opening.

    Raises:
        OtherSettings: it was made with others.
        ConfigError: being written by another process, damaged, or not a journal.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file of an earlier version has no hashes, and gets none.
        self._is_sealed = True
        self._file: BinaryIO = path.open("a+b", buffering=0)
        try:
            self._lock()
            self.rows, self.torn = self._read(made_with)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the writing; the next writer may come."""
        self._file.close()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Writes rows; when this returns, they outlive this process and the machine.

        Raises:
            DiskFull, DiskFailed: they cannot be written.
        """
        self._write(*rows)
        self.rows.extend(map(dict, rows))

    def _write(self, *values: Mapping[str, Any]) -> None:
        lines = [sealed(value) if self._is_sealed else dict(value) for value in values]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        handle, rest = self._file.fileno(), memoryview(text.encode())
        before = os.fstat(handle).st_size
        try:
            with named_disk(self.path.parent):
                while rest:
                    rest = rest[os.write(handle, rest) :]
                os.fsync(handle)
        except BaseException:
            os.ftruncate(handle, before)  # no half line between whole ones
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path} is being written by another process; fix: wait for its end, or give "
                "another folder"
            ) from error

    def _read(self, made_with: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        torn = whole < len(data)
        if torn and not whole and not data.startswith(b"{"):
            raise ConfigError(
                f"{self.path} is not a journal, or damaged: it has no line, and does not begin as "
                "one; fix: move it away to start afresh"
            )
        if torn:
            self._file.truncate(whole)
        lines = data[:whole].splitlines()
        if not lines:
            self._write(made_with)
            return [], torn
        try:
            found = [dict(json.loads(line)) for line in lines]
            self._is_sealed = any(map(is_sealed, found))
            if self._is_sealed and not all(map(is_sealed, found)):
                raise ValueError("some of its lines have a hash, and some have none")
            before, *rows = map(unsealed, found)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{self.path} is not a journal, or damaged: {error}; fix: move it away to start "
                "afresh"
            ) from error
        check_same_settings(
            before,
            made_with,
            f"{self.path} holds what another run wrote, so this one cannot go on from it. Give "
            "the same settings, another folder, or move the file away",
        )
        return rows, torn
