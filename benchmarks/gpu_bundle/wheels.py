"""Wheels for another machine: downloaded for its Python, unpacked without being installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cartridge_distill.util.errors import ConfigError

# What no training run reads: Java, RLlib, the dashboard's web page, headers, test packages. veRL's
# wheel has a top-level package called tests, which would hide the project's own.
_LEFT_OUT = re.compile(
    r"^(ray/(jars|rllib|dashboard/client|serve|llm|data/tests|core/src/.*\.h$)"
    r"|tests/|share/|plotly/(labextension|figure_factory/.*\.json)|[^/]+/tests?/"
    r"|.*\.(map|pyi|hpp|h|c|cpp|pyx|pxd|js\.LICENSE\.txt)$|.*/__pycache__/)"
)
_KEPT = re.compile(r"^ray/(serve|llm)/__init__\.py$")
_PROGRAMS = ("ray/core/src/ray/raylet/raylet", "ray/core/src/ray/gcs/gcs_server")
_GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")
_PLATFORMS = [f"manylinux_{version}_x86_64" for version in _GLIBC]
_PLATFORMS += [f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")]
_SOURCE_ONLY = {"antlr4-python3-runtime"}  # no wheel is published; pure Python


def locked(names: Iterable[str], lock: Path) -> list[str]:
    """``name==version`` of some packages.

    Raises:
        ConfigError: the lock has no such package.
    """
    versions = dict(
        line.strip().lower().split("==", 1)
        for line in lock.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    names = list(names)
    if missing := sorted(set(names) - set(versions)):
        raise ConfigError(f"{lock} has no {', '.join(missing)}; name packages as it does")
    return [f"{name}=={versions[name]}" for name in names]


def download(packages: Sequence[str], python: str, into: Path) -> None:
    """Wheels for CPython ``python`` ("3.12") on Linux x86-64, without their dependencies.

    Raises:
        ConfigError: pip could not get one; its message is above.
    """
    into.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [package for package in packages if package.split("==")[0] in _SOURCE_ONLY]
    ready = [package for package in packages if package not in set(built)]
    options = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in _PLATFORMS:
        options += ["--platform", platform]
    commands = [[*pip, "download", "--no-deps", *options, "--dest", str(into), *ready]]
    commands += [[*pip, "wheel", "--no-deps", "--wheel-dir", str(into), one] for one in built]
    for command in commands:
        if subprocess.run(command, check=False).returncode != 0:
            raise ConfigError(
                f"pip could not get wheels for Python {python}, see above; is there a network, and "
                "does every package of carry.txt have a wheel for it?"
            )


def unpack(wheels: Iterable[Path], into: Path) -> None:
    """Their files as an installation would lay them, less what no run reads."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                # <name>.data/{purelib,platlib}/x belongs into the root, the rest of .data nowhere.
                match = re.match(r"[^/]+\.data/(?:(?:purelib|platlib)/)?(.*)", item.filename)
                inside = re.match(r"[^/]+\.data/(purelib|platlib)/", item.filename)
                if match and not inside:
                    continue
                target = match[1] if match else item.filename
                if item.is_dir() or (_LEFT_OUT.match(target) and not _KEPT.match(target)):
                    continue
                path = into / target
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(item))
                if (item.external_attr >> 16) & 0o111:
                    path.chmod(0o755)
    for name in _PROGRAMS:  # a wheel may have lost their mode
        if (into / name).exists():
            (into / name).chmod(0o755)


def strip(folder: Path) -> None:
    """Debug symbols of programs and libraries go, where there is a ``strip``."""
    tool = shutil.which("strip")
    if tool is None:
        return
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.stat().st_size < 100_000:
            continue
        with path.open("rb") as file:
            is_elf = file.read(4) == b"\x7fELF"
        if is_elf:
            # It leaves what it cannot strip as it is, and says so.
            subprocess.run([tool, "--strip-unneeded", str(path)], check=False)
