"""Training prompts that are cut out of the documents: started answers and open questions.

*Started*: the user asks about a section, and the assistant's answer has already begun with a true
sentence of the document, cut at a random token; the student goes on from there. This is what
teaches a small model. *Open*: questions about a section, for models that can answer them. *Mixed*:
one of each in turn. What a model writes itself is in `self_study/`.

No prompt contains an evaluation question or the stem of one: colliding cuts are dropped, counted.

Not done here: answers. They are sampled from the student as it trains, and the teacher, who has
the document, judges them; there is no reward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cartridge_distill.data.dataset import Row, alternate, make_row, numbered
from cartridge_distill.data.decontamination import Guard
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.documents.usable import FEWEST_WORDS
from cartridge_distill.data.prompt_length import PromptLimit
from cartridge_distill.data.rebuild import split_by_change
from cartridge_distill.data.words import words
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.util.errors import ConfigError

T = TypeVar("T")

PROMPT_RECIPES = ("started", "open", "mixed")

# Short, because every token of the user's turn is paid for in each of the three forwards.
STARTED_TURNS = (
    "Tell me about {section}.",
    "Describe {section}.",
    "What about {section}?",
    "{section}?",
)
OPEN_TURNS = {
    "record": (
        "Summarize what the record says about {section}.",
        "Which names, places and numbers does the record give about {section}?",
        "Explain {section} to the patient's family in plain words.",
        "List the facts that the record gives about {section}.",
        "Write three questions about {section} and answer them from the record.",
        "What should a new doctor know about {section}?",
    ),
    "file": (
        "Summarize what the document says about {section}.",
        "Which names, places and numbers does the document give about {section}?",
        "Explain {section} in plain words to someone who has not read the document.",
        "List the facts that the document gives about {section}.",
        "Write three questions about {section} and answer them from the document.",
        "What should someone who has to work with {section} know?",
    ),
}
# What a record's text without a heading of its own is asked about.
OPEN_TOPICS = (
    "the diagnoses",
    "the medication",
    "the laboratory values",
    "the imaging",
    "the operations and procedures",
    "the course of the illness",
    "the patient's history",
    "the plan after discharge",
)


@dataclass(frozen=True)
class Cut:
    """The beginning of a sentence, to be continued: one started answer less its user turn."""

    source: Source
    document_id: str
    section: str
    start: str
    rest: str


def cut_points(tokenizer: PreTrainedTokenizerBase, sentence: str) -> list[str]:
    """The beginnings of a sentence at which a started answer may stop.

    They lie in the later half of the sentence, at least 2 tokens in, before the last word: what is
    new in a sentence comes late, and there the teacher knows what the student does not. A cut
    counts only if its text, tokenised again behind the rendered prompt, gives the very tokens that
    the whole sentence begins with: the student must go on from a token sequence that the sentence
    itself could have.
    """

    def render(answer: str) -> list[int]:
        user = {"role": "user", "content": "?"}
        return render_prompt(tokenizer, [user, {"role": "assistant", "content": answer}])

    head, whole = render(""), render(sentence)
    if whole[: len(head)] != head:
        return []
    starts = []
    tokens = len(whole) - len(head)
    for cut in range(max(2, tokens // 2), max(3, tokens - 1)):
        end = len(head) + cut
        if end >= len(whole):
            break
        start = str(tokenizer.decode(whole[len(head) : end]))
        if sentence.startswith(start) and render(start) == whole[:end]:
            starts.append(start)
    return starts


def all_cuts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source], most: int, seed: int
) -> list[Cut]:
    """Every cut of the documents' sentences, of `most` sentences at random where there are more.

    Text that stands in a document twice is cut once.
    """
    found = [
        (source, part.document.document_id, section.heading, sentence)
        for source in sources
        for part in source.parts
        for section in source.sections
        if section.start < part.end and part.start < section.end
        for sentence in source.sentences(section, part)
        if source.kind == "record" or len(words(sentence)) >= FEWEST_WORDS
    ]
    if len(found) > most:
        chosen = sorted(random.Random(seed).sample(range(len(found)), most))
        found = [found[number] for number in chosen]
    cuts: dict[tuple[str, str], Cut] = {}
    bar = tqdm(found, desc="cutting sentences", unit="", leave=False, delay=3, disable=None)
    for source, document_id, heading, sentence in bar:
        fallback = "the patient" if source.kind == "record" else source.title
        section = heading.lower() if heading and source.kind == "record" else heading or fallback
        for start in cut_points(tokenizer, sentence):
            cut = Cut(source, document_id, section, start, sentence[len(start) :])
            cuts.setdefault((source.document_id, start), cut)
    return list(cuts.values())


def shuffled_passes(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """All items in random order, over and over: even coverage at any number of rows."""
    while True:
        yield from rng.sample(items, len(items))


def started_rows(cuts: Sequence[Cut], rng: random.Random, name_it: bool) -> Iterator[Row]:
    """A row for each cut, pass after pass without end; the caller stops."""
    for cut in shuffled_passes(cuts, rng):
        messages = rng.choice(_started_messages(cut, name_it))
        rest = cut.rest.strip()
        yield make_row(cut.source, cut.document_id, messages, "started", "started", rest)


def _started_messages(cut: Cut, name_it: bool) -> list[list[dict[str, str]]]:
    """The conversation of a cut, in every wording."""
    section = _about(cut.section, cut.source, name_it)
    return [
        [
            {"role": "user", "content": turn.format(section=section)},
            {"role": "assistant", "content": cut.start},
        ]
        for turn in STARTED_TURNS
    ]


def _open_messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _within(
    limit: PromptLimit | None,
    items: Sequence[T],
    wordings: Callable[[T], list[list[dict[str, str]]]],
    kind: str,
    say: Callable[[str], None],
) -> list[T]:
    """Those that are within the limit in every wording; says how many are not.

    Raises:
        ConfigError: all of them are too long.
    """
    if limit is None:
        return list(items)
    kept = [item for item in items if all(map(limit.fits, wordings(item)))]
    if len(kept) < len(items):
        say(f"{len(items) - len(kept)} {kind} prompts dropped: over {limit.tokens} tokens.")
    if items and not kept:
        shortest = min(max(map(limit.count, wordings(item))) for item in items)
        raise ConfigError(
            f"all {len(items)} {kind} prompts are over --prompt-tokens {limit.tokens} (the "
            f"shortest has {shortest}); fix: allow more, and train with the same --prompt-tokens"
        )
    return kept


def open_prompts(sources: Sequence[Source], name_it: bool) -> list[tuple[Source, str, str]]:
    """(source, id of what the teacher reads, prompt): every topic in every wording, once."""
    found = [
        (source, document_id, turn.format(section=_about(topic, source, name_it)))
        for source in sources
        for document_id, topic in _topics(source)
        for turn in OPEN_TURNS[source.kind]
    ]
    return list(
        {(source.document_id, text): (source, i, text) for source, i, text in found}.values()
    )


def open_rows(prompts: Sequence[tuple[Source, str, str]], rng: random.Random) -> Iterator[Row]:
    """A row for each prompt, pass after pass without end; the caller stops."""
    for source, document_id, text in shuffled_passes(prompts, rng):
        yield make_row(source, document_id, _open_messages(text), "open", "open")


def _topics(source: Source) -> list[tuple[str, str]]:
    """(id of what the teacher reads, topic): headings where there are some."""
    headed = [
        (source.part_at(section.start).document.document_id, section.heading)
        for section in source.sections
        if section.heading
    ]
    if source.kind == "record":
        headed = [(document_id, heading.lower()) for document_id, heading in headed]
    if headed:
        return headed
    ids = [part.document.document_id for part in source.parts]
    topics = OPEN_TOPICS if source.kind == "record" else (source.title,)
    if len(ids) == 1:
        return [(ids[0], topic) for topic in topics]
    # The same words to two teachers with different parts would ask for two answers at once.
    return [(i, f"{topic}, part {n}") for n, i in enumerate(ids, 1) for topic in topics]


def _about(section: str, source: Source, name_it: bool) -> str:
    return f"{section} ({source.title})" if name_it and section != source.title else section


def make_rows(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    prompt_recipe: str,
    rows: int,
    val_rows: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    limit: PromptLimit | None = None,
    before: dict[str, str] | None = None,
) -> tuple[list[Row], list[Row]]:
    """(train, val) rows in veRL's schema; the same arguments give the same rows.

    No cut and no open prompt of `val` is in `train`.

    Args:
        limit: how long a prompt may be; what is longer in any wording is left out, and counted.
        before: of a cartridge that is rebuilt the documents as they were: every other row is then
            about a section that changed (`rebuild.py`).

    Raises:
        ConfigError: unknown prompt recipe, nothing to make prompts of, or a collision with
            evaluation.
    """
    if prompt_recipe not in PROMPT_RECIPES:
        raise ConfigError(
            f"The prompt recipe {prompt_recipe!r} is unknown; "
            f"fix: choose one of {', '.join(PROMPT_RECIPES)}"
        )
    if rows < 1 or val_rows < 1:
        raise ConfigError(
            f"--rows {rows} and --val-rows {val_rows} are too few; fix: give 1 or more of each"
        )
    rng = random.Random(seed)
    guard = Guard([question for source in sources for question in source.questions])
    groups = [list(sources)] if before is None else split_by_change(sources, before)
    made = [
        _makers(
            *(tokenizer, group, prompt_recipe, rows, val_rows // len(groups) or 1, seed),
            *(rng, guard, len(sources) > 1, say, limit),
            scarce=before is not None,
        )
        for group in groups
    ]
    if before is not None:
        changed, others = (sum(len(s.sections) for s in group) for group in groups)
        say(f"Sections that changed: {changed}, others: {others}; a row of each in turn.")
    train, val = (
        # of each group in turn, so that each has its share whatever it is made of
        numbered(islice(alternate([alternate(each[split]) for each in made]), count), split)
        for split, count in (("train", rows), ("val", val_rows))
    )
    guard.check(train + val)
    return train, val


def _makers(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    prompt_recipe: str,
    rows: int,
    val_rows: int,
    seed: int,
    rng: random.Random,
    guard: Guard,
    name_it: bool,
    say: Callable[[str], None],
    limit: PromptLimit | None,
    scarce: bool,
) -> dict[str, list[Iterator[Row]]]:
    """What makes the rows of some sources, for `train` and for `val`.

    Args:
        scarce: keep an eighth of the started answers aside at most: what changed may be short.
    """
    makers: dict[str, list[Iterator[Row]]] = {"train": [], "val": []}
    if prompt_recipe in ("started", "mixed"):
        every = all_cuts(tokenizer, sources, rows + val_rows, seed)
        cuts = [cut for cut in every if guard.collision(cut.start) is None]
        say(f"{len(cuts)} started answers, {len(every) - len(cuts)} dropped: evaluation stems.")
        cuts = _within(limit, cuts, lambda cut: _started_messages(cut, name_it), "started", say)
        aside = min(val_rows, max(1, len(cuts) // 8)) if scarce else val_rows
        if len(cuts) <= aside:
            raise ConfigError(
                f"Only {len(cuts)} started answers can be made, and {aside} are kept for "
                "validation; fix: use longer documents, or fewer --val-rows"
            )
        rng.shuffle(cuts)
        makers["val"].append(started_rows(cuts[:aside], rng, name_it))
        makers["train"].append(started_rows(cuts[aside:], rng, name_it))
    if prompt_recipe in ("open", "mixed"):
        prompts = [p for p in open_prompts(sources, name_it) if guard.collision(p[2]) is None]
        prompts = _within(limit, prompts, lambda p: [_open_messages(p[2])], "open", say)
        if len(prompts) < 2:
            raise ConfigError(
                "every open prompt collides with an evaluation question; fix: use --recipe "
                "started, or reword the questions"
            )
        rng.shuffle(prompts)
        # An eighth at most: the wordings are few, and what is kept aside is not trained on.
        kept = max(1, min(val_rows, len(prompts) // 8))
        makers["val"].append(open_rows(prompts[:kept], rng))
        makers["train"].append(open_rows(prompts[kept:], rng))
    return makers
