"""The last versions of the cartridge, and samples held against the one that wrote them.

With ``async_steps`` above 0 a batch's rollouts are of earlier versions than the one that is
trained. The student's forward says nothing about their log-probs, so a random part of them goes
through the model once more, behind the cartridge that wrote them. Without, the version before is
kept alone, for the question of :mod:`cartridge_distill.distill.rounding`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.distill.mixing import TEACHER
from cartridge_distill.distill.on_policy import ages_of
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import HostMask, on_device, pack
from cartridge_distill.util.errors import OffPolicyError
from verl_patches.actor.device import StageSeconds
from verl_patches.actor.samples import Samples


class KeptVersions:
    """Copies of the newest cartridges before the one that is trained, as a server has them.

    Args:
        count: how many.
        dtype: that the server computes in.
        on_host: whether they wait in the host's memory: several would fill a GPU for nothing.
    """

    def __init__(self, count: int, dtype: torch.dtype, on_host: bool = False) -> None:
        self._count, self._dtype, self._on_host = count, dtype, on_host
        self._kept: dict[int, Prefix] = {}

    def remember(self, version: int, prefix: Prefix) -> None:
        """Takes a copy, before the optimizer moves the cartridge; the oldest goes."""
        if not self._count:
            return
        served = prefix.to(dtype=self._dtype)
        self._kept[version] = Prefix(
            [self._copy(key) for key in served.keys], [self._copy(value) for value in served.values]
        )
        for old in sorted(self._kept)[: -self._count]:
            del self._kept[old]

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._on_host:
            return tensor.detach().to("cpu", copy=True)
        return tensor.detach().clone()

    def forget(self) -> None:
        """After a checkpoint was loaded: what was before it is not known."""
        self._kept.clear()

    def get(self, version: int, device: torch.device) -> Prefix | None:
        """The cartridge of a version, on the device; None where it is not kept."""
        kept = self._kept.get(version)
        return None if kept is None else kept.to(device=device)

    def __contains__(self, version: int) -> bool:
        return version in self._kept


@dataclass(frozen=True)
class OwnLogprobs:
    """The student's tokens of a micro-batch by the cartridges that wrote them.

    Attributes:
        compared: ``[N]`` the student's tokens that are held against the server: all of the version
            that is trained, and those of earlier versions that were drawn.
        earlier: ``[N]`` on the device, the ones that were drawn.
        logprobs: ``[N]`` on the device, theirs; 0 elsewhere.
    """

    compared: HostMask
    earlier: Tensor
    logprobs: Tensor

    def or_else(self, trainer: Tensor) -> Tensor:
        """``[N]`` log-probs by the cartridge that wrote each compared token.

        Args:
            trainer: ``[N]`` by the cartridge that is trained.
        """
        return torch.where(self.earlier, self.logprobs, trainer)


class OwnVersionCheck:
    """Computes :class:`OwnLogprobs`. Ranks of a sharded model run the model equally often.

    Args:
        kept: the cartridges.
        fraction: of a micro-batch's samples of earlier versions; at least one of them is drawn.
        seed: of the draws, with a number that tells this rank from others.
        model: the frozen base, sharded or not.
        device: of the model.
        backend: attention backend of the engine.
        stage: times the forwards.
        most: the largest of all ranks' numbers.

    Attributes:
        oldest: age of the batch's oldest sample so far, in optimizer steps.
    """

    def __init__(
        self,
        kept: KeptVersions,
        fraction: float,
        seed: Sequence[int],
        model: nn.Module,
        device: torch.device,
        backend: str,
        stage: StageSeconds,
        most: Callable[[int], int] = lambda number: number,
    ) -> None:
        self._kept, self._fraction, self._seed = kept, fraction, tuple(seed)
        self._model, self._device, self._backend = model, device, backend
        self._stage, self._most = stage, most
        self._micro_batch = 0
        self.oldest = 0

    def begin_batch(self) -> None:
        """Before the first micro-batch of a batch."""
        self._micro_batch = self.oldest = 0

    @torch.no_grad()
    def run(self, samples: Samples, version: int) -> OwnLogprobs:
        """Draws samples of earlier versions and computes their log-probs.

        Args:
            samples: whose versions were looked at, see ``on_policy.check_versions``.
            version: that is trained.

        Raises:
            OffPolicyError: the cartridge that wrote a sample is not kept.
        """
        by_student = [author != TEACHER for author in samples.authors]
        earlier = [
            row
            for row, (mine, step) in enumerate(zip(by_student, samples.steps, strict=True))
            if mine and step != version
        ]
        self._check_kept(samples, earlier, version)
        self.oldest = max(self.oldest, *ages_of(samples.authors, samples.steps, version), 0)
        drawn = self._draw(earlier, version)
        rows_of: defaultdict[int, list[int]] = defaultdict(list)
        for row in drawn:
            step = samples.steps[row]
            assert step is not None  # looked at before
            rows_of[step].append(row)
        of_drawn = samples.tokens_of([row in drawn for row in range(len(by_student))])
        found = torch.zeros(len(of_drawn), dtype=torch.float32, device=self._device)
        with self._stage("version_check"):
            # Agreed before the first forward: those gather from all ranks, and would wait.
            more = self._most(len(rows_of)) - len(rows_of)
            for step, rows in sorted(rows_of.items()):
                at = samples.tokens_of([row in rows for row in range(len(by_student))])
                where = on_device(np.flatnonzero(at), self._device, torch.long)
                found[where] = self._logprobs(samples, rows, step)
            for _ in range(more):
                batch = pack([torch.zeros(1, dtype=torch.long)]).to(self._device)
                packed_forward(self._model, None, batch, backend=self._backend)
        unseen = set(earlier) - set(drawn)
        compared = samples.tokens_of(
            [mine and row not in unseen for row, mine in enumerate(by_student)]
        )
        return OwnLogprobs(compared, on_device(of_drawn, self._device), found)

    def _check_kept(self, samples: Samples, earlier: Sequence[int], version: int) -> None:
        steps = {samples.steps[row] for row in earlier}
        if gone := sorted(step for step in steps if step is not None and step not in self._kept):
            raise OffPolicyError(
                f"rollouts of cartridge step {gone} reached the trainer at step {version}, and it "
                "has not kept that cartridge, so it cannot tell who wrote them: they are older "
                "than this start of the run. The rollout proxy is out of order"
            )

    def _draw(self, rows: Sequence[int], version: int) -> list[int]:
        """The part of the rows that is compared; the same again after a resume."""
        self._micro_batch += 1
        draws = np.random.default_rng([*self._seed, version, self._micro_batch])
        count = math.ceil(self._fraction * len(rows))
        return sorted(int(row) for row in draws.choice(rows, count, replace=False)) if rows else []

    def _logprobs(self, samples: Samples, rows: Sequence[int], step: int) -> Tensor:
        prefix = self._kept.get(step, self._device)
        assert prefix is not None  # looked at before
        batch = pack([samples.sequences[row] for row in rows]).to(self._device)
        response_mask = np.concatenate([samples.response_masks[row] for row in rows])
        logit_mask = batch.predicts(response_mask)
        logits = packed_forward(self._model, prefix, batch, logit_mask, self._backend)
        return chosen_logprobs(logits, batch.tokens(response_mask), samples.temperature)
