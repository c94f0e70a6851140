"""From the JSON of a completion to checked tokens: as many as the answer itself says there are."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from pydantic import ValidationError

from cartridge_distill.rollout.fingerprint import (
    AnswerCutShort,
    Completion,
    decode_fingerprint,
)
from cartridge_distill.rollout.protocol import CompletionResponse
from cartridge_distill.util.errors import RolloutError


def read_answer(
    body: Any,
    n: int,
    max_tokens: int,
    vocab_size: int | None = None,
    end_ids: Set[int] | None = None,
) -> list[Completion]:
    """The n completions of an answer.

    Args:
        body: the parsed JSON.
        n, max_tokens: as asked for.
        vocab_size: when given, ids must be below it.
        end_ids: when given, an answer that ended with "stop" must end with one of them.

    Raises:
        AnswerCutShort: tokens are missing; the same request may well succeed.
        RolloutError: the answer is nonsense.
    """
    try:
        answer = CompletionResponse.model_validate(body)
    except ValidationError as error:
        raise RolloutError(first_problem(error)) from error
    if len(answer.choices) != n:
        raise RolloutError(f"{len(answer.choices)} choices, asked for {n}")
    places = [choice.index for choice in answer.choices]
    if places != list(range(n)):
        raise RolloutError(f"the choices have the places {places[:8]}, not 0 to {n - 1} in order")
    reasons = [choice.finish_reason for choice in answer.choices]
    completions = decode_fingerprint(answer.system_fingerprint, reasons, vocab_size)
    for number, completion in enumerate(completions):
        _check_length(number, completion, max_tokens, end_ids)
    return completions


def _check_length(
    number: int, completion: Completion, max_tokens: int, end_ids: Set[int] | None
) -> None:
    """The reason and the number of tokens must agree: nobody would notice a shorter answer."""
    reason, count = completion.finish_reason, len(completion.token_ids)
    if count > max_tokens:
        raise RolloutError(f"choice {number} has {count} tokens, asked for at most {max_tokens}")
    if reason not in ("stop", "length"):
        raise RolloutError(
            f"choice {number} ended with finish_reason {reason!r}, not 'stop' or 'length'"
        )
    if reason == "length" and count < max_tokens:
        raise AnswerCutShort(
            f"choice {number} has {count} tokens and finish_reason 'length', which would be "
            f"{max_tokens} tokens: the answer was shortened on its way"
        )
    last = completion.token_ids[-1]
    if reason == "stop" and end_ids is not None and last not in end_ids:
        raise AnswerCutShort(
            f"choice {number} has finish_reason 'stop' and ends with token {last}, which ends no "
            f"answer of this model ({sorted(end_ids)} do): the answer was shortened on its way, or "
            "the server runs another model"
        )


def first_problem(error: ValidationError) -> str:
    """The first of a pydantic error's problems, in words and without the input."""
    problem = error.errors(include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"the answer does not follow the protocol: {where}: {problem['msg']}"
