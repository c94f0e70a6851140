"""How long OpenMP's threads spin before they sleep. Imports nothing: it must run before torch does.

Between two products a thread either spins, ready at once, or sleeps and is woken by the kernel.
Threads that spin for long starve another process on the same cores (server and trainer take turns
here); threads that never spin are slow. And libgomp, torch's OpenMP on Linux, nearly stops spinning
(100 rounds) in a process that has more OpenMP threads than cores, which is every process that
computes in a second thread: a server's engine, a Ray worker. ``OMP_WAIT_POLICY=active`` raises that
to 1,000 rounds, ``GOMP_SPINCOUNT`` holds all other waiting down.
"""

from __future__ import annotations

from collections.abc import Mapping

SPINNING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "10000"}


def spinning(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment: :data:`SPINNING`, or nothing where it says one of them."""
    return {} if SPINNING.keys() & environment.keys() else dict(SPINNING)
