"""Is the packed forward this model's own? Both are run on a few tokens when a model is loaded.

The packed attention is handed queries, keys, values, a scale, a window and a soft cap. A model
whose attention depends on more (a mask of its own, a choice of keys, a rotation that is chosen by
the longest position of the forward, positions that do not begin at 0, an encoder's view of later
tokens) would be computed wrongly, and nothing would show. So two sequences are computed by the
model's own eager attention, each by itself: a document with a *short* sequence behind it, and the
same document with one at the *end of the model's context*, past every length at which it may
change. The packed forward computes

- the document, without a prefix;
- behind the document's keys and values both sequences, in one row.

Meanwhile every window of the model is made 5 tokens wide, so that these few tokens lie past it.
All layers take part, with the model's own weights, in float32 whatever it was loaded in: four
forwards of some ten tokens, five where there are windows. For 135M parameters that is half a second
of one CPU core.

Not done here: comparing the backends of the packed attention with each other (the tests do that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.attention import ATTENTION_NAME
from cartridge_distill.model.float32_forward import InFloat32
from cartridge_distill.model.forward import run_packed
from cartridge_distill.model.packing import pack
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, with_fix

DOCUMENT, BEHIND = 8, 4
"""Tokens of the document, and of each of the two sequences behind it."""

WINDOW = 5
"""What every window is made while the two are compared."""

TOLERANCE = 1e-3
"""Of the logits' standard deviation. Rounding of float32 is a hundredth of it; what is wrong in
kind is a hundred times as much."""

HALF_TOLERANCE = 2e-2
"""The same for a model in bfloat16 or float16: some round in between to the dtype of their weights
(the weights of experts, for one), where the last bit of float32 may decide."""

_ANOTHER = "use another model"
_FURTHEST = 2**17  # for a model that names no longest context


@torch.no_grad()
def check_own_attention(model: PreTrainedModel) -> None:
    """Compares the packed forward with the model's own eager attention.

    Args:
        model: with its weights, in eval mode; one on the ``meta`` device has none, and is not
            compared. It has the packed attention afterwards.

    Raises:
        ConfigError: naming what differs, or what cannot be computed.
    """
    parameter = next(model.parameters())
    tolerance = TOLERANCE if parameter.dtype == torch.float32 else HALF_TOLERANCE
    device = parameter.device
    if device.type == "meta":
        return
    name = type(model).__name__
    config = text_config(model.config)
    furthest = getattr(config, "max_position_embeddings", None) or _FURTHEST
    if furthest < DOCUMENT + 2 * BEHIND:
        raise ConfigError(
            f"{name} has a context of {furthest} tokens, too short for a cartridge; fix: use "
            "another model"
        )
    ids = ordinary_ids(model.config, DOCUMENT + 2 * BEHIND).to(device)
    document, short, far = ids.split([DOCUMENT, BEHIND, BEHIND])
    starts = (DOCUMENT, furthest - BEHIND)
    own_run = _named(f"{name} cannot be run with its own eager attention")
    packed_run = _named(f"{name} cannot be run packed behind a cartridge")
    with InFloat32(), _narrow_windows(model) as windows:
        model.set_attn_implementation("eager")
        near = torch.cat([document, short])
        own = own_run(_by_itself, model, near, None)
        own_far = own_run(_by_itself, model, torch.cat([document, far]), starts[1])
        if windows:
            with _as_they_were(windows):
                wide = own_run(_by_itself, model, near, None)
            # A window that is used changes at least the last bits.
            if not _differ(own, wide, 1e-6) and _has_windowed_layers(config):
                raise ConfigError(
                    f"{name} has {_shown(windows)}, and does the same with {WINDOW}: what it does "
                    "with more tokens could not be compared; fix: use another model"
                )
        model.set_attn_implementation(ATTENTION_NAME)
        packed, prefix = packed_run(_read, model, document)
        behind = packed_run(_behind, model, prefix, (short, far), starts)
    for what, ours, theirs in (
        ("a document", packed, own[:DOCUMENT]),
        ("a short sequence behind a document", behind[:BEHIND], own[DOCUMENT:]),
        ("a sequence at the end of the context", behind[BEHIND:], own_far[DOCUMENT:]),
    ):
        if not bool(ours.isfinite().all()) or _differ(ours, theirs, tolerance):
            raise ConfigError(
                f"{name} computes its attention from more than queries, keys, values and windows, "
                f"or counts its positions in another way: {what} has other logits packed, by "
                f"{float((ours - theirs).abs().max()):.2g} (their standard deviation is "
                f"{float(theirs.std()):.2g}). A cartridge would be trained on wrong numbers; fix: "
                "use another model"
            )


def _has_windowed_layers(config: Any) -> bool:
    """Whether a layer may use the window; a configuration may name one that none does."""
    return set(getattr(config, "layer_types", None) or ["unknown"]) != {"full_attention"}


def _differ(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return float((one - two).abs().max()) > tolerance * float(two.std())


def _by_itself(model: PreTrainedModel, ids: Tensor, start: int | None) -> Tensor:
    """Logits ``[T, V]`` of a document and what follows it, by the model itself.

    Args:
        start: the position of what follows; None leaves all positions to the model.
    """
    positions = None
    if start is not None:
        positions = torch.arange(len(ids), device=ids.device)
        positions[DOCUMENT:] += start - DOCUMENT
    logits: Tensor = model(
        input_ids=ids[None],
        **({} if positions is None else {"position_ids": positions[None]}),
        # Positions that jump are taken for several sequences where there is no mask.
        attention_mask=torch.ones_like(ids)[None],
        use_cache=False,
    ).logits[0]
    return logits.float()


def _read(model: PreTrainedModel, document: Tensor) -> tuple[Tensor, Prefix]:
    """Logits ``[T, V]`` of a document, packed, and its keys and values."""
    cache = DynamicCache()
    logits = run_packed(model, None, pack([document]), backend="grouped", cache=cache)
    prefix = Prefix(
        [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    )
    expected = KvShape.of(model.config)
    if prefix.kv_shape != expected:
        raise ConfigError(
            f"it makes keys and values of {prefix.kv_shape}; by its config {expected}"
        )
    return logits.float(), prefix


def _behind(
    model: PreTrainedModel, prefix: Prefix, sequences: tuple[Tensor, ...], starts: tuple[int, ...]
) -> Tensor:
    """Logits ``[T, V]`` of sequences in one row, whose positions begin at ``starts``."""
    batch = pack(sequences)
    return run_packed(model, prefix, batch, backend="grouped", starts=starts).float()


def _named(what: str) -> Callable[..., Any]:
    """Calls a function; what goes wrong in it is a ConfigError that begins with ``what``."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except CartridgeDistillError as error:
            raise ConfigError(with_fix(f"{what}: {error}", _ANOTHER)) from error
        except Exception as error:  # of a model's own code: anything
            reason = (str(error) or "no message").splitlines()[0]
            raise ConfigError(
                with_fix(f"{what}: {type(error).__name__}: {reason}", _ANOTHER)
            ) from error

    return call


