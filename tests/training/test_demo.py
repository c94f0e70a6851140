"""The demo and the comparison made of it: which run veRL is asked for, and its refusals.

That run itself takes ten minutes and is `make demo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cartridge_distill.util.processor import DtypeChoice
from tests.training.rows import write_rows
from verl_patches import demo
from verl_patches.config.checks import check_run_config
from verl_patches.distill import settings_of
from verl_patches.launching import checks
from verl_patches.launching.command import overrides
from verl_patches.launching.settings import CONFIG_FOLDER
from verl_patches.pipeline.settings import Distillation, Prepared, as_run
from verl_patches.pipeline.stages import environment_of

OPTIM = "actor_rollout_ref.actor.optim"
CARTRIDGE = "actor_rollout_ref.actor.cartridge"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run's folder in which the data are prepared; their contents are the workers' business."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", train=18 * 48)
    return tmp_path


def settings(arguments: list[str], model: Path, out: Path) -> Distillation:
    """What the demo asks of the pipeline with these arguments."""
    return settings_of(demo.parse([*arguments, "--model", str(model), "--out", str(out)]))


def configured(arguments: list[str], patched: Path, model: Path, out: Path) -> Any:
    """The configuration that veRL gets from the demo with these arguments."""
    search = f"hydra.searchpath=[file://{patched / 'verl/trainer/config'}]"
    run = as_run(settings(arguments, model, out), "http://127.0.0.1:1", Prepared(questions=30))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        return compose("cartridge_distill", overrides=[*overrides(run), search])


def test_the_demo_is_a_configuration_that_can_train(
    patched: Path, model_folder: Path, out: Path
) -> None:
    config = configured([], patched, model_folder, out)
    check_run_config(config)
    actor = config.actor_rollout_ref.actor
    assert (actor.cartridge.lr, actor.optim.lr, actor.optim.min_lr_ratio) == (0.02, 0.02, 0.1)
    assert actor.optim.lr_scheduler_type == "cosine"
    assert (actor.cartridge.init, config.trainer.total_training_steps) == ("attended", 18)
    assert actor.cartridge.on_policy_fraction == 1.0
    assert config.data.train_batch_size == 48 and config.data.max_response_length == 6
    steps = config.trainer.total_training_steps
    assert steps % config.trainer.test_freq == 0  # the last validation is of the finished cartridge
    assert config.trainer.test_freq % config.trainer.save_freq == 0  # what is validated is saved


def test_what_a_person_adds_wins(patched: Path, model_folder: Path, out: Path) -> None:
    typed = ["--steps", "2", "--lr", "0.01", f"{OPTIM}.lr_scheduler_type=constant"]
    config = configured(typed, patched, model_folder, out)
    check_run_config(config)
    optim = config.actor_rollout_ref.actor.optim
    assert (optim.lr_scheduler_type, optim.lr) == ("constant", 0.01)
    assert config.trainer.total_training_steps == 2


def test_on_a_gpu_server_and_trainer_compute_alike(
    patched: Path, model_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = configured(["--device", "cuda"], patched, model_folder, out)
    check_run_config(config)
    actor = config.actor_rollout_ref.actor
    assert config.trainer.device == "cuda" and actor.fsdp_config.model_dtype == "bfloat16"
    assert config.ray_kwargs.ray_init.num_cpus >= 8  # fewer, and TransferQueue waits for ever
    assert actor.cartridge.max_logprob_diff is None  # compares with the rounding
    config = configured(["--device", "cuda", "--dtype", "float32"], patched, model_folder, out)
    check_run_config(config)
    actor = config.actor_rollout_ref.actor
    assert actor.fsdp_config.model_dtype == "float32"
    assert 1e-3 < actor.cartridge.max_logprob_diff < 0.5
    monkeypatch.setenv("VERL_PLATFORM", "cpu")  # left over from a run on the CPU
    found = environment_of(settings(["--device", "cuda"], model_folder, out))
    assert found["VERL_PLATFORM"] == ""


def test_bfloat16_on_a_cpu_is_compared_with_the_rounding(
    patched: Path, model_folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(["--dtype", "bfloat16"], patched, model_folder, out)
    check_run_config(config)
    actor = config.actor_rollout_ref.actor
    assert (config.trainer.device, actor.fsdp_config.model_dtype) == ("cpu", "bfloat16")
    assert actor.cartridge.max_logprob_diff is None
    assert capsys.readouterr().out.startswith("== dtype: bfloat16 (as asked; this CPU has ")
    own = ["--dtype", "bfloat16", f"{CARTRIDGE}.max_logprob_diff=0.7"]
    config = configured(own, patched, model_folder, out)
    assert config.actor_rollout_ref.actor.cartridge.max_logprob_diff == 0.7


@pytest.mark.parametrize("server", [None, "http://127.0.0.1:9"])
def test_the_dtype_on_a_cpu_follows_from_the_processor(
    server: str | None,
    model_folder: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server that is there already has the dtype that it was started with."""
    choice = DtypeChoice("bfloat16", "this CPU has AMX")
    monkeypatch.setattr("verl_patches.distill.choose_dtype", lambda _: choice)
    found = settings(["-v", *(["--server", server] if server else [])], model_folder, out)
    assert found.dtype == ("bfloat16" if server is None else "float32")
    assert f"== dtype: {found.dtype} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--device", "cuda"], "sees no GPU here"),
    ],
)
def test_a_device_that_cannot_be_is_refused(
    typed: list[str],
    said: str,
    model_folder: Path,
    tmp_path: Path,
    patched: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(checks, "check_verl", lambda: None)
    typed = [*typed, "--model", str(model_folder), "--out", str(tmp_path / "run")]
    assert demo.main(typed) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.parse(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cartridge-distill demo" in text and "falls to a tenth along a cosine (0.02)" in text


def test_a_folder_that_is_not_the_demos_is_left_alone(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for more in ([], ["--overwrite"]):
        assert demo.main(["--out", str(tmp_path), "--model", str(model_folder), *more]) == 2
        assert "did not write" in capsys.readouterr().err
        assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_data_that_is_not_there_is_no_other_data(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "record.json").write_text("{}")
    typed = ["--out", str(tmp_path / "run"), "--model", str(model_folder)]
    assert demo.main([*typed, "--data", str(tmp_path / "recrod.json")]) == 2
    said = capsys.readouterr().err
    assert "error:" in said and f"did you mean {tmp_path / 'record.json'}?" in said
    assert not (tmp_path / "run").exists()
