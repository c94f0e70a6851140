"""The soak really runs, in small, and its checks can fail."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.faults import soak_check
from tests.faults.soak_check import Answer, Checker, DiskWatch, unexplained
from tests.tiny import endless_model
from tests.training.conftest import Run

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(endless_model(), 16, lambda step: 100 + step, NEW_TOKENS)


def answers(checker: Checker, step: int, count: int) -> list[Answer]:
    """Right ones, made by the checker's own model."""
    made = []
    for number in range(count):
        prompt, tokens = [number, *range(20, 27)], [5 + number, 9, 7]
        empty = Answer(number, step, prompt, tokens, [])
        made.append(replace(empty, logprobs=checker.logprobs(step, [empty])[0].tolist()))
    return made


def test_right_answers_pass(checker: Checker) -> None:
    right = answers(checker, 3, 4) + [replace(answers(checker, 0, 5)[4], number=4)]
    assert checker.check(right) == []
    assert checker.differences.own < 1e-5
    assert min(checker.differences.others) > 1e-2


def test_an_answer_of_another_version_is_a_violation(checker: Checker) -> None:
    right = answers(checker, 3, 3)
    stale = replace(right[1], logprobs=checker.logprobs(2, [right[1]])[0].tolist())
    [violation] = checker.check([right[0], stale, right[2]])
    assert "request 1 asked for version 3" in violation
    assert "they are those of version 2" in violation


def test_an_answer_of_another_request_is_a_violation(checker: Checker) -> None:
    one, other = answers(checker, 3, 2)
    swapped = replace(one, token_ids=other.token_ids, logprobs=other.logprobs)
    violations = checker.check([swapped, other])
    assert any("requests 0 and 1 got the same answer" in text for text in violations)
    assert any("request 0 asked for version 3; its log-probs differ" in t for t in violations)


def test_doubled_and_short_answers_are_violations(checker: Checker) -> None:
    [right] = answers(checker, 1, 1)
    assert "request 0 was answered twice" in checker.check([right, right])
    short = replace(right, token_ids=right.token_ids[:2], logprobs=right.logprobs[:2])
    assert checker.check([short]) == ["request 0 got 2 tokens, asked for 3"]


def test_log_probs_that_are_not_numbers_are_a_violation(checker: Checker) -> None:
    [right] = answers(checker, 1, 1)
    assert checker.check([replace(right, logprobs=[float("nan")] * NEW_TOKENS)])


def test_only_a_kill_explains_a_failed_attempt() -> None:
    broken = "HTTP 503: the server process broke off this request (ClientOSError); ask again"
    assert unexplained([(11.0, broken)], kills=[10.5]) == []
    assert len(unexplained([(10.0, broken)], kills=[10.5])) == 1  # before the kill
    assert len(unexplained([(40.0, broken)], kills=[10.5])) == 1
    assert len(unexplained([(11.0, "HTTP 500: no")], kills=[10.5])) == 1
    assert len(unexplained([(11.0, "ReadError")], kills=[10.5])) == 1


def test_a_version_that_nobody_uses_must_go() -> None:
    watch = DiskWatch(keep=3)
    for step in range(5):
        watch.arrived(step, began=float(step))
    assert watch.sample([2, 3, 4], 0) == []
    [violation] = watch.sample([1, 2, 3, 4], 0)
    assert "version 1 is on the disk" in violation
    with watch.using(1):
        assert watch.in_flight == 1
        assert watch.sample([1, 2, 3, 4], 0) == []
    assert watch.sample([1, 2, 3, 4], 0) == []  # it goes when the next version arrives
    watch.arrived(5, began=time.monotonic())
    assert len(watch.sample([1, 3, 4, 5], 0)) == 1


def test_a_version_whose_request_failed_stays_for_its_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def others_arrive() -> None:
        for step in range(2, 6):
            watch.arrived(step, began=time.monotonic())

    watch = DiskWatch(keep=3)
    with watch.using(1):
        watch.killed()
    others_arrive()
    assert watch.sample([1, 3, 4, 5], 0) == []
    monkeypatch.setattr(soak_check, "RETRY_SECONDS", 0.0)
    watch = DiskWatch(keep=3)
    with watch.using(1):
        watch.killed()
    others_arrive()
    assert len(watch.sample([1, 3, 4, 5], 0)) == 1  # and not for ever


@pytest.mark.integration
def test_a_short_soak_finds_nothing(run_python: Run) -> None:
    done = run_python(
        "tests/faults/soak_gateway.py",
        *("--seconds", 8, "--inflight", 8, "--upload-every", 1, "--kill-every", 5),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line[3:34].strip(): line[34:].strip() for line in done.stdout.splitlines()}
    requests = int(rows["requests"])
    assert requests > 0 and rows["answers"].startswith(f"{requests},")
    assert int(rows["kills of the server process"]) >= 1
    assert rows["kills of the server process"] == rows["restarts, by /metrics"]
    assert int(rows["uploads"].split()[0]) >= 2
    for name in ("latency p50, p99, longest", "versions on disk, at most", "memory of the server"):
        assert rows[name]
    assert "verdict: 0 violations" in done.stdout


@pytest.mark.parametrize(
    "flag", [("--cartridge-tokens", "20"), ("--keep", "2"), ("--inflight", "0")]
)
def test_a_soak_that_cannot_be_is_refused(
    flag: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.faults import soak_gateway

    with pytest.raises(SystemExit):
        soak_gateway.parse(list(flag))
    assert flag[0] in capsys.readouterr().err
