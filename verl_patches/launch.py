"""The one launcher of veRL: ``cartridge-distill train``, and all that starts a run in this project.

A run is a :class:`~verl_patches.launching.settings.Run`. :func:`main` looks whether it can end
well, writes ``recipe.json``, starts veRL, prints a line a step, names the causes of a failure and
says how to go on. A run ended well when the cartridge of its last step is there, not before. The
demo and the tests call :func:`train`, or take the command alone.

Not done here: writing the data, and starting the server.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cartridge_distill.cartridge.formats.file_names import FILES
from cartridge_distill.report.recipe import seed_of, write_recipe
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.next_command import next_command, program, say_next, shorter
from cartridge_distill.util.processes import ChildFailed, Supervisor, follow, say, tail
from cartridge_distill.util.secrecy import clean_arguments, clean_text
from cartridge_distill.util.shown_text import printable
from cartridge_distill.util.standard_output import guard_output
from cartridge_distill.util.tracker import tracked_step
from verl_patches.launching import checks
from verl_patches.launching.command import command, environment, model_path, overrides
from verl_patches.launching.configured import configuration
from verl_patches.launching.following import StepLines, causes, log_file
from verl_patches.launching.preloading import preload
from verl_patches.launching.result import Result, check_place, publish
from verl_patches.launching.resuming import check_saved
from verl_patches.launching.settings import CONFIG_FOLDER, CONFIG_NAME, Run, add_flags, make_run

if TYPE_CHECKING:  # --help needs no OmegaConf
    from verl_patches.config.run_length import RunLength

_DESCRIPTION = """\
Train a cartridge, on-policy: veRL trains, the server writes the rollouts, and gets the new version
after every step. Stopped or killed, the same command goes on from the last checkpoint.
"""
_EPILOG = f"""\
veRL's settings:
  whatever has no option here, as name=value after the options; these win, e.g.
    actor_rollout_ref.actor.cartridge.topk=50 trainer.nnodes=2
  what this project sets, with comments:  {CONFIG_FOLDER / CONFIG_NAME}.yaml
  all of veRL's, with their values in this run:  cartridge-distill train --show-config ...
  the cartridge's own are described in docs/configuration.md
  several nodes, and a Ray cluster that is there already: docs/training.md

--config FILE:
  YAML with the options' names, and a list `overrides`:
    model: meta-llama/Llama-3.2-3B-Instruct
    data: data/handbook
    server: http://gpu-box:10210
    tokens: 2048
    overrides: [actor_rollout_ref.actor.cartridge.topk=50]

credentials, in the environment alone: TOKASAURUS_API_KEY; MODAL_PROXY_KEY, MODAL_PROXY_SECRET

examples:
  cartridge-distill train --model MODEL --data data/mine --server http://gpu-box:10210
  cartridge-distill train --config mine.yaml --lr 0.01 --dry-run
  cartridge-distill train --device cpu --model SMALL --data data/mine --tokens 128 --batch 8 \\
      --response-tokens 6 --server http://127.0.0.1:10210

exit status: 0 trained; 1 or veRL's own: it failed; 2 refused before anything started
"""


QUIET_SECONDS = 90.0
"""After so many without a line a stage says that it is still there."""
# Of these the same command ends the same way.
_REFUSED = re.compile(
    r"\b(?:ConfigError|OtherSettings|CartridgeFormatError|DocumentError|AttentionCompileError"
    r"|ModuleNotFoundError|ImportError)\b"
)


class TrainingFailed(ChildFailed):
    """veRL ended with an error.

    Attributes:
        status: its exit status, as a shell counts it.
        again: may the same command do better? Not where a setting or a file was refused.
    """

    def __init__(self, message: str, status: int, again: bool = True) -> None:
        super().__init__(message)
        self.status, self.again = status, again


def parse(arguments: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """The run, and what concerns the launcher alone.

    Raises:
        ConfigError: a setting that cannot be.
    """
    parser = Parser(
        prog="cartridge-distill train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    option = parser.add_argument_group("this command").add_argument
    option("--config", type=Path, metavar="FILE", help="settings in YAML, see below; options win")
    option("--dry-run", action="store_true", help="check everything, print the command, train not")
    option("--show-config", action="store_true", help="print veRL's settings in YAML, train not")
    option("--only-check", action="store_true", help="look at veRL and server, and end")
    option("-v", "--verbose", action="store_true", help="print all that veRL says")
    parser.add_argument("override", nargs="*", metavar="name=value", help="settings of veRL")
    given = vars(parser.parse_intermixed_args(list(arguments)))
    names = ("config", "dry_run", "show_config", "only_check", "verbose")
    own = {name: given.pop(name) for name in names}
    return make_run(given, own["config"], given.pop("override")), argparse.Namespace(**own)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    hide_secrets_in_logs()
    try:
        run, own = parse(typed)
        if own.show_config:
            return show_config(run)
        if not (own.only_check or own.dry_run):
            checks.check_server_named(run)
            checks.check_first(run)
        checks.check(run)
        if own.only_check:
            return 0
        if own.dry_run:
            return dry_run(run)
        checks.check_here(run)
        check_saved(run)
        check_place(run.folder)
    except KeyboardInterrupt:
        return 130
    except (CartridgeDistillError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    try:
        with Supervisor() as supervisor:
            preload(run, supervisor)
            saved = train(run, supervisor, own.verbose, lambda: record(run, typed))
        result = None if saved is None else publish_best(run)
    except KeyboardInterrupt:
        print(f"\nstopped: {how_to_go_on(run)}")
        return 130
    except TrainingFailed as error:
        said = clean_text(str(error))  # the end of the log, too
        hint = how_to_go_on(run) if error.again else "fix what the cause names, then start it again"
        print(f"\n{said}\nerror: the run ended with status {error.status}; {hint}", file=sys.stderr)
        return error.status
    except CartridgeDistillError as error:
        print(f"\nerror: the run ended, but {error}", file=sys.stderr)
        return 1
    print_next(run, result)
    return 0


def dry_run(run: Run) -> int:
    """Prints what a shell needs to start the run; the command is the last line.

    What looks like a credential is not printed: put it back before you use the line.
    """
    missing = checks.missing_data(run)
    for path in missing:
        print(f"not there yet: {path}", file=sys.stderr)
    if not missing:
        checks.check_length(run)
    for name, value in environment(run).items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join(clean_arguments(command(run))))
    return 0


def show_config(run: Run) -> int:
    """Prints all of veRL's settings as the run has them; returns the exit status."""
    checks.check_verl()
    asked, settings = [*command(run), "--cfg", "job"], {**os.environ, **environment(run)}
    done = subprocess.run(asked, env=settings, check=False, stdout=subprocess.PIPE, text=True)
    print(clean_text(done.stdout), end="", flush=True)
    return done.returncode


