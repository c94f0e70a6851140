"""``cartridge-distill distill``: from documents to a cartridge, its evaluation and its report.

One folder is one run. The same command goes on where it stopped; other settings in the same folder
are refused by name. The demo is this with a model and a document of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.beginnings import BEGINNINGS
from cartridge_distill.report.recipe import write_recipe
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.next_command import program
from cartridge_distill.util.processes import ChildFailed, Supervisor, say
from cartridge_distill.util.processor import DtypeChoice, choose_dtype
from cartridge_distill.util.secrecy import clean_text
from cartridge_distill.util.shown_text import printable
from cartridge_distill.util.standard_output import guard_output
from verl_patches import launch
from verl_patches.launching.command import model_path, overrides
from verl_patches.launching.preloading import preload
from verl_patches.packages import PatchError
from verl_patches.pipeline import checks, running
from verl_patches.pipeline.more_steps import name_of
from verl_patches.pipeline.settings import Distillation, Prepared, as_run
from verl_patches.pipeline.state import State, check_folder

_EPILOG = """\
The defaults are the demo's: a model of 135M parameters on a CPU. For a large model on a GPU, say
--tokens 2048 --response-tokens 256 --prompt-tokens 512 --batch 32 --lr 0.02 or alike.

Other settings of veRL's stand behind the options as name=value, as for `train`. A server of its own
on a GPU machine, other data, several GPUs: prepare, serve, train and eval, see docs/training.md.

examples:
  cartridge-distill distill handbook/ --model MODEL
  cartridge-distill distill handbook/ --model MODEL --dry-run     # is all there, what will it cost?

