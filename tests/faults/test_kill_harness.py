"""The kill harness: what it plans, what it concludes from a run's files, and one kill for real.

The files are written by the code that writes them in a run; those of runs that went wrong differ
from a good one in the one thing that went wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.kill_harness import parse, same_settings
from tests.faults.kill_judge import Ended, Kill, Verdict, judge, read_attempts, table
from tests.faults.kill_phases import PHASES, Mark, phase_at, read_marks
from tests.faults.kill_plan import TARGETS, Usual, plan
from tests.training.conftest import ROOT, child_environment
from verl_patches.trainer import run_folder
from verl_patches.trainer.history import History

STEPS = 6


# ---------------------------------------------------------------- arguments and moments


def test_the_help_says_what_is_killed_and_what_is_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for word in (*TARGETS, "--moments", "--seed", "resume_mode=auto", "weights"):
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "gpu"], "invalid choice: 'gpu'"),
        (["--moments", "0"], "at least 1"),
        (["--targets"], "expected at least one argument"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    options = parse(["--out", str(tmp_path), "--seed", "3"])
    assert same_settings(options) is None
    assert same_settings(parse(["--out", str(tmp_path), "--seed", "3"])) is None
    other = same_settings(parse(["--out", str(tmp_path), "--seed", "4"]))
    assert other is not None and "give another --out" in other


def test_moments_repeat_with_the_seed_and_cover_every_phase() -> None:
    moments = plan("worker", 20, seed=0)
    assert moments == plan("worker", 20, seed=0) != plan("worker", 20, seed=1)
    assert plan("worker", 7, seed=0) == moments[:7]
    assert {moment.phase for moment in moments} == {"start", *PHASES}
    assert {moment.victim for moment in plan("trainer", 20, 0)} == {"driver", "task-runner"}
    assert {moment.victim for moment in plan("server", 20, 0)} == {"server", "gateway"}


def test_marks_say_where_a_kill_hit(tmp_path: Path) -> None:
    file = tmp_path / "marks.txt"
    assert read_marks(file) == []
    file.write_text("10.0 1 rollout\n10.5 1 update\n11.0 1 save\n11.5 2 ro")
    marks = read_marks(file)
    assert marks[-1] == Mark(11.0, 1, "save")  # the last line is not whole yet
    assert phase_at(marks, 9.0) == (0, "start")
    assert phase_at(marks, 10.7) == (1, "update")
    usual = Usual(starts={"worker": 8.0}, phases={"update": 0.2})
    [late, *_] = [m for m in plan("worker", 20, 0) if m.phase == "update"]
    assert usual.due(late, 1, 1.0, marks) == 10.5 + 0.2 * late.delay
    assert usual.due(late, 2, 1.0, marks) is None
    [early, *_] = [m for m in plan("worker", 20, 0) if m.phase == "start"]
    assert usual.due(early, 1, 1.0, marks) == 1.0 + 8.0 * early.delay
    assert usual.due(early, 1, 10.4, marks) == 10.5  # the start was over before its time


def test_delays_follow_from_what_a_run_usually_takes() -> None:
    marks = [
        Mark(30.0 + step + place / 10, step, phase)
        for step in (1, 2, 3)
        for place, phase in enumerate(PHASES)
    ]
    usual = Usual.of({name: 1.1 for name in ("driver", "agent-loop")}, marks)
    assert usual.phases["update"] == pytest.approx(0.1)
    assert usual.phases["record"] == pytest.approx(0.6)
    assert usual.starts["agent-loop"] == pytest.approx(30.0)  # until the first update
    for moment in plan("agent-loop", 20, 0):
        assert 0.0 <= usual.delay(moment) < 31.0


# ---------------------------------------------------------------- the comparison


def write_run(
    run: Path,
    starts: dict[int, str],
    change: Callable[[dict[int, float]], None] = lambda losses: None,
    weight: float = 0.5,
) -> str:
    """A run's folder at its end; returns the gateway's log.

    Args:
        starts: first step of each attempt -> its run id.
        change: of the losses by step.
        weight: of the cartridge.
    """
    losses = {step: 1.0 / step for step in range(1, STEPS + 1)}
    change(losses)
    history, created, current = History(), [], ""
    for step, loss in losses.items():
        current = starts.get(step, current)
        created.append(f"{current}-step-{step - 1:06d}")
        metrics = {"actor/loss": loss, "actor/grad_norm": 1.0, "actor/lr": 0.1}
        history.add(step, created[-1], {**metrics, "actor/logprob_diff/max": 1e-5})
    folder = run_folder.step_folder(run, STEPS)
    (folder / "actor" / "cartridge").mkdir(parents=True)
    save_file(
        {"keys": torch.full((2, 3), weight)}, folder / "actor" / "cartridge" / "c.safetensors"
    )
    history.write(run)
    run_folder.mark_complete(run, STEPS)
    lines = [{"step": line["step"], "data": line["data"]} for line in history.lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "".join(f"INFO version {name} created: 0.1 MB, works\n" for name in created)


KILLED = Kill(0, "worker", 3, "update", 3, "update")
GOOD = [
    Ended(0, resumed_from=0, saved=2, trained=[1, 2, 3], kills=[KILLED], how="loud", seconds=3.0),
    Ended(1, resumed_from=2, saved=STEPS, trained=[3, 4, 5, 6], kills=[], how="finished"),
]
STARTS = {1: "run-a", 3: "run-b"}


@pytest.fixture
def conclude(tmp_path: Path) -> Callable[..., Verdict]:
    run, reference = tmp_path / "run", tmp_path / "reference"
    write_run(reference, {1: "never"})

    def conclude(attempts: list[Ended], log: str, survives: bool = False) -> Verdict:
        return judge("worker", attempts, run, reference, log, moments=1, survives=survives)

    return conclude


def test_a_run_that_lost_nothing_passes(conclude: Callable[..., Verdict], tmp_path: Path) -> None:
    verdict = conclude(GOOD, write_run(tmp_path / "run", STARTS))
    assert verdict.passed, verdict.problems
    assert (verdict.kills, verdict.resumes, verdict.lost, verdict.twice) == (1, 1, 0, 0)
    assert verdict.largest_difference == 0.0
    assert verdict.phases["update"] == 1
    printed = table([verdict])
    assert "| worker" in printed and "ok" in printed and "FAILED" not in printed


def lost(attempts: list[Ended]) -> list[Ended]:
    return [attempts[0], replace(attempts[1], resumed_from=1, trained=[2, 3, 4, 5, 6])]


def twice(attempts: list[Ended]) -> list[Ended]:
    return [attempts[0], replace(attempts[1], trained=[2, 3, 4, 5, 6])]


@pytest.mark.parametrize(
    ("change", "message", "counts"),
    [
        pytest.param(lost, "went on from 1, saved was 2", (1, 1), id="lost"),
        pytest.param(twice, r"trained \[2\] again", (0, 1), id="twice"),
        pytest.param(
            lambda a: [replace(a[0], how="hung"), a[1]], "attempt 0 hung", (0, 0), id="hung"
        ),
        pytest.param(
            lambda a: [replace(a[0], how="finished"), a[1]], "as if nothing", (0, 0), id="unnoticed"
        ),
        pytest.param(
            lambda a: [replace(a[0], named=False), a[1]], "does not name", (0, 0), id="nameless"
        ),
        pytest.param(
            lambda a: [replace(a[0], left_behind=2), a[1]], "left 2 processes", (0, 0), id="left"
        ),
        pytest.param(
            lambda a: [replace(a[0], kills=[]), a[1]], "0 of 1 kills", (0, 0), id="no kill"
        ),
        pytest.param(
            lambda a: [a[0], replace(a[1], how="loud")], "without having been", (0, 0), id="error"
        ),
        pytest.param(
            lambda a: [a[0], replace(a[1], trained=[4, 5, 6])],
            "skipped to step 4",
            (0, 0),
            id="gap",
        ),
    ],
)
def test_attempts_that_went_wrong_fail(
    change: Callable[[list[Ended]], list[Ended]],
    message: str,
    counts: tuple[int, int],
    conclude: Callable[..., Verdict],
    tmp_path: Path,
) -> None:
    verdict = conclude(change(GOOD), write_run(tmp_path / "run", STARTS))
    assert not verdict.passed
    assert (verdict.lost, verdict.twice) == counts
    assert any(re.search(message, problem) for problem in verdict.problems), verdict.problems
    assert "FAILED" in table([verdict])


def another_loss(losses: dict[int, float]) -> None:
    losses[4] += 1e-5


def a_step_is_missing(losses: dict[int, float]) -> None:
    del losses[4]


@pytest.mark.parametrize(
    ("starts", "change", "weight", "message"),
    [
        pytest.param(
            STARTS, another_loss, 0.5, "step 4: actor/loss is 0.25001, not 0.25", id="loss"
        ),
        pytest.param(STARTS, a_step_is_missing, 0.5, "history has the steps 1,2,3,5,6", id="step"),
        pytest.param(
            STARTS, lambda _: None, 0.6, "optimizer states differ by 1.0e-01", id="weight"
        ),
        pytest.param({1: "run-a"}, lambda _: None, 0.5, "published as the same run", id="run id"),
    ],
)
def test_a_run_that_came_out_different_fails(
    starts: dict[int, str],
    change: Callable[[dict[int, float]], None],
    weight: float,
    message: str,
    conclude: Callable[..., Verdict],
    tmp_path: Path,
) -> None:
    verdict = conclude(GOOD, write_run(tmp_path / "run", starts, change, weight))
    assert any(re.search(message, problem) for problem in verdict.problems), verdict.problems


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "run-b-step-000003",
            "run-b-step-000002",
            "step 4 trained on rollouts of run-b-step-000002",
        ),
        ("run-b-step-000003", "run-c-step-000003", "which the server never took"),
        ('"actor/logprob_diff/max": 1e-05', '"actor/logprob_diff/max": 0.1', "differ by 1.0e-01"),
    ],
)
def test_samples_of_another_version_fail(
    old: str, new: str, message: str, conclude: Callable[..., Verdict], tmp_path: Path
) -> None:
    log = write_run(tmp_path / "run", STARTS)
    history = tmp_path / "run" / "history.jsonl"
    history.write_text(history.read_text().replace(old, new))
    verdict = conclude(GOOD, log)
    assert any(message in problem for problem in verdict.problems), verdict.problems


def test_a_version_is_created_once_and_may_be_found_by_the_next_gateway(
    conclude: Callable[..., Verdict], tmp_path: Path
) -> None:
    log = write_run(tmp_path / "run", STARTS)
    found = log.replace("run-b-step-000003 created", "run-b-step-000003 repeated")
    assert conclude(GOOD, found).passed
    [problem] = conclude(GOOD, log + "INFO version run-b-step-000003 created: 0.1 MB\n").problems
    assert problem == "version run-b-step-000003 was created twice"


def test_a_log_that_names_a_step_twice_fails(
    conclude: Callable[..., Verdict], tmp_path: Path
) -> None:
    log = write_run(tmp_path / "run", STARTS)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    assert any("metrics.jsonl has the steps" in p for p in conclude(GOOD, log).problems)


def test_the_servers_death_must_be_survived(
    conclude: Callable[..., Verdict], tmp_path: Path
) -> None:
    log = write_run(tmp_path / "run", {1: "run-a"})
    whole = Ended(0, 0, STEPS, list(range(1, STEPS + 1)), [replace(KILLED, victim="server")], "x")
    assert conclude([replace(whole, how="finished")], log, survives=True).passed
    failed = [replace(whole, how="loud", last_words="RolloutError"), replace(GOOD[1], trained=[])]
    assert "did not survive: RolloutError" in " ".join(conclude(failed, log, True).problems)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "attempts.jsonl"
    file.write_text("".join(ended.line() for ended in GOOD))
    assert read_attempts(file) == GOOD
    assert read_attempts(tmp_path / "none") == []


# ---------------------------------------------------------------- one for real


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_killed_agent_loop_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    """Without the watch the run hangs: its prompts stay in the queue as running, for ever."""
    verl = pytest.importorskip("verl", reason="veRL is not installed")
    environment = child_environment(Path(verl.__file__).parents[1])  # the patched one
    command = [sys.executable, "tests/faults/kill_harness.py", "--targets", "agent-loop"]
    command += ["--moments", "1", "--seed", "0", "--out", str(tmp_path)]
    for _ in range(2):  # another call has nothing left to do, and says the same
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "| agent-loop | 1 " in done.stdout
    [results] = json.loads((tmp_path / "results-agent-loop.json").read_text())
    assert results["passed"] and results["largest_difference"] == 0.0
