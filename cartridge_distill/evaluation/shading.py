"""Where in a document the cartridge goes astray: the divergence at each of its tokens.

The text is cut into passages of some sentences. Each passage is an answer that the user has asked
for by quoting what stands before it; the model with the whole document and the model with the
cartridge alone are both asked for each of its tokens, and a token's divergence is
``sum_v p(v) log(p(v) / q(v))`` in nats, p the full document's distribution, q the cartridge's. What
the full document makes certain and the cartridge does not know has a large one; what anybody would
guess has none.

For the report, which shades the document's text. A token also has what the cartridge would have
said, where it is wrong and the full document is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.documents.chunking import chunk_text
from cartridge_distill.evaluation.scoring import finite, response_logits
from cartridge_distill.model.contents import content_ids
from cartridge_distill.model.prompts import render_prompt

SHADING_FILE = "document_kl.json"
PASSAGE_TOKENS = 96
_AT_ONCE = 5  # passages: 5 x 96 tokens x 128k vocabulary x 4 bytes = 246 MB, twice
_QUOTED = 160  # characters before a passage
_DIGITS = 3
FIRST = "How does the document begin? Quote it word for word."
NEXT = 'Which words follow in the document after "{}"? Quote them.'


@dataclass(frozen=True)
class ShadedToken:
    """A token of the document.

    Attributes:
        text: its characters; "" for one that only completes a character of the token before.
        kl: nats; None where it was not looked at.
        said: the cartridge's likeliest token, where it is another and the full document's is this.
    """

    text: str
    kl: float | None
    said: str | None


@dataclass(frozen=True)
class ShadedDocument:
    """A document's tokens in order.

    Attributes:
        whole: False where the text is longer than what was looked at.
    """

    document_id: str
    tokens: list[ShadedToken]
    whole: bool


@dataclass(frozen=True)
class _Passage:
    prompt: list[int]
    ids: list[int]
    pieces: list[str]


@torch.no_grad()
def shade(
    model: Any,
    tokenizer: Any,
    document_id: str,
    text: str,
    full: Prefix,
    cartridge: Prefix,
    tokens: int,
) -> ShadedDocument:
    """Looks at a document's first tokens.

    Args:
        text: the document's.
        full, cartridge: the KV of the whole document, and of the cartridge.
        tokens: as many are looked at, at most; whole passages.

    Raises:
        CartridgeDistillError: the logits behind a prefix are not finite.
    """
    passages, whole = _passages(tokenizer, text, tokens)
    found: list[ShadedToken] = []
    for at in range(0, len(passages), _AT_ONCE):
        some = passages[at : at + _AT_ONCE]
        asked = [each for each in some if each.ids]
        nats, wrong = _compared(model, tokenizer, full, cartridge, asked) if asked else ([], [])
        scored = iter(zip(nats, wrong, strict=True))
        for each in some:
            if each.ids:
                found += [ShadedToken(piece, *next(scored)) for piece in each.pieces]
            else:
                found.append(ShadedToken(each.pieces[0], None, None))
    return ShadedDocument(document_id, found, whole)


def _compared(
    model: Any, tokenizer: Any, full: Prefix, cartridge: Prefix, passages: Sequence[_Passage]
) -> tuple[list[float], list[str | None]]:
    """For each token of the passages its nats, and what the cartridge would have said if wrong."""
    prompts, answers = [each.prompt for each in passages], [each.ids for each in passages]
    p = response_logits(model, full, prompts, answers).float().log_softmax(-1)
    q = response_logits(model, cartridge, prompts, answers).float().log_softmax(-1)
    nats = torch.where(torch.isneginf(p), 0.0, p.exp() * (p - q)).sum(-1).tolist()
    ids = [token for each in passages for token in each.ids]
    rows = zip(ids, p.argmax(-1).tolist(), q.argmax(-1).tolist(), strict=True)
    wrong = [
        str(tokenizer.decode([said])) if known == token != said else None
        for token, known, said in rows
    ]
    # Rounding of two equal distributions can end below zero.
    return [round(max(0.0, finite(kl)), _DIGITS) for kl in nats], wrong


def _passages(tokenizer: Any, text: str, tokens: int) -> tuple[list[_Passage], bool]:
    """Passages of at most so many tokens in all, one at least, and whether they are all there are.

    A passage whose tokens cannot be told from those of the prompt before it is not looked at.
    """

    def length(part: str) -> int:
        return len(content_ids(tokenizer, part))

    found: list[_Passage] = []
    used = end = 0
    for chunk in chunk_text(text, PASSAGE_TOKENS, length, "plain"):
        before = " ".join(text[max(0, chunk.start - _QUOTED) : chunk.start].split())
        asked = NEXT.format(before.partition(" ")[2] or before) if before else FIRST
        user = {"role": "user", "content": asked}
        head = render_prompt(tokenizer, [user, {"role": "assistant", "content": ""}])
        passage = text[end : chunk.end]  # with the blanks between it and the one before
        answer = passage.strip()
        whole = render_prompt(tokenizer, [user, {"role": "assistant", "content": answer}])
        ids = whole[len(head) :] if whole[: len(head)] == head else []
        if found and used + len(ids) > tokens:
            return found, False
        pieces = _pieces(tokenizer, ids) or [answer]
        pieces[0] = passage[: len(passage) - len(passage.lstrip())] + pieces[0]
        pieces[-1] += passage[len(passage.rstrip()) :]
        found.append(_Passage(head, ids, pieces))
        used, end = used + len(ids), chunk.end
    found[-1].pieces[-1] += text[end:]
    return found, True


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The characters that each token adds; those of a character of several tokens at its last."""
    pieces, shown = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:count])))
        ready = text.rstrip("\N{REPLACEMENT CHARACTER}") if count < len(ids) else text
        pieces.append(ready[len(shown) :] if ready.startswith(shown) else "")
        shown = ready if ready.startswith(shown) else shown
    return pieces


def write_shading(folder: Path, documents: Sequence[ShadedDocument]) -> Path:
    """Writes ``document_kl.json``, whole or not at all: for each document its tokens in order, each
    ``[text, nats]``, or ``[text, nats, what the cartridge would have said]``."""
    rows = [
        {
            "document_id": document.document_id,
            "whole": document.whole,
            "tokens": [
                [token.text, token.kl, *([token.said] if token.said is not None else [])]
                for token in document.tokens
            ],
        }
        for document in documents
    ]
    target = folder / SHADING_FILE
    part = target.with_name(f"{SHADING_FILE}.part")
    part.write_text(json.dumps({"documents": rows}, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(target)
    return target
