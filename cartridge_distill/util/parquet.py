"""Parquet tables with checksums: what was changed on the disk is not read.

The format has a CRC-32 for each page, which is written and compared only when one asks for it. What
says how many rows there are, what the columns are called and where their pages lie has none: so the
table's metadata have a SHA-256 of each column's values. Tables of other programs have neither, and
are read without.

What a file says of its own size may be a lie. A few kilobytes can stand for terabytes: a value that
is repeated is written once, and its count; a page is compressed. So rows and bytes are counted as
they come, and the kernel bounds the memory that one page, one row and their Python objects take.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cartridge_distill.util.bounded_memory import bounded_memory
from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_ROWS = 10_000_000
MAX_BYTES = 2 * 2**30
"""Of a table in memory, as Arrow holds it."""
MEMORY, MEMORY_PER_BYTE = 2**30, 128
"""What reading may take: so much, and so much more for each byte of the file."""
HASHES = b"cartridge_distill.sha256"
"""Of the schema's metadata: the columns' names with their hashes, as JSON."""
_BY_HAND = "If pyarrow changed it, drop the old hashes: table.replace_schema_metadata(None)"
_BATCH_ROWS = 256  # decoded between two looks at the size


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table with a checksum for each page and a hash for each column.

    Raises:
        DiskFull, DiskFailed: it cannot be written.
    """
    import pyarrow.parquet as pq

    hashes = {name: _hash(table.column(name)) for name in table.column_names}
    told = {**(table.schema.metadata or {}), HASHES: json.dumps(hashes).encode()}
    with named_disk(path.parent):
        pq.write_table(table.replace_schema_metadata(told), path, write_page_checksum=True)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads a table, in memory that is bounded by the size of its file (on Linux).

    Args:
        columns: only these; one that is not there is left out.

    Raises:
        ConfigError: it is no table, is not as it was written, or is too large.
        OSError: it cannot be opened.
    """
    with path.open("rb"):
        pass  # what the system says of a file that is not there is clearer than what follows
    # Before there is a bound: what they load stays, and is not the file's.
    import pandas  # noqa: F401
    import pyarrow as pa
    import pyarrow.parquet  # noqa: F401

    pa.allocate_buffer(1)  # with its first byte Arrow's own allocator takes a gigabyte, unused

    memory = MEMORY + MEMORY_PER_BYTE * path.stat().st_size
    try:
        with bounded_memory(memory), _system_allocator():
            rows = _read_bounded(path, columns).to_pandas(use_threads=False)
        # The checksums are of the pages, and what says that bytes are text stands elsewhere.
        for name, column in rows.items():
            if len(column) and isinstance(column.iloc[0], bytes):
                raise ValueError(f"column {name!r} holds bytes, not text")
        return rows
    except MemoryError as error:  # Arrow's is one
        raise ConfigError(
            f"{path} cannot be read as a Parquet table: its {path.stat().st_size} bytes need more "
            f"than {memory / 1e9:.1f} GB of memory, which no table that was written here does; "
            "fix: if it is right, write it anew in several files"
        ) from error
    except Exception as error:  # a damaged file can fail in any way there is
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as a Parquet table: {reason:.300}: it is damaged, or of "
            "another kind; fix: write it anew, or take another copy"
        ) from error


@contextmanager
def _system_allocator() -> Iterator[None]:
    """Arrow's own one has memory in reserve, which no bound of the system would count."""
    import pyarrow as pa

    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _read_bounded(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Reads a table piece by piece, and stops where it grows too large.

    Raises:
        ValueError: it does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        about = file.metadata
        groups = [about.row_group(index) for index in range(about.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        if about.num_rows > MAX_ROWS or num_bytes > MAX_BYTES:
            raise ValueError(
                f"it has {about.num_rows} rows and {num_bytes} bytes; at most {MAX_ROWS} rows and "
                f"{MAX_BYTES} bytes are read"
            )
        num_bytes, batches = 0, []
        schema = file.schema_arrow
        if columns is not None:
            columns = [name for name in columns if name in schema.names]
            schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            num_bytes += batch.nbytes
            if num_bytes > MAX_BYTES:
                raise ValueError(f"its rows take more than {MAX_BYTES} bytes in memory")
            batches.append(batch)
        # The schema has what pandas wrote beside it: the index, and columns that are one.
        table = pa.Table.from_batches(batches, schema)
        hashes = json.loads((schema.metadata or {}).get(HASHES, b"{}"))
        if hashes:
            _check_hashes(table, hashes, whole=columns is None)
        return table


def _check_hashes(table: pa.Table, hashes: Mapping[str, str], whole: bool) -> None:
    """Each column is as it was written, and where all were read, all are there.

    Raises:
        ValueError: one is not.
    """
    if absent := sorted(hashes.keys() - set(table.column_names)) if whole else []:
        raise ValueError(f"its columns {', '.join(absent)} are not there. {_BY_HAND}")
    for name in table.column_names:
        if _hash(table.column(name)) != hashes.get(name):
            raise ValueError(f"its column {name!r} is not as it was written. {_BY_HAND}")


def _hash(column: pa.ChunkedArray) -> str:
    """Of its values, however they are cut. (The type of a list is read under another name.)"""
    found = hashlib.sha256()
    for chunk in column.chunks:
        for start in range(0, len(chunk), _BATCH_ROWS):
            for value in chunk.slice(start, _BATCH_ROWS).to_pylist():
                found.update(json.dumps(value, default=str).encode() + b"\n")
    return found.hexdigest()
