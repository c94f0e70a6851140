"""The gateway runs in the real server's environment: an older torch, and little else."""

from __future__ import annotations

import subprocess
import sys

# What this project's gateway may load of itself. The rest needs the trainer's libraries.
LIGHT = {
    "cartridge_distill",
    "cartridge_distill.disconnect",
    "cartridge_distill.errors",
    "cartridge_distill.kv_shape",
    "cartridge_distill.memory",
    "cartridge_distill.snapshot",
    "cartridge_distill.transfer",
    "cartridge_distill.versions",
    "cartridge_distill.wire",
}
FOLDERS = ("cartridge_distill.gateway", "cartridge_distill.formats")
HEAVY = {"verl", "ray", "peft", "modal", "pandas", "transformers.modeling_utils"}


def test_the_gateway_loads_no_model_code() -> None:
    script = (
        "import sys, cartridge_distill.gateway.app, cartridge_distill.gateway.__main__\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    own = {name for name in loaded if name.startswith("cartridge_distill")}
    strange = {name for name in own - LIGHT if not name.startswith(FOLDERS)}
    assert not strange, f"the gateway loads {sorted(strange)}"
    assert not HEAVY & loaded
