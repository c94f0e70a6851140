"""What a distillation will cost: tokens, memory and time, from a short measurement.

One part of a step is run on this machine, with the run's own prompts: the student's forward and
backward, the teacher's forward behind the document, and one forward more for the server's rollout.
A step is that part times the batch. It is an estimate: the server and the trainer share the
machine, the first step compiles, and the evaluation is not in it.

The measurement is a process of its own, with the environment that the training gets.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.util.processes import Supervisor
from verl_patches.launching.following import duration
from verl_patches.pipeline.settings import Distillation, Prepared
from verl_patches.pipeline.stages import environment_of, run_stage

_SEQUENCES = 4
_PROCESSES_BYTES = 3_000_000_000  # veRL, Ray and Python in five processes, about


@dataclass(frozen=True)
class Cost:
    """The prediction.

    Attributes:
        trained_tokens: of answers, in all steps, at most.
        step_seconds: of one step, about.
        memory_bytes: of server and trainer together, about.
        free_bytes: what the device has.
        disk_bytes: at most, about.
    """

    settings: Distillation
    data: Prepared
    trained_tokens: int
    step_seconds: float
    memory_bytes: float
    free_bytes: float
    disk_bytes: int

    def lines(self) -> list[str]:
        """For a person."""
        settings = self.settings
        where = "of main memory" if settings.device == "cpu" else "of the GPU's memory"
        ratio = self.data.document_tokens / settings.tokens
        return [
            f"document: {self.data.document_tokens} tokens, the longest of {self.data.documents}; "
            f"cartridge: {settings.tokens} ({ratio:.1f} times fewer)",
            f"tokens:   {settings.steps} steps x {settings.batch} answers x at most "
            f"{settings.response_tokens} = {self.trained_tokens:,}",
            f"memory:   about {self.memory_bytes / 2**30:.1f} GiB {where}, "
            f"{self.free_bytes / 2**30:.1f} GiB are free",
            f"disk:     at most {self.disk_bytes / 1e6:.0f} MB",
            f"time:     about {self.step_seconds:.1f} s a step, {duration(self.seconds)} of "
            "training; starting and the evaluation come to it",
        ]

    @property
    def seconds(self) -> float:
        return self.step_seconds * self.settings.steps

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.free_bytes


def measure(
    settings: Distillation, scratch: Path, found: Prepared, disk: int, supervisor: Supervisor
) -> Cost:
    """Runs a part of a step; seconds for a small model.

    Args:
        scratch: has ``data``, the prompts and the documents.
        disk: bytes that the run takes.

    Raises:
        ChildFailed: the model cannot be loaded, or what a step needs cannot be computed.
    """
    asked = {
        "data": str(scratch / "data"),
        **{name: getattr(settings, name) for name in _ASKED},
    }
    command = ["-m", "verl_patches.pipeline.costs", json.dumps(asked)]
    printed = run_stage(command, "cost", scratch, supervisor, environment_of(settings))
    told = json.loads(printed.splitlines()[-1])
    answers = settings.steps * settings.batch * settings.response_tokens
    return Cost(settings, found, answers, told["seconds"], told["memory"], told["free"], disk)


_ASKED = ("model", "device", "dtype", "threads", "batch", "tokens", "response_tokens", "seed")


def measured(asked: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, bytes in memory, and free ones.

    Args:
        asked: settings of a distillation by their names, and the folder of its data.
    """
    import psutil
    import torch

    from cartridge_distill.cartridge.trainable import TrainableCache
    from cartridge_distill.data.document_store import DocumentStore
    from cartridge_distill.data.prompt_length import prompts_of
    from cartridge_distill.model.forward import packed_forward
    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.packing import pack
    from cartridge_distill.model.prefill import prefix_from_tokens
    from cartridge_distill.model.prompts import render_document, render_prompt
    from cartridge_distill.model.reading import read_tokenizer

    on_gpu = asked["device"] == "cuda"
    if not on_gpu:
        torch.set_num_threads(asked["threads"])
    data, device = Path(asked["data"]), torch.device(asked["device"])
    dtype = getattr(torch, asked["dtype"])
    tokenizer = read_tokenizer(asked["model"])
    model: Any = load_model(asked["model"], dtype, device)
    documents = DocumentStore.from_file(data / "documents.jsonl")
    text = max((documents.text(name) for name in documents.ids), key=len)
    ids = torch.tensor(render_document(tokenizer, text), device=device)
    few = min(asked["batch"], _SEQUENCES)
    answer = [int(ids[-1])] * asked["response_tokens"]
    prompts = [render_prompt(tokenizer, p) for p in prompts_of(data / "train.parquet")[:few]]
    batch = pack([torch.tensor([*prompt, *answer], device=device) for prompt in prompts])
    at = [torch.arange(length, device=device) >= length - len(answer) for length in batch.lengths]
    mask = torch.cat(at)
    document = prefix_from_tokens(model, ids)
    cartridge = TrainableCache.from_random(model.config, asked["tokens"], 1, asked["seed"])
    cartridge = cartridge.to(device)

    def part() -> None:
        with torch.no_grad():
            packed_forward(model, document, batch, mask)
            packed_forward(model, document, batch, mask)  # for the server's rollout
        logits = packed_forward(model, cartridge.prefix().to(device, dtype), batch, mask)
        logits.float().logsumexp(-1).mean().backward()
        if on_gpu:
            torch.cuda.synchronize()

    part()  # the first allocates and compiles
    start = time.monotonic()
    part()
    seconds = (time.monotonic() - start) * asked["batch"] / few
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if on_gpu:
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        step = torch.cuda.max_memory_allocated(device) - weights
        memory = 2 * weights + step * asked["batch"] / few
    else:
        free = psutil.virtual_memory().available + weights
        memory = 3 * weights + _PROCESSES_BYTES  # one more is read while it is loaded
    return {"seconds": seconds, "memory": memory, "free": free}


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
