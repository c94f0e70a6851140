"""What the routes ask of an engine, whichever computes: this project's own, or vLLM's.

The routes of the Tokasaurus protocol (``app``) and of OpenAI's chat API (``openai``) stand over an
:class:`Answering`. It reads a request, says what it will not serve before anything is computed,
and computes.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase

from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.cartridges import CartridgeRefused
from cartridge_distill.server.protocol import AnyRequest, Job, Limits, Refused, is_work, to_job
from cartridge_distill.server.rows import NewToken
from cartridge_distill.util.disk import DiskFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """A request that can be computed: what to compute, and from which seed."""

    job: Job
    seed: int | None


class Answering(ABC):
    """An engine with its model's tokenizer and limits.

    Attributes:
        model_name: what ``/v1/models`` and the answers call the model.
        idle_s: a client that is silent for so long is cut off.
        tokenizer: the model's.
        limits: what requests are held against.
        end_ids: the ids that end an answer.
    """

    model_name: str
    idle_s: float
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    end_ids: frozenset[int]

    @property
    @abstractmethod
    def loaded_ids(self) -> list[str]:
        """Every cartridge id that stands for its weights from here on, sorted."""

    @abstractmethod
    async def admit(self, request: AnyRequest, document: Sequence[int] = ()) -> Admitted:
        """Reads a request and finds its cartridges; nothing is computed yet.

        Args:
            document: token ids that a chat is asked behind.

        Raises:
            Refused: the request cannot be served.
            CartridgeRefused: its cartridge cannot.
            DiskFailed: the disk does not give its cartridge.
        """

    @abstractmethod
    async def compute(
        self,
        admitted: Admitted,
        on_token: Callable[[int, NewToken], None] | None = None,
        top_logprobs: int = 0,
    ) -> list[Completion]:
        """Computes all choices of a request that :meth:`admit` gave.

        Args:
            on_token: called with (index of the choice, token) as tokens come, in any thread.
            top_logprobs: how many of the likeliest tokens in each place it is told.

        Raises:
            HTTPException: 400 for what cannot be computed, 500 or 503 for what may work later.
        """

    @property
    def is_alive(self) -> bool:
        """Whether requests are still computed."""
        return True

    def start(self) -> None:
        """Called when the routes begin to be served."""
        return

    def stop(self) -> None:
        """Called when they are not served any more; may take a while."""
        return

    async def generate(self, request: AnyRequest) -> tuple[Job, list[Completion]]:
        """Computes all choices of a request.

        Raises:
            HTTPException: 400 for what cannot be served, 500 or 503 for what may work later, 507
                where the disk of a cartridge fails.
        """
        try:
            admitted = await self.admit(request)
        except (Refused, CartridgeRefused) as error:
            raise HTTPException(400, str(error)) from error
        except DiskFailed as error:
            raise HTTPException(507, str(error)) from error
        return admitted.job, await self.compute(admitted)

    async def read_job(self, request: AnyRequest, document: Sequence[int] = ()) -> Job:
        """The request in the engine's terms; the event loop goes on while text is tokenized.

        Args:
            document: as in :meth:`admit`.

        Raises:
            Refused: the request cannot be served.
        """
        if is_work(request):
            return await asyncio.to_thread(to_job, request, self.tokenizer, self.limits, document)
        return to_job(request, self.tokenizer, self.limits)


def without_truncation(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, safe to use from several threads.

    A call would take truncation and padding off itself, and must not while another thread
    tokenizes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def end_token_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the generation config's, else the tokenizer's.

    Args:
        generation_config: the model's, or None where it has none.
    """
    ids = getattr(generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        logger.warning("the model names no end token: every answer runs to max_tokens")
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
