"""Talk to a model that has a cartridge instead of the document.

    cartridge-distill chat RUN                      # a run's folder, or a cartridge
    cartridge-distill chat RUN --compare            # no document, cartridge, full document
    cartridge-distill chat RUN --prompt "Where ...?"

The model is the cartridge's own, the document the run's, unless they are named. Tokens are shown as
they come. Without a cartridge the bare model answers.
"""

# Only the command line is here: --help, and what is wrong with a path, need no model's imports.

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cartridge_distill.cli.about import Asked, check, look
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError
from cartridge_distill.util.openmp import spinning
from cartridge_distill.util.shown_text import printable
from cartridge_distill.util.standard_output import guard_output


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = Parser(
        prog="cartridge-distill chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = made.add_argument
    option("source", nargs="?", metavar="RUN|CARTRIDGE", help="folder of a run, or a cartridge")
    option("--cartridge", help="the same: directory, .pt file or repo id")
    option("--model", help="folder or hub id of the model (the cartridge's own)")
    option("--document", type=Path, help="the full document, to compare with (the run's)")
    option("--compare", action="store_true", help="answers without, with cartridge, with document")
    option("--prompt", help="ask this and end; without it, a conversation (Ctrl-D ends it)")
    option(
        "--start", help="with --prompt: the beginning of the answer, for the model to go on from"
    )
    option(
        "--turns",
        type=int,
        default=0,
        help="earlier questions that a question is asked behind (%(default)s: each alone, as a "
        "cartridge is trained; small models repeat what stands before)",
    )
    option("--max-new-tokens", type=int, default=128, help="longest answer (%(default)s)")
    option("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    option("--dtype", default="auto", help="dtype of the model (%(default)s: as saved)")
    option("--device", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    option("--threads", type=int, help="CPU threads (torch's choice)")
    option(
        "--allow-other-model",
        action="store_true",
        help="the cartridge was trained with other weights of the same shape, and that is meant",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        converse(options)
    except (CartridgeDistillError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


def converse(options: argparse.Namespace) -> None:
    """What the command does, with its parsed options.

    Raises:
        ConfigError: options that make no sense together, or a model that is not there.
        CartridgeFormatError: the cartridge cannot be read, or is of another model.
    """
    asked = _asked(options)
    source, model_name = check(asked)
    os.environ.update(spinning(os.environ))  # before torch is imported
    import torch

    from cartridge_distill.util.devices import check_device, known_dtype

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, dtype = check_device(options.device), known_dtype(options.dtype)
    about = look(asked, source, model_name)
    from cartridge_distill.cli.opened import CARTRIDGE, open_views
    from cartridge_distill.cli.terminal import Terminal

    for warning in about.warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    opened = open_views(about, device, dtype)
    if opened.said:
        print(printable(f"[{'; '.join(opened.said)}]"), file=sys.stderr)
    compare = options.compare
    if compare and len(opened.views) == 1:
        raise ConfigError(
            "--compare: there is nothing to compare with; fix: name a cartridge or a --document"
        )
    first = CARTRIDGE if about.stored is not None else opened.shown[-1].name
    conversation = opened.conversation(options.turns, options.max_new_tokens, options.temperature)
    terminal = Terminal(conversation, opened.shown, first, compare)
    if options.prompt is not None:
        terminal.ask(options.prompt, options.start)
        return
    terminal.greet(about.questions)
    terminal.run()


def _asked(options: argparse.Namespace) -> Asked:
    if options.source is not None and options.cartridge is not None:
        raise ConfigError(
            f"{options.source} and --cartridge {options.cartridge} are two cartridges; fix: name "
            "one"
        )
    if options.start is not None and options.prompt is None:
        raise ConfigError("--start begins the answer to --prompt; fix: give both, or neither")
    if options.temperature < 0 or options.max_new_tokens < 1 or options.turns < 0:
        raise ConfigError(
            "a number is too small; fix: --temperature and --turns of 0 or more, --max-new-tokens "
            "of 1 or more"
        )
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads {options.threads} is too few; fix: give 1 or more")
    return Asked(
        options.source or options.cartridge,
        options.model,
        options.document,
        options.allow_other_model,
    )


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
