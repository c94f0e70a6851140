"""Kills the processes of a small training run, again and again, and compares what comes out.

    python tests/faults/kill_harness.py                                # all, 20 moments each
    python tests/faults/kill_harness.py --targets proxy --moments 5    # a few minutes

A small run (real veRL, Ray and gateway, a tiny model of random weights, greedy rollouts) is trained
once without a fault. Then, for each target, the same run is killed with SIGKILL at seeded moments:
while it starts, in the rollout, the update, the save, the sync and after it, at a step and after a
delay drawn from --seed. The targets:

    trainer      the command, or the Ray actor in which the trainer runs
    worker       the Ray actor with the engine
    proxy        the Ray actor that talks to the server (TokasaurusHttpServer)
    agent-loop   the Ray actor that asks for the rollouts
    storage      the Ray actor that keeps the samples (TransferQueue's SimpleStorageUnit)
    server       the server behind the gateway, or the gateway itself; the run must survive it

After a kill of one of the others the command must end soon, with an error that names what died,
and is started again as a user would: it resumes (trainer.resume_mode=auto) and is killed again. In
the end losses, gradient norms, learning rates, weights and optimizer state must be those of the
run that was never stopped, every step must be there once, none that was saved may be lost or
trained again, and every step must have been trained on what the version before it wrote, according
to the labels of the samples and to the server's log. A table is printed and written as JSON; the
exit code is 1 if a line of it failed.

A start of veRL takes 20 to 60 seconds of two cores, and each moment needs one (the server's do
not). Results are kept in --out: a second call with the same --out does what is left, and calls
with different --targets may run side by side. Ctrl-C ends every process that was started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from cartridge_distill.util.processes import ChildFailed, Supervisor, say  # noqa: E402
from tests.faults.kill_judge import (  # noqa: E402
    Ended,
    Kill,
    Verdict,
    judge,
    read_attempts,
    table,
)
from tests.faults.kill_phases import BEFORE, phase_at  # noqa: E402
from tests.faults.kill_plan import TARGETS, Moment, Usual, plan  # noqa: E402
from tests.faults.kill_run import (  # noqa: E402
    ACTORS,
    Attempt,
    Victim,
    gateway_victim,
    write_inputs,
)
from tests.gateway.rig import Rig, use_token  # noqa: E402
from verl_patches.trainer.run_folder import last_complete, step_of_folder  # noqa: E402

_LOOK_SECONDS = 0.004
_TELL_SECONDS = 20.0


class TargetRun:
    """A run that one target is killed in: where it stands."""

    def __init__(self, target: str, options: argparse.Namespace) -> None:
        self.target = target
        self.folder: Path = options.out / target
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.folder / "run"
        self.moments = plan(target, options.moments, options.seed)
        self._records = self.folder / "attempts.jsonl"
        self.attempts = read_attempts(self._records)

    @property
    def left(self) -> list[Moment]:
        """The moments that are still to come."""
        return self.moments[sum(len(attempt.kills) for attempt in self.attempts) :]

    @property
    def is_over(self) -> bool:
        """At its end, or not to be brought there: three attempts failed without a kill."""
        last = self.attempts[-3:]
        stuck = len(last) == 3 and all(a.how in ("loud", "hung") and not a.kills for a in last)
        return stuck or any(attempt.how == "finished" for attempt in self.attempts)

    def add(self, ended: Ended) -> None:
        self.attempts.append(ended)
        with self._records.open("a") as sink:
            sink.write(ended.line())


class Harness:
    """The runs of one call.

    Args:
        options: the command line.
        supervisor: ends the gateway; each attempt has a supervisor of its own.
    """

    def __init__(self, options: argparse.Namespace, supervisor: Supervisor) -> None:
        self.options = options
        self.out: Path = options.out
        self.inputs = self.out / "inputs"
        self.steps = 2 * options.moments + 4  # a moment lets a run get at most two steps further
        if not self.inputs.exists():
            write_inputs(self.inputs, options.seed)
        self._supervisor = supervisor
        self._told = time.monotonic()

    @cached_property
    def gateway(self) -> Rig:
        """Started when it is needed: a call that only prints results needs none.

        It keeps its address and its cartridges when it is killed and started again.
        """
        use_token()
        return Rig(
            self.out / "gateways" / f"{int(time.time())}-{os.getpid()}",
            self.inputs / "model",
            *("--keep-versions", 3, "--drain-s", 3),
            supervisor=self._supervisor,
        ).start()

    def reference(self) -> Usual:
        """Trains the run that is not stopped, unless an earlier call has."""
        folder = self.out / "reference"
        file = folder / "usual.json"
        if file.exists():
            return Usual(**json.loads(file.read_text()))
        shutil.rmtree(folder, ignore_errors=True)
        say(f"== the run that is never stopped: {self.steps} steps")
        with Supervisor() as supervisor:
            attempt = self._start(supervisor, folder, 0)
            born: dict[str, float] = {}
            while not attempt.ended:
                for name in {"driver", *ACTORS} - born.keys():
                    if (victim := attempt.victim(name)) is not None:
                        born[name] = victim.began
                self._tell(attempt, "never stopped")
                time.sleep(0.2)
            if attempt.process.returncode != 0:
                raise ChildFailed(f"the run without a fault failed.\n{attempt.tail()}")
        usual = Usual.of(born, attempt.marks())
        file.write_text(json.dumps(asdict(usual), indent=2))
        return usual

    def run(self, usual: Usual) -> list[Verdict]:
        """All targets in turn, an attempt each, until all are over; then the comparisons."""
        targets = [TargetRun(target, self.options) for target in self.options.targets]
        while going := [target for target in targets if not target.is_over]:
            for target in going:
                ended = self._attempt(target, usual)
                target.add(ended)
                say(
                    f"   {target.target}: attempt {ended.number} went on from step "
                    f"{ended.resumed_from}, ended {ended.how}"
                    + (f" {ended.seconds:.1f} s after the kill" if ended.seconds else "")
                    + f", saved {ended.saved}; {len(target.left)} moments left"
                    + (f"\n      {ended.last_words}" if ended.last_words else "")
                )
                if ended.how == "interrupted":
                    raise KeyboardInterrupt
        return [self.verdict(target) for target in targets]

    def verdict(self, target: TargetRun) -> Verdict:
        """Prints what is wrong with it, too."""
        logs = sorted((self.out / "gateways").rglob("gateway*.log"))
        verdict = judge(
            target.target,
            target.attempts,
            target.run,
            self.out / "reference" / "run",
            "".join(log.read_text(errors="replace") for log in logs),
            len(target.moments),
            survives=target.target == "server",
        )
        for problem in verdict.problems:
            say(f"   {target.target}: {problem}")
        return verdict

    def _start(self, supervisor: Supervisor, folder: Path, number: int) -> Attempt:
        self._told = time.monotonic()
        here = folder / f"attempt-{number:03d}"
        shutil.rmtree(here, ignore_errors=True)  # of a call that was killed itself
        url = self.gateway.url
        return Attempt(supervisor, here, folder / "run", self.inputs, url, self.steps)

    def _attempt(self, target: TargetRun, usual: Usual) -> Ended:
        """One start of the run, killed at the next moment; with none left, it goes to its end."""
        resumed_from, left, number = _saved(target.run), target.left, len(target.attempts)
        survives = target.target == "server"
        kills: list[Kill] = []
        how, seconds, named, behind, words = "interrupted", None, True, 0, ""
        with Supervisor() as supervisor:
            attempt = self._start(supervisor, target.folder, number)
            try:
                for ahead, moment in enumerate(left if survives else left[:1]):
                    aimed = resumed_from + (1 + ahead if survives else moment.ahead)
                    kills += self._kill(attempt, moment, aimed, usual)
                    if survives and not attempt.ended:
                        self.gateway.wait_up()
                killed_at = time.monotonic()
                must_end = bool(kills) and not survives
                how = self._wait(attempt, target.target, must_end)
                if must_end:
                    seconds = time.monotonic() - killed_at
                    named = how == "hung" or _names(kills[0], attempt.words())
                if how == "loud" and must_end and kills[0].victim == "driver":
                    how = "killed"
                if how != "hung":
                    behind = self._left_behind(attempt)
                as_planned = how == ("loud" if must_end else "finished") or how == "killed"
                if not as_planned or not named:
                    words = _last_words(attempt.words())
            except KeyboardInterrupt:
                how = "interrupted"
                kills = kills if survives else []  # what it led to was not seen
        return Ended(
            number=number,
            resumed_from=resumed_from,
            saved=_saved(target.run),
            trained=[mark.step for mark in attempt.marks() if mark.phase == "update"],
            kills=kills,
            how=how,
            seconds=seconds,
            named=named,
            left_behind=behind,
            last_words=words,
        )

    def _kill(self, attempt: Attempt, moment: Moment, step: int, usual: Usual) -> list[Kill]:
        """Waits for the moment and kills; empty when the run ended before."""
        victim: Victim | None = None
        while not attempt.ended:
            self._tell(attempt, f"{moment.victim} {moment.number}")
            if victim is None:
                victim = self._victim(attempt, moment.victim)
                if victim is None:
                    time.sleep(0.1)  # looking for a process costs more than looking for a mark
                    continue
            due = usual.due(moment, step, victim.began, attempt.marks())
            if due is None or time.time() < due:
                time.sleep(_LOOK_SECONDS)
                continue
            try:
                when = victim.kill()
            except ProcessLookupError:
                break  # the run ended in this very moment
            at_step, phase = phase_at(attempt.marks(), when)
            say(
                f"   {moment.victim} {moment.number}: pid {victim.pid} killed at step {at_step}, "
                f"{phase}; aimed at step {step}, {moment.phase} + {usual.delay(moment):.2f} s"
            )
            if moment.victim == "gateway":
                self.gateway.start()  # the server of the killed one ends by itself
            return [Kill(moment.number, moment.victim, step, moment.phase, at_step, phase)]
        return []

    def _victim(self, attempt: Attempt, name: str) -> Victim | None:
        if name in ("server", "gateway"):
            return gateway_victim(self.gateway, name)
        return attempt.victim(name)

    def _wait(self, attempt: Attempt, what: str, must_end: bool) -> str:
        """Until the command has ended: "finished", "loud" or "hung"."""
        start = time.monotonic()
        while not attempt.ended:
            self._tell(attempt, what)
            if must_end and time.monotonic() - start > self.options.patience:
                return "hung"
            time.sleep(0.1)
        return "finished" if attempt.process.returncode == 0 else "loud"

    def _left_behind(self, attempt: Attempt) -> int:
        """Ray needs a moment to end its processes; what stays longer might go on training."""
        start = time.monotonic()
        while (left := attempt.left_behind()) and time.monotonic() - start < self.options.patience:
            time.sleep(0.2)
        return len(left)

    def _tell(self, attempt: Attempt, what: str) -> None:
        if time.monotonic() - self._told > _TELL_SECONDS:
            self._told = time.monotonic()
            step, phase = phase_at(attempt.marks(), time.time())
            seconds = time.time() - attempt.began
            say(f"   {what}: {seconds:.0f} s, " + (f"step {step}, {phase}" if step else phase))


def _saved(run: Path) -> int:
    folder = last_complete(run)
    return step_of_folder(folder) if folder is not None else 0


_SPOKEN = {
    "worker": "training worker",
    "proxy": "rollout proxy (TokasaurusHttpServer)",
    "agent-loop": "agent loop worker",
    "storage": "storage unit of the sample queue",
}


def _names(kill: Kill, log: str) -> bool:
    """Our own words with the way to go on, or, before the first step, Ray's with the class."""
    if kill.victim == "driver":
        return True  # the command itself cannot say anything any more
    rays = rf"class_name: \S*{ACTORS[kill.victim]}\b"
    ours = (
        rf"the {re.escape(_SPOKEN.get(kill.victim, ''))} \d+ died.*[Ss]tart the same command again"
    )
    is_rays_word_enough = kill.phase == BEFORE or kill.victim == "task-runner"
    return bool(re.search(ours, log) or (is_rays_word_enough and re.search(rays, log)))


