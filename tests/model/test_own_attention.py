"""At load the packed forward is compared with the model's own attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.model.attention_arguments import HARMLESS
from cartridge_distill.model.forward import packed_forward, recomputing_layers
from cartridge_distill.model.loading import load_model, prepare_model
from cartridge_distill.model.own_attention import check_own_attention
from cartridge_distill.model.packing import pack
from cartridge_distill.util.errors import ConfigError
from tests.architectures import LAYERS_DIFFER, NAMES, VARIANTS, build, examine, known
from tests.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_promised_is_accepted_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    """And is left as it was: windows, attention, weights."""
    model = tiny_model(kind).to(dtype)
    before = copy.deepcopy(model.state_dict())
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    window = getattr(model.config, "sliding_window", None)
    prepare_model(model)
    assert windows == [
        getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers
    ]
    assert window == getattr(model.config, "sliding_window", None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "cartridge_packed"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("doge", "attention mask of its own"),
        ("gpt_oss", "s_aux=a tensor"),
        ("bert", "a document has other logits packed"),  # sees later tokens
        ("roberta, a decoder", "a document has other logits packed"),  # positions begin at 2
        ("phimoe", "a document has other logits packed"),  # rotates by the longest position
        ("jetmoe", "attends to 4 kv heads of 16 numbers, the prefix has 2"),
        ("hrm_text", "did not use the packed attention"),
        ("deepseek_v3", "kv_lora_rank=16"),  # keys and values of two sizes
        ("llama4_text", "chunked_attention"),
        ("rwkv", "num_attention_heads=None"),
        ("llama, rope dynamic", "dynamic"),
        ("phi3, rope longrope", "longrope"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(name: str, says: str) -> None:
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    found = examine(name)
    assert found.verdict == "refused" and says in found.why, found


@pytest.mark.parametrize(
    "name",
    [
        "afmoe",  # takes a view of what attention returns
        "gpt2",  # learned positions
        "ernie4_5_moe",  # experts
        "modernbert-decoder",  # counts its window with one token more
        *LAYERS_DIFFER,
        "llama, rope yarn",
    ],
)
def test_what_is_accepted_is_exact(name: str) -> None:
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    found = examine(name)
    assert found.verdict == "exact", found


@pytest.mark.parametrize("name", ["gpt2", "opt", "afmoe", "mellum", "mixtral", "bert, a decoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norms_and_experts_are_compared_in_half_precision(
    name: str, dtype: torch.dtype
) -> None:
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    prepare_model(build(name).to(dtype))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_is_wrong_is_refused_in_half_precision(kind: str) -> None:
    model = tiny_model(kind).to(torch.bfloat16)
    (by_the_longest if kind == "llama" else window_in_the_mask_alone)(model)
    with pytest.raises(ConfigError, match="from more than queries, keys, values and windows"):
        prepare_model(model)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_decoder_of_the_installed_transformers_is_accepted_and_wrong() -> None:
    found = [examine(name) for name in (*NAMES, *VARIANTS)]
    assert [one for one in found if one.verdict in ("wrong", "failed")] == []
    assert sum(one.verdict == "exact" for one in found) >= 70


# --- faults that no architecture here has: the kind, and not its cases -------------------------


def by_the_longest(model: PreTrainedModel) -> None:
    """Rotates by other frequencies as soon as one position is past 100."""
    rotary = model.model.rotary_emb
    whole = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        far = bool(position_ids.max() > 100)
        return whole(x, position_ids * 0.25 if far else position_ids)

    rotary.forward = forward


def window_in_the_mask_alone(model: PreTrainedModel) -> None:
    """Its attention is not told of the window."""
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None


def biased_by_distance(model: PreTrainedModel) -> None:
    """Later tokens of a longer row weigh less: depends on how many tokens the forward has."""
    attention = model.model.layers[1].self_attn
    whole = attention.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        return whole(hidden_states * (1 + 0.001 * hidden_states.shape[1]), **kwargs)

    attention.forward = forward


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("llama", by_the_longest),
        ("gemma3", window_in_the_mask_alone),
        ("llama", biased_by_distance),
    ],
)
def test_attention_that_depends_on_more_is_refused(
    kind: str, spoil: Callable[[PreTrainedModel], None]
) -> None:
    model = tiny_model(kind)
    spoil(model)
    with pytest.raises(ConfigError, match="from more than queries, keys, values and windows"):
        prepare_model(model)


def test_a_window_that_cannot_be_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would be without a window in these few tokens, whatever they do with more."""
    model = tiny_model("mistral_window")
    monkeypatch.setattr("cartridge_distill.model.own_attention.WINDOW", 15)  # 12 tokens are tried
    with pytest.raises(ConfigError, match="sliding_window=24, and does the same with 15"):
        prepare_model(model)


