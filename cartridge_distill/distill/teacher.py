"""The teacher: the student's own frozen weights, with the whole document as prefix.

No second model and no second server. A document's KV is computed once, kept (bounded, least
recently used out) and reused for every sample and every step; so is that of the prompts behind it,
which come again (``cartridge_distill.model.kept_tokens``). A sample without its document is an
error that names it; nothing is scored by the bare model instead.

The one exception is asked for by name: the document id ``BARE``, None, of rows that the data label
as general (``cartridge_distill.data.general``). Their teacher is the bare model, with its
begin-of-text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import BARE
from cartridge_distill.distill.loss import TeacherTopK
from cartridge_distill.model.attention import resolve_backend
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.kept_tokens import KeptTokens, Row
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import HostMask, host_mask, on_device, pack
from cartridge_distill.model.prefill import prefix_from_tokens
from cartridge_distill.util.errors import DocumentError


class Teacher:
    """Scores tokens with a document in context.

    Args:
        model: the frozen base model, the very object the student runs.
        documents: where the texts are.
        render: text -> token ids, normally
            ``functools.partial(cartridge_distill.model.prompts.render_document, tokenizer)``.
        max_cached: how many documents' KV is kept.
        backend: attention backend.
        begin: what the model always begins with, for ``BARE``, normally
            ``cartridge_distill.model.prompts.begin_of_text(tokenizer)``; None where no row is so.
        prompt_mib: MiB that the KV of prompts may take besides; 0 keeps none, and neither does a
            backend other than "grouped".
    """

    def __init__(
        self,
        model: nn.Module,
        documents: DocumentStore,
        render: Callable[[str], list[int]],
        max_cached: int = 8,
        backend: str = "auto",
        begin: Sequence[int] | None = None,
        prompt_mib: int = 256,
    ) -> None:
        self.model = model
        self.documents = documents
        self.render = render
        self.max_cached = max_cached
        self.backend = backend
        self.prefills = 0  # how often a document's KV was computed; a metric
        self._cache: OrderedDict[str, Prefix] = OrderedDict()
        self._begin = None if begin is None else list(begin)
        self._bare: Prefix | None = None
        self.prompts: KeptTokens | None = None
        self.settled: list[Row] = []  # what of them a checkpoint names
        if prompt_mib and resolve_backend(backend, self.device) == "grouped":
            dtype = next(model.parameters()).dtype
            shape = KvShape.of(model.config)
            self.prompts = KeptTokens(shape, dtype, prompt_mib * 2**20)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, document included; None: its config does not say."""
        return getattr(text_config(self.model.config), "max_position_embeddings", None)

    def document_ids(self, document_id: str) -> list[int]:
        """The token ids of a document, as the teacher reads it.

        Raises:
            DocumentError: missing, or longer than the model's context.
        """
        ids = self.render(self.documents.text(document_id))
        if self.context is not None and len(ids) >= self.context:
            raise DocumentError(
                f"document {document_id!r} has {len(ids)} tokens, the model's context is "
                f"{self.context}; fix: split the document or use a model with a longer context"
            )
        return ids

    def bare_prefix(self) -> Prefix | None:
        """What stands before a general sample: the begin-of-text's KV; None for nothing.

        Raises:
            DocumentError: this teacher was not told what the bare model begins with.
        """
        if self._begin is None:
            raise DocumentError(
                "a sample is labelled as general, and this teacher was not told what the bare "
                "model begins with; fix: give it, with Teacher(begin=...)"
            )
        if self._begin and self._bare is None:
            self._bare = self._prefill(self._begin)
        return self._bare

    def _prefill(self, ids: Sequence[int]) -> Prefix:
        tokens = on_device(ids, self.device, torch.long)
        return prefix_from_tokens(self.model, tokens, self.backend)

    def prefix(self, document_id: str) -> Prefix:
        """The document's KV, computed on first use."""
        if document_id in self._cache:
            self._cache.move_to_end(document_id)
            return self._cache[document_id]
        prefix = self._prefill(self.document_ids(document_id))
        self.prefills += 1
        self._cache[document_id] = prefix
        while len(self._cache) > self.max_cached:
            self._cache.popitem(last=False)
        return prefix

    def prefix_of(self, document_id: str | None) -> Prefix | None:
        """What stands before a sample with this document, or before a general one (``BARE``)."""
        return self.bare_prefix() if document_id is BARE else self.prefix(document_id)

    @contextmanager
    def _forwarding(self, document_ids: Sequence[str | None]) -> Iterator[None]:
        """Stands around the forwards of one :meth:`score`; several ranks have more to do here."""
        yield

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Tensor],
        response_masks: Sequence[Tensor | HostMask],
        document_ids: Sequence[str | None],
        k: int,
        temperature: float = 1.0,
        chosen_at: float | None = None,
        asked_ids: Tensor | None = None,
    ) -> TeacherTopK:
        """The teacher's distributions over the counted tokens; the host waits for nothing.

        Args:
            sequences: B ``[length]`` id tensors (prompt + response), without the document.
            response_masks: B ``[length]`` bool masks of the tokens that count: their distributions
                are returned. On the host, or the host waits for them.
            document_ids: B ids, ``BARE`` for a general sample.
            k: tokens of the top-k.
            temperature: the logits are divided by it.
            chosen_at: a temperature; when given, the log-probs of the counted tokens themselves are
                taken at it, too (``chosen``).
            asked_ids: ``[N, K]`` tokens whose log-probs are returned besides (``asked``), in the
                order of the result.

        Returns:
            One row for each of the N counted tokens, in the order of the sequences. Whether they
            are finite stands in it and is for the caller to look at.

        Raises:
            DocumentError: a document is missing, or document + sequence exceed the context.
            ValueError: not as many sequences as masks and ids, or none.
        """
        if not len(sequences) == len(response_masks) == len(document_ids) > 0:
            raise ValueError(
                f"{len(sequences)} sequences, {len(response_masks)} masks and {len(document_ids)} "
                "document ids; a sample has one of each"
            )
        masks = [host_mask(mask) for mask in response_masks]
        counts = [int(mask.sum()) for mask in masks]
        asked = None if asked_ids is None else asked_ids.split(counts)
        results: list[TeacherTopK | None] = [None] * len(sequences)
        with self._forwarding(document_ids):
            for document_id in dict.fromkeys(document_ids):
                members = [b for b, other in enumerate(document_ids) if other == document_id]
                prefix = self.prefix_of(document_id)
                self._check_length(document_id, prefix, max(len(sequences[b]) for b in members))
                batch = pack([sequences[b] for b in members]).to(self.device)
                mask = np.concatenate([masks[b] for b in members])
                kept = None if self.prompts is None else self.prompts.behind(document_id)
                logits = packed_forward(
                    self.model, prefix, batch, batch.predicts(mask), self.backend, kept
                )
                others = None if asked is None else torch.cat([asked[b] for b in members])
                told = TeacherTopK.from_logits(logits, k, temperature, others)
                if chosen_at is not None:
                    chosen = chosen_logprobs(logits, batch.tokens(mask), chosen_at)
                    told = replace(told, chosen=chosen)
                parts = told.split([counts[b] for b in members])
                for b, own in zip(members, parts, strict=True):
                    results[b] = own
        return TeacherTopK.join([own for own in results if own is not None])

    def _check_length(self, document_id: str | None, prefix: Prefix | None, longest: int) -> None:
        read = 0 if prefix is None else prefix.num_tokens
        if self.context is not None and read + longest > self.context:
            before = "what the bare model begins with" if document_id is BARE else None
            raise DocumentError(
                f"{before or f'document {document_id!r}'} ({read} tokens) and a sample of "
                f"{longest} tokens exceed the model's context of {self.context}; fix: split the "
                "document, shorten the prompts or answers, or use a model with a longer context"
            )


def not_finite(document_ids: Sequence[str | None]) -> DocumentError:
    """What to raise when the teacher's logits are not finite."""
    known = list(dict.fromkeys(document_ids))[:3]
    names = ", ".join("none (general)" if name is BARE else repr(name) for name in known)
    return DocumentError(f"the teacher's logits are not finite for a document among {names}")
