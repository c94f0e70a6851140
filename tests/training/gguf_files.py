"""Models written as llama.cpp writes them: its names, its order of rows, its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from transformers import PreTrainedModel

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}

GEMMA3_NAMES = GGUF_NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, names: dict[str, str] = GGUF_NAMES) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{names['.'.join(parts[2:])]}.weight"
    return f"{names[parts[0]]}.weight"


def gemma3_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """As llama.cpp writes them: its norms multiply, the output layer is the embedding."""
    return {
        gguf_name(name, GEMMA3_NAMES): weights.float().numpy() + ("norm" in name)
        for name, weights in model.state_dict().items()
        if name != "lm_head.weight"
    }


def as_llama_cpp_rotates(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i of a head is row i of its first half, row 2 i + 1 row i of its second."""
    rows = weights.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in (0, 1)
    ]
    return weights[order]


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    describe: Callable[[GGUFWriter], None] = lambda writer: None,
) -> None:
    writer = GGUFWriter(path, architecture)
    describe(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
