"""The commands of two pages run as they are written, in a fresh clone, on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, commands_in, marked_blocks, shell_blocks
from tests.docs.run_commands import run

PAGE = ROOT / "docs" / "getting-started.md"
STEPS = ROOT / "docs" / "training.md"


def test_a_failing_command_ends_the_session(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "<!-- commands: x -->\n```bash\n{}\n```\n"
    page.write_text(block.format("X=3") + block.format("sleep 100 &\n(exit $X)\ntouch reached"))
    assert run(page, "x", tmp_path, tmp_path / "log") == 3
    assert not (tmp_path / "clone" / "reached").exists()
    with pytest.raises(ValueError, match="no block marked"):
        run(page, "y", tmp_path)


def test_three_commands_are_marked_and_so_are_the_single_ones() -> None:
    said = "\n".join(marked_blocks(PAGE, "cpu"))
    for command in ("distill", "chat"):
        assert f"cartridge-distill {command} " in said, command
    said = "\n".join(marked_blocks(STEPS, "steps"))
    for command in ("prepare", "serve", "train", "eval", "report"):
        assert f"cartridge-distill {command} " in said, command


def test_the_readme_has_the_same() -> None:
    """Names stand there in place of paths; the options are those that the long test runs."""
    run_as_written = {
        command.words[1]: set(command.options)
        for block in marked_blocks(PAGE, "cpu")
        for command in commands_in(PAGE, block)
        if command.words[0] == "cartridge-distill"
    }
    (block,) = [body for body in shell_blocks(ROOT / "README.md") if "distill distill" in body]
    shown = commands_in(ROOT / "README.md", block)
    assert [c.words[1] for c in shown] == ["distill", "chat"]
    for command in shown:
        assert set(command.options) <= run_as_written[command.words[1]], str(command)


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("page", "name"), [(PAGE, "cpu"), (STEPS, "steps")], ids=["cpu", "steps"])
def test_the_commands_run_as_they_are_printed(
    page: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TOKASAURUS_API_KEY", raising=False)
    log = tmp_path / "log"
    status = run(page, name, tmp_path, log)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert status == 0, said[-6000:]
    made = tmp_path / "clone" / "runs" / ("mine" if name == "cpu" else "steps")
    assert (made / "report.html").is_file()
    assert (made / "cartridge" / "cartridge.safetensors").is_file()
    assert (made / "evaluation" / "evaluation.json").is_file()
    assert re.search(r"step 12/12 ", said)
