"""example_query and test_rollout of the tokasaurus rollout, against an embedded server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge, write_tokasaurus
from cartridge_distill.server.running import BackgroundServer
from tests.gateway.rig import TOKEN, Rig
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import ROOT, Run

FOLDER = ROOT / "verl_patches" / "rollout" / "tokasaurus_rollout"

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def example_query() -> Main:
    """Its ``main``, loaded by path as its users run it: the package would import veRL."""
    spec = importlib.util.spec_from_file_location("example_query", FOLDER / "example_query.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


def test_example_query_shows_both_answers(
    example_query: Main,
    server: BackgroundServer,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, name in enumerate(("b", "a")):
        cartridge = random_cartridge(tiny_model(), seed=number)
        write_tokasaurus(cartridge, tmp_path / "cartridges" / name, "tiny", torch.float32)
    status = example_query(
        ["--url", server.url, "--model", str(model_folder), "--max-tokens", "3"]
        + ["--cartridge", "b", "--cartridge", "local:a", "--answer", "It is"]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "serves tiny" in printed.out and "answer begins: 'It is'" in printed.out
    assert "== without a cartridge" in printed.out
    assert "== with cartridge a + b" in printed.out
    assert printed.out.count("mean log-prob of a token: -") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cartridge", "not-there"], "not-there"),
        (["--cartridge", "s3:mine"], "local, huggingface, wandb"),
        (["--url", "http://127.0.0.1:1", "--wait", "0.2"], "no inference server"),
    ],
)
def test_example_query_names_what_is_wrong(
    example_query: Main,
    server: BackgroundServer,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    status = example_query(["--url", server.url, "--model", str(model_folder), *options])
    assert status == 1
    assert said in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize("way", [pytest.param("directory", marks=pytest.mark.long), "upload"])
def test_rollout_script_through_ray(
    way: str,
    server: BackgroundServer,
    rig: Rig,
    model_folder: Path,
    run_python: Run,
    tmp_path: Path,
    patched: Path,
) -> None:
    """A given cartridge is published to a running server; its log-probs are the trainer's."""
    meta = CartridgeMeta(base_model="tiny")
    mine = save_cartridge(random_cartridge(tiny_model()), tmp_path / "mine", meta)
    target: dict[str, tuple[object, ...]] = {
        "directory": ("--url", server.url, "--cartridge-dir", tmp_path / "cartridges"),
        "upload": ("--url", rig.url, "--served-model", "tiny"),
    }
    done = run_python(
        *("-m", "verl_patches.rollout.tokasaurus_rollout.test_rollout"),
        *("--model", model_folder, *target[way], "--cartridge", mine),
        *("--compare", "--prompt", "What?", "--prompt", "x" * 40, "--max-tokens", 3),
        verl=patched,
        TOKASAURUS_API_KEY=TOKEN,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 rollouts are good" in done.stdout
    assert "active version: test-" in done.stdout


def test_rollout_script_sees_a_bad_answer() -> None:
    # Not at the top: it imports veRL, which takes seconds.
    from verl.workers.rollout.replica import TokenOutput

    from verl_patches.rollout.tokasaurus_rollout.test_rollout import Rollout, problems

    version = "test-step-000000"
    labels = {"cartridge_version": version, "global_steps": 0}

    def found(**changes: Any) -> list[str]:
        good = {"token_ids": [1, 2], "log_probs": [-1.0, -0.5], "extra_fields": labels}
        return problems(Rollout("?", [3], TokenOutput(**(good | changes))), version, 2, 10)

    assert found() == []
    assert "asked for 1 to 2" in found(token_ids=[1, 2, 3], log_probs=[-1.0] * 3)[0]
    assert "outside 0..9" in found(token_ids=[1, 10])[0]
    assert "1 log-probs for 2 tokens" in found(log_probs=[-1.0])[0]
    assert "that are none" in found(log_probs=[-1.0, float("nan")])[0]
    assert "labelled 'old'" in found(extra_fields=labels | {"cartridge_version": "old"})[0]
