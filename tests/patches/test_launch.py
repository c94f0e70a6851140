"""The launcher: what describes a run, what veRL is asked for, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.util.errors import ConfigError
from tests.patches.failing import failing
from tests.training.conftest import server  # noqa: F401  (a fixture)
from tests.training.rows import write_rows
from verl_patches import launch
from verl_patches.config.checks import check_run_config
from verl_patches.launching import checks
from verl_patches.launching.command import environment, overrides, python_path
from verl_patches.launching.settings import CONFIG_FOLDER, Run, read_file

ACTOR = "actor_rollout_ref.actor"


def configured(run: Run, verl: Path) -> Any:
    """veRL's configuration of a run."""
    search = f"hydra.searchpath=[file://{verl / 'verl/trainer/config'}]"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        return compose("cartridge_distill", overrides=[*overrides(run), search])


def test_every_setting_reaches_verl(
    patched: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The data folder's name has what Hydra's grammar would read: a comma and blanks."""
    (tmp_path / "served").mkdir()
    run = Run(
        model=str(model_folder),
        data=data,
        server=("http://one:1", "http://two:2"),
        out=tmp_path / "it's",
        served_model="served",
        sync_dir=tmp_path / "served",
        tokens=64,
        lr=0.5,
        batch=6,
        steps=7,
        temperature=0.25,
        prompt_tokens=33,
        response_tokens=44,
        seed=9,
        device="cpu",
        dtype="float32",
        save_every=3,
        test_every=2,
        overrides=(f"{ACTOR}.cartridge.topk=50",),
    )
    config = configured(run, patched)
    check_run_config(config)
    cartridge, trainer = config.actor_rollout_ref.actor.cartridge, config.trainer
    rollout = config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == str(model_folder)
    assert config.data.train_files == str(data / "train.parquet")
    assert cartridge.documents == str(data / "documents.jsonl")
    assert cartridge.eval_questions == str(data / "eval.json")
    assert list(rollout.custom.tokasaurus_url) == ["http://one:1", "http://two:2"]
    assert trainer.default_local_dir == str(tmp_path / "it's" / "checkpoints")
    assert (cartridge.transport, cartridge.sync_dir) == ("shared_dir", str(tmp_path / "served"))
    assert (cartridge.sync_base_model, cartridge.run_name) == ("served", "my-data-v2")
    assert (cartridge.num_tokens, cartridge.lr, cartridge.topk) == (64, 0.5, 50)
    assert (config.data.train_batch_size, rollout.temperature, config.data.seed) == (6, 0.25, 9)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (33, 44)
    assert (trainer.total_training_steps, trainer.total_epochs, trainer.save_freq) == (7, 7, 3)
    assert (trainer.test_freq, trainer.val_before_train, trainer.device) == (2, True, "cpu")


def test_the_file_and_the_flags_say_the_same_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: d\nserver: http://one:1\ntokens: 64\nlr: 1\nresponse-tokens: 5\nsave_every: 4\n"
        "overrides: [a.b=1]\n"
    )
    run, own = launch.parse(["--config", str(file), "--tokens", "32", "c.d=2", "--dry-run"])
    flags = ["--data", "d", "--server", "http://one:1", "--tokens", "32", "--lr", "1"]
    flags += ["--response-tokens", "5", "--save-every", "4", "a.b=1", "c.d=2"]
    assert run == launch.parse(flags)[0]
    assert run.overrides == ("a.b=1", "c.d=2") and own.dry_run and not own.verbose


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("tokns: 3\nlearning: 4", "unknown: tokns, learning; fix: give one of batch, "),
        ("tokens: many", "tokens: 'many' is not a whole number"),
        ("tokens: 1.5", "tokens: 1.5 is not a whole number"),
        ("tokens: true", "tokens: True is not a whole number"),
        ("lr: 2e-2", "YAML reads 2e-2 as a text: write 0.02"),
        ("server: [1]", "server: [1] is no list of texts"),
        ("save-every: 1\nsave_every: 2", "save_every is there twice"),
        ("- tokens", "fix: write one a line"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, written: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(written)
    with pytest.raises(ConfigError) as refused:
        read_file(file)
    assert said in str(refused.value) and str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--tokens", "0"], "--tokens 0 is too few; fix: give 1 or more"),
        (["--lr", "-1"], "--lr -1.0 is too little; fix: give more than 0"),
        (["--temperature", "-0.5"], "--temperature -0.5"),
        (["topk"], "'topk' is no override of veRL's; fix: write name=value"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(typed) == 2
    assert said in capsys.readouterr().err


def test_a_file_may_not_name_a_device_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("device: tpu")
    with pytest.raises(
        ConfigError, match="--device tpu: there is none; fix: give one of cuda, cpu"
    ):
        launch.parse(["--config", str(tmp_path / "run.yaml")])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in Run.__dataclass_fields__:
        assert name == "overrides" or f"--{name.replace('_', '-')}" in text
    [shown_path] = [word for word in text.split() if word.endswith("cartridge_distill.yaml")]
    assert Path(shown_path).is_file()


def test_what_is_missing_is_said_with_the_command_that_makes_it(
    server: BackgroundServer,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    synced = ["--sync-dir", str(tmp_path / "cartridges")]
    typed = ["--device", "cpu", "--server", server.url, *synced, "--data", str(tmp_path / "no")]
    assert launch.main([*typed, "--model", "m"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'no' / 'train.parquet'}" in said
    assert f"prepare --data DOCUMENTS --tokenizer m --out {tmp_path / 'no'}" in said
    assert launch.main(["--device", "cpu"]) == 2
    assert "give --server URL" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_gpu_is_asked_for_only_of_the_machine_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(checks.NotReady, match="fix: --device cpu"):
        checks.check_device(Run(), {})
    checks.check_device(Run(), {"RAY_ADDRESS": "head:6379"})
    checks.check_device(Run(overrides=("trainer.nnodes=2",)), {})
    checks.check_device(Run(device="cpu"), {})


def test_the_environment_overrules_what_is_left_of_another_run(tmp_path: Path) -> None:
    run = Run(device="cuda", out=tmp_path, threads=3)
    found = environment(run, {"VERL_PLATFORM": "cpu", "RAY_DEDUP_LOGS": "1", "HOME": "/"})
    assert found["VERL_PLATFORM"] == "" and found["RAY_DEDUP_LOGS"] == "1"
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "metrics.jsonl")
    assert "OMP_NUM_THREADS" not in environment(Run(out=tmp_path), {"HOME": "/"})
    first, *rest = python_path({"PYTHONPATH": "/b:/a:/b"})["PYTHONPATH"].split(":")
    assert (Path(first) / "verl_patches").is_dir() and rest == ["/b", "/a"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["--steps", "6", "trainer.total_epochs=1"],
            "run would end after 2.*trainer.total_epochs=3",
        ),
        (["--batch", "17"], "16 rows, data.train_batch_size=17: that is not one step"),
        (["--save-every", "0"], "trainer.save_freq=0: steps between"),
        (["data.filter_overlong_prompts=True"], "filter_overlong_prompts=True: it counts with"),
        (["data.train_max_samples=4"], "4 rows, data.train_batch_size=8"),
        (["trainer.val_only=True"], "nothing would be trained"),
        (["--prompt-tokens", "20"], "16 prompts are over 20 tokens .row 0 has 58"),
        (["data.no_such_setting=1"], "data.no_such_setting: veRL has no setting of this name; fix"),
        (["data.shufle=False"], "data.shufle: .*; fix: did you mean data.shuffle"),
        (["data.bananas=1"], "data.bananas: .*; fix: .*--show-config"),
        (["--model", "no/such/folder"], "no/such/folder: there is no such folder"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_starts(
    server: BackgroundServer,  # noqa: F811
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: list[str],
    said: str,
) -> None:
    write_rows(data, train=16, words=10)
    failing(Run(), monkeypatch, "exit 0")
    known = ["--device", "cpu", "--server", server.url, "--data", str(data), "--batch", "8"]
    known += ["--sync-dir", str(tmp_path / "cartridges"), "--tokens", "16", "--steps", "2"]
    known += ["--prompt-tokens", "128", "--response-tokens", "8", "--out", str(tmp_path / "run")]
    known += ["--model", str(model_folder), "ray_kwargs.ray_init.num_cpus=8"]
    assert launch.main([*known, *typed]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        ("--server", "http://anna:hush@127.0.0.1:1"),
        ("--server", "http://127.0.0.1:1?token=hush"),
        ("+trainer.wandb_api_key=hush",),
        ("+x.modal_key=hush",),
        ("+x={api_key: hush}",),
        ("+x=http://anna:hush@host/y",),
        ("+x='Authorization: Bearer hush'",),
        ("--model", "https://anna:hush@host/model"),
    ],
)
def test_a_credential_is_refused_and_shown_nowhere(
    given: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a command line every process of the machine sees it."""
    out = tmp_path / "run"
    for mode in ("--dry-run", "--show-config", "--only-check"):
        typed = ["--out", str(out), "--model", "m", mode, *given]
        assert launch.main(typed) == 2
        shown = capfd.readouterr()
        assert "error:" in shown.err and "hush" not in shown.out + shown.err
    assert not out.exists()


def test_what_merely_looks_like_a_credential_is_hidden_where_it_is_printed(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Run(model="m", data=data, overrides=("+x.some_key=hush", "data.prompt_key=prompt"))
    assert launch.dry_run(run) == 0
    printed = capfd.readouterr().out
    assert "hush" not in printed and "data.prompt_key=prompt" in printed
    launch.record(replace(run, out=tmp_path / "run"), ["+x.some_key=hush"])
    written = (tmp_path / "run" / "recipe.json").read_text()
    assert "hush" not in written and "data.prompt_key=prompt" in written


def test_a_lost_tracker_ends_the_start_before_anything_is_written(
    server: BackgroundServer,  # noqa: F811
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, "check_verl", lambda: None)
    saved = tmp_path / "run" / "checkpoints" / "global_step_3"
    (saved / "actor").mkdir(parents=True)
    (saved / "data.pt").touch()
    write_rows(data, train=16)
    typed = ["--device", "cpu", "--server", server.url, "--model", str(model_folder)]
    typed += ["--data", str(data), "--out", str(tmp_path / "run"), "--sync-dir", str(tmp_path)]
    typed += ["--tokens", "16", "--batch", "8", "--steps", "2", "--prompt-tokens", "128"]
    typed += ["--response-tokens", "8", "ray_kwargs.ray_init.num_cpus=8"]
    for content in (None, b"\xff"):
        if content is not None:
            (saved.parent / "latest_checkpointed_iteration.txt").write_bytes(content)
        assert launch.main(typed) == 2
        assert "error:" in (said := capsys.readouterr().err) and "echo 3 >" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]
    run = Run(out=tmp_path / "run")
    assert "echo 3 >" in launch.how_to_go_on(run)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--log-to", "wandb,excel"], "--log-to wandb,excel: excel is no logger here; fix: give"),
        (["--tokns", "3"], "--tokns: no such option; fix: did you mean --tokens"),
        (["--ste", "3"], "--ste: no such option; fix:"),
    ],
)
def test_what_was_mistyped_is_named_with_the_nearest(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = launch.main(typed)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    assert status == 2 and f"error: {said}" in capsys.readouterr().err


def test_the_configuration_is_shown_by_verl_in_the_runs_own_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "check_verl", lambda: None)
    said = ["bash", "-c", 'echo "$VERL_PLATFORM $*"; exit 3', "bash"]
    monkeypatch.setattr(launch, "command", lambda run: [*said, f"tokens={run.tokens}"])
    assert launch.main(["--device", "cpu", "--tokens", "48", "--show-config"]) == 3
    assert capfd.readouterr().out == "cpu tokens=48 --cfg job\n"
