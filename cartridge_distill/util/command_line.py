"""One form for what a person typed wrong: ``error: what; fix: how``, with the nearest name.

argparse would take the beginning of an option for the option, and answers a mistyped one with the
whole usage. Here an option is taken as it is written or not at all.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


def nearest(name: str, known: Iterable[str], most: int = 2) -> list[str]:
    """Names that were probably meant, best first; none where nothing is near."""
    return difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The fix for a name that is not known."""
    found = nearest(name, known)
    return f"fix: did you mean {' or '.join(found)}?" if found else f"fix: {otherwise}"


class Parser(argparse.ArgumentParser):
    """argparse's, which names the nearest option of one that it does not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse, and an unknown argument is answered with the nearest one."""
        found, strange = self.parse_known_args(args, namespace)
        self._refuse(strange)
        return found

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse: options and positional arguments in any order."""
        found, strange = self.parse_known_intermixed_args(args, namespace)
        self._refuse(strange)
        return found

    def _refuse(self, strange: Sequence[str]) -> None:
        if not strange:
            return
        given = strange[0].partition("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        fix = did_you_mean(given, known, f"`{self.prog} --help` lists what there is")
        what = "no such option" if given.startswith("-") else "one argument too many"
        self.error(f"{given}: {what}; {fix}")

    def error(self, message: str) -> NoReturn:
        """One line and exit status 2."""
        if "fix: " not in message:
            message = f"{message}; fix: see `{self.prog} --help`"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
