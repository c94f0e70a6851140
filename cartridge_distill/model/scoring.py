"""How a layer makes scores of queries and keys; what all implementations of attention are told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """Of one layer.

    Attributes:
        scaling: factor of the products of queries and keys.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); None leaves them.
        window: a query sees keys that are fewer places back than this; None is all of them.
    """

    scaling: float
    softcap: float | None
    window: int | None

    @classmethod
    def of_layer(
        cls, query: Tensor, scaling: float | None, softcap: float | None, window: int | None
    ) -> Scoring:
        """As transformers gives them to an attention function; ``query [..., D]``."""
        usual = query.shape[-1] ** -0.5
        return cls(scaling if scaling is not None else usual, softcap, window)
