"""`serve` for training: the gateway's command, its token, and what the other end is told."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cartridge_distill.cli import main as cli
from cartridge_distill.gateway import __main__ as gateway


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
    assert given.server_args == "--device cpu --dtype float32 --seed 0 --threads 2".split()


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
