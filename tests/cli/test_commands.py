"""The commands that turn files into files, and what they say when they cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import (
    CartridgeMeta,
    load_cartridge,
    read_meta,
    record,
    save_cartridge,
)
from cartridge_distill.cli import chat
from cartridge_distill.cli.main import app
from cartridge_distill.data import command as prepare
from cartridge_distill.data.documents.reading import read_documents
from cartridge_distill.data.records import sha256_of
from cartridge_distill.evaluation import command as evaluate
from tests.cli.commands import COMMANDS, PASSED_ON
from tests.data.documents.made import write_pdf
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import child_environment


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.fixture
def cartridge(tmp_path: Path) -> Path:
    meta = CartridgeMeta(base_model="someone/tiny", step=3)
    return save_cartridge(random_cartridge(tiny_model()), tmp_path / "mine", meta)


def test_help_teaches_every_command() -> None:
    status, shown = run("--help")
    assert status == 0
    for command in COMMANDS:
        assert command in shown
        if command not in PASSED_ON:
            status, help_ = run(command, "--help")
            assert status == 0 and "Usage" in help_


@pytest.mark.parametrize("command", PASSED_ON)
def test_what_is_passed_on_has_its_own_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cartridge_distill.cli.main", command, "--help"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: cartridge-distill {command}" in done.stdout
    assert PASSED_ON[command] in done.stdout


def test_init_makes_a_cartridge_of_a_document(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "record.txt").write_text("The harbour master keeps the keys. " * 4)
    status, shown = run(
        *("init", tmp_path / "c", "--model", model_folder, "--tokens", 32),
        *("--document", tmp_path / "record.txt"),
    )
    assert status == 0, shown
    made = load_cartridge(tmp_path / "c")
    assert (made.num_tokens, made.num_frozen_tokens) == (32, 1)
    assert read_meta(tmp_path / "c")["document_title"] == "record"
    status, shown = run(
        *("init", tmp_path / "a", "--model", model_folder, "--tokens", 32, "--from", "attended"),
        *("--document", tmp_path / "record.txt"),
    )
    assert status == 0, shown
    assert read_meta(tmp_path / "a")["recipe"]["init"] == {"from": "attended"}
    attended = load_cartridge(tmp_path / "a")
    assert torch.equal(attended.frozen_keys[0], made.frozen_keys[0])
    assert not torch.equal(attended.trainable_values[0], made.trainable_values[0])
    again = run("init", tmp_path / "n", "--model", model_folder, "--tokens", 32, "--random")
    assert again[0] == 0
    status, shown = run(
        *("init", tmp_path / "x", "--model", model_folder, "--random", "--from", "spans")
    )
    assert status == 1 and "--from spans of --random: noise has no parts" in shown
    status, shown = run("init", tmp_path / "x", "--model", model_folder)
    assert status == 1 and "--document FILE, or --random" in shown
    status, shown = run(
        *("init", tmp_path / "x", "--model", model_folder, "--tokens", 320),
        *("--document", tmp_path / "record.txt"),
    )
    assert status == 1 and "fewer cartridge tokens" in shown and not (tmp_path / "x").exists()


def test_init_reads_a_document_of_any_kind_that_prepare_reads(
    model_folder: Path, tmp_path: Path
) -> None:
    words = "The harbour master keeps the keys of the old museum. " * 4
    write_pdf(tmp_path / "guide.pdf", [words], title="The guide")
    (tmp_path / "guide.html").write_text(f"<title>The guide</title><p>{words}</p>")
    (tmp_path / "marked.txt").write_text(words, encoding="utf-16")
    for name in ("guide.pdf", "guide.html", "marked.txt"):
        out = tmp_path / f"of {name}"
        typed = ("init", out, "--model", model_folder, "--tokens", 32, "--document")
        status, shown = run(*typed, tmp_path / name)
        assert status == 0, shown
        [read] = read_documents(tmp_path / name).documents
        about = read_meta(out)
        assert about["document_sha256"] == sha256_of(read.text)
        assert about["document_title"] == read.title


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "none.txt"),
        ("paper.docx", b"PK\x03\x04", "not a kind that is read"),
        ("lfs.txt", b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "Git LFS pointer"),
        ("broken.pdf", b"%PDF-1.4 nothing", "broken.pdf"),
        ("records.json", b'{"p1": {}}', "missing 'name'"),
    ],
)
def test_init_names_what_it_cannot_read(
    model_folder: Path, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    typed = ("init", tmp_path / "c", "--model", model_folder, "--document", tmp_path / name)
    status, shown = run(*typed)
    assert status == 1 and says in shown and "Traceback" not in shown
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "typed",
    [
        ("init", "OUT", "--model", "NO", "--random"),
        ("info", "CARTRIDGE", "--model", "NO"),
        ("serve", "--model", "NO", "--cartridge", "a=CARTRIDGE"),
        ("doctor", "--model", "NO"),
    ],
)
def test_a_mistyped_model_is_named(cartridge: Path, tmp_path: Path, typed: tuple[str, ...]) -> None:
    no = tmp_path / "no" / "such model"
    places = {"OUT": tmp_path / "out", "NO": no, "CARTRIDGE": cartridge}
    places["a=CARTRIDGE"] = Path(f"a={cartridge}")
    status, shown = run(*(places.get(word, word) for word in typed))
    assert status == 1 and f"{no}: there is no such folder" in shown.replace("\n", "")


@pytest.mark.parametrize("command", ["chat", "eval", "prepare"])
def test_a_mistyped_model_is_named_by_what_is_passed_on(
    command: str, cartridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("A text. " * 30)
    no, data = str(tmp_path / "no" / "such"), str(tmp_path / "a.txt")
    typed = {
        "chat": (chat.main, ["--model", no, "--prompt", "?"]),
        "eval": (
            evaluate.main,
            ["--model", no, "--data", str(tmp_path), "--cartridge", str(cartridge)],
        ),
        "prepare": (
            prepare.main,
            ["--tokenizer", no, "--data", data, "--out", str(tmp_path / "o")],
        ),
    }
    main, arguments = typed[command]
    assert main(arguments) == 1
    assert f"{no}: there is no such folder" in capsys.readouterr().err


def test_a_pointer_in_place_of_weights_is_called_one(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    [weights] = copy.glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    status, shown = run("info", tmp_path, "--model", copy)
    assert status == 1 and "Git LFS pointer" in shown


def test_init_replaces_an_untrained_cartridge_when_asked_and_nothing_else(
    model_folder: Path, cartridge: Path, tmp_path: Path
) -> None:
    typed = ("--model", model_folder, "--tokens", 32, "--random")
    status, shown = run("init", cartridge, *typed)
    assert status == 1 and "already there" in shown
    status, shown = run("init", cartridge, *typed, "--overwrite")
    assert status == 1 and "was trained for 3 steps and is not replaced" in shown
    assert load_cartridge(cartridge).num_tokens == 16
    untrained = tmp_path / "untrained"
    save_cartridge(random_cartridge(tiny_model()), untrained, CartridgeMeta("someone/tiny"))
    assert run("init", untrained, *typed, "--overwrite")[0] == 0
    assert load_cartridge(untrained).num_tokens == 32
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    status, shown = run("init", tmp_path / "letters", *typed, "--overwrite")
    assert status == 1 and (tmp_path / "letters" / "dear.txt").exists()


def test_info_says_what_it_is_and_whether_it_fits(
    cartridge: Path, model_folder: Path, tmp_path: Path
) -> None:
    status, shown = run("info", cartridge, "--model", model_folder)
    assert status == 0 and "someone/tiny" in shown and f"fits {model_folder}" in shown
    record(
        cartridge,
        recipe={"cartridge.lr": 0.02, "none": None},
        metrics={
            "curve": [{"step": step, "loss": 1 / step} for step in range(1, 5)],
            "last_step": {"step": 4, "loss": 0.25},
            "results": [{"condition": "trained cartridge", "kl": 0.637012}],
        },
    )
    status, shown = run("info", cartridge)
    lines = [line.split() for line in shown.splitlines()]
    assert status == 0 and ["recipe.cartridge.lr", "0.02"] in lines
    assert "metrics.curve █▃▂▁ loss 1 to 0.25, steps 1 to 4".split() in lines
    assert ["metrics.last_step.loss", "0.25"] in lines
    assert "trained cartridge" in shown and "0.637 " in shown and "recipe.none" not in shown
    status, shown = run("info", tmp_path / "nothing")
    assert status == 1 and "no file, no directory and no hub id" in shown


@pytest.mark.parametrize("kind", ["tokasaurus", "peft", "hazyresearch", "native"])
def test_convert_there_and_back_keeps_every_bit(cartridge: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / ("there.pt" if kind == "hazyresearch" else "there")
    status, shown = run("convert", cartridge, target, "--to", kind)
    assert status == 0, shown
    back = load_cartridge(target).state_dict()
    for name, tensor in load_cartridge(cartridge).state_dict().items():
        assert torch.equal(tensor, back[name])
    status, shown = run("convert", cartridge, target, "--to", kind)
    assert status == 1 and "already there" in shown
    assert run("convert", cartridge, target, "--to", kind, "--overwrite")[0] == 0


def test_compose_push_and_pull(cartridge: Path, tmp_path: Path) -> None:
    status, shown = run("compose", tmp_path / "both", cartridge, cartridge)
    assert status == 0 and "32 tokens of 2 cartridges" in shown
    status, shown = run("push", tmp_path / "both", tmp_path / "shelf")
    assert status == 0, shown
    assert "someone/tiny" in (tmp_path / "shelf" / "README.md").read_text()
    status, shown = run("pull", tmp_path / "shelf", tmp_path / "got")
    assert status == 0, shown
    assert load_cartridge(tmp_path / "got").num_tokens == 32
    status, shown = run("compose", tmp_path / "one", cartridge)
    assert status == 1 and "two or more" in shown
