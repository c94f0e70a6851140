"""Server against trainer: both hold the same numbers, or nothing is trained on them.

The student's tokens are compared with the student's forward, the teacher's with the teacher's. A
stale cartridge shows in the one, an answer that was written without the document in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cartridge_distill.errors import OffPolicyError
from cartridge_distill.mixing import STUDENT, TEACHER

_CAUSES = {
    STUDENT: "the server does not serve this cartridge version, or not this base model, dtype or "
    "temperature",
    TEACHER: "the server wrote without the document, or with another base model, dtype or "
    "temperature, or teacher_cache keeps the answers of such a server",
}


@dataclass(frozen=True)
class Agreement:
    """How far the log-probs of one author's tokens are apart. Nothing here waits for the device.

    Attributes:
        author: who wrote the tokens.
        own: ``[N]`` the trainer's log-probs, N at least 1.
        server: ``[N]`` the server's.
        tokens: ``[N]`` their ids.
    """

    author: str
    own: Tensor
    server: Tensor
    tokens: Tensor

    @property
    def difference(self) -> Tensor:
        """``[N]``, absolute; NaN where either is."""
        return (self.own - self.server).abs()

    def check(self, largest: float, bound: float | None) -> None:
        """Refuses the tokens when the numbers differ.

        Args:
            largest: the largest difference, fetched.
            bound: None only wants finite numbers.

        Raises:
            OffPolicyError: it is over the bound, or not finite.
        """
        limit = torch.finfo(torch.float32).max if bound is None else bound
        if largest <= limit:
            return
        worst = int(self.difference.nan_to_num(float("inf")).argmax())
        raise OffPolicyError(
            f"server and trainer disagree on a chosen token's log-prob by {largest:.3g} "
            f"(server {self.server[worst]:.4f}, trainer {self.own[worst]:.4f}, "
            f"token {int(self.tokens[worst])}, written by the {self.author}), bound {limit:g}: "
            f"{_CAUSES[self.author]}. "
            "Raise actor.cartridge.max_logprob_diff only for a bfloat16 server"
        )
