"""What ``kill_harness.py`` concludes from the files of a killed run and of one never stopped.

Reads only: the records of the attempts, the runs' histories, their last checkpoints, the
gateway's log. Starts nothing, so the tests give it runs that went wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cartridge_distill.sync.versions import run_of, step_of
from tests.faults.kill_phases import BEFORE, PHASES
from verl_patches.trainer.run_folder import TRACKER, step_folder

TOLERANCE = 1e-6  # relative, of losses, gradient norms and weights; greedy runs give 0
LOGPROB_BOUND = 1e-3
_COMPARED = ("actor/loss", "actor/grad_norm", "actor/lr")
# "repeated": a gateway that was killed had stored it, and the next one found it on the disk.
_TAKEN = re.compile(r"version (\S+) (created|repeated)")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. ``step`` and ``phase`` are where it hit, which may be after where it aimed."""

    moment: int
    victim: str
    aimed_step: int
    aimed_phase: str
    step: int
    phase: str


@dataclass(frozen=True)
class Ended:
    """One attempt: a start of the run until its end.

    Attributes:
        number: from 0, over all calls of the harness.
        resumed_from: the last saved step when it began, 0 for none.
        saved: the last saved step when it had ended.
        trained: steps whose update it began.
        kills: that it took; several for the server, which is survived.
        how: "finished", "loud" (an error that ends the command), "killed" (the victim was the
            command itself), "hung" (neither, within the patience), "interrupted" (the harness was).
        seconds: from the kill to the end; None without a kill.
        named: does the log name what died?
        left_behind: processes that outlived the command.
        last_words: the end of its log, where something is wrong.
    """

    number: int
    resumed_from: int
    saved: int
    trained: list[int]
    kills: list[Kill]
    how: str
    seconds: float | None = None
    named: bool = True
    left_behind: int = 0
    last_words: str = ""

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Ended:
        values = json.loads(line)
        return cls(**{**values, "kills": [Kill(**kill) for kill in values["kills"]]})


