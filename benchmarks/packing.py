"""What packing and the teacher's cache are worth: one run prints all tables.

    python benchmarks/packing.py                                  # SmolLM2-135M, two CPU threads
    python benchmarks/packing.py --metrics runs/demo/metrics.jsonl
    python benchmarks/packing.py --shape llama-3.2-3b --device cuda \\
        --prefix 2048 --sequences 32 --length 256 --document 10000 --samples 8

(a) student: forward and backward of a batch behind a cartridge. The packed row against one sequence
    at a time and against a padded batch, both by transformers' own SDPA attention with the
    cartridge in its cache, and PEFT's CARTRIDGE where it is installed, at equal and at ragged
    lengths. All with this project's linear layers; on a CPU where those differ from torch's, the
    packed row also with torch's.
(b) teacher: forward of samples behind a document's cached KV, against reading the document again
    with each sample.
(c) with --metrics: seconds per stage of a real step, from the file that a run of veRL wrote.
(d) peak memory of each way, where it can be measured.
(e) with --read: reading a document of so many tokens, against transformers' SDPA attention.
(f) on a CPU: the teacher's answers behind prompts whose KV is kept, and behind prompts that are
    computed again.

Before anything is timed, every way's log-probs and cartridge gradients are compared in float32;
ways that disagree end the run, and a way for which memory does not suffice is left out, with a
line. What the ways are: `ways.py`, for (e) and (f) `teacher.py`. Not measured here: generation, the
sync, FSDP.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    make_sequences,
    vocabulary_of,
)
from benchmarks.measure import (  # noqa: E402
    TOLERANCE,
    Job,
    Measured,
    check,
    measure,
    print_rows,
)
from benchmarks.teacher import prompts_table, reading_tables  # noqa: E402
from benchmarks.ways import packed, stepper, ways_for  # noqa: E402
from cartridge_distill.cartridge.prefix import Prefix  # noqa: E402
from cartridge_distill.cartridge.trainable import TrainableCache  # noqa: E402
from cartridge_distill.model.attention import ATTENTION_NAME  # noqa: E402
from cartridge_distill.model.beginning import first_cartridge  # noqa: E402
from cartridge_distill.model.forward import packed_forward  # noqa: E402
from cartridge_distill.model.logprobs import chosen_logprobs  # noqa: E402
from cartridge_distill.model.packing import PackedBatch, pack  # noqa: E402
from cartridge_distill.model.prefill import prefix_from_tokens  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

TABLES = ["student", "teacher", "reading", "prompts"]

_MOST_CHECKED = 512  # tokens of the document, when the teacher's two ways are compared

# ---------------------------------------------------------------- the tables


def make_cartridge(model: PreTrainedModel, options: argparse.Namespace) -> TrainableCache:
    """From the KV of some tokens: of the size that a real one has, so that a wrong mask shows."""
    vocabulary = vocabulary_of(model)
    [ids] = make_sequences(vocabulary, 1, options.prefix, False, torch.device(options.device))
    return first_cartridge(model, ids, options.prefix)


def student_tables(
    model: PreTrainedModel, cartridge: TrainableCache, options: argparse.Namespace
) -> None:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    vocabulary = vocabulary_of(model)
    for ragged in (False, True):
        kind = "ragged lengths" if ragged else "equal lengths"
        sequences = make_sequences(vocabulary, options.sequences, options.length, ragged, device)
        say(f"\n== student, {kind}: every way once, to compare, then {options.repeats} times")
        ways = ways_for(model, cartridge.num_tokens, [len(sequence) for sequence in sequences])
        known = [way.name for way in ways]
        if unknown := sorted(set(options.ways) - set(known)):
            raise ConfigError(f"--ways {unknown[0]!r} is not known here; known are {known}")
        ways = [way for way in ways if not options.ways or way.name in options.ways]
        names = [way.name for way in ways]
        model.float()  # exactness is a float32 matter
        few = sequences[: options.check_sequences]
        worst = check(
            kind, names, [stepper(way, model, cartridge)(few) for way in ways], options.tolerance
        )
        note(options, {"table": kind, "agree": names, "logprobs": worst[0], "gradients": worst[1]})
        model.to(dtype)
        tokens = sum(map(len, sequences))
        jobs = [
            Job(way.name, partial(stepper(way, model, cartridge), sequences), tokens)
            for way in ways
        ]
        rows = measure(jobs, options.repeats, device, options.clock)
        note_rows(options, f"student, {kind}", rows)
        shortest, longest = min(map(len, sequences)), max(map(len, sequences))
        print_rows(
            f"(a) forward + backward, {kind}: {len(sequences)} sequences of {shortest} to {longest}"
            f" tokens, {tokens} in all, behind a cartridge of {cartridge.num_tokens}",
            rows,
        )


@torch.no_grad()
def teacher_table(model: PreTrainedModel, options: argparse.Namespace) -> None:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    vocabulary = vocabulary_of(model)
    draw = random.Random(1)
    document = torch.tensor(
        [draw.randrange(vocabulary) for _ in range(options.document)], device=device
    )
    samples = make_sequences(vocabulary, options.samples, options.length, True, device)
    model.set_attn_implementation(ATTENTION_NAME)

    def cached(prefix: Prefix, samples: list[Tensor] = samples) -> Tensor:
        return packed("auto")(model, prefix, samples)

    def again(read: Tensor = document, samples: list[Tensor] = samples) -> Tensor:
        found = []
        for sample in samples:
            batch: PackedBatch = pack([torch.cat([read, sample])])
            response_mask = batch.index > len(read)
            logits = packed_forward(model, None, batch, batch.predicts(response_mask))
            found.append(chosen_logprobs(logits, sample[1:]))
        return torch.cat(found)

    say(f"\n== teacher: every way once, to compare, then {options.repeats} times")
    model.float()
    names = ["document's KV cached", "document read with each sample"]
    # Without tensor cores, float32 attention over a long document takes minutes.
    few, start = samples[: options.check_sequences], document[:_MOST_CHECKED]
    ours = cached(prefix_from_tokens(model, start), few)
    check("teacher", names, [(ours, []), (again(start, few), [])], options.tolerance)
    model.to(dtype)
    prefix = prefix_from_tokens(model, document)
    tokens = sum(map(len, samples))
    jobs = [
        Job(names[0], partial(cached, prefix), tokens),
        Job(names[1], again, tokens),
        Job(
            "(reading the document, once)",
            partial(prefix_from_tokens, model, document),
            len(document),
        ),
    ]
    rows = measure(jobs, options.repeats, device, options.clock)
    note_rows(options, "teacher", rows)
    print_rows(
        f"(b) teacher's forward: {len(samples)} samples, {tokens} tokens, behind a document of "
        f"{len(document)}",
        rows,
    )


def note(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """One line of the file that --json names."""
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def note_rows(options: argparse.Namespace, table: str, rows: list[Measured]) -> None:
    for row in rows:
        note(options, {"table": table, **asdict(row)})


def stage_table(path: Path) -> None:
    """Mean seconds per stage over a run's steps, the first (warm-up) apart.

    Raises:
        ConfigError: the file is not there, or is no metrics file of veRL with a step in it.
    """
    fix = "name the metrics.jsonl that a run wrote (the demo: runs/demo/metrics.jsonl)"
    try:
        steps = [json.loads(line)["data"] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--metrics {path} cannot be read: {error!r}; {fix}") from error
    steps = [step for step in steps if "timing_s/step" in step]
    if not steps:
        raise ConfigError(f"--metrics {path} holds no training step; {fix}")
    later = steps[1:] or steps
    say(f"\n(c) seconds per stage of a step: {path}, {len(steps)} steps")
    say(f"   {'':<34}{'first':>9}{'mean of the later':>20}{'of the step':>13}")
    whole = statistics.mean(step["timing_s/step"] for step in later)
    for prefix, indent in (("timing_s/", ""), ("actor/seconds/", "  in update: ")):
        names = dict.fromkeys(key for step in steps for key in step if key.startswith(prefix))
        for key in names:
            # A stage that not every step has (saving) counts for the steps that have it.
            mean = (
                statistics.mean(step[key] for step in later if key in step)
                if any(key in step for step in later)
                else 0.0
            )
            first = f"{steps[0][key]:.2f}" if key in steps[0] else "-"
            name = indent + key.removeprefix(prefix)
            say(f"   {name:<34}{first:>9}{mean:>20.2f}{mean / whole:>12.0%}")


# ---------------------------------------------------------------- the script


def print_header(options: argparse.Namespace, model: PreTrainedModel) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"machine: {machine(options.device)}")
    say(f"torch {torch.__version__}, Python {platform.python_version()}")
    name = options.shape or options.model
    say(f"model:   {name}, {count / 1e6:.0f} M parameters, {options.dtype}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    add_base_options(parser)
    option("--prefix", type=int, default=128, help="cartridge tokens (%(default)s)")
    option("--sequences", type=int, default=16, help="in the batch (%(default)s)")
    option("--length", type=int, default=32, help="tokens of a sequence, on average (%(default)s)")
    option("--document", type=int, default=600, help="tokens the teacher reads (%(default)s)")
    option("--samples", type=int, default=4, help="samples of the teacher (%(default)s)")
    option("--answer", type=int, default=6, help="tokens of an answer in (f) (%(default)s)")
    option("--read", type=int, nargs="+", default=[], metavar="N", help="adds table (e)")
    option("--ways", nargs="+", default=[], metavar="NAME", help="of the student's table (all)")
    option("--tables", nargs="+", choices=TABLES, default=TABLES, help="which (all)")
    option(
        "--cpu-seconds",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="of this process, for a machine that others use as well; with --threads 1",
    )
    option("--threads", type=int, help="CPU threads (torch's choice)")
    option("--repeats", type=int, default=3, help="timed runs of each way (%(default)s)")
    option("--json", type=Path, help="figures as soon as they are there, a JSON object a line")
    option(
        "--check-sequences",
        type=int,
        help="so many of the sequences are compared in float32 before (all); memory",
    )
    option(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of log-probs, and of gradients relative to the largest (%(default)g)",
    )
    option("--metrics", type=Path, help="metrics.jsonl of a run: adds table (c)")
    options = parser.parse_args(arguments)
    require_at_least(
        parser, options, prefix=2, sequences=1, length=2, document=1, samples=1, repeats=1, answer=1
    )
    if any(length < 1 for length in options.read):
        parser.error(f"--read {options.read}: a document has at least one token")
    check_base_options(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.monotonic()
    try:
        if options.shape is None:
            options.model = options.model or demo_model()
        model = make_base(options.model, options.shape, torch.float32, options.device)
        print_header(options, model)
        cartridge = make_cartridge(model, options)
        say(f"load:    {os.getloadavg()[0]:.2f} over the last minute")
        if "student" in options.tables:
            student_tables(model, cartridge, options)
        if "teacher" in options.tables:
            teacher_table(model, options)
        if "reading" in options.tables:
            reading_tables(model, options, partial(note_rows, options))
        if "prompts" in options.tables and options.device == "cpu":
            prompts_table(model, options, partial(note_rows, options))
        if options.metrics:
            stage_table(options.metrics)
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say("\n(d) peak GiB: memory beyond what was held before the way ran")
    say(f"{time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
