"""The bundle for a node without network: its parts, and the whole of it on such a node, a CPU."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from benchmarks.gpu_bundle import __main__ as bundle
from benchmarks.gpu_bundle import install
from benchmarks.gpu_bundle.closure import gaps
from benchmarks.gpu_bundle.decode_model import decode
from benchmarks.gpu_bundle.parts import MIB, PIECE, Part, archives, lay, pieces
from benchmarks.gpu_bundle.wheels import locked, unpack
from cartridge_distill.util.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(tmp_path: Path) -> list[Path]:
    """Deliveries of a few files and of one that is cut into three pieces."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "package").mkdir(parents=True)
    out.mkdir()
    draw = random.Random(0)
    (source / "package" / "module.py").write_text("VALUE = 1\n")
    (source / "package" / "program").write_text("#!/bin/sh\n")
    (source / "package" / "program").chmod(0o755)
    (tmp_path / "large.bin").write_bytes(draw.randbytes(1000) * (2 * PIECE // 1000 + 1))
    files = [path for path in source.rglob("*") if path.is_file()]
    parts = [*archives(source, files, "site", out), *pieces(tmp_path / "large.bin", out)]
    assert len(parts) > 3
    return lay(parts, out, max(part.bytes for part in parts))


def deliver(folder: Path, kit: Path) -> int:
    return install.main(["--parts", str(folder), "--to", str(kit)])


def test_deliveries_in_any_order_make_the_whole(
    calls: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = tmp_path / "kit"
    assert len(calls) > 1
    for folder in reversed(calls[1:]):
        assert deliver(folder, kit) == 0
        assert "still to come: " in capsys.readouterr().out
    assert not (kit / "complete").exists()
    assert deliver(calls[0], kit) == 0
    assert "everything is there" in capsys.readouterr().out and (kit / "complete").exists()
    assert (kit / "site" / "package" / "module.py").read_text() == "VALUE = 1\n"
    assert os.access(kit / "site" / "package" / "program", os.X_OK)
    assert (kit / "files" / "large.bin").read_bytes() == (tmp_path / "large.bin").read_bytes()


def test_a_damaged_part_is_named(
    calls: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = next(calls[0].glob("site-*.gz"))
    part.write_bytes(gzip.compress(b"something else"))
    assert deliver(calls[0], tmp_path / "kit") == 1
    assert f"{part.name} is damaged" in capsys.readouterr().err


def test_a_file_whose_pieces_are_of_two_versions_is_named(
    calls: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in calls:
        described = json.loads((folder / "parts.json").read_text())
        for part in described:
            part["of_sha256"] = "0" * 64
        (folder / "parts.json").write_text(json.dumps(described))
    status = [deliver(folder, tmp_path / "kit") for folder in calls]
    assert status == [*[0] * (len(calls) - 1), 1]
    assert "large.bin is damaged" in capsys.readouterr().err


def test_a_part_over_the_limit_is_refused(tmp_path: Path) -> None:
    part = Part("large.tar.gz", "site", "archive", 3 * MIB, "")
    with pytest.raises(ConfigError, match="large.tar.gz has 3.0 MiB, over the 2.0 MiB"):
        lay([part], tmp_path, 2 * MIB)


def test_every_stage_is_planned_once() -> None:
    for count in (1, 2, 3, 5):
        plans = bundle.planned(count)
        assert len(plans) == count
        stages = [stage for plan in plans for stage in plan]
        assert sorted(stages) == sorted([*bundle.FIRST, *bundle.SECOND, *bundle.LAST])


def test_a_wheel_is_laid_as_an_installation_would(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            *("a/__init__.py", "a/tests/test_a.py", "tests/__init__.py", "a/x.pyi"),
            *("a-1.data/purelib/b.py", "a-1.data/scripts/run", "a-1.dist-info/METADATA"),
        ):
            archive.writestr(name, "")
    unpack([wheel], tmp_path / "site")
    site = tmp_path / "site"
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert found == {"a/__init__.py", "b.py", "a-1.dist-info/METADATA"}


def test_what_is_carried_is_in_the_lock() -> None:
    names = (ROOT / "benchmarks" / "gpu_bundle" / "carry.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z0-9-]+==.+", line) for line in locked(names, bundle.LOCK))
    with pytest.raises(ConfigError, match="has no no-such-package"):
        locked([*names, "no-such-package"], bundle.LOCK)


def test_a_model_that_is_not_the_manifests_is_named(tmp_path: Path) -> None:
    import numpy as np

    from cartridge_distill.model.demo_model import CONVERSION, MANIFEST, SMOLLM2
    from tests.training.gguf_files import write

    files = tmp_path / "files"
    files.mkdir()
    write(files / "m.gguf", {"output_norm.weight": np.ones(4, np.float32)})
    (files / "config.json").write_text('{"num_attention_heads": 1, "num_key_value_heads": 1}')
    manifest = {"gguf_sha256": SMOLLM2.gguf_sha256, "conversion": CONVERSION}
    manifest |= {"sha256": {"model.safetensors": "0" * 64}}
    (files / MANIFEST).write_text(json.dumps(manifest))
    assert decode(files, tmp_path / "model") == "model.safetensors was changed"


def test_what_neither_travels_nor_is_there_is_named(tmp_path: Path) -> None:
    def wheel(name: str, *requires: str) -> Path:
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        described = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(described))
        return path

    a = wheel("a", "b>=2", "Node_One<2", "lost", 'windows; sys_platform == "win32"')
    found = list(gaps([a, wheel("b")], {"node-one": "3.0"}, {"lost": "0.5"}, "3.12"))
    assert [line.split()[:3] for line in found] == [
        ["bound", "a", "wants"],
        ["bound", "a", "wants"],
        ["missing", "lost==0.5", "(for"],
    ]
    assert "it is carried as 1.0" in found[0] and "it is on the node as 3.0" in found[1]


# ---------------------------------------------------------------- the rehearsal


def without_network() -> list[str]:
    """What runs a command in a namespace with a loopback alone.

    Skips where this is not allowed.
    """
    inside = ["bash", "-c", 'ip link set lo up && exec "$@"', "bash"]
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        try:
            done = subprocess.run([*unshare, *inside, "true"], capture_output=True, check=False)
        except FileNotFoundError:
            break
        if done.returncode == 0:
            return [*unshare, *inside]
    pytest.skip("no namespace without network: unshare -n and ip are missing or not permitted")


def node_python(folder: Path) -> Path:
    """A Python that has this environment's packages but for those that the bundle carries.

    Links, a directory of files where a namespace package is shared.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    here, there = Path(sysconfig.get_path("purelib")), folder / "lib" / version / "site-packages"
    carried = set((ROOT / "benchmarks" / "gpu_bundle" / "carry.txt").read_text().split())
    carried = {canonicalize_name(name) for name in carried} | {"cartridge-distill"}
    carried -= set(bundle.OVERLAY)  # the node has its own
    owned: dict[bool, dict[str, list[Path]]] = {True: {}, False: {}}
    for distribution in importlib.metadata.distributions(path=[str(here)]):
        ours = canonicalize_name(distribution.metadata["Name"]) in carried
        for file in distribution.files or []:
            if file.parts[0] != "..":
                owned[ours].setdefault(file.parts[0], []).append(Path(file))
    for name, files in owned[False].items():
        if name not in owned[True]:
            (there / name).symlink_to(here / name)
            continue
        for file in files:
            if (here / file).exists():
                (there / file).parent.mkdir(parents=True, exist_ok=True)
                (there / file).symlink_to(here / file)
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(2400)
def test_on_a_node_without_network(tmp_path: Path) -> None:
    """The bundle for this Python, delivered call by call: one stage after the first, and two steps
    of the demo after the last, through veRL, Ray, the server and the evaluation."""
    offline = without_network()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parts = tmp_path / "parts"
    assert bundle.main(["--python", version, "--out", str(parts)]) == 0
    deliveries = sorted(path for path in parts.iterdir() if path.is_dir())
    for folder in deliveries:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 58.5 * MIB
    python = node_python(tmp_path / "node")
    missing = subprocess.run([python, "-c", "import ray"], capture_output=True, check=False)
    assert missing.returncode != 0, "the node has what the bundle must bring"
    dropped = ("PYTHONPATH", "RAY_", "VERL_", "TOKASAURUS_", "NCCL_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    small = ["--device", "cpu", "--rehearse", "--threads", "2", "--budget", "2000"]
    for number, folder in enumerate(deliveries):
        last = number == len(deliveries) - 1
        if number and not last:
            command = [str(python), str(folder / "install.py"), "--parts", str(folder)]
            subprocess.run([*command, "--to", str(tmp_path / "kit")], check=True)
            continue
        out = tmp_path / f"out{number}"
        command = ["bash", str(folder / "on_node.sh"), *small]
        command += ["--only", *(["demo", "loop"] if last else ["engine"])]
        environment = {"KIT": str(tmp_path / "kit"), "OUT": str(out), "PYTHON": str(python)}
        done = subprocess.run(
            [*offline, *command],
            env={**inherited, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        assert len(list(out.iterdir())) <= 8
        table = (out / "table.md").read_text()
        assert "failed" not in table
        assert ("2 steps" in table) is last and ("embedded server" in table) is not last
    shutil.rmtree(tmp_path / "kit")  # a gigabyte
