"""A Llama's weights out of a GGUF file, by their names in transformers.

transformers reads GGUF files, too, but slowly, and from 5.17 on does not save a model that it read
from one. Here nothing of transformers is imported, so a node with any version of it can decode.
Not done here: the config and the tokenizer, and architectures other than Llama.
"""

from __future__ import annotations

import re
from pathlib import Path

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
_OTHER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def decode_llama(
    gguf: Path, heads: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Every tensor of the file that a Llama has; a tied output layer is not in it.

    Args:
        heads, kv_heads: of the config; the rows of Q and K stand in llama.cpp's order, by head.

    Raises:
        ValueError: a tensor has a name that no Llama has.
    """
    found: dict[str, Tensor] = {}
    for tensor in GGUFReader(gguf).tensors:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match and match[2] in _LAYER:
            if match[2] in ("attn_q", "attn_k"):
                weights = _rotary_halves(weights, heads if match[2] == "attn_q" else kv_heads)
            name = f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
        elif tensor.name in _OTHER:
            name = _OTHER[tensor.name]
        elif tensor.name == "rope_freqs.weight":
            continue  # computed from the config
        else:
            raise ValueError(f"{gguf} holds {tensor.name!r}, which a Llama does not have")
        found[name] = torch.from_numpy(np.ascontiguousarray(weights)).to(dtype)
    return found


def _rotary_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """``[heads * D, hidden]``: a head's rows from pairs, as llama.cpp rotates them, to halves."""
    half = weights.shape[0] // heads // 2
    pairs = weights.reshape(heads, half, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
