"""The notebook runs as it is printed, cell by cell, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "distil_and_ask.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] in {"code", "markdown"} and cell["source"]
        assert cell.get("outputs", []) == []
    for number, cell in enumerate(code_cells()):
        compile(cell, f"cell {number}", "exec")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {number} of the notebook", "exec"), names)  # as Jupyter does
    run = names["run"]
    assert (run.cartridge / "cartridge.safetensors").is_file() and run.report.is_file()
    assert len(names["trained"]) == 6
    assert {"no document", "trained cartridge"} <= set(
        row["condition"] for row in run.evaluation()["conditions"]
    )
    said = capsys.readouterr().out
    assert "The lighthouse on the south pier stands" in said and "full document" in said
    # a finished run is returned as it is
    again = names["distill"](
        names["document"],
        model=str(names["MODEL"]),
        out=names["FOLDER"],
        tokens=64,
        steps=6,
        batch=16,
        device="cpu",
    )
    assert again == run
