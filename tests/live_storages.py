"""Peak memory of a computation that never runs: shapes on ``meta``, storages counted.

Every operation's results are looked at when they come, and their storages when they go; autograd
keeps what it keeps on a GPU, so the peak is that of torch's allocator, in the same 512-byte steps.
A GPU's kernels also take memory of their own while they run, which no shape shows: what is known of
it stands in :data:`_WORKSPACE`.

Not counted: what the allocator keeps without use (fragments), cuBLAS' workspace, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.fake_gpu import AsOnCuda

_STEP = 512  # bytes; torch's allocator rounds up to it

# Bytes of an operation's own buffers beside its result, by the bytes of its first argument:
# torch's logsumexp writes exp(x - max) before it sums (aten/src/ATen/native/ReduceOps.cpp).
_WORKSPACE: dict[Any, Callable[[int], int]] = {torch.ops.aten.logsumexp.default: lambda size: size}


@dataclass
class Peak:
    """Most bytes in use at once, and who had made them."""

    bytes: int = 0
    makers: Counter[str] = field(default_factory=Counter)


class LiveStorages(AsOnCuda):
    """Counts the bytes of all storages on ``meta`` that are in use; ``peaks`` by stage.

    Args:
        explain: keep who made what is alive at each peak; slow, for looking at differences.
    """

    def __init__(self, explain: bool = False) -> None:
        super().__init__()
        self.explain = explain
        self.now = 0
        self.peaks: dict[str, Peak] = {}
        self._stage = "before"
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    @property
    def peak(self) -> int:
        """Bytes, over all stages."""
        return max(peak.bytes for peak in self.peaks.values())

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Names what runs in here."""
        before, self._stage = self._stage, stage
        self._look(0)
        try:
            yield
        finally:
            self._stage = before

    def hold(self, *modules: nn.Module) -> None:
        """Counts parameters and buffers that were there before."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._count(tensor, f"{type(module).__name__}'s weights")
        self._look(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        maker = f"{self._stage}: {func}" if self.explain else ""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf, f"{maker} {leaf.dtype} {tuple(leaf.shape)}" if maker else "")
        workspace = _WORKSPACE.get(func)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        extra = 0
        if workspace is not None and first is not None and first.is_meta:
            extra = workspace(first.numel() * first.element_size())
        self._look(extra)
        return result

    def _count(self, tensor: Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return
        size = -(-storage.nbytes() // _STEP) * _STEP

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = (weakref.ref(storage, gone), size, maker)
        self.now += size

    def _look(self, extra: int) -> None:
        peak = self.peaks.setdefault(self._stage, Peak())
        if self.now + extra <= peak.bytes:
            return
        peak.bytes = self.now + extra
        if self.explain:
            makers: Counter[str] = Counter()
            for _, size, maker in self._known.values():
                makers[maker] += size
            peak.makers = makers


class _FlexMemory(torch.autograd.Function):
    """Takes and keeps what compiled FlexAttention does: no scores, one number a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Sequence[Tensor]) -> Any:
        out = torch.empty_like(query)  # inductor keeps the order of the query's strides
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp, *mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, logsumexp, *_ = ctx.saved_tensors
        delta = torch.empty_like(logsumexp)  # rowsum(out * grad), in float32
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
        del delta
        return found


def flex_memory(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, *_: Any) -> Tensor:
    """In the place of ``cartridge_distill.model.flex.compile_and_call``: its memory, no result."""
    mask = [part for part in vars(block_mask).values() if isinstance(part, Tensor)]
    out: Tensor = _FlexMemory.apply(query, key, value, mask)
    return out
