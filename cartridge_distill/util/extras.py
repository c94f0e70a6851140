"""Optional parts of the installation: which packages a command needs beyond the light core.

The parts are the extras of pyproject.toml. A command asks for its own before it imports anything of
them, and says what to install where one is missing.
"""

from __future__ import annotations

import importlib.util

from cartridge_distill.util.errors import CartridgeDistillError

_DATA = (
    *("bm25s", "bs4", "markdownify", "pandas", "pyarrow", "pypdf", "pypdfium2", "webencodings"),
)
_REPORT = ("plotly", "pandas", "pyarrow")
_TRAIN = ("verl", "ray", "transfer_queue", "pandas", "pyarrow")

NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "prepare": {"data": _DATA},
    "init --document": {"data": _DATA},
    "chat --document": {"data": _DATA},
    "serve": {"gateway": ("prometheus_client",)},
    "train": {"train": _TRAIN},
    "eval": {"data": ("bm25s", "pandas", "pyarrow")},
    "report": {"report": _REPORT},
    "doctor --data": {"data": ("pandas", "pyarrow")},
    "distill": {"train": _TRAIN, "data": _DATA, "report": _REPORT},
    "demo": {"train": (*_TRAIN, "gguf"), "data": _DATA, "report": _REPORT},
}
"""Command to extras, extra to the modules of it that the command imports."""


class ExtraMissing(CartridgeDistillError, ImportError):
    """A part of the installation is not there; the message says how to get it."""


def require(command: str) -> None:
    """Makes sure that what a command needs is installed; imports none of it.

    Raises:
        ExtraMissing: names the modules that are not there, and the extras that bring them.
    """
    modules: dict[str, None] = {}
    extras = []
    for extra, names in NEEDED[command].items():
        missing = [name for name in names if not _is_there(name)]
        if missing:
            extras.append(extra)
            modules |= dict.fromkeys(missing)
    if extras:
        raise ExtraMissing(
            f"`cartridge-distill {command}` needs {', '.join(modules)}, not installed here: "
            f"pip install 'cartridge-distill[{','.join(extras)}]'"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its import is blocked, or it has no specification
        return False
