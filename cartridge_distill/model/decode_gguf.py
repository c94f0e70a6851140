"""The weights of a Llama or a Gemma 3 out of a GGUF file, by their names in transformers.

transformers reads GGUF files, too, but slowly, and from 5.17 on does not save a model that it read
from one. Here nothing of transformers is imported, so a node with any version of it can decode.
Not done here: the config and the tokenizer, and other architectures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Gemma 3 has a norm before and behind each half of a layer: "ffn_norm" is another one than Llama's.
_GEMMA3_LAYER = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


Gguf: TypeAlias = Path | GGUFReader
"""A file, or the file as it was read: reading a large vocabulary takes ten seconds."""


def opened(gguf: Gguf) -> GGUFReader:
    """The file as it is read; reads it if it was not."""
    return gguf if isinstance(gguf, GGUFReader) else GGUFReader(gguf)


def field(gguf: GGUFReader, name: str) -> Any:
    """A value of the file's description; None where it has none of that name."""
    found = gguf.fields.get(name)
    return None if found is None else found.contents()


def file_name(gguf: GGUFReader) -> str:
    """Of the file that was read."""
    return Path(str(gguf.data.filename)).name


def decode_llama(
    gguf: Gguf, heads: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Every tensor of the file that a Llama has; a tied output layer is not in it.

    Args:
        heads, kv_heads: of the config; the rows of Q and K stand in llama.cpp's order, by head.

    Raises:
        ValueError: a tensor has a name that no Llama has.
    """
    rows = {"attn_q": heads, "attn_k": kv_heads}

    def reorder(name: str, weights: np.ndarray) -> np.ndarray:
        return _rotary_halves(weights, rows[name]) if name in rows else weights

    return _decode(gguf, "Llama", _LAYER, reorder, dtype)


def decode_gemma3(gguf: Gguf, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Every tensor of the file that a Gemma 3 has; a tied output layer is not in it.

    llama.cpp multiplies with the weights of a norm, transformers with one more than them.

    Raises:
        ValueError: a tensor has a name that no Gemma 3 has.
    """

    def less_one(name: str, weights: np.ndarray) -> np.ndarray:
        return weights - 1 if name.endswith("_norm") else weights

    return _decode(gguf, "Gemma 3", _LAYER | _GEMMA3_LAYER, less_one, dtype)


def _decode(
    gguf: Gguf,
    kind: str,
    layer: Mapping[str, str],
    change: Callable[[str, np.ndarray], np.ndarray],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """``change`` takes a tensor's name without layer and ``.weight``, and its float32 weights."""
    found: dict[str, Tensor] = {}
    reader = opened(gguf)
    for tensor in reader.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match and match[2] in layer:
            short, name = match[2], f"model.layers.{match[1]}.{layer[match[2]]}.weight"
        elif tensor.name in _OTHER:
            short, name = tensor.name.removesuffix(".weight"), _OTHER[tensor.name]
        elif tensor.name == "rope_freqs.weight":
            continue  # computed from the config
        else:
            raise ValueError(
                f"{file_name(reader)} holds {tensor.name!r}, which a {kind} does not have"
            )
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found[name] = torch.from_numpy(np.ascontiguousarray(change(short, weights))).to(dtype)
    return found


def _rotary_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """``[heads * D, hidden]``: a head's rows from pairs, as llama.cpp rotates them, to halves."""
    half = weights.shape[0] // heads // 2
    pairs = weights.reshape(heads, half, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
