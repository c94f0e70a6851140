"""Generated answers, as LongHealth is asked: lettered options, reasoning first, closest option.

The task and its form, five options of which the answer names one by letter and text, are
LongHealth's (Adams et al., arXiv 2401.14490). That the model reasons first, is sampled at
temperature 0.3, and that its answer counts as the option closest to it, is how the Cartridges paper
(arXiv 2506.06266) evaluates on LongHealth.

How free text becomes an option, by either of two rules (:data:`READINGS`):

* ``named``, the default: the option that the answer names, none where it names none or several. It
  is in :mod:`cartridge_distill.evaluation.named_option`.
* ``closest``, the protocol of the paper: there is always one (:func:`closest_option`).

  1. The *final part* is what stands in the last ``<answer>``, to ``</answer>`` or the end; without
     one, what follows the last "answer is"; without that, the last line that is not empty.
  2. If it is an option's text ("E. coli"), case and a full stop aside, that is the option.
  3. If it begins with an option's letter that stands alone ("C", "(C)", "C: 12 mg", "Option C."),
     that is the option. A letter followed by a space and a word ("A bakery") is an article.
  4. Else the option whose text is closest to it, case aside: the largest ratio of
     ``difflib.SequenceMatcher``, of equal ones the first. So "Answer: C" and "I do not know" are
     options too, and mostly wrong ones.
  5. An empty final part is no option, and wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from string import ascii_lowercase, ascii_uppercase
from typing import Any, Protocol

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.data.records import Question
from cartridge_distill.evaluation.conditions import View
from cartridge_distill.evaluation.named_option import ANSWER_TAG, chosen_option
from cartridge_distill.evaluation.names import CLOSEST, MAX_NEW_TOKENS, NAMED, TEMPERATURE
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.scoring import sampled_answers
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import ConfigError

_ASKED = """{question}

Options:
{options}

Think step by step first. Then give the letter of the right option, a colon and the option's exact \
text, between <answer> and </answer>."""

_ANSWER_IS = re.compile(r"\banswer is:?\s*([^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"\W*(?:option\W+)?([A-Z])(?:\W*$|[).:,\]*]|\s+-\s)", re.IGNORECASE)


def lettered(question: Question) -> str:
    """The user's turn: the question, its options by letter, and how to answer."""
    options = "\n".join(
        f"{letter}: {text}" for letter, text in zip(ascii_uppercase, question.options, strict=False)
    )
    return _ASKED.format(question=question.question, options=options)


def final_part(text: str) -> str:
    """What of an answer says the option, see the module."""
    if tagged := ANSWER_TAG.findall(text):
        return str(tagged[-1]).strip()
    if said := _ANSWER_IS.findall(text):
        return str(said[-1]).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def closest_option(text: str, options: Sequence[str]) -> int | None:
    """The option closest to an answer, by the rule of the module; None where it says nothing."""
    said = final_part(text).lower().rstrip(".")
    texts = [option.lower().rstrip(".") for option in options]
    if not said:
        return None
    if said in texts:
        return texts.index(said)
    letter = _LETTER.match(said)
    if letter and (place := ascii_lowercase.index(letter[1])) < len(options):
        return place
    closeness = [SequenceMatcher(None, said, option).ratio() for option in texts]
    return max(range(len(options)), key=closeness.__getitem__)


Reading = Callable[[str, Sequence[str]], int | None]
"""A text and the options' texts -> the place of an option, or None."""

