"""Between the wire and the engine: what is refused, what a request means, how an answer is made.

The refusals are the real server's (HTTP 400), with the reason in ``detail``. What it does not
check, and what kills or poisons a server, is refused here as well: an empty prompt, token ids
outside the vocabulary, a temperature below 0 or so small that dividing by it overflows, and text
that is longer than any text of the allowed number of tokens.

Differences that a client can see, all on purpose:

- chat with cartridges renders the messages as training does (``prompts.render_prompt``: no
  begin-of-text token, no system prompt of the template's own). The real server does so for Llama
  and leaves other models' templates as they are;
- ``<cartridge>{...}</cartridge>`` blocks inside a system message are not interpreted;
- choices come in order of index (there: in the order in which they finished).
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cartridge_distill.model.contents import Contents
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.rollout.fingerprint import Completion, encode_fingerprint
from cartridge_distill.rollout.limits import MAX_TEXT_CHARS
from cartridge_distill.rollout.protocol import (
    CartridgeChatCompletionRequest,
    CartridgeCompletionRequest,
    CartridgeRef,
    ChatAnswer,
    ChatChoice,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    PromptTokensDetails,
    Usage,
)
from cartridge_distill.util.errors import ConfigError

AnyRequest = CompletionRequest | ChatCompletionRequest

_LEAST_TEMPERATURE = 1e-6
# A template is the model's own program; it fails over messages that it does not expect.
_TEMPLATE_FAILS = (
    *(TemplateError, ConfigError, ValueError, TypeError),
    *(LookupError, AttributeError, ArithmeticError),
)


class Refused(Exception):
    """The request is not served; the message goes to the client with HTTP 400."""


class TooLong(Refused):
    """Prompt and answer are together longer than this server takes, all counted in tokens."""

    def __init__(self, prompt: int, new: int, limit: int) -> None:
        super().__init__(
            f"prompt of {prompt} tokens and max_tokens={new} are together over the maximum number "
            f"of tokens per request, {limit}; shorten one, or start the server with a larger "
            "--max-tokens-per-request"
        )
        self.prompt, self.new, self.limit = prompt, new, limit


@dataclass(frozen=True)
class Limits:
    """What requests are held against.

    Attributes:
        max_tokens_per_request: prompt and answer together.
        vocab_size: of the model.
        max_text_chars: text that is longer has more tokens than that, whatever it says. It is not
            given to the tokenizer, whose time and memory grow with it.
    """

    max_tokens_per_request: int
    vocab_size: int
    max_text_chars: int = MAX_TEXT_CHARS


@dataclass(frozen=True)
class Job:
    """A request in the engine's terms."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    num_choices: int
    cartridges: list[CartridgeRef]
    stop: list[str]
    ignore_eos: bool


