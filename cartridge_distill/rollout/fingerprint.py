"""What ``system_fingerprint`` carries: the token ids and log-probs of a completion.

It is a JSON *string*; the client decodes with this, the embedded server encodes with it:

=========================  =====================================================================
``completion_ids``         n lists of token ids, the end token included
``packed_chosen_logprobs`` n base64 strings of little-endian float32, or null
``packed_topk_indices``    null: top-k log-probs are never asked for
``packed_topk_logprobs``   null
=========================  =====================================================================

Decoding trusts nothing: what a trainer would turn into a silent wrong gradient (NaN, a missing
log-prob, an id outside the vocabulary) is a :class:`~cartridge_distill.util.errors.RolloutError`
that names it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cartridge_distill.util.errors import RolloutError

# A probability computed in float32 can come out a rounding above 1; more than this is not rounding.
MAX_LOGPROB = 1e-4
_MOST_TOKENS = 2**31  # of any vocabulary


class AnswerCutShort(RolloutError):
    """An answer whose parts do not agree: something of it was lost on the way; asking again may
    help."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation: the tokens with their log-probs, on both sides of the wire.

    Attributes:
        token_ids: n ids, the end token included when one was sampled.
        logprobs: n natural logs of the probability each token was sampled with, which is that of
            the *tempered* distribution.
        finish_reason: "stop" or "length".
        shared_tokens: prompt tokens that a server computed once for several, or had kept; 0 where
            nobody counted.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    shared_tokens: int = 0


def pack_floats(values: Sequence[float]) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpack_floats(packed: Any, what: str) -> npt.NDArray[np.float32]:
    """The inverse of :func:`pack_floats`, 1-D.

    Raises:
        RolloutError: not a string, not base64, or not a whole number of 4-byte values.
    """
    if not isinstance(packed, str):
        raise RolloutError(f"{what} is {type(packed).__name__} {packed!r:.40}, not a base64 string")
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RolloutError(f"{what} is not base64: {error}; it begins {packed[:40]!r}") from error
    if len(raw) % 4:
        raise AnswerCutShort(
            f"{what} holds {len(raw)} bytes, not a multiple of 4: it was cut short"
        )
    return np.frombuffer(raw, dtype="<f4")


def encode_fingerprint(completions: Sequence[Completion], with_logprobs: bool) -> str:
    """The ``system_fingerprint`` string for n completions."""
    logprobs = [pack_floats(completion.logprobs) for completion in completions]
    return json.dumps(
        {
            "completion_ids": [completion.token_ids for completion in completions],
            "packed_chosen_logprobs": logprobs if with_logprobs else None,
            "packed_topk_indices": None,
            "packed_topk_logprobs": None,
        }
    )


def decode_fingerprint(
    fingerprint: str | None,
    finish_reasons: Sequence[str],
    vocab_size: int | None = None,
) -> list[Completion]:
    """Reads and checks a ``system_fingerprint``.

    Args:
        fingerprint: the string of the response.
        finish_reasons: of the n choices, which the response carries beside it.
        vocab_size: when given, ids must be below it.

    Returns:
        n completions.

    Raises:
        RolloutError: anything missing, of the wrong length, out of range or not finite.
    """
    if not isinstance(fingerprint, str):
        raise RolloutError(
            "the answer has no system_fingerprint string, where token ids and log-probs travel; "
            "the server is not a Tokasaurus with this protocol"
        )
    try:
        content = json.loads(fingerprint)
    except (ValueError, RecursionError) as error:
        raise RolloutError(
            f"system_fingerprint is not JSON ({error}); it begins {fingerprint[:60]!r}"
        ) from error
    if not isinstance(content, dict):
        raise RolloutError(f"system_fingerprint is a {type(content).__name__}, not an object")
    all_ids = _list_of(content, "completion_ids", len(finish_reasons))
    if content.get("packed_chosen_logprobs") is None:
        raise RolloutError(
            "packed_chosen_logprobs is null: the request must say logprobs_in_fingerprint=true and "
            "the server must compute chosen log-probs (enable_chosen_logprobs)"
        )
    packed = _list_of(content, "packed_chosen_logprobs", len(finish_reasons))
    completions = []
    for number, finish_reason in enumerate(finish_reasons):
        ids = _checked_ids(all_ids[number], number, vocab_size)
        logprobs = _checked_logprobs(packed[number], number, len(ids))
        completions.append(Completion(ids, logprobs, finish_reason))
    return completions


def _list_of(content: dict[str, Any], field: str, length: int) -> list[Any]:
    value = content.get(field)
    if not isinstance(value, list):
        raise RolloutError(f"system_fingerprint: {field} is {value!r:.60}, not a list")
    if len(value) != length:
        raise RolloutError(
            f"system_fingerprint: {field} has {len(value)} entries for {length} choices"
        )
    return value


def _checked_ids(ids: Any, number: int, vocab_size: int | None) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise RolloutError(f"choice {number}: completion_ids is {ids!r:.60}, not a filled list")
    for place, token in enumerate(ids):
        # bool is an int in Python; a JSON true is not a token.
        if type(token) is not int or not 0 <= token < _MOST_TOKENS:
            raise RolloutError(f"choice {number}, token {place}: {token!r:.40} is not a token id")
        if vocab_size is not None and token >= vocab_size:
            raise RolloutError(
                f"choice {number}, token {place}: id {token} is outside the vocabulary of "
                f"{vocab_size}; the server runs another model than this client expects"
            )
    return ids


def _checked_logprobs(packed: Any, number: int, length: int) -> list[float]:
    values = unpack_floats(packed, f"choice {number}: packed_chosen_logprobs")
    if len(values) != length:
        raise AnswerCutShort(
            f"choice {number}: {len(values)} log-probs for {length} tokens; they must be as many"
        )
    bad = np.flatnonzero(~np.isfinite(values) | (values > MAX_LOGPROB))
    if len(bad):
        place = int(bad[0])
        raise RolloutError(
            f"choice {number}, token {place}: log-prob {values[place]} ({len(bad)} of {length} are "
            "not finite or above 0); the cartridge or the server's computation is broken, and "
            "nothing must train on it"
        )
    return [float(value) for value in values]
