"""Refuses a Tokasaurus that the repairs were not written for.

A replacement is right only next to the code it was written for: what a newer function of the same
name does would be undone silently. So the source of each function that is replaced, and of each
that the replacements rely on, is hashed (SHA-256 of what ``inspect.getsource`` gives) and compared
with the pinned commit's. One difference, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cartridge_distill.engines.tokasaurus.known import COMMIT, KNOWN, Known
from cartridge_distill.util.errors import CartridgeDistillError

INSTALL = f"pip install git+https://github.com/ScalingIntelligence/tokasaurus@{COMMIT}"
OTHER_DEFENCE = (
    "Install the known commit:\n"
    f"  {INSTALL}\n"
    "or serve without repairs and have the gateway restart the server before its cache runs dry:\n"
    "  python -m cartridge_distill.gateway --defence restart ..."
)


class TokasaurusMissing(CartridgeDistillError, ImportError):
    """Tokasaurus, or something that it needs, cannot be imported."""


class UnknownTokasaurus(CartridgeDistillError, RuntimeError):
    """The installed Tokasaurus is not the one that the repairs were written for."""


@dataclass(frozen=True)
class Finding:
    """What was found in the place of a known function; ``sha256`` is empty if it is missing."""

    known: Known
    state: Literal["ok", "differs", "missing"]
    sha256: str

    def line(self) -> str:
        """One line for people: state, path, and both hashes where they differ."""
        role = "replaced" if self.known.replaced else "relied on"
        line = f"{self.state:<8} {self.known.path} ({role})"
        if self.state == "differs":
            line += f": expected sha256 {self.known.sha256}, found {self.sha256}"
        if self.state == "missing":
            line += f": expected sha256 {self.known.sha256}, found no such function or no source"
        return line


def import_tokasaurus(module: str) -> Any:
    """A module of Tokasaurus, as Any: there are no types, and mostly there is no Tokasaurus.

    Raises:
        TokasaurusMissing: it cannot be imported, with the fix.
        UnknownTokasaurus: it is there and has no such module.
    """
    name = f"tokasaurus.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "tokasaurus":
            raise TokasaurusMissing(
                f"there is no Tokasaurus in this Python environment. Install it:\n  {INSTALL}\n"
                "(release 0.0.4 on PyPI cannot serve cartridges; without a GPU, use the embedded "
                "server: python -m cartridge_distill.server --help)"
            ) from error
        if error.name is not None and name.startswith(error.name):
            raise UnknownTokasaurus(
                f"the installed Tokasaurus has no module {error.name}. {OTHER_DEFENCE}"
            ) from error
        raise TokasaurusMissing(
            f"{name} cannot be imported: there is no {error.name}. Install Tokasaurus with all "
            f"that it needs:\n  {INSTALL}"
        ) from error
    except (ImportError, OSError) as error:
        raise TokasaurusMissing(
            f"{name} cannot be imported: {error}. Install Tokasaurus with all that it needs, on a "
            f"machine with CUDA:\n  {INSTALL}"
        ) from error


def fingerprint(function: Any) -> str:
    """SHA-256 of a function's source; of what it wraps, if it wraps one."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def check(known: Sequence[Known] | None = None) -> list[Finding]:
    """Compare each known function with the installed one; by default all that are known.

    Right after the repairs are in place, too: a replacement wraps what it replaces.

    Raises:
        TokasaurusMissing: there is nothing to compare with.
    """
    findings = []
    for one in KNOWN if known is None else known:
        try:
            found: Any = import_tokasaurus(one.module)
            for part in one.name.split("."):
                found = getattr(found, part)
            sha256 = fingerprint(found)
        except (UnknownTokasaurus, AttributeError, TypeError, OSError):
            findings.append(Finding(one, "missing", ""))
            continue
        findings.append(Finding(one, "ok" if sha256 == one.sha256 else "differs", sha256))
    return findings


def require(known: Sequence[Known] | None = None) -> None:
    """Let only the known Tokasaurus pass.

    Raises:
        UnknownTokasaurus: names each function that differs or is missing, and the fix.
        TokasaurusMissing: there is none.
    """
    wrong = [finding.line() for finding in check(known) if finding.state != "ok"]
    if wrong:
        raise UnknownTokasaurus(
            "this Tokasaurus is not the one that the repairs were written for "
            f"(branch geoff/cartridges, commit {COMMIT[:7]}):\n  "
            + "\n  ".join(wrong)
            + f"\n{OTHER_DEFENCE}"
        )
