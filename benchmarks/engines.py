"""Engines side by side: vLLM, the embedded server, and transformers' own `generate`.

    python benchmarks/engines.py --engine-python ~/vllm-env/bin/python
    python benchmarks/engines.py --only embedded hf      # without vLLM

The same prompts behind the same cartridge, one engine after the other on the same machine: seconds
for each load (rollouts x tokens, all in flight at once), seconds to the first token of one request,
and what a new version costs from its upload to its first answer. Both servers stand behind the
gateway, as for training. `generate` gets the cartridge as its cache and all prompts as one batch,
of equal length so that nothing is padded: it has no server, no versions and no requests that come
and go.

Seconds are wall clock, the best of --repeats; the ratio is to the first engine. All engines compute
in float32, with as many threads. Tokasaurus does not run without a GPU: what its authors publish is
printed below the table, and says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least, require_multiple  # noqa: E402
from benchmarks.bases import machine  # noqa: E402
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS  # noqa: E402
from cartridge_distill.cartridge.prefix import Prefix  # noqa: E402
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers  # noqa: E402
from cartridge_distill.model.demo_model import cache_dir, get_demo_model  # noqa: E402
from cartridge_distill.sync.upload import encode  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import ChildFailed, Supervisor, say  # noqa: E402
from tests.gateway.rig import COMPLETIONS, MODEL_NAME, Rig, completion, use_token  # noqa: E402

ENGINES = ("vllm", "embedded", "hf")
PROMPT_TOKENS = 24
TOKASAURUS = (
    "Tokasaurus: not measured, it needs a GPU. Published by its authors (June 2025, on GPUs, "
    "without cartridges):\nup to 3 times the throughput of vLLM and SGLang; "
    "scalingintelligence.stanford.edu/blogs/tokasaurus"
)
VERSION = "bench-step-000000"


@dataclass
class Figures:
    """Seconds of one engine, by load; of its first token; of a new version."""

    loads: dict[tuple[int, int], float] = field(default_factory=dict)
    first_token: float | None = None
    new_version: float | None = None


def make_prefix(model: Any, tokens: int) -> Prefix:
    """The KV of some text: what a cartridge is before it is trained."""
    ids = torch.arange(tokens)[None] * 7 % 1000 + 100
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    return Prefix([one.keys for one in cache.layers], [one.values for one in cache.layers])


def prompts(count: int) -> list[list[int]]:
    """Token ids of equal length, no two alike."""
    return [
        [100 + (13 * place + 5 * row) % 800 for place in range(PROMPT_TOKENS)]
        for row in range(count)
    ]


def upload(rig: Rig, version: str, given: Prefix) -> None:
    """Puts a version where the server answers with it."""
    snapshot = Snapshot(split_layers(list(given.keys), list(given.values), 1))
    made = encode(snapshot, MODEL_NAME, 0)
    answer = rig.put(version, b"".join(bytes(chunk) for chunk in made.chunks()))
    answer.raise_for_status()


def ask(rig: Rig, version: str, prompt: list[int], tokens: int) -> None:
    """One rollout of exactly so many tokens."""
    body = completion(version, tokens, prompt=prompt, ignore_eos=True)
    answer = rig.http.post(COMPLETIONS, json=body, timeout=1800)
    answer.raise_for_status()
    assert answer.json()["usage"]["completion_tokens"] == tokens


def burst(pool: ThreadPoolExecutor, rig: Rig, count: int, tokens: int) -> None:
    """So many rollouts of so many tokens, all in flight at once."""
    one = partial(ask, rig, VERSION, tokens=tokens)
    list(pool.map(one, prompts(count)))


def best(repeats: int, run: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@contextmanager
def gateway(engine: str, options: argparse.Namespace, scratch: Path) -> Iterator[Rig]:
    """A gateway over one of the servers; it ends with the block."""
    bounds: tuple[object, ...] = (
        "--max-cartridge-tokens",
        options.tokens,
        "--max-request-tokens",
        512,
    )
    with Supervisor() as supervisor:
        if engine == "vllm":
            # Left to itself it takes every core.
            os.environ["OMP_NUM_THREADS"] = str(options.threads)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"
            rig = Rig(
                *(scratch, options.model, *bounds),
                server=("--dtype", "float32"),
                engine_python=options.engine_python,
                supervisor=supervisor,
            )
        else:
            server = ("--threads", options.threads)
            rig = Rig(scratch, options.model, *bounds, server=server, supervisor=supervisor)
        start = time.monotonic()
        yield rig.start()
        say(f"   {engine}: up and done after {time.monotonic() - start:.0f} s")


def of_server(engine: str, options: argparse.Namespace, given: Prefix, scratch: Path) -> Figures:
    """The figures of a server behind the gateway."""
    say(f"\n== {engine}: starting")
    found = Figures()
    with gateway(engine, options, scratch / engine) as rig:
        upload(rig, VERSION, given)
        ask(rig, VERSION, prompts(1)[0], 4)  # what is made at the first request
        for count, tokens in options.loads:
            with ThreadPoolExecutor(count) as pool:
                load = partial(burst, pool, rig, count, tokens)
                found.loads[count, tokens] = best(options.repeats, load)
            say(f"   {count} x {tokens}: {found.loads[count, tokens]:.2f} s")
        found.first_token = best(5, lambda: ask(rig, VERSION, prompts(1)[0], 1))
        steps = iter(range(1, 1000))

        def version() -> None:
            step = next(steps)
            name = f"bench-step-{step:06d}"
            # Another content each time: a server might know the old one.
            changed = Prefix([key + 1e-4 * step for key in given.keys], given.values)
            upload(rig, name, changed)
            ask(rig, name, prompts(1)[0], 1)

        found.new_version = best(3, version)
    return found


def of_generate(model: Any, options: argparse.Namespace, given: Prefix) -> Figures:
    """The figures of transformers' ``generate`` with the cartridge as its cache."""
    say("\n== hf: transformers' generate")
    found = Figures()

    def run(count: int, tokens: int) -> None:
        rows = torch.tensor(prompts(count))
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(given.keys, given.values, strict=True)):
            rows_of = (count, -1, -1, -1)
            cache.update(key.expand(rows_of).clone(), value.expand(rows_of).clone(), layer)
        # `generate` leaves out as many ids as the cache holds: they are never looked at.
        ids = torch.cat([rows.new_zeros(count, given.num_tokens), rows], 1)
        with torch.no_grad():
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        assert made.shape[1] == ids.shape[1] + tokens

    for count, tokens in options.loads:
        found.loads[count, tokens] = best(options.repeats, partial(run, count, tokens))
        say(f"   {count} x {tokens}: {found.loads[count, tokens]:.2f} s")
    found.first_token = best(5, lambda: run(1, 1))
    return found


