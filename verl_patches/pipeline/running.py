"""A whole distillation, stage by stage; what is done is not done again.

Everything that can be known beforehand is looked at before the run's folder is touched: the data
are written into a folder of their own, the run is checked with them there, and only then they are
moved to their place.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER
from cartridge_distill.util.next_command import next_command, say_next, shorter
from cartridge_distill.util.processes import Supervisor, say
from verl_patches import launch
from verl_patches.launching.following import duration
from verl_patches.pipeline import checks, costs, stages
from verl_patches.pipeline.asking import Question
from verl_patches.pipeline.more_steps import more_steps
from verl_patches.pipeline.settings import Distillation, Prepared, as_run
from verl_patches.pipeline.state import DATA, EVALUATION, REPORT, TRAINING, State, begin


def run(
    settings: Distillation,
    state: State,
    supervisor: Supervisor,
    record: Callable[[], None],
    verbose: bool = False,
) -> None:
    """All stages that are not done yet.

    Args:
        state: of the run's folder, as :func:`~verl_patches.pipeline.state.check_folder` found it.
        record: writes the recipe; called when the trainer has taken the settings.

    Raises:
        CartridgeDistillError: refused; nothing was written where the run is new.
        ChildFailed: a stage ended with an error.
    """
    start = time.monotonic()
    checks.check_first(settings)
    data = _data(settings, state, supervisor, verbose)
    if TRAINING not in state.done:
        _training(settings, state, data, supervisor, record, verbose)
        supervisor.stop()  # the evaluation gets the whole machine
    say(stages.proof(settings))
    if EVALUATION not in state.done:
        say("== evaluation, on what was not trained on ([low, high]: 95 % intervals)")
        stages.evaluate(settings, supervisor, verbose)
        state.finish(EVALUATION)
    for line in stages.table(settings.out):
        say(line)
    if REPORT not in state.done:
        stages.report(settings.out)
        state.finish(REPORT)
    print_end(settings, state, f"{duration(time.monotonic() - start)} in all")


def _data(settings: Distillation, state: State, supervisor: Supervisor, verbose: bool) -> Prepared:
    """The run's data, those that are there, or new ones; the model is looked at meanwhile."""
    env = stages.environment_of(settings)
    model = Question(supervisor, env, checks.look_at_model, settings)
    if DATA in state.done:
        model.answer()
        found = Prepared(**state.facts["data"])
        Question(supervisor, env, checks.check_prepared, settings, settings.data, found).answer()
        say(f"== data: {shorter(settings.data)} is there")
        return found
    with tempfile.TemporaryDirectory(prefix="cartridge-distill-") as scratch:
        with stages.start_data(settings, Path(scratch), supervisor) as writing:
            model.answer()
            found = stages.finish_data(settings, writing, Path(scratch), supervisor, verbose)
        begin(state)
        shutil.move(Path(scratch) / "data", settings.data)
        shutil.move(Path(scratch) / "data.log", settings.out / "data.log")
    state.finish(DATA, data=asdict(found))
    return found


def _training(
    settings: Distillation,
    state: State,
    data: Prepared,
    supervisor: Supervisor,
    record: Callable[[], None],
    verbose: bool,
) -> None:
    up = None
    if settings.server is None:
        url, up = stages.start_server(settings, supervisor)
        if settings.device != "cpu" or settings.engine != "embedded":
            up.wait()  # it takes its part of a GPU's memory, or all cores, first
        say(f"== server: {url} ({settings.device}, {settings.dtype})")
    else:
        url = settings.server
        say(f"== server: {url}")
    wanted = as_run(settings, url, data)
    choose_last = settings.choose == "last"
    result = stages.train(wanted, supervisor, verbose, record, choose_last, up)
    state.finish(TRAINING, cartridge=result.line())


def dry_run(settings: Distillation, supervisor: Supervisor, verbose: bool = False) -> bool:
    """Checks all that a start would, measures, and prints the cost; nothing is written.

    Returns:
        Whether the memory suffices.

    Raises:
        CartridgeDistillError, ChildFailed: as a start would be refused.
    """
    checks.check_first(settings)
    model = Question(supervisor, stages.environment_of(settings), checks.look_at_model, settings)
    with tempfile.TemporaryDirectory(prefix="cartridge-distill-") as scratch:
        with stages.start_data(settings, Path(scratch), supervisor) as writing:
            disk = model.answer()
            found = stages.finish_data(settings, writing, Path(scratch), supervisor, verbose)
        say("== cost, measured on a part of a step")
        cost = costs.measure(settings, Path(scratch), found, disk, supervisor)
    for line in cost.lines():
        say(f"   {line}")
    say("nothing was written" + ("" if cost.fits else "; the memory that is free will not do"))
    return cost.fits


def print_finished(settings: Distillation, state: State) -> None:
    """A run that was finished before: what it came to, and what may be done with it."""
    say(f"{shorter(settings.out)} is finished: nothing to do (--overwrite begins it anew)")
    for line in stages.table(settings.out):
        say(line)
    print_end(settings, state)


def print_end(settings: Distillation, state: State, took: str | None = None) -> None:
    """Where everything is, and the next commands, ready to paste."""
    out = shorter(settings.out)
    say(f"cartridge: {state.facts.get('cartridge', shorter(settings.out / CARTRIDGE_FOLDER))}")
    say(f"report:    {out}/report.html (logs: {out}/*.log)" + (f"; {took}" if took else ""))
    say_next(
        next_command("chat", out),
        next_command("serve", out),
        next_command(*more_steps(settings)),
        next_command("push", out, "OWNER/NAME"),
    )


def how_to_go_on(settings: Distillation | None, state: State | None) -> str:
    """What the same command does after this one was stopped; None: it had not come so far."""
    if settings is None or state is None or state.is_new:
        return "nothing was written; the same command starts from the beginning"
    if DATA in state.done and TRAINING not in state.done:
        wanted = as_run(settings, data=Prepared(**state.facts["data"]))
        return launch.how_to_go_on(wanted)
    done = f"{', '.join(state.done)} done" if state.done else "nothing is done yet"
    return f"{done}; the same command goes on from there"
