"""The embedded server's engine: tokens a second, and milliseconds of a forward, by rows in flight.

    python benchmarks/engine.py                                        # SmolLM2-135M on a CPU
    python benchmarks/engine.py --shape llama-3.2-3b --device cuda --tokens 2048
    python benchmarks/engine.py --work 1x128 64x128                    # rows x new tokens of each

Rows are random prompts behind one cartridge, each with its own random numbers; every row runs to
its full length. The first work is done twice, and the first time is not counted. The engine is
called as the server calls it; HTTP and tokenizing are not measured here (`serving.py` does that).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.bases import (  # noqa: E402
    add_base_options,
    check_base_options,
    demo_model,
    machine,
    make_base,
    vocabulary_of,
)
from benchmarks.measure import synchronize  # noqa: E402
from cartridge_distill.cartridge.prefix import Prefix  # noqa: E402
from cartridge_distill.cartridge.trainable import TrainableCache  # noqa: E402
from cartridge_distill.server.engine import Engine  # noqa: E402
from cartridge_distill.server.rows import Row  # noqa: E402
from cartridge_distill.server.settings import ServerSettings  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Served:
    """One line of the table; memory is torch's peak on a GPU, None on a CPU."""

    rows: int
    new_tokens: int
    seconds: float
    forwards: int
    peak_gib: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.rows * self.new_tokens / self.seconds


def frozen_prefix(model: PreTrainedModel, tokens: int) -> Prefix:
    """A random cartridge as the server holds it: in the model's dtype, without gradients."""
    cartridge = TrainableCache.from_random(model.config, tokens).to(model.device)
    prefix = cartridge.prefix().to(dtype=model.dtype)
    keys = [key.detach() for key in prefix.keys]
    return Prefix(keys, [value.detach() for value in prefix.values])


def serve(
    engine: Engine, prefix: Prefix, vocabulary: int, prompt: int, rows: int, new_tokens: int
) -> Served:
    """Runs ``rows`` rows of ``prompt`` + ``new_tokens`` tokens to their end."""
    draw = random.Random(0)
    work = [
        Row(
            [draw.randrange(vocabulary) for _ in range(prompt)],
            new_tokens,
            _TEMPERATURE,
            random.Random(number),
            prefix,
        )
        for number in range(rows)
    ]
    device = prefix.keys[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = engine.stats.forwards
    synchronize(device)
    start = time.perf_counter()
    engine.run(work)
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 1024**3 if device.type == "cuda" else None
    return Served(rows, new_tokens, seconds, engine.stats.forwards - before, peak)


def rows_and_tokens(text: str) -> tuple[int, int]:
    """``8x32``: 8 rows of 32 new tokens each."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: wants ROWSxTOKENS, such as 8x32")
    return int(match[1]), int(match[2])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base_options(parser)
    option = parser.add_argument
    option("--tokens", type=int, default=128, help="of the cartridge (%(default)s)")
    option("--prompt", type=int, default=64, help="tokens of each row before (%(default)s)")
    option(
        "--work",
        type=rows_and_tokens,
        nargs="+",
        default=[(1, 32), (8, 32), (64, 32)],
        metavar="ROWSxTOKENS",
        help="rows in flight and new tokens of each (1x32 8x32 64x32)",
    )
    option("--threads", type=int, help="CPU threads (torch's choice)")
    option("--json", type=Path, help="the lines of the table, one JSON object each")
    options = parser.parse_args(arguments)
    require_at_least(parser, options, tokens=2, prompt=1)
    check_base_options(parser, options)
    return options


def run(options: argparse.Namespace) -> list[Served]:
    """The table, printed line by line."""
    model = make_base(options.model, options.shape, getattr(torch, options.dtype), options.device)
    prefix = frozen_prefix(model, options.tokens)
    most = max(rows for rows, _ in options.work)
    settings = ServerSettings(cartridge_dir=Path(), model_name="benchmark", max_batch=most)
    engine = Engine(model, settings, options.threads)
    vocabulary = vocabulary_of(model)
    serve(engine, prefix, vocabulary, options.prompt, *options.work[0])
    say(f"   {'rows x new tokens':<20}{'seconds':>9}{'tokens/s':>10}{'ms a forward':>14}")
    found = []
    for rows, new_tokens in options.work:
        served = serve(engine, prefix, vocabulary, options.prompt, rows, new_tokens)
        each = 1e3 * served.seconds / served.forwards
        name = f"{rows} x {new_tokens}"
        say(
            f"   {name:<20}{served.seconds:>9.2f}{served.tokens_per_second:>10.0f}{each:>14.1f}"
            + ("" if served.peak_gib is None else f"   {served.peak_gib:.1f} GiB")
        )
        found.append(served)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(served)) + "\n")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.shape is None:
            options.model = options.model or demo_model()
        say(f"machine: {machine(options.device)}; torch {torch.__version__}")
        say(
            f"{options.shape or options.model}, {options.dtype}: prompts of {options.prompt} "
            f"tokens behind a cartridge of {options.tokens}"
        )
        run(options)
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
