"""The teacher: the student's own frozen weights, with the whole document as prefix.

No second model and no second server. A document's KV is computed once, kept (bounded, least
recently used out) and reused for every sample and every step. A sample without its document is an
error that names it; nothing is scored by the bare model instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cartridge_distill.document_store import DocumentStore
from cartridge_distill.errors import DocumentError
from cartridge_distill.forward import decoder_config, packed_forward
from cartridge_distill.logprobs import chosen_logprobs
from cartridge_distill.loss import TeacherTopK
from cartridge_distill.packing import pack
from cartridge_distill.prefix import Prefix, prefix_from_tokens

_ROWS = 512  # rows of logits worked on at once


class Teacher:
    """Scores tokens with a document in context.

    Args:
        model: the frozen base model, the very object the student runs.
        documents: where the texts are.
        render: text -> token ids, normally
            ``functools.partial(cartridge_distill.prompts.render_document, tokenizer)``.
        max_cached: how many documents' KV is kept.
        backend: attention backend.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: DocumentStore,
        render: Callable[[str], list[int]],
        max_cached: int = 8,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.documents = documents
        self.render = render
        self.max_cached = max_cached
        self.backend = backend
        self.prefills = 0  # how often a document's KV was computed; a metric
        self._cache: OrderedDict[str, Prefix] = OrderedDict()

    @property
    def context(self) -> int | None:
        return getattr(decoder_config(self.model), "max_position_embeddings", None)

    def document_ids(self, document_id: str) -> list[int]:
        """The token ids of a document, as the teacher reads it.

        Raises:
            DocumentError: missing, or longer than the model's context.
        """
        ids = self.render(self.documents.text(document_id))
        if self.context is not None and len(ids) >= self.context:
            raise DocumentError(
                f"document {document_id!r} has {len(ids)} tokens, the model's context is "
                f"{self.context}; split the document or use a model with a longer context"
            )
        return ids

    def prefix(self, document_id: str) -> Prefix:
        """The document's KV, computed on first use."""
        if document_id in self._cache:
            self._cache.move_to_end(document_id)
            return self._cache[document_id]
        ids = self.document_ids(document_id)
        device = next(self.model.parameters()).device
        prefix = prefix_from_tokens(
            self.model,
            torch.tensor(ids, device=device),
            self.backend,
        )
        self.prefills += 1
        self._cache[document_id] = prefix
        while len(self._cache) > self.max_cached:
            self._cache.popitem(last=False)
        return prefix

    @torch.no_grad()
    def topk(
        self,
        sequences: Sequence[Tensor],
        wanted: Sequence[Tensor],
        document_ids: Sequence[str],
        k: int,
        temperature: float = 1.0,
        chosen_at: float | None = None,
    ) -> TeacherTopK:
        """The teacher's distributions over the wanted tokens.

        Args:
            sequences: B ``[length]`` id tensors (prompt + response), without the document.
            wanted: B ``[length]`` bool masks, the tokens whose distribution is asked for.
            document_ids: B ids.
            k, temperature: of the top-k.
            chosen_at: a temperature; when given, the log-probs of the wanted tokens themselves are
                taken at it, too (``chosen``).

        Returns:
            N = total wanted tokens rows, in the order of the sequences.

        Raises:
            DocumentError: a document is missing, or document + sequence exceed the context.
        """
        results: list[list[Tensor]] = [[]] * len(sequences)
        for document_id in dict.fromkeys(document_ids):
            members = [b for b, other in enumerate(document_ids) if other == document_id]
            prefix = self.prefix(document_id)
            longest = max(len(sequences[b]) for b in members)
            if self.context is not None and prefix.num_tokens + longest > self.context:
                raise DocumentError(
                    f"document {document_id!r} ({prefix.num_tokens} tokens) and a sample of "
                    f"{longest} tokens exceed the model's context of {self.context}"
                )
            batch = pack([sequences[b] for b in members])
            mask = torch.cat([wanted[b] for b in members])
            logits = packed_forward(self.model, prefix, batch, batch.predicts(mask), self.backend)
            if not bool(torch.isfinite(logits).all()):
                raise DocumentError(
                    f"the teacher's logits for document {document_id!r} are not finite"
                )
            top = TeacherTopK.from_logits(logits, k, temperature)
            parts = [top.ids, top.logprobs]
            if chosen_at is not None:
                parts.append(_chosen(logits, batch.input_ids[mask], chosen_at))
            counts = [int(wanted[b].sum()) for b in members]
            for b, *own in zip(members, *(part.split(counts) for part in parts), strict=True):
                results[b] = own
        return TeacherTopK(*(torch.cat(part) for part in zip(*results, strict=True)))


def _chosen(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Log-probs ``[N]`` of given tokens; some rows at once, to bound the float32 copies."""
    pairs = zip(logits.split(_ROWS), token_ids.split(_ROWS), strict=True)
    return torch.cat([chosen_logprobs(rows, ids, temperature) for rows, ids in pairs])
