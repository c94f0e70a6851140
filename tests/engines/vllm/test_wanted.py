"""What a request with cartridges says, and which ones are never computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cartridge_distill.engines.vllm.wanted import (
    PLACEHOLDER,
    Misused,
    Wanted,
    check_request,
    read_parameters,
)

WANTED = Wanted(("a", "b"), 4, "0f")


def sampling(**changes: Any) -> SimpleNamespace:
    plain: dict[str, Any] = {
        "prompt_logprobs": None,
        "skip_reading_prefix_cache": False,
        "repetition_penalty": 1.0,
    }
    return SimpleNamespace(**plain | changes)


def test_what_is_written_is_read() -> None:
    assert read_parameters(WANTED.parameters()) == WANTED
    assert read_parameters(None) is None and read_parameters({}) is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"do_remote_prefill": True}, "do_remote_prefill"),
        ({**WANTED.parameters(), "other": 1}, "other"),
        ({"cartridge": "a"}, "front"),
        ({"cartridge": {"ids": ["a"], "tokens": 4}}, "front"),
        ({"cartridge": {"ids": [], "tokens": 4, "content": "0f"}}, "wrong type"),
        ({"cartridge": {"ids": [1], "tokens": 4, "content": "0f"}}, "wrong type"),
        ({"cartridge": {"ids": ["a"], "tokens": True, "content": "0f"}}, "wrong type"),
        ({"cartridge": {"ids": ["a"], "tokens": 0, "content": "0f"}}, "wrong type"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(Misused, match=named):
        read_parameters(given)


def test_a_prompt_behind_placeholders() -> None:
    ids = WANTED.prompt([7, 8])
    assert ids == [PLACEHOLDER] * 4 + [7, 8]
    check_request(WANTED, ids, sampling())


@pytest.mark.parametrize(
    ("ids", "changes", "named"),
    [
        (WANTED.prompt([]), {}, "at least one token"),
        ([7] + WANTED.prompt([7])[1:], {}, "placeholders"),
        (None, {}, "embeddings"),
        (WANTED.prompt([7]), {"prompt_logprobs": 0}, "prompt_logprobs"),
        (WANTED.prompt([7]), {"skip_reading_prefix_cache": True}, "skip_reading_prefix_cache"),
        (WANTED.prompt([7]), {"repetition_penalty": 1.1}, "repetition_penalty"),
    ],
)
def test_what_would_compute_or_count_a_placeholder(
    ids: list[int] | None, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(Misused, match=named):
        check_request(WANTED, ids, sampling(**changes))


def test_pooling_has_no_cartridge() -> None:
    with pytest.raises(Misused, match="pooling"):
        check_request(WANTED, WANTED.prompt([7]), None)


def test_the_salt_is_of_ids_and_content() -> None:
    salts = {
        Wanted(ids, 4, content).salt
        for ids in (("a",), ("b",), ("a", "b"))
        for content in ("0f", "1f")
    }
    assert len(salts) == 6
