"""Command lines: the stock ``vllm serve``, and this package's own command in vLLM's environment."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cartridge_distill
from cartridge_distill.engines.vllm.options import FRONT, Options
from cartridge_distill.util.errors import ConfigError

MODULE = "cartridge_distill.engines.vllm"
_SERVER = "vllm.entrypoints.openai.api_server"
CPU_CACHE_BYTES = 4 * 2**30
"""For keys and values on a CPU. vLLM itself takes 92 % of the machine's memory, and does not start
where a trainer has some of it."""
_CACHE_SIZE = {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}
# What the front and the connector need of vLLM; another value would give answers of another kind.
_FIXED = {
    "--kv-transfer-config",
    "--middleware",
    "--logprobs-mode",
    "--generation-config",
    "--model",
    "--host",
    "--port",
}


@dataclass(frozen=True)
class ServeCommand:
    """One server.

    Attributes:
        model: folder or hub id.
        options: of the connector and the front.
        host, port: where it listens.
        max_model_len: cartridge, prompt and answer together; None leaves it to vLLM.
        dtype: None leaves it to vLLM.
        more: further arguments of vLLM, as they are.
    """

    model: str
    options: Options
    host: str
    port: int
    max_model_len: int | None = None
    dtype: str | None = None
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for argument in self.more:
            name = argument.partition("=")[0]
            if name in _FIXED:
                raise ConfigError(
                    f"{name} is set here and cannot be given to vLLM; fix: leave it out"
                )

    def arguments(self, is_cpu: bool) -> list[str]:
        """What follows ``vllm serve MODEL``.

        Args:
            is_cpu: a build of vLLM for CPUs. It starts faster without compiling, must not cut the
                prompt of a seeded request in pieces (its engine dies of that), and shares the
                memory with everybody else.
        """
        found = ["--host", self.host, "--port", str(self.port)]
        found += ["--kv-transfer-config", json.dumps(self.options.transfer_config())]
        found += ["--middleware", FRONT]
        found += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        if self.options.model_name is not None:
            found += ["--served-model-name", self.options.model_name]
        if self.max_model_len is not None:
            found += ["--max-model-len", str(self.max_model_len)]
        if self.dtype is not None:
            found += ["--dtype", self.dtype]
        if is_cpu:
            found += ["--no-enable-chunked-prefill", "--enforce-eager"]
            if not _CACHE_SIZE & {argument.partition("=")[0] for argument in self.more}:
                found += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
        return [*found, *self.more]

    def stock(self) -> str:
        """The line for a machine where vLLM and this package are installed together."""
        return shlex.join(["vllm", "serve", self.model, *self.arguments(is_cpu=False)])

    def program(self, is_cpu: bool) -> list[str]:
        """The server's own process, in vLLM's environment. (The ``vllm`` command itself fails in
        the build for CPUs: it asks for a package called vllm.)"""
        return [
            *(sys.executable, "-m", _SERVER, "--model", self.model),
            *self.arguments(is_cpu),
        ]

    def own(self, engine_python: str) -> list[str]:
        """This package's command in vLLM's environment, which looks at its version first."""
        found = [engine_python, "-m", MODULE, "--model", self.model]
        found += ["--host", self.host, "--port", str(self.port)]
        found += ["--options", self.options.model_dump_json(exclude_none=True)]
        if self.max_model_len is not None:
            found += ["--max-model-len", str(self.max_model_len)]
        if self.dtype is not None:
            found += ["--dtype", self.dtype]
        return [*found, "--", *self.more]


def check_python(engine_python: str | None) -> str:
    """The Python of vLLM's environment.

    Raises:
        ConfigError: none was given, or there is none.
    """
    if engine_python is None:
        raise ConfigError(
            "vLLM needs an environment of its own; fix: give its Python with --engine-python. "
            f"`python -m {MODULE} --make-environment DIR` makes one, whose Python is DIR/bin/python"
        )
    path = Path(engine_python).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--engine-python {engine_python}: there is no such file; fix: name the "
            "environment's own, DIR/bin/python"
        )
    # Not resolved: an environment's Python is a link, and finds its packages by where the link is.
    return str(path.absolute())


class PackagePath:
    """A folder that holds this package and nothing else, for another environment's PYTHONPATH.

    The folder in which the package lies may be a whole environment, whose other packages must not
    be found there. It is gone with this object.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cartridge-distill-path-")
        self.path = self._folder.name
        package = Path(cartridge_distill.__file__).resolve().parent
        (Path(self.path) / package.name).symlink_to(package, target_is_directory=True)

    def environment(self, given: dict[str, str]) -> dict[str, str]:
        """The environment for a process there: its own packages, and this one."""
        # The variable of this environment would put its packages before theirs. And vLLM reports
        # how it is used to its makers unless it is told not to.
        return {**given, "PYTHONPATH": self.path, "VLLM_NO_USAGE_STATS": "1"}

    def remove(self) -> None:
        self._folder.cleanup()


def served_length(model: str, wanted: int | None) -> int | None:
    """``--max-model-len``: what is wanted for a cartridge with a request, as far as the model
    reaches.

    Returns:
        None, which leaves it to vLLM, where nothing is wanted or nobody says how far that is.

    Raises:
        ConfigError: there is no such model.
    """
    if wanted is None:
        return None
    from cartridge_distill.cartridge.kv_shape import text_config
    from cartridge_distill.model.reading import read_model_config

    reach = getattr(text_config(read_model_config(model)), "max_position_embeddings", None)
    return min(wanted, reach) if isinstance(reach, int) else None
