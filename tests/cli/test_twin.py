"""A model of the same shape with other weights: every command that uses a cartridge tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_cartridge, save_cartridge
from cartridge_distill.cli import main as cli
from cartridge_distill.cli.about import Asked, check, check_loaded, look
from cartridge_distill.cli.doctor import _weights
from cartridge_distill.cli.untrained import make
from cartridge_distill.evaluation.command import main as evaluate
from cartridge_distill.model.identity import OtherModel, weights_fingerprint
from tests.cli.made import made_run
from tests.tiny import random_cartridge, save_model, tiny_model

OTHER = "trained with other weights"


@pytest.fixture
def run(model_folder: Path, llama: PreTrainedModel, tmp_path: Path) -> Path:
    return made_run(model_folder, llama, tmp_path / "mine")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, folder = tiny_model(), tmp_path_factory.mktemp("twin")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    save_model(model, folder)
    return str(folder)


@pytest.fixture
def older(llama: PreTrainedModel, model_folder: Path, tmp_path: Path) -> str:
    """A cartridge of a version that knew no fingerprints."""
    meta = CartridgeMeta(base_model=str(model_folder))
    return str(save_cartridge(random_cartridge(llama), tmp_path / "older", meta))


def test_info(run: Path, twin: str, model_folder: Path, older: str) -> None:
    def info(*typed: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["info", *typed])
        return done.exit_code, done.output

    status, said = info(str(run), "--model", str(model_folder))
    assert status == 0 and "it was trained with the weights of" in said
    assert "model_fingerprint" in said
    status, said = info(str(run), "--model", twin)
    assert status == 1 and OTHER in said
    status, said = info(older, "--model", twin)
    assert status == 0 and "warning: " in said and "does not say which weights" in said


def test_doctor(run: Path, twin: str, model_folder: Path, older: str) -> None:
    assert _weights(str(run), str(model_folder)).good is True
    found = _weights(str(run), twin)
    assert found.good is False and OTHER in found.said
    assert _weights(older, twin).good is None


def test_eval_refuses_before_the_model_is_loaded(
    run: Path, twin: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cartridge_distill.evaluation import folder

    def load(*_: object) -> None:
        raise OSError("the model would be loaded")

    monkeypatch.setattr(folder, "load_model", load)
    out = run.parent / "out"
    typed = ["--model", twin, "--data", str(run / "data"), "--cartridge", str(run / "cartridge")]
    typed += ["--out", str(out)]
    assert evaluate(typed) == 1
    assert OTHER in capsys.readouterr().err
    # What is wrong with the made data, or the loading, comes behind it.
    try:
        evaluate([*typed, "--allow-other-model"])
    except OSError as error:
        assert "would be loaded" in str(error)
    said = capsys.readouterr().err
    assert "warning: " in said and "its answers may mean nothing" in said


def test_serve_and_chat_look_before_they_load(run: Path, twin: str, older: str) -> None:
    asked = Asked(str(run), twin)
    with pytest.raises(OtherModel, match=OTHER):
        check(asked)  # by two files
    with pytest.raises(OtherModel, match=OTHER):
        look(asked, str(run / "cartridge"), twin)  # whatever the format and wherever the model
    allowed = Asked(str(run), twin, allow_other_model=True)
    assert OTHER in look(allowed, *check(allowed)).warnings[0]
    unknown = Asked(older, twin)
    assert "does not say which weights" in look(unknown, *check(unknown)).warnings[0]


@pytest.mark.parametrize("engine", ["embedded", "vllm"])
def test_serve(engine: str, run: Path, twin: str) -> None:
    typed = ["serve", str(run), "--model", twin, "--engine", engine, "--port", "0"]
    done = CliRunner().invoke(cli.app, typed)
    assert done.exit_code == 1 and OTHER in done.output and "--allow-other-model" in done.output


def test_serve_with_vllm_warns(run: Path, twin: str, older: str) -> None:
    """Without vLLM's Python it prints the line that starts it."""

    def serve(*typed: str) -> str:
        done = CliRunner().invoke(cli.app, ["serve", *typed, "--engine", "vllm"])
        assert done.exit_code == 0, done.output
        return done.output

    said = serve(str(run), "--model", twin, "--allow-other-model")
    assert "warning: " in said and "its answers may mean nothing" in said
    assert "does not say which weights" in serve("--cartridge", f"a={older}", "--model", twin)
    assert "warning: " not in serve(str(run))


def test_weights_that_come_with_the_loading_are_compared_then(
    run: Path, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cartridge_distill.model import identity

    asked = Asked(str(run), twin)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "weights_fingerprint", lambda *_: None)
        about = look(asked, *check(asked))
    assert "not on this machine yet" in about.warnings[0]
    with pytest.raises(OtherModel, match=OTHER):
        check_loaded(about)


def test_init_says_the_weights_it_is_made_for(model_folder: Path, tmp_path: Path) -> None:
    make(tmp_path / "new", str(model_folder), None, 16, 1, 0)
    meta = read_cartridge(tmp_path / "new").meta
    assert meta.model_fingerprint == weights_fingerprint(model_folder)
