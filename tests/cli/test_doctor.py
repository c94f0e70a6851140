"""``cartridge-distill doctor`` on what is right, and on each thing that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.cli import doctor as doctor_module
from cartridge_distill.cli.doctor import requirements
from cartridge_distill.cli.main import app
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.server.running import BackgroundServer
from tests.patches.conftest import patched, pristine  # noqa: F401  (fixtures)
from tests.tiny import random_cartridge, tiny_model
from tests.training.conftest import child_environment

pytestmark = pytest.mark.integration
Doctor = Callable[..., subprocess.CompletedProcess[str]]


def ask(*options: object) -> tuple[int, str]:
    """The command in this process, on the veRL that is installed; its status and what it says."""
    done = CliRunner().invoke(app, ["doctor", *map(str, options)], env={"COLUMNS": "200"})
    return done.exit_code, done.output


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """The command as a user starts it, on a veRL in another place."""

    def run(*options: object, verl: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cartridge_distill.cli.main", "doctor", *map(str, options)],
            env=child_environment(verl, COLUMNS="200"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "a", "text": "A text."}))
    rows = [{"prompt": [{"role": "user", "content": "?"}], "data_source": "t"}] * 2
    frame = pd.DataFrame(rows)
    frame["extra_info"] = [{"document_id": "a"}] * 2
    frame.to_parquet(folder / "train.parquet")
    return folder


def test_everything_right(
    doctor: Doctor,
    start_server: Callable[..., BackgroundServer],
    patched: Path,  # noqa: F811
    model_folder: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    cartridge = save_cartridge(
        random_cartridge(tiny_model()), tmp_path / "c", CartridgeMeta(base_model="tiny")
    )
    done = doctor(
        *("--url", start_server(model_name="tiny").url, "--model", model_folder),
        *("--cartridge", cartridge, "--data", data),
        verl=patched,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout
    for words in (
        *("ok  Python", "ok  torch", "ok  transformers", "ok  verl", "ok  veRL's patches"),
        *("serves tiny", "it takes no uploads", "fits ", "1 (a)", "2 prompts about 1 documents"),
    ):
        assert words in done.stdout, (words, done.stdout)


def test_unpatched_verl(doctor: Doctor, pristine: Path) -> None:  # noqa: F811
    done = doctor(verl=pristine)
    assert done.returncode == 1
    assert "BAD veRL's patches" in done.stdout and "-m verl_patches apply" in done.stdout


def test_another_verl(doctor: Doctor, pristine: Path, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "other"
    other.mkdir()
    for entry in pristine.iterdir():
        (other / entry.name).symlink_to(entry)
    changed = other / "verl-0.7.0.dist-info"
    changed.mkdir()
    (changed / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.7.0\n")
    done = doctor(verl=other)
    assert done.returncode == 1
    assert "BAD verl: 0.7.0" in done.stdout and "this project needs verl==0.9.1" in done.stdout


def test_a_checkout_says_what_it_needs_before_the_installation_does(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "cartridge-distill"\ndependencies = ["torch>=99"]\n'
    )
    assert requirements(tmp_path) == ["torch>=99"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\ndependencies = ["x"]\n')
    assert "x" not in requirements(tmp_path)  # a package of that name may lie beside this one
    assert any(line.startswith("transformers") for line in requirements())


def test_a_version_that_was_not_tested_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.14.0", "transformers": "5.17.0"}
    version = doctor_module.importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: found.get(name) or version(name))
    status, said = ask()
    assert status == 1
    assert "BAD torch: 2.14.0" in said and "ok  transformers: 5.17.0" in said


def test_a_gpu_node_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("cartridge_distill.util.node.has_network", lambda: False)
    status, said = ask()
    assert status == 1
    assert "BAD NCCL_SOCKET_IFNAME: not set" in said and "export NCCL_SOCKET_IFNAME=lo" in said
    assert "export RAY_AUTH_MODE=disabled" in said
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "ok  environment" in ask()[1]


def test_server_down() -> None:
    status, said = ask("--url", "http://127.0.0.1:9")
    assert status == 1
    assert "BAD server: no inference server at http://127.0.0.1:9" in said
    assert "cartridge-distill serve" in said


def test_cartridge_of_another_model(model_folder: Path, tmp_path: Path) -> None:
    three = [torch.zeros(1, 2, 16, 16)] * 3
    save_cartridge(
        TrainableCache(Prefix(three, three)), tmp_path / "three", CartridgeMeta(base_model="x")
    )
    status, said = ask("--model", model_folder, "--cartridge", tmp_path / "three")
    assert status == 1
    assert "BAD cartridge" in said and "3 layers" in said and "has 2" in said
    cartridge = save_cartridge(
        random_cartridge(tiny_model()), tmp_path / "c", CartridgeMeta(base_model="tiny")
    )
    status, said = ask("--model", model_folder, "--cartridge", cartridge)
    assert f"fits {model_folder}" in said and "BAD cartridge" not in said


def test_data_without_documents(data: Path) -> None:
    frame = pd.read_parquet(data / "train.parquet")
    frame["extra_info"] = [{"document_id": "a"}, {"document_id": None, "kind": "general"}]
    frame.to_parquet(data / "train.parquet")
    assert "1 prompts about 1 documents, and 1 general ones" in ask("--data", data)[1]
    frame["extra_info"] = [{"document_id": "a"}, {"document_id": "a", "kind": "general"}]
    frame.to_parquet(data / "train.parquet")
    assert "1 rows are labelled general and name a document" in ask("--data", data)[1]
    frame["extra_info"] = [{"document_id": "a"}, {"index": 1}]
    frame.to_parquet(data / "train.parquet")
    status, said = ask("--data", data)
    assert status == 1
    assert "1 of 2 rows have no extra_info.document_id" in said
    assert "cartridge-distill prepare --help" in said
    (data / "documents.jsonl").unlink()
    status, said = ask("--data", data)
    assert status == 1
    assert "BAD documents" in said and "does not exist" in said


def test_prompts_that_the_training_would_refuse(data: Path, model_folder: Path) -> None:
    """One limit, counted by the rendering that the rollouts use."""
    status, said = ask("--data", data, "--model", model_folder)
    assert "ok  prompts: none of 2 has more than 512 tokens" in said
    tokens = len(render_prompt(read_tokenizer(model_folder), [{"role": "user", "content": "?"}]))
    assert (
        "BAD prompts"
        not in ask("--data", data, "--model", model_folder, "--prompt-tokens", tokens)[1]
    )
    status, said = ask("--data", data, "--model", model_folder, "--prompt-tokens", tokens - 1)
    assert status == 1
    assert (
        f"2 prompts are over {tokens - 1} tokens (row 0 has {tokens}, row 1 has {tokens})" in said
    )
    assert "--  prompts: their lengths are not looked at" in ask("--data", data)[1]


def test_the_memory_of_a_step(model_folder: Path) -> None:
    lengths = ("--row-tokens", 512, "--tokens", 16, "--document-tokens", 100)
    _, said = ask("--model", model_folder, *lengths)
    assert "--  memory: a step takes at most 0.0" in said and "worst moment: " in said
    _, said = ask("--model", model_folder)
    assert "--  memory: not looked at: name --model and --row-tokens" in said
    status, said = ask("--model", model_folder, "--row-tokens", 0)
    assert status == 1 and "BAD memory: row_tokens=0 is too few; fix: give 1 or more" in said


def test_a_step_that_does_not_fit_the_gpu(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = types.SimpleNamespace(name="Small", total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**30))
    status, said = ask("--model", model_folder, "--row-tokens", 512, "--tokens", 16)
    assert status == 1 and "BAD memory: a step takes at most" in said
    assert "-> what makes it smaller: " in said and "tokens a row 512 -> 256" in said
