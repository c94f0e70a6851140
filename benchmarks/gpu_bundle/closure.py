"""Do the carried packages and the node's make a whole? For whoever changes carry.txt.

    python -m benchmarks.gpu_bundle.closure --wheels DIR --node node.txt [--python 3.12]

node.txt has the node's packages, `name` or `name==version` a line (`pip list --format freeze`).
Prints each requirement of a carried package that neither travels nor is on the node, with the
lock's version, and each version bound that is missed. Exit status: 1 if something is missing.
"""

from __future__ import annotations

import argparse
import email
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_bundle.__main__ import LOCK
from cartridge_distill.util.errors import ConfigError

Versions = Mapping[str, str | None]


def read_versions(file: Path) -> dict[str, str | None]:
    """Names, and versions where they are given."""
    found: dict[str, str | None] = {}
    for line in file.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, version = line.strip().partition("==")
            found[canonicalize_name(name)] = version or None
    return found


def requirements_of(wheel: Path, python: str) -> tuple[str, str, list[Requirement]]:
    """Name, version, and what it needs on Linux x86-64 with CPython ``python``.

    Raises:
        ConfigError: it is no wheel.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/METADATA", name)]
        if not names:
            raise ConfigError(f"{wheel} has no METADATA: it is no wheel")
        described = email.message_from_bytes(archive.read(names[0]))
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }
    wanted = map(Requirement, described.get_all("Requires-Dist") or [])
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]
    return canonicalize_name(described["Name"]), described["Version"], needed


def gaps(wheels: list[Path], node: Versions, lock: Versions, python: str) -> Iterator[str]:
    """Lines that begin with ``missing`` or ``bound``."""
    carried: dict[str, str | None] = {}
    needs: dict[str, list[Requirement]] = {}
    for wheel in wheels:
        name, version, needed = requirements_of(wheel, python)
        carried[name], needs[name] = version, needed
    for name, needed in needs.items():
        for requirement in needed:
            other = canonicalize_name(requirement.name)
            if other not in carried and other not in node:
                known = lock.get(other) or "?"
                yield f"missing {requirement.name}=={known}   (for {name}: {requirement})"
                continue
            travels = other in carried
            there = carried[other] if travels else node[other]
            if there and not requirement.specifier.contains(there, prereleases=True):
                where = "is carried as" if travels else "is on the node as"
                yield f"bound   {name} wants {requirement}; it {where} {there}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="the node's (%(default)s)")
    options = parser.parse_args(arguments)
    wheels = sorted(options.wheels.glob("*.whl"))
    if not wheels:
        parser.error(f"--wheels {options.wheels}: no wheel is in it")
    lines = list(gaps(wheels, read_versions(options.node), read_versions(LOCK), options.python))
    print("\n".join(lines) or "nothing is missing")
    return int(any(line.startswith("missing") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
