"""Peak memory of one training step: one frozen base for student and teacher, against two copies.

    python benchmarks/memory.py                                    # SmolLM2-135M, the demo's sizes
    python benchmarks/memory.py --shape llama-3.2-3b               # random weights; needs a GPU
    python benchmarks/memory.py --model owner/name --tokens 2048 --document 10000

A step is what the engine does with a batch of rollouts: student forward behind the cartridge, the
teacher's reading of the document, its forward behind it, loss, backward, AdamW on the float32
cartridge; with the core's own functions, without veRL, Ray or a server. Each of the two ways runs
in a process of its own, a warm-up step first (a GPU compiles), and both must give the same loss.

Peaks: on a CPU the largest resident memory of the process during the step (Linux), on a GPU the
largest sum of torch's allocations; the weights are in both. Beside it stands what
``cartridge_distill.distill.memory_plan`` predicts. On a CPU the measured one is larger by what
glibc keeps of freed memory; ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment makes it keep
nothing. Tokens are random: which one stands where matters neither to time nor to memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_at_least  # noqa: E402
from benchmarks.bases import (  # noqa: E402
    LLAMA_3B,
    add_base_options,
    check_base_options,
    demo_model,
    machine,
    make_base,
    make_sequences,
    vocabulary_of,
)
from benchmarks.measure import PeakMemory, synchronize  # noqa: E402
from cartridge_distill.cartridge.trainable import TrainableCache  # noqa: E402
from cartridge_distill.data.document_store import DocumentStore  # noqa: E402
from cartridge_distill.distill.loss import get_loss  # noqa: E402
from cartridge_distill.distill.memory_plan import predict_step  # noqa: E402
from cartridge_distill.distill.step_shape import StepShape  # noqa: E402
from cartridge_distill.distill.teacher import Teacher  # noqa: E402
from cartridge_distill.model.attention import resolve_backend  # noqa: E402
from cartridge_distill.model.forward import packed_forward, recomputing_layers  # noqa: E402
from cartridge_distill.model.packing import pack  # noqa: E402
from cartridge_distill.model.shape import DecoderShape  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

TOPK, TEMPERATURE, LEARNING_RATE = 20, 1.0, 0.02
STAGES = ("student_forward", "document", "teacher_forward", "loss", "backward", "optimizer")
# Tokens: of the cartridge, of the document, of a prompt and of a response; and how many samples.
DEMO = {"tokens": 128, "document": 591, "samples": 48, "prompt": 60, "response": 6}
LARGE = {"tokens": 2048, "document": 10_000, "samples": 8, "prompt": 64, "response": 512}


@dataclass(frozen=True)
class Step:
    """What one way took.

    Attributes:
        weights_gib: of the base model or models.
        held_gib, peak_gib: before the step and at most during it; None where not measurable.
        predicted_gib: the peak that ``cartridge_distill.distill.memory_plan`` says; what the
            process holds besides (libraries, the second base) is taken as measured.
        seconds: by :data:`STAGES`.
    """

    copies: int
    loss: float
    weights_gib: float
    held_gib: float | None
    peak_gib: float | None
    predicted_gib: float | None
    seconds: dict[str, float]


class Batch:
    """Random samples and a random document, the same in every process."""

    def __init__(self, vocabulary: int, options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        length = options.prompt + options.response
        self.sequences = make_sequences(vocabulary, options.samples, length, False, device)
        [document] = make_sequences(vocabulary, 1, options.document, False, device)
        self.document: list[int] = document.tolist()
        self.response_masks = [
            torch.arange(length, device=device) >= options.prompt
        ] * options.samples
        self.documents = ["document"] * options.samples

    def teacher(self, model: PreTrainedModel) -> Teacher:
        """One that has read nothing yet, and keeps no prompts: none comes again here."""
        store = DocumentStore({"document": "random"})
        return Teacher(model, store, lambda _: self.document, prompt_mib=0)


class Stages:
    """Seconds of each stage; a GPU's queue is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start


