"""Compiled FlexAttention: the packed attention on a GPU.

Three things go wrong with ``torch.compile(flex_attention)`` in silence or at a bad moment; each is
made impossible here.

- With few tokens inductor takes its decoding kernel, whose block does not fit every number of query
  heads, and finds no kernel at all. The general kernel is asked for by name, forward and backward.
- A soft cap is a Python number in the score function. torch 2.11 makes a symbol of it and fails in
  the backward. Numbers are constants while this compiles.
- After eight graphs torch gives up, warns once and computes unfused attention: all scores in
  memory, many times slower. Here the function is compiled as a whole or the run ends with the shape
  (:class:`AttentionCompileError`), the number of graphs is counted (:func:`graphs`), and there are
  few: rows and prefixes are whole blocks, so that no length makes a graph of its own.

On a CPU FlexAttention runs uncompiled and only forward: enough to compare masks.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cartridge_distill.model.blocks import filled_prefix
from cartridge_distill.model.layout import PackedLayout
from cartridge_distill.model.scoring import Scoring
from cartridge_distill.util.errors import AttentionCompileError

logger = logging.getLogger(__name__)

MOST_GRAPHS = 32
"""Graphs that one process compiles at most. A run of one model needs four, see `warm_up`."""

_KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


@dataclass(frozen=True)
class Graph:
    """One compiled graph: what it was compiled for, and the seconds of its forward."""

    shapes: str
    seconds: float


_graphs: list[Graph] = []
_all_expected = False


def graphs() -> list[Graph]:
    """What this process has compiled so far."""
    return list(_graphs)


def no_more_expected() -> None:
    """From here on a new graph is a warning that names its shape."""
    global _all_expected
    _all_expected = True


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The function that is compiled.

    Args:
        query: ``[1, Hq, T, D]``.
        key, value: ``[1, H, filled P + T, D]``.
        block_mask: of :func:`cartridge_distill.model.blocks.make_block_mask`.

    Returns:
        ``[1, Hq, T, D]``.
    """
    from torch.nn.attention.flex_attention import flex_attention

    score_mod = None
    if softcap is not None:

        def score_mod(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    out: Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_KERNEL_OPTIONS,
    )
    return out


def inductor(graph: Any, inputs: list[Any]) -> Any:
    """torch's own compiler, as a backend that counts and times what it is given."""
    from torch._inductor.compile_fx import compile_fx

    shapes = ", ".join(
        f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        + (" with gradients" if value.requires_grad else "")
        for value in inputs
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
    )
    start = time.perf_counter()
    compiled = compile_fx(graph, inputs)
    _graphs.append(Graph(shapes, time.perf_counter() - start))
    level = logging.WARNING if _all_expected else logging.INFO
    logger.log(
        level,
        "attention graph %d%s, %.1f s: %s",
        len(_graphs),
        " (after the warm-up)" if _all_expected else "",
        _graphs[-1].seconds,
        _graphs[-1].shapes,
    )
    return compiled


def compiles_on(device: torch.device) -> bool:
    """Whether attention is compiled there. Elsewhere it is only for comparing masks."""
    return device.type == "cuda"


@functools.cache
def _compiled(backend: Callable[..., Any]) -> Callable[..., Tensor]:
    # fullgraph: what cannot be compiled is an error, never a part that runs uncompiled.
    return cast(
        Callable[..., Tensor], torch.compile(fused, dynamic=True, fullgraph=True, backend=backend)
    )


def compile_and_call(*arguments: Any, backend: Callable[..., Any] | None = None) -> Tensor:
    """:func:`fused`, compiled.

    Args:
        arguments: as :func:`fused` has them.
        backend: a compiler in dynamo's sense; :func:`inductor` by default.

    Raises:
        AttentionCompileError: it cannot be compiled, or the process has :data:`MOST_GRAPHS`.
    """
    # Imported here: dynamo takes a second. Type checkers do not see their `patch`.
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    symbols: Any = importlib.import_module("torch.fx.experimental._config")
    settings: dict[str, Any] = {
        "recompile_limit": MOST_GRAPHS,
        "fail_on_recompile_limit_hit": True,
        "specialize_float": True,
    }
    # Two sizes that happen to be equal are not one size.
    with dynamo.patch(settings), symbols.patch({"use_duck_shape": False}):
        try:
            return _compiled(backend or inductor)(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            query, key = arguments[:2]
            cause = " ".join(str(error).split("\n\n")[0].split())  # without torch's advice
            raise AttentionCompileError(
                f"attention of {tuple(query.shape)} queries and {tuple(key.shape)} keys in "
                f"{str(query.dtype).removeprefix('torch.')} cannot be compiled after "
                f"{len(_graphs)} graphs (at most {MOST_GRAPHS}): {cause}. "
                "Nothing was computed unfused; fix: attention=dense computes the same without "
                "compiling, for much more memory"
            ) from error


def flex_attention_of(
    layout: PackedLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scoring: Scoring,
) -> Tensor:
    """query ``[Hq, T, D]``, key and value ``[H, T, D]`` -> ``[Hq, T, D]``."""
    if past is not None:
        heads, _, size = key.shape
        filling = filled_prefix(layout.prefix_tokens) - layout.prefix_tokens
        nobody = key.new_zeros(heads, filling, size)
        key, value = (
            torch.cat([before, nobody, own], dim=1)
            for before, own in zip(past, (key, value), strict=True)
        )
    arguments = (
        query[None],
        key[None],
        value[None],
        layout.block_mask(scoring.window),
        scoring.scaling,
        scoring.softcap,
    )
    out = compile_and_call(*arguments) if compiles_on(query.device) else fused(*arguments)
    return out[0]
