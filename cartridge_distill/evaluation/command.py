"""What is a cartridge worth? Scores under five conditions, with intervals.

The same model answers with no document, with the best chunk that retrieval finds, with the
untrained and the trained cartridge, and with the full document. Scores: KL to the full-document
model per token, log-loss of the right answer, accuracy of multiple choice by option likelihood,
and, with --generate, by generated answer as LongHealth is asked.

With --measures, divergence to the full-document model on text that each condition writes itself,
and from the bare model on unrelated prompts.

Writes into --out: evaluation.json (the table, and sample answers), evaluation.parquet (every
question under every condition). Stopped or killed, the same command goes on where it was.
docs/evaluation.md has the formulas and the files.
"""

# Only the command line is here; the work is in `folder`, whose imports take seconds, and --help
# and a wrong option need none of them.

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cartridge_distill.cartridge.run_folder import (
    METRICS_FILE,
    data_of,
    is_run,
    model_of,
    resolve_cartridge,
)
from cartridge_distill.evaluation.names import (
    ANSWER_TOKENS,
    CLOSEST,
    CONDITIONS,
    MAX_NEW_TOKENS,
    MEASURE_TOKENS,
    MEASURES,
    NAMED,
    SHADE_TOKENS,
    TEMPERATURE,
)
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.files import check_writable
from cartridge_distill.util.next_command import next_command, say_next, shorter
from cartridge_distill.util.shown_text import printable

DTYPES = ("float32", "bfloat16", "float16")


