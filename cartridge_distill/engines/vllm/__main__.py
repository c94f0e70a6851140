"""Command line: ``python -m cartridge_distill.engines.vllm --help``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from cartridge_distill.engines.vllm.launch import MODULE, ServeCommand, served_length
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.versions import SUPPORTED, installed
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.standard_output import guard_output

EXAMPLES = f"""\
examples:
  # an environment for vLLM, beside the one of this project: a machine without a GPU, and with one
  python -m {MODULE} --make-environment ~/vllm-env
  python -m {MODULE} --make-environment ~/vllm-env --cuda

  # in it: is this vLLM known here, and is all there that is relied on?
  ~/vllm-env/bin/python -m {MODULE} --check

  # in it: serve two cartridges behind OpenAI's chat API, as the models "anna" and "bert"
  ~/vllm-env/bin/python -m {MODULE} --model MODEL --cartridge anna=DIR --cartridge bert=DIR

good to know:
  * The gateway (--backend vllm) and `cartridge-distill serve --engine vllm` start this.
  * What stands after -- goes to vLLM as it is: -- --max-num-seqs 64
  * exit codes: 0 stopped, or --check is fine; 1 --check found a difference; 2 refused to start.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Serve a model with cartridges on an unmodified vLLM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "--check",
        action="store_true",
        help="only compare the installed vLLM with what is relied on, a line for each difference",
    )
    one_of.add_argument(
        "--make-environment",
        metavar="DIR",
        type=Path,
        help="only make an environment with the tested vLLM; takes minutes and gigabytes",
    )
    parser.add_argument("--cuda", action="store_true", help="with it: for NVIDIA GPUs")
    parser.add_argument("--model", help="folder or hub id of the model")
    parser.add_argument(
        "--cartridge",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="file, folder or hub id; the name is the model to ask for. Repeatable",
    )
    parser.add_argument(
        "--cartridge-dir",
        type=Path,
        help="in place of it: a folder of cartridges by id, behind the Tokasaurus protocol",
    )
    parser.add_argument("--options", help="in place of both: all settings as JSON")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--max-model-len",
        type=int,
        help="cartridge + prompt + answer, as far as the model reaches (default: so far)",
    )
    parser.add_argument("--dtype", help="of the model (default: vLLM's choice)")
    parser.add_argument("more", nargs="*", metavar="-- ARGUMENT", help="arguments of vLLM")
    return parser.parse_args(arguments)


def _options(given: argparse.Namespace) -> Options:
    from cartridge_distill.engines.vllm.offline import place_of
    from cartridge_distill.util.errors import ConfigError

    if given.options is not None:
        return Options.model_validate_json(given.options)
    if given.cartridge_dir is not None:
        return Options(cartridge_dir=given.cartridge_dir.expanduser().resolve())
    sources = {}
    for text in given.cartridge:
        name, equals, source = text.partition("=")
        if not equals or not name or not source or name in sources:
            raise ConfigError(
                f"--cartridge {text!r} has no name, or one that was given; fix: say NAME=SOURCE, "
                "each name once"
            )
        sources[name] = place_of(source)
    return Options(cartridges=sources)


def check() -> int:
    """Print what differs from what is relied on; 0 if nothing does."""
    from cartridge_distill.engines.vllm.seams import differences, installed_sources

    found = installed()
    wrong = differences(found.version, installed_sources())
    for line in wrong:
        print(line)
    if wrong:
        print(f"{found.distribution} {found.version}: {len(wrong)} differences")
        return 1
    print(f"{found.distribution} {found.version}: all as expected. It ran {found.known.ran}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs until told to stop; returns the exit code."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    hide_secrets_in_logs()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        if given.make_environment is not None:
            from cartridge_distill.engines.vllm.environment import make

            print(make(given.make_environment, cuda=given.cuda))
            return 0
        if given.check:
            return check()
        if given.model is None:
            print(
                f"which model? --model; known here are vLLM {', '.join(SUPPORTED)}", file=sys.stderr
            )
            return 2
        found = installed()
        command = ServeCommand(
            given.model,
            _options(given),
            given.host,
            given.port,
            served_length(given.model, given.max_model_len),
            given.dtype,
            tuple(given.more),
        )
    except ValidationError as error:
        print(f"cannot start: {error.errors(include_input=False)[0]['msg']}", file=sys.stderr)
        return 2
    except CartridgeDistillError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    program = command.program(found.is_cpu)
    print(f"starting {found.distribution} {found.version}: {' '.join(program)}", flush=True)
    # The same process from here on: whoever started this one watches vLLM itself.
    os.execv(program[0], program)


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