def table(figures: dict[str, Figures], loads: list[tuple[int, int]]) -> str:
    """Seconds, and beside them the ratio to the first engine, as Markdown."""
    names = list(figures)
    first = figures[names[0]]

    def cell(seconds: float | None, base: float | None) -> str:
        if seconds is None:
            return "-"
        return f"{seconds:.3g} s" + (f" ({seconds / base:.2f})" if base else "")

    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for load in loads:
        cells = [cell(figures[name].loads[load], first.loads[load]) for name in names]
        lines.append(f"| {load[0]} x {load[1]} tokens | " + " | ".join(cells) + " |")
    for title, of in (("first token", "first_token"), ("a new version", "new_version")):
        cells = [cell(getattr(figures[name], of), getattr(first, of)) for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--engine-python", help="the Python of an environment with vLLM")
    option("--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="(all of them)")
    option("--model", type=Path, help="folder of the model (the demo's, SmolLM2-135M-Instruct)")
    option("--tokens", type=int, default=128, help="of the cartridge (%(default)s)")
    option("--threads", type=int, default=os.cpu_count(), help="of each engine (%(default)s)")
    option("--repeats", type=int, default=2, help="of each load (%(default)s)")
    option(
        "--loads",
        nargs="+",
        default=["48x6", "48x64", "8x256"],
        metavar="ROLLOUTSxTOKENS",
        help="(%(default)s)",
    )
    options = parser.parse_args(arguments)
    require_at_least(parser, options, repeats=1, threads=1)
    require_multiple(parser, options, tokens=PAGE_TOKENS)
    try:
        options.loads = [tuple(map(int, load.split("x"))) for load in options.loads]
        if any(len(load) != 2 or min(load) < 1 for load in options.loads):
            raise ValueError
    except ValueError:
        parser.error("--loads: each is ROLLOUTSxTOKENS, such as 48x6")
    if "vllm" in options.only and options.engine_python is None:
        parser.error("--engine-python: where is vLLM? (or --only embedded hf)")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    use_token()
    torch.set_num_threads(options.threads)
    say(
        f"machine: {machine('cpu')}, load {os.getloadavg()[0]:.1f} at the start; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    try:
        options.model = options.model or get_demo_model(cache_dir())
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        given = make_prefix(model, options.tokens)
        figures = {}
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            for engine in options.only:
                if engine == "hf":
                    figures[engine] = of_generate(model, options, given)
                else:
                    figures[engine] = of_server(engine, options, given, Path(scratch))
    except KeyboardInterrupt:
        print("\nstopped; every process of the benchmark was ended", flush=True)
        return 130
    except (CartridgeDistillError, ChildFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(figures, options.loads)}")
    print(TOKASAURUS)
    print(f"load {os.getloadavg()[0]:.1f} at the end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
