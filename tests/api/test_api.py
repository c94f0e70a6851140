"""From Python: what the commands do, without a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.api import DistillationFailed, Run, distill, load, running
from cartridge_distill.cli.untrained import make
from cartridge_distill.model.prompts import render_document
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError
from tests.docs.pages import ROOT, python_blocks

TEXT = "The harbour of Nordby was opened in 1884 by Clara Winther. " * 6


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def cartridge(tmp_path: Path, model_folder: Path, document: Path) -> Path:
    """The whole document's KV: it answers as the full document does."""
    tokens = len(render_document(native_tokenizer(model_folder), TEXT.strip()))
    make(tmp_path / "cartridge", str(model_folder), document, tokens, 1, 0, False)
    return tmp_path / "cartridge"


def native_tokenizer(folder: Path) -> Any:
    from cartridge_distill.model.reading import read_tokenizer

    return read_tokenizer(str(folder))


def test_a_loaded_cartridge_answers_as_the_document_that_it_is(
    cartridge: Path, model_folder: Path, document: Path
) -> None:
    loaded = load(cartridge, document=document, device="cpu", dtype="float32")
    assert loaded.views == ("no document", "cartridge", "full document")
    streamed: list[str] = []
    replies = loaded.compare("When?", max_new_tokens=8, start="It was")
    reply = loaded.generate("When?", max_new_tokens=8, start="It was", stream=streamed.append)
    assert reply.text == replies["cartridge"].text == replies["full document"].text
    assert reply.text.startswith("It was") and "It was" + "".join(streamed) == reply.text
    assert reply.tokens <= 8 and replies["no document"].tokens <= 8


def test_what_cannot_be_is_refused(cartridge: Path, tmp_path: Path) -> None:
    loaded = load(cartridge, device="cpu")
    with pytest.raises(ConfigError, match="view='document': there is none; fix: one of no"):
        loaded.generate("When?", view="document")
    with pytest.raises(CartridgeFormatError):
        load(tmp_path / "nowhere", device="cpu")


def test_settings_become_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []

    def call(command: list[str]) -> int:
        called.append(command)
        return 2 if "--dry-run" in command else 0

    monkeypatch.setattr(subprocess, "call", call)
    run = distill(
        "docs",
        model="M",
        out=tmp_path / "run",
        tokens=64,
        lr=0.5,
        verbose=True,
        name=None,
        overwrite=False,
        overrides=["trainer.test_freq=3"],
    )
    assert run == Run(tmp_path / "run")
    assert called[0] == [
        *(sys.executable, "-m", "verl_patches.distill", "docs", "--model", "M"),
        *("--out", str(tmp_path / "run"), "--tokens", "64", "--lr", "0.5", "--verbose"),
        "trainer.test_freq=3",
    ]
    with pytest.raises(DistillationFailed, match="ended with status 2") as failed:
        distill("docs", model="M", out=tmp_path / "run", dry_run=True)
    assert failed.value.status == 2
    with pytest.raises(ConfigError, match=r"tokens=\[64\]"):
        distill("docs", model="M", out=tmp_path / "run", tokens=[64])


def test_every_option_of_the_example_is_one_of_the_command() -> None:
    from verl_patches.distill import parse

    options = parse(["docs", "--model", "M", *running._options({"tokens": 64, "steps": 6})])
    assert (options.tokens, options.steps) == (64, 6)


def test_the_readmes_snippet_for_generate_works_as_printed(
    cartridge: Path,
    model_folder: Path,
    document: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As printed: the model's folder and the run alone are put in place. It reads the cartridge."""
    (snippet,) = [body for body in python_blocks(ROOT / "README.md") if "generate" in body]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model_folder)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "cartridge").symlink_to(cartridge)
    found: dict[str, Any] = {}
    exec(snippet, found)  # noqa: S102
    loaded = load(cartridge, document=document, device="cpu", dtype="float32")
    reply = loaded.generate("What is new?", max_new_tokens=64, view="full document")
    printed = capsys.readouterr().out
    assert reply.text and printed.startswith(reply.text)
    assert found["answer"].shape[1] <= found["ids"].shape[1] + 64
