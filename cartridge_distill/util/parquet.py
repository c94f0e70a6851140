"""Parquet tables with checksums: what was changed on the disk is not read.

The format has a CRC-32 for each page, which is written and compared only when one asks for it.
Tables of other programs have none, and are read without.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cartridge_distill.util.disk import named_disk
from cartridge_distill.util.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table with a checksum for each page.

    Raises:
        DiskFull, DiskFailed: it cannot be written.
    """
    import pyarrow.parquet as pq

    with named_disk(path.parent):
        pq.write_table(table, path, write_page_checksum=True)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads a table.

    Args:
        columns: those that are wanted; all by default.

    Raises:
        ConfigError: it is no table, lacks a column, or is not as it was written.
        OSError: it cannot be opened.
    """
    import pandas as pd

    wanted = None if columns is None else list(columns)
    with path.open("rb"):
        pass  # what the system says of a file that is not there is clearer than what follows
    try:
        rows = pd.read_parquet(path, columns=wanted, page_checksum_verification=True)
        # The checksums are of the pages, and what says that bytes are text stands elsewhere.
        for name, column in rows.items():
            if len(column) and isinstance(column.iloc[0], bytes):
                raise ValueError(f"column {name!r} holds bytes, not text")
        return rows
    except Exception as error:  # a damaged file can fail in any way there is
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as a Parquet table: {reason:.300}. It is damaged, or of "
            "another kind; write it anew, or take another copy"
        ) from error
