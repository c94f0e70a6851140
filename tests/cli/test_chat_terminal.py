"""`chat` in a terminal, a real one: what is typed, what comes, and what Ctrl-C does."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedModel

from cartridge_distill.cli.opened import Shown
from cartridge_distill.cli.terminal import beside
from cartridge_distill.model.demo_model import FOLDER, cache_dir
from tests.cli.made import QUESTIONS, made_run
from tests.tiny import save_model, tiny_model
from tests.training.conftest import child_environment

pytestmark = pytest.mark.integration
CTRL_C, CTRL_D = "\x03", "\x04"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class InTerminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self._here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = child_environment() | {"TERM": "xterm", "COLUMNS": str(columns)}

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is then a signal to this process

        self.process = subprocess.Popen(
            [sys.executable, "-m", "cartridge_distill.cli.main", "chat", *arguments],
            stdin=there,
            stdout=there,
            stderr=there,
            env=environment,
            preexec_fn=own_terminal,
        )
        os.close(there)
        self.screen = ""

    def type(self, text: str) -> None:
        self.screen = ""
        os.write(self._here, text.encode())

    def expect(self, pattern: str, seconds: float = 240.0) -> str:
        """Waits until it stands on the screen since the last typing; returns what stands there."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.screen):
            ready, _, _ = select.select([self._here], [], [], 1.0)
            if ready:
                try:
                    came = os.read(self._here, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    came = ""
                self.screen += _CODES.sub("", came)
                if not came:
                    break
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.screen!r}"
        assert re.search(pattern, self.screen), f"ended without {pattern!r}: {self.screen!r}"
        return self.screen

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until something comes of it: Python's input() loses one that comes just before it
        begins to wait, and acts on it at the next key."""
        for _ in range(10):
            self.type(CTRL_C)
            try:
                return self.expect(pattern, 10.0)
            except AssertionError:
                continue
        return self.expect(pattern, 10.0)

    def ends(self) -> int:
        return self.process.wait(120)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)
        os.close(self._here)


def test_a_long_word_is_shown_whole() -> None:
    word = "https://example.org/" + "abcdefghij" * 6
    console = Console(width=96, file=io.StringIO())
    console.print(beside([Shown(name, 0, 0) for name in "abc"], [word, "", word], ["", "", ""]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split("\u2502") for line in printed.splitlines() if "\u2502" in line]
    for column in (1, 3):
        assert "".join(row[column].strip() for row in rows) == word


@pytest.fixture
def run(model_folder: Path, llama: PreTrainedModel, tmp_path: Path) -> Path:
    return made_run(model_folder, llama, tmp_path / "mine")


@pytest.fixture
def opened() -> Iterator[list[InTerminal]]:
    running: list[InTerminal] = []
    yield running
    for one in running:
        one.close()


def test_a_conversation_with_its_commands(tmp_path: Path, opened: list[InTerminal]) -> None:
    model = tiny_model(max_position_embeddings=16_384)
    for config in (model.config, model.generation_config):
        config.eos_token_id = None  # an answer ends when it is stopped
    save_model(model, tmp_path / "model")
    run = made_run(tmp_path / "model", model, tmp_path / "mine")
    drawn = ("--temperature", "1", "--max-new-tokens", "16000")
    terminal = InTerminal(str(run), *drawn, "--threads", "1")
    opened.append(terminal)
    greeting = terminal.expect("> ")
    assert all(question in greeting for question in QUESTIONS) and "Not this?" not in greeting
    assert "warning" not in greeting
    terminal.type("/help\n")
    assert "/compare" in terminal.expect("/quit.*\n(.*\n)*> ")
    terminal.type("/comapre\n")
    terminal.expect(r"did you mean /compare\?\n> ")
    terminal.interrupt(r"Ctrl-D or /quit ends.*\n> ")
    terminal.type("Who?\n")
    terminal.expect(r"Who\?\n(.|\n){8}")  # the answer has begun
    terminal.type(CTRL_C)
    assert "Traceback" not in terminal.expect(r"\(stopped\)\n> ")
    terminal.type("/reset\n")
    terminal.expect("forgotten.*\n> ")
    terminal.type("/compare\n")
    terminal.expect("no document, cartridge, full document.*\n> ")
    terminal.type("exit\n")
    assert terminal.ends() == 0


def test_three_answers_stand_side_by_side_where_there_is_room(
    run: Path, opened: list[InTerminal]
) -> None:
    few = ("--compare", "--max-new-tokens", "4", "--threads", "1")
    wide = InTerminal(str(run), *few, columns=130)
    opened.append(wide)
    wide.expect("> ")
    wide.type("Who?\n")
    screen = wide.expect(r"(4 tokens in(.|\n)*){3}> $")
    heads = re.search(r"no document.*cartridge \(16 KV.*full document \(\d+ KV", screen)
    assert heads is not None
    wide.type(CTRL_D)
    assert wide.ends() == 0
    narrow = InTerminal(str(run), *few, columns=60)
    opened.append(narrow)
    narrow.expect("> ")
    narrow.type("Who?\n")
    screen = narrow.expect(r"(4 tokens in(.|\n)*){3}> $")
    assert re.search(r"(?m)^cartridge \(16 KV", screen)
    narrow.type("/quit\n")
    assert narrow.ends() == 0


@pytest.mark.timeout(600)
def test_the_demos_model_answers_its_document_behind_the_documents_own_kv(
    tmp_path: Path, opened: list[InTerminal]
) -> None:
    """A real model: the second answer is the second question's, and Ctrl-C ends neither it."""
    folder = cache_dir() / FOLDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; training/get_demo_model.py makes it")
    from transformers import AutoModelForCausalLM

    document = tmp_path / "record.txt"
    document.write_text(
        "The harbour master is called Edith Marlow. Her parrot is called Admiral. "
        "The harbour lies in the town of Kelsby."
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    made_run(folder, model, tmp_path / "mine")
    terminal = InTerminal(
        *(str(tmp_path / "mine" / "cartridge"), "--document", str(document), "--compare"),
        *("--threads", "1", "--max-new-tokens", "24"),
    )
    opened.append(terminal)
    terminal.expect("> ")
    for question, right in (("What is the parrot called?", "Admiral"), ("Where is it?", "Kelsby")):
        terminal.type(f"{question}\n")
        screen = terminal.expect(r"(\d+ tokens in(.|\n)*){3}> $")
        assert right in screen.partition("full document (")[2]
    terminal.type("exit\n")
    assert terminal.ends() == 0
