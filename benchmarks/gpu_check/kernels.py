"""Is every attention kernel right? The fast backend against the dense reference.

    python -m benchmarks.gpu_check.kernels --device cuda --json kernels.jsonl

Eight architectures of two layers (tests/tiny.py), float32 and bfloat16, batches of several lengths:
the student's logits and the cartridge's gradients, and the teacher's logits behind a document. An
architecture has a process of its own on a GPU, all side by side, for compiling is most of the time.
One figure a batch: relative errors (norm of the difference by the norm of the reference), how many
graphs were compiled so far, and whether attention fell back to the unfused implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model import flex
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import PackedBatch, pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.processes import say
from tests.tiny import ARCHITECTURES, random_cartridge, tiny_model

# Lengths of the sequences in a batch: ragged, the demo's, longer than a block, many, one alone.
BATCHES = [[1, 17, 5, 16, 1, 30], [60] * 5, [200, 17, 300, 90], [66] * 40, [10]]
CARTRIDGE, DOCUMENT = 160, 200
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
MEASURED = ("logits", "teacher", "gradients")
_CONTEXT = 8192  # the tiny models' own is shorter than the longest batch


def backend_for(device: str) -> str:
    """What a run takes there: compiled FlexAttention, or the grouped one of a CPU."""
    return "flex" if device.startswith("cuda") else "grouped"


def results(
    model: PreTrainedModel, cartridge: TrainableCache, document: Tensor, rows: list[Tensor], by: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[T, V]`` of student and teacher, and the cartridge's gradients, flat."""
    batch: PackedBatch = pack(rows)
    logits = packed_forward(model, cartridge.prefix(), batch, backend=by)
    loss = logits.float().log_softmax(-1)[:, 5].mean()
    gradients = torch.autograd.grad(loss, cartridge.trainable_parameters())
    with torch.no_grad():
        told = packed_forward(model, prefix_from_tokens(model, document, by), batch, backend=by)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return logits.detach().float(), told.float(), flat.float()


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).norm() / reference.norm()).item()


def is_good(figure: dict[str, Any]) -> bool:
    """Whether a figure is within its bounds; not-a-number is not."""
    bound = BOUNDS[figure["dtype"]]
    errors = [figure.get(name) for name in MEASURED]
    within = all(error is not None and error <= bound for error in errors)
    return within and not figure["unfused"] and "error" not in figure


def figures(kind: str, device: str, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
    """One for every dtype and batch; what a batch raises is its figure."""
    by = backend_for(device)
    for name in BOUNDS:
        model = prepare_model(tiny_model(kind).to(device, getattr(torch, name)))
        model.config.max_position_embeddings = _CONTEXT
        cartridge = random_cartridge(model, CARTRIDGE).to(device)
        for lengths in batches:
            generator = torch.Generator().manual_seed(sum(lengths))

            def draw(count: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randint(3, 250, (count,), generator=generator).to(device)

            rows, document = [draw(length) for length in lengths], draw(DOCUMENT)
            figure: dict[str, Any] = {"kind": kind, "dtype": name, "tokens": sum(lengths)}
            start = time.perf_counter()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    found = results(model, cartridge, document, rows, by)
                    reference = results(model, cartridge, document, rows, "dense")
                except Exception as error:  # whatever a compiler raises; the next batch goes on
                    figure["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                else:
                    pairs = zip(MEASURED, found, reference, strict=True)
                    figure |= {what: relative(one, other) for what, one, other in pairs}
            figure["unfused"] = any("without torch.compile" in str(w.message) for w in said)
            figure["graphs"] = len(flex.graphs())
            figure["seconds"] = round(time.perf_counter() - start, 2)
            yield figure


def side_by_side(groups: list[list[str]], arguments: list[str]) -> int:
    """This script once for each group of architectures; 0 if all were good."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.kernels", *arguments, "--only"]
    children = [subprocess.Popen([*command, *group]) for group in groups]
    return int(any([child.wait() for child in children]))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if a figure is not good."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", default="cuda", help="cpu or cuda (%(default)s)")
    option("--only", nargs="+", choices=ARCHITECTURES, help="architectures, in this process")
    option("--batches", type=int, default=len(BATCHES), help="the first so many (%(default)s)")
    option("--json", type=Path, required=True, help="a figure a line goes to its end")
    options = parser.parse_args(given)
    if options.only is None:
        # On a CPU nothing is compiled, and processes are most of the time: as many as cores.
        count = len(ARCHITECTURES) if options.device != "cpu" else min(4, os.cpu_count() or 1)
        return side_by_side([ARCHITECTURES[number::count] for number in range(count)], given)
    good = True
    batches = BATCHES[: options.batches]
    for figure in (f for kind in options.only for f in figures(kind, options.device, batches)):
        good = is_good(figure) and good
        with options.json.open("a") as file:  # one write, shorter than a page: lines stay whole
            file.write(json.dumps(figure) + "\n")
        say(f"{'ok ' if is_good(figure) else 'BAD'} {json.dumps(figure)}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
