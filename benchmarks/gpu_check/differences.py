"""How far server and trainer are apart, by dtype; and how far a stale version would be.

    python -m benchmarks.gpu_check.differences --model FOLDER --device cuda --json differences.jsonl

The embedded server's engine writes short answers behind a cartridge, and the trainer's forward
reads them: |difference of the chosen tokens' log-probs|, mean, median, 90 %, 99 % and largest. Then
the same with a cartridge whose every number has moved by one learning rate, about what one step of
AdamW does. A bound between the two catches a stale server without false alarms.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.bases import (
    ROOT,
    add_base_options,
    check_base_options,
    make_base,
    make_sequences,
    vocabulary_of,
)
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.attention import resolve_backend
from cartridge_distill.model.beginning import first_cartridge
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.server.engine import Engine
from cartridge_distill.server.rows import Row
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.processes import say

_TEMPERATURE = 0.7
_PROMPTS = (20, 60)  # tokens, shortest and longest


def document_ids(model: PreTrainedModel, name: str | None) -> list[int]:
    """A record's tokens, or random ones where the model has no tokenizer."""
    if name is None:
        [ids] = make_sequences(vocabulary_of(model), 1, 600, False, torch.device("cpu"))
        return list(ids.tolist())
    records = json.loads(
        (ROOT / "cartridge_distill" / "data" / "examples" / "demo.json").read_text()
    )
    text = "\n".join(str(value) for value in next(iter(records.values()))["texts"].values())
    return list(AutoTokenizer.from_pretrained(name)(text)["input_ids"])


def moved(prefix: Prefix, by: float) -> Prefix:
    """Every number up or down by ``by``."""
    generator = torch.Generator(prefix.keys[0].device).manual_seed(1)

    def step(tensor: Tensor) -> Tensor:
        up = torch.rand(tensor.shape, device=tensor.device, generator=generator) < 0.5
        return tensor + torch.where(up, by, -by).to(tensor.dtype)

    return Prefix([step(key) for key in prefix.keys], [step(value) for value in prefix.values])


def summary(differences: Tensor) -> dict[str, float]:
    found = differences.float().cpu()
    median, high, highest = found.quantile(torch.tensor([0.5, 0.9, 0.99])).tolist()
    return {
        "mean": found.mean().item(),
        "median": median,
        "q90": high,
        "q99": highest,
        "max": found.max().item(),
    }


@torch.no_grad()
def measure(dtype: str, options: argparse.Namespace) -> dict[str, object]:
    """The differences of ``options.rows`` answers in one dtype."""
    model = make_base(options.model, options.shape, getattr(torch, dtype), options.device)
    ids = document_ids(model, options.model)
    cartridge = first_cartridge(model, torch.tensor(ids, device=options.device), options.tokens)
    prefix = cartridge.prefix().to(dtype=model.dtype)
    draw = random.Random(0)
    starts = [draw.randrange(len(ids) - _PROMPTS[1]) for _ in range(options.rows)]
    prompts = [ids[start : start + draw.randint(*_PROMPTS)] for start in starts]
    settings = ServerSettings(cartridge_dir=Path(), model_name="check", max_batch=options.rows)
    engine = Engine(copy.deepcopy(model), settings)  # it takes the attention over
    rows = [
        Row(list(prompt), options.new, _TEMPERATURE, random.Random(number), prefix)
        for number, prompt in enumerate(prompts)
    ]
    answers = engine.run(rows)
    server = torch.tensor([value for answer in answers for value in answer.logprobs])
    sequences = [
        torch.tensor([*prompt, *answer.token_ids], device=options.device)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batch = pack(sequences)
    response_mask = batch.index >= np.repeat([len(prompt) for prompt in prompts], batch.lengths)

    def apart(by: Prefix) -> dict[str, float]:
        logits = packed_forward(model, by, batch, batch.predicts(response_mask))
        trainer = chosen_logprobs(logits, batch.tokens(response_mask), _TEMPERATURE)
        return summary((trainer.cpu() - server).abs())

    return {
        "dtype": dtype,
        "backend": resolve_backend("auto", torch.device(options.device)),
        "tokens": len(server),
        "fresh": apart(prefix),
        "stale": apart(moved(prefix, options.lr)),
        "lr": options.lr,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base_options(parser)
    option = parser.add_argument
    option("--rows", type=int, default=48, help="answers (%(default)s)")
    option("--new", type=int, default=6, help="tokens of each (%(default)s)")
    option("--tokens", type=int, default=128, help="of the cartridge (%(default)s)")
    option("--lr", type=float, default=0.03, help="how far one step moves (%(default)s)")
    option("--json", type=Path, required=True, help="a figure a line goes to its end")
    options = parser.parse_args(arguments)
    check_base_options(parser, options)
    if (options.model is None) == (options.shape is None):
        parser.error("give --model or --shape")
    for dtype in ("bfloat16", "float32"):
        figure = measure(dtype, options)
        with options.json.open("a") as file:
            file.write(json.dumps(figure) + "\n")
        say(json.dumps(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
