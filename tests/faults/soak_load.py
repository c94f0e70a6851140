"""The load of a soak: requests, new versions and kills at once, against one gateway.

What must hold is in ``soak_check``; the command, with its table, in ``soak_gateway``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import time
from collections import Counter

import psutil
import torch
from transformers import PreTrainedModel

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout import http as retrying
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.versions import new_run_id, step_of, version_id
from cartridge_distill.util.errors import RolloutError, SyncError
from cartridge_distill.util.processes import ChildFailed, say, tail
from tests.faults.soak_check import Answer, Checker, DiskWatch, RetryLog, unexplained
from tests.gateway.rig import COMPLETIONS, MODEL_NAME, Rig
from tests.tiny import random_cartridge

_REPORT_SECONDS = 5.0
_SAMPLE_SECONDS = 0.5
_PROMPT_TOKENS = 12  # and four more, which hold the request's number
_OLDER = 0.2  # of the requests name the version before the newest
_SHOWN = 3
PATIENCE = retrying.ClientSettings(max_attempts=40, max_backoff_s=3.0, read_timeout_s=300.0)


class Soak:
    """One run against one gateway; its coroutines share this state on one event loop.

    Args:
        model: a copy of the served one.
    """

    def __init__(self, options: argparse.Namespace, rig: Rig, model: PreTrainedModel) -> None:
        self.options = options
        self.rig = rig
        self.model = model
        self.vocabulary: int = model.config.vocab_size
        self.run_id = new_run_id("soak")
        self.draw = random.Random(options.seed)
        self.numbers = itertools.count()
        self.disk = DiskWatch(options.keep)
        self.published: list[int] = []
        self.kills: list[float] = []
        self.answers: list[Answer] = []
        self.latencies: list[float] = []
        self.asked = 0
        self.violations: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.retries = RetryLog()
        self.rss: list[tuple[float, float]] = []  # gateway, server; MB
        self.start = self.deadline = 0.0

    def seed_of(self, step: int) -> int:
        """Of a version's cartridge."""
        return int(self.options.seed) * 1_000_003 + step

    async def run(self) -> None:
        """The first version, then everything at once until the time is over.

        Raises:
            ChildFailed: the gateway itself ended.
        """
        publisher = HttpPublisher([self.rig.url], MODEL_NAME, PATIENCE)
        with self.retries.listening():
            await self._publish(publisher, 0)
            if not self.published:
                return
            self._note_memory()
            self.start = time.monotonic()
            self.deadline = self.start + self.options.seconds
            async with TokasaurusClient(self.rig.url, PATIENCE, self.vocabulary) as client:
                await asyncio.gather(
                    *[self._ask(client) for _ in range(self.options.inflight)],
                    self._upload(publisher),
                    self._kill(),
                    self._watch(),
                )
            await self._wait_up()
        self._note_memory()

    def _violated(self, *violations: str) -> None:
        """Says the first few of each kind at once."""
        for violation in violations:
            self.violations.append(violation)
            kind = re.sub(r"[0-9.]+", "", violation)[:80]
            self.kinds[kind] += 1
            if self.kinds[kind] <= _SHOWN:
                say(f"VIOLATION: {violation}")

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    async def _pause(self, seconds: float) -> None:
        """Sleeps, but not past the end."""
        await asyncio.sleep(max(0.0, min(seconds, self.deadline - time.monotonic())))

    async def _wait_up(self) -> None:
        while not await asyncio.to_thread(self.rig.is_up):
            self._check_alive()
            await asyncio.sleep(0.1)

    def _check_alive(self) -> None:
        if not self.rig.alive:
            raise ChildFailed(f"the gateway itself ended.\n{tail(self.rig.log_file)}")

    # --- what happens at once -----------------------------------------------------------------

    async def _ask(self, client: TokasaurusClient) -> None:
        """One request after the other; as many of these run as are to be in flight."""
        while not self.over:
            number = next(self.numbers)
            back = 2 if len(self.published) > 1 and self.draw.random() < _OLDER else 1
            step = self.published[-back]
            prompt = [self.draw.randrange(self.vocabulary) for _ in range(_PROMPT_TOKENS)]
            prompt += number.to_bytes(4, "big")
            self.asked += 1
            began = time.monotonic()
            ref = CartridgeRef(id=version_id(self.run_id, step), source="local")
            try:
                with self.disk.using(step):
                    [made] = await client.complete(prompt, self.options.new_tokens, 1.0, [ref])
            except RolloutError as error:
                self._violated(f"request {number} (version {step}) was lost: {error}")
                continue
            self.latencies.append(time.monotonic() - began)
            self.answers.append(Answer(number, step, prompt, made.token_ids, made.logprobs))

    async def _upload(self, publisher: HttpPublisher) -> None:
        """A version every so often; the next one at once when one took longer."""
        for step in itertools.count(1):
            began = time.monotonic()
            await self._publish(publisher, step)
            await self._pause(self.options.upload_every - (time.monotonic() - began))
            if self.over:
                return

    async def _publish(self, publisher: HttpPublisher, step: int) -> None:
        tokens = self.options.cartridge_tokens
        cartridge = random_cartridge(self.model, tokens, self.seed_of(step))
        snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
        began = time.monotonic()
        try:
            name = version_id(self.run_id, step)
            await asyncio.to_thread(publisher.publish, name, snapshot)
        except SyncError as error:
            self._violated(f"the upload of version {step} failed: {error}")
            return
        self.disk.arrived(step, began)
        self.published.append(step)

    async def _kill(self) -> None:
        await self._pause(self.options.kill_every)
        while not self.over:
            await self._wait_up()
            server = self.rig.server_process()
            if server is not None:
                self.kills.append(time.monotonic())
                self.disk.killed()
                server.kill()
            await self._pause(self.options.kill_every)

    async def _watch(self) -> None:
        """Looks at the disk, and says how far it is."""
        told = self.start
        while not self.over or self.disk.in_flight:
            await asyncio.sleep(_SAMPLE_SECONDS)
            self._check_alive()
            self._violated(*self.disk.sample(*self._on_disk()))
            if time.monotonic() - told >= _REPORT_SECONDS:
                told = time.monotonic()
                self._say_progress()

    # --- what is seen -------------------------------------------------------------------------

    def _on_disk(self) -> tuple[list[int], int]:
        """Steps of the versions on disk, and the bytes of everything there."""
        steps, total = [], 0
        for folder in self.rig.cartridges.iterdir():
            if not folder.name.startswith("."):  # being written, or being taken away
                steps.append(step_of(folder.name))
        for parent, _, files in os.walk(self.rig.cartridges):
            for name in files:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size
                except FileNotFoundError:
                    pass  # deleted between two looks
        return steps, total

    def _note_memory(self) -> None:
        gateway, server = psutil.Process(self.rig.process.pid), self.rig.server_process()
        self.rss.append((_megabytes(gateway), _megabytes(server)))

    def _say_progress(self) -> None:
        say(
            f"   {time.monotonic() - self.start:4.0f} s: {len(self.answers)} answers, "
            f"{self.disk.in_flight} in flight, {len(self.published)} versions, "
            f"{len(self.kills)} kills, {len(self.retries.attempts)} attempts again, "
            f"{len(self.violations)} violations"
        )

    def verify(self) -> Checker:
        """After the run: everything that can be told only then."""
        self._violated(*unexplained(self.retries.attempts, self.kills))
        if len(self.answers) > self.asked:
            self._violated(f"{self.asked} requests, {len(self.answers)} answers")
        sent = self.rig.metric("requests_total", COMPLETIONS, "200")
        if sent != len(self.answers):
            self._violated(
                f"the gateway sent {sent:.0f} answers, {len(self.answers)} came: doubled or lost"
            )
        died = self.rig.metric("server_restarts_total", "died")
        if died != len(self.kills) or self.restarts() != died:
            self._violated(
                f"{len(self.kills)} kills, but the gateway started the server again "
                f"{self.restarts():.0f} times, {died:.0f} of them after a death"
            )
        checker = Checker(
            self.model,
            self.options.cartridge_tokens,
            self.seed_of,
            self.options.new_tokens,
        )
        say(f"   computing all {len(self.answers)} answers again, with two versions each ...")
        told = time.monotonic()

        def progress(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _REPORT_SECONDS:
                told = time.monotonic()
                say(f"   ... {done} of {len(self.answers)}")

        self._violated(*checker.check(self.answers, progress))
        return checker

    def restarts(self) -> float:
        """From ``/metrics``: for every reason."""
        found = self.rig.metrics()
        return sum(n for name, n in found.items() if name[0] == "server_restarts_total")


def _megabytes(process: psutil.Process | None) -> float:
    """Resident memory; NaN for a process that is not there."""
    try:
        return process.memory_info().rss / 1e6 if process is not None else float("nan")
    except psutil.NoSuchProcess:
        return float("nan")