def to_job(
    request: AnyRequest,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    document: Sequence[int] = (),
) -> Job:
    """Reads a validated body.

    Args:
        document: ids that stand before a chat, which is then rendered as behind a cartridge.

    Raises:
        Refused: with the reason.
    """
    _refuse_unsupported(request)
    if isinstance(request, ChatCompletionRequest):
        max_tokens = _chat_max_tokens(request)
    elif request.max_tokens is None:
        raise Refused("max_tokens set is required")
    else:
        max_tokens = request.max_tokens
    if max_tokens <= 0:
        raise Refused(f"max_tokens={max_tokens}: must be greater than 0")
    cartridges: list[CartridgeRef] = []
    if isinstance(request, CartridgeCompletionRequest | CartridgeChatCompletionRequest):
        cartridges = request.cartridges or []
    num_choices = 1 if request.n is None else request.n
    if num_choices < 1:
        raise Refused(f"n={num_choices}: must be at least 1")
    # As on the real server, a temperature of null means greedy, not the field's default.
    temperature = 0.0 if request.temperature is None else request.temperature
    if not math.isfinite(temperature) or temperature < 0:
        raise Refused(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise Refused(
            f"temperature={temperature}: logits divided by so little overflow; use 0 (greedy), or "
            f"{_LEAST_TEMPERATURE} or more"
        )
    if isinstance(request, ChatCompletionRequest):
        behind = bool(cartridges or document)
        prompt_ids = [*document, *_chat_ids(request, behind, tokenizer, limits)]
    else:
        prompt_ids = _completion_ids(request, tokenizer, limits)
    if not prompt_ids:
        raise Refused("the prompt is empty: the model needs at least one token to go on from")
    outside = [token for token in prompt_ids if not 0 <= token < limits.vocab_size]
    if outside:
        raise Refused(
            f"the prompt has token id {outside[0]}, outside the model's vocabulary of "
            f"{limits.vocab_size}; it was made with another tokenizer"
        )
    if len(prompt_ids) + max_tokens > limits.max_tokens_per_request:
        raise TooLong(len(prompt_ids), max_tokens, limits.max_tokens_per_request)
    return Job(
        prompt_ids=prompt_ids,
        max_new_tokens=max_tokens,
        temperature=temperature,
        num_choices=num_choices,
        cartridges=cartridges,
        stop=[request.stop] if isinstance(request.stop, str) else list(request.stop or []),
        ignore_eos=request.ignore_eos,
    )


def _refuse_unsupported(request: AnyRequest) -> None:
    for name, neutral in (
        ("top_p", (None, 1.0)),
        ("frequency_penalty", (None, 0.0)),
        ("presence_penalty", (None, 0.0)),
        ("logit_bias", (None,)),
    ):
        if getattr(request, name) not in neutral:
            shown = "" if name == "logit_bias" else f"={getattr(request, name)}"
            raise Refused(f"{name}{shown} not supported; leave it out")
    if isinstance(request, ChatCompletionRequest):
        top = request.top_logprobs
        if top is not None and not request.logprobs:
            raise Refused("logprobs must be true if top_logprobs is set")
    else:
        top = request.logprobs
        if request.echo not in (None, False):
            raise Refused("echo not supported: there are no prompt log-probs in this protocol")
        if request.best_of not in (None, 1):
            raise Refused(f"best_of={request.best_of} not supported; leave it out")
        if request.suffix is not None:
            raise Refused("suffix not supported; leave it out")
    if top is not None and top < 0:
        raise Refused(f"logprobs={top}: must be non-negative")
    if top:
        raise Refused(
            f"logprobs={top}, but this server has no top-k log-probs (max_topk_logprobs is unset, "
            "the real server's default); chosen log-probs come with logprobs_in_fingerprint=true"
        )


def _chat_max_tokens(request: ChatCompletionRequest) -> int:
    given = [n for n in (request.max_tokens, request.max_completion_tokens) if n is not None]
    if len(given) != 1:
        raise Refused("exactly one of max_tokens or max_completion_tokens must be set")
    return given[0]


def is_work(request: AnyRequest) -> bool:
    """Whether :func:`to_job` has text to render or tokenize, which takes time."""
    return isinstance(request, ChatCompletionRequest) or isinstance(request.prompt, str)


def longest_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> int:
    """Characters that ``tokens`` tokens can stand for at most."""
    longest = max((len(text) for text in tokenizer.get_vocab()), default=1)
    return min(tokens * longest, MAX_TEXT_CHARS)


def _check_length(num_chars: int, limits: Limits) -> None:
    if num_chars > limits.max_text_chars:
        raise Refused(
            f"the prompt's text has {num_chars} characters; the maximum number of tokens per "
            f"request, {limits.max_tokens_per_request}, is at most {limits.max_text_chars}"
        )


def _completion_ids(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, str):
        _check_length(len(prompt), limits)
        return list(tokenizer(prompt).input_ids)
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) != len(prompt):
        raise Refused(
            "invalid type for prompt: a string or one flat list of token ids is served, not a list "
            "of prompts; send one request per prompt"
        )
    return ids


