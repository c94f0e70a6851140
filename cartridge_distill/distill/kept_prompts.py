"""The teacher's kept prompts over a save: a run that goes on has the same ones, to the last bit.

Which tokens the model computes together decides the order of sums, and so the last bits of what is
kept. A run that was stopped and goes on would keep other bits than the run that was not, and both
would part. So at each save everything that was kept since the last one is forgotten and computed
again, by itself, in rows; the checkpoint holds the rows' ids. Whoever goes on from it computes the
same rows in the same order. That costs each token one more time, and the checkpoint no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.kept_tokens import Row
from cartridge_distill.model.packing import pack

ROW_TOKENS = 2048
"""Tokens of a row at most, or one prompt."""


def settle(teacher: Teacher) -> None:
    """Computes what was kept since the last save again; ``teacher.settled`` has all the rows.

    Where tokens had to go since then for want of room, nothing is kept any more.
    """
    store = teacher.prompts
    if store is None:
        return
    new, complete = store.new_paths(), not store.evicted
    store.forget_new()
    if not complete:
        store.clear()
        teacher.settled = []
        return
    rows: list[Row] = []
    for document_id in dict.fromkeys(prefix for prefix, _ in new):
        tokens = 0
        for prefix, ids in new:
            if prefix != document_id:
                continue
            if not tokens or tokens + len(ids) > ROW_TOKENS:
                rows.append((document_id, []))
                tokens = 0
            rows[-1][1].append(ids)
            tokens += len(ids)
    settle_again(teacher, [*teacher.settled, *rows], len(teacher.settled))


@torch.no_grad()
def settle_again(teacher: Teacher, rows: Sequence[Row], done: int = 0) -> None:
    """Computes a checkpoint's rows.

    Args:
        rows: all of them.
        done: of which so many are there already.
    """
    teacher.settled = list(rows) if teacher.prompts is not None else []
    for document_id, prompts in teacher.settled[done:]:
        assert teacher.prompts is not None
        batch = pack([torch.tensor(ids) for ids in prompts]).to(teacher.device)
        last = np.zeros(batch.num_tokens, dtype=bool)
        last[batch.offsets[1:] - 1] = True
        kept = teacher.prompts.behind(document_id, whole=True)
        packed_forward(
            teacher.model, teacher.prefix_of(document_id), batch, last, teacher.backend, kept
        )
    if teacher.prompts is not None:
        teacher.prompts.settled()
