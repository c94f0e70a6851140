"""Environment variables that NCCL and Ray need on a machine without a network.

A rented GPU node may have no interface but the loopback. NCCL then finds nothing to listen on, and
Ray would keep a token for a cluster that nobody else can reach, in a home directory that may be
read-only. The demo sets what is missing; ``cartridge-distill doctor`` names it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Setting:
    """A variable that is missing from the environment, its value, and why it is needed."""

    name: str
    value: str
    why: str


def has_network(interfaces: Path = INTERFACES) -> bool:
    """Whether an interface other than the loopback is up; True where that cannot be looked up."""
    try:
        names = sorted(path.name for path in interfaces.iterdir())
        others = [name for name in names if name != "lo"]
        states = [(interfaces / name / "operstate").read_text().strip() for name in others]
    except OSError:  # not Linux, or a container that hides it
        return True
    return any(state in ("up", "unknown") for state in states)


def missing_settings(
    environ: Mapping[str, str], gpu: bool, network: bool | None = None
) -> list[Setting]:
    """What to set on this machine before a run of veRL.

    Args:
        environ: what is set already; a variable in it is left alone.
        gpu: whether the run uses one, and so NCCL.
        network: whether there is an interface besides the loopback; None looks.

    Returns:
        Nothing where the defaults work.
    """
    network = has_network() if network is None else network
    found: list[Setting] = []
    if gpu and not network and "NCCL_SOCKET_IFNAME" not in environ:
        why = "no network interface is up, and NCCL leaves the loopback out by itself"
        found.append(Setting("NCCL_SOCKET_IFNAME", "lo", why))
    # Ray 2.60 and later make a token for a new local cluster and save it in the home directory.
    named = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(environ)
    home = Path(environ.get("HOME") or Path.home())
    if not named and not network:
        why = "no network interface is up: nobody else can reach Ray, and it needs no token"
        found.append(Setting("RAY_AUTH_MODE", "disabled", why))
    elif not named and not os.access(home, os.W_OK) and not (home / ".ray/auth_token").exists():
        why = f"Ray saves a token in {home}, which cannot be written to; better, a RAY_AUTH_TOKEN"
        found.append(Setting("RAY_AUTH_MODE", "disabled", why))
    return found
