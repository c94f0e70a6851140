"""``cartridge-distill prepare``: reads, cuts, makes prompts, writes the training files."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.data.dataset import (
    Row,
    check_replaceable,
    check_same_documents,
    write_dataset,
)
from cartridge_distill.data.decontamination import Guard
from cartridge_distill.data.documents.source import Source, choose, load_sources
from cartridge_distill.data.general_rows import count_for, read_prompts, with_general
from cartridge_distill.data.prompt_length import PromptLimit
from cartridge_distill.data.prompt_recipes import make_rows
from cartridge_distill.data.questions.reading import add_questions, check_file
from cartridge_distill.data.questions.writing import QuestionSettings, write_questions
from cartridge_distill.data.questions.writing import made_with as questions_made_with
from cartridge_distill.data.rebuild import data_folder, texts_before
from cartridge_distill.data.self_study.plan import Plan
from cartridge_distill.data.self_study.sifting import Sifted
from cartridge_distill.data.self_study.writing import (
    StudySettings,
    made_with,
    study_rows,
    write_prompts,
)
from cartridge_distill.model.prompts import render_document
from cartridge_distill.model.reading import read_model_config, read_tokenizer
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import HOW_TO_START, ClientSettings
from cartridge_distill.util.errors import ConfigError, RolloutError
from cartridge_distill.util.journal import Journal
from cartridge_distill.util.pasting import pasted_setting
from cartridge_distill.util.shown_text import printable

SELF_STUDY = "self_study"
SHOWN = 5  # questions, so that a person sees what they are like


def run(options: argparse.Namespace) -> None:
    """Reads, cuts, makes prompts and writes."""
    check_options(options)
    check_replaceable(options.out)  # before anything is read or written by a model
    if options.questions is not None and not options.questions.is_file():
        raise ConfigError(
            f"--questions {options.questions}: there is no such file; fix: name another"
        )
    if options.questions is not None:
        check_file(options.questions)
    before = None
    if options.rebuild is not None:
        before = texts_before(data_folder(options.rebuild))
    general = read_prompts(options.general_prompts)
    sources = choose(load_sources(options.data, say, options.skip_unreadable), options.patients)
    tokenizer = read_tokenizer(options.tokenizer)
    limit = PromptLimit(tokenizer, options.prompt_tokens)
    # What a document may have is checked below; transformers would warn about each long one.
    tokenizer.model_max_length = sys.maxsize
    sources = split_sources(sources, tokenizer, options)
    if not options.overwrite:
        check_same_documents(options.out, sources)
    if options.questions is not None:
        sources = add_questions(sources, options.questions, options.seed)
        say(f"{sum(len(source.questions) for source in sources)} questions for the evaluation")
    if options.write_questions:
        sources = asyncio.run(own_questions(sources, tokenizer, options))
    if options.prompt_recipe == SELF_STUDY:
        train, val = asyncio.run(self_study(sources, tokenizer, options))
    else:
        val_rows = 16 if options.val_rows is None else options.val_rows
        train, val = make_rows(
            *(tokenizer, sources, options.prompt_recipe, options.rows, val_rows, options.seed),
            say=say,
            limit=limit,
            before=before,
        )
    if options.general_fraction:
        about_documents = len(train)
        train = with_general(train, general, options.general_fraction, options.seed, limit)
        say(f"{len(train) - about_documents} general rows, whose teacher is the bare model, added")
    limit.check(
        [row["prompt"] for row in [*train, *val]], "the prompts", "allow more with --prompt-tokens"
    )
    write_dataset(options.out, sources, train, val)
    say(f"Wrote {len(train)} training and {len(val)} validation prompts to {options.out}")
    parts = [part.document.document_id for source in sources for part in source.parts]
    if len(parts) > 1:
        say(
            f"{len(parts)} documents for the teacher. To start the cartridge from a text, name "
            "one behind the train command: "
            + pasted_setting("actor_rollout_ref.actor.cartridge.init_document", parts[0])
        )


def check_options(options: argparse.Namespace) -> None:
    """Refuses what does not belong to the prompt recipe, and what would be ignored.

    Raises:
        ConfigError: names the option and the fix.
    """
    count_for(options.general_fraction, options.rows)
    if options.general_prompts is not None and not options.general_fraction:
        raise ConfigError(
            f"--general-prompts {options.general_prompts} would be ignored; fix: say how many rows "
            "are made of them, with --general-fraction (0.05 is usual)"
        )
    writes = options.prompt_recipe == SELF_STUDY or options.write_questions
    if writes and options.server is None:
        asked = "--write-questions" if options.write_questions else "--recipe self_study"
        raise ConfigError(f"{asked} needs a server of the base model; {HOW_TO_START}")
    if options.prompt_recipe == SELF_STUDY and options.rebuild is not None:
        raise ConfigError(
            f"--rebuild {options.rebuild} is for prompts that are cut out of the documents; fix: "
            "take --recipe started, open or mixed"
        )
    if options.prompt_recipe != SELF_STUDY:
        if options.held_out is not None:
            raise ConfigError(
                f"--held-out belongs to --recipe self_study, not to {options.prompt_recipe}; fix: "
                "leave it out, or choose that prompt recipe"
            )
        if options.server is not None and not writes:
            raise ConfigError(
                "--server belongs to --recipe self_study and to --write-questions; with --recipe "
                f"{options.prompt_recipe} alone no model writes; fix: leave it out"
            )
        return
    if options.val_rows is not None:
        raise ConfigError(
            "--val-rows is not for --recipe self_study; fix: say --held-out FRACTION in its place"
        )


def split_sources(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> list[Source]:
    """Cuts what is longer than the teacher's context; says how long everything is."""

    def length(text: str) -> int:
        return len(render_document(tokenizer, text))

    limit = teacher_context(options)
    split = []
    for source in sources:
        tokens = length(source.text)
        source = source.split(limit, length)
        said = f"{source.document_id}: {tokens} tokens"
        if source.questions:
            said += f", {len(source.questions)} questions"
        if len(source.parts) > 1:
            said += f"; longer than the teacher's {limit}: {len(source.parts)} parts"
            if torn := sum(part.torn for part in source.parts):
                said += f", {torn} of which end inside a sentence that is longer by itself"
            if source.questions:
                said += "; no teacher can read all of it to answer its questions"
        say(said)
        split.append(source)
    return split


