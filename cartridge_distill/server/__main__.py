"""Command line of the embedded server: ``python -m cartridge_distill.server --help``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.known_hosts import KnownHosts
from cartridge_distill.util.listening import listening_socket
from cartridge_distill.util.openmp import spinning
from cartridge_distill.util.server_url import DEFAULT_PORT
from cartridge_distill.util.standard_output import guard_output

EXAMPLES = """\
examples:
  # serve a model from a folder (or a hub id), cartridges from ./cartridges/{id}/
  python -m cartridge_distill.server --model path/to/model --cartridge-dir ./cartridges

  # is it up?  which model?
  curl http://127.0.0.1:10210/ping
  curl http://127.0.0.1:10210/v1/models

  # ask it something, with a cartridge before the prompt
  curl http://127.0.0.1:10210/custom/cartridge/chat/completions \\
    -H 'content-type: application/json' \\
    -d '{"model": "default", "max_tokens": 32, "messages": [{"role": "user", "content": "Hello"}],
         "cartridges": [{"id": "my-cartridge", "source": "local"}]}'

good to know:
  * A cartridge is a folder {cartridge-dir}/{id}/ with cartridge.pt and config.yaml. Its number of
    tokens must be a multiple of 16.
  * An id is loaded ONCE and never again while the server lives, as on the real Tokasaurus server.
    New weights need a new id.
  * Token ids and log-probs come in the answer's system_fingerprint, with
    "logprobs_in_fingerprint": true. They are those of softmax(logits / temperature).
  * Unknown fields are refused with HTTP 422; echo, top_p, penalties and the like with HTTP 400.
  * Ctrl-C or SIGTERM ends it.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cartridge_distill.server",
        description="Serve a transformers model with cartridges over Tokasaurus' protocol.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of the model")
    add("--tokenizer", help="folder or hub id of the tokenizer (default: the model's)")
    add("--model-name", help="name in /v1/models and the answers (default: what --model says)")
    add(
        "--cartridge-dir",
        type=Path,
        default=Path("cartridges"),
        help="holds one folder per cartridge id (default: ./cartridges)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server, as clients write it; others are refused. Repeatable; "
        "* allows every name (default: the loopback, and --host)",
    )
    add(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="default: %(default)s; 0 takes a free one",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the model (default: float32)",
    )
    add("--threads", type=int, help="CPU threads for the model (default: torch's choice)")
    add("--seed", type=int, default=0, help="all sampling follows from it (default: 0)")
    add(
        "--max-tokens-per-request",
        type=int,
        help="bound on prompt + max_tokens; the cartridge does not count (default: the context)",
    )
    add("--max-batch", type=int, default=64, help="sequences computed at once (default: 64)")
    add(
        "--max-kv-tokens",
        type=int,
        default=65_536,
        help="bound on sequences x the longest of them, which is what the KV buffers hold "
        "(default: 65536)",
    )
    add(
        "--prefix-cache-tokens",
        type=int,
        default=16_384,
        help="tokens of long beginnings that prompts without a cartridge share, such as a "
        "document, whose keys and values are kept; 0 keeps none (default: 16384)",
    )
    add(
        "--cartridge-memory-gb",
        type=float,
        default=4.0,
        help="keys and values of cartridges kept; beyond it the longest unused id goes, and is "
        "refused from then on (default: 4)",
    )
    add(
        "--idle-s",
        type=float,
        default=60.0,
        help="a client that sends nothing of its request, or reads nothing of its answer, for so "
        "long is cut off (default: 60)",
    )
    add(
        "--max-connections",
        type=int,
        default=2048,
        help="open at once. When more come, those go from which nothing has come for longest; when "
        "all are being answered, more get HTTP 503 (default: 2048)",
    )
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs until told to stop; returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(spinning(os.environ))  # before torch is imported
    hide_secrets_in_logs()
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )

    def stop_early(signum: int, _: FrameType | None) -> None:
        raise SystemExit(0)

    # Until uvicorn takes the signals over, and again once it is done.
    signal.signal(signal.SIGTERM, stop_early)
    signal.signal(signal.SIGINT, stop_early)

    try:
        hosts = KnownHosts(options.host, options.allow_host)
    except ConfigError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    try:
        listener = listening_socket(options.host, options.port)
    except ConfigError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    started = time.monotonic()
    print(f"loading {options.model} ...", flush=True)
    import torch

    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.reading import read_tokenizer
    from cartridge_distill.server.app import Service
    from cartridge_distill.server.running import uvicorn_server
    from cartridge_distill.server.settings import ServerSettings

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        settings = ServerSettings(
            cartridge_dir=options.cartridge_dir,
            model_name=options.model_name or options.model,
            seed=options.seed,
            max_tokens_per_request=options.max_tokens_per_request,
            max_batch=options.max_batch,
            max_kv_tokens=options.max_kv_tokens,
            prefix_cache_tokens=options.prefix_cache_tokens,
            cartridge_memory_gb=options.cartridge_memory_gb,
            idle_s=options.idle_s,
            max_connections=options.max_connections,
        )
        model = load_model(options.model, getattr(torch, options.dtype), options.device)
        tokenizer = read_tokenizer(options.tokenizer or options.model)
        service = Service(model, tokenizer, settings, options.threads)
    except (ConfigError, OSError, ValueError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    options.cartridge_dir.mkdir(parents=True, exist_ok=True)
    server = uvicorn_server(service, options.host, options.port, options.log_level, hosts)
    print(
        f"model ready after {time.monotonic() - started:.1f} s ({options.dtype} on "
        f"{options.device}, {torch.get_num_threads()} threads); "
        f"cartridges from {options.cartridge_dir.resolve()}; "
        f"serving on http://{options.host}:{listener.getsockname()[1]}",
        flush=True,
    )
    try:
        server.run(sockets=[listener])
    except (KeyboardInterrupt, SystemExit):
        # uvicorn hands the signal on once it has shut down in order.
        pass
    if not server.started:
        print("cannot start: see the log above", file=sys.stderr)
        return 1
    print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
