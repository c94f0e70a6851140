"""What the gateway costs: uploads of a real cartridge's size, and the way through it.

    python benchmarks/serving.py             # all of it; needs veRL and Ray
    python benchmarks/serving.py --no-ray    # without the proxy that veRL talks to

(a) upload: a bfloat16 cartridge of Llama-3.2-3B's shape (28 layers, 8 KV heads of 128, 2,048
    tokens: 117 M parameters, 235 MB) over the loopback, until a request with it works, against
    writing and fsyncing the same bytes once on the same disk, and against the seconds for which the
    trainer is blocked: it waits for a copy of its float32 weights, the rest happens beside it. The
    parts are printed, too, and the CPU seconds of the three processes: client and gateway each
    hash all bytes, at the same time, and the server reads the file and computes a token, which
    writing does not. What is served was hashed whole before, so no overlap makes a publication
    shorter than one hash and the server's part; that sum is printed beside it.
(b) requests: the same completions asked of the server directly, through the gateway, through the
    gateway as veRL's agent loop asks, and as it would ask if each request were a call of the proxy,
    which is a Ray actor; one at a time for the latency, many in flight for requests/s. The ways
    take turns, so that a machine that is busy for a while is busy for all.

The models have random weights and are tiny but for their KV shape: how long a model computes is not
measured here. Aims stand beside the figures. Everything runs on this machine, its CPUs shared by
client, gateway and server; across a network the network's own time is added.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least, require_multiple  # noqa: E402
from benchmarks.bases import machine  # noqa: E402
from benchmarks.serving_requests import request_table, start_ray  # noqa: E402
from benchmarks.serving_uploads import upload_table  # noqa: E402
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import ChildFailed, Supervisor, say  # noqa: E402
from tests.gateway.rig import Rig, use_token  # noqa: E402
from tests.tiny import endless_model, save_model  # noqa: E402


def run_requests(options: argparse.Namespace, scratch: Path, supervisor: Supervisor) -> None:
    model = endless_model()
    save_model(model, scratch / "model")
    say("\n== (b) requests: starting a gateway with a tiny model")
    options_of_gateway = ("--max-inflight", 4096, "--drain-s", 3)
    rig = Rig(scratch, scratch / "model", *options_of_gateway, supervisor=supervisor).start()
    if options.ray:
        say("   starting Ray")
        start_ray()
    try:
        asyncio.run(request_table(options, rig, model))
    finally:
        if options.ray:
            import ray

            ray.shutdown()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--repeats", type=int, default=5, help="uploads (%(default)s)")
    option("--layers", type=int, default=28, help="of the uploaded cartridge (%(default)s)")
    option("--kv-heads", type=int, default=8, help="(%(default)s)")
    option("--head-dim", type=int, default=128, help="(%(default)s)")
    option("--tokens", type=int, default=2048, help="a multiple of 16 (default: %(default)s)")
    option(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="in which the server computes; it converts what is uploaded (%(default)s)",
    )
    option("--requests", type=int, default=300, help="one at a time, per way (%(default)s)")
    option("--burst", type=int, default=512, help="requests of a burst (%(default)s)")
    option("--inflight", type=int, default=64, help="at once, in a burst (%(default)s)")
    option("--no-ray", dest="ray", action="store_false", help="leave the Ray proxy out")
    option("--scratch", type=Path, help="folder on the disk that is measured (the system's own)")
    options = parser.parse_args(arguments)
    counts = ("repeats", "layers", "kv_heads", "requests", "burst", "inflight")
    require_at_least(parser, options, **dict.fromkeys(counts, 1))
    require_multiple(parser, options, tokens=PAGE_TOKENS, head_dim=2)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    start = time.monotonic()
    use_token()
    say(
        f"machine: {machine('cpu')}, load {os.getloadavg()[0]:.1f} at the start; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as name,
            Supervisor() as supervisor,
        ):
            upload_table(options, Path(name) / "upload", supervisor)
            run_requests(options, Path(name) / "requests", supervisor)
    except KeyboardInterrupt:
        print("\nstopped; every process of the benchmark was ended", flush=True)
        return 130
    except (CartridgeDistillError, ChildFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\n{time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
