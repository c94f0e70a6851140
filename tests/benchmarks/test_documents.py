"""The script that measures real documents: a row for each, refused ones with their reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.documents import main
from tests.data.documents.made import prose


def test_a_row_for_each_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(prose(40))
    (tmp_path / "b.md").write_text("# Only a heading\n\n```\nx = 1\n```\n")
    (tmp_path / "c.html").write_text("<body></body>")
    assert main([str(tmp_path)]) == 0
    _, _, text, code, refused = capsys.readouterr().out.splitlines()
    characters = len(prose(40))
    assert text.startswith(f"| a.txt | {characters:,} | 100 % | 4.") and text.endswith("|  |")
    assert "| 0 % |" in code and "can become prompts" in code
    assert "| refused |" in refused and "page without text" in refused
    assert main([str(tmp_path), "--show", "b.md"]) == 0
    assert capsys.readouterr().out.startswith("# Only a heading")


def test_a_folder_without_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "has no .txt" in capsys.readouterr().err
