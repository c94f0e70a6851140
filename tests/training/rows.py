"""Files that look like prepared data, for what never reads further than their rows."""

from __future__ import annotations

from pathlib import Path

import pandas


def write_rows(folder: Path, train: int = 64, val: int = 4, words: int = 1) -> None:
    """A data folder with so many prompts, each of so many words; what else it holds is empty."""
    for name, count in (("train", train), ("val", val)):
        message = [{"role": "user", "content": "why " * words}]
        rows = {"prompt": [message] * count, "extra_info": [{"document_id": "d"}] * count}
        pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    for name in ("documents.jsonl", "eval.json"):
        (folder / name).write_bytes(b"")
