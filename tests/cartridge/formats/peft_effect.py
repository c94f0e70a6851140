"""Does PEFT's generate use our adapter? Prints the versions, and what differs, as JSON.

    python -m tests.cartridge.formats.peft_effect

A process of its own, for versions that are not this environment's.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot
from tests.tiny import random_cartridge, tiny_model


def first_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[V]`` of the first token that is generated behind a prompt."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[0][0].float()


@torch.no_grad()
def measure(tokens: int = 32) -> dict[str, Any]:
    """Largest differences of the logits: to our own forward, and to none of the cartridge."""
    model = tiny_model()
    cartridge = random_cartridge(model, tokens, seed=3)
    for layer in (*cartridge.frozen_keys, *cartridge.trainable_keys):
        layer.data *= 2
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    places = torch.arange(tokens, tokens + ids.shape[1])[None]
    ours = model(ids, position_ids=places, past_key_values=cartridge.as_cache()).logits[0, -1]
    with tempfile.TemporaryDirectory() as folder:
        made = StoredCartridge(snapshot, CartridgeMeta("tiny"))
        adapter = write_cartridge(made, Path(folder) / "adapter", "peft")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
        generated = first_logits(theirs, ids)
        forward = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    return {
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "generate_to_ours": float((generated - ours).abs().max()),
        "generate_to_none": float((generated - first_logits(model, ids)).abs().max()),
        "forward_to_ours": float((forward - ours).abs().max()),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
