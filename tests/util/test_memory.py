"""Memory that is used again, and never while somebody can still see it."""

from __future__ import annotations

import gc

import torch

from cartridge_distill.util import memory
from cartridge_distill.util.memory import idle_bytes, recycled_empty


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    tensor = recycled_empty((4, 2**18), torch.float32)
    place, row = tensor.data_ptr(), tensor[1]
    del tensor
    gc.collect()
    row.fill_(7)
    other = recycled_empty((4, 2**18), torch.float32).fill_(1)
    assert other.data_ptr() != place and (row == 7).all()
    del row
    again = recycled_empty((2**21,), torch.bfloat16)  # as many bytes
    assert again.data_ptr() == place


def test_what_lies_idle_is_bounded() -> None:
    before = idle_bytes()
    assert before <= memory.KEPT_BYTES
    for megabytes in (400, 401, 402, 403):  # never touched, so they cost nothing
        recycled_empty((megabytes, 2**20), torch.uint8)
    assert 400 * 2**20 <= idle_bytes() <= memory.KEPT_BYTES
    memory._idle.clear()


def test_small_tensors_are_ordinary_ones() -> None:
    before = idle_bytes()
    recycled_empty((16,), torch.float32)
    assert idle_bytes() == before
