"""Several ranks: a sharded frozen base, an equal cartridge on each, averaged gradients.

Every forward of an FSDP2 module gathers its shards from all ranks, so all ranks must run the model
equally often, or they wait for each other without end. veRL sees to it that they have as many
micro-batches; the teacher's forwards follow the documents in them, and are made up here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from verl.utils.fsdp_utils import apply_fsdp2

from cartridge_distill.data.general import BARE
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.packing import pack


def shard(module: Any, device_mesh: Any, engine_config: Any) -> Any:
    """Shards the frozen model over the ranks, layer by layer; in place.

    Not veRL's ``_build_fsdp_module``: that one computes in bfloat16 unless
    ``fsdp_config.mixed_precision`` says otherwise, whatever the model was loaded in, so several
    ranks would not compute what one computes. Here the shards keep their dtype. It also sends the
    weights from rank 0, and every rank has just read them from the disk.
    """
    settings = {
        "mesh": device_mesh,
        "mp_policy": MixedPrecisionPolicy(),
        "reshard_after_forward": engine_config.reshard_after_forward,
    }
    apply_fsdp2(module, settings, engine_config)
    return module


def copy_from_rank_0(cartridge: nn.Module) -> None:
    """Gives every rank rank 0's cartridge: equal steps from there on keep them equal."""
    for tensor in cartridge.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)


def all_ranks(answer: bool, device: torch.device) -> bool:
    """Whether every rank answers yes; all ranks call it together, and wait for each other."""
    said = torch.tensor(int(answer), device=device)
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MIN)
    return bool(said)


def most_of_ranks(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers; all ranks call it together, and wait for each other."""
    most = torch.tensor(number, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The loss is scaled so that the average over ranks is the mean over all response tokens.

    Raises:
        RuntimeError: a rank has no gradient for a parameter.
    """
    ranks = torch.distributed.get_world_size()
    for parameter in parameters:
        if parameter.grad is None:
            raise RuntimeError("a rank had no sample to train on; the ranks cannot be averaged")
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= ranks


class RanksTeacher(Teacher):
    """A teacher that runs the model equally often on every rank."""

    @contextmanager
    def _forwarding(self, document_ids: Sequence[str | None]) -> Iterator[None]:
        """All ranks come here together, and wait for each other."""
        own = self._forwards(document_ids)
        most = most_of_ranks(own, self.device)
        yield
        for _ in range(most - own):
            batch = pack([torch.zeros(1, dtype=torch.long)]).to(self.device)
            packed_forward(self.model, None, batch, backend=self.backend)

    def _forwards(self, document_ids: Sequence[str | None]) -> int:
        """Forwards that a call takes: one a document or none, one more where its KV is not kept."""
        kept = OrderedDict.fromkeys(self._cache)
        count = 0
        for document_id in dict.fromkeys(document_ids):
            count += 1
            if document_id is BARE:
                count += self._bare is None and bool(self._begin)
                continue
            if document_id in kept:
                kept.move_to_end(document_id)
                continue
            count += 1
            kept[document_id] = None
            while len(kept) > self.max_cached:
                kept.popitem(last=False)
        return count
