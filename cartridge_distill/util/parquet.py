"""Parquet tables with checksums: what was changed on the disk is not read.

The format has a CRC-32 for each page, which is written and compared only when one asks for it.
Tables of other programs have none, and are read without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_ROWS = 10_000_000
MAX_BYTES = 2 * 2**30
"""Of a table in memory. A few kilobytes of a file can stand for terabytes: a value that is repeated
is written once, and its count."""
_BATCH_ROWS = 256  # decoded between two looks at the size


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table with a checksum for each page.

    Raises:
        DiskFull, DiskFailed: it cannot be written.
    """
    import pyarrow.parquet as pq

    with named_disk(path.parent):
        pq.write_table(table, path, write_page_checksum=True)


def read_rows(path: Path) -> pd.DataFrame:
    """Reads a table.

    Raises:
        ConfigError: it is no table, is not as it was written, or is too large.
        OSError: it cannot be opened.
    """
    with path.open("rb"):
        pass  # what the system says of a file that is not there is clearer than what follows
    try:
        rows = _read_bounded(path).to_pandas()
        # The checksums are of the pages, and what says that bytes are text stands elsewhere.
        for name, column in rows.items():
            if len(column) and isinstance(column.iloc[0], bytes):
                raise ValueError(f"column {name!r} holds bytes, not text")
        return rows
    except Exception as error:  # a damaged file can fail in any way there is
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as a Parquet table: {reason:.300}: it is damaged, or of "
            "another kind; fix: write it anew, or take another copy"
        ) from error


def _read_bounded(path: Path) -> pa.Table:
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
        for batch in file.iter_batches(_BATCH_ROWS):
            num_bytes += batch.nbytes
            if num_bytes > MAX_BYTES:
                raise ValueError(f"its rows take more than {MAX_BYTES} bytes in memory")
            batches.append(batch)
        # The schema has what pandas wrote beside it: the index, and columns that are one.
        return pa.Table.from_batches(batches, file.schema_arrow)