def record(run: Run, arguments: Sequence[str]) -> None:
    """``recipe.json`` in the run's folder: what repeats it."""
    settings = overrides(run)
    typed = [*shlex.split(program()), "train", *arguments]
    model = model_path(run.model)
    data = None if run.data is None else str(run.data.expanduser().absolute())
    write_recipe(
        run.folder, typed, settings, seed_of(settings), name=run.label, model=model, data=data
    )


def train(
    run: Run,
    supervisor: Supervisor,
    verbose: bool = False,
    started: Callable[[], None] = lambda: None,
    beside: Callable[[], object] = lambda: None,
) -> Path | None:
    """Runs veRL to its end, with one line a step printed.

    Args:
        started: called when the trainer has taken the settings and the folder, just before the
            first step. A start that is refused has changed nothing that tells of the run.
        beside: called all the while; what it raises ends the following of veRL.

    Returns:
        The folder of the last saved cartridge; None where nothing was to be saved.

    Raises:
        ConfigError: the settings cannot be read.
        TrainingFailed: it ended with an error; the causes are named. Or it ended without one, and
            the cartridge of the last step is not there.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = log_file(run.folder)
    child = supervisor.start(command(run), log, environment(run))
    length = wanted(run)  # seconds on a slow machine, in which veRL imports
    steps = "one epoch" if length.last_step is None else f"{length.last_step} steps"
    say(
        f"== training: {run.tokens} tokens, {steps}; the first one comes in a minute or so (log: "
        f"{shorter(log)})"
    )
    status = follow(child, log, StepLines(verbose, started), "veRL", QUIET_SECONDS, beside)
    if status != 0:
        found = causes(log)
        said = [*(f"cause: {line}" for line in found), tail(log, 25 if verbose or not found else 4)]
        again = not any(_REFUSED.search(cause) for cause in found)
        raise TrainingFailed("\n".join(said), status if status > 0 else 128 - status, again)
    return last_cartridge(run, length) if length.saves else None


def wanted(run: Run) -> RunLength:
    """How long the run is to be."""
    from verl_patches.config.run_length import run_length  # --help needs no parquet

    return run_length(configuration(run))


def last_cartridge(run: Run, length: RunLength) -> Path:
    """The cartridge of the last step, after a look whether it is there.

    Raises:
        TrainingFailed: it is not.
    """
    step = saved_step(run)
    folder = checkpoints(run) / f"global_step_{step}" / "actor" / "cartridge"
    last = length.last_step
    if step == 0 or (last is not None and step < last):
        saved = f"the last that was saved is step {step}" if step else "no step was saved"
        raise TrainingFailed(
            f"veRL ended without an error, but the cartridge of step {last or 'N'}, the last one "
            f"asked for, is not in {checkpoints(run)}: {saved}",
            1,
        )
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise TrainingFailed(f"the cartridge of step {step} lacks {missing} in {folder}", 1)
    return folder


def publish_best(run: Run) -> Result:
    """Copies the best cartridge of a run that ended well to RUN/cartridge."""
    return publish(run.folder, checkpoints(run), saved_step(run))


def checkpoints(run: Run) -> Path:
    """Where they are saved: below the run's folder, unless an override says otherwise."""
    return Path(configuration(run).trainer.default_local_dir).expanduser().absolute()


def saved_step(run: Run) -> int:
    """The last step that was saved whole; 0 for none.

    Raises:
        CartridgeFormatError: what tells it is damaged, or lost.
    """
    return tracked_step(checkpoints(run)) or 0


def how_to_go_on(run: Run) -> str:
    """What the same command does after this run ended."""
    try:
        step = saved_step(run)
    except CartridgeDistillError as error:
        return str(error)
    if step == 0:
        return "no step was saved; the same command starts from the beginning"
    return (
        f"step {step} is saved; the same command goes on from there ({shorter(checkpoints(run))})"
    )


def print_next(run: Run, result: Result | None) -> None:
    """What was made, and the commands that use it."""
    folder = shorter(run.folder)
    print(f"\nmetrics:   {folder}/metrics.jsonl")
    none = "none saved, for trainer.save_freq is -1"
    print(f"cartridge: {none if result is None else result.line()}")
    commands = [] if result is None else [next_command(name, folder) for name in ("eval", "chat")]
    say_next(*commands, next_command("report", folder))


if __name__ == "__main__":
    guard_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignored it
    sys.exit(main())
