"""A data folder, a model and a cartridge: all scored, written and shown; what the command does."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

import cartridge_distill
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
    first_tokens,
    no_document,
)
from cartridge_distill.evaluation.data import EvaluationData
from cartridge_distill.evaluation.harness import Evaluation
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
from cartridge_distill.evaluation.prompts import end_ids, started_prompt
from cartridge_distill.evaluation.results import check_replaceable, summarise, write_summary
from cartridge_distill.evaluation.scoring import greedy_answers
from cartridge_distill.evaluation.table import format_table
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.prompts import render_document
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import ConfigError

SAMPLE_TOKENS = 40
SAMPLED = (NO_DOCUMENT, TRAINED, FULL_DOCUMENT)
_REPORT_SECONDS = 10.0


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
        evaluation.run(loaded.data.questions, loaded.data.prompts, journal, _terminal_progress())
        _measure(options, loaded, document, conditions, journal)
        results = journal.results()
        described = {
            "model": options.model,
            "model_revision": getattr(loaded.model.config, "_commit_hash", None),
            "cartridge": str(options.cartridge),
            "versions": _versions(),
            **({"answers_read_by": options.read_answers} if options.generate else {}),
            **_measure_settings(options, loaded),
        }
        summary = summarise(results, described, options.seed)
        summary["samples"] = _samples(options, loaded, conditions)
        written = [*results.write(options.out), write_summary(options.out, summary)]
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
    with _Stage(f"reading {options.data}"):
        tokenizer = read_tokenizer(options.model)
        data = EvaluationData.from_folder(options.data, tokenizer, options.prompts, options.limit)
    with _Stage(f"loading {options.model} ({options.dtype}, {device})"):
        model = load_model(options.model, getattr(torch, options.dtype), device)
    stored = read_cartridge(options.cartridge, model.config)
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

    def untrained() -> Condition:
        if options.untrained:
            stored = read_cartridge(options.untrained, model.config)
            return cartridge(UNTRAINED, TrainableCache.from_snapshot(stored.snapshot))
        began_with = loaded.meta.recipe.get("init_document") or loaded.data.documents.ids[0]
        return first_tokens(teacher, str(began_with), tokens)

    made: dict[str, Callable[[], Condition]] = {
        NO_DOCUMENT: lambda: no_document(model, loaded.tokenizer),
        BEST_CHUNK: lambda: BestChunk(teacher, tokens),
        UNTRAINED: untrained,
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
        local = answers.LocalAnswerer(loaded.model, loaded.tokenizer, sampling, _heard())
        return local, sampling
    served = {}
    if options.served:
        served[TRAINED] = CartridgeRef(id=options.served, source="local")
    elif TRAINED in options.conditions:
        raise ConfigError(
            "--server generates with the cartridge it serves: say its id with --served, or leave "
            f"{TRAINED!r} out of --conditions"
        )
    server = answers.ServerAnswerer(options.server, loaded.tokenizer, sampling, served, _heard())
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
                "--measures own_text: there are no questions, so there is nothing to write to"
            )
        texts = OwnTexts(*common, document, conditions, questions, sampling)
        say(
            f"own texts: {texts.texts} of up to {options.measure_tokens} tokens, under "
            f"{len(conditions)} conditions; each is read by the teacher, too"
        )
        texts.run(journal, _terminal_progress("own texts"))
    if OFF_CONTEXT in options.measures:
        ids = loaded.data.documents.ids
        unrelated = OffContextPrompts(*common, conditions, ids, options.seed, options.batch)
        say(
            f"unrelated prompts: {unrelated.prompts}, {OFF_CONTEXT_TOKENS} tokens at most of the "
            f"bare model's answer to each, under {len(conditions)} conditions"
        )
        unrelated.run(journal, _terminal_progress("unrelated prompts"))


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
        "model weights": _digest(weights_checksum(loaded.model)),
        "dtype": options.dtype,
        "cartridge": _digest(weights_checksum(loaded.trained)),
        "untrained": options.untrained,
        "conditions": sorted(options.conditions),
        "documents": _digest({name: data.documents.text(name) for name in data.documents.ids}),
        "questions": _digest([asdict(question) for question in data.questions]),
        "prompts": _digest([asdict(prompt) for prompt in data.prompts]),
        "answer tokens": options.answer_tokens,
        "generated": sampling
        and [asdict(sampling), options.server, options.served, options.read_answers],
        "seed": options.seed,
        "versions": _versions(),
        **_measure_settings(options, loaded),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cartridge_distill": cartridge_distill.__version__,
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
        with _Stage(f"sample answers, {condition.name}"):
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


def say(line: str) -> None:
    """A line for the user, beside the table on standard output."""
    print(line, file=sys.stderr, flush=True)


class _Stage:
    """Says what is being done, and how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        say(f"{self._what} ...")
        self._start = time.monotonic()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            say(f"{self._what}: {time.monotonic() - self._start:.1f} s")


def _heard() -> Callable[[int], None]:
    """Says every few seconds how many tokens were generated: an answer can take minutes."""
    start = said = time.monotonic()
    total = 0

    def count(tokens: int) -> None:
        nonlocal said, total
        total += tokens
        now = time.monotonic()
        if now - said >= _REPORT_SECONDS:
            said = now
            say(f"generating answers: {total} tokens so far ({now - start:.0f} s)")

    return count


def _terminal_progress(what: str = "evaluating") -> Callable[[int, int], None]:
    """A line on stderr every tenth of the way; on a terminal it overwrites itself."""
    start, shown = time.monotonic(), -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done < total and done * 10 // total == shown:
            return
        shown = done * 10 // total
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        line = f"{what}: {done * 100 // total} % ({time.monotonic() - start:.0f} s)"
        print(line, end=end, file=sys.stderr, flush=True)

    return show
