"""The tasks of self-study: which chunk, kind, wording, sentence and seed each generation has.

The wording of the seed prompts is ours. Each also quotes a sentence of the chunk to start from, so
that a small document gives many different prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cartridge_distill.data.documents import structure
from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.chunking import chunk_text
from cartridge_distill.data.documents.source import Part, Source
from cartridge_distill.data.words import words

SEED_PROMPTS: dict[str, tuple[str, ...]] = {
    "structuring": (
        "Write one request to put a part of what this text says into order: as a table, a list, a "
        "timeline or JSON. Say which facts belong in it and in which form.",
        "Write one instruction that asks for some of the facts of this text in a fixed format. "
        "Say what the entries are and which fields each of them has.",
        "Think of facts in this text that belong together. Write one request to sort them under "
        "headings or in columns, and name these.",
    ),
    "summarisation": (
        "Write one request to summarize a particular part of this text. Say which part, and how "
        "long or for whom the summary is.",
        "Choose one subject of this text. Write one instruction that asks for the main points "
        "about it.",
        "Write one request to retell in a few sentences what this text says about one subject. "
        "Name the subject.",
    ),
    "question": (
        "Write one question that can be answered from this text alone. Ask for a particular name, "
        "number, date or reason.",
        "Write one exam question about a detail of this text.",
        "Write one question whose answer needs two facts of this text.",
    ),
    "use_case": (
        "Think of someone who needs this text for their work. Write one question or task that they "
        "would bring to an assistant who knows the text.",
        "Write one practical request of a person who has to decide or to do something with the "
        "help of this text.",
        "Imagine a user with a problem that this text helps to solve. Write their message to an "
        "assistant.",
    ),
    "creative": (
        "Write one imaginative writing task about the people, things or events in this text, such "
        "as a letter, a dialogue, a poem or a news report.",
        "Write one playful task that cannot be done without knowing this text.",
        "Write one request to explain something from this text in an unusual way: as a story, a "
        "comparison or a talk between two people.",
    ),
}
KINDS = tuple(SEED_PROMPTS)
# First words for models too small to follow a seed prompt: they answer it, or copy its sentence.
OPENINGS: dict[str, tuple[str, ...]] = {
    "structuring": ("List", "Make a table of", "Make a timeline of", "Sort", "Give in JSON"),
    "summarisation": ("Summarize", "Sum up in two sentences", "Give the main points of"),
    "question": ("What", "Who", "When", "Where", "Why", "How", "Which"),
    "use_case": ("How can I", "I need to know", "What should I", "Help me"),
    "creative": ("Write a poem about", "Write a letter from", "Tell a story about", "Imagine"),
}
_MANNER = (
    "Name the people, places and things you mean, for a reader who does not have the text at hand. "
    "Write the request alone, without an answer and without an introduction."
)
_FOCUS = 'Start from this sentence: "{}"'
_LONGEST_FOCUS, _SHORTEST_FOCUS = 60, 4  # words


@dataclass(frozen=True)
class StudyChunk:
    """What the model has before it: `text` is `[start:end]` of the part's text."""

    source: Source
    part: Part
    start: int
    end: int
    text: str
    sentences: tuple[str, ...]

    @property
    def span(self) -> str:
        """``start:end``, in characters of the teacher's text."""
        return f"{self.start}:{self.end}"


@dataclass(frozen=True)
class Task:
    """One generation; `opening` is what the model's text begins with, or nothing."""

    number: int
    chunk: StudyChunk
    kind: str
    seed_prompt: str
    opening: str
    seed: int


class Plan:
    """Which chunk, kind, wording, sentence and sampling seed each task has.

    Chunks are taken in a new random order on each pass, so that all of the documents is covered
    evenly; the kinds take turns.

    Args:
        sources: with their parts; chunks are cut inside parts.
        chunk_tokens: of a chunk at most.
        seed: everything that is drawn follows from it.
        length: tokens of a text as the model reads it.
        openings: give the first words of each prompt, out of `OPENINGS`.

    Raises:
        DocumentError: a part is empty, or `chunk_tokens` too small.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        chunk_tokens: int,
        seed: int,
        length: Callable[[str], int],
        openings: bool = False,
    ) -> None:
        self.seed = seed
        self.openings = OPENINGS if openings else {}
        self.several = len(sources) > 1
        self.chunks = [
            StudyChunk(
                *(source, part, chunk.start, chunk.end, chunk.text),
                _focuses(chunk.text, source.form),
            )
            for source in sources
            for part in source.parts
            for chunk in chunk_text(part.document.text, chunk_tokens, length, source.form)
        ]
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, turn: int) -> list[int]:
        numbers = range(len(self.chunks))
        return random.Random(f"{self.seed}/pass {turn}").sample(numbers, len(numbers))

    def chunk_of(self, number: int) -> StudyChunk:
        """What the model has before it in this task."""
        turn, place = divmod(number, len(self.chunks))
        return self.chunks[self._order(turn)[place]]

    def task(self, number: int) -> Task:
        """The task of a number from 0; the same whenever it is asked for."""
        chunk = self.chunk_of(number)
        rng = random.Random(f"{self.seed}/task {number}")
        kind = KINDS[number % len(KINDS)]
        seed_prompt = f"{rng.choice(SEED_PROMPTS[kind])} {_MANNER}"
        if self.several:
            seed_prompt += f' The text is from "{chunk.source.title}".'
        if chunk.sentences:
            seed_prompt += "\n\n" + _FOCUS.format(rng.choice(chunk.sentences))
        opening = rng.choice(self.openings.get(kind, ("",)))
        return Task(number, chunk, kind, seed_prompt, opening, rng.getrandbits(31))

    def fingerprint(self) -> str:
        """Of all that a task depends on, the seed prompts' wording included."""
        wording = (SEED_PROMPTS, self.openings, _MANNER, _FOCUS, self.several)
        digest = hashlib.sha256(repr(wording).encode())
        for chunk in self.chunks:
            digest.update(f"{chunk.part.document.document_id} {chunk.span} {chunk.text}".encode())
        return digest.hexdigest()


def _focuses(text: str, form: Form) -> tuple[str, ...]:
    """The sentences that a seed prompt may quote."""
    found = structure.sentences(text, form)
    return tuple(s for s in found if _SHORTEST_FOCUS <= len(words(s)) <= _LONGEST_FOCUS)
