"""A data folder, a model and a cartridge: all scored, written and shown; what the command does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.checkpoint import read_cartridge, record
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.integrity import weights_checksum
from cartridge_distill.distill.teacher import Teacher
from cartridge_distill.evaluation import answers
from cartridge_distill.evaluation.conditions import (
    BestChunk,
    Condition,
    Fixed,
    FullDocument,
    began_as,
    no_document,
    untrained,
)
from cartridge_distill.evaluation.data import AboutADocument, EvaluationData
from cartridge_distill.evaluation.harness import Evaluation
from cartridge_distill.evaluation.identity import digest, versions
from cartridge_distill.evaluation.journal import JOURNAL_FILE, Journal
from cartridge_distill.evaluation.measures import BAND_SCORES
from cartridge_distill.evaluation.names import (
    BEST_CHUNK,
    FULL_DOCUMENT,
    NO_DOCUMENT,
    OFF_CONTEXT,
    OFF_CONTEXT_TOKENS,
    OWN_TEXT,
    ROLLOUT_TEMPERATURE,
    TRAINED,
    UNTRAINED,
)
from cartridge_distill.evaluation.off_context import OffContextPrompts
from cartridge_distill.evaluation.own_text import OwnTexts
from cartridge_distill.evaluation.progress import Stage, heard, say, terminal_progress
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.results import check_replaceable, summarise, write_summary
from cartridge_distill.evaluation.scoring import greedy_answers
from cartridge_distill.evaluation.shading import SHADING_FILE, shade, write_shading
from cartridge_distill.evaluation.table import format_table
from cartridge_distill.model.identity import check_same_weights
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.prompts import render_document
from cartridge_distill.model.reading import read_model_config, read_tokenizer
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import ConfigError

SAMPLE_TOKENS = 40
SAMPLED = (NO_DOCUMENT, BEST_CHUNK, TRAINED, FULL_DOCUMENT)
SHADED = 4
"""Documents whose text the report shades, at most."""


@dataclass
class _Loaded:
    """Everything an evaluation works on."""

    model: Any
    tokenizer: Any
    data: EvaluationData
    teacher: Teacher
    trained: TrainableCache
    meta: CartridgeMeta


def evaluate_folder(options: argparse.Namespace) -> str:
    """What the command does, with its parsed options; returns the table.

    Raises:
        CartridgeDistillError: something cannot be read, does not fit, or makes no sense.
    """
    check_replaceable(options.out, JOURNAL_FILE)
    if options.record:
        record(options.cartridge)  # before minutes are spent: can it hold them?
    summary = _evaluate(options)
    if options.record:
        record(options.cartridge, metrics={"results": _means(summary)})
    return format_table(summary)


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Scores everything; returns what ``evaluation.json`` holds."""
    loaded = _load(options)
    document = FullDocument(loaded.teacher)
    conditions = _conditions(options, loaded, document)
    answerer, sampling = _answerer(options, loaded)
    evaluation = Evaluation(
        loaded.model,
        loaded.tokenizer,
        document,
        conditions,
        answerer=answerer,
        read_answer=answers.READINGS[options.read_answers],
        seed=options.seed,
        answer_tokens=options.answer_tokens,
        chunk=options.batch,
    )
    with Journal(options.out, _settings(options, loaded, sampling), say) as journal:
        evaluation.run(loaded.data.questions, loaded.data.prompts, journal, terminal_progress())
        _measure(options, loaded, document, conditions, journal)
        results = journal.results()
        described = {
            "model": options.model,
            "model_revision": getattr(loaded.model.config, "_commit_hash", None),
            "cartridge": str(options.cartridge),
            "versions": versions(),
            **({"answers_read_by": options.read_answers} if options.generate else {}),
            **_measure_settings(options, loaded),
        }
        summary = summarise(results, described, options.seed)
        summary["samples"] = _samples(options, loaded, conditions)
        written = [*results.write(options.out), *_shaded(options, loaded, conditions, document)]
        written.append(write_summary(options.out, summary))
        journal.remove()
    say(f"written: {', '.join(str(path) for path in written)}")
    return summary