def _chat_ids(
    request: ChatCompletionRequest,
    with_cartridge: bool,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> list[int]:
    messages: list[dict[str, Any]] = []
    for message in request.messages:
        content = message.content
        if not isinstance(content, str):
            if len(content) != 1:
                raise Refused(
                    f"a message's content has {len(content)} parts; one text part is supported"
                )
            content = content[0].text
        messages.append({"role": message.role, "content": content})
    if not messages:
        raise Refused("messages is empty: at least one message is needed")
    _check_length(sum(len(message["content"]) for message in messages), limits)
    switches = request.apply_chat_template_overrides
    overrides = switches.model_dump(exclude_none=True) if switches is not None else {}
    try:
        if with_cartridge and not overrides:
            return render_prompt(tokenizer, messages)
        if tokenizer.chat_template is None:
            raise Refused(
                "the model's tokenizer has no chat template; use the completions endpoint"
            )
        ends_with_user = messages[-1]["role"] == "user"
        # Whatever the client says is text, a template's own variables too.
        said = [message["content"] for message in messages]
        said += [value for value in overrides.values() if isinstance(value, str)]
        contents = Contents(tokenizer, said)
        arguments: dict[str, Any] = {
            "add_generation_prompt": ends_with_user,
            "continue_final_message": not ends_with_user,
        } | {name: _marked(contents, value) for name, value in overrides.items()}
        arguments["tokenize"] = False
        for turn in messages:  # earlier answers as in `render_prompt`
            earlier_answer = turn["role"] == "assistant" and turn is not messages[-1]
            turn["content"] = contents.mark(turn["content"], not earlier_answer)
        text = str(tokenizer.apply_chat_template(messages, **arguments))
        _check_length(len(text), limits)
        return contents.ids(text)
    except _TEMPLATE_FAILS as error:
        raise Refused(f"the chat template refuses these messages: {error}") from error


def _marked(contents: Contents, switch: object) -> object:
    return contents.mark(switch) if isinstance(switch, str) else switch


def stop_check(
    stop: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[int]], bool] | None:
    """A function of all new ids: does a stop string stand at their end?"""
    if not stop:
        return None
    # A token is at least one byte, a character at most four; the rest is the token that carried
    # the string over.
    window = 4 * max(len(text) for text in stop) + 8

    def ends(new_ids: list[int]) -> bool:
        text = tokenizer.decode(new_ids[-window:], skip_special_tokens=False)
        return any(string in text for string in stop)

    return ends


def answer_text(
    result: Completion, job: Job, end_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """The new text, up to the end token and the first stop string, neither included."""
    ids = result.token_ids
    if not job.ignore_eos:
        ends = [place for place, token in enumerate(ids) if token in end_ids]
        ids = ids[: ends[0]] if ends else ids
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    places = [place for place in (text.find(string) for string in job.stop) if place >= 0]
    return text[: min(places)] if places else text


def _usage(job: Job, results: Sequence[Completion]) -> Usage:
    new = sum(len(result.token_ids) for result in results)
    prompt = len(job.prompt_ids) * len(results)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(result.shared_tokens for result in results)
        ),
    )


def completion_response(
    request: CompletionRequest,
    job: Job,
    results: Sequence[Completion],
    end_ids: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
) -> CompletionResponse:
    """The OpenAI completion, with the tokens in its fingerprint."""
    return CompletionResponse(
        id=str(uuid.uuid4()),
        created=int(time.time()),
        model=request.model,
        choices=[
            CompletionChoice(
                index=index,
                text=answer_text(result, job, end_ids, tokenizer),
                finish_reason=result.finish_reason,
            )
            for index, result in enumerate(results)
        ],
        usage=_usage(job, results),
        system_fingerprint=encode_fingerprint(results, request.logprobs_in_fingerprint),
    )


def chat_response(
    request: ChatCompletionRequest,
    job: Job,
    results: Sequence[Completion],
    end_ids: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
) -> ChatCompletionResponse:
    """The OpenAI chat completion, with the tokens in its fingerprint."""
    choices = []
    for index, result in enumerate(results):
        logprobs = None
        if request.logprobs and not request.logprobs_in_fingerprint:
            tokens = tokenizer.convert_ids_to_tokens(result.token_ids)
            logprobs = {
                "content": [
                    {"token": token, "bytes": [], "logprob": logprob, "top_logprobs": []}
                    for token, logprob in zip(tokens, result.logprobs, strict=True)
                ]
            }
        choices.append(
            ChatChoice(
                index=index,
                message=ChatAnswer(content=answer_text(result, job, end_ids, tokenizer)),
                logprobs=logprobs,
                finish_reason=result.finish_reason,
            )
        )
    return ChatCompletionResponse(
        id=str(uuid.uuid4()),
        created=int(time.time()),
        model=request.model,
        choices=choices,
        usage=_usage(job, results),
        system_fingerprint=encode_fingerprint(results, request.logprobs_in_fingerprint),
    )
