"""The scheduler half of the connector: which requests have cartridges, and what a step must load.

It is asked by vLLM's scheduler in this order: a request comes in (:meth:`Planner.take`); how many
of its tokens need no computing (:meth:`Planner.tokens_to_load`, perhaps several times, and again
after the request was taken out for lack of room); blocks were taken for it (:meth:`Planner.note`);
the step is complete (:meth:`Planner.next_plan`); the request has ended (:meth:`Planner.forget`).

Nothing here needs vLLM, and nothing raises: an exception would end vLLM's engine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from cartridge_distill.engines.vllm.wanted import Misused, Wanted, check_request, read_parameters

# vLLM shows what its own loggers say, and these are below them.
logger = logging.getLogger("vllm.cartridges")


@dataclass(frozen=True)
class Load:
    """Tokens ``start..`` of one request's cartridges, and for each cache group its block ids."""

    request_id: str
    wanted: Wanted
    start: int
    block_ids: tuple[list[int], ...]


@dataclass
class Plan:
    """What the worker half does in one step.

    Attributes:
        loads: in the order in which they were scheduled.
        refused: requests that must fail, with the block ids of their first group.
    """

    loads: list[Load] = field(default_factory=list)
    refused: dict[str, list[int]] = field(default_factory=dict)


class Planner:
    """Which requests have cartridges, and what is to be loaded in the step being planned."""

    def __init__(self) -> None:
        self._requests: dict[str, Wanted | Misused] = {}
        self._plan = Plan()

    def take(self, request: Any) -> None:
        """Looks at a new request; blocks that it comes to share are of its cartridges alone."""
        try:
            wanted = read_parameters(request.kv_transfer_params)
            if wanted is None:
                return
            check_request(wanted, request.prompt_token_ids, request.sampling_params)
            self._requests[request.request_id] = wanted
            salt = wanted.salt
        except Exception as problem:  # whatever it is: it must not end the engine
            error = problem if isinstance(problem, Misused) else Misused(repr(problem))
            logger.error("request %s is failed: %s", request.request_id, error)
            self._requests[request.request_id] = error
            salt = f"refused {request.request_id}"
            # With it vLLM asks for no load, and would compute what must not be computed.
            request.skip_reading_prefix_cache = False
        own = request.cache_salt
        request.cache_salt = salt if own is None else f"{salt} {own}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def tokens_to_load(self, request: Any, computed: int) -> tuple[int, bool]:
        """How many tokens after the first ``computed`` come from a cartridge.

        Returns:
            Their number, and whether the request waits for them: only one that must fail does.
        """
        wanted = self._requests.get(request.request_id)
        if wanted is None:
            return 0, False
        if isinstance(wanted, Misused):
            return 1, True
        return max(0, wanted.tokens - computed), False

    def note(self, request: Any, block_ids: tuple[list[int], ...], count: int) -> None:
        """vLLM took these blocks for a request's first tokens; the last ``count`` are loaded."""
        wanted = self._requests[request.request_id]
        if isinstance(wanted, Misused):
            self._plan.refused[request.request_id] = list(block_ids[0])
            return
        start = wanted.tokens - count
        self._plan.loads.append(
            Load(request.request_id, wanted, start, tuple(map(list, block_ids)))
        )

    def next_plan(self) -> Plan:
        """What was noted since the last step."""
        done, self._plan = self._plan, Plan()
        return done

    def forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
