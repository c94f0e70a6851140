"""What is known of a cartridge that is to be used: its model, its document, questions about it.

A run's folder knows all of it; a cartridge that lies in one, too. What a user names goes before.
All that can be wrong with paths is said before anything is imported that takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from cartridge_distill.cartridge.hub_id import is_hub_id
from cartridge_distill.cartridge.run_folder import RECIPE_FILE, is_run, model_of, resolve_cartridge
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import CartridgeDistillError, CartridgeFormatError, ConfigError
from cartridge_distill.util.extras import require

if TYPE_CHECKING:
    from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge

_LEVELS = 5  # RUN/checkpoints/global_step_N/actor/cartridge
_DOCUMENTS, _QUESTIONS, _DATA = "documents.jsonl", "eval.json", "data"
_SETTING = "actor_rollout_ref.actor.cartridge.documents="
_DESCRIBED = "cartridge.json"
_EXAMPLES = 4
_SHOWN = 6
# Of every format: what a folder with a cartridge has at least one of.
_FILES = ("cartridge.*", "adapter_model.safetensors", "adapter_config.json", "*.pt")


@dataclass(frozen=True)
class Asked:
    """What a user says.

    Attributes:
        source: a run's folder, a cartridge of any format or a hub id; None for the bare model.
        model: folder or hub id; None for the cartridge's own.
        document: file of the full document; None takes the run's.
        allow_other_model: weights of another model are meant.
    """

    source: str | None = None
    model: str | None = None
    document: Path | None = None
    allow_other_model: bool = False


@dataclass(frozen=True)
class About:
    """What is known.

    Attributes:
        source: where the cartridge lies, as it is said.
        stored: the cartridge; None for the bare model.
        model: folder or hub id.
        document: text of the full document; None where nobody knows it.
        questions: examples to ask; empty where there are none.
        warnings: what a user must be told before any answer.
        allow_other_model: weights of another model are meant.
    """

    source: str
    stored: StoredCartridge | None
    model: str
    document: str | None
    questions: tuple[str, ...]
    warnings: tuple[str, ...]
    allow_other_model: bool = False


def check(asked: Asked) -> tuple[str | None, str]:
    """What can be known at once; returns where the cartridge lies, and the model.

    Raises:
        CartridgeFormatError: there is no such cartridge.
        ConfigError: no model is named and the cartridge says none, or it is not there.
        OtherModel: a native cartridge and a model's folder, and the weights are others.
        ExtraMissing: reading ``document`` needs what is not installed.
    """
    from cartridge_distill.model.reading import check_model_place

    source = None
    if asked.source is not None:
        source = resolve_cartridge(asked.source)
        _check_there(source)
    if asked.document is not None:
        require("chat --document")
        if not asked.document.expanduser().exists():
            raise ConfigError(
                f"--document {asked.document}: there is no such file; fix: name another, or none"
            )
    model = asked.model
    if model is None and asked.source is not None:
        model = model_of(asked.source)
        if model is None and source is not None and not Path(source).expanduser().exists():
            model = _model_of_hub(source)
    if model is None:
        said = f"{asked.source} does not say" if asked.source else "nothing says"
        raise ConfigError(
            f"{said} which model to use; fix: name it with --model FOLDER or --model HUB/ID"
        )
    try:
        check_model_place(model)
    except ConfigError:
        if asked.model is not None:
            raise
        raise ConfigError(
            f"{asked.source} says that its model is {model}, which is not there; fix: name the "
            "folder where it lies with --model"
        ) from None
    if source is not None and not asked.allow_other_model:
        _check_weights(source, model)
    return source, model


def look(asked: Asked, source: str | None, model: str) -> About:
    """Reads cartridge and document; the model's weights are compared, not loaded.

    Args:
        source, model: from :func:`check`.

    Raises:
        CartridgeFormatError: it cannot be read, does not fit the model, or is of another.
        DocumentError: the document cannot be read.
    """
    if source is None:
        document, _, warnings = _document(asked, None, None)
        return About(model, None, model, document, (), tuple(warnings))
    from cartridge_distill.cartridge.checkpoint import read_cartridge
    from cartridge_distill.model.identity import check_same_weights
    from cartridge_distill.model.reading import read_model_config

    stored = read_cartridge(source, read_model_config(model))
    told = check_same_weights(stored.meta, source, model, allow_other=asked.allow_other_model)
    document, questions, warnings = _document(asked, source, stored.meta.document_sha256)
    return About(
        str(asked.source),
        stored,
        model,
        document,
        tuple(questions),
        (*([told] if told else []), *warnings),
        asked.allow_other_model,
    )


def check_loaded(about: About) -> None:
    """Compares the weights again: those of a hub id may have come only with the loading.

    Raises:
        OtherModel: they are others than the cartridge says.
    """
    from cartridge_distill.model.identity import check_same_weights

    if about.stored is not None:
        allow = about.allow_other_model
        check_same_weights(about.stored.meta, about.source, about.model, allow_other=allow)


def _check_weights(source: str, model: str) -> None:
    """What two files say at once: the model's weights are others than the cartridge says."""
    from cartridge_distill.model.identity import check_same_weights

    described, folder = Path(source).expanduser() / _DESCRIBED, Path(model).expanduser()
    if not described.is_file() or not folder.is_dir():
        return
    try:
        said = json_text.load(described)
    except (json_text.JsonError, OSError):
        return  # who reads the cartridge says what is wrong with it
    if isinstance(said, dict) and isinstance(said.get("model_fingerprint"), str):
        meta = _Says(str(said.get("base_model")), said["model_fingerprint"])
        check_same_weights(meta, source, model)


