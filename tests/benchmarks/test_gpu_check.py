"""The GPU check: refusals, stages that fail or are cut off, the table; the stages at toy size."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check.kernels import is_good
from benchmarks.gpu_check.stages import (
    Setup,
    Stage,
    demo_figures,
    loop_figures,
    read_figures,
    stages,
)
from benchmarks.gpu_check.table import ROWS, Outcome, markdown
from tests.training.conftest import Run


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    for folder in ("figures", "logs"):
        (tmp_path / folder).mkdir()
    return Setup("cpu", tmp_path, None, small=False, threads=1, no_model="no registry")


def test_without_a_gpu_it_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "table.md").write_text("figures of an earlier day")
    assert check.main(["--out", str(kept)]) == 1
    assert "sees no GPU here" in capsys.readouterr().err
    assert (kept / "table.md").exists()


def test_the_3b_shape_on_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.parse(["--device", "cpu"])
    assert "add --rehearse" in capsys.readouterr().err


def test_every_stage_has_rows(setup: Setup) -> None:
    assert [stage.name for stage in stages(setup)] == list(ROWS)


FIGURE = {"rows": 2, "new_tokens": 3, "seconds": 0.5, "forwards": 3, "peak_gib": None}


def script(setup: Setup, name: str, after: str) -> list[str]:
    """Writes a figure of the engine's, half of another, and goes on with ``after``."""
    text = json.dumps(FIGURE) + "\n" + json.dumps(FIGURE)[:20]
    path = str(setup.figures_of(name))
    return ["-c", f"open({path!r}, 'a').write({text!r})\n{after}"]


def test_a_stage_that_fails_stops_no_other_and_keeps_its_figures(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        Stage("engine", 60, script(setup, "engine", "raise SystemExit('the card fell off')")),
        # The sleep is the fault: the stage is cut off after its one second.
        Stage("sync", 1, ["-c", "import time; print('begun', flush=True); time.sleep(60)"]),
        Stage("demo", 60, ["-c", "1 / 0"], needs_model=True, collect=demo_figures),
        Stage("memory", 60, ["-c", "pass"]),
    ]
    assert not check.run(setup, chosen, 600, ["A card"])
    table = (setup.out / "table.md").read_text()
    assert "embedded server, 2 rows of 3 tokens | 12 tokens/s" in table
    assert "| **failed** | status 1, see logs/engine.log" in table
    assert "| **failed** | over its limit of 1 s" in table
    assert "| **failed** | the demo model is not there: no registry" in table
    assert "it ended well, and left no figure" in table
    assert "the card fell off" in capsys.readouterr().out
    assert read_figures(setup, chosen[0]) == [FIGURE]  # not the half one


def test_a_spent_budget_begins_nothing_more(setup: Setup) -> None:
    marker = setup.out / "ran"
    stage = Stage("engine", 60, ["-c", f"open({str(marker)!r}, 'w')"])
    assert not check.run(setup, [stage], 5, [])
    assert not marker.exists()
    assert "not begun: the budget is spent" in (setup.out / "table.md").read_text()


def test_the_demo_has_its_part_of_the_budget(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sleep takes all the seconds that it is given; it must leave the others theirs.
    slow = Stage("engine", 60, ["-c", "import time; time.sleep(60)"])
    last = Stage("sync", 60, ["-c", "pass"], reserved=28)
    assert not check.run(setup, [slow, last], 40, [])
    printed = capsys.readouterr().out
    assert "== engine (at most 12 s)" in printed
    [given] = re.findall(r"== sync \(at most (\d+) s\)", printed)
    assert int(given) >= 20


def test_what_is_delivered_is_two_files_after_every_stage(setup: Setup, tmp_path: Path) -> None:
    out = tmp_path / "delivered"
    engine = Stage("engine", 60, script(setup, "engine", "print('said')"))
    look = f"import os; assert sorted(os.listdir({str(out)!r})) == ['check.tgz', 'table.md']"
    assert not check.run(setup, [engine, Stage("sync", 60, ["-c", look])], 600, [], out)
    with tarfile.open(out / "check.tgz") as tar:
        names = set(tar.getnames())
    assert {"figures/engine.jsonl", "logs/engine.log", "logs/sync.log"} <= names
    table = (out / "table.md").read_text()
    assert "embedded server, 2 rows" in table and "status 1" not in table


KERNEL = {"kind": "llama", "dtype": "float32", "tokens": 70, "logits": 1e-6, "teacher": 1e-6}
KERNEL |= {"gradients": 1e-6, "unfused": False, "graphs": 4, "seconds": 1.0}


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"logits": 1e-2}, False),
        ({"logits": 1e-2, "dtype": "bfloat16"}, True),
        ({"gradients": float("nan")}, False),
        ({"unfused": True}, False),
        ({"error": "NoValidChoicesError: no kernel"}, False),
    ],
)
def test_a_kernel_is_right_only_within_its_bounds(change: dict[str, Any], good: bool) -> None:
    figure = KERNEL | change
    assert is_good(figure) is good
    table = markdown([], {"kernels": [figure]}, {"kernels": Outcome(3.0)})
    assert ("**wrong**" in table) is not good
    assert ("no kernel" in table) is ("error" in change)
    assert f"{int(good)} of 1 batches right" in table


