"""What a node without a network needs in its environment, and what is left alone elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cartridge_distill.util.node import has_network, missing_settings


def interfaces(folder: Path, **states: str) -> Path:
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "operstate").write_text(f"{state}\n")
    return folder


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"lo": "unknown"}, False),
        ({"lo": "unknown", "ifb0": "down"}, False),
        ({"lo": "unknown", "eth0": "up"}, True),
        ({"lo": "unknown", "tun0": "unknown"}, True),  # drivers that do not report a state
    ],
)
def test_an_interface_counts_when_it_is_up(
    tmp_path: Path, states: dict[str, str], expected: bool
) -> None:
    assert has_network(interfaces(tmp_path, **states)) is expected


def test_where_nothing_can_be_looked_up_there_is_a_network(tmp_path: Path) -> None:
    assert has_network(tmp_path / "none")


def names(environ: dict[str, str], gpu: bool, network: bool) -> dict[str, str]:
    return {found.name: found.value for found in missing_settings(environ, gpu, network)}


def test_a_node_without_a_network(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert names(home, True, False) == {"NCCL_SOCKET_IFNAME": "lo", "RAY_AUTH_MODE": "disabled"}
    assert names(home, False, False) == {"RAY_AUTH_MODE": "disabled"}
    assert names(home, True, True) == {}


def test_what_a_person_has_set_stays(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "NCCL_SOCKET_IFNAME": "eth1", "RAY_AUTH_TOKEN": "secret"}
    assert names(home, True, False) == {}


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    [found] = missing_settings({"HOME": str(tmp_path)}, gpu=False, network=True)
    assert found.name == "RAY_AUTH_MODE" and str(tmp_path) in found.why
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("made before")
    assert missing_settings({"HOME": str(tmp_path)}, gpu=False, network=True) == []