@dataclass(frozen=True)
class _Says:
    base_model: str | None
    model_fingerprint: str | None


def _check_there(source: str) -> None:
    path = Path(source).expanduser()
    if path.is_dir() and not any(list(path.glob(pattern)) for pattern in _FILES):
        held = ", ".join(sorted(one.name for one in path.iterdir())[:_SHOWN]) or "nothing"
        raise CartridgeFormatError(
            f"{source} holds no cartridge (it has {held}); fix: name the folder of a run, or one "
            "with cartridge.safetensors, adapter_model.safetensors or a .pt file in it"
        )
    if path.exists():
        return
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, 1)
    if near:  # a path that is mistyped is not looked for on the Hub
        raise CartridgeFormatError(
            f"{source} is not there; fix: did you mean {path.parent / near[0]}?"
        )
    if not is_hub_id(source):
        raise CartridgeFormatError(
            f"{source} is no file, no directory and no hub id (owner/name); fix: name a run's "
            "folder, or that of a cartridge"
        )


def _model_of_hub(source: str) -> str | None:
    """A cartridge on the Hub must be fetched to be asked."""
    from cartridge_distill.cartridge.checkpoint import read_cartridge

    return read_cartridge(source).meta.base_model


def _document(
    asked: Asked, source: str | None, sha256: str | None
) -> tuple[str | None, list[str], list[str]]:
    """The document's text, questions about it, and what is odd about it."""
    from cartridge_distill.data.records import sha256_of

    data = _data_folder(source) if source is not None else None
    document_id, found, questions, warnings = None, None, [], []
    if data is not None:
        try:
            document_id, found = _of_data(data, sha256)
            questions = _questions(data, document_id)
        except (CartridgeDistillError, OSError) as error:
            warnings.append(f"the run's data is not used: {error}")
    if asked.document is not None:
        from cartridge_distill.data.documents.one import one_document  # an extra reads documents

        found = one_document(asked.document).text
        if sha256 is not None and sha256_of(found) != sha256:
            warnings.append(f"{asked.document} is not the document that {source} was trained on")
    return found, questions, warnings


def _data_folder(source: str) -> Path | None:
    """The data of the run that a cartridge lies in."""
    path = Path(source).expanduser().absolute()
    for run in [path, *path.parents][:_LEVELS]:
        if not is_run(run):
            continue
        if (run / _DATA / _DOCUMENTS).is_file():
            return run / _DATA
        named = [one for one in _overrides(run) if one.startswith(_SETTING)]
        documents = Path(named[-1].removeprefix(_SETTING)).expanduser() if named else None
        return documents.parent if documents is not None and documents.is_file() else None
    return None


def _overrides(run: Path) -> list[str]:
    try:
        recipe = json_text.load(run / RECIPE_FILE)
    except (json_text.JsonError, OSError):
        return []
    found = recipe.get("overrides") if isinstance(recipe, dict) else None
    return [str(one) for one in found] if isinstance(found, list) else []


def _of_data(data: Path, sha256: str | None) -> tuple[str | None, str | None]:
    """Id and text of the document that a cartridge stands for; None where that is open."""
    from cartridge_distill.data.document_store import DocumentStore
    from cartridge_distill.data.records import sha256_of

    store = DocumentStore.from_file(data / _DOCUMENTS)
    texts = {document_id: store.text(document_id) for document_id in store.ids}
    for document_id, text in texts.items():
        if sha256 is not None and sha256_of(text) == sha256:
            return document_id, text
    if sha256 is None and len(texts) == 1:
        return next(iter(texts.items()))
    return None, None


def _questions(data: Path, document_id: str | None) -> list[str]:
    """A few, from all over the file: neighbours ask about the same section."""
    from cartridge_distill.data.records import load_questions

    if not (data / _QUESTIONS).is_file():
        return []
    found = [
        one.question
        for one in load_questions(data / _QUESTIONS)
        if document_id is None or one.document_id == document_id
    ]
    count = min(_EXAMPLES, len(found))
    return [found[place * len(found) // count] for place in range(count)]
