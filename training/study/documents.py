"""The study's documents: real ones, with questions, under ``training/study/texts``.

``texts/index.yaml`` has an entry a document: file, language, source, licence, and whether recipes
are tuned on it or it is kept unseen. The questions lie beside it, in the format of ``prepare
--questions``. ``demo-record`` is the demo's, with its own questions. docs/results.md has what each
model can do with them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from cartridge_distill.data import command, prepare
from cartridge_distill.util.errors import ConfigError, nearest
from training.study.grid import Grid

TEXTS = Path(__file__).parent / "texts"
DEMO_RECORD = "demo-record"
TUNING, UNSEEN = "tuning", "unseen"
ONE_PLACE, TWO_PLACES = "one place", "two places"
KINDS = (ONE_PLACE, TWO_PLACES)
_KEYS = {"file", "sha256", "title", "language", "use", "source", "licence", "copyright"}


@dataclass(frozen=True)
class StudyDocument:
    """A document and its questions.

    Attributes:
        name: in a grid.
        text: the document's file.
        questions: their file; None for a record that has its own.
        use: :data:`TUNING` or :data:`UNSEEN`.
        language, source, licence: in words.
    """

    name: str
    text: Path
    questions: Path | None
    use: str = TUNING
    language: str = "English"
    source: str = ""
    licence: str = ""

    @property
    def sha256(self) -> str:
        """Of text and questions together."""
        digest = hashlib.sha256(self.text.read_bytes())
        if self.questions is not None:
            digest.update(hashlib.sha256(self.questions.read_bytes()).digest())
        return digest.hexdigest()


def all_documents(folder: Path = TEXTS) -> dict[str, StudyDocument]:
    """By name, the demo's record among them.

    Raises:
        ConfigError: the index is not what it must be.
    """
    index = folder / "index.yaml"
    found = {DEMO_RECORD: StudyDocument(DEMO_RECORD, command.DEFAULT_DATA, None)}
    entries = yaml.safe_load(index.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != _KEYS:
            raise ConfigError(f"{index}: {name} must have {', '.join(sorted(_KEYS))}")
        if entry["use"] not in (TUNING, UNSEEN):
            raise ConfigError(
                f"{index}: {name}: use is {entry['use']!r}; give {TUNING} or {UNSEEN}"
            )
        text, questions = folder / entry["file"], folder / f"{name}.questions.json"
        for path in (text, questions):
            if not path.is_file():
                raise ConfigError(f"{index}: {name}: {path} is not there")
        if hashlib.sha256(text.read_bytes()).hexdigest() != entry["sha256"]:
            raise ConfigError(
                f"{index}: {name}: {text} is not as it was: its sha256 is another; fix: take the "
                "file of the commit, no formatter may touch it"
            )
        found[name] = StudyDocument(
            *(name, text, questions, entry["use"]),
            *(entry["language"], entry["source"], entry["licence"]),
        )
    return found


def chosen(grid: Grid) -> list[StudyDocument]:
    """The grid's documents.

    Raises:
        ConfigError: a name is unknown, or a document is kept for the end and the grid does not say
            that the end has come.
    """
    known = all_documents()
    for name in grid.documents:
        if name not in known:
            raise ConfigError(f"document {name!r} is unknown{nearest(name, known)}")
        if known[name].use == UNSEEN and not grid.unseen:
            raise ConfigError(
                f"document {name!r} is kept unseen until recipes are chosen; a grid that is the "
                "end of a study says `unseen: true`"
            )
    return [known[name] for name in grid.documents]


def prepare_data(document: StudyDocument, grid: Grid, model: str, seed: int, out: Path) -> Path:
    """Writes the data folder of a document and a seed, where it is not there yet.

    Returns:
        The folder: prompts for ``steps`` batches, the document, the questions.

    Raises:
        CartridgeDistillError: as ``cartridge-distill prepare``.
    """
    if (out / "eval.json").is_file():  # the file that is written last
        return out
    typed = ["--data", str(document.text), "--tokenizer", model, "--out", str(out), "--overwrite"]
    typed += ["--recipe", grid.prompt_recipe, "--rows", str(_rows(grid)), "--seed", str(seed)]
    typed += ["--prompt-tokens", str(grid.prompt_tokens)]
    typed += ["--response-tokens", str(grid.response_tokens)]
    if document.questions is not None:
        typed += ["--questions", str(document.questions)]
    if grid.general_fraction:
        typed += ["--general-fraction", str(grid.general_fraction)]
    prepare.run(command.parse(typed))
    return out


def _rows(grid: Grid) -> int:
    """Rows with a document, so that all rows are ``steps`` whole batches."""
    total = grid.steps * grid.batch
    return total - round(total * grid.general_fraction)