def handing(name: str, value: Any) -> PreTrainedModel:
    """A Llama whose last layer hands one more argument to its attention."""
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    whole: Callable[..., Any] = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Eager attention of transformers swallows it.
        return whole(*args, **kwargs, **{name: value})

    attention.forward = forward
    assert isinstance(attention, LlamaAttention)
    return model


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("indices", torch.arange(4), r"the argument 'indices' \(a tensor \(4,\)\)"),
        ("block_table", None, "the argument 'block_table'"),
        ("is_causal", False, "is_causal=False .* supported is None or True"),
        ("s_aux", torch.zeros(4), "s_aux=a tensor"),
        ("head_mask", torch.zeros(4), "head_mask=a tensor"),
    ],
)
def test_an_unknown_argument_is_refused_by_name(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"layer 1 hands .*{says}"):
        prepare_model(handing(name, value))


@pytest.mark.parametrize(("name", "value"), [("is_causal", True), ("output_attentions", False)])
def test_a_known_argument_passes_at_its_harmless_value(name: str, value: Any) -> None:
    assert name in HARMLESS
    prepare_model(handing(name, value))


def test_the_embedded_server_refuses_the_same_arguments() -> None:
    from cartridge_distill.server.engine import Engine
    from cartridge_distill.server.settings import ServerSettings

    model = prepare_model(tiny_model())
    attention = model.model.layers[0].self_attn
    whole = attention.forward
    attention.forward = lambda *a, **k: whole(*a, **k, indices=torch.arange(4))
    with pytest.raises(ConfigError, match="the argument 'indices'"):
        Engine(model, ServerSettings())


def test_a_model_without_weights_is_not_compared() -> None:
    with torch.device("meta"):
        model = tiny_model()
    check_own_attention(model)


def test_load_model_compares(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    load_model(tmp_path)
    monkeypatch.setattr("cartridge_distill.model.own_attention.TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its attention from more"):
        load_model(tmp_path)


# --- layers of two shapes, and layers that share KV --------------------------------------------


@pytest.mark.parametrize("name", LAYERS_DIFFER)
def test_a_cartridge_of_layers_that_differ_trains(name: str) -> None:
    """Against transformers' cache; recomputed layers give the same gradients.

    Gemma 4 does not scale its scores down: they are larger than elsewhere, and so is the rounding.
    """
    model = build(name).requires_grad_(False)
    cartridge = TrainableCache.from_random(model.config, 32, std=1.0)
    assert cartridge.num_layers == 4 < model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(3, 250, (n,), generator=generator) for n in (1, 30, 7)]

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            logits.log_softmax(-1)[:, 7].mean(), cartridge.trainable_parameters()
        )

    expected = torch.cat(
        [
            model(
                input_ids=ids[None],
                position_ids=torch.arange(32, 32 + len(ids))[None],
                past_key_values=cartridge.as_cache(),
            ).logits[0]
            for ids in sequences
        ]
    )
    theirs = gradients(expected)
    prepare_model(model)
    for backend in ("grouped", "dense"):
        logits = packed_forward(model, cartridge.prefix(), pack(sequences), backend=backend)
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
        for one, other in zip(gradients(logits), theirs, strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=0)
    with recomputing_layers(model):
        again = gradients(packed_forward(model, cartridge.prefix(), pack(sequences)))
    for one, other in zip(again, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=0)
