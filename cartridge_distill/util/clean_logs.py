"""Logs without credentials, whichever library writes them and whichever handler takes them.

The filter sits where records are made, not at a handler: uvicorn, aiohttp and the rest bring
handlers of their own.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from cartridge_distill.util.secrecy import clean_text

_PLAIN = (int, float, bool, type(None))


def hide_secrets_in_logs() -> None:
    """From here on every log record of this process is cleaned; calling it again does nothing."""
    make = logging.getLogRecordFactory()
    if not getattr(make, "hides_secrets", False):
        logging.setLogRecordFactory(_Cleaning(make))


class _Cleaning:
    hides_secrets = True

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **kwargs)
        _clean_message(record)
        if record.exc_info and record.exc_info[0] is not None:
            # Handlers take this text where it is there, and make none of their own.
            record.exc_text = clean_text("".join(traceback.format_exception(*record.exc_info)))
            record.exc_text = record.exc_text.rstrip("\n")
        return record


def _clean_message(record: logging.LogRecord) -> None:
    try:
        said = record.getMessage()
    except (TypeError, ValueError, KeyError):  # logging reports a wrong format by itself
        return
    clean = clean_text(said)
    if clean == said:
        return
    # Formatters such as uvicorn's read the arguments one by one: they stay where that is enough.
    if isinstance(record.args, tuple):
        arguments = tuple(_cleaned(value) for value in record.args)
        if str(record.msg) % arguments == clean:
            record.args = arguments
            return
    record.msg, record.args = clean, None


def _cleaned(value: object) -> object:
    return value if isinstance(value, _PLAIN) else clean_text(str(value))
