"""The divergence along a document: all of its text, none where the cartridge is the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.evaluation.shading import (
    PASSAGE_TOKENS,
    ShadedDocument,
    ShadedToken,
    shade,
    write_shading,
)
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.model.prompts import render_document
from tests.data.documents.made import prose

SAID = "It cost 7 €, the \N{FERRY}\ufe0f inspector said."
TEXT = f"# Harbour\n\n{prose(6)}\n\n{SAID}\n\n{prose(4, 90)}\n"


@pytest.fixture(autouse=True)
def roomy(packed: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a token: the text is longer than the tiny model's context."""
    monkeypatch.setattr(packed.config, "max_position_embeddings", 4096)


def prefix_of(model: Any, tokenizer: Any, text: str) -> Any:
    return prefix_from_tokens(model, torch.tensor(render_document(tokenizer, text)))


def shaded(model: Any, tokenizer: Any, cartridge: str, tokens: int = 10_000) -> ShadedDocument:
    full = prefix_of(model, tokenizer, TEXT)
    return shade(
        model, tokenizer, "harbour", TEXT, full, prefix_of(model, tokenizer, cartridge), tokens
    )


def test_the_document_itself_has_no_divergence_and_no_character_is_lost(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = shaded(packed, tokenizer, TEXT)
    assert "".join(token.text for token in found.tokens) == TEXT and found.whole
    assert {token.said for token in found.tokens} == {None}
    assert max(token.kl or 0.0 for token in found.tokens) < 1e-3
    assert len(found.tokens) > 3 * PASSAGE_TOKENS


def test_another_text_has_one_and_what_it_would_have_said(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = shaded(packed, tokenizer, "Nothing of the kind is known here. " * 5)
    nats = [token.kl for token in found.tokens if token.kl is not None]
    assert len(nats) == len(found.tokens) and min(nats) >= 0 and max(nats) > 1e-4
    for token in found.tokens:
        assert token.said is None or token.said != token.text


def test_a_long_document_is_looked_at_in_part(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = shaded(packed, tokenizer, TEXT, tokens=2 * PASSAGE_TOKENS)
    text = "".join(token.text for token in found.tokens)
    assert not found.whole and 0 < len(text) < len(TEXT) and TEXT.startswith(text)
    assert len(found.tokens) <= 2 * PASSAGE_TOKENS
    least = shaded(packed, tokenizer, TEXT, tokens=1)
    assert least.tokens and not least.whole  # one passage at least


def test_the_nats_are_those_of_the_definition(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against transformers' own attention, the document in the context as ordinary tokens."""
    from cartridge_distill.evaluation.shading import _passages

    other = "Another harbour altogether, with two piers."
    found = shaded(packed, tokenizer, other)
    first, _ = _passages(tokenizer, TEXT, 1)
    packed.set_attn_implementation("eager")
    rows = []
    for text in (TEXT, other):
        context = [*render_document(tokenizer, text), *first[0].prompt]
        with torch.no_grad():
            logits = packed(torch.tensor([[*context, *first[0].ids]])).logits[0]
        rows.append(logits[len(context) - 1 : -1].double().log_softmax(-1))
    expected = (rows[0].exp() * (rows[0] - rows[1])).sum(-1).tolist()
    nats = [token.kl for token in found.tokens[: len(expected)]]
    assert nats == pytest.approx(expected, abs=2e-3)


def test_the_file_says_what_was_found(tmp_path: Path) -> None:
    tokens = [
        ShadedToken("A", 0.5, None),
        ShadedToken(" b", 1.25, " c"),
        ShadedToken("d", None, None),
    ]
    path = write_shading(tmp_path, [ShadedDocument("one", tokens, False)])
    assert json.loads(path.read_text()) == {
        "documents": [
            {
                "document_id": "one",
                "whole": False,
                "tokens": [["A", 0.5], [" b", 1.25, " c"], ["d", None]],
            }
        ]
    }
