"""`serve` for training: the gateway's command, its token, and what the other end is told."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cli import main as cli
from cartridge_distill.gateway import __main__ as gateway
from tests.tiny import random_cartridge, tiny_model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the gateway is started with, in place of a gateway."""
    calls: list[list[str]] = []

    def start(arguments: list[str]) -> int:
        gateway.parse(arguments)  # it must be a command line that the gateway takes
        calls.append(arguments)
        return 0

    monkeypatch.setattr(gateway, "main", start)
    monkeypatch.delenv("TOKASAURUS_API_KEY", raising=False)
    return calls


def test_on_one_machine_serve_and_train_need_no_environment(asked: list[list[str]]) -> None:
    done = CliRunner().invoke(cli.app, ["serve", "--model", "m", "--threads", "2"])
    assert done.exit_code == 0, done.output
    assert "everybody on this machine may use the server" in done.output
    assert "train --model m --data DATA --server http://127.0.0.1:10210 --device cpu" in done.output
    [arguments] = asked
    given = gateway.parse(arguments)
    assert (given.model, given.host, given.port, given.no_token) == ("m", "127.0.0.1", 10210, True)
    assert given.server_args == "--seed 0 --device cpu --dtype float32 --threads 2".split()


def test_elsewhere_a_token_is_needed_and_one_that_is_set_is_used(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKASAURUS_API_KEY", "a" * 20)
    CliRunner().invoke(cli.app, ["serve", "--model", "m", "--", "--keep-versions", "8"])
    monkeypatch.delenv("TOKASAURUS_API_KEY")
    CliRunner().invoke(cli.app, ["serve", "--model", "m", "--host", "0.0.0.0"])
    given = [gateway.parse(arguments) for arguments in asked]
    assert [one.no_token for one in given] == [False, False] and given[0].keep_versions == "8"


def test_a_server_of_cartridges_takes_no_arguments_of_the_gateway(asked: list[list[str]]) -> None:
    typed = ["serve", "--model", "m", "--cartridge", "a=b", "--", "--keep-versions", "8"]
    done = CliRunner().invoke(cli.app, typed)
    assert done.exit_code == 1 and "only a server for training takes these" in done.output
    assert not asked


def test_vllm_behind_the_gateway(asked: list[list[str]]) -> None:
    typed = ["serve", "--model", "m", "--engine", "vllm", "--engine-python", sys.executable]
    done = CliRunner().invoke(cli.app, [*typed, "--", "--keep-versions", "8"])
    assert done.exit_code == 0, done.output
    given = gateway.parse(asked[0])
    assert (given.backend, given.engine_python) == ("vllm", sys.executable)
    assert given.keep_versions == "8"
    assert given.server_args == ["--seed", "0"]  # vLLM chooses its dtype


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--engine", "vllm"], "--make-environment"),
        (["--engine", "vllm", "--engine-python", "/no/python"], "/no/python"),
        (["--engine", "vllm", "--threads", "2"], "--threads"),
        (["--engine-python", sys.executable], "--engine vllm"),
    ],
)
def test_options_that_do_not_go_with_the_engine(
    typed: list[str], named: str, asked: list[list[str]]
) -> None:
    done = CliRunner().invoke(cli.app, ["serve", "--model", "m", *typed])
    assert done.exit_code == 1 and named in " ".join(done.output.split())
    assert not asked


def test_the_line_for_a_stock_vllm_is_printed(model_folder: Path, tmp_path: Path) -> None:
    made = write_cartridge(_for_tiny(model_folder), tmp_path / "anna", "native")
    typed = ["serve", "--model", str(model_folder), "--engine", "vllm"]
    done = CliRunner().invoke(cli.app, [*typed, "--cartridge", f"anna={made}"])
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.stdout.splitlines() if line.startswith("vllm serve")]
    words = shlex.split(line)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["cartridges"] == {"anna": str(made)}


def _for_tiny(model_folder: Path) -> StoredCartridge:
    state = random_cartridge(tiny_model()).state_dict()
    return StoredCartridge(Snapshot.take(state, torch.float32), CartridgeMeta(str(model_folder)))
