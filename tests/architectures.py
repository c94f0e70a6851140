"""Every decoder of the installed transformers, tiny, and what the packed forward makes of it.

A configuration has the sizes of :data:`SIZES` wherever it has a setting of that name; the few that
need more say so in :data:`MORE`. What cannot be built so small is told apart from what is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import prepare_model
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.errors import CartridgeDistillError

VOCAB = 259
NAMES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_layers", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "max_window_layers"), 2),
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar", "d_kv"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"moe_num_experts": 4, "moe_num_shared_experts": 1, "encoder_layers": 1, "expand": 1},
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
    **{"v_head_dim": 12, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16},
    **{"hidden_size_per_layer_input": 16, "global_head_dim": 32, "laurel_rank": 8},
    **{"altup_num_inputs": 2, "rotary_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"num_kv_shared_layers": 0, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258},
}

_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}  # that of the rotated part
_SHARED = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}

MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm_moe_dsa", "youtu"), _LATENT),
    **{"glm4_moe_lite": _LATENT, "falcon": {"head_dim": None}, "xlstm": {"v_head_dim": None}},
    # transformers 5.17 takes it and has no such attribute.
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified"), {"global_head_dim": 32}),
    "gemma4_unified_text": {"global_head_dim": 32},
}
"""Settings by name of a model; None leaves the setting as the model has it."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n_text, layers that share KV": (
        "gemma3n_text",
        _SHARED | {"activation_sparsity_pattern": [0.0] * 6},
    ),
    "gemma4_text, layers that share KV": ("gemma4_text", _SHARED),
    "gemma4_text, keys that are values": (
        "gemma4_text",
        _SHARED | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4_unified_text, layers that share KV": ("gemma4_unified_text", _SHARED),
    "phimoe, no window": ("phimoe", {"sliding_window": None}),
    "qwen2, a window": ("qwen2", {"use_sliding_window": True}),
    "bert, a decoder": ("bert", {"is_decoder": True}),
    "roberta, a decoder": ("roberta", {"is_decoder": True}),
    "llama, rope llama3": (
        "llama",
        {
            "rope_parameters": _LLAMA3
            | {
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, rope yarn": (
        "llama",
        {"rope_parameters": _YARN | {"original_max_position_embeddings": 32}},
    ),
    "llama, rope linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, rope dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "phi3, rope longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": _LONG
            | {
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
"""More of one architecture: settings at which its attention is another."""


def known(*names: str) -> list[str]:
    """Those of these names that the installed transformers has."""
    return [name for name in names if VARIANTS.get(name, (name, {}))[0] in NAMES]


LAYERS_DIFFER = known(*(name for name in VARIANTS if "KV" in name or "keys" in name))
"""Layers of two shapes, or layers that read the keys and values of others."""


class NotBuilt(Exception):
    """The configuration does not become so small, or the model does not run with ids alone."""


def tiny_config(kind: str, **extra: Any) -> Any:
    """The decoder's configuration of an architecture, in the sizes of this module."""
    usual = text_config(AutoConfig.for_model(kind))
    known = usual.to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known or hasattr(usual, name)}
    sizes |= MORE.get(kind, {}) | extra
    return type(usual)(**{name: value for name, value in sizes.items() if value is not None})


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A model by its name in transformers, or in :data:`VARIANTS`; random, eager, float32.

    Raises:
        NotBuilt: with the reason.
    """
    kind, extra = VARIANTS.get(name, (name, {}))
    try:
        config = tiny_config(kind, **extra)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in shell.parameters())
        if count > 5_000_000:
            raise NotBuilt(f"{count / 1e6:.0f} million parameters")
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        )
    except NotBuilt:
        raise
    except Exception as error:  # of any configuration: whatever it checks
        raise NotBuilt(_line(error)) from error
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


Verdict = Literal["exact", "refused", "wrong", "failed", "not built"]


@dataclass(frozen=True)
class Found:
    """What became of an architecture.

    Attributes:
        why: the refusal, the failure, or how far the logits are off.
    """

    name: str
    verdict: Verdict
    why: str


def examine(name: str) -> Found:
    """Loads it as any model is loaded; what is accepted is compared beyond what loading compares.

    Sequences and a document past the window of 24, one by one through eager attention, against one
    packed row: alone, and behind the document's KV. Exact is 2e-5 of the logits' deviation.
    """
    try:
        model = build(name)
    except NotBuilt as error:
        return Found(name, "not built", str(error))
    generator = torch.Generator().manual_seed(1)
    document = torch.randint(3, 250, (32,), generator=generator)
    sequences = [torch.randint(3, 250, (n,), generator=generator) for n in (1, 5, 40, 17)]
    with torch.no_grad():
        try:
            bare = torch.cat([_eager(model, ids) for ids in sequences])
            behind = torch.cat([_eager(model, torch.cat([document, x]))[32:] for x in sequences])
        except Exception as error:
            return Found(name, "not built", _line(error))
        try:
            prepare_model(model)
        except CartridgeDistillError as error:
            return Found(name, "refused", str(error))
        except Exception as error:
            return Found(name, "failed", _line(error))
        try:
            prefix = prefix_from_tokens(model, document)
            off = max(
                float((packed_forward(model, None, pack(sequences)) - bare).abs().max()),
                float((packed_forward(model, prefix, pack(sequences)) - behind).abs().max()),
            )
        except Exception as error:
            return Found(name, "failed", _line(error))
    exact = off < 2e-5 * max(1.0, float(behind.std()))
    return Found(name, "exact" if exact else "wrong", f"{off:.1e}")


def _eager(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
