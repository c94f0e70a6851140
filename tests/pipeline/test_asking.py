"""A question to a function, in this process or in one that is forked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.forks import Preloaded
from cartridge_distill.util.processes import Awaited, ChildFailed, Supervisor, follow
from verl_patches.pipeline.asking import Question


def doubled(number: int) -> tuple[int, int]:
    print("it was asked")
    return 2 * number, os.getpid()


def refused() -> None:
    raise ConfigError("--tokens 3: no; fix: give 4")


def killed() -> None:
    print("so far", flush=True)
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("forks", [False, True])
def test_the_answer_and_the_error_are_the_functions_own(
    forks: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with Supervisor() as supervisor:
        if forks:
            supervisor.preload(Preloaded(("json",), ("ray",)))
        questions = [Question(supervisor, {}, doubled, number) for number in (1, 2)]
        answers = [question.answer() for question in questions]
        assert [answer for answer, _ in answers] == [2, 4]
        assert all((process == os.getpid()) is not forks for _, process in answers)
        assert capfd.readouterr().out.count("it was asked") == 2
        with pytest.raises(ConfigError, match="--tokens 3: no; fix: give 4"):
            Question(supervisor, {}, refused).answer()


def test_a_process_that_dies_is_no_answer() -> None:
    with Supervisor() as supervisor:
        supervisor.preload(Preloaded(("json",), ("ray",)))
        with pytest.raises(ChildFailed, match="(?s)ended without an answer.*so far"):
            Question(supervisor, {}, killed).answer()


def test_a_server_that_does_not_come_up_ends_what_waits_for_it(tmp_path: Path) -> None:
    """As `distill`'s own server does, beside which veRL starts."""
    log = tmp_path / "server"
    with Supervisor() as supervisor:
        server = supervisor.start(["sh", "-c", "echo no memory; exit 3"], log)
        training = supervisor.start(["sleep", "60"], tmp_path / "training")
        up = Awaited(lambda: False, server, log, "server", 60)
        with pytest.raises(ChildFailed, match="(?s)server ended with status 3.*no memory"):
            follow(training, tmp_path / "training", lambda line: None, "veRL", 60, up.look)
        late = Awaited(lambda: False, training, log, "server", 0.0)
        with pytest.raises(ChildFailed, match="server was not ready after 0 s"):
            late.wait()


def test_once_it_is_ready_nobody_looks_at_it_again(tmp_path: Path) -> None:
    looks = []
    with Supervisor() as supervisor:
        server = supervisor.start(["true"], tmp_path / "log")
        server.wait()
        up = Awaited(lambda: not looks.append(1), server, tmp_path / "log", "server", 60)
        up.wait()
        assert up.look() and looks == [1]  # its end is the training's to notice
