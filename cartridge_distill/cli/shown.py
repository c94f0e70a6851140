"""What a server of cartridges shows of itself: models by name, documents, the page's figures.

A document is served as a model of its own, ``NAME:document``: the base model that has read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cartridge_distill.cli.about import About

if TYPE_CHECKING:
    from cartridge_distill.server.playground.page import Playground

DOCUMENT = ":document"
"""Behind a cartridge's name; no cartridge's name holds a colon."""
_ROOM = 64
_UNKNOWN = (
    "The server does not know the document. Start it with the run's folder, or with --document "
    "NAME=FILE."
)


class Shown:
    """Cartridges and documents of one server.

    Args:
        abouts: what is known of each cartridge, by its name.
        tokenizer: the model's.
        model: the base model's name.

    Attributes:
        documents: token ids of those that fit, by the name of the model that has read them.
    """

    def __init__(self, abouts: Mapping[str, About], tokenizer: Any, model: str) -> None:
        from cartridge_distill.cartridge.kv_shape import text_config
        from cartridge_distill.model.prompts import render_document
        from cartridge_distill.model.reading import read_model_config

        self._abouts, self._model = abouts, model
        context = text_config(read_model_config(model)).max_position_embeddings
        self.documents: dict[str, list[int]] = {}
        self._why_not: dict[str, str] = {}
        for name, about in abouts.items():
            if about.document is None:
                self._why_not[name] = _UNKNOWN
                continue
            ids = render_document(tokenizer, about.document)
            if len(ids) + _ROOM > context:
                self._why_not[name] = (
                    f"The document has {len(ids):,} tokens, and the model a context of "
                    f"{context:,}: it cannot be asked with the whole document."
                )
            else:
                self.documents[name + DOCUMENT] = ids

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 for none."""
        return max(map(len, self.documents.values()), default=0)

    def on_page(self, context: int, model: Any) -> Playground:
        """What the page shows.

        Args:
            context: tokens that prompt and answer may have together.
            model: the loaded model.
        """
        from cartridge_distill.cartridge.kv_shape import KvShape
        from cartridge_distill.server.playground import page

        cartridges = []
        for name, about in self._abouts.items():
            assert about.stored is not None
            ids = self.documents.get(name + DOCUMENT)
            document = None if ids is None else page.Place(name + DOCUMENT, len(ids))
            own = page.Place(name, about.stored.snapshot.num_tokens)
            why = self._why_not.get(name, "")
            cartridges.append(page.Shown(own, document, why, about.questions))
        token_bytes = KvShape.of(model.config).numbers * model.dtype.itemsize
        return page.Playground(self._model, token_bytes, context, cartridges)
