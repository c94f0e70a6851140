"""Refuses a Tokasaurus that the repairs were not written for, and one that lacks them.

The repairs are hooks in Tokasaurus' own files: ``tokasaurus.patch``, which ``python -m
verl_patches apply --package tokasaurus`` puts there. They are right only beside the code that they
were written for. So all Python files of the installed package are hashed together and compared with
the pinned commit's, as it comes and with the patch on. Nothing of Tokasaurus is imported for that.

Not pip's record of the commit (``direct_url.json``): the branch's README asks for ``pip install
-e .``, of which pip records no commit; and the record says what was installed, not what the files
are now. It is only quoted, where there is one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from cartridge_distill.util.errors import CartridgeDistillError

COMMIT = "845f115f5bc38aee266821a094fba1cd702dafff"
"""Head of Tokasaurus' branch ``geoff/cartridges`` in August 2025."""

PLAIN = "f29f9290553b6ddc90ef1686f52c9f23662b9022038576eed1c5a4f97e0f7bf9"
"""Hash of the commit's sources as they come; see :func:`sources_sha256`."""

REPAIRED = "7c9d41b8910f78fd4565f2b583e23fdab57aa1788fd509b2fc49cf15c0f6689f"
"""The same with ``tokasaurus.patch`` applied: another patch needs another hash."""

State = Literal["repaired", "plain", "unknown"]
"""Of the installed sources: with the patch, without it, or of something else."""

INSTALL = f"pip install git+https://github.com/ScalingIntelligence/tokasaurus@{COMMIT}"
APPLY = "python -m verl_patches apply --package tokasaurus"
OTHER_DEFENCE = (
    "or serve without repairs and have the gateway restart the server before its cache runs dry:\n"
    "  python -m cartridge_distill.gateway --defence restart ..."
)


class TokasaurusMissing(CartridgeDistillError, ImportError):
    """Tokasaurus, or something that it needs, cannot be imported."""


class UnknownTokasaurus(CartridgeDistillError, RuntimeError):
    """The installed Tokasaurus is not the one that the repairs are for, or lacks them."""


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
            raise _missing() from error
        if error.name is not None and name.startswith(error.name):
            raise UnknownTokasaurus(
                f"the installed Tokasaurus has no module {error.name}. Install the known commit:\n"
                f"  {INSTALL}\n{OTHER_DEFENCE}"
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


def package_folder() -> Path:
    """The folder ``tokasaurus/`` that this Python would import.

    Raises:
        TokasaurusMissing: there is none.
    """
    try:
        spec = importlib.util.find_spec("tokasaurus")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise _missing()
    return Path(spec.origin).resolve().parent


def sources_sha256(package: Path) -> str:
    """Of the paths and contents of all ``*.py`` below a folder, as hexadecimal.

    The order is that of the paths; the folder's own name and place do not count.
    """
    whole = hashlib.sha256()
    paths = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name in sorted(paths):
        whole.update(f"{name} {hashlib.sha256(paths[name].read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def state_of(package: Path) -> State:
    """What the sources in the folder ``tokasaurus/`` are."""
    known: dict[str, State] = {PLAIN: "plain", REPAIRED: "repaired"}
    return known.get(sources_sha256(package), "unknown")


def unknown(package: Path) -> str:
    """Why sources that are not known are refused, with the fix."""
    return (
        f"the Tokasaurus in {package} is not the one that the repairs were written for: its Python "
        f"files have sha256 {sources_sha256(package)}, commit {COMMIT[:7]} of the branch "
        f"geoff/cartridges has {PLAIN}, and {REPAIRED} with the repairs.{_recorded()} Install the "
        f"known commit:\n  {INSTALL}\n  {APPLY}\n{OTHER_DEFENCE}"
    )


def require() -> None:
    """Let only the known Tokasaurus pass, with the repairs on.

    Raises:
        UnknownTokasaurus: it is another one, or lacks the repairs; the message has the fix.
        TokasaurusMissing: there is none.
    """
    package = package_folder()
    match state_of(package):
        case "repaired":
            return
        case "plain":
            raise UnknownTokasaurus(
                f"the Tokasaurus in {package} lacks the repairs. Put them on:\n  {APPLY}\n"
                f"{OTHER_DEFENCE}"
            )
        case "unknown":
            raise UnknownTokasaurus(unknown(package))


def _missing() -> TokasaurusMissing:
    return TokasaurusMissing(
        f"there is no Tokasaurus in this Python environment. Install it:\n  {INSTALL}\n  {APPLY}\n"
        "(release 0.0.4 on PyPI cannot serve cartridges; without a GPU, use the embedded "
        "server: python -m cartridge_distill.server --help)"
    )


def _recorded() -> str:
    """The commit that pip recorded when it installed Tokasaurus, as a sentence; or nothing."""
    try:
        text = importlib.metadata.distribution("tokasaurus").read_text("direct_url.json")
        commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        commit = None
    return f" (pip's record names commit {commit}.)" if commit else ""
