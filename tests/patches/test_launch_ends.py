"""How a run ends: the causes of a failure, the next commands, and what is no success."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import read_meta
from cartridge_distill.cartridge.run_folder import data_of, model_of, resolve_cartridge
from cartridge_distill.report.recipe import Recipe
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.util.processes import Supervisor
from tests.patches.failing import failing, saving
from tests.training.conftest import server  # noqa: F401  (a fixture)
from verl_patches import launch
from verl_patches.launching.following import causes, log_file
from verl_patches.launching.settings import Run

ACTOR = "actor_rollout_ref.actor"


def test_the_causes_of_a_failure_are_named_and_logs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(device="cpu", data=tmp_path, out=tmp_path)
    error = "cartridge_distill.util.errors.RolloutError: 3 prompts failed"
    failing(
        run,
        monkeypatch,
        f"echo '[cartridge] step 1/3  loss 0.5'; echo 'unrelated: x'; "
        f"printf '\\033[36m(Worker pid=7, ip=1.2.3.4)\\033[0m {error}\\n{error}\\n'; exit 7",
    )
    with Supervisor() as supervisor, pytest.raises(launch.TrainingFailed) as failed:
        launch.train(run, supervisor)
    assert failed.value.status == 7
    assert str(failed.value).splitlines()[0] == f"cause: {error}"
    assert str(failed.value).count("cause:") == 1
    printed = capsys.readouterr().out
    assert "   step 1/3  loss 0.5\n" in printed and "unrelated" not in printed
    failing(run, monkeypatch, "kill -9 $$")
    with Supervisor() as supervisor, pytest.raises(launch.TrainingFailed) as failed:
        launch.train(run, supervisor)
    assert failed.value.status == 128 + 9
    assert causes(tmp_path / "train.1.log") == [error]
    assert (tmp_path / "train.log").read_text() == ""
    assert log_file(tmp_path).exists() is False and (tmp_path / "train.2.log").exists()


def test_a_cause_has_what_it_lists(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "Error executing job with overrides: ['a: b']\n"
        "a.b.ConfigError: this cannot train:\n- one is wrong\n- two is wrong\n\n- no part\n"
        "(Worker pid=3) ValueError: bad\n"
    )
    assert causes(log) == [
        "a.b.ConfigError: this cannot train:\n  - one is wrong\n  - two is wrong",
        "ValueError: bad",
    ]


def test_a_run_ends_with_the_next_commands(
    server: BackgroundServer,  # noqa: F811
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, model = tmp_path / "a run", str(model_folder)
    saving(monkeypatch, out, 4)
    typed = ["--device", "cpu", "--server", server.url, "--model", model, "--data", str(data)]
    typed += ["--out", str(out), "--sync-dir", str(tmp_path / "cartridges"), "data.seed=5"]
    typed += ["--steps", "4", "--tokens", "16", "--response-tokens", "8", "--prompt-tokens", "128"]
    typed += ["ray_kwargs.ray_init.num_cpus=8"]
    assert launch.main(typed) == 0
    lines = capsys.readouterr().out.splitlines()
    why = "step 4 of 4: the last; no validation chose another"
    assert f"cartridge: {out / 'cartridge'} ({why})" in lines
    evaluation, chat, report = (shlex.split(line) for line in lines[lines.index("next:") + 1 :])
    for name, command in (("eval", evaluation), ("chat", chat), ("report", report)):
        assert command[-2:] == [name, str(out)]
    assert resolve_cartridge(out) == str(out / "cartridge")
    assert read_meta(out / "cartridge")["metrics"]["chosen"]["by"] == "the last step"
    recipe = Recipe.model_validate_json((out / "recipe.json").read_text())
    assert recipe.seed == 5 and recipe.name == "my-data-v2" and recipe.model == model
    assert recipe.command[-len(typed) - 1 :] == ["train", *typed] and recipe.data == str(data)
    assert model_of(out) == model and data_of(out) == str(data)


@pytest.mark.parametrize(
    ("saved", "without", "said"),
    [
        (2, "", "cartridge of step 4, the last one asked for, is not in .*saved is step 2"),
        (0, "", "is not in .*: no step was saved"),
        (4, "cartridge.safetensors", "step 4 lacks .'cartridge.safetensors'. in"),
    ],
)
def test_a_run_that_ended_early_is_no_success(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int, without: str, said: str
) -> None:
    """veRL ends with 0 in each of them."""
    run = Run(device="cpu", data=data, out=tmp_path / "run", steps=4)
    saving(monkeypatch, run.folder, saved, without)
    with Supervisor() as supervisor, pytest.raises(launch.TrainingFailed, match=said) as failed:
        launch.train(run, supervisor)
    assert failed.value.status == 1


def test_a_run_that_saves_nothing_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(device="cpu", data=data, out=tmp_path / "run", steps=2, save_every=-1)
    saving(monkeypatch, run.folder, 0)
    with Supervisor() as supervisor:
        assert launch.train(run, supervisor) is None
    launch.print_next(run, None)
    assert "none saved, for trainer.save_freq is -1" in capsys.readouterr().out
