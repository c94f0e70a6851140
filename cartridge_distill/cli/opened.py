"""A model behind what stands for a document, ready to be asked: for ``chat`` and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cli.about import About, check_loaded
from cartridge_distill.cli.conversation import Conversation, View, document_prefix
from cartridge_distill.model.loading import no_weights_bar
from cartridge_distill.model.prompts import render_document
from cartridge_distill.model.reading import read_tokenizer, reading

NO_DOCUMENT, CARTRIDGE, DOCUMENT = "no document", "cartridge", "full document"


@dataclass(frozen=True)
class Shown:
    """A view, as it is said: its name, and the KV that it takes."""

    name: str
    tokens: int
    num_bytes: int

    def heading(self) -> str:
        if not self.tokens:
            return f"{self.name} (no KV)"
        return f"{self.name} ({self.tokens:,} KV tokens, {self.num_bytes / 1e6:.1f} MB)"


@dataclass(frozen=True)
class Opened:
    """What can be asked.

    Attributes:
        model, tokenizer: an ordinary transformers model, on its device, and its tokenizer.
        views: what stands before a question, by name, from least to most of the document.
        shown: how each is said, in that order.
        said: what a user wants to know of their sizes.
    """

    model: Any
    tokenizer: Any
    views: dict[str, View]
    shown: Sequence[Shown]
    said: Sequence[str]

    def conversation(
        self, turns: int = 0, max_new_tokens: int = 128, temperature: float = 0.0
    ) -> Conversation:
        """With turns of its own; the arguments are :class:`Conversation`'s."""
        return Conversation(
            self.model, self.tokenizer, self.views, turns, max_new_tokens, temperature
        )


def open_views(about: About, device: torch.device, dtype: Any) -> Opened:
    """Loads the model, and puts cartridge and document before it as far as they are known.

    Args:
        dtype: of the model; "auto" is as it was saved.

    Raises:
        ConfigError: the model cannot be read.
        CartridgeFormatError: the cartridge is of another model.
        OtherModel: so say the weights, now that they are there.
    """
    tokenizer = read_tokenizer(about.model)
    with no_weights_bar(), reading(about.model, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            str(Path(about.model).expanduser()), dtype=dtype
        )
    check_loaded(about)
    model.to(device).eval()
    views: dict[str, View] = {NO_DOCUMENT: None}
    token_bytes = KvShape.of(model.config).numbers * model.dtype.itemsize
    shown = [Shown(NO_DOCUMENT, 0, 0)]
    said = []
    if about.stored is not None:
        prefix = Prefix(*about.stored.snapshot.layers()).to(model.device, model.dtype)
        views[CARTRIDGE] = prefix
        shown.append(Shown(CARTRIDGE, prefix.num_tokens, prefix.num_tokens * token_bytes))
        said.append(f"the cartridge takes {prefix.num_tokens} KV tokens")
    if about.document is not None:
        ids = render_document(tokenizer, about.document)
        times = ""
        if about.stored is not None:
            times = f", {len(ids) / about.stored.snapshot.num_tokens:.1f}x"
        said.append(f"the document would have taken {len(ids)}{times}")
        context = text_config(model.config).max_position_embeddings
        if len(ids) < context:
            views[DOCUMENT] = lambda: document_prefix(model, ids)  # seconds, for a long one
            shown.append(Shown(DOCUMENT, len(ids), len(ids) * token_bytes))
        else:
            said.append(f"which is over the model's context of {context}: it cannot be compared")
    return Opened(model, tokenizer, views, shown, said)
