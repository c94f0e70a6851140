"""The lengths of a training step that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cartridge_distill.util.errors import ConfigError, require_counts


@dataclass(frozen=True)
class StepShape:
    """The lengths of a step.

    Attributes:
        cartridge_tokens: P.
        row_tokens: T, tokens in a packed row.
        trained_tokens: N of them whose logits are asked for; all of them where that is not known.
        document_tokens: of the longest document.
        documents: how many there are.
        documents_kept: of how many the teacher keeps the KV.
        prompts_kept_mib: MiB that the teacher keeps of prompts' KV, with the backend "grouped".
        sequence_tokens: of the longest sequence: what a token attends to in its row at most.
        dtype: of the model.
        backend: "flex", "grouped" or "dense", see :mod:`cartridge_distill.model.attention`.
        gradient_checkpointing: a layer keeps its input alone.
        micro_batches: rows of one optimizer step; from the second on gradients are there already.
        ranks: that share the base.
        topk: tokens of the teacher's distribution.

    Raises:
        ConfigError: a length under 1, or more trained tokens than the row has.
    """

    cartridge_tokens: int
    row_tokens: int
    document_tokens: int
    trained_tokens: int | None = None
    documents: int = 1
    documents_kept: int = 8
    prompts_kept_mib: int = 256
    sequence_tokens: int | None = None
    dtype: torch.dtype = torch.bfloat16
    backend: str = "flex"
    gradient_checkpointing: bool = False
    micro_batches: int = 2
    ranks: int = 1
    topk: int = 20

    def __post_init__(self) -> None:
        require_counts(self, "cartridge_tokens", "row_tokens", "document_tokens", "documents")
        require_counts(self, "documents_kept", "micro_batches", "ranks", "topk")
        if self.prompts_kept_mib < 0:
            raise ConfigError(
                f"prompts_kept_mib={self.prompts_kept_mib} is too few; fix: give 0 or more"
            )
        for name in ("trained_tokens", "sequence_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.row_tokens:
                raise ConfigError(
                    f"{name}={value} is out of range; fix: give 1 to "
                    f"row_tokens={self.row_tokens}, or leave it out"
                )
        if self.backend not in ("flex", "grouped", "dense"):
            raise ConfigError(
                f"backend={self.backend!r} is unknown; fix: choose flex, grouped or dense"
            )

    @property
    def trained(self) -> int:
        """N: tokens that the loss sees; all of the row where nobody says."""
        return self.row_tokens if self.trained_tokens is None else self.trained_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; the whole row where nobody says."""
        return self.row_tokens if self.sequence_tokens is None else self.sequence_tokens