READINGS: dict[str, Reading] = {NAMED: chosen_option, CLOSEST: closest_option}
"""How free text becomes an option, by the names that ``--read-answers`` takes."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from ``seed`` and the prompt. Tokasaurus draws as it likes."""

    temperature: float = TEMPERATURE
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0

    def generator(self, prompt: Sequence[int]) -> random.Random:
        """The random numbers of a prompt: the same in every condition, whatever else runs."""
        digest = hashlib.sha256(repr((self.seed, list(prompt))).encode()).digest()
        return random.Random(int.from_bytes(digest[:16], "big"))

    def request_seed(self, prompt: Sequence[int]) -> int:
        """The seed of one request to a server, below 2**31: asked again, it draws the same."""
        digest = hashlib.sha256(repr(("request", self.seed, list(prompt))).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Answerer(Protocol):
    """Continues prompts behind what was read."""

    def answer(
        self, condition: str, views: Sequence[View], prompts: Sequence[list[int]]
    ) -> list[str]:
        """B texts for B prompts."""
        ...


Heard = Callable[[int], None]
"""Takes numbers of new tokens, as they come."""


class LocalAnswerer:
    """The embedded engine, on the model that is being evaluated."""

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, heard: Heard | None = None
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._heard = heard

    def answer(
        self, condition: str, views: Sequence[View], prompts: Sequence[list[int]]
    ) -> list[str]:
        """Raises ConfigError where prefix, prompt and answer are over the model's context."""
        prefixes, heard = [view.prefix for view in views], self._heard
        new = self._sampling.max_new_tokens
        for view, prompt in zip(views, prompts, strict=True):
            check_context(self._model, view, [prompt], new, "--max-new-tokens")
        found = sampled_answers(
            self._model,
            prefixes,
            prompts,
            self._sampling.max_new_tokens,
            self._sampling.temperature,
            [self._sampling.generator(prompt) for prompt in prompts],
            end_ids(self._model, self._tokenizer),
            on_token=None if heard is None else lambda _: heard(1),
        )
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


def check_context(
    model: Any, view: View, prompts: Sequence[Sequence[int]], new: int, option: str
) -> None:
    """Refuses what the model has no positions for.

    Args:
        view: what was read before the prompts.
        new: tokens of an answer, at most.
        option: that says how many they are.

    Raises:
        ConfigError: what was read, a prompt and an answer are over the model's context.
    """
    check_lengths(
        model,
        view.kv_tokens,
        prompts,
        new,
        f"lower {option}, or leave the condition out of --conditions",
    )


def check_lengths(
    model: Any, kv_tokens: int, prompts: Sequence[Sequence[int]], new: int, fix: str
) -> None:
    """As :func:`check_context`, of what is known before anything was read.

    Raises:
        ConfigError: what was read, a prompt and an answer are over the model's context.
    """
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if limit is not None and kv_tokens + longest + new > limit:
        raise ConfigError(
            f"{kv_tokens} KV tokens, a question of {longest} and an answer of up to {new} "
            f"are over the model's context of {limit}; fix: {fix}"
        )


class ServerAnswerer:
    """A running server.

    What the model has read goes as token ids before the prompt; the trained cartridge, which has
    none, by the id it is served under.

    Args:
        served: condition -> the cartridge's id on the server.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        sampling: Sampling,
        served: dict[str, CartridgeRef],
        heard: Heard | None = None,
    ) -> None:
        self._url, self._tokenizer = url, tokenizer
        self._sampling, self._served, self._heard = sampling, served, heard

    def answer(
        self, condition: str, views: Sequence[View], prompts: Sequence[list[int]]
    ) -> list[str]:
        """Raises ConfigError for a cartridge without an id on the server, RolloutError else."""
        cartridges: list[CartridgeRef] = []
        before: list[list[int]] = []
        for view in views:
            if condition in self._served:
                cartridges = [self._served[condition]]
                before.append([])
            elif view.ids is None:
                raise ConfigError(
                    f"{condition!r} has no tokens that could be sent to {self._url}; fix: say the "
                    "id it is served under (--served), or leave it out of --conditions"
                )
            else:
                before.append(list(view.ids))
        asked = [[*ids, *prompt] for ids, prompt in zip(before, prompts, strict=True)]
        found = asyncio.run(self._complete(asked, cartridges))
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]

    async def _complete(
        self, prompts: Sequence[list[int]], cartridges: Sequence[CartridgeRef]
    ) -> list[list[int]]:
        sampling = self._sampling
        async with TokasaurusClient(self._url) as client:
            await client.wait_until_ready()

            async def one(prompt: list[int]) -> list[int]:
                [completion] = await client.complete(
                    prompt,
                    sampling.max_new_tokens,
                    sampling.temperature,
                    cartridges,
                    seed=sampling.request_seed(prompt),
                )
                if self._heard is not None:
                    self._heard(len(completion.token_ids))
                return completion.token_ids

            return await asyncio.gather(*map(one, prompts))


def lettered_prompt(tokenizer: Any, question: Question) -> list[int]:
    """Ids of the question as :func:`lettered` puts it."""
    return started_prompt(tokenizer, lettered(question))