def ordinary_ids(config: Any, count: int) -> Tensor:
    """Ids of ordinary tokens: none that the configuration names (an image's, for one)."""
    text = text_config(config)
    named: set[int] = set()
    for settings in (config, text):
        for name, value in settings.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                named.update(value if isinstance(value, list) else [value])
    free = [token for token in range(min(text.vocab_size, 1000)) if token not in named]
    # Far from each other, and none twice where there are enough.
    return torch.tensor([free[place * 37 % len(free)] for place in range(3, 3 + count)])


Setting = tuple[Any, str, int]
"""An object, the name of an attribute, and its value."""


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[list[Setting]]:
    """In here every window is :data:`WINDOW` tokens wide; gives what they were."""
    found = list(_windows(model))
    widths = {width for holder, _, width in found if not isinstance(holder, torch.nn.Module)}
    narrowed = []
    for holder, name, width in found:
        # A module may count its window with one token more or less than the configuration.
        base = min(widths, key=lambda known: abs(known - width), default=width)
        if abs(width - base) <= 1:
            narrowed.append((holder, name, WINDOW + width - base))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in narrowed]
    with _as_they_were(narrowed):
        yield before


def _windows(model: PreTrainedModel) -> Iterator[Setting]:
    """Every window wider than :data:`WINDOW`: of the configurations, and of the modules."""
    configs: dict[int, Any] = {id(config): config for config in [text_config(model.config)]}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "num_hidden_layers"):
            configs.setdefault(id(config), config)
    for holder in (*configs.values(), *model.modules()):
        for name, value in list(vars(holder).items()):
            known = "window" in name or name in _ALSO_WINDOWS
            if known and type(value) is int and value > WINDOW and name not in _NO_WINDOWS:
                yield holder, name, value


_ALSO_WINDOWS = ("attention_chunk_size", "index_topk", "local_attention")
_NO_WINDOWS = ("max_window_layers",)


@contextmanager
def _as_they_were(settings: list[Setting]) -> Iterator[None]:
    """In here attributes have these values."""
    with ExitStack() as stack:
        for holder, name, value in settings:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


def _shown(windows: list[Setting]) -> str:
    return ", ".join(sorted({f"{name}={width}" for _, name, width in windows}))
