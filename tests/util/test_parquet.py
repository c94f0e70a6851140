"""Tables: as they were written, and never larger than a bound."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize("what", ["a row less", "another value", "another name", "a column less"])
def test_what_no_page_holds_is_compared_too(what: str, tmp_path: Path) -> None:
    """Page checksums are right in each of these files; the hashes are of the table before."""
    path, table = tmp_path / "rows.parquet", pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    write_table(table, path)
    assert read_rows(path, ["b"])["b"].dropna().tolist() == ["x", "z"]
    hashes = pq.read_schema(path).metadata
    changed = {
        "a row less": table.slice(0, 2),
        "another value": table.set_column(0, "a", pa.array([1, 2, 4])),
        "another name": table.rename_columns(["a", "c"]),
        "a column less": table.drop_columns(["b"]),
    }[what]
    pq.write_table(changed.replace_schema_metadata(hashes), path, write_page_checksum=True)
    with pytest.raises(ConfigError, match=r"(is not as it was written|are not there).*pyarrow"):
        read_rows(path)
    pq.write_table(changed.replace_schema_metadata(None), path)  # as the message says
    read_rows(path)


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


READS = """
import resource, sys
import subprocess
import sys
from pathlib import Path
from cartridge_distill.util import parquet
from cartridge_distill.util.errors import ConfigError

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

parquet.MEMORY = 2**27
parquet.read_rows(Path(sys.argv[1]))  # what libraries load
before = most()
for path in sys.argv[2:]:
    try:
        parquet.read_rows(Path(path))
        print(path, "was read")
    except ConfigError as error:
        if "of memory, which no table" not in str(error):
            print(error)
print("MB", most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process holds")
def test_the_memory_of_a_small_file_is_bounded_whatever_it_says_of_itself(tmp_path: Path) -> None:
    """One page, one row, many columns, and what Python makes of them: gigabytes each."""
    write_table(pa.table({"prompt": ["a"]}), tmp_path / "right")
    letters = "x" * (300 * 2**20)
    plain = {"use_dictionary": False, "write_statistics": False, "compression": "zstd"}
    pq.write_table(pa.table({"prompt": [letters]}), tmp_path / "page", **plain)
    columns = {f"c{index}": [letters[: 30 * 2**20]] for index in range(40)}
    pq.write_table(pa.table(columns), tmp_path / "columns", **plain)
    texts = pa.DictionaryArray.from_arrays(np.zeros(50_000, np.int32), ["x" * 100_000])
    row = pa.ListArray.from_arrays(np.array([0, len(texts)], np.int32), texts)
    pq.write_table(pa.table({"prompt": row}), tmp_path / "row", store_schema=False)
    ends = np.arange(0, 100_001 * 500, 500, dtype=np.int32)
    nulls = pa.ListArray.from_arrays(ends, pa.nulls(int(ends[-1]), pa.int8()))
    pq.write_table(pa.table({"prompt": nulls}), tmp_path / "nulls", compression="zstd")
    del columns, texts, row, nulls, letters
    files = [str(tmp_path / name) for name in ("right", "page", "columns", "row", "nulls")]
    done = subprocess.run([sys.executable, "-c", READS, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    word, megabytes = done.stdout.split()
    assert word == "MB" and int(megabytes) < 400, done.stdout


def test_some_columns_of_a_table(tmp_path: Path) -> None:
    write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet", ["c", "z", "a"]).columns) == ["c", "a"]
