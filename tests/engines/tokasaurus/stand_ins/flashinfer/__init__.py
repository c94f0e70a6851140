"""A stand-in for flashinfer on a machine without CUDA, for tests only.

The few calls that Tokasaurus makes, in plain torch, one sequence after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.engines.tokasaurus.stand_ins.flashinfer import cascade as cascade


class _Paged:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _attend(self, q: Tensor, cache: tuple[Tensor, Tensor], starts: list[int]) -> Tensor:
        """Causal attention of each sequence's last tokens over its pages; ``q [T, Hq, D]``."""
        outputs = []
        for place, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
            pages = self.indices[self.indptr[place] : self.indptr[place + 1]].long()
            length = (len(pages) - 1) * self.page_size + int(self.last_page_len[place])
            key, value = (
                part[pages].flatten(0, 1)[:length].repeat_interleave(self.group, dim=1)
                for part in cache
            )
            new = last - first
            scores = torch.einsum("qhd,khd->hqk", q[first:last], key) / q.shape[-1] ** 0.5
            position = torch.arange(length - new, length)[:, None]
            scores.masked_fill_(torch.arange(length)[None] > position, float("-inf"))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return torch.cat(outputs)

    def _plan(self, indptr: Tensor, indices: Tensor, last: Tensor, options: dict[str, Any]) -> None:
        self.indptr, self.indices, self.last_page_len = indptr.tolist(), indices, last
        self.page_size = options["page_size"]
        self.group = options["num_qo_heads"] // options["num_kv_heads"]


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def plan(self, **options: Any) -> None:
        assert options["causal"]
        self.starts = options["qo_indptr"].tolist()
        self._plan(
            options["paged_kv_indptr"],
            options["paged_kv_indices"],
            options["paged_kv_last_page_len"],
            options,
        )

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend(q, paged_kv_cache, self.starts)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def plan(self, **options: Any) -> None:
        self._plan(options["indptr"], options["indices"], options["last_page_len"], options)

    def run_return_lse(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, None]:
        return self._attend(q, paged_kv_cache, list(range(len(q) + 1))), None


def sampling_from_probs(probs: Tensor, uniform: Tensor) -> Tensor:
    index = torch.searchsorted(probs.cumsum(-1), uniform[:, None])[:, 0]
    return index.clamp(max=probs.shape[-1] - 1).to(torch.int32)
