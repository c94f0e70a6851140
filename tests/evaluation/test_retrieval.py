"""The best chunk: within its budget, whole sentences, the right one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.data.documents.structure import line_sentences
from cartridge_distill.data.records import parse_records
from cartridge_distill.evaluation.conditions import BestChunk
from cartridge_distill.evaluation.retrieval import ChunkIndex
from cartridge_distill.model.prompts import render_document
from cartridge_distill.util.errors import ConfigError
from tests.evaluation.made import TEXTS, teacher

DEMO = Path(__file__).resolve().parents[2] / "cartridge_distill/data/examples/demo.json"


@pytest.mark.parametrize("budget", [60, 150, 700])
def test_chunks_fit_and_lose_nothing(tokenizer: PreTrainedTokenizerFast, budget: int) -> None:
    [record] = parse_records(DEMO.read_text(), str(DEMO))
    index = ChunkIndex(record.document, partial(render_document, tokenizer), budget)
    assert all(len(ids) <= budget for ids in index.ids)
    assert " ".join(index.chunks).split() == record.document.split()
    if budget == 700:  # longer than any sentence: cut between sentences alone
        whole = line_sentences(record.document)
        assert [part for chunk in index.chunks for part in line_sentences(chunk)] == whole
        # and full: the next sentence would not have fitted
        firsts = [line_sentences(chunk)[0] for chunk in index.chunks[1:]]
        for chunk, after in zip(index.chunks, firsts, strict=False):
            assert len(render_document(tokenizer, f"{chunk} {after}")) > budget


def test_the_chunk_that_answers_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    [record] = parse_records(DEMO.read_text(), str(DEMO))
    index = ChunkIndex(record.document, partial(render_document, tokenizer), 700)
    found = 0
    for question in record.questions:
        asked = f"{question.question} {question.stem}"
        found += question.answer.lower() in index.chunks[index.best(asked)].lower()
    chance = len(record.questions) / len(index.chunks)
    assert found > 2 * chance, json.dumps([found, len(record.questions), len(index.chunks)])
    assert index.best("zyx qwv") == 0  # no word in common


def test_views_are_shared_and_cost_no_more_than_the_budget(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    chunks = BestChunk(teacher(packed, tokenizer), 48)
    boat, again = chunks.view("two", "a very old blue boat?"), chunks.view("two", "old blue boat")
    moth = chunks.view("two", "Who is called Moth?")
    assert boat is again and boat is not moth
    assert 0 < boat.kv_tokens <= 48 and boat.kv_tokens == len(boat.ids or ())
    assert "Moth" in str(tokenizer.decode(list(moth.ids or ())))
    assert "Ann" in str(tokenizer.decode(list(chunks.view("one", "Ann?").ids or ())))


def test_a_budget_below_one_word_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="the word 'Ann'.*takes 12"):
        ChunkIndex(TEXTS["one"], partial(render_document, tokenizer), 10)
