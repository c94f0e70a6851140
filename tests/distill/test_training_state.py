"""The prompts in a training state; the rest of it is tested with the engine (tests/verl)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.distill.training_state import (
    ABOUT_FILE,
    TrainingState,
    load_state,
    rng_state,
    save_state,
)
from cartridge_distill.model.kept_tokens import Row
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import sealed

ROWS: list[Row] = [("a [\n 1\n]", [[1, 2], [3]]), (None, [[7]])]
SETTINGS = {"betas": [0.9, 0.999], "counts": [1, 2], "said": "[ 1, 2 ]"}


def saved(folder: Path, prompts: list[Row] = ROWS) -> Path:
    save_state(TrainingState(1, 1, 1, {}, rng_state(), SETTINGS, prompts), folder)
    return folder / ABOUT_FILE


def test_prompts_come_back_and_take_a_line_each(tmp_path: Path) -> None:
    text = saved(tmp_path).read_text()
    state = load_state(tmp_path)
    assert state.prompts == ROWS and state.settings == SETTINGS
    assert "[1, 2],\n" in text


def test_a_state_without_prompts_is_read(tmp_path: Path) -> None:
    about = saved(tmp_path, [])
    fields = json.loads(about.read_text())
    del fields["teacher_prompts"]
    about.write_text(json.dumps(sealed(fields)))
    assert load_state(tmp_path).prompts == []


@pytest.mark.parametrize("wrong", [1, [["a"]], [["a", []]], [["a", [[]]]], [["a", [[True]]]]])
def test_prompts_that_are_none_are_refused(tmp_path: Path, wrong: Any) -> None:
    about = saved(tmp_path)
    fields = json.loads(about.read_text()) | {"teacher_prompts": wrong}
    about.write_text(json.dumps(sealed(fields)))
    with pytest.raises(CartridgeFormatError, match="teacher_prompts is .*, not prompts"):
        load_state(tmp_path)
