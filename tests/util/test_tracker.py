"""A tracker that names another checkpoint than the one that was saved last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.sealed import sealed
from cartridge_distill.util.tracker import (
    DATA_FILE,
    ENGINE_FOLDER,
    HISTORY_FILE,
    SAVING,
    TRACKER,
    step_folder,
    tracked_step,
)


def save(run: Path, step: int) -> None:
    """What a save leaves, with a history of all steps up to this one."""
    folder = step_folder(run, step)
    (folder / ENGINE_FOLDER).mkdir(parents=True)
    (folder / DATA_FILE).write_bytes(b"")
    history = [{"step": n, "version": f"run-step-{n:06d}", "data": {}} for n in range(1, step + 1)]
    text = "".join(json.dumps(sealed(line)) + "\n" for line in history)
    (run / HISTORY_FILE).write_text(text)
    (run / TRACKER).write_text(str(step))


def test_a_digit_that_was_changed_does_not_lead_to_another_checkpoint(tmp_path: Path) -> None:
    for step in (3, 5, 7):
        save(tmp_path, step)
    assert tracked_step(tmp_path) == 7
    for changed in ("5", "3"):  # one bit each
        (tmp_path / TRACKER).write_text(changed)
        with pytest.raises(CartridgeFormatError, match=f"says {changed}, .*step 7 .*: echo 7 >"):
            tracked_step(tmp_path)


def test_a_run_that_went_back_goes_on_from_where_it_saved_last(tmp_path: Path) -> None:
    for step in (3, 7, 5):  # 5 was saved after going back to 3
        save(tmp_path, step)
    assert tracked_step(tmp_path) == 5
    (tmp_path / TRACKER).unlink()
    with pytest.raises(CartridgeFormatError, match="fix: to go on from the newest one: echo 5 >"):
        tracked_step(tmp_path)


def test_a_save_that_was_killed_before_the_tracker_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 5)
    (tmp_path / TRACKER).write_text("3")
    (step_folder(tmp_path, 5) / SAVING).touch()
    assert tracked_step(tmp_path) == 3


@pytest.mark.parametrize("history", [None, b"", b"{", b'{"step": "x"}\n', b"[7]\n", b"\xff\n"])
def test_without_a_history_the_tracker_alone_counts(tmp_path: Path, history: bytes | None) -> None:
    for step in (3, 5):
        save(tmp_path, step)
    (tmp_path / TRACKER).write_text("3")
    if history is None:
        (tmp_path / HISTORY_FILE).unlink()
    else:
        (tmp_path / HISTORY_FILE).write_bytes(history)
    assert tracked_step(tmp_path) == 3
