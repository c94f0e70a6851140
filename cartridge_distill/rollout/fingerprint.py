"""What ``system_fingerprint`` carries: the token ids and log-probs of a completion.

It is a JSON *string*; the client decodes with this, the embedded server encodes with it:

=========================  =====================================================================
``completion_ids``         n lists of token ids, the end token included
``packed_chosen_logprobs`` n base64 strings of little-endian float32, or null
``packed_topk_indices``    n base64 strings of little-endian int32, or null
``packed_topk_logprobs``   n base64 strings of little-endian float32, or null
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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cartridge_distill.util.errors import RolloutError

# A probability computed in float32 can come out a rounding above 1; more than this is not rounding.
MAX_LOGPROB = 1e-4


@dataclass(frozen=True)
class ChoiceTokens:
    """The tokens of one choice.

    Attributes:
        token_ids: n_tokens ids, the end token included when one was sampled.
        logprobs: as many natural logs of the probability each token was sampled with (of the
            tempered distribution), or None when they were not asked for.
        topk_ids, topk_logprobs: ``[n_tokens, k]``, or None.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    topk_ids: list[list[int]] | None = None
    topk_logprobs: list[list[float]] | None = None


def pack_floats(values: Sequence[float] | Sequence[Sequence[float]]) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def pack_ints(values: Sequence[int] | Sequence[Sequence[int]]) -> str:
    """Base64 of little-endian int32."""
    return base64.b64encode(np.asarray(values, dtype="<i4").tobytes()).decode("ascii")


def unpack(packed: Any, dtype: Literal["<f4", "<i4"], what: str) -> npt.NDArray[Any]:
    """The inverse of the two functions above, 1-D.

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
        raise RolloutError(f"{what} holds {len(raw)} bytes, not a multiple of 4: it was cut short")
    return np.frombuffer(raw, dtype=dtype)


def encode_fingerprint(choices: Sequence[ChoiceTokens], with_logprobs: bool) -> str:
    """The ``system_fingerprint`` string for n choices.

    Raises:
        ValueError: log-probs are wanted and a choice has none.
    """
    content: dict[str, Any] = {
        "completion_ids": [list(choice.token_ids) for choice in choices],
        "packed_chosen_logprobs": None,
        "packed_topk_indices": None,
        "packed_topk_logprobs": None,
    }
    if with_logprobs:
        chosen = [choice.logprobs for choice in choices if choice.logprobs is not None]
        if len(chosen) != len(choices):
            raise ValueError("log-probs are to be packed, and a choice carries none")
        content["packed_chosen_logprobs"] = [pack_floats(values) for values in chosen]
        topk_ids = [choice.topk_ids for choice in choices if choice.topk_ids is not None]
        topk = [choice.topk_logprobs for choice in choices if choice.topk_logprobs is not None]
        if topk_ids and len(topk_ids) == len(topk) == len(choices):
            content["packed_topk_indices"] = [pack_ints(rows) for rows in topk_ids]
            content["packed_topk_logprobs"] = [pack_floats(rows) for rows in topk]
    return json.dumps(content)


def decode_fingerprint(
    fingerprint: str | None,
    num_choices: int,
    vocab_size: int | None = None,
    require_logprobs: bool = True,
) -> list[ChoiceTokens]:
    """Reads and checks a ``system_fingerprint``.

    Args:
        fingerprint: the string of the response.
        num_choices: how many choices were asked for.
        vocab_size: when given, ids must be below it.
        require_logprobs: an answer without log-probs is an error.

    Returns:
        One entry per choice.

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
    except json.JSONDecodeError as error:
        raise RolloutError(
            f"system_fingerprint is not JSON ({error}); it begins {fingerprint[:60]!r}"
        ) from error
    if not isinstance(content, dict):
        raise RolloutError(f"system_fingerprint is a {type(content).__name__}, not an object")
    all_ids = _list_of(content, "completion_ids", num_choices)
    packed = content.get("packed_chosen_logprobs")
    if packed is None and require_logprobs:
        raise RolloutError(
            "packed_chosen_logprobs is null: the request must say logprobs_in_fingerprint=true and "
            "the server must compute chosen log-probs (enable_chosen_logprobs)"
        )
    all_logprobs = (
        None if packed is None else _list_of(content, "packed_chosen_logprobs", num_choices)
    )
    choices = []
    for number in range(num_choices):
        ids = _checked_ids(all_ids[number], number, vocab_size)
        logprobs = None
        if all_logprobs is not None:
            logprobs = _checked_logprobs(all_logprobs[number], number, len(ids))
        topk_ids, topk_logprobs = _topk(content, number, num_choices, len(ids))
        choices.append(ChoiceTokens(ids, logprobs, topk_ids, topk_logprobs))
    return choices


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
        if type(token) is not int or token < 0:
            raise RolloutError(f"choice {number}, token {place}: {token!r} is not a token id")
        if vocab_size is not None and token >= vocab_size:
            raise RolloutError(
                f"choice {number}, token {place}: id {token} is outside the vocabulary of "
                f"{vocab_size}; the server runs another model than this client expects"
            )
    return ids


def _checked_logprobs(packed: Any, number: int, length: int) -> list[float]:
    values = unpack(packed, "<f4", f"choice {number}: packed_chosen_logprobs")
    if len(values) != length:
        raise RolloutError(
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


def _topk(
    content: dict[str, Any], number: int, num_choices: int, length: int
) -> tuple[list[list[int]] | None, list[list[float]] | None]:
    if content.get("packed_topk_indices") is None or content.get("packed_topk_logprobs") is None:
        return None, None
    what = f"choice {number}: packed_topk"
    ids = unpack(_list_of(content, "packed_topk_indices", num_choices)[number], "<i4", what)
    logprobs = unpack(_list_of(content, "packed_topk_logprobs", num_choices)[number], "<f4", what)
    if len(ids) != len(logprobs) or not len(ids) or len(ids) % length:
        raise RolloutError(
            f"{what}: {len(ids)} indices and {len(logprobs)} log-probs for {length} tokens"
        )
    return ids.reshape(length, -1).tolist(), logprobs.reshape(length, -1).tolist()
