"""The gateway runs in the real server's environment: an older torch, and little else."""

from __future__ import annotations

import subprocess
import sys

# What this project's gateway may load of itself. The rest needs the trainer's libraries.
LIGHT = {
    "cartridge_distill",
    "cartridge_distill.cartridge",
    "cartridge_distill.rollout",
    "cartridge_distill.sync",
    "cartridge_distill.util",
    "cartridge_distill.util.clean_logs",
    "cartridge_distill.util.command_line",
    "cartridge_distill.util.disk",
    "cartridge_distill.util.files",
    "cartridge_distill.util.http_connections",
    "cartridge_distill.util.http_errors",
    "cartridge_distill.util.http_front",
    "cartridge_distill.util.known_hosts",
    "cartridge_distill.util.lfs",
    "cartridge_distill.util.secrecy",
    "cartridge_distill.util.server_url",
    "cartridge_distill.util.standard_output",
    "cartridge_distill.util.strict_json",
    "cartridge_distill.util.disconnect",
    "cartridge_distill.util.errors",
    "cartridge_distill.cartridge.content_hash",
    "cartridge_distill.cartridge.kv_shape",
    "cartridge_distill.util.content_digest",
    "cartridge_distill.util.http_places",
    "cartridge_distill.util.sealed",
    "cartridge_distill.cartridge.snapshot",
    "cartridge_distill.sync.upload",
    "cartridge_distill.sync.versions",
    "cartridge_distill.engines",
    "cartridge_distill.engines.vllm",
    "cartridge_distill.engines.vllm.launch",
    "cartridge_distill.engines.vllm.options",
    "cartridge_distill.rollout.limits",
    "cartridge_distill.rollout.protocol",
    "cartridge_distill.server",
    "cartridge_distill.server.openai",
    "cartridge_distill.server.openai.answers",
    "cartridge_distill.server.openai.errors",
    "cartridge_distill.server.openai.requests",
    "cartridge_distill.server.openai.translate",
}
FOLDERS = ("cartridge_distill.gateway", "cartridge_distill.cartridge.formats")
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
