"""A soak of the gateway: load, new versions and killed servers at once, for minutes.

    python training/soak_gateway.py                    # five minutes
    python training/soak_gateway.py --seconds 60 --inflight 16 --kill-every 10

Starts the gateway, with the embedded server and a tiny model of random weights, as real processes.
Then, all at once: requests are kept in flight through the client, a new cartridge version is
uploaded every second, and the server process behind the gateway is killed (SIGKILL) again and
again. Each request has a prompt of its own and names the newest published version, or the one
before it.

A violation, and exit code 1, is: a request that ends without an answer; an answer that came twice;
an answer whose log-probs are not those of the version asked for, or are also those of the version
before it (every answer is computed again, at the end); a failed upload; an attempt that failed in
another way than with HTTP 503 right after a kill; a server process that died by itself; a version
on disk that is neither one of the newest nor in use.

Needs nothing but this repository: no model, no GPU, no network. Only a server that answers is
killed: one that never comes up is a fault of its own, at which the gateway gives up.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cartridge_distill import retrying  # noqa: E402
from cartridge_distill.client import TokasaurusClient  # noqa: E402
from cartridge_distill.errors import RolloutError, SyncError  # noqa: E402
from cartridge_distill.http_sync import HttpPublisher  # noqa: E402
from cartridge_distill.versions import new_run_id, step_of, version_id  # noqa: E402
from cartridge_distill.wire import CartridgeRef  # noqa: E402
from training.gateway_rig import (  # noqa: E402
    BASE_MODEL,
    RunningGateway,
    Shape,
    machine,
    make_model,
    megabytes,
    random_version,
    save_model,
)
from training.measure import say  # noqa: E402
from training.soak_check import (  # noqa: E402
    FAR,
    TOLERANCE,
    Answer,
    Checker,
    DiskWatch,
    RetryLog,
    since_kill,
    unexplained,
)
from training.supervise import ChildFailed, Supervisor, tail  # noqa: E402

SHAPE = Shape()
_REPORT_SECONDS = 5.0
_SAMPLE_SECONDS = 0.5
_PROMPT_TOKENS = 12  # and four more, which hold the request's number
_OLDER = 0.2  # of the requests name the version before the newest
_SHOWN = 3
PATIENCE = retrying.ClientSettings(max_attempts=40, max_backoff_s=3.0, read_timeout_s=300.0)


class Soak:
    """One run against one gateway; its coroutines share this state on one event loop."""

    def __init__(self, options: argparse.Namespace, gateway: RunningGateway) -> None:
        self.options = options
        self.gateway = gateway
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
        publisher = HttpPublisher([self.gateway.url], BASE_MODEL, PATIENCE)
        with self.retries.listening():
            await self._publish(publisher, 0)
            if not self.published:
                return
            self._note_memory()
            self.start = time.monotonic()
            self.deadline = self.start + self.options.seconds
            async with TokasaurusClient(self.gateway.url, PATIENCE, SHAPE.vocabulary) as client:
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
        while not await asyncio.to_thread(self.gateway.is_up):
            self._check_alive()
            await asyncio.sleep(0.1)

    def _check_alive(self) -> None:
        if not self.gateway.alive:
            raise ChildFailed(f"the gateway itself ended.\n{tail(self.gateway.log)}")

    # --- what happens at once -----------------------------------------------------------------

    async def _ask(self, client: TokasaurusClient) -> None:
        """One request after the other; as many of these run as are to be in flight."""
        while not self.over:
            number = next(self.numbers)
            back = 2 if len(self.published) > 1 and self.draw.random() < _OLDER else 1
            step = self.published[-back]
            prompt = [self.draw.randrange(SHAPE.vocabulary) for _ in range(_PROMPT_TOKENS)]
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
        snapshot = random_version(SHAPE, tokens, self.seed_of(step))
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
            server = self.gateway.server_process()
            if server is not None:
                self.kills.append(time.monotonic())
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
        for folder in self.gateway.cartridges.iterdir():
            if not folder.name.startswith("."):  # being written, or being taken away
                steps.append(step_of(folder.name))
        for parent, _, files in os.walk(self.gateway.cartridges):
            for name in files:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size
                except FileNotFoundError:
                    pass  # deleted between two looks
        return steps, total

    def _note_memory(self) -> None:
        self.rss.append((megabytes(self.gateway.process), megabytes(self.gateway.server_process())))

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
        metrics = self.gateway.metrics()
        sent = metrics.get(("requests_total", "/custom/cartridge/completions", "200"), 0)
        if sent != len(self.answers):
            self._violated(
                f"the gateway sent {sent:.0f} answers, {len(self.answers)} came: doubled or lost"
            )
        died = metrics.get(("server_restarts_total", "died"), 0)
        if died != len(self.kills) or self.restarts() != died:
            self._violated(
                f"{len(self.kills)} kills, but the gateway started the server again "
                f"{self.restarts():.0f} times, {died:.0f} of them after a death"
            )
        checker = Checker(
            make_model(SHAPE, self.options.seed),
            SHAPE,
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
        found = self.gateway.metrics()
        return sum(n for name, n in found.items() if name[0] == "server_restarts_total")

    def print_report(self, checker: Checker) -> None:
        """The table, and the verdict."""
        times = sorted(self.latencies) or [float("nan")]
        others = checker.differences.others or [float("nan")]
        (gateway_0, server_0), (gateway_1, server_1) = self.rss[0], self.rss[-1]
        rows = [
            ("requests", f"{self.asked}"),
            ("answers", f"{len(self.answers)}, {len(self.answers) / self.options.seconds:.0f}/s"),
            ("uploads", f"{len(self.published)} versions"),
            ("kills of the server process", f"{len(self.kills)}"),
            ("restarts, by /metrics", f"{self.restarts():.0f}"),
            (
                "latency p50, p99, longest",
                f"{_at(times, 0.5)}, {_at(times, 0.99)}, {_at(times, 1)}",
            ),
            (
                "versions on disk, at most",
                f"{self.disk.most_versions} (kept: {self.options.keep}, and what is in use or "
                "being written)",
            ),
            ("bytes on disk, at most", f"{self.disk.most_bytes / 1e6:.2f} MB"),
            (
                "memory of the gateway",
                f"{gateway_0:.0f} -> {gateway_1:.0f} MB ({gateway_1 - gateway_0:+.0f})",
            ),
            (
                "memory of the server",
                f"{server_0:.0f} -> {server_1:.0f} MB ({server_1 - server_0:+.0f}; another one)",
            ),
            (
                "log-probs, version asked for",
                f"differ by {checker.differences.own:.1e} at most (bound {TOLERANCE:.0e})",
            ),
            (
                "log-probs, version before it",
                f"differ by {min(others):.1e} at least (bound {FAR:.0e})",
            ),
            ("attempts made again", f"{len(self.retries.attempts)}"),
        ]
        say("")
        for name, value in rows:
            say(f"   {name:<30} {value}")
        reasons = Counter(reason for _, reason in self.retries.attempts)
        for reason, count in reasons.most_common():
            after = max(
                since_kill(t, self.kills) for t, why in self.retries.attempts if why == reason
            )
            say(f"      {count:>6} x {reason}; {after:.1f} s after a kill at most")
        say("")
        for kind, count in self.kinds.items():
            say(f"   violated {count} times; the first stand above: {kind} ...")
        say(
            f"verdict: {len(self.violations)} violations in {self.options.seconds:.0f} s"
            f"{'' if self.violations else '; every answer is there once, of the version asked for'}"
        )


def _at(times: list[float], share: float) -> str:
    return f"{times[min(len(times) - 1, int(share * len(times)))]:.2f} s"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--seconds", type=float, default=300.0, help="of load (%(default)s)")
    option("--inflight", type=int, default=64, help="requests at once (%(default)s)")
    option("--upload-every", type=float, default=1.0, help="seconds between versions (%(default)s)")
    option("--kill-every", type=float, default=20.0, help="seconds between kills (%(default)s)")
    option("--seed", type=int, default=0, help="of weights, prompts, versions (%(default)s)")
    option("--keep", type=int, default=6, help="versions the gateway keeps (%(default)s)")
    option("--new-tokens", type=int, default=4, help="of every answer (%(default)s)")
    option(
        "--cartridge-tokens", type=int, default=16, help="a multiple of 16 (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("seconds", "inflight", "upload_every", "kill_every", "new_tokens"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: must be above 0")
    if options.keep < 3:
        # A request that is tried again a second later must still find the version before.
        parser.error(f"--keep {options.keep}: must be at least 3")
    if options.cartridge_tokens <= 0 or options.cartridge_tokens % 16:
        parser.error(f"--cartridge-tokens {options.cartridge_tokens}: must be a multiple of 16")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as name, Supervisor() as supervisor:
            scratch = Path(name)
            say(f"soak of the gateway; {machine()}; all of this in {scratch}")
            save_model(make_model(SHAPE, options.seed), scratch / "model")
            gateway = RunningGateway(
                supervisor,
                scratch / "model",
                scratch,
                ["--keep-versions", str(options.keep), "--max-inflight", "4096"],
                ["--threads", "1"],
            )
            say(
                f"   {gateway.url} is up: {options.inflight} requests in flight for "
                f"{options.seconds:.0f} s, a version every {options.upload_every:g} s, a kill "
                f"every {options.kill_every:g} s"
            )
            soak = Soak(options, gateway)
            asyncio.run(soak.run())
            checker = soak.verify()
            soak.print_report(checker)
            if soak.violations:
                say(tail(gateway.log))
            return 1 if soak.violations else 0
    except KeyboardInterrupt:
        print("\nstopped; every process of the soak was ended", flush=True)
        return 130
    except ChildFailed as error:
        print(f"\nthe soak failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
