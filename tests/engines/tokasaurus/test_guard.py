"""What is refused, and what the command line says about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.engines.tokasaurus import guard, launch
from cartridge_distill.engines.tokasaurus.__main__ import main
from tests.engines.tokasaurus.fake import write_fake_tokasaurus


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fake Tokasaurus is installed."""
    monkeypatch.syspath_prepend(write_fake_tokasaurus(tmp_path))
    kept = _take_out()
    yield tmp_path
    _take_out()
    sys.modules.update(kept)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Tokasaurus is installed, whatever there is on this machine."""
    kept = _take_out()
    monkeypatch.setattr(sys, "meta_path", [_NotInstalled(), *sys.meta_path])
    yield
    sys.modules.update(kept)


class _NotInstalled:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "tokasaurus":
            raise ModuleNotFoundError("No module named 'tokasaurus'", name="tokasaurus")


def _take_out() -> dict[str, Any]:
    names = [name for name in sys.modules if name.split(".")[0] in ("tokasaurus", "pydra")]
    return {name: sys.modules.pop(name) for name in names}


def is_known(monkeypatch: pytest.MonkeyPatch, fake: Path, *, repaired: bool) -> None:
    """From here on the fake one is the pinned commit."""
    sha256 = guard.sources_sha256(fake / "tokasaurus")
    monkeypatch.setattr(guard, "REPAIRED" if repaired else "PLAIN", sha256)


def test_the_repaired_one_passes(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_known(monkeypatch, fake, repaired=True)
    guard.require()
    assert not {"tokasaurus", "pydra"} & set(sys.modules), "nothing is imported for that"


def test_one_without_the_repairs_is_told_how_to_get_them(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_known(monkeypatch, fake, repaired=False)
    with pytest.raises(guard.UnknownTokasaurus, match="lacks the repairs") as refused:
        guard.require()
    assert "verl_patches apply --package tokasaurus" in str(refused.value)
    assert "--defence restart" in str(refused.value)


@pytest.mark.parametrize("change", ["content", "another file", "a file that is gone", "a name"])
def test_any_other_source_is_refused_with_both_hashes(
    fake: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    is_known(monkeypatch, fake, repaired=True)
    file = fake / "tokasaurus" / "work.py"
    match change:
        case "content":
            file.write_text(file.read_text().replace("600", "601"))
        case "another file":
            (fake / "tokasaurus" / "model").mkdir()
            (fake / "tokasaurus" / "model" / "more.py").write_text("")
        case "a file that is gone":
            file.unlink()
        case "a name":
            file.rename(file.with_name("other.py"))
    with pytest.raises(guard.UnknownTokasaurus) as refused:
        guard.require()
    message = str(refused.value)
    assert guard.REPAIRED in message and guard.COMMIT in message
    assert guard.sources_sha256(fake / "tokasaurus") in message
    assert "--defence restart" in message and "pip's record" not in message


def test_what_is_no_source_does_not_count(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_known(monkeypatch, fake, repaired=True)
    (fake / "tokasaurus" / "__pycache__").mkdir()
    (fake / "tokasaurus" / "__pycache__" / "work.cpython-312.pyc").write_bytes(b"0")
    guard.require()


def test_the_commit_that_pip_recorded_is_quoted(fake: Path) -> None:
    about = fake / "tokasaurus-0.0.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tokasaurus\nVersion: 0.0.4\n")
    for record, said in (
        ({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}, True),
        ({"url": "x", "dir_info": {"editable": True}}, False),
        ([], False),
    ):
        (about / "direct_url.json").write_text(json.dumps(record))
        with pytest.raises(guard.UnknownTokasaurus) as refused:
            guard.require()
        assert ("pip's record names commit 0123abc" in str(refused.value)) is said


# --- command line -------------------------------------------------------------------------------


def test_check_says_what_it_is_and_ends_with_0(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_known(monkeypatch, fake, repaired=True)
    assert main(["--check"]) == 0
    said = capsys.readouterr().out
    assert str(fake / "tokasaurus") in said and "845f115 with the repairs" in said


def test_check_names_what_is_wrong_and_ends_with_1(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check"]) == 1
    assert "not the one that the repairs were written for" in capsys.readouterr().out
    is_known(monkeypatch, fake, repaired=False)
    assert main(["--check"]) == 1
    assert "lacks the repairs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--check"], ["model=some"], ["--unrepaired", "model=some"]])
def test_without_tokasaurus_the_fix_is_said(
    nothing: None, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "there is no Tokasaurus in this Python environment" in said
    assert (
        f"pip install git+https://github.com/ScalingIntelligence/tokasaurus@{guard.COMMIT}" in said
    )


def test_a_missing_dependency_is_named(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fake / "tokasaurus" / "entry.py").write_text("import no_such_kernels\n")
    assert main(["--unrepaired", "model=some"]) == 2
    assert "there is no no_such_kernels" in capsys.readouterr().err


def test_another_tokasaurus_is_refused_before_anything_starts(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model=some"]) == 2
    assert "not the one that the repairs were written for" in capsys.readouterr().err


def test_a_way_of_starting_that_is_not_known_is_refused(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "tokasaurus" / "entry.py").write_text("")
    assert main(["--unrepaired", "notes=x"]) == 2
    assert "no tokasaurus.entry.make_proc_dict" in capsys.readouterr().err


def test_no_arguments_ask_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "model=" in capsys.readouterr().err


def test_arguments_go_through_in_any_order(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(launch, "run_processes", lambda *both: seen.append(both))
    assert main(["model=a/b", "--unrepaired", "port=1", "--host", "0.0.0.0"]) == 0
    config, host = seen[0]
    assert (config.model, config.port, host) == ("a/b", "1", "0.0.0.0")


def test_only_this_machine_is_listened_to_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.append(options))
    launch.listen_on("127.0.0.1")
    uvicorn.run("app", host="0.0.0.0", port=1)  # type: ignore[arg-type]
    assert seen == [{"host": "127.0.0.1", "port": 1}]
