"""Questions that the model writes, each with an answer that was checked.

For one question the model is asked up to three times, each time over the rollout server:

1. with a chunk of the document before it, for a question;
2. with the same chunk, for the answer to that question in the words of the text, at temperature 0;
3. with nothing before it, for the answer again.

A question is kept when its answer is short, stands word for word in the chunk, is not said by the
question itself, and was not given in the third: what the model knows without the document says
nothing about a cartridge. The journal keeps every generation, so a run that was stopped goes on.

What this cannot see: an answer that stands in the text and is the wrong one. `prepare` shows the
questions; read them, and give those you want with ``--questions``.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from cartridge_distill.data.decontamination import Seen
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.questions.options import Asked, with_options
from cartridge_distill.data.self_study.plan import OPENINGS, Plan, StudyChunk
from cartridge_distill.data.self_study.sifting import clean
from cartridge_distill.data.words import normalised, words
from cartridge_distill.model.contents import content_ids
from cartridge_distill.model.prompts import render_alone, render_document, render_prompt
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.util.errors import ConfigError, require_counts
from cartridge_distill.util.journal import Journal

REQUESTS = (
    "Write one question that can be answered from this text alone. Ask for a particular name, "
    "number, date or reason. Write the question alone, without an answer.",
    "Write one exam question about a detail of this text. Write the question alone, without an "
    "answer.",
)
BRIEFLY = "{} Answer with as few words as possible, as they stand in the text."
_FEWEST_WORDS, _MOST_WORDS = 3, 40
_MOST_ANSWER_WORDS = 12
_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class QuestionSettings:
    """How questions are written.

    Attributes:
        questions: good ones wanted.
        write_tokens: that a question may have.
        temperature: of the questions; answers are written at 0.
        attempts: questions tried for each one wanted, at most.
        concurrency: questions tried at once.
        seed: everything that is drawn follows from it.
        openings: begin each question with a question word, for a model too small to be asked.

    Raises:
        ConfigError: a setting that cannot work.
    """

    questions: int
    write_tokens: int = 128
    temperature: float = 0.8
    attempts: int = 4
    concurrency: int = 32
    seed: int = 0
    openings: bool = False

    def __post_init__(self) -> None:
        require_counts(self, "write_tokens", "attempts", "concurrency")
        if self.questions < 2:
            raise ConfigError(
                f"{self.questions} questions are too few, for the wrong answers of one are the "
                "right ones of others; fix: ask for 2 or more"
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature}: the model would ask the same again and again; "
                "fix: give more than 0"
            )


@dataclass
class WrittenQuestions:
    """Questions that are kept, in the order of their tasks, and why others were dropped."""

    kept: list[Asked] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def added_to(self, sources: Sequence[Source], seed: int) -> list[Source]:
        """The sources with these questions, as multiple-choice ones, behind those they have.

        A question that is the only one about its source is left out, and counted: the wrong
        answers of one are the right ones of others.
        """
        made = []
        for source in sources:
            parts = {part.document.document_id for part in source.parts}
            own = [asked for asked in self.kept if asked.document_id in parts]
            if len(own) == 1:
                self.dropped["the only one about its document"] += 1
                own = []
            made.append(replace(source, questions=(*source.questions, *with_options(own, seed))))
        return made


def made_with(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    settings: QuestionSettings,
    served: Sequence[str],
) -> dict[str, Any]:
    """What a journal's rows depend on: a run that goes on must have the same."""
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    return {
        "format": "cartridge-distill questions 1",
        "documents": plan.fingerprint(),
        "requests": [*REQUESTS, BRIEFLY],
        "tokenizer": f"{len(tokenizer)} tokens, template {template[:16]}",
        "server's models": sorted(served),
        "seed": settings.seed,
        "temperature": settings.temperature,
        "write tokens": settings.write_tokens,
        "openings": settings.openings,
    }


