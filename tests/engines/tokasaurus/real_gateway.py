"""Starts the gateway over the REAL server on a CPU; arguments as for the gateway.

The server process is ``real_server`` in place of ``cartridge_distill.engines.tokasaurus``, which it
runs with stand-ins for what needs CUDA by name. All else is the gateway as it is.
"""

from __future__ import annotations

import sys

from cartridge_distill.gateway import __main__ as command_line
from cartridge_distill.gateway import app, commands
from cartridge_distill.gateway.settings import GatewaySettings


def on_a_cpu(settings: GatewaySettings, port: int) -> list[str]:
    known = "cartridge_distill.engines.tokasaurus"
    words = commands.server_command(settings, port)
    assert known in words
    return ["tests.engines.tokasaurus.real_server" if word == known else word for word in words]


if __name__ == "__main__":
    app.server_command = on_a_cpu
    sys.exit(command_line.main())
