"""What is refused, and what the command line says about it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.engines.tokasaurus import guard, install, launch
from cartridge_distill.engines.tokasaurus.__main__ import main
from cartridge_distill.engines.tokasaurus.guard import Known
from tests.engines.tokasaurus.fake import write_fake_tokasaurus

KNOWN_SOURCE = "def known(x):\n    return x + 1\n"
METHOD_SOURCE = '    def method(self):\n        return "as it was"\n'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


FUNCTION = Known("some", "known", sha256(KNOWN_SOURCE), replaced=True)
METHOD = Known("some", "Thing.method", sha256(METHOD_SOURCE))


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


def test_known_functions_pass(fake: Path) -> None:
    assert [finding.state for finding in guard.check([FUNCTION, METHOD])] == ["ok", "ok"]
    guard.require([FUNCTION, METHOD])


def test_a_changed_function_is_refused_with_its_name_and_both_hashes(fake: Path) -> None:
    file = fake / "tokasaurus" / "some.py"
    file.write_text(file.read_text().replace("x + 1", "x + 2"))
    with pytest.raises(guard.UnknownTokasaurus) as refused:
        guard.require([FUNCTION, METHOD])
    message = str(refused.value)
    assert "differs  tokasaurus.some.known (replaced)" in message
    assert FUNCTION.sha256 in message
    assert sha256(KNOWN_SOURCE.replace("x + 1", "x + 2")) in message
    assert "Thing.method" not in message
    assert "--defence restart" in message and guard.COMMIT in message


@pytest.mark.parametrize(
    "known",
    [Known("some", "gone", "0"), Known("some", "Thing.gone", "0"), Known("gone", "known", "0")],
)
def test_a_missing_function_is_refused_with_its_name(fake: Path, known: Known) -> None:
    with pytest.raises(guard.UnknownTokasaurus, match=f"missing  {known.path}"):
        guard.require([FUNCTION, known])


def test_something_without_source_is_refused(fake: Path) -> None:
    some = importlib.import_module("tokasaurus.some")
    some.known = len
    with pytest.raises(guard.UnknownTokasaurus, match="missing  tokasaurus.some.known"):
        guard.require([FUNCTION])


def test_nothing_is_replaced_when_something_differs(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "KNOWN", (FUNCTION, Known("some", "Thing.method", "0" * 64)))
    monkeypatch.setattr(install, "_replacements", lambda: {"some:known": lambda original: print})
    with pytest.raises(guard.UnknownTokasaurus):
        install.install()
    assert importlib.import_module("tokasaurus.some").known(1) == 2


def test_every_replaced_function_is_guarded() -> None:
    guarded = {known.path for known in guard.KNOWN if known.replaced}
    replaced = {f"tokasaurus.{path.replace(':', '.')}" for path in install._replacements()}
    assert guarded == replaced | {"tokasaurus.model.llama.LlamaModel.forward"}
    assert len({known.path for known in guard.KNOWN}) == len(guard.KNOWN)
    assert all(len(known.sha256) == 64 for known in guard.KNOWN)


# --- command line -------------------------------------------------------------------------------


def test_check_says_ok_and_ends_with_0(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "KNOWN", (FUNCTION, METHOD))
    assert main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       tokasaurus.some.known (replaced)")
    assert lines[1].startswith("ok       tokasaurus.some.Thing.method (relied on)")


def test_check_names_what_is_wrong_and_ends_with_1(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        guard, "KNOWN", (FUNCTION, Known("some", "Thing.method", "0" * 64), Known("no", "f", "0"))
    )
    assert main(["--check"]) == 1
    out = capsys.readouterr().out
    assert "differs  tokasaurus.some.Thing.method" in out
    assert "missing  tokasaurus.no.f" in out
    assert "--defence restart" in out


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
    said = capsys.readouterr().err
    assert "not the one that the repairs were written for" in said
    assert "tokasaurus.manager.allocator.pick_blocks_for_allocation" in said


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
    config, preparation = seen[0]
    assert (config.model, config.port) == ("a/b", "1")
    assert preparation == launch.Preparation(repair=False, host="0.0.0.0")


def test_only_this_machine_is_listened_to_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.append(options))
    launch.Preparation(repair=False, host="127.0.0.1").apply()
    uvicorn.run("app", host="0.0.0.0", port=1)  # type: ignore[arg-type]
    assert seen == [{"host": "127.0.0.1", "port": 1}]
