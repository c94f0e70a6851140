"""benchmarks/beginnings.py: a line for each condition, with the values that they must have."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import beginnings
from tests.training.study.made import write_model, write_texts
from training.study import documents


def test_a_line_for_each_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path)
    known = documents.all_documents(write_texts(tmp_path / "texts"))
    monkeypatch.setattr(documents, "all_documents", lambda: known)
    typed = ["--model", str(model), "--documents", "harbour", "--tokens", "64", "--limit", "2"]
    assert beginnings.main(typed) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| harbour")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in rows] == [
        "no document",
        "best chunk of 64",
        *("text", "spans", "attended"),
        "full document",
    ]
    kl = {row[1]: float(row[3]) for row in rows}
    assert kl["full document"] == 0 and all(kl[name] > 0.001 for name in kl if "full" not in name)
    assert len({kl["text"], kl["spans"], kl["attended"]}) > 1
    assert [bool(row[6]) for row in rows] == [False, False, True, True, True, False]


def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, said in (
        (["--tokens", "100"], "--tokens 100: must be a multiple of 16"),
        (["--documents", "none"], "--documents none: unknown; give some of"),
        (["--init", "noise"], "'noise'"),
    ):
        with pytest.raises(SystemExit):
            beginnings.main(typed)
        assert said in capsys.readouterr().err
