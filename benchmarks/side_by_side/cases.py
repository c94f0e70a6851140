"""The cases of the benchmark: a document, answers and a cartridge, and their data folder.

The first case is a step of the demo: its record, its prompts in its order, its recipe. Each further
one changes one of the three numbers. A document of another length is the record followed by the
study's texts, cut at so many tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.data import command, prepare
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.records import Document, save_documents, sha256_of
from cartridge_distill.model.prompts import render_document
from cartridge_distill.util.errors import ConfigError
from training.study.documents import all_documents

DEMO_STEPS = 36
DEMO_BATCH = 48
DEMO_ANSWER = 6
DEMO_CARTRIDGE = 128
DEMO_PROMPT = 192
DEMO_SEED = 0


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        answer: tokens of each answer.
        cartridge: tokens.
        document: tokens; None is the demo's record as it is.
    """

    answer: int = DEMO_ANSWER
    cartridge: int = DEMO_CARTRIDGE
    document: int | None = None

    def __str__(self) -> str:
        document = "the demo's document"
        if self.document is not None:
            document = f"a document of {self.document:,}"
        return f"answers of {self.answer} tokens, a cartridge of {self.cartridge:,}, {document}"


@dataclass(frozen=True)
class Sizes:
    """How much of a case is computed.

    Attributes:
        rollouts: a step.
        repeats: timed steps.
        reread: samples that the document is read again for, by the way that does so.
    """

    rollouts: int = DEMO_BATCH
    repeats: int = 3
    reread: int = 12


def cases_of(
    documents: Sequence[int], answers: Sequence[int], cartridges: Sequence[int]
) -> list[Case]:
    """The demo's, then one for each value."""
    found = [Case()]
    found += [Case(document=tokens) for tokens in documents]
    found += [Case(answer=tokens) for tokens in answers]
    found += [Case(cartridge=tokens) for tokens in cartridges]
    return list(dict.fromkeys(found))


def demo_data(model: str, out: Path) -> Path:
    """The demo's own data folder, as `cartridge-distill demo` prepares it."""
    rows = DEMO_STEPS * DEMO_BATCH
    typed = ["--data", str(command.DEFAULT_DATA), "--tokenizer", model, "--out", str(out)]
    typed += ["--recipe", "started", "--seed", str(DEMO_SEED), "--rows", str(rows)]
    typed += ["--prompt-tokens", str(DEMO_PROMPT), "--response-tokens", str(DEMO_ANSWER)]
    prepare.run(command.parse(typed))
    return out


def data_of(case: Case, demo: Path, tokenizer: Any, out: Path) -> Path:
    """The data folder of a case: the demo's prompts, and the document at its length.

    Raises:
        ConfigError: all texts together are shorter.
    """
    if case.document is None:
        return demo
    store = DocumentStore.from_file(demo / "documents.jsonl")
    (name,) = store.ids
    text = _cut(store.text(name), case.document, tokenizer)
    out.mkdir(parents=True)
    shutil.copy(demo / "train.parquet", out)
    save_documents(out / "documents.jsonl", [Document(name, text, sha256_of(text))])
    return out


def _cut(record: str, tokens: int, tokenizer: Any) -> str:
    """The longest text whose rendered ids are so many, or a few less."""
    files = [each.text for each in all_documents().values() if each.questions is not None]
    texts = [record, *(path.read_text(encoding="utf-8") for path in files)]
    whole = "\n\n".join(texts)
    have = len(render_document(tokenizer, whole))
    if have < tokens:
        raise ConfigError(
            f"--documents {tokens}: the record and the study's texts have {have:,} tokens together;"
            " give fewer"
        )
    low, high = 0, len(whole)
    while low < high:
        middle = (low + high + 1) // 2
        if len(render_document(tokenizer, whole[:middle])) <= tokens:
            low = middle
        else:
            high = middle - 1
    return whole[:low]
