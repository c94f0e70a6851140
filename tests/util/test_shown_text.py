"""What others wrote moves nothing on a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import save_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta
from cartridge_distill.cli.main import app
from cartridge_distill.data.documents.source import load_sources
from cartridge_distill.data.prepare import say
from cartridge_distill.util import processes
from cartridge_distill.util.shown_text import name_as_text, printable
from tests.tiny import random_cartridge, tiny_model

CLEARS = "\x1b[2J\x1b]0;owned\x07house"
SHOWN = "\\x1b[2J\\x1b]0;owned\\x07house"


def test_control_characters_are_shown_and_all_other_text_stays() -> None:
    assert printable(CLEARS) == SHOWN
    assert printable("a\rb\x9b1m\x7f\u202eevil") == "a\\rb\\x9b1m\\x7f\\u202eevil"
    plain = "Straße, 東京, שלום, 👩‍🔬:\tone\ntwo \\x1b"
    assert printable(plain) == plain


def test_a_name_that_is_no_text_becomes_one() -> None:
    assert name_as_text(os.fsdecode(b"b\xffad.txt")) == "b\\xffad.txt"
    assert name_as_text("Bücher") == "Bücher"


def test_info_shows_a_title_and_does_as_it_says_nothing(tmp_path: Path) -> None:
    meta = CartridgeMeta("base", document_title=CLEARS)
    save_cartridge(random_cartridge(tiny_model(), 16), tmp_path / "c", meta)
    found = CliRunner().invoke(app, ["info", str(tmp_path / "c")], color=True)
    assert found.exit_code == 0 and "\x1b" not in found.output and "\x07" not in found.output
    assert "\\x1b[2J" in found.output


def test_prepare_says_names_and_titles_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{CLEARS}.txt"
    (tmp_path / name).write_text("The house stands by the sea. Anna lives there since 1999. " * 20)
    load_sources(str(tmp_path), say)
    processes.say(CLEARS)
    said = capsys.readouterr().out
    assert f"read {SHOWN}.txt: " in said and "\x1b" not in said


def test_an_error_about_such_a_file_is_shown(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["info", str(tmp_path / CLEARS)])
    assert found.exit_code == 1 and "\x1b" not in found.output and SHOWN in found.output


def test_a_document_whose_name_is_no_text_has_one_that_is(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"b\xffad.txt")
    file.write_text("The house stands by the sea. Anna lives there since 1999. " * 20)
    (source,) = load_sources(str(tmp_path), lambda _: None)
    assert (source.document_id, source.title) == ("b\\xffad.txt", "b\\xffad")
