"""A GGUF file becomes a folder whose model computes the same, with a tokenizer that survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cartridge_distill.model.convert_gguf import convert_gguf
from cartridge_distill.model.gguf_tokenizer import (
    SAMPLES,
    Kind,
    check_survives,
    sentencepiece_tokenizer,
    share_of_whole_words,
)
from cartridge_distill.util.errors import ConfigError
from tests.tiny import byte_tokenizer
from tests.training.gguf_files import gemma3_tensors, write

# The union with the best score is joined first, wherever it stands.
WORDS = {"▁a": -1.0, "▁an": -2.0, "na": -3.0, "an": -4.0, "▁anan": -5.0, "▁bana": -6.0}


def vocabulary(extra: dict[str, float] = WORDS) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds of a small SentencePiece vocabulary with every byte."""
    control, own = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"], ["\n\n", "<table>"]
    letters = dict.fromkeys("▁abn", -100.0)
    rows = [(piece, -1000.0, Kind.CONTROL) for piece in control]
    rows += [(piece, -1000.0, Kind.USER_DEFINED) for piece in own]
    rows += [(f"<0x{byte:02X}>", -1000.0, Kind.BYTE) for byte in range(256)]
    rows += [(piece, score, Kind.NORMAL) for piece, score in (extra | letters).items()]
    pieces, scores, kinds = zip(*rows, strict=True)
    return list(pieces), list(scores), [int(kind) for kind in kinds]


def tiny_gemma3() -> PreTrainedModel:
    """Seven layers, of which llama.cpp and transformers take the sixth for one without window."""
    pieces, _, _ = vocabulary()
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.bfloat16())  # nothing is lost in the folder
    return model.eval()


def describe(writer: GGUFWriter, **changed: Any) -> None:
    pieces, scores, kinds = vocabulary()
    writer.add_block_count(7)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model(changed.get("model", "llama"))
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(changed.get("kinds", kinds))
    for name, token in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    if "template" in changed:
        writer.add_chat_template(changed["template"])


def test_a_gemma_3_computes_the_same(tmp_path: Path) -> None:
    model = tiny_gemma3()
    gguf = tmp_path / "m.gguf"
    write(gguf, gemma3_tensors(model), "gemma3", lambda w: describe(w, template="{{ bos_token }}"))
    convert_gguf(gguf, tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    ids = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = loaded(ids).logits, model(ids).logits
    # llama.cpp's 1 + w and back costs a rounding of w in bfloat16.
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ends = loaded.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (2, 1, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("an").input_ids[0] == 2 and tokenizer.chat_template == "{{ bos_token }}"


def test_sentencepieces_rule(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    write(gguf, {}, "gemma3", describe)
    tokenizer = sentencepiece_tokenizer(gguf)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)

    assert pieces(" anan") == ["▁anan"]
    assert pieces(" ana") == ["▁an", "a"]  # "▁a" + "na" would be worse
    assert pieces("anan\n\nb") == ["a", "na", "n", "\n\n", "b"]  # "na" is better than "an"
    assert pieces("é") == ["<0xC3>", "<0xA9>"]  # no such letter: its bytes
    assert pieces("<end_of_turn>") == ["<end_of_turn>"]
    assert tokenizer.all_special_tokens == ["<bos>", "<eos>", "<unk>", "<pad>"]
    tokenizer.save_pretrained(tmp_path / "folder")
    check_survives(tokenizer, tmp_path / "folder")


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"model": "gpt2"}, "of the kind 'gpt2'"), ({"kinds": [1, 2]}, "are not as many")],
)
def test_a_vocabulary_that_cannot_be_read(tmp_path: Path, changed: dict, says: str) -> None:
    write(tmp_path / "m.gguf", {}, "gemma3", lambda writer: describe(writer, **changed))
    with pytest.raises(ConfigError, match=says):
        sentencepiece_tokenizer(tmp_path / "m.gguf")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {"x.weight": np.ones(2, np.float32)}, "mamba")
    with pytest.raises(ConfigError, match="architecture 'mamba'; known are 'llama' and 'gemma3'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "folder")


# --- a tokenizer that does not survive ------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    """Of tokenizer.json."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_other_ids_after_loading(saved: Path) -> None:
    check_survives(byte_tokenizer(), saved)
    edit(saved, normalizer={"type": "Lowercase"})
    with pytest.raises(ConfigError, match="does not survive saving: 'The director.*tokens before"):
        check_survives(byte_tokenizer(), saved)


def test_text_that_does_not_come_back(saved: Path) -> None:
    edit(saved, decoder=None)
    with pytest.raises(ConfigError, match="loses text.*--tokenizer FOLDER"):
        check_survives(byte_tokenizer(), saved)


def test_a_lost_end_token(saved: Path) -> None:
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    with pytest.raises(ConfigError, match="its eos_token_id is 257 before and 258 after"):
        check_survives(byte_tokenizer(), saved)


def test_a_tokenizer_of_letters(tmp_path: Path) -> None:
    """As transformers makes it of a SentencePiece vocabulary: the words are there, unused."""
    words = [f"{first}{second}nd" for first in "abnm" for second in "abnm"]
    inner = byte_tokenizer().backend_tokenizer
    state = json.loads(inner.to_str())
    state["model"]["vocab"] |= {word: 300 + n for n, word in enumerate(words)}
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer = type(inner).from_str(json.dumps(state))
    assert share_of_whole_words(tokenizer) == 0
    tokenizer.save_pretrained(tmp_path / "letters")
    with pytest.raises(ConfigError, match="only 0% of a sample"):
        check_survives(tokenizer, tmp_path / "letters")


def test_the_samples_have_what_gets_lost() -> None:
    everything = "".join(SAMPLES)
    for lost in ("\n\n\n", "  ", "   ", "\t", "\u200d", "ß", "猫", "ا", "1", "é"):
        assert lost in everything, lost