exit status: 0 done; 1 a stage failed; 2 refused before anything was written; 130 Ctrl-C
"""
_DEFAULTS = {field.name: field.default for field in fields(Distillation)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that `distill` and the demo share."""
    option = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}

    def usual(name: str) -> Any:
        return _DEFAULTS[name]

    option("--out", type=Path, metavar="RUN", help="folder of the run (runs/<name>)")
    option("--tokens", **number, default=usual("tokens"), help="cartridge tokens (%(default)s)")
    option(
        "--init",
        choices=BEGINNINGS,
        default=usual("init"),
        help="the part of a document that it begins as: its first tokens, spans of 16 evenly over "
        "it, or for each head the tokens that it needs to repeat the document (%(default)s)",
    )
    option("--steps", **number, default=usual("steps"), help="optimizer steps (%(default)s)")
    option("--batch", **number, default=usual("batch"), help="rollouts a step (%(default)s)")
    option(
        "--response-tokens",
        **number,
        default=usual("response_tokens"),
        help="longest rollout (%(default)s)",
    )
    option(
        "--prompt-tokens",
        **number,
        default=usual("prompt_tokens"),
        help="longest prompt (%(default)s)",
    )
    option(
        "--lr",
        type=float,
        metavar="X",
        default=usual("lr"),
        help="learning rate of the first step; it falls to a tenth along a cosine (%(default)s)",
    )
    option(
        "--recipe",
        dest="prompt_recipe",
        choices=("started", "open", "mixed"),
        default=usual("prompt_recipe"),
        help="where the prompts come from, see `prepare --help` (%(default)s)",
    )
    option(
        "--questions",
        metavar="FILE",
        help="that the cartridge is judged by: .csv, .json or .jsonl, see `prepare --help`",
    )
    option(
        "--rebuild",
        metavar="RUN",
        help="the documents have changed since RUN: go on from its cartridge, with half of the "
        "prompts about the sections that changed",
    )
    option(
        "--test-every",
        **number,
        help="steps between validations on the documents' questions, 0 for none (four in a run, "
        "where there are questions)",
    )
    option("--save-every", **number, help="steps between checkpoints (a dozen in a run)")
    option(
        "--choose",
        choices=("best", "last"),
        default=usual("choose"),
        help="the run's cartridge: of the lowest validation KL, or of the last step (%(default)s)",
    )
    option("--seed", type=int, metavar="N", default=0, help="of data, sampling and order (0)")
    option("--name", metavar="NAME", help="of the recipe, in a report of several")
    option("--device", choices=("cpu", "cuda"), help="(cuda where there is a GPU)")
    option(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the model in server and trainer (auto: bfloat16 on cuda; on a CPU float32, or "
        "what the processor was measured with)",
    )
    option(
        "--threads",
        **number,
        default=os.cpu_count() or 2,
        help="CPU threads of each process (%(default)s)",
    )
    option("--server", metavar="URL", help="that writes the rollouts (default: one of its own)")
    option(
        "--wait", type=float, metavar="S", default=60.0, help="seconds to wait for it (%(default)s)"
    )
    option(
        "--engine",
        choices=("embedded", "vllm"),
        default=usual("engine"),
        help="of a server of its own: what writes the rollouts (%(default)s)",
    )
    option(
        "--engine-python",
        metavar="PATH",
        help="with --engine vllm: the Python of its environment (docs/vllm.md)",
    )
    option("--log-to", metavar="NAMES", help="log to wandb, tensorboard, or wandb,tensorboard too")
    option("--dry-run", action="store_true", help="check everything, say the cost, write nothing")
    option("--overwrite", action="store_true", help="begin anew in the folder of an earlier run")
    option("-v", "--verbose", action="store_true", help="print all that the stages say")


def parse(arguments: Sequence[str], prog: str = "cartridge-distill distill") -> argparse.Namespace:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "documents",
        metavar="DOCUMENTS",
        help="a file or a folder (.txt, .md, .html, .pdf), or records (.json)",
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    add_options(parser)
    parser.add_argument("override", nargs="*", metavar="name=value", help="settings of veRL")
    options = parser.parse_intermixed_args(list(arguments))
    options.name = options.name or name_of(options.documents)
    return options


def settings_of(options: argparse.Namespace) -> Distillation:
    """The options as a distillation; where a GPU matters, this machine is looked at.

    Raises:
        ConfigError: a value that cannot be.
    """
    checks.check_documents(options.documents)
    if options.questions is not None:
        checks.check_questions(options.questions)
    names = {field.name for field in fields(Distillation)} - {"overrides", "out"}
    given = {name: getattr(options, name) for name in names}
    given["device"] = options.device or ("cuda" if _sees_a_gpu() else "cpu")
    given["dtype"] = _dtype(options, given["device"])
    out = options.out or Path("runs") / options.name
    return Distillation(**given, out=out.expanduser().absolute(), overrides=tuple(options.override))


def _dtype(options: argparse.Namespace, device: str) -> str:
    """Of the model; on a CPU the processor is looked at. What came of it is said where it is not
    what it always was, and to whom asks for more words."""
    asked: str = options.dtype
    if device == "cuda":
        return "bfloat16" if asked == "auto" else asked
    choice = choose_dtype(asked)
    if asked == "auto" and options.server is not None:
        choice = DtypeChoice("float32", "as a server on a CPU has it unless it is told otherwise")
    if choice.dtype != "float32" or options.dry_run or options.verbose:
        say(f"== dtype: {choice.dtype} ({choice.why})")
    return choice.dtype


def _sees_a_gpu() -> bool:
    """Without a driver there is none, and torch need not be imported to know it."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        return False
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    return start(parse(typed), ["distill", *typed])


def start(
    options: argparse.Namespace,
    typed: Sequence[str],
    before: Callable[[argparse.Namespace, Supervisor], None] = lambda options, supervisor: None,
) -> int:
    """Runs, goes on, or looks whether it could; returns the exit status.

    Args:
        options: of :func:`add_options`, with documents, model and override.
        typed: what a person typed behind the program's name, for the recipe.
        before: what the options wait for, run under the supervisor.
    """
    hide_secrets_in_logs()
    state: State | None = None
    settings: Distillation | None = None
    try:
        with Supervisor() as supervisor:
            before(options, supervisor)
            settings = settings_of(options)
            state = check_folder(settings, options.overwrite)
            if options.dry_run:
                return 0 if running.dry_run(settings, supervisor, options.verbose) else 1
            if state.finished:
                running.print_finished(settings, state)
                return 0
            preload(as_run(settings), supervisor)
            wanted, found = settings, state

            def record() -> None:
                _record(wanted, found, typed)

            running.run(settings, state, supervisor, record, options.verbose)
    except KeyboardInterrupt:
        hint = running.how_to_go_on(settings, state)
        print(f"\nstopped: {hint}: {program()} {shlex.join(typed)}", flush=True)
        return 130
    except launch.TrainingFailed as error:
        hint = "fix what the cause names, then start it again"
        if error.again and settings and state:
            hint = running.how_to_go_on(settings, state)
        print(f"\n{clean_text(str(error))}\nerror: the training failed; {hint}", file=sys.stderr)
        return 1
    except ChildFailed as error:
        print(printable(clean_text(f"error: {error}")), file=sys.stderr)
        return 1
    except (CartridgeDistillError, PatchError, OSError) as error:
        print(printable(clean_text(f"error: {error}")), file=sys.stderr)
        return 2 if state is None or state.is_new else 1
    finally:
        if state is not None:
            state.release()
    return 0


def _record(settings: Distillation, state: State, typed: Sequence[str]) -> None:
    """What repeats this run, for its report. The server's address is another one each time."""
    found = Prepared(**state.facts["data"])
    settings_said = overrides(as_run(settings, settings.server or "http://127.0.0.1", found))
    write_recipe(
        settings.out,
        [*shlex.split(program()), *typed],
        settings_said,
        settings.seed,
        name=settings.name,
        model=model_path(settings.model),
        data=str(settings.data),
    )


if __name__ == "__main__":
    guard_output()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignored it
    sys.exit(main())
