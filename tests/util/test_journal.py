"""A journal keeps each row that was appended, and refuses what does not belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.journal import Journal

MADE_WITH = {"seed": 0, "models": ["m"], "nested": (1, 2)}


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with Journal(path, MADE_WITH) as journal:
        assert journal.rows == []
        journal.append({"task": 0, "text": "Grüße\nzweite Zeile\u2028dritte"})
        # Already there for a reader: a kill after this line loses nothing.
        assert path.read_bytes().count(b"\n") == 2
        journal.append({"task": 1, "text": ""})
        written = journal.rows
    with Journal(path, MADE_WITH) as journal:
        assert journal.rows == written and len(written) == 2 and not journal.torn


@pytest.mark.parametrize("cut", [1, 3, 11])
def test_a_row_that_was_cut_off_is_made_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, MADE_WITH) as journal:
        journal.append({"task": 0})
        journal.append({"task": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, MADE_WITH) as journal:
        assert journal.rows == [{"task": 0}] and journal.torn
        journal.append({"task": 1})
    with Journal(path, MADE_WITH) as journal:
        assert journal.rows == [{"task": 0}, {"task": 1}]


def test_a_first_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"seed": 0, "mod')
    with Journal(path, MADE_WITH) as journal:
        journal.append({"task": 0})
    with Journal(path, MADE_WITH) as journal:
        assert journal.rows == [{"task": 0}]


def test_other_settings_a_second_writer_and_damage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, MADE_WITH) as journal:
        journal.append({"task": 0})
        with pytest.raises(ConfigError, match="written by another process"):
            Journal(path, MADE_WITH)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="- seed: 0 there, 1 now"):
        Journal(path, {**MADE_WITH, "seed": 1})
    path.write_bytes(before.replace(b'"task": 0', b'"task"; 0'))
    with pytest.raises(ConfigError, match="damaged"):
        Journal(path, MADE_WITH)
    assert path.stat().st_size == len(before)


def test_a_number_that_was_changed_is_refused_and_an_earlier_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, MADE_WITH) as journal:
        journal.append({"task": 3, "score": 1.5}, {"task": 4, "score": 2.5})
    whole = path.read_bytes()
    for changed in (
        whole.replace(b'"score": 1.5', b'"score": 3.5'),
        whole.replace(b'"seed": 0', b'"seed": 1'),
        whole.replace(b"entries_sha256", b"entries_sha25v", 1),  # one bit of a name
        whole.replace(b'"score": 1.5', b"[" * 9000),
    ):
        path.write_bytes(changed)
        with pytest.raises(ConfigError, match=r"rows\.jsonl is not a journal, or damaged"):
            Journal(path, MADE_WITH)
    lines = [json.loads(line) for line in whole.splitlines()]
    plain = [{k: v for k, v in line.items() if k != "entries_sha256"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in plain))
    with Journal(path, MADE_WITH) as journal:
        journal.append({"task": 5})
        assert [row["task"] for row in journal.rows] == [3, 4, 5]
    assert b"sha256" not in path.read_bytes()
