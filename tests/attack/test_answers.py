"""One answer of a real server, damaged in every way, and told as a lie.

Either exactly what was sent, or another attempt, or an error of the project by name. Nothing else:
no other exception, no tokens that nobody sampled.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.util.content_digest import digest_of
from cartridge_distill.util.errors import RolloutError
from tests.attack.damage import damages
from tests.conftest import StartServer
from tests.tiny import VOCAB

SEED = int(os.environ.get("ATTACK_SEED", "0"))
QUICK = 150
PROMPT, TOKENS, CHOICES = [10, 20, 30], 6, 2
_SETTINGS = ClientSettings(
    max_attempts=2, backoff_s=0.0, max_backoff_s=0.0, connect_timeout_s=60, read_timeout_s=60
)


@pytest.fixture
def answer(start_server: StartServer) -> bytes:
    """Head and body, as a server sends them."""
    body = json.dumps(
        {
            "model": "m",
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "n": CHOICES,
            "temperature": 0.7,
            "logprobs_in_fingerprint": True,
            "seed": 1,
        }
    ).encode()
    host, _, port = start_server().url.removeprefix("http://").partition(":")
    head = (
        f"POST /custom/cartridge/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        came = b""
        while chunk := connection.recv(2**16):
            came += chunk
    assert came.startswith(b"HTTP/1.1 200") and b"content-digest: sha-256=:" in came
    return came


class Sender:
    """Sends bytes, whatever it is asked, and then the true ones; and the client that asks it."""

    def __init__(self, truth: bytes) -> None:
        self._truth = truth
        self._next: list[bytes] = []
        self.url = ""
        self.asked = 0

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        self.asked += 1
        writer.write(self._next.pop(0) if self._next else self._truth)
        await writer.drain()
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Sender]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def outcome(self, *sent: bytes) -> list[Completion] | RolloutError:
        """What the client makes of these answers, one for each of its attempts."""
        self._next = list(sent)
        async with TokasaurusClient(self.url, _SETTINGS, vocab_size=VOCAB) as client:
            try:
                return await client.complete(PROMPT, TOKENS, 0.7, n=CHOICES)
            except RolloutError as error:
                return error


async def _try_all(answer: bytes, wanted: Iterable[bytes]) -> Counter[str]:
    counts: Counter[str] = Counter()
    async with Sender(answer).running() as sender:
        truth = await sender.outcome(answer)
        assert isinstance(truth, list) and len(truth) == CHOICES
        for number, bad in enumerate(wanted):
            sender.asked = 0
            found = await sender.outcome(bad)
            if isinstance(found, RolloutError):
                assert len(str(found)) > 20, number
                counts["refused"] += 1
            else:
                assert found == truth, (number, bad)
                counts["at once" if sender.asked == 1 else "tried again"] += 1
    return counts


def test_damage_on_the_way_never_changes_what_is_trained_on(answer: bytes) -> None:
    wanted = [damage.data for damage in damages(answer, QUICK, SEED)]
    body = answer.index(b"\r\n\r\n") + 4
    # A digit of a token's id, and a letter of a packed log-prob: what nothing else would notice.
    for place in (answer.index(b"[[") + 2, answer.index(b"packed_chosen_logprobs") + 32):
        assert place > body
        changed = bytearray(answer)
        changed[place] ^= 1
        wanted.append(bytes(changed))
    counts = asyncio.run(_try_all(answer, wanted))
    assert counts["tried again"] > QUICK // 2, counts


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_bit_and_every_beginning(answer: bytes) -> None:
    counts = asyncio.run(_try_all(answer, (damage.data for damage in damages(answer))))
    print(f"\n{len(answer)} bytes: {counts.total()} answers: {dict(sorted(counts.items()))}")
    assert counts.total() == 9 * len(answer)


# --- lies: answers that are whole, and wrong --------------------------------------------------

Content = dict[str, Any]
Lie = Callable[[random.Random, Content, Content], None]
_WRONG: tuple[Any, ...] = (None, True, -1, 1.5, "x", [], {}, [[]], "\udc80", 10**30, float("nan"))


def _ids(draw: random.Random, body: Content, print_: Content) -> None:
    ids = draw.choice(print_["completion_ids"])
    ids[draw.randrange(len(ids))] = draw.choice([*_WRONG, VOCAB, 2**31])


def _count(draw: random.Random, body: Content, print_: Content) -> None:
    ids = draw.choice(print_["completion_ids"])
    del ids[draw.randrange(len(ids)) :]


def _more_tokens(draw: random.Random, body: Content, print_: Content) -> None:
    draw.choice(print_["completion_ids"]).extend([1] * draw.randrange(1, 9))


def _logprobs(draw: random.Random, body: Content, print_: Content) -> None:
    packed = print_["packed_chosen_logprobs"]
    number = draw.randrange(len(packed))
    raw = bytearray(base64.b64decode(packed[number]))
    kind = draw.randrange(4)
    if kind == 0:
        place = 4 * draw.randrange(len(raw) // 4)
        wrong = draw.choice([float("nan"), float("inf"), -float("inf"), 0.5])
        raw[place : place + 4] = struct.pack("<f", wrong)
    elif kind == 1:
        del raw[draw.randrange(len(raw)) :]
    elif kind == 2:
        raw += bytes(draw.randrange(1, 9))
    packed[number] = draw.choice(_WRONG) if kind == 3 else base64.b64encode(raw).decode()


def _lists(draw: random.Random, body: Content, print_: Content) -> None:
    name = draw.choice(["completion_ids", "packed_chosen_logprobs"])
    kind = draw.randrange(3)
    if kind == 0:
        print_[name] = draw.choice(_WRONG)
    elif kind == 1:
        print_[name].pop()
    else:
        print_[name].append(print_[name][0])


def _choices(draw: random.Random, body: Content, print_: Content) -> None:
    kind = draw.randrange(5)
    if kind == 0:
        body["choices"] = draw.choice(_WRONG)
    elif kind == 1:
        body["choices"].pop()
    elif kind == 2:
        body["choices"].append(dict(body["choices"][0], index=len(body["choices"])))
    elif kind == 3:
        body["choices"].reverse()
    else:
        body["choices"][0]["index"] = draw.choice([1, *_WRONG])


def _reason(draw: random.Random, body: Content, print_: Content) -> None:
    draw.choice(body["choices"])["finish_reason"] = draw.choice(["error", "", *_WRONG])


def _fingerprint(draw: random.Random, body: Content, print_: Content) -> None:
    print_.clear()
    wrong = [*_WRONG, "", "{}", "[]", "null", '"x"', "[" * 5000, '{"completion_ids": [[1]]}']
    body["system_fingerprint"] = draw.choice(wrong)


LIES: tuple[Lie, ...] = (
    *(_ids, _count, _more_tokens, _logprobs, _lists, _choices, _reason, _fingerprint),
)


def told(answer: bytes, draw: random.Random, lie: Lie) -> bytes:
    """The answer with a lie in it, and a digest and a length that are right."""
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    print_ = json.loads(body["system_fingerprint"])
    lie(draw, body, print_)
    if print_:
        body["system_fingerprint"] = json.dumps(print_)
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\nContent-Digest: {digest_of(text)}"
    return f"{head}\r\nConnection: close\r\n\r\n".encode() + text


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.strip("_"))
def test_a_lie_is_refused_by_name(answer: bytes, lie: Lie) -> None:
    async def run() -> None:
        draw = random.Random(SEED)
        async with Sender(answer).running() as sender:
            truth = await sender.outcome(answer)
            for _ in range(15):
                lied = told(answer, draw, lie)
                found = await sender.outcome(lied, lied)
                # Some of what is drawn says the same in another way.
                assert isinstance(found, RolloutError) or found == truth, lied
                if not isinstance(found, RolloutError):
                    assert (
                        lied.partition(b"\r\n\r\n")[2]
                        == json.dumps(json.loads(answer.partition(b"\r\n\r\n")[2])).encode()
                    )

    asyncio.run(run())
