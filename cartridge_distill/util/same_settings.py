"""May this run go on from what is there? Only if both were made with the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cartridge_distill.util.errors import ConfigError


class OtherSettings(ConfigError):
    """Something was made with other settings.

    Attributes:
        names: of those that differ.
    """

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any], refusal: str) -> None:
    """Refuses to go on from what was made with other settings.

    Args:
        before: as they were read from a file of JSON.
        now: this run's.
        refusal: what cannot be done, and the fix; begins the message.

    Raises:
        OtherSettings: names every setting that differs, with both values.
    """
    plain = json.loads(json.dumps(dict(now)))  # tuples become lists, as in the file
    names = [key for key in sorted({*before, *plain}) if before.get(key) != plain.get(key)]
    if names:
        different = [f"{k}: {before.get(k)!r} there, {plain.get(k)!r} now" for k in names]
        raise OtherSettings("\n- ".join([refusal, *different]), names)
