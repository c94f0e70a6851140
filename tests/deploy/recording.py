"""Loads a file of ``modal/`` as Modal does, and records what it asks Modal for.

There is no account here, so Modal's cloud is never reached. The recorded calls all go through to
the installed ``modal`` package, which refuses names and arguments it does not know.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modal

if getattr(modal, "__file__", None) is None:  # the folder modal/ of this project, as a namespace
    raise ImportError("the package `modal` is not installed: make setup, or pip install modal")

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "modal"
IN_CONTAINER = "/root"  # where Modal puts and imports a deployed file; no path of this machine

# The names that the deployment may use; another one would go unrecorded, and a test sees to that.
IMAGE_STEPS = (
    "from_registry",
    "debian_slim",
    "entrypoint",
    "apt_install",
    "pip_install",
    "uv_pip_install",
    "run_commands",
    "env",
    "add_local_file",
    "add_local_dir",
)


@dataclass(frozen=True)
class Call:
    """One call: what was called, with what, and what came back."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass
class Recorded:
    """All calls of one loading, in order."""

    calls: list[Call] = field(default_factory=list)

    def of(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.name in names]

    def one(self, name: str) -> Call:
        found = self.of(name)
        assert len(found) == 1, f"{len(found)} calls of {name}"
        return found[0]

    @property
    def image(self) -> list[Call]:
        """The steps of the image, first to last."""
        return self.of(*IMAGE_STEPS)

    def secret(self, thing: Any) -> tuple[str, list[str]]:
        """Name and required keys of a secret."""
        [call] = [call for call in self.of("Secret.from_name") if call.result is thing]
        return call.args[0], call.kwargs["required_keys"]

    def volume(self, thing: Any) -> Call:
        [call] = [call for call in self.of("Volume.from_name") if call.result is thing]
        return call


@contextmanager
def recording(recorded: Recorded) -> Iterator[None]:
    """While this is open, the calls that matter are written down and passed on."""

    def spy(name: str, real: Callable[..., Any], method: bool) -> Callable[..., Any]:
        @functools.wraps(real)
        def called(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            recorded.calls.append(Call(name, args[1:] if method else args, kwargs, result))
            return result

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in IMAGE_STEPS:
            static = name in ("from_registry", "debian_slim")
            wrapped: Any = spy(name, getattr(modal.Image, name), method=not static)
            patch.setattr(modal.Image, name, staticmethod(wrapped) if static else wrapped)
        for kind in (modal.Volume, modal.Secret):
            name = f"{kind.__name__}.from_name"
            patch.setattr(kind, "from_name", staticmethod(spy(name, kind.from_name, method=False)))
        patch.setattr(modal.App, "function", spy("function", modal.App.function, method=True))
        patch.setattr(modal, "asgi_app", spy("asgi_app", modal.asgi_app, method=False))
        patch.setattr(modal, "concurrent", spy("concurrent", modal.concurrent, method=False))
        yield


def load(
    name: str, environment: Mapping[str, str] | None = None, folder: Path = FOLDER
) -> tuple[ModuleType, Recorded]:
    """Imports ``<folder>/<name>.py`` by path, its folder on the path, as ``modal deploy`` does.

    Args:
        name: the file, without ``.py``.
        environment: the settings' variables; all others of theirs are taken away.
        folder: where the file is.
    """
    recorded = Recorded()
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with (
        pytest.MonkeyPatch.context() as patch,
        recording(recorded),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", modal.exception.DeprecationError)  # Modal's own, a warning
        for variable in list(os.environ):
            if variable.startswith(("CARTRIDGE_SERVER_", "CARTRIDGE_TRAIN_")):
                patch.delenv(variable)
        for variable, value in (environment or {}).items():
            patch.setenv(variable, value)
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, name, module)  # Modal looks functions up there
        spec.loader.exec_module(module)
    return module, recorded
