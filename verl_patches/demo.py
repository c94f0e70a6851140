"""The whole loop on a CPU or one GPU: `make demo`, `cartridge-distill demo`.

A real pretrained model (SmolLM2-135M-Instruct) distils a fictional patient record into a cartridge,
on-policy: an embedded server that speaks Tokasaurus' protocol writes the rollouts, veRL trains, a
new cartridge version reaches the server after every step. At the end a table says what the
cartridge is worth. Everything started here is stopped here, also on Ctrl-C and on failure.

It is `cartridge-distill distill` with that model and that record. With --device cuda server and
trainer share the one GPU, in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cartridge_distill.data.command import DEFAULT_DATA
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.processes import Supervisor, say
from cartridge_distill.util.standard_output import guard_output
from verl_patches.distill import add_options, start
from verl_patches.launching.command import python_path
from verl_patches.pipeline.stages import run_stage

PROGRAM = "cartridge-distill demo"
_STEPS, _TEST_EVERY = 18, 9


def parse(arguments: Sequence[str] | None = None, name: str = PROGRAM) -> argparse.Namespace:
    """The command's options: those of `distill`, and the demo's own names for two of them."""
    parser = Parser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--data", dest="documents", default=str(DEFAULT_DATA), help="records or documents")
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    add_options(parser)
    option("--prompts", dest="batch", type=int, metavar="N", help="the same as --batch")
    option("--response", dest="response_tokens", type=int, metavar="N", help="--response-tokens")
    option(
        "override",
        nargs="*",
        help="further Hydra overrides, e.g. actor_rollout_ref.actor.cartridge.topk=50",
    )
    parser.set_defaults(
        name="demo",
        out=Path("runs") / "demo",
        device="cpu",
        steps=_STEPS,
        test_every=_TEST_EVERY,
    )
    typed = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(typed)
    options.typed = ["demo", *typed]
    return options


def main(arguments: Sequence[str] | None = None, name: str = PROGRAM) -> int:
    """Runs the demo; returns its exit status."""
    options = parse(arguments, name)
    return start(options, options.typed, get_model)


def get_model(options: argparse.Namespace, supervisor: Supervisor) -> None:
    """The demo's own model, where none was named.

    Raises:
        ChildFailed: it cannot be had.
    """
    if options.model is not None:
        return
    say("== model: SmolLM2-135M-Instruct (the first time it is downloaded and converted: a minute)")
    with tempfile.TemporaryDirectory(prefix="cartridge-distill-") as folder:
        command = ["-m", "cartridge_distill.model.demo_model"]
        env = python_path(os.environ)
        printed = run_stage(command, "model", Path(folder), supervisor, env, options.verbose)
    options.model = printed.strip().splitlines()[-1]


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