def read_attempts(file: Path) -> list[Ended]:
    """All attempts of a target so far."""
    return [Ended.of_line(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass
class Verdict:
    """One line of the table."""

    target: str
    kills: int
    phases: dict[str, int]
    resumes: int
    lost: int
    twice: int
    largest_difference: float
    slowest_end: float
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def read_history(run: Path) -> list[dict[str, Any]]:
    """The lines of ``history.jsonl``; none where there is no file."""
    file = run / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def judge(
    target: str,
    attempts: Sequence[Ended],
    run: Path,
    reference: Path,
    gateway_log: str,
    moments: int,
    survives: bool,
) -> Verdict:
    """Compares a killed run with the one that was never stopped.

    Args:
        attempts: in order.
        run, reference: folders of checkpoints and history.
        gateway_log: of the killed run.
        moments: how many kills there should be.
        survives: the trainer is to live through the kills (they hit the server).
    """
    kills = [kill for attempt in attempts for kill in attempt.kills]
    phases = {name: sum(k.phase == name for k in kills) for name in (BEFORE, *PHASES)}
    lost, twice, problems = _steps(attempts)
    if len(kills) < moments:
        problems.append(f"{len(kills)} of {moments} kills")
    problems += [p for attempt in attempts for p in _end(attempt, survives)]
    difference, found = _compare(run, reference)
    problems += found
    history = read_history(run)
    problems += [*_versions(history, gateway_log), *_runs(attempts, history)]
    return Verdict(
        target=target,
        kills=len(kills),
        phases=phases,
        resumes=sum(attempt.resumed_from > 0 for attempt in attempts[1:]),
        lost=lost,
        twice=twice,
        largest_difference=difference,
        slowest_end=max((a.seconds for a in attempts if a.seconds is not None), default=0.0),
        problems=problems,
    )


def _end(attempt: Ended, survives: bool) -> Iterable[str]:
    name = f"attempt {attempt.number}"
    if attempt.how == "hung":
        yield f"{name} hung: {attempt.last_words}"
    if survives and attempt.kills and attempt.how not in ("finished", "interrupted"):
        yield f"{name} did not survive: {attempt.last_words}"
    if not survives and attempt.kills and attempt.how == "finished":
        yield f"{name} finished as if nothing had been killed"
    if not attempt.kills and attempt.how not in ("finished", "interrupted"):
        yield f"{name} ended ({attempt.how}) without having been killed: {attempt.last_words}"
    if not attempt.named:
        yield f"{name} does not name what died: {attempt.last_words}"
    if attempt.left_behind:
        yield f"{name} left {attempt.left_behind} processes behind"


def _steps(attempts: Sequence[Ended]) -> tuple[int, int, list[str]]:
    """Saved steps that a later attempt did not have; saved steps that it trained again."""
    lost, twice, saved = 0, 0, 0
    problems = []
    for attempt in attempts:
        name = f"attempt {attempt.number}"
        if attempt.resumed_from < saved:
            lost += saved - attempt.resumed_from
            problems.append(f"{name} went on from {attempt.resumed_from}, saved was {saved}")
        again = [step for step in attempt.trained if step <= saved]
        if again:
            twice += len(again)
            problems.append(f"{name} trained {again} again, saved was {saved}")
        if len(set(attempt.trained)) != len(attempt.trained):
            problems.append(f"{name} trained a step more than once: {attempt.trained}")
        if attempt.trained and attempt.trained[0] > attempt.resumed_from + 1:
            problems.append(f"{name} skipped to step {attempt.trained[0]}")
        if attempt.saved < saved:
            lost += saved - attempt.saved
            problems.append(f"{name} ended at {attempt.saved}, saved was {saved}")
        saved = max(saved, attempt.saved)
    return lost, twice, problems


def _compare(run: Path, reference: Path) -> tuple[float, list[str]]:
    """Largest difference, relative where values are above 1; and what does not fit."""
    ours, theirs = read_history(run), read_history(reference)
    problems = []
    expected = [line["step"] for line in theirs]
    if [line["step"] for line in ours] != expected:
        problems.append(f"the history has the steps {_short(ours)}, the other {_short(theirs)}")
    logged = _logged_steps(run / "metrics.jsonl")
    if logged != expected:
        problems.append(f"metrics.jsonl has the steps {logged}, expected 1 to {len(expected)}")
    largest = 0.0
    by_step = {line["step"]: line["data"] for line in ours}
    for line in theirs:
        data = by_step.get(line["step"])
        if data is None:
            continue
        for key in _COMPARED:
            difference = _relative(data[key], line["data"][key])
            largest = max(largest, difference)
            if not difference <= TOLERANCE:
                problems.append(
                    f"step {line['step']}: {key} is {data[key]!r}, not {line['data'][key]!r}"
                )
    weights = _weights_difference(run, reference)
    if weights is None:
        problems.append("the last checkpoints do not hold the same tensors, or one is missing")
    elif not weights <= TOLERANCE:
        problems.append(f"the last cartridges or optimizer states differ by {weights:.1e}")
    return max(largest, weights or 0.0), problems


def _logged_steps(file: Path) -> list[int]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(1.0, abs(other))


def _weights_difference(run: Path, reference: Path) -> float | None:
    """Between cartridges and optimizer states of the last checkpoints; None if they do not fit."""
    tensors = []
    for folder in (run, reference):
        tracker = folder / TRACKER
        if not tracker.is_file():
            return None
        actor = step_folder(folder, int(tracker.read_text())) / "actor"
        found = {}
        for file in sorted(actor.rglob("*.safetensors")):
            found.update({f"{file.name}/{name}": t for name, t in load_file(file).items()})
        # Generators: no step draws a number, and a process's start may.
        tensors.append({n: t for n, t in found.items() if "/rng/" not in n})
    ours, theirs = tensors
    if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        return None
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    return max(float((a - b).abs().max()) if torch.numel(a) else 0.0 for a, b in pairs)


def _versions(history: Sequence[dict[str, Any]], gateway_log: str) -> Iterable[str]:
    """Each step trained on what the version before it wrote, and the server had that version."""
    taken = _TAKEN.findall(gateway_log)
    created = [version for version, how in taken if how == "created"]
    for version in sorted({v for v in created if created.count(v) > 1}):
        yield f"version {version} was created twice"
    for line in history:
        step, version = line["step"], line["version"]
        if step_of(version) != step - 1:
            yield f"step {step} trained on rollouts of {version}"
        if version not in {name for name, _ in taken}:
            yield f"step {step} trained on rollouts of {version}, which the server never took"
        difference = line["data"]["actor/logprob_diff/max"]
        if not difference <= LOGPROB_BOUND:
            yield f"step {step}: server and trainer differ by {difference:.1e}"


def _short(lines: Sequence[dict[str, Any]]) -> str:
    return ",".join(str(line["step"]) for line in lines) or "none"


def _runs(attempts: Sequence[Ended], history: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Each attempt publishes under a run id of its own: a server never loads an id twice."""
    version_of = {line["step"]: line["version"] for line in history}
    owner: dict[str | None, int] = {}
    for attempt in attempts:
        steps = range(attempt.resumed_from + 1, attempt.saved + 1)
        for run in {run_of(version_of[step]) for step in steps if step in version_of}:
            first = owner.setdefault(run, attempt.number)
            if first != attempt.number:
                yield f"attempts {first} and {attempt.number} published as the same run {run}"


def table(verdicts: Sequence[Verdict]) -> str:
    """For the terminal; Markdown, so that it can be pasted."""
    head = ["target", "kills", *(BEFORE, *PHASES), "resumes", "lost", "twice", "difference"]
    head += ["slowest end", "verdict"]
    rows = [head, ["---"] * len(head)]
    for v in verdicts:
        rows.append(
            [
                *(v.target, str(v.kills), *(str(v.phases[name]) for name in (BEFORE, *PHASES))),
                *(str(v.resumes), str(v.lost), str(v.twice), f"{v.largest_difference:.1e}"),
                *(f"{v.slowest_end:.0f} s", "ok" if v.passed else "FAILED"),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