def parser(program: str) -> argparse.ArgumentParser:
    """The command's options."""
    made = Parser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"examples:\n  {program} runs/demo\n"
            f"  {program} --model MODEL --data data/mine --cartridge DIR --out evaluation\n"
        ),
    )
    option = made.add_argument
    option(
        "run",
        nargs="?",
        metavar="RUN",
        help="folder of a run: its cartridge, model and data, and RUN/evaluation for the results",
    )
    option("--model", help="folder or hub id of the base model (the run's, or the cartridge's own)")
    option("--data", type=Path, help="folder that `cartridge-distill prepare` wrote (the run's)")
    option("--cartridge", help="trained cartridge: directory, .pt file or repo id (the run's)")
    option(
        "--allow-other-model",
        action="store_true",
        help="the cartridge was trained with other weights of the same shape, and that is meant",
    )
    option("--untrained", help="cartridge it began as (default: the document's first tokens)")
    option(
        "--out",
        type=Path,
        help="folder for the results; those of an earlier evaluation are replaced (RUN/evaluation, "
        "or evaluation)",
    )
    option(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        default=list(CONDITIONS),
        metavar="NAME",
        help=f"some of: {', '.join(repr(name) for name in CONDITIONS)} (default: all)",
    )
    option("--limit", type=int, help="the first so many questions, and prompts, alone")
    option("--prompts", action="store_true", help="KL on the held-out prompts of val.parquet, too")
    option("--answer-tokens", type=int, default=ANSWER_TOKENS, help="for the KL (%(default)s)")
    option("--samples", type=int, default=5, help="questions with sample answers (%(default)s)")
    option(
        "--shade-tokens",
        type=int,
        default=SHADE_TOKENS,
        help="of each document (the first four), whose divergence the report shows token by token; "
        "0 for none (%(default)s)",
    )
    option("--seed", type=int, default=0, help="of sampling and bootstrap (%(default)s)")
    option("--dtype", default="float32", choices=DTYPES, help="of the model (%(default)s)")
    option("--batch", type=int, default=8, help="questions at once; memory (%(default)s)")
    option(
        "--record",
        action="store_true",
        help="also write the table into the cartridge's own JSON: info and the model card show it",
    )
    measures = made.add_argument_group(
        "further measures: on text that each condition writes itself, and on unrelated prompts"
    )
    option = measures.add_argument
    option(
        "--measures",
        nargs="+",
        choices=MEASURES,
        default=[],
        metavar="GROUP",
        help=f"some of: {', '.join(MEASURES)}. own_text has every condition answer every question "
        "up to four times, which takes a while; the work is said before it begins (default: none)",
    )
    option(
        "--measure-tokens",
        type=int,
        default=MEASURE_TOKENS,
        help="of each text of own_text, at most (%(default)s)",
    )
    option(
        "--measure-temperature",
        type=float,
        help="of the sampled texts (default: that of the training's rollouts, as the cartridge "
        "says)",
    )
    generated = made.add_argument_group("generated answers, as LongHealth is asked")
    option = generated.add_argument
    option("--generate", action="store_true", help="generate answers, too; takes a while")
    option("--temperature", type=float, default=TEMPERATURE, help="(%(default)s)")
    option("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="(%(default)s)")
    option(
        "--read-answers",
        choices=(NAMED, CLOSEST),
        default=NAMED,
        help="named: the option that the answer names, none where it names none or several; "
        "closest: always the closest text, as the paper does on LongHealth (%(default)s)",
    )
    option("--server", metavar="URL", help="a running server generates (default: this process)")
    option("--served", metavar="ID", help="id of the trained cartridge on that server")
    return made


def main(arguments: list[str] | None = None, program: str = "cartridge-distill eval") -> int:
    """Runs the command; returns its exit status."""
    made = parser(program)
    options = made.parse_args(arguments)
    for name, least in (
        ("limit", 1),
        ("answer_tokens", 1),
        ("batch", 1),
        ("max_new_tokens", 1),
        ("measure_tokens", 1),
        ("shade_tokens", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            made.error(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if (options.served or options.server) and not options.generate:
        made.error("--server and --served are for generated answers: add --generate")
    if options.measure_tokens > MEASURE_TOKENS:
        made.error(f"--measure-tokens {options.measure_tokens}: give {MEASURE_TOKENS} or fewer")
    if options.measure_temperature is not None and not options.measure_temperature > 0:
        made.error(f"--measure-temperature {options.measure_temperature}: give more than 0")
    try:
        complete(options)
        from cartridge_distill.evaluation.folder import evaluate_folder

        table = evaluate_folder(options)
    except (CartridgeDistillError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(printable(table))
    run = options.out.parent
    if options.out.name == "evaluation" and (run / METRICS_FILE).is_file():
        say_next(next_command("report", shorter(run.absolute())))
    else:
        used = ("--model", options.model, "--cartridge", options.cartridge)
        say_next(next_command("chat", *used))
    return 0


def complete(options: argparse.Namespace) -> None:
    """What was not typed, from the run or the cartridge.

    Raises:
        ConfigError: it is said nowhere.
        CartridgeFormatError: the run has no cartridge yet.
    """
    if options.run is not None and options.cartridge is None and not is_run(options.run):
        options.cartridge, options.run = options.run, None  # a cartridge in a run's place
    run = options.run or (options.cartridge if is_run(options.cartridge or "") else None)
    options.cartridge = options.cartridge or run
    if options.cartridge is None:
        raise ConfigError("nothing to evaluate; fix: name a run's folder, or --cartridge DIR")
    options.model = options.model or model_of(run or options.cartridge)
    if options.data is None and run is not None:
        said = data_of(run)
        options.data = None if said is None else Path(said)
    if options.out is None:
        options.out = Path("evaluation") if run is None else Path(run) / "evaluation"
        part = options.limit is not None or len(options.conditions) < len(CONDITIONS)
        if run is not None and part and (options.out / "evaluation.json").is_file():
            raise ConfigError(
                f"{options.out} holds the run's evaluation, and a part of one (--limit, "
                "--conditions) would replace it; fix: give the part an --out of its own"
            )
    options.cartridge = resolve_cartridge(options.cartridge)
    missing = [name for name in ("model", "data") if getattr(options, name) is None]
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        said = options.run or options.cartridge
        its = f"does not say its {' and '.join(missing)}"
        what = its if Path(said).expanduser().exists() else "is no folder here"
        raise ConfigError(f"{said} {what}; fix: give {names}, or name the folder of a run")
    if not options.data.is_dir():
        raise ConfigError(
            f"--data {options.data}: there is no such folder; fix: name one that "
            "`cartridge-distill prepare` wrote"
        )
    check_writable(options.out, "--out")
