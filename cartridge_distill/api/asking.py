"""A cartridge that answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cli.about import About, Asked, check, look
from cartridge_distill.cli.conversation import Reply
from cartridge_distill.cli.opened import CARTRIDGE, Opened, open_views
from cartridge_distill.util.devices import check_device, known_dtype
from cartridge_distill.util.errors import ConfigError


class Loaded:
    """A model with a cartridge, and with the full document where that is known. See :func:`load`.

    Attributes:
        model, tokenizer: transformers' own.
        cartridge: as it is stored.
        views: names of what can stand before a question: "no document", "cartridge", and
            "full document" where the run, or the caller, says what the document is.
        questions: examples to ask.
        warnings: what a user must know before any answer.
    """

    def __init__(self, about: About, opened: Opened) -> None:
        assert about.stored is not None
        self._opened = opened
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.cartridge: StoredCartridge = about.stored
        self.views = tuple(opened.views)
        self.questions, self.warnings = about.questions, about.warnings

    def generate(
        self,
        question: str,
        *,
        start: str | None = None,
        view: str = CARTRIDGE,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stream: Callable[[str], None] = lambda text: None,
    ) -> Reply:
        """The answer to one question, asked alone.

        Args:
            start: beginning of the answer, for the model to go on from.
            view: one of :attr:`views`.
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token.
            stream: gets the text as it comes.

        Raises:
            ConfigError: there is no such view, or the question does not fit the context.
        """
        if view not in self.views:
            raise ConfigError(f"view={view!r}: there is none; fix: one of {', '.join(self.views)}")
        conversation = self._opened.conversation(0, max_new_tokens, temperature)
        return conversation.ask(view, question, stream, start)

    def compare(self, question: str, **more: Any) -> dict[str, Reply]:
        """The same question behind every view; ``more`` is as for :meth:`generate`."""
        return {view: self.generate(question, view=view, **more) for view in self.views}


def load(
    source: str | Path,
    *,
    model: str | None = None,
    document: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    allow_other_model: bool = False,
) -> Loaded:
    """A cartridge with its model.

    Args:
        source: a run's folder, a cartridge of any format, or a hub id.
        model: folder or hub id; the cartridge's own by default.
        document: file of the full document, to compare with; the run's by default.
        device: "cpu", "cuda", "cuda:1", ...; a GPU where there is one.
        dtype: "float32", "bfloat16", "float16"; as it was saved by default.
        allow_other_model: the cartridge was trained with other weights of the same shape, and that
            is meant.

    Raises:
        ConfigError: no model is known, or it is not there.
        CartridgeFormatError: the cartridge cannot be read, or is of another model.
    """
    path = None if document is None else Path(document)
    asked = Asked(str(source), model, path, allow_other_model)
    found, name = check(asked)
    about = look(asked, found, name)
    return Loaded(about, open_views(about, check_device(device), known_dtype(dtype)))
