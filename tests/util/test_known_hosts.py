"""Which requests name this server; the layer itself is asked over real connections elsewhere."""

from __future__ import annotations

import socket

import pytest

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.known_hosts import KnownHosts

OWN = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:1", "[::1]", "[::1]:8000"),
        "[0:0:0:0:0:0:0:1]:8000",
    ],
)
def test_the_loopback_is_known(host: str) -> None:
    assert KnownHosts().problem([host], []) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("127.0.0.1@evil.example", "user@localhost", "", " ", "[localhost]", "localhost:x"),
        *("10.0.0.5", "[2001:db8::1]:8000", "localhost/", "localhost, evil.example", "0.0.0.0"),
    ],
)
def test_other_names_are_refused(host: str) -> None:
    assert KnownHosts().problem([host], []) is not None


def test_there_is_one_host() -> None:
    assert "2 Host headers" in str(KnownHosts().problem(["localhost", "evil.example"], []))
    assert "0 Host headers" in str(KnownHosts().problem([], []))


@pytest.mark.parametrize(
    ("origin", "known"),
    [
        (OWN, True),
        ("http://localhost:3000", True),
        ("https://[::1]:3000", True),
        ("null", False),
        ("http://evil.example", False),
        ("http://localhost.evil.example", False),
        ("file://localhost", False),
        ("http://6.6.6.6", False),
    ],
)
def test_origins(origin: str, known: bool) -> None:
    assert (KnownHosts().problem(["127.0.0.1:8000"], [origin]) is None) == known
    # Where every address is listened on, pages of other addresses may still not ask.
    everywhere = KnownHosts("0.0.0.0")
    assert (everywhere.problem(["10.0.0.5:8000"], [origin]) is None) == known
    assert everywhere.problem(["10.0.0.5:8000"], ["http://10.0.0.5:8000"]) is None
    assert everywhere.problem(["10.0.0.5:8000"], [OWN, "http://evil.example"]) is not None


def test_every_address_is_known_by_number_and_by_the_machines_name() -> None:
    everywhere = KnownHosts("0.0.0.0")
    for host in ("10.0.0.5:8000", "[2001:db8::1]:8000", socket.gethostname(), "localhost"):
        assert everywhere.problem([host], []) is None
    assert everywhere.problem(["evil.example"], []) is not None


def test_the_bound_host_and_what_is_allowed() -> None:
    box = KnownHosts("gpu-box", ["Serve.Example"])
    for host in ("gpu-box:10210", "serve.example", "SERVE.example:443"):
        assert box.problem([host], ["https://serve.example"]) is None
    assert box.problem(["other"], []) is not None
    assert KnownHosts(more=["*"]).problem(["evil.example"], ["null"]) is None


@pytest.mark.parametrize("name", ["http://box", "box:1", "", "a b", "*.example"])
def test_what_is_no_name_cannot_be_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="--allow-host"):
        KnownHosts(more=[name])