def test_what_is_pasted_is_a_table() -> None:
    """A bar or a line break in an error must not make another cell or row."""
    figure = KERNEL | {"error": "a | b\nc"}
    lines = markdown(["head"], {"kernels": [figure]}, {"kernels": Outcome(3.0)}).splitlines()
    assert lines[:3] == ["head", "", "| Stage | What | Figure |"]
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines[2:])


def test_the_demo_that_was_cut_off_still_tells_its_steps(setup: Setup) -> None:
    assert demo_figures(setup) == []
    run = setup.out / "demo"
    run.mkdir()
    step = {
        "timing_s/step": 9.0,
        "actor/loss": 1.5,
        "actor/logprob_diff/max": 0.1,
        "actor/logprob_diff/mean": 0.01,
        "actor/frozen_tokens_changed": 0,
    }
    later = step | {"timing_s/step": 2.0, "actor/loss": 1.0, "actor/logprob_diff/max": 0.2}
    logged: list[dict[str, Any]] = [{"val/kl": 1.0}, step, later]
    lines = [json.dumps({"step": n, "data": data}) for n, data in enumerate(logged)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "da']))  # cut off in a line
    [found] = demo_figures(setup)
    assert (found["steps"], found["first_step_seconds"], found["step_seconds"]) == (2, 9.0, 2.0)
    assert found["logprob_diff_max"] == 0.2
    table = markdown([], {"demo": [found]}, {"demo": Outcome(300.0, "over its limit of 300 s")})
    assert "2 steps, the first 9.0 s" in table and "over its limit" in table


def test_the_large_run_tells_where_a_step_goes(setup: Setup) -> None:
    assert loop_figures(setup) == []
    run = setup.out / "loop"
    run.mkdir()
    step = {
        "timing_s/step": 9.0,
        "timing_s/rollout": 5.0,
        "timing_s/update": 3.0,
        "timing_s/update_weights": 1.0,
        "actor/seconds/teacher_forward": 8.0,
        "actor/loss": 1.5,
        "actor/logprob_diff/max": 0.1,
        "actor/logprob_diff/mean": 0.01,
        "actor/frozen_tokens_changed": 0,
        "actor/perf/max_memory_allocated_gb": 30.5,
        "tokens/trained": 4096,
    }
    logged = [step, step | {"actor/seconds/teacher_forward": 0.25}]
    lines = [json.dumps({"step": n, "data": data}) + "\n" for n, data in enumerate(logged)]
    (run / "metrics.jsonl").write_text("".join(lines))
    table = markdown([], {"loop": loop_figures(setup)}, {"loop": Outcome(60.0)})
    assert "rollout 5.00, update 3.00, update_weights 1.00, teacher_forward 0.25" in table
    assert "30.5 GiB" in table and "| 4096 |" in table


@pytest.mark.long
@pytest.mark.integration
def test_the_stages_run(run_python: Run, tmp_path: Path) -> None:
    """All but the demo, which the bundle's rehearsal runs."""
    names = [name for name in ROWS if name != "demo"]
    done = run_python(
        *("-m", "benchmarks.gpu_check", "--device", "cpu", "--rehearse", "--only", *names),
        *("--out", tmp_path / "check", "--threads", 1),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "wrong" not in done.stdout
    for what in ("8 of 8 batches right", "PEFT CARTRIDGE", "with 2 bases", "4 rows of 3 tokens"):
        assert what in done.stdout, done.stdout
    assert "optimizer step to served version" in done.stdout and "one step stale" in done.stdout
    assert "3B loop: seconds of a step after the first" in done.stdout
