"""What a request says of its cartridges, and when it must not be computed.

A request with cartridges is P placeholders and at least one token of a prompt. It says in
``kv_transfer_params`` which cartridges stand for the placeholders. Whatever would make vLLM compute
a placeholder as if it were text gives a wrong answer that looks like a right one, so it is refused
here: by the front, in words, and by the connector once more, for requests that came another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cartridge_distill.util.errors import CartridgeDistillError

PARAMETER = "cartridge"
"""The key in ``kv_transfer_params``."""
PLACEHOLDER = 0
"""The token that stands where a cartridge's keys and values go. Any would do: it is never computed,
and what counts tokens of a prompt is refused."""


class Misused(CartridgeDistillError):
    """A request with cartridges that must not be computed; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """The cartridges of one request.

    Attributes:
        ids: in the order in which they are joined.
        tokens: P, of all together.
        content: stands for their weights, see ``catalogue``.
    """

    ids: tuple[str, ...]
    tokens: int
    content: str

    @property
    def salt(self) -> str:
        """Requests share blocks of the prefix cache only where this is equal."""
        return f"cartridge {self.content} {' '.join(self.ids)}"

    def parameters(self) -> dict[str, Any]:
        """``kv_transfer_params`` of the request."""
        return {PARAMETER: {"ids": list(self.ids), "tokens": self.tokens, "content": self.content}}

    def prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt with its placeholders."""
        return [PLACEHOLDER] * self.tokens + list(prompt_ids)


def read_parameters(parameters: Mapping[str, Any] | None) -> Wanted | None:
    """What ``kv_transfer_params`` say; None where they say nothing.

    Raises:
        Misused: they say something that is not known here.
    """
    if not parameters:
        return None
    if not isinstance(parameters, Mapping):
        raise Misused(f"kv_transfer_params is a {type(parameters).__name__}, not an object")
    unknown = sorted(map(str, parameters.keys() - {PARAMETER}))
    if unknown:
        raise Misused(f"kv_transfer_params has {', '.join(unknown)}, which is not known here")
    given = parameters[PARAMETER]
    if not isinstance(given, Mapping) or given.keys() != {"ids", "tokens", "content"}:
        raise Misused(
            f"kv_transfer_params.{PARAMETER} is not what this server's front writes; ask for a "
            "cartridge by the model's name, or with the field `cartridges`"
        )
    ids, tokens, content = given["ids"], given["tokens"], given["content"]
    if not (
        isinstance(ids, (list, tuple))
        and ids
        and all(isinstance(one, str) for one in ids)
        and type(tokens) is int
        and tokens > 0
        and isinstance(content, str)
    ):
        raise Misused(f"kv_transfer_params.{PARAMETER} holds a value of a wrong type")
    return Wanted(tuple(ids), tokens, content)


def check_request(wanted: Wanted, prompt_ids: Sequence[int] | None, sampling: Any) -> None:
    """Looks at a request as vLLM's scheduler has it.

    Args:
        prompt_ids: with the placeholders; None for a prompt of embeddings.
        sampling: vLLM's ``SamplingParams``; None for pooling.

    Raises:
        Misused: it would compute a placeholder, or count one.
    """
    if sampling is None:
        raise Misused("a cartridge is for generating text, not for pooling")
    if prompt_ids is None:
        raise Misused("a prompt of embeddings cannot follow a cartridge; send token ids")
    if len(prompt_ids) <= wanted.tokens:
        raise Misused(
            f"{len(prompt_ids)} tokens with a cartridge of {wanted.tokens}: at least one token of "
            "a prompt must follow it"
        )
    if any(token != PLACEHOLDER for token in prompt_ids[: wanted.tokens]):
        raise Misused(
            f"the first {wanted.tokens} tokens must be placeholders (token {PLACEHOLDER}): the "
            "cartridge's keys and values go there"
        )
    if getattr(sampling, "prompt_logprobs", None) is not None:
        raise Misused("prompt_logprobs with a cartridge: its tokens have none")
    if getattr(sampling, "skip_reading_prefix_cache", None):
        raise Misused("skip_reading_prefix_cache with a cartridge would compute its placeholders")
    if getattr(sampling, "repetition_penalty", 1.0) != 1.0:
        raise Misused("repetition_penalty with a cartridge would count its placeholders")
