"""Makes general rows (``general``) of prompts, and spreads them among those with a document."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cartridge_distill.data.dataset import Row, numbered
from cartridge_distill.data.decontamination import Seen
from cartridge_distill.data.general import BARE, GENERAL
from cartridge_distill.data.prompt_length import PromptLimit
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError, with_fix

OFF_CONTEXT_FILE = "off_context.txt"
"""Prompts that ``off_context_kl`` is measured on, a line each; never trained on."""

_SHIPPED = "general.txt"  # what general rows are made of where no file is named
_FEWEST = 2


def shipped(name: str) -> list[str]:
    """The prompts of a file of this package, a line each."""
    text = (resources.files("cartridge_distill.data") / "general_prompts" / name).read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


def off_context_prompts() -> list[str]:
    """The prompts of ``off_context_kl``."""
    return shipped(OFF_CONTEXT_FILE)


def read_prompts(path: Path | None) -> list[str]:
    """General prompts: of a ``.txt`` file a line each, of a ``.jsonl`` file its ``prompt``s.

    Args:
        path: None takes those that the package ships.

    Raises:
        ConfigError: the file is missing or no such file, or one of its prompts is (nearly) one of
            those that ``off_context_kl`` is measured on.
    """
    if path is None:
        return shipped(_SHIPPED)
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--general-prompts {path} cannot be read: {error}; fix: name a file of UTF-8 text"
        ) from error
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"--general-prompts {path} is of another kind; fix: give a .txt file with a prompt a "
            "line, or a .jsonl file "
            'with {"prompt": "..."} a line'
        )
    prompts = lines if path.suffix == ".txt" else _of_jsonl(lines, path)
    if len(prompts) < _FEWEST:
        raise ConfigError(f"--general-prompts {path} holds {len(prompts)} prompts; fix: give more")
    measured = Seen()
    for text in off_context_prompts():
        measured.add(text)
    for text in prompts:
        if (like := measured.like(text)) is not None:
            raise ConfigError(
                f"--general-prompts {path}: {text!r} is like {like!r}, on which off_context_kl is "
                "measured; fix: take it out"
            )
    return prompts


def _of_jsonl(lines: Sequence[str], path: Path) -> list[str]:
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json_text.loads(line)
        except json_text.JsonError as error:
            raise ConfigError(
                with_fix(f"--general-prompts {path}, line {number} {error}", "write JSON there")
            ) from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f'--general-prompts {path}, line {number}: no text in "prompt"; fix: fill it'
            )
        found.append(text)
    return found


def count_for(fraction: float, documents: int) -> int:
    """General rows beside so many rows with a document, to be the fraction of all of them.

    Raises:
        ConfigError: the fraction is not at least 0 and below 1, or comes to no row.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"--general-fraction {fraction} is out of range; fix: set a number from 0 (none) to "
            "below 1 (0.05 is usual)"
        )
    count = round(documents * fraction / (1 - fraction))
    if fraction and not count:
        raise ConfigError(
            f"--general-fraction {fraction} of {documents} rows is no row; fix: raise it, or write "
            "more --rows"
        )
    return count


def with_general(
    rows: Sequence[Row], prompts: Sequence[str], fraction: float, seed: int, limit: PromptLimit
) -> list[Row]:
    """Training rows with general ones spread evenly among them, numbered anew.

    Args:
        rows: with documents; their order stays.
        prompts: what the general rows ask; used in random order, over and over.
        fraction: of general rows among all.
        limit: a prompt over it is left out.

    Raises:
        ConfigError: a fraction that makes no sense, or no prompt within the limit.
    """
    count = count_for(fraction, len(rows))
    if not count:
        return list(rows)
    messages = [[{"role": "user", "content": text}] for text in prompts]
    fitting = [each for each in messages if limit.fits(each)]
    if not fitting:
        raise ConfigError(
            f"no general prompt is within --prompt-tokens {limit.tokens}; fix: "
            "raise it, or give shorter ones (--general-prompts)"
        )
    rng = random.Random(f"general/{seed}")
    general: list[Row] = []
    while len(general) < count:
        general += [_row(each) for each in rng.sample(fitting, len(fitting))]
    total = len(rows) + count
    places = {(2 * number + 1) * total // (2 * count) for number in range(count)}
    documents, others = iter(rows), iter(general)
    mixed = [next(others) if place in places else next(documents) for place in range(total)]
    return numbered(({**row, "extra_info": _unnumbered(row)} for row in mixed), "train")


def _row(messages: list[dict[str, str]]) -> Row:
    info = {"document_id": BARE, "recipe": GENERAL, "kind": GENERAL, "chunk": None, "seed": None}
    return {
        "prompt": messages,
        "data_source": "cartridge_distill",
        "patient_id": None,
        "correct_answer": "",
        "extra_info": info,
    }


def _unnumbered(row: Row) -> dict[str, Any]:
    own = ("index", "split")
    return {name: value for name, value in row["extra_info"].items() if name not in own}
