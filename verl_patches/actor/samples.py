"""A veRL micro-batch as the core wants it: ragged sequences, masks, documents, versions.

veRL's jagged tensors carry a prompt and a response of their own length in each row. Tokens are
taken by mask: nothing here derives a position from a padded width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from cartridge_distill.data.general import BARE, document_of
from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.model.packing import HostMask, host_mask
from cartridge_distill.util.errors import RolloutError


@dataclass(frozen=True)
class Samples:
    """B rollouts.

    Attributes:
        sequences: B ``[prompt + response]`` token ids, on the host.
        response_masks: B bool masks over them, true at the response tokens that are trained on.
        rollout_logprobs: ``[N]`` the server's log-probs of the counted tokens, in order, on the
            host.
        document_ids: B ids; ``BARE`` for a general sample, whose teacher is the bare model.
        steps: B cartridge steps that made the rollouts; None where a label has none.
        authors: B, who wrote each; a sample without a label is held against the student.
        temperature: that the server sampled at.
    """

    sequences: list[Tensor]
    response_masks: list[HostMask]
    rollout_logprobs: Tensor
    document_ids: list[str | None]
    steps: list[int | None]
    authors: list[str]
    temperature: float

    @classmethod
    def from_micro_batch(cls, data: TensorDict, document_key: str) -> Samples:
        """Reads veRL's fields, which are on the host: nothing here waits for a device.

        Raises:
            DocumentError: a sample names no document and is not labelled as general.
            RolloutError: a rollout has no log-probs, or not one for each token.
        """
        sequences = [ids.contiguous() for ids in data["input_ids"].unbind()]
        prompts = [int(ids.numel()) for ids in data["prompts"].unbind()]
        masks = [host_mask(mask.bool()) for mask in data["response_mask"].unbind()]
        if "rollout_log_probs" not in data:
            raise RolloutError(
                "the rollouts carry no log-probs; "
                "fix: set actor_rollout_ref.rollout.calculate_log_probs=True"
            )
        logprobs = list(data["rollout_log_probs"].unbind())
        response_masks = []
        for row, (ids, prompt, mask) in enumerate(zip(sequences, prompts, masks, strict=True)):
            if prompt + mask.size != ids.numel() or logprobs[row].numel() != mask.size:
                raise RolloutError(
                    f"sample {row}: prompt {prompt} + response {mask.size} tokens, "
                    f"{ids.numel()} ids, {logprobs[row].numel()} log-probs do not fit together"
                )
            response_masks.append(np.concatenate([np.zeros(prompt, dtype=bool), mask]))
        info = column(data, "extra_info", len(sequences))
        labels = column(data, "extra_fields", len(sequences))
        return cls(
            sequences=sequences,
            response_masks=response_masks,
            rollout_logprobs=torch.cat(
                [values[torch.from_numpy(m)] for values, m in zip(logprobs, masks, strict=True)]
            ),
            document_ids=[
                document_of(item, document_key, f"sample {row}") for row, item in enumerate(info)
            ],
            steps=[(label or {}).get("global_steps") for label in labels],
            authors=[(label or {}).get("author", STUDENT) for label in labels],
            temperature=float(data["temperature"]),
        )

    @property
    def by_teacher(self) -> HostMask:
        """``[N]`` bool: the counted tokens that the teacher wrote."""
        return self.tokens_of([author == TEACHER for author in self.authors])

    @property
    def general(self) -> HostMask:
        """``[N]`` bool: the counted tokens of samples without a document."""
        return self.tokens_of([document_id is BARE for document_id in self.document_ids])

    @property
    def answers(self) -> list[int]:
        """How many tokens of each sample are counted."""
        return [int(mask.sum()) for mask in self.response_masks]

    def tokens_of(self, samples: list[bool]) -> HostMask:
        """``[N]`` bool: the counted tokens of some samples, B of them."""
        return np.repeat(samples, self.answers)


def column(data: TensorDict, key: str, rows: int) -> list[Any]:
    """A field that holds no tensors, one value a row; all None where there is no such field."""
    if key not in data:
        return [None] * rows
    values = data[key]
    return list(values.tolist() if hasattr(values, "tolist") else values)


def later_tokens(response_mask: Tensor, skip_first: int) -> Tensor:
    """veRL's nested response mask without the first counted tokens of each answer.

    Raises:
        RolloutError: nothing is left.
    """
    rows = []
    for row in response_mask.unbind():
        mask = row.bool()
        rows.append(mask & (mask.cumsum(0) > skip_first))
    if not any(row.any() for row in rows):
        longest = max(int(row.bool().sum()) for row in response_mask.unbind())
        raise RolloutError(
            f"actor.cartridge.skip_first_tokens={skip_first} leaves nothing to train on: the "
            f"longest answer of the batch has {longest} tokens; fix: set it lower, or allow longer "
            "answers (data.max_response_length)"
        )
    return torch.nested.as_nested_tensor(
        [row.to(response_mask.dtype) for row in rows], layout=torch.jagged
    )
