"""Command line: ``python -m cartridge_distill.engines.tokasaurus --help``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.standard_output import guard_output

EXAMPLES = """\
examples:
  # once: put the repairs into the installed Tokasaurus (`revert` takes them back)
  python -m verl_patches apply --package tokasaurus

  # is the installed Tokasaurus the one that the repairs were written for, and are they on?
  python -m cartridge_distill.engines.tokasaurus --check

  # serve a model; everything in key=value form goes to Tokasaurus as it is
  python -m cartridge_distill.engines.tokasaurus \\
      model=meta-llama/Llama-3.2-3B-Instruct port=10210 \\
      cartridge_dir=./cartridges kv_cache_num_tokens=131072

  # another Tokasaurus, or without the repairs: have something count blocks and restart it in time,
  # as the gateway does with --defence restart
  python -m cartridge_distill.engines.tokasaurus --unrepaired model=... port=10210

good to know:
  * Tokasaurus is not installed with this project: it wants torch 2.6, transformers 4.53 and CUDA.
    Give it an environment of its own, and this package on its PYTHONPATH.
  * Listens on 127.0.0.1, for Tokasaurus asks nobody for a password. --host 0.0.0.0 opens it to all.
  * An id is a version: its files must never change. One that was pushed out of the cache is read
    from its files again, so keep them until nobody asks for it any more.
  * exit codes: 0 stopped, or --check is fine; 1 --check: not known, or not repaired; or the port
    is taken; 2 refused to start, see the message; 70 the manager, a model worker or the download
    worker ended: start it again.
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what is for Tokasaurus."""
    parser = argparse.ArgumentParser(
        prog="python -m cartridge_distill.engines.tokasaurus",
        usage="%(prog)s [--check | --unrepaired] [--host HOST] [key=value ...]",
        description="Start a real Tokasaurus server that can be sent thousands of cartridges.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "--check",
        action="store_true",
        help="only compare the installed Tokasaurus with the known one",
    )
    one_of.add_argument(
        "--unrepaired",
        action="store_true",
        help="start Tokasaurus as it is installed; without the repairs it stops after some 64 "
        "versions of 2,048 tokens in a cache of 131,072",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    return parser.parse_known_args(arguments)


def check() -> int:
    """Print what the installed Tokasaurus is; 0 if it is the known one with the repairs."""
    from cartridge_distill.engines.tokasaurus import guard

    try:
        guard.require()
    except guard.UnknownTokasaurus as error:
        print(error)
        return 1
    print(f"{guard.package_folder()} is commit {guard.COMMIT[:7]} with the repairs")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs until told to stop; returns the exit code."""
    options, for_tokasaurus = parse(sys.argv[1:] if arguments is None else arguments)
    hide_secrets_in_logs()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from cartridge_distill.util.errors import CartridgeDistillError

    try:
        if options.check:
            return check()
        if not for_tokasaurus:
            print(
                "what to serve? For example model=meta-llama/Llama-3.2-3B-Instruct; --help shows "
                "more",
                file=sys.stderr,
            )
            return 2
        from cartridge_distill.engines.tokasaurus.launch import serve

        serve(for_tokasaurus, options.host, repaired=not options.unrepaired)
    except CartridgeDistillError as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # SIGTERM, or the HTTP server could not start
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        pass
    return 0


def run() -> NoReturn:
    """:func:`main`, then the end of the process at once: otherwise it would wait until someone has
    taken what is left in its queues, and who would have done so is gone."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    guard_output()
    run()
