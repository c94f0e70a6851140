"""Answers that fail, break off or make no sense, from a real HTTP server on the loopback.

Every fault ends in a retry that succeeds or in an error that says what happened; none in tokens
that nobody sampled.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.http import _retry_after
from cartridge_distill.util.errors import RolloutError
from tests.rollout.scripted import FAST, GOOD, Script, answer, ask


def test_the_request_as_sent(script: Script) -> None:
    script.steps = [script.ok()]
    assert ask(script.url + "/") == [GOOD]
    [(path, _, body)] = script.requests
    assert path == "/custom/cartridge/completions"
    assert body == {
        "model": "default",
        "prompt": [1, 2],
        "max_tokens": 4,
        "temperature": 0.7,
        "n": 1,
        "cartridges": [{"id": "v1", "source": "local"}],
        "logprobs_in_fingerprint": True,
    }


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_can_pass_is_tried_again(script: Script, code: int) -> None:
    script.steps = [script.status(code), script.ok()]
    assert ask(script.url) == [GOOD]
    assert len(script.requests) == 2


def test_always_500_ends_after_the_attempts_allowed(script: Script) -> None:
    script.steps = [script.status(500)]
    with pytest.raises(RolloutError, match=r"failed 3 times.*HTTP 500: out of order"):
        ask(script.url)
    assert len(script.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 413, 422])
def test_what_cannot_pass_is_not_tried_again(script: Script, code: int) -> None:
    script.steps = [script.status(code, b'{"detail": "prompt over the limit of 64"}'), script.ok()]
    with pytest.raises(RolloutError, match=f"HTTP {code}: prompt over the limit of 64"):
        ask(script.url)
    assert len(script.requests) == 1


def test_the_words_of_openais_errors_are_shown_without_the_rest(script: Script) -> None:
    script.steps = [script.status(401, b'{"error": {"message": "no token", "type": "x"}}')]
    with pytest.raises(RolloutError, match="HTTP 401: no token; fix: set TOKASAURUS_API_KEY"):
        ask(script.url)


def test_a_server_that_hangs(script: Script) -> None:
    script.steps = [script.hang]
    quick = replace(FAST, read_timeout_s=0.1, max_attempts=2)
    with pytest.raises(RolloutError, match=r"failed 2 times.*SocketTimeoutError"):
        ask(script.url, quick)
    script.requests.clear()
    script.steps = [script.hang, script.ok()]
    assert ask(script.url, replace(quick, read_timeout_s=1.0)) == [GOOD]


@pytest.mark.parametrize("fault", ["cut", "drop"])
def test_a_connection_that_breaks(script: Script, fault: str) -> None:
    script.steps = [getattr(script, fault), script.ok()]
    assert ask(script.url) == [GOOD]
    script.steps = [getattr(script, fault)]
    named = {"cut": "ClientPayloadError", "drop": "ServerDisconnectedError"}[fault]
    with pytest.raises(RolloutError, match=f"failed 3 times.*{named}"):
        ask(script.url)


@pytest.mark.parametrize("body", [answer()[:-30], b"", b"<html>starting</html>", b"\xff\xfe\x00"])
def test_a_body_that_is_not_json(script: Script, body: bytes) -> None:
    script.steps = [script.ok(body), script.ok()]
    assert ask(script.url) == [GOOD]
    script.steps = [script.ok(body)]
    with pytest.raises(RolloutError, match="failed 3 times.*not JSON"):
        ask(script.url)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (answer(logprobs=[-0.5, float("nan")]), "nan"),
        (answer(logprobs=[float("-inf"), -1.0]), "-inf"),
        (answer(logprobs=[0.5, -1.0]), "log-prob 0.5"),
        (answer(ids=[[5, 100]]), "outside the vocabulary of 100"),
        (answer(ids=[[]]), "not a filled list"),
        (answer(ids=[[5, 6], [7, 8]]), "2 entries for 1 choices"),
        (answer(ids=[[1] * 5], logprobs=[-1.0] * 5), "5 tokens, asked for at most 4"),
        (answer(system_fingerprint="fp_1"), "not JSON"),
        (answer(system_fingerprint=None), "system_fingerprint"),
        (answer(choices=[]), "0 choices"),
        (answer(choices=[{"index": 0, "text": "a", "finish_reason": "error"}]), "'error'"),
        (b'{"error": "busy"}', "does not follow the protocol"),
        (b"[]", "does not follow the protocol"),
        (b"null", "does not follow the protocol"),
    ],
)
def test_nonsense_is_an_error_at_once(script: Script, body: bytes, says: str) -> None:
    script.steps = [script.ok(body), script.ok()]
    with pytest.raises(RolloutError, match=says):
        ask(script.url)
    assert len(script.requests) == 1


SHORT = [
    ({"logprobs": [-0.5]}, "stop", "1 log-probs for 2 tokens"),
    ({"logprobs": [-0.5, -1.5, -2.0]}, "stop", "3 log-probs for 2 tokens"),
    ({}, "length", r"2 tokens and finish_reason 'length', which would be 4 tokens"),
    ({"ids": [[5, 6, 7]], "logprobs": [-1.0] * 3}, "length", "3 tokens and finish_reason 'length'"),
    ({}, "stop", r"ends with token 6, which ends no answer of this model \(\[7, 8\] do\)"),
]


@pytest.mark.parametrize(("change", "reason", "says"), SHORT)
def test_a_shortened_answer_is_asked_for_again_and_then_refused(
    script: Script, change: dict[str, Any], reason: str, says: str
) -> None:
    """The reason, the tokens and the log-probs must agree; nothing else would tell."""
    choices = [{"index": 0, "text": "a", "finish_reason": reason, "logprobs": None}]
    short = answer(**change, choices=choices)
    whole = answer([[5, 6, 7]], [-0.5, -1.5, -2.5])

    async def ask_knowing_ends() -> list[Completion]:
        async with TokasaurusClient(script.url, FAST, 100, frozenset({7, 8})) as client:
            return await client.complete([1, 2], 4, 0.7)

    script.steps = [script.ok(short), script.ok(whole)]
    good = Completion([5, 6, 7], [-0.5, -1.5, -2.5], "stop")
    assert asyncio.run(ask_knowing_ends()) == [good]
    script.requests.clear()
    script.steps = [script.ok(short)]
    with pytest.raises(RolloutError, match=f"failed 3 times.*{says}"):
        asyncio.run(ask_knowing_ends())
    assert len(script.requests) == 3


@pytest.mark.parametrize("last", [7, 6])
def test_an_answer_of_full_length_may_end_with_any_token(script: Script, last: int) -> None:
    choices = [{"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}]
    script.steps = [script.ok(answer([[5, 6, 5, last]], [-1.0] * 4, choices=choices))]

    async def run() -> list[Completion]:
        async with TokasaurusClient(script.url, FAST, 100, frozenset({7})) as client:
            return await client.complete([1, 2], 4, 0.7)

    assert asyncio.run(run())[0].token_ids == [5, 6, 5, last]


def test_retry_after_is_honoured(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    script.steps = [script.status(429, Retry_After="1"), script.ok()]
    with caplog.at_level(logging.WARNING):
        assert ask(script.url) == [GOOD]
    # The backoff alone would be some hundredths of a second.
    assert "attempt 1 of 3" in caplog.text and "the next in 1.0 s" in caplog.text


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((None, None), ("2.5", 2.5), ("-3", 0.0), ("99999", 60.0), ("soon", None), ("nan", None)),
        *(("1e400", 60.0), ("9" * 5000, 60.0), ("-inf", 0.0), ("", None)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60.0),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999", None),
        ("Wed, 99 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_retry_after_values(value: str | None, wanted: float | None) -> None:
    headers = {} if value is None else {"Retry-After": value}
    assert _retry_after(headers) == wanted
    assert _retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
