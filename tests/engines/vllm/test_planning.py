"""The scheduler half: what vLLM is told of a request, and what a step loads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cartridge_distill.engines.vllm.planning import Load, Planner
from cartridge_distill.engines.vllm.wanted import Wanted

WANTED = Wanted(("a",), 8, "0f")


class Request:
    """A request as vLLM's scheduler has it, as far as it is looked at."""

    def __init__(
        self,
        request_id: str = "r",
        parameters: dict[str, Any] | None = None,
        prompt: list[int] | None = None,
        salt: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.kv_transfer_params = parameters
        self.prompt_token_ids = WANTED.prompt([7]) if prompt is None else prompt
        self.sampling_params = SimpleNamespace(
            prompt_logprobs=None, skip_reading_prefix_cache=False, repetition_penalty=1.0
        )
        self.skip_reading_prefix_cache = True
        self.cache_salt = salt
        self.block_hashes: list[str] = []
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        self.block_hashes.append(f"hash of {self.cache_salt}")


def test_a_request_without_a_cartridge_is_left_alone() -> None:
    planner, request = Planner(), Request()
    planner.take(request)
    assert request.cache_salt is None and request.block_hashes == ["hash of None"]
    assert planner.tokens_to_load(request, 0) == (0, False)


def test_blocks_are_hashed_anew_with_the_salt() -> None:
    planner, request = Planner(), Request(parameters=WANTED.parameters())
    planner.take(request)
    assert request.block_hashes == [f"hash of {WANTED.salt}"]
    own = Request(parameters=WANTED.parameters(), salt="mine")
    planner.take(own)
    assert own.cache_salt == f"{WANTED.salt} mine"  # a client's own salt keeps them apart, too


@pytest.mark.parametrize(("computed", "more"), [(0, 8), (4, 4), (8, 0), (9, 0)])
def test_what_is_cached_is_not_loaded(computed: int, more: int) -> None:
    planner, request = Planner(), Request(parameters=WANTED.parameters())
    planner.take(request)
    assert planner.tokens_to_load(request, computed) == (more, False)


def test_a_step_has_what_was_noted_since_the_last() -> None:
    planner, request = Planner(), Request(parameters=WANTED.parameters())
    planner.take(request)
    planner.note(request, ([3, 5, 6],), 4)
    assert planner.next_plan().loads == [Load("r", WANTED, 4, ([3, 5, 6],))]
    assert planner.next_plan().loads == []
    # It was taken out for lack of room, and comes back: all of it is loaded again.
    assert planner.tokens_to_load(request, 0) == (8, False)
    planner.note(request, ([9, 8, 7],), 8)
    assert planner.next_plan().loads == [Load("r", WANTED, 0, ([9, 8, 7],))]


@pytest.mark.parametrize(
    "request_",
    [
        Request(parameters={"other": 1}),
        Request(parameters=[1]),  # type: ignore[arg-type]
        Request(parameters=WANTED.parameters(), prompt=5),  # type: ignore[arg-type]
        Request(parameters=WANTED.parameters(), prompt=[7] * 9),
        Request(parameters=WANTED.parameters(), prompt=[0] * 8),
    ],
)
def test_what_must_not_be_computed_waits_for_a_load_that_fails(
    request_: Request, caplog: pytest.LogCaptureFixture
) -> None:
    planner = Planner()
    planner.take(request_)
    assert "request r is failed" in caplog.text
    tokens, waits = planner.tokens_to_load(request_, 0)
    assert tokens > 0 and waits  # it is not computed meanwhile
    assert request_.cache_salt == "refused r"  # and shares nothing
    assert not request_.skip_reading_prefix_cache  # with it vLLM would ask for no load
    planner.note(request_, ([3, 5],), tokens)
    plan = planner.next_plan()
    assert plan.refused == {"r": [3, 5]} and not plan.loads


def test_a_request_that_has_ended_is_forgotten() -> None:
    planner, request = Planner(), Request(parameters=WANTED.parameters())
    planner.take(request)
    planner.forget("r")
    planner.forget("r")
    assert planner.tokens_to_load(request, 0) == (0, False)