def _means(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The table without its intervals and bands: what was measured, a row a condition."""
    rows = []
    for row in summary["conditions"]:
        shown = {name: row["metrics"][name] for name in row["metrics"] if name not in BAND_SCORES}
        means = {name: found["mean"] for name, found in shown.items() if found}
        rows.append({"condition": row["condition"], **means, "kv_tokens": row["kv_tokens"]})
    return rows


def _load(options: argparse.Namespace) -> _Loaded:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Stage(f"reading {options.data}"):
        tokenizer = read_tokenizer(options.model)
        data = EvaluationData.from_folder(options.data, tokenizer, options.prompts, options.limit)
    stored = read_cartridge(options.cartridge, read_model_config(options.model))
    same_weights = partial(
        check_same_weights,
        *(stored.meta, options.cartridge, options.model),
        allow_other=options.allow_other_model,
    )
    if (told := same_weights()) is not None:
        say(f"warning: {told}")
    with Stage(f"loading {options.model} ({options.dtype}, {device})"):
        model = load_model(options.model, getattr(torch, options.dtype), device)
    same_weights()  # again: those of a hub id may have come only now
    teacher = Teacher(
        model, data.documents, lambda text: render_document(tokenizer, text), max_cached=1
    )
    trained = TrainableCache.from_snapshot(stored.snapshot)
    return _Loaded(model, tokenizer, data, teacher, trained, stored.meta)


def _conditions(
    options: argparse.Namespace, loaded: _Loaded, document: FullDocument
) -> list[Condition]:
    """Those that were asked for, in the table's order."""
    tokens, model, teacher = loaded.trained.num_tokens, loaded.model, loaded.teacher

    def cartridge(name: str, cache: TrainableCache) -> Fixed:
        return Fixed(name, cache.prefix().to(model.device, model.dtype))

    def before_training() -> Condition:
        if options.untrained:
            stored = read_cartridge(options.untrained, model.config)
            return cartridge(UNTRAINED, TrainableCache.from_snapshot(stored.snapshot))
        began_with = loaded.meta.recipe.get("init_document") or loaded.data.documents.ids[0]
        return untrained(
            *(teacher, str(began_with), tokens, loaded.trained.num_frozen_tokens),
            began_as(loaded.meta.recipe),
        )

    made: dict[str, Callable[[], Condition]] = {
        NO_DOCUMENT: lambda: no_document(model, loaded.tokenizer),
        BEST_CHUNK: lambda: BestChunk(teacher, tokens),
        UNTRAINED: before_training,
        TRAINED: lambda: cartridge(TRAINED, loaded.trained),
        FULL_DOCUMENT: lambda: document,
    }
    return [make() for name, make in made.items() if name in options.conditions]


def _answerer(
    options: argparse.Namespace, loaded: _Loaded
) -> tuple[answers.Answerer | None, answers.Sampling | None]:
    if not options.generate:
        return None, None
    sampling = answers.Sampling(options.temperature, options.max_new_tokens, options.seed)
    if options.server is None:
        local = answers.LocalAnswerer(loaded.model, loaded.tokenizer, sampling, heard())
        return local, sampling
    served = {}
    if options.served:
        served[TRAINED] = CartridgeRef(id=options.served, source="local")
    elif TRAINED in options.conditions:
        raise ConfigError(
            "--server generates with the cartridge it serves, and its id is not said; fix: say it "
            f"with --served, or leave {TRAINED!r} out of --conditions"
        )
    server = answers.ServerAnswerer(options.server, loaded.tokenizer, sampling, served, heard())
    return server, sampling


def _measure(
    options: argparse.Namespace,
    loaded: _Loaded,
    document: FullDocument,
    conditions: Sequence[Condition],
    journal: Journal,
) -> None:
    """The groups of ``--measures``, each with a word of the work before it begins."""
    common = (loaded.model, loaded.tokenizer)
    if OWN_TEXT in options.measures:
        sampling = answers.Sampling(
            _measure_temperature(options, loaded), options.measure_tokens, options.seed
        )
        questions = loaded.data.questions
        if not questions:
            raise ConfigError(
                "--measures own_text: there are no questions, so there is nothing to write to; "
                f"fix: prepare the data with --questions, or leave {OWN_TEXT} out of --measures"
            )
        texts = OwnTexts(*common, document, conditions, questions, sampling)
        say(
            f"own texts: {texts.texts} of up to {options.measure_tokens} tokens, under "
            f"{len(conditions)} conditions; each is read by the teacher, too"
        )
        texts.run(journal, terminal_progress("own texts"))
    if OFF_CONTEXT in options.measures:
        ids = loaded.data.documents.ids
        unrelated = OffContextPrompts(*common, conditions, ids, options.seed, options.batch)
        say(
            f"unrelated prompts: {unrelated.prompts}, {OFF_CONTEXT_TOKENS} tokens at most of the "
            f"bare model's answer to each, under {len(conditions)} conditions"
        )
        unrelated.run(journal, terminal_progress("unrelated prompts"))


def _measure_temperature(options: argparse.Namespace, loaded: _Loaded) -> float:
    if options.measure_temperature is not None:
        return float(options.measure_temperature)
    return float(loaded.meta.recipe.get("rollout.temperature", ROLLOUT_TEMPERATURE))


def _measure_settings(options: argparse.Namespace, loaded: _Loaded) -> dict[str, Any]:
    """What the rows of ``--measures`` depend on, by what they are; nothing where there are none."""
    if not options.measures:
        return {}
    found: dict[str, Any] = {"groups": sorted(options.measures)}
    if OWN_TEXT in options.measures:
        found["temperature"] = _measure_temperature(options, loaded)
        found["tokens"] = options.measure_tokens
    return {"measures": found}


def _settings(
    options: argparse.Namespace, loaded: _Loaded, sampling: answers.Sampling | None
) -> dict[str, Any]:
    """Everything that a row depends on: what a journal must agree with."""
    data = loaded.data
    return {
        "model": options.model,
        "model weights": digest(weights_checksum(loaded.model)),
        "dtype": options.dtype,
        "cartridge": digest(weights_checksum(loaded.trained)),
        "untrained": options.untrained,
        "conditions": sorted(options.conditions),
        "documents": digest({name: data.documents.text(name) for name in data.documents.ids}),
        "questions": digest([asdict(question) for question in data.questions]),
        "prompts": digest([asdict(prompt) for prompt in data.prompts]),
        "answer tokens": options.answer_tokens,
        "generated": sampling
        and [asdict(sampling), options.server, options.served, options.read_answers],
        "seed": options.seed,
        "versions": versions(),
        **_measure_settings(options, loaded),
    }


def _samples(
    options: argparse.Namespace, loaded: _Loaded, conditions: Sequence[Condition]
) -> list[dict[str, Any]]:
    """What the model says to a few questions, the likeliest tokens, behind their stems."""
    questions = loaded.data.questions
    count = min(options.samples, len(questions))
    if count < 1:
        return []
    # From all over: neighbours ask about the same section.
    chosen = [questions[place * len(questions) // count] for place in range(count)]
    prompts = [started_prompt(loaded.tokenizer, q.question, q.stem) for q in chosen]
    ends = end_ids(loaded.model, loaded.tokenizer)
    said: list[dict[str, str]] = [{} for _ in chosen]
    for condition in conditions:
        if condition.name not in SAMPLED:
            continue
        with Stage(f"sample answers, {condition.name}"):
            prefixes = [condition.view(q.document_id, q.question).prefix for q in chosen]
            found = greedy_answers(loaded.model, prefixes, prompts, SAMPLE_TOKENS, ends)
        for question, ids, texts in zip(chosen, found, said, strict=True):
            text = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
            texts[condition.name] = f"{question.stem or ''}{text}".strip()
    return [
        {
            "question": question.question,
            "right_answer": question.answer,
            "started": question.stem,
            "answers": texts,
        }
        for question, texts in zip(chosen, said, strict=True)
    ]


def _shaded(
    options: argparse.Namespace,
    loaded: _Loaded,
    conditions: Sequence[Condition],
    document: FullDocument,
) -> list[Path]:
    """The first documents' divergence, token by token, where trained and full are compared."""
    (options.out / SHADING_FILE).unlink(missing_ok=True)  # of an earlier evaluation
    by_name = {condition.name: condition for condition in conditions}
    if options.shade_tokens == 0 or not {TRAINED, FULL_DOCUMENT} <= set(by_name):
        return []
    asked: list[AboutADocument] = [*loaded.data.questions, *loaded.data.prompts]
    names = list(dict.fromkeys(item.document_id for item in asked))[:SHADED]
    made = []
    for name in names:
        with Stage(f"the divergence along {name}"):
            full = document.view(name).prefix
            cartridge = by_name[TRAINED].view(name, "").prefix
            assert full is not None and cartridge is not None
            text = loaded.data.documents.text(name)
            try:
                found = shade(
                    *(loaded.model, loaded.tokenizer, name, text),
                    *(full, cartridge, options.shade_tokens),
                )
            except ConfigError as error:  # a document that leaves no room for a passage
                say(f"{name} is not shaded: {error}")
                continue
            made.append(found)
    return [write_shading(options.out, made)] if made else []