def _last_words(log: str) -> str:
    lines = [line for line in log.splitlines() if re.search(r"(Error|died|Exception)\b", line)]
    return " / ".join(lines[-3:])[-600:] or log[-300:]


def main() -> int:
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    problem = same_settings(options)
    if problem:
        say(problem)
        return 2
    try:
        with Supervisor() as supervisor:
            harness = Harness(options, supervisor)
            verdicts = harness.run(harness.reference())
    except ChildFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on (results so far in {options.out})")
        return 130
    say("\n" + table(verdicts))
    results = options.out / f"results-{'-'.join(options.targets)}.json"
    results.write_text(json.dumps([asdict(v) | {"passed": v.passed} for v in verdicts], indent=2))
    say(f"\nwritten to {results}")
    return 0 if all(v.passed for v in verdicts) else 1


def same_settings(options: argparse.Namespace) -> str | None:
    """Results of other settings in the same folder would be mixed into these."""
    file = options.out / "settings.json"
    mine = {"moments": options.moments, "seed": options.seed}
    if file.exists() and (there := json.loads(file.read_text())) != mine:
        return f"{options.out} holds results for {there}, not for {mine}: give another --out"
    file.write_text(json.dumps(mine))
    return None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        *("--targets", "--target"),
        nargs="+",
        choices=TARGETS,
        default=list(TARGETS),
        metavar="TARGET",
        help=f"what is killed, of: {' '.join(TARGETS)} (default: all)",
    )
    add("--moments", type=_positive, default=20, help="kills of each target (default: 20)")
    add("--seed", type=int, default=0, help="model, data and moments follow from it (default: 0)")
    add(
        *("--patience", "-p"),
        type=float,
        default=120.0,
        help="seconds after a kill in which the command must end (default: 120)",
    )
    add("--out", type=Path, default=Path("runs/kill"), help="results (default: runs/kill)")
    options = parser.parse_args(arguments)
    options.out = options.out.expanduser().absolute()
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
