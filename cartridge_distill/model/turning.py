"""Keys moved to other positions, without the model: what its rotary embedding does to them.

A rotary embedding (arXiv 2104.09864) turns each pair of a key's numbers by an angle that grows with
the position, so a key of position p becomes that of position q when it is turned by q - p. Which
pairs, and which angles, differ from model to model and from layer to layer; some layers have no
positions at all. So every layer's keys of a few tokens are computed by the model at two positions,
and what turns the ones into the others is taken. A layer where nothing does is refused: the model
has positions elsewhere (GPT-2 adds them to its embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.model.float32_forward import InFloat32
from cartridge_distill.model.forward import run_packed
from cartridge_distill.model.own_attention import ordinary_ids
from cartridge_distill.model.packing import pack
from cartridge_distill.util.errors import ConfigError

TOKENS, APART = 4, 37
"""Tokens that are computed twice, and how many positions lie between."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of the keys' standard deviation; the second for a model in bfloat16 or float16, computed in
float32 all the same. Keys that are turned wrongly are off by about as much as they are large."""


@dataclass(frozen=True)
class Rotation:
    """One way to turn keys.

    Attributes:
        angles: ``[R]`` radians a position, of R pairs of numbers; none leaves keys as they are.
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; else (0, R), (1, R + 1), ...
    """

    angles: Tensor
    interleaved: bool = False

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Moves keys.

        Args:
            keys: ``[..., D]``, D at least 2 R; the numbers past 2 R have no position.
            by: ``[...]`` positions, of either sign.
        """
        count = len(self.angles)
        if not count:
            return keys
        angle = by[..., None].to(torch.float64) * self.angles.to(keys.device, torch.float64)
        cos, sin = angle.cos().float(), angle.sin().float()
        turned, rest = keys[..., : 2 * count].float(), keys[..., 2 * count :]
        if self.interleaved:
            one, two = turned[..., 0::2], turned[..., 1::2]
        else:
            one, two = turned[..., :count], turned[..., count:]
        pair = one * cos - two * sin, two * cos + one * sin
        found = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([found.to(keys.dtype), rest], -1)


class Turner:
    """Moves a model's keys to other positions.

    Args:
        rotations: of each layer that has keys of its own.
    """

    def __init__(self, rotations: Sequence[Rotation]) -> None:
        self._rotations = tuple(rotations)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Turner:
        """Finds out how each layer's keys are turned; two forwards of a few tokens.

        Args:
            model: from :func:`cartridge_distill.model.loading.load_model`.

        Raises:
            ConfigError: a layer's keys at one position cannot be had from those at another.
        """
        parameter = next(model.parameters())
        ids = ordinary_ids(model.config, TOKENS).to(parameter.device)
        context = getattr(text_config(model.config), "max_position_embeddings", None)
        apart = APART if context is None else min(APART, context - TOKENS)
        with InFloat32():  # rounding to bfloat16 adds up over layers to more than a tenth
            here, there = (_keys(model, ids, start) for start in (0, apart))
        tolerance = TOLERANCE if parameter.dtype == torch.float32 else HALF_TOLERANCE
        known = _known_rotations(model)
        return cls(
            [
                _matching(known, *pair, apart, tolerance, f"{type(model).__name__}: layer {layer}")
                for layer, pair in enumerate(zip(here, there, strict=True))
            ]
        )

    def turn(self, layer: int, keys: Tensor, by: Tensor) -> Tensor:
        """As :meth:`Rotation.turn`, of one layer."""
        return self._rotations[layer].turn(keys, by)


def _keys(model: nn.Module, ids: Tensor, start: int) -> list[Tensor]:
    """``[H, T, D]`` of each layer, of tokens whose positions begin at ``start``."""
    from transformers import DynamicCache

    cache = DynamicCache()
    run_packed(model, None, pack([ids]), backend="grouped", cache=cache, starts=[start])
    return [layer.keys[0, :, : len(ids)] for layer in cache.layers]


def _known_rotations(model: nn.Module) -> list[Rotation]:
    """None at all, and every set of angles that a module of the model has, in both orders."""
    found = [Rotation(torch.empty(0))]
    for name, angles in model.named_buffers():
        is_new = all(not torch.equal(angles, other.angles) for other in found)
        if name.endswith("inv_freq") and angles.dim() == 1 and is_new:
            found += [Rotation(angles, interleaved) for interleaved in (False, True)]
    return found


def _matching(
    known: Sequence[Rotation], here: Tensor, there: Tensor, apart: int, tolerance: float, name: str
) -> Rotation:
    by = torch.full(here.shape[:2], apart, device=here.device)
    fitting = [each for each in known if 2 * len(each.angles) <= here.shape[-1]]
    off = [float((each.turn(here, by).float() - there).abs().max()) for each in fitting]
    best = min(range(len(off)), key=off.__getitem__)
    if off[best] > tolerance * float(there.float().std()):
        raise ConfigError(
            f"{name}: its keys at one position are no rotation of those at another, so a "
            "document's keys cannot be moved into a cartridge; fix: set actor.cartridge.init=text"
        )
    return fitting[best]
