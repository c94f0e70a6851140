"""Version ids: what a cartridge is called at the server.

A Tokasaurus server never loads an id twice, so every version gets a new id,
``<run>-step-000012``, and ``<run>`` itself is new for every start: an id of an earlier run on a
server that still lives would silently give that run's weights.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime

from cartridge_distill.util.errors import ConfigError, SyncError

_RUN_NAME = re.compile(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")
_VERSION = re.compile(rf"(?P<run>{_RUN_NAME.pattern})-step-(?P<step>\d{{6}})")


def is_run_name(text: str) -> bool:
    """Letters and digits with single - or _ between them: what no server rewrites in an id."""
    return _RUN_NAME.fullmatch(text) is not None


def new_run_id(name: str) -> str:
    """A run id that no earlier run had: ``<name>-<utc time>-<4 hex digits>``.

    Raises:
        ConfigError: the name holds what Tokasaurus would rewrite in an id.
    """
    if not is_run_name(name):
        raise ConfigError(
            f"run name {name!r} cannot begin an id; fix: use letters and digits with single - or _ "
            "between them; Tokasaurus rewrites anything else, and the id would no longer be found"
        )
    return f"{name}-{datetime.now(UTC):%Y%m%d%H%M%S}-{secrets.token_hex(2)}"


def is_run_id(text: str) -> bool:
    """Whether :func:`new_run_id` may have made it."""
    return re.fullmatch(rf"{_RUN_NAME.pattern}-\d{{14}}-[0-9a-f]{{4}}", text) is not None


def version_id(run: str, step: int) -> str:
    """The id under which the cartridge after ``step`` optimizer steps is served."""
    return f"{run}-step-{step:06d}"


def step_of(version: str) -> int:
    """The optimizer step of a version id.

    Raises:
        SyncError: not an id of ours.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise SyncError(f"{version!r} is no version id; expected <run>-step-000012")
    return int(match["step"])


def run_of(version: str) -> str | None:
    """The run of a version id; None for an id that is none, such as a cartridge put by hand."""
    match = _VERSION.fullmatch(version)
    return match["run"] if match else None
