"""What a person types wrong is answered in one form: ``error: what; fix: how``."""

from __future__ import annotations

from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, load_cartridge, save_cartridge
from cartridge_distill.cli.main import app
from cartridge_distill.data import command as prepare
from cartridge_distill.evaluation import command as evaluate
from tests.tiny import random_cartridge, tiny_model


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["distil"], "error: No such command 'distil'; fix: did you mean 'distill'?"),
        (
            ["info", "x", "--modle", "y"],
            "error: No such option: --modle; fix: did you mean --model",
        ),
        (["info"], "error: Missing argument 'cartridge'; fix: see `cartridge-distill info --help`"),
        (["init", "x", "--model", "m", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["info", "no/such/thing"], "error: no/such/thing is no file, no directory"),
        (["report", "a", "b"], "error: several runs make one report"),
    ],
)
def test_usage_errors_have_the_one_form(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(typed, prog_name="cartridge-distill")
    assert ended.value.code in (1, 2)
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.startswith("error: ")
    assert "Usage" not in shown.err and "Traceback" not in shown.err


def test_a_command_that_ends_well_has_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["info", "--help"])
    assert ended.value.code == 0 and "--model" in capsys.readouterr().out


def test_a_run_in_a_cartridges_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "recipe.json").write_text('{"model": "someone/tiny"}')
    for typed in (["info", str(run)], ["push", str(run), str(tmp_path / "shelf")]):
        with pytest.raises(SystemExit) as ended:
            app(typed)
        assert ended.value.code == 1
        assert "is a run without a cartridge yet" in capsys.readouterr().err
    meta = CartridgeMeta(base_model="someone/tiny", step=3)
    save_cartridge(random_cartridge(tiny_model()), run / "cartridge", meta)
    for typed in (
        ["info", str(run)],
        ["push", str(run), str(tmp_path / "shelf")],
        ["convert", str(run), str(tmp_path / "there"), "--to", "peft"],
        ["compose", str(tmp_path / "both"), str(run), str(run)],
    ):
        with pytest.raises(SystemExit) as ended:
            app(typed)
        assert ended.value.code == 0, capsys.readouterr().err
    assert load_cartridge(tmp_path / "shelf").num_tokens == 16
    assert load_cartridge(tmp_path / "both").num_tokens == 32


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "nothing to evaluate; fix: name a run's folder"),
        (["RUN"], "is a run without a cartridge yet"),
        (["DONE"], "does not say its data; fix: give --data"),
        (["DONE", "--data", "no/data"], "--data no/data: there is no such folder; fix: name one"),
        (["DONE", "--data", "RUN", "--out", "FILE/x"], "is no folder; fix: give another --out"),
        (["DONE", "--dat", "x"], "--dat: no such option; fix: did you mean --data"),
    ],
)
def test_eval_takes_a_run_and_says_what_it_lacks(
    typed: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name.lower() for name in ("RUN", "DONE")}
    for folder in places.values():
        folder.mkdir()
        (folder / "recipe.json").write_text('{"model": "someone/tiny"}')
    meta = CartridgeMeta(base_model="someone/tiny")
    save_cartridge(random_cartridge(tiny_model()), places["DONE"] / "cartridge", meta)
    (tmp_path / "file").touch()
    words = [str(places.get(word, word)).replace("FILE", str(tmp_path / "file")) for word in typed]
    try:
        status = evaluate.main(words)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    assert status in (1, 2) and said in capsys.readouterr().err


def test_prepare_replaces_other_documents_only_when_asked(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"

    def typed(text: str, *more: str) -> int:
        document = tmp_path / "document.txt"
        document.write_text(text)
        words = ["--data", str(document), "--tokenizer", str(model_folder), "--out", str(out)]
        words += ["--rows", "4", "--prompt-tokens", "192", "--response-tokens", "4"]
        return prepare.main([*words, *more])

    one = "The harbour master keeps the keys of the old museum. " * 3
    other = "The lighthouse keeper repairs the nets of the young fishermen. " * 3
    assert typed(one) == 0 == typed(one)  # its own files, and the same again
    before = (out / "documents.jsonl").read_bytes()
    assert typed(other) == 1
    assert "prepared of other documents (document.txt, ...); fix:" in capsys.readouterr().err
    assert (out / "documents.jsonl").read_bytes() == before
    assert typed(other, "--overwrite") == 0
    assert (out / "documents.jsonl").read_bytes() != before