def train_step(
    student: PreTrainedModel,
    teacher: Teacher,
    cartridge: TrainableCache,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    stage: Stages,
    recompute: bool = False,
) -> float:
    """One step of the engine's, on one micro-batch; the loss."""
    packed = pack(batch.sequences)
    response_mask = torch.cat(batch.response_masks)
    with stage("student_forward"), recomputing_layers(student) if recompute else nullcontext():
        logits: Tensor = packed_forward(
            student, cartridge.prefix(), packed, packed.predicts(response_mask)
        )
    with stage("document"):
        teacher.prefix("document")
    with stage("teacher_forward"):
        top = teacher.score(
            batch.sequences, batch.response_masks, batch.documents, TOPK, TEMPERATURE
        )
    with stage("loss"):
        loss = get_loss("forward_kl_topk")(logits, top, TEMPERATURE).mean()
    with stage("backward"):
        loss.backward()
    with stage("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure(options: argparse.Namespace) -> Step:
    """The way with ``options.copies`` bases, in this process."""
    device = torch.device(options.device)
    say(f"== {options.copies} base{'s' * (options.copies - 1)}: loading")
    dtype = getattr(torch, options.dtype)
    bases = [make_base(options.model, options.shape, dtype, device) for _ in range(options.copies)]
    student, reader = bases[0], bases[-1]
    batch = Batch(vocabulary_of(student), options)
    weights = sum(p.numel() * p.element_size() for model in bases for p in model.parameters())
    memory = PeakMemory(device)
    for name in ("warm-up", "measured"):
        # As at the start of a run: the first step pays for reading the document, too.
        cartridge = TrainableCache.from_random(student.config, options.tokens).to(device)
        optimizer = torch.optim.AdamW(cartridge.trainable_parameters(), lr=LEARNING_RATE)
        stages, teacher = Stages(device), batch.teacher(reader)
        memory.start()
        held = memory.held
        recompute = options.gradient_checkpointing
        loss = train_step(student, teacher, cartridge, optimizer, batch, stages, recompute)
        beyond = memory.stop()
        say(f"   {name} step: {sum(stages.seconds.values()):.2f} s, loss {loss:.4f}")
    peak = None if held is None or beyond is None else held + beyond
    predicted = None if held is None else held + predict_beyond(student, options)
    return Step(options.copies, loss, weights / 1024**3, held, peak, predicted, stages.seconds)


def predict_beyond(student: PreTrainedModel, options: argparse.Namespace) -> float:
    """GiB that the step is to take beyond what was held before it."""
    length = options.prompt + options.response - 1  # nobody asks for what follows the last token
    shape = StepShape(
        cartridge_tokens=options.tokens,
        row_tokens=options.samples * length,
        document_tokens=options.document,
        trained_tokens=options.samples * options.response,
        sequence_tokens=length,
        dtype=getattr(torch, options.dtype),
        backend=resolve_backend("auto", torch.device(options.device)),
        gradient_checkpointing=options.gradient_checkpointing,
        micro_batches=1,
        prompts_kept_mib=0,
        topk=TOPK,
    )
    plan = predict_step(DecoderShape.of(student.config), shape)
    terms = plan.stages[plan.peak_stage]
    # Held before, or not yet there: the optimizer is new in each step.
    there = ("weights", "cartridge in float32", "AdamW's moments")
    return (plan.peak - sum(terms[name] for name in there)) / 1024**3


def in_a_process_of_its_own(copies: int, arguments: list[str]) -> Step:
    """Runs this script for one of the ways; its lines appear as they come.

    Raises:
        ConfigError: it failed; it has said why.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--copies", str(copies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        found = None
        for line in child.stdout:
            if line.startswith("{"):
                found = Step(**json.loads(line))
            else:
                say(line.rstrip())
    if child.returncode != 0 or found is None:
        raise ConfigError(f"the way with {copies} base(s) ended with status {child.returncode}")
    return found


def noted(step: Step, options: argparse.Namespace) -> Step:
    """Writes it to the file that --json names."""
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(asdict(step)) + "\n")
    return step


def print_table(one: Step, two: Step) -> None:
    say(f"\n   {'':<26}{'one shared base':>18}{'two copies':>14}")

    def row(name: str, first: float | None, second: float | None, digits: int = 2) -> None:
        cells = ["-" if value is None else f"{value:.{digits}f}" for value in (first, second)]
        say(f"   {name:<26}{cells[0]:>18}{cells[1]:>14}")

    row("weights, GiB", one.weights_gib, two.weights_gib)
    row("held before the step, GiB", one.held_gib, two.held_gib)
    row("peak of the step, GiB", one.peak_gib, two.peak_gib)
    row("predicted peak, GiB", one.predicted_gib, two.predicted_gib)
    for stage in STAGES:
        row(f"{stage.replace('_', ' ')}, s", one.seconds[stage], two.seconds[stage])
    row("whole step, s", sum(one.seconds.values()), sum(two.seconds.values()))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    add_base_options(parser, "cuda" if torch.cuda.is_available() else "cpu")
    option(
        "--gradient-checkpointing",
        action="store_true",
        help="the student's layers run again in the backward (model.enable_gradient_checkpointing)",
    )
    option("--threads", type=int, help="CPU threads (torch's choice)")
    option("--json", type=Path, help="the figures of both ways, a JSON object a line")
    for name, what in (
        ("tokens", "of the cartridge"),
        ("document", "tokens the teacher reads"),
        ("samples", "rollouts in the batch"),
        ("prompt", "tokens of each before its response"),
        ("response", "tokens of each that are trained on"),
    ):
        sizes = f"{DEMO[name]}; {LARGE[name]} with --shape {LLAMA_3B}"
        option(f"--{name}", type=int, help=f"{what} ({sizes})")
    option(
        "--copies", type=int, choices=[1, 2], help="this way alone, in this process; ends in JSON"
    )
    options = parser.parse_args(arguments)
    check_base_options(parser, options)
    for name, default in (LARGE if options.shape == LLAMA_3B else DEMO).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    # One token of the cartridge is frozen.
    require_at_least(parser, options, **{**dict.fromkeys(DEMO, 1), "tokens": 2})
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.shape is None:
            options.model = options.model or demo_model()
            given = [*given, "--model", options.model]
        if options.copies:
            step = measure(options)
            say(json.dumps(asdict(step)))
            return 0
        say(f"machine: {machine(options.device)}")
        say(
            f"{options.shape or options.model}, {options.dtype}: {options.samples} samples of "
            f"{options.prompt} + {options.response} tokens, a cartridge of {options.tokens}, a "
            f"document of {options.document}"
        )
        one, two = (noted(in_a_process_of_its_own(copies, given), options) for copies in (1, 2))
        if abs(one.loss - two.loss) > 1e-3 * abs(one.loss):
            raise ConfigError(
                f"the ways disagree: loss {one.loss} with one base, {two.loss} with two"
            )
        print_table(one, two)
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