def teacher_context(options: argparse.Namespace) -> int | None:
    """Tokens of a document that the teacher reads at most; None when nothing is known about it.

    Raises:
        ConfigError: no room for a document.
    """
    if options.teacher_context is not None:
        limit = options.teacher_context
    else:
        try:
            config = text_config(read_model_config(options.tokenizer))
        except ConfigError:
            say(
                f"{options.tokenizer} has a tokenizer but no model config: whether the documents "
                "fit the teacher's context is not checked (--teacher-context sets it)"
            )
            return None
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            return None  # positions without a bound
        limit -= options.prompt_tokens + options.response_tokens
    if limit < 1:
        raise ConfigError(
            f"{limit} tokens are left for a document: the model's context less --prompt-tokens "
            f"{options.prompt_tokens} and --response-tokens {options.response_tokens}, or "
            "--teacher-context; fix: make the prompts shorter, or take a model with more context"
        )
    return int(limit)


def study_plan(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> Plan:
    """What the model has before it when it writes."""
    return Plan(
        sources,
        options.chunk_tokens,
        options.seed,
        lambda text: len(render_document(tokenizer, text)),
        options.openings,
    )


async def own_questions(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> list[Source]:
    """The sources with questions that the server's model has written and answered.

    Raises:
        ConfigError: other settings than those of the questions that are already there, or none
            that is good enough.
        RolloutError: the server is not there, refuses, or has gone.
    """
    settings = QuestionSettings(
        questions=options.write_questions,
        write_tokens=options.write_tokens,
        temperature=options.temperature,
        attempts=options.attempts,
        concurrency=options.concurrency,
        seed=options.seed,
        openings=options.openings,
    )
    plan = study_plan(sources, tokenizer, options)
    patience = ClientSettings(startup_timeout_s=options.wait, max_connections=options.concurrency)
    path = options.out / "questions.jsonl"
    async with TokasaurusClient(options.server, patience) as client:
        await client.wait_until_ready()
        about = questions_made_with(plan, tokenizer, settings, await client.models())
        with Journal(path, about) as journal, tqdm(unit=" questions", mininterval=1) as bar:
            say(f"{settings.questions} questions to write from {len(plan.chunks)} chunks")
            found = await write_questions(
                client, tokenizer, plan, journal, settings, partial(show_progress, bar)
            )
            tried = len(journal.rows)
    added = found.added_to(sources, options.seed)
    good = sum(len(source.questions) for source in added) - sum(
        len(source.questions) for source in sources
    )
    say(f"{good} questions kept of {tried}:")
    for reason, count in found.dropped.most_common():
        say(f"   {count} dropped: {reason}")
    for asked in found.kept[:SHOWN]:
        say(f"   {asked.question} -> {asked.answer}")
    if len(found.kept) > SHOWN:
        say(f"   ... all of them: {options.out / 'eval.json'}")
    if good == 0:
        raise ConfigError(
            "no question is good enough to judge a cartridge by; fix: use a larger model, "
            "--openings for a small one, more --attempts, or write some yourself (--questions FILE)"
        )
    return added


async def self_study(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[list[Row], list[Row]]:
    """Has the prompts written by the server's model; goes on where an earlier run stopped.

    Raises:
        ConfigError: other settings than those of the prompts that are already there.
        RolloutError: the server is not there, refuses, or has gone.
    """
    held_out = 0.1 if options.held_out is None else options.held_out
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out} is no part; fix: give a fraction between 0 and 1")
    settings = StudySettings(
        prompts=options.rows + max(1, round(options.rows * held_out / (1 - held_out))),
        chunk_tokens=options.chunk_tokens,
        write_tokens=options.write_tokens,
        prompt_tokens=options.prompt_tokens,
        temperature=options.temperature,
        attempts=options.attempts,
        concurrency=options.concurrency,
        seed=options.seed,
    )
    plan = study_plan(sources, tokenizer, options)
    guard = Guard([question for source in sources for question in source.questions])
    patience = ClientSettings(startup_timeout_s=options.wait, max_connections=options.concurrency)
    path = options.out / "self_study.jsonl"
    async with TokasaurusClient(options.server, patience) as client:
        await client.wait_until_ready()
        about = made_with(plan, tokenizer, settings, await client.models())
        with Journal(path, about) as journal, tqdm(unit=" prompts", mininterval=1) as bar:
            if journal.rows or journal.torn:
                say(f"{path} holds {len(journal.rows)} generations; going on from there")
            say(f"{settings.prompts} prompts to write from {len(plan.chunks)} chunks")
            try:
                found = await write_prompts(
                    *(client, tokenizer, plan, journal, guard, settings),
                    progress=partial(show_progress, bar),
                )
            except RolloutError as error:
                raise RolloutError(
                    f"{error}\n{len(journal.rows)} generations are kept in {path}: the same "
                    "command goes on from there"
                ) from error
            say_outcome(found, settings, len(journal.rows))
    return study_rows(found.kept, plan, held_out, settings.seed)


def show_progress(bar: tqdm, done: int, planned: int) -> None:
    bar.total = planned
    bar.update(done - bar.n)


def say_outcome(found: Sifted, settings: StudySettings, generations: int) -> None:
    kinds = Counter(written.row["kind"] for written in found.kept)
    kept = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    say(f"{len(found.kept)} prompts kept of {generations} generations: {kept}")
    for reason, count in found.dropped.most_common():
        say(f"   {count} dropped: {reason}")
    if len(found.kept) < settings.prompts:
        say(
            f"Only {len(found.kept)} of {settings.prompts} prompts: {settings.attempts} attempts "
            "each were used up. More --attempts go on from here; a larger model, smaller "
            "--chunk-tokens or more --write-tokens (for those cut off) help more."
        )


def say(line: str) -> None:
    tqdm.write(printable(line))
    sys.stdout.flush()
