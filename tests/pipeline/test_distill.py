"""``distill``: what is refused before anything is written, what it costs, and one whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cartridge_distill.cartridge.run_folder import model_of, resolve_cartridge
from tests.pipeline.conftest import SMALL, Typed
from tests.training.conftest import child_environment
from verl_patches import distill
from verl_patches.launching import checks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"DOCUMENTS": "handbok"}, "there is no such file or folder; fix: did you mean .*handbook"),
        ({"DOCUMENTS": "notes"}, "notes: not a kind that is read .*; fix: save it as"),
        ({"--questions": "none.csv"}, "--questions none.csv: there is no such file; fix: "),
        ({"--questions": "bad.csv"}, "'anwser' is unknown; fix: did you mean 'answer'"),
        ({"--model": "./no/such"}, "--model ./no/such: there is no such folder; fix:"),
        ({"--out": "file/run"}, "is no folder; fix: give another --out"),
        ({"--tokens": "17"}, "--tokens 17 is no multiple of 16.*fix: give 16 or 32"),
        ({"--tokens": "4096"}, "--tokens 4096: the cartridge begins .*fix: give --tokens 144"),
        ({"--tokens": "160"}, "--tokens 160: the cartridge begins .*fix: give --tokens 144"),
        ({"--steps": "0"}, "--steps 0 is too few; fix: give 1 or more"),
        ({"--log-to": "excel"}, "excel is no logger here"),
        (
            {"--server": "http://127.0.0.1:9", "--wait": "0.1"},
            "127.0.0.1:9 .*; fix: .*or leave --server out",
        ),
        ({"override": "data.shufle=False"}, "data.shufle: .*; fix: did you mean data.shuffle"),
        ({"--stps": "3"}, "--stps: no such option; fix: did you mean --steps"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_written(
    changes: dict[str, str],
    said: str,
    handbook: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "check_verl", lambda: None)
    (tmp_path / "file").touch()
    (tmp_path / "notes").write_text("A file without an ending.")
    (tmp_path / "bad.csv").write_text("question,anwser\nWhen?,Now\n")
    before = sorted(tmp_path.rglob("*"))
    given = {"--model": str(model_folder), "--out": "run"}
    words = [str(changes.pop("DOCUMENTS", handbook)), *SMALL]
    override = changes.pop("override", None)
    for name, value in {**given, **changes}.items():
        words += [name, value]
    try:
        status = distill.main([*words, *([override] if override else [])])
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    shown = capfd.readouterr().err
    assert status in (1, 2) and re.search(said, shown), shown
    assert "error: " in shown and "Traceback" not in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cartridge_far_longer_than_the_documents_is_refused_without_torch(
    handbook: Path, model_folder: Path, tmp_path: Path
) -> None:
    """torch and transformers take seconds to import; here they cannot be."""
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from verl_patches.distill import main; sys.exit(main())"
    )
    words = [str(handbook), "--model", str(model_folder), *SMALL, "--tokens", "4096"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--out", str(tmp_path / "run")],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "the longest has 149; fix: give --tokens 144" in done.stderr


def test_a_dry_run_says_the_cost_and_writes_nothing(
    typed: Typed, handbook: Path, model_folder: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = typed("distill", handbook, "--model", model_folder, *SMALL, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("2 steps x 4 answers x at most 4 = 32", "GiB are free", "s a step", "disk:"):
        assert words in done.stdout
    assert "nothing was written" in done.stdout and "Wrote" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_one_command_from_a_record_to_a_cartridge_and_its_report(
    typed: Typed, record: Path, model_folder: Path, tmp_path: Path
) -> None:
    """One run, looked at from all sides: a start costs a minute."""
    words = ["distill", record, "--model", model_folder, "--out", "runs/mine", *SMALL]
    words += ["--log-to", "wandb,tensorboard", "--test-every", "1"]
    done = typed(*words, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    run = tmp_path / "runs" / "mine"
    lines = done.stdout.splitlines()
    assert sum(line.startswith("   step ") for line in lines) == 2
    # 36 steps are usual, and the demo says which model it gets; a slow machine says that it waits.
    said = [line for line in lines if not line.endswith(" s ...")]
    assert len(said) - 2 + 36 + 1 < 60
    assert "held out: KL" in done.stdout and "before step 1: KL" in done.stdout
    assert "3 versions served (the first, and one a step)" in done.stdout
    assert "trained cartridge" in done.stdout
    following = lines[lines.index("next:") + 1 :]
    assert [
        next(w for w in line.split() if w in ("chat", "serve", "distill", "push"))
        for line in following
    ] == ["chat", "serve", "distill", "push"]
    assert all("runs/mine" in line for line in following)
    assert (run / "report.html").is_file() and (run / "evaluation" / "evaluation.json").is_file()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))

    assert resolve_cartridge(run) == str(run / "cartridge") and model_of(run) == str(model_folder)
    about = json.loads((run / "cartridge" / "cartridge.json").read_text())
    kl = {
        json.loads(line)["step"]: json.loads(line)["data"]["val/kl"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "val/kl" in json.loads(line)["data"]
    }
    best = min((1, 2), key=lambda step: kl[step])
    assert about["step"] == best == about["metrics"]["chosen"]["step"]
    assert about["metrics"]["chosen"]["kl"] == pytest.approx(kl[best])

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = typed(*words, WANDB_MODE="offline")
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout
    assert "trained cartridge" in again.stdout
    other = typed(*words, "--lr", "0.5")
    assert other.returncode == 2 and "lr: 0.02 there, 0.5 now" in other.stderr
    (run / "notes.txt").write_text("mine")
    over = typed(*words, "--overwrite")
    assert over.returncode != 0 and "notes.txt" in over.stderr
    (run / "notes.txt").unlink()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    shown = typed("info", "runs/mine")
    assert shown.returncode == 0 and "metrics.chosen.step" in shown.stdout
    part = ["eval", "runs/mine", "--limit", "1", "--samples", "1"]
    refused = typed(*part)
    assert refused.returncode == 1 and "fix: give the part an --out" in refused.stderr
    evaluated = typed(*part, "--out", "part")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "trained cartridge" in evaluated.stdout
