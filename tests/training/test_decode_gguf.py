"""The weights come out of a GGUF file as they went in, whatever llama.cpp changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cartridge_distill.model.decode_gguf import decode_gemma3, decode_llama
from tests.tiny import tiny_model
from tests.training.gguf_files import as_llama_cpp_rotates, gemma3_tensors, gguf_name, write


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    model = tiny_model()
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    tensors = {}
    for name, weights in model.state_dict().items():
        tensor = weights.numpy()
        if "q_proj" in name or "k_proj" in name:
            tensor = as_llama_cpp_rotates(tensor, heads if "q_proj" in name else kv_heads)
        tensors[gguf_name(name)] = tensor
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    write(tmp_path / "model.gguf", tensors)
    found = decode_llama(tmp_path / "model.gguf", heads, kv_heads, torch.float32)
    assert set(found) == set(model.state_dict())
    for name, weights in model.state_dict().items():
        assert torch.equal(found[name], weights), name


def test_a_gemma_3_comes_out_too(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    write(tmp_path / "model.gguf", gemma3_tensors(model), "gemma3")
    found = decode_gemma3(tmp_path / "model.gguf", torch.float32)
    assert set(found) == set(model.state_dict()) - {"lm_head.weight"}
    for name, weights in found.items():
        torch.testing.assert_close(weights, model.state_dict()[name], atol=1e-6, rtol=0)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", {"blk.0.ssm_in.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="'blk.0.ssm_in.weight', which a Llama does not have"):
        decode_llama(tmp_path / "model.gguf", 1, 1)
    with pytest.raises(ValueError, match="which a Gemma 3 does not have"):
        decode_gemma3(tmp_path / "model.gguf")
