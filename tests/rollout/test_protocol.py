"""The wire: what is packed comes back, and nothing malformed gets through."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from pydantic import ValidationError

from cartridge_distill.rollout.fingerprint import (
    Completion,
    decode_fingerprint,
    encode_fingerprint,
)
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
    CartridgeRef,
    ChatCompletionRequest,
    CompletionRequest,
    sanitise_cartridge_id,
)
from cartridge_distill.util.errors import RolloutError

REASONS = ["stop", "length"]
COMPLETIONS = [
    Completion([5, 0, 7], [-0.5, -2.25, 0.0], "stop"),
    Completion([3], [-1.0], "length"),
]


def fingerprint(**changes: Any) -> str:
    content = json.loads(encode_fingerprint(COMPLETIONS, with_logprobs=True))
    return json.dumps(content | changes)


def floats(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def test_round_trip() -> None:
    assert decode_fingerprint(fingerprint(), REASONS, vocab_size=8) == COMPLETIONS


def test_the_packing_is_little_endian_float32() -> None:
    content = json.loads(fingerprint())
    assert content["completion_ids"] == [[5, 0, 7], [3]]
    assert content["packed_chosen_logprobs"] == [floats(-0.5, -2.25, 0.0), floats(-1.0)]
    without = json.loads(encode_fingerprint(COMPLETIONS, with_logprobs=False))
    assert without == content | {"packed_chosen_logprobs": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no system_fingerprint"),
        ("{not json", "not JSON"),
        ("[1]", "not an object"),
        (fingerprint(completion_ids=None), "completion_ids"),
        (fingerprint(completion_ids=[[1]]), "1 entries for 2 choices"),
        (fingerprint(completion_ids=[[5, 0, 7], []]), "choice 1.*not a filled list"),
        (fingerprint(completion_ids=[[5, 0, 8], [3]]), "id 8 is outside the vocabulary of 8"),
        (fingerprint(completion_ids=[[5, -1, 7], [3]]), "token 1: -1"),
        (fingerprint(completion_ids=[[5, 0.0, 7], [3]]), "token 1: 0.0"),
        (fingerprint(completion_ids=[[5, True, 7], [3]]), "token 1: True"),
        (fingerprint(packed_chosen_logprobs=None), "logprobs_in_fingerprint"),
        (fingerprint(packed_chosen_logprobs=[floats(-1.0)] * 2), "1 log-probs for 3 tokens"),
        (fingerprint(packed_chosen_logprobs=[floats(-1, float("nan"), 0)] * 2), "token 1.*nan"),
        (fingerprint(packed_chosen_logprobs=[floats(-1, float("-inf"), 0)] * 2), "token 1.*-inf"),
        (fingerprint(packed_chosen_logprobs=[floats(-1, 0.01, 0)] * 2), "token 1: log-prob 0.0"),
        (fingerprint(packed_chosen_logprobs=[floats(-1.0)[:-3]] * 2), "base64|multiple of 4"),
        (fingerprint(packed_chosen_logprobs=["AAA="] * 2), "multiple of 4"),
        (fingerprint(packed_chosen_logprobs=["?" * 16] * 2), "not base64"),
        (fingerprint(packed_chosen_logprobs=[[-1.0] * 3] * 2), "not a base64 string"),
    ],
)
def test_malformed_fingerprints_are_named(text: str | None, says: str) -> None:
    with pytest.raises(RolloutError, match=says):
        decode_fingerprint(text, REASONS, vocab_size=8)


def test_a_rounding_above_zero_is_let_through() -> None:
    text = json.dumps({"completion_ids": [[1]], "packed_chosen_logprobs": [floats(5e-5)]})
    assert decode_fingerprint(text, ["stop"])[0].token_ids == [1]


def test_defaults_and_unknown_fields() -> None:
    assert CartridgeRef(id="a").source == "wandb"
    completion = CompletionRequest(model="m", prompt=[1, 2])
    assert (completion.max_tokens, completion.temperature) == (16, 1.0)
    chat = ChatCompletionRequest(model="m", messages=[])
    assert (chat.max_tokens, chat.temperature) == (None, 0.7)
    ref = [{"id": "a", "source": "local"}]
    CartridgeCompletionRequest(model="m", prompt="x", cartridges=ref)
    CartridgeChatCompletionRequest(model="m", messages=[], cartridges=ref)
    for body in (
        {"model": "m", "prompt": "x", "cartridges": ref},  # only the custom paths take them
        {"model": "m", "prompt": "x", "max_token": 3},
        {"model": "m", "prompt": {"text": "x"}},
        {"prompt": "x"},
    ):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate(body)
    with pytest.raises(ValidationError):
        CartridgeRef.model_validate({"id": "a", "source": "s3"})
    with pytest.raises(ValidationError):
        CartridgeRef.model_validate({"id": "a", "version": 2})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("run-step-000012", "run-step-000012"),
        ("hazyresearch/cartridge-wauoq23f", "hazyresearch-cartridge-wauoq23f"),
        ("a\\b", "a-b"),
        ("a:b|c*d?e<f>g\"h'i", "a_b_c_d_e_f_g_h_i"),
        ("a\x00b\nc", "a_b_c"),
        ("v1.2", "v1_2"),
        ("a...b", "a_b"),
        ("a--b__c-_d", "a_b_c_d"),
        ("../../etc/passwd", "_etc-passwd"),
        ("/abs/path", "-abs-path"),
        (" a ", "a"),
    ],
)
def test_sanitising(given: str, wanted: str) -> None:
    assert sanitise_cartridge_id(given) == wanted


@pytest.mark.parametrize("given", ["..", "...", "./..", "..\\..", "/", "//", "\x00", ". ."])
def test_sanitised_ids_never_leave_the_directory(given: str) -> None:
    name = sanitise_cartridge_id(given)
    assert name not in ("", ".", "..") and "/" not in name and "\\" not in name
    assert name == sanitise_cartridge_id(given)


@pytest.mark.parametrize("given", ["", "  "])
def test_an_empty_id_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        sanitise_cartridge_id(given)
