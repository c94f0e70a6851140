"""The errors this project raises. Every message says what was wrong, which value, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from cartridge_distill.util.secrecy import clean_text


class CartridgeDistillError(Exception):
    """Base class: catch this to catch everything the project raises on purpose.

    A message that quotes a server, a setting or a library loses its credentials here.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(clean_text(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(CartridgeDistillError, ValueError):
    """A setting makes no sense, alone or with another one."""


def require_counts(settings: object, *names: str) -> None:
    """The named fields are at least 1.

    Raises:
        ConfigError: the first that is not.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} is too few; fix: give 1 or more")


def nearest(name: object, known: Iterable[str]) -> str:
    """The fix for an unknown name: what was probably meant, and all there are."""
    names = list(known)
    meant = get_close_matches(str(name), names, n=1)
    guess = f"did you mean {meant[0]!r}? " if meant else ""
    return f"; fix: {guess}choose one of {', '.join(names)}"


def with_fix(said: object, fix: str) -> str:
    """The words of an error, and ``fix`` behind them where they name none themselves.

    For what is caught and raised again: who knows the file knows what to do about it.
    """
    words = str(said).rstrip(". ")
    return words if "fix: " in words else f"{words}; fix: {fix}"


class CartridgeFormatError(CartridgeDistillError, ValueError):
    """A cartridge file cannot be read, or does not fit the model."""


class DocumentError(CartridgeDistillError, ValueError):
    """A sample's document is missing, or does not fit the model's context."""


class RolloutError(CartridgeDistillError, RuntimeError):
    """The inference server answered in a way that no retry can fix."""


class ServerUnreachable(RolloutError):
    """The inference server did not answer within the time allowed."""


class ServerRefused(RolloutError):
    """The inference server refused a request; ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OffPolicyError(CartridgeDistillError, RuntimeError):
    """A rollout was made by another cartridge version than the one being trained."""


class SyncError(CartridgeDistillError, RuntimeError):
    """A cartridge version could not be published, or the server does not serve it."""


class HubError(CartridgeDistillError, RuntimeError):
    """The Hugging Face Hub does not give or take a cartridge."""


class ProcessDied(CartridgeDistillError, RuntimeError):
    """A process of the training run died; the message says which, and how to go on."""


class ReportError(CartridgeDistillError, ValueError):
    """A run's files do not give a report; the message names the file and the line."""


class AttentionCompileError(CartridgeDistillError, RuntimeError):
    """FlexAttention could not be compiled for a shape, and is not computed unfused instead."""
