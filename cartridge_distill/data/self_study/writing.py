"""The generations of self-study, many at a time over HTTP, each kept as soon as it is there."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from cartridge_distill.data.dataset import Row, make_row, numbered
from cartridge_distill.data.decontamination import Guard
from cartridge_distill.data.self_study.plan import Plan, Task
from cartridge_distill.data.self_study.sifting import Sifted, Written, sift
from cartridge_distill.data.words import normalised
from cartridge_distill.model.contents import content_ids
from cartridge_distill.model.prompts import render_document, render_prompt
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.util.errors import ConfigError, require_counts
from cartridge_distill.util.journal import Journal

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudySettings:
    """How prompts are written.

    Attributes:
        prompts: good ones wanted.
        chunk_tokens: of the document in context, as rendered.
        write_tokens: that one generation may have.
        prompt_tokens: a prompt's length at most, as rendered for training.
        temperature: of sampling.
        attempts: generations for each prompt wanted, at most.
        concurrency: requests in flight.
        seed: everything that is drawn follows from it.

    Raises:
        ConfigError: a setting that cannot work.
    """

    prompts: int
    chunk_tokens: int = 1024
    write_tokens: int = 128
    prompt_tokens: int = 512
    temperature: float = 0.8
    attempts: int = 4
    concurrency: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self, "chunk_tokens", "write_tokens", "prompt_tokens")
        require_counts(self, "attempts", "concurrency")
        if self.prompts < 2:
            raise ConfigError(
                f"{self.prompts} prompts are too few; fix: give 2 or more, one to train on and one "
                "apart"
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature}: the model would write the same again and again; "
                "fix: give more than 0"
            )


def made_with(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, settings: StudySettings, served: Sequence[str]
) -> dict[str, Any]:
    """What a journal's rows depend on: a run that goes on must have the same.

    How many prompts are wanted and how many requests are in flight is not part of it.
    """
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    return {
        "format": "cartridge-distill self-study 1",
        "documents and seed prompts": plan.fingerprint(),
        "tokenizer": f"{len(tokenizer)} tokens, template {template[:16]}",
        "server's models": sorted(served),
        "seed": settings.seed,
        "temperature": settings.temperature,
        "write tokens": settings.write_tokens,
    }


async def write_prompts(
    client: TokasaurusClient,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    journal: Journal,
    guard: Guard,
    settings: StudySettings,
    progress: Progress | None = None,
) -> Sifted:
    """Has prompts written until there are enough good ones, or no attempts are left.

    Args:
        client: of a server that serves the base model; no cartridge is asked for.
        journal: opened with `made_with`; what it holds is not written again.
        progress: called with (generations done, generations planned so far).

    Returns:
        At most `settings.prompts` good prompts; fewer when the attempts were used up.

    Raises:
        RolloutError: the server refused, or is gone; what was written is in the journal.
    """
    most = settings.attempts * settings.prompts
    planned, rows = 0, {row["task"]: row for row in journal.rows}
    while True:
        considered = [row for number, row in rows.items() if number < planned]
        found = sift(considered, plan, guard, tokenizer, settings.prompt_tokens)
        missing = settings.prompts - len(found.kept)
        if missing <= 0 or planned >= most:
            found.kept = found.kept[: settings.prompts]
            return found
        # As many as are needed at the rate so far; the same however often the run was stopped.
        rate = max(0.25, len(found.kept) / planned) if planned else 0.8
        planned = min(most, planned + math.ceil(missing / rate))
        todo = [plan.task(number) for number in range(planned) if number not in rows]
        beyond = len(rows) + len(todo) - planned  # an earlier run may have planned for more

        def keep(row: dict[str, Any], planned: int = planned, beyond: int = beyond) -> None:
            journal.append(row)
            rows[row["task"]] = row
            if progress is not None:
                progress(len(rows) - beyond, planned)

        await _generate(client, tokenizer, iter(todo), settings, keep)


async def _generate(
    client: TokasaurusClient,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterator[Task],
    settings: StudySettings,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Runs tasks, so many at a time; each row is kept as it comes."""
    running: set[asyncio.Task[dict[str, Any]]] = set()
    try:
        while True:
            for task in islice(tasks, settings.concurrency - len(running)):
                running.add(asyncio.create_task(_write(client, tokenizer, task, settings)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                if one.exception() is None:
                    keep(one.result())
            for one in done:
                one.result()  # raises what went wrong, now that the others' rows are kept
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _write(
    client: TokasaurusClient,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: StudySettings,
) -> dict[str, Any]:
    """One generation, as the journal keeps it: the text uncleaned, and how it came to be."""
    # An answer that has begun, if with nothing: a template may open a thought for the model.
    messages = [
        {"role": "user", "content": task.seed_prompt},
        {"role": "assistant", "content": task.opening},
    ]
    opened = content_ids(tokenizer, task.opening)
    prompt = render_document(tokenizer, task.chunk.text) + render_prompt(tokenizer, messages)
    [completion] = await client.complete(
        prompt, settings.write_tokens, settings.temperature, seed=task.seed
    )
    return {
        "task": task.number,
        "document_id": task.chunk.part.document.document_id,
        "chunk": task.chunk.span,
        "kind": task.kind,
        "seed_prompt": task.seed_prompt,
        "opening": task.opening,
        "seed": task.seed,
        # Decoded as one: some tokenizers drop the space that a text begins with.
        "text": tokenizer.decode([*opened, *completion.token_ids], skip_special_tokens=True),
        "finish": completion.finish_reason,
    }


def study_rows(
    written: Sequence[Written], plan: Plan, held_out: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """(train, val) rows in veRL's schema.

    With several documents a prompt that does not name its document's title gets it appended; so
    does one that was written for another document in the same words.

    Args:
        written: from `sift`; no two of them are alike.
        plan: that they were made by.
        held_out: the fraction that is kept aside, at least one prompt and not all.
        seed: of the choice.

    Raises:
        ConfigError: a fraction that makes no sense, or fewer than two prompts.
    """
    if not 0 < held_out < 1:
        raise ConfigError(
            f"--held-out {held_out} is out of range; fix: give a part between 0 and 1"
        )
    if len(written) < 2:
        raise ConfigError(
            f"{len(written)} good prompts are not enough, one is trained on and one kept aside; "
            "fix: use a larger model, a longer --write-tokens or more --attempts. The journal "
            "self_study.jsonl holds what was written"
        )
    rows = []
    asked: dict[str, str] = {}  # prompt -> the document it was first asked about
    for prompt in written:
        source = plan.task(prompt.row["task"]).chunk.source
        text = prompt.text
        owner = asked.setdefault(normalised(text), source.document_id)
        if plan.several and (
            normalised(source.title) not in normalised(text) or owner != source.document_id
        ):
            text += f" ({source.title})"
        row = prompt.row
        rows.append(
            make_row(
                source,
                row["document_id"],
                [{"role": "user", "content": text}],
                "self_study",
                row["kind"],
                chunk=row["chunk"],
                seed=row["seed"],
            )
        )
    random.Random(f"{seed}/held out").shuffle(rows)
    aside = min(len(rows) - 1, max(1, round(held_out * len(rows))))
    return numbered(rows[aside:], "train"), numbered(rows[:aside], "val")