async def write_questions(
    client: TokasaurusClient,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    journal: Journal,
    settings: QuestionSettings,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenQuestions:
    """Has questions written until there are enough good ones, or no attempts are left.

    Args:
        client: of a server that serves the base model; no cartridge is asked for.
        journal: opened with :func:`made_with`; what it holds is not written again.
        progress: called with (questions tried, questions planned so far).

    Returns:
        At most ``settings.questions``; fewer when the attempts were used up.

    Raises:
        RolloutError: the server refused, or is gone; what was written is in the journal.
    """
    most = settings.attempts * settings.questions
    rows = {row["task"]: row for row in journal.rows}
    planned = 0
    while True:
        found = sift([row for number, row in rows.items() if number < planned], plan)
        missing = settings.questions - len(found.kept)
        if missing <= 0 or planned >= most:
            found.kept = found.kept[: settings.questions]
            return found
        planned = min(most, planned + max(missing, settings.questions // 4))
        todo = [number for number in range(planned) if number not in rows]
        places = asyncio.Semaphore(settings.concurrency)

        async def one(number: int, places: asyncio.Semaphore = places) -> dict[str, Any]:
            async with places:
                return await _write(client, tokenizer, plan, number, settings)

        running = [asyncio.create_task(one(number)) for number in todo]
        try:
            for done in asyncio.as_completed(running):
                row = await done
                journal.append(row)
                rows[row["task"]] = row
                if progress is not None:
                    progress(len(rows), max(planned, len(rows)))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _write(
    client: TokasaurusClient,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    number: int,
    settings: QuestionSettings,
) -> dict[str, Any]:
    """A question and its answers, as the journal keeps them; None for what was not asked."""
    chunk = plan.chunk_of(number)
    rng = random.Random(f"{settings.seed}/question {number}")
    request, seed = rng.choice(REQUESTS), rng.getrandbits(31)
    opening = rng.choice(OPENINGS["question"]) if settings.openings else ""
    if plan.several:
        request += f' The text is from "{chunk.source.title}".'
    document = render_document(tokenizer, chunk.text)

    async def say(prompt: list[int], tokens: int, temperature: float) -> tuple[str, str]:
        [made] = await client.complete(prompt, tokens, temperature, seed=seed)
        ids = [*content_ids(tokenizer, opening), *made.token_ids] if temperature else made.token_ids
        return str(tokenizer.decode(ids, skip_special_tokens=True)), made.finish_reason

    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": opening}]
    text, finish = await say(
        document + render_prompt(tokenizer, messages), settings.write_tokens, settings.temperature
    )
    row: dict[str, Any] = {
        "task": number,
        "document_id": chunk.source.document_id,
        "chunk": chunk.span,
        "opening": opening,
        "seed": seed,
        "text": text,
        "finish": finish,
        "answer": None,
        "answer_finish": None,
        "unaided": None,
    }
    question = _question(row)
    if _fault_of_question(question, chunk) is not None:
        return row
    asked = [
        {"role": "user", "content": BRIEFLY.format(question)},
        {"role": "assistant", "content": ""},
    ]
    row["answer"], row["answer_finish"] = await say(
        document + render_prompt(tokenizer, asked), _ANSWER_TOKENS, 0.0
    )
    if _fault_of_answer(question, row, chunk) is None:
        row["unaided"], _ = await say(render_alone(tokenizer, asked), _ANSWER_TOKENS, 0.0)
    return row


def sift(rows: Sequence[dict[str, Any]], plan: Plan) -> WrittenQuestions:
    """Decides about each question; the rules stand at the top of this module.

    Args:
        rows: of the journal, in any order.
        plan: that they were made by.
    """
    found = WrittenQuestions()
    seen = {chunk.source.document_id: Seen() for chunk in plan.chunks}
    for row in sorted(rows, key=lambda row: row["task"]):
        chunk = plan.chunk_of(row["task"])
        question, before = _question(row), seen[chunk.source.document_id]
        reason = _fault_of_question(question, chunk) or _fault_of_answer(question, row, chunk)
        if reason is None and before.like(question) is not None:
            reason = "a question that is there already, in nearly the same words"
        if reason is not None:
            found.dropped[reason] += 1
            continue
        before.add(question)
        where = f"question {len(found.kept) + 1}, written by the model"
        # The part that the teacher reads, which is the document where that is whole.
        part = chunk.part.document.document_id
        found.kept.append(Asked(where, part, question, _answer(row)))
    return found


def _question(row: dict[str, Any]) -> str:
    """Up to the first question mark, on one line; empty where there is none."""
    text = clean(row["text"], row["opening"])
    ends = [at for mark in "?？؟" if (at := text.find(mark)) >= 0]
    # A quote may close behind the mark, after which nothing is read.
    return " ".join(text[: min(ends) + 1].split()).lstrip("\"'“«") if ends else ""


def _answer(row: dict[str, Any]) -> str:
    """Its first line, without quotes and a full stop behind it."""
    lines = [line.strip() for line in str(row["answer"] or "").strip().split("\n")]
    return clean(lines[0]).rstrip(" .。").strip()


def _fault_of_question(question: str, chunk: StudyChunk) -> str | None:
    if not question:
        return "no question mark"
    if not _FEWEST_WORDS <= len(words(question)) <= _MOST_WORDS:
        return f"a question of less than {_FEWEST_WORDS} or more than {_MOST_WORDS} words"
    if normalised(question) in normalised(chunk.text):
        return "a question that the text asks itself"
    return None


def _fault_of_answer(question: str, row: dict[str, Any], chunk: StudyChunk) -> str | None:
    answer = _answer(row)
    if not words(answer) or len(words(answer)) > _MOST_ANSWER_WORDS:
        return f"no answer, or one of more than {_MOST_ANSWER_WORDS} words"
    if normalised(answer) not in normalised(chunk.text):
        return "an answer that does not stand in the text"
    if normalised(answer) in normalised(question):
        return "a question that says its answer"
    if row["unaided"] is not None and normalised(answer) in normalised(row["unaided"]):
        return "answered without the document"
    return None
