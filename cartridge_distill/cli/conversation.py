"""Questions to a model behind a prefix: nothing, a cartridge, or the document's own KV.

The prefix is the beginning of the model's KV cache: the ids of `render_prompt` follow it, at the
positions after its own. The model computes with its own attention, not with the packed one.

Not done here: the terminal (`cartridge_distill.cli.terminal`), serving
(`cartridge_distill.server`), or keeping the KV of earlier turns, which are short.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from cartridge_distill.cartridge.kv_shape import check_fits, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.prompts import Message, render_alone, render_prompt
from cartridge_distill.util.errors import ConfigError

_AT_ONCE = 512
_LEAST_REPEATED = 24
_LONGEST_PERIOD = 64
View = Prefix | Callable[[], Prefix] | None
Ended = Literal["end", "length", "interrupted", "repeats"]


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    prefix: Prefix | None,
    messages: Sequence[Message],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: Any = None,
    stop: StoppingCriteria | None = None,
) -> list[int]:
    """The ids the model answers with, the end token included.

    Args:
        model: an ordinary transformers model (its own attention, not the packed one).
        prefix: what stands in for the document; None for the bare model, which begins as it always
            does (:func:`cartridge_distill.model.prompts.begin_of_text`).
        messages: the conversation; a last assistant message is a started answer.
        temperature: 0 takes the most likely token.
        streamer: gets the ids as they come.
        stop: ends the answer early.

    Raises:
        CartridgeFormatError: the prefix is of another model.
    """
    length = 0
    cache = None
    if prefix is None:
        prompt = render_alone(tokenizer, messages)
    else:
        prompt = render_prompt(tokenizer, messages)
        check_fits(prefix.kv_shape, model.config)
        length = prefix.num_tokens
        cache = prefix.to(model.device, model.dtype).as_cache()
    # generate() takes the ids of the whole context and skips those whose KV the cache holds: the
    # prefix's places need ids, but these are never looked up.
    filler = tokenizer.eos_token_id or 0
    ids = torch.tensor([[filler] * length + prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        pad_token_id=filler,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([stop] if stop is not None else []),
        **(sampling or {"do_sample": False}),
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


@torch.no_grad()
def document_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    """The KV of a document, by the model's own attention, some hundred tokens at a time.

    Args:
        ids: from :func:`cartridge_distill.model.prompts.render_document`.
    """
    cache = DynamicCache()  # without a config: keeps every token, also on windowed layers
    for piece in torch.tensor([list(ids)], device=model.device).split(_AT_ONCE, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix([one.keys for one in cache.layers], [one.values for one in cache.layers])


def repeats(ids: Sequence[int]) -> bool:
    """Whether an answer goes round: its end is the same tokens three times, 24 of them at least.

    Greedy decoding of a small model does not leave such a circle any more.
    """
    for period in range(1, _LONGEST_PERIOD + 1):
        times = max(3, -(-_LEAST_REPEATED // period))
        if times * period > len(ids):
            continue
        tail = list(ids[-times * period :])
        if tail == tail[:period] * times:
            return True
    return False


class Stop(StoppingCriteria):
    """Ends an answer when somebody wants it, or when it goes round in circles.

    Args:
        wanted: set from anywhere.
    """

    def __init__(self, wanted: threading.Event) -> None:
        self.wanted, self.goes_round = wanted, False
        self._begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        if self._begin is None:
            self._begin = input_ids.shape[1] - 1
        self.goes_round = repeats(input_ids[0, self._begin :].tolist())
        stop = self.wanted.is_set() or self.goes_round
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device)


@dataclass(frozen=True)
class Reply:
    """What was said to a question.

    Attributes:
        text: of the answer.
        tokens: of it, the end token included.
        seconds: it took, and until its first token.
        ended: why.
        left_out: earlier questions that no longer fitted.
    """

    text: str
    tokens: int
    seconds: float
    first_seconds: float
    ended: Ended
    left_out: int = 0


@dataclass
class _Told:
    """Hands new text on as it comes; as transformers' streamers are called."""

    tokenizer: Any
    say: Callable[[str], None]
    ids: list[int] = field(default_factory=list)
    shown: str = ""
    first: float | None = None
    _is_prompt: bool = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.first = self.first or time.monotonic()
        self.ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not whole yet
            self._show(text)

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        new = text[len(self.shown) :]
        self.shown = text
        if new:
            self.say(new)


class Conversation:
    """One model behind several prefixes, each with turns of its own.

    Args:
        model: an ordinary transformers model.
        tokenizer: the model's.
        views: prefix by name; None for the bare model, a function for one that is computed when it
            is first asked.
        turns: earlier questions, with their answers, that stand before a new one at most.
        max_new_tokens, temperature: as :func:`reply` takes them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        views: Mapping[str, View],
        turns: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.views = model, tokenizer, dict(views)
        self.turns, self.max_new_tokens, self.temperature = turns, max_new_tokens, temperature
        self.context: int = text_config(model.config).max_position_embeddings
        self.interrupted = threading.Event()
        self._earlier: dict[str, list[Message]] = {name: [] for name in views}

    def reset(self) -> None:
        """Forgets all earlier turns."""
        for turns in self._earlier.values():
            turns.clear()

    def ask(
        self, view: str, question: str, say: Callable[[str], None], start: str | None = None
    ) -> Reply:
        """The answer behind one prefix; its text is handed to ``say`` as it comes.

        Args:
            start: beginning of the answer, for the model to go on from.

        Raises:
            ConfigError: the question alone does not fit the model's context, or cannot be rendered.
        """
        earlier = self._earlier[view]
        asked: Message = {"role": "user", "content": question}
        started: list[Message] = [{"role": "assistant", "content": start}] if start else []
        kept = len(earlier) - 2 * self.turns
        messages = [*(earlier[max(kept, 0) :] if self.turns else []), asked, *started]
        left_out = 0
        while (over := self._tokens_over(view, messages)) > 0:
            if messages[0] is asked:
                raise ConfigError(
                    f"the question and an answer of {self.max_new_tokens} tokens are {over} tokens "
                    f"over the model's context of {self.context}; fix: ask for less, or set a "
                    "smaller --max-new-tokens"
                )
            messages, left_out = messages[2:], left_out + 1
        prefix = self._prefix(view)
        told, stop = _Told(self.tokenizer, say), Stop(self.interrupted)
        begun = time.monotonic()
        new = reply(
            self.model,
            self.tokenizer,
            prefix,
            messages,
            self.max_new_tokens,
            self.temperature,
            told,
            stop,
        )
        ended = time.monotonic()
        text = (start or "") + self.tokenizer.decode(new, skip_special_tokens=True)
        if text.strip():
            earlier += [asked, {"role": "assistant", "content": text}]
        first = (told.first or ended) - begun
        return Reply(text, len(new), ended - begun, first, self._why(new, stop), left_out)

    def _prefix(self, view: str) -> Prefix | None:
        found = self.views[view]
        if callable(found):
            found = self.views[view] = found()
        return found

    def _tokens_over(self, view: str, messages: Sequence[Message]) -> int:
        """Tokens that the model's context lacks."""
        prefix = self._prefix(view)
        render = render_prompt if prefix is not None else render_alone
        before = prefix.num_tokens if prefix is not None else 0
        return before + len(render(self.tokenizer, messages)) + self.max_new_tokens - self.context

    def _why(self, new: Sequence[int], stop: Stop) -> Ended:
        if stop.wanted.is_set():
            return "interrupted"
        if stop.goes_round:
            return "repeats"
        return "length" if len(new) >= self.max_new_tokens else "end"
