"""Tables: as they were written, and never larger than a bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridge_distill.util import parquet
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.parquet import read_rows, write_table


def test_a_table_is_read_as_pandas_reads_it(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": str(row)}] for row in range(600)],
            "extra_info": [{"document_id": "a", "index": row} for row in range(600)],
            "score": [None, 0.5, float("nan")] * 200,
            "name": ["Ä", None, ""] * 200,
        },
        index=[f"row {row}" for row in range(600)],
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(
        read_rows(tmp_path / "rows.parquet"), pd.read_parquet(tmp_path / "rows.parquet")
    )


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet").columns) == ["prompt"]


def test_a_small_file_that_stands_for_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of 2,000 letters, and how often it comes: six gigabytes."""
    monkeypatch.setattr(parquet, "MAX_BYTES", 2**25)
    path = tmp_path / "rows.parquet"
    texts = pa.DictionaryArray.from_arrays(np.zeros(3_000_000, np.int32), ["x" * 2000])
    pq.write_table(pa.table({"prompt": texts}), path, store_schema=False)
    assert path.stat().st_size < 1e6
    with pytest.raises(ConfigError, match=r"rows.parquet cannot be read.* take more than 33554432"):
        read_rows(path)


def test_a_number_of_rows_is_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(pa.table({"prompt": ["a"] * 11}), tmp_path / "rows.parquet")
    monkeypatch.setattr(parquet, "MAX_ROWS", 10)
    with pytest.raises(ConfigError, match="it has 11 rows .* at most 10 rows"):
        read_rows(tmp_path / "rows.parquet")
