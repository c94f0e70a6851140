"""Numbers on a script's command line that make no sense are refused, each by its name."""

from __future__ import annotations

import argparse


def require_at_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, **least: float
) -> None:
    """Ends the script with a message, and status 2, if an option is below its least value.

    Args:
        least: the values by the options' names, with underscores.
    """
    for name, value in least.items():
        if getattr(options, name) < value:
            parser.error(f"{_typed(options, name)}: must be at least {value}")


def require_multiple(
    parser: argparse.ArgumentParser, options: argparse.Namespace, **of: int
) -> None:
    """The same if an option is not a multiple, above 0, of a number."""
    for name, value in of.items():
        if getattr(options, name) < value or getattr(options, name) % value:
            parser.error(f"{_typed(options, name)}: must be a multiple of {value}")


def _typed(options: argparse.Namespace, name: str) -> str:
    """The option as it is typed."""
    return f"--{name.replace('_', '-')} {getattr(options, name)}"
