"""What is printed to be pasted gives the very names again, through bash and through Hydra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from datasets import load_dataset
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from pyarrow import parquet
from typer.testing import CliRunner

from cartridge_distill.cli.main import app
from cartridge_distill.data import command as prepare
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.util.pasting import hydra_value, pasted_setting
from tests.data.documents.made import prose
from tests.tiny import byte_tokenizer, tiny_model
from verl_patches import launch
from verl_patches.config.data_files import named, path_of, problem
from verl_patches.launching.configured import configuration
from verl_patches.launching.settings import CONFIG_FOLDER, Run

INIT = "actor_rollout_ref.actor.cartridge.init_document"
_SHOW = "import json, sys; print(json.dumps(sys.argv[1:]))"
NAMES = [
    *("x#1", "a,b", "[x]", "it's", "a=b", "x y", "{a}", "http://h:1/x?y=1", "Bücher [1], #2"),
    *("null", "true", "12", "1e3", "1_000", ".5", "NaN", "a${b}", "a$b", "a`b", "!x", '"x"', "-x"),
    *("a\\", "a\\'b", "\\\\", "~/x", "(x)", "x*", "'q'", "日本", "a%b", "x;y", "", "a\tb"),
]


def pasted(line: str) -> list[str]:
    """The words that a program gets when bash reads a line, the program's own name first."""
    script = f"{sys.executable} -c '{_SHOW}' {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    words: list[str] = json.loads(done.stdout)
    return words


def read_by_hydra(overrides: list[str]) -> object:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_FOLDER / "platform"), version_base=None):
        return compose("cpu", overrides=overrides).trainer.device


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_survives_bash_and_hydra(name: str) -> None:
    assert read_by_hydra(pasted(pasted_setting("trainer.device", name))) == name
    assert read_by_hydra([f"trainer.device={hydra_value(name)}"]) == name


@pytest.mark.parametrize("value", [None, True, 3, 0.02, 1e-05])
def test_what_is_no_text_stays_none(value: object) -> None:
    found = read_by_hydra([f"trainer.device={hydra_value(value)}"])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("folder", ["Bücher [1], teil #2", "it's {mine} = yours"])
def test_the_hints_of_prepare_work_when_they_are_pasted(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, a model and documents whose names every reader on the way would misread."""
    model, documents = tmp_path / f"model, {folder}", tmp_path / folder
    tiny_model().config.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    documents.mkdir()
    for number, name in enumerate(("größe, [a]", "b #2")):
        (documents / f"{name}.txt").write_text(prose(5, first=50 * number))
    out = tmp_path / f"out {folder}"
    typed = ["--tokenizer", str(model), "--data", str(documents), "--out", str(out), "--rows", "40"]
    typed += ["--prompt-tokens", "400", "--response-tokens", "10", "--teacher-context", "700"]
    assert prepare.main(typed) == 0
    lines = capsys.readouterr().out.splitlines()
    [hint] = [line.rpartition("train command: ")[2] for line in lines if INIT in line]
    serve, train = (pasted(line) for line in lines[lines.index("next:") + 1 :])
    assert CliRunner().invoke(app, [*serve[serve.index("serve") :], "--help"]).exit_code == 0
    assert serve[-2:] == ["--model", str(model)]
    run, _ = launch.parse([*train[train.index("train") + 1 :], *pasted(hint)])
    assert (run.model, run.data, run.prompt_tokens) == (str(model), out, 400)
    settings = configuration(run)
    chosen = settings.actor_rollout_ref.actor.cartridge.init_document
    assert chosen == DocumentStore.from_file(out / "documents.jsonl").ids[0]
    assert settings.actor_rollout_ref.model.path == str(model)
    assert path_of(settings.data.train_files) == out / "train.parquet"
    rows = load_dataset("parquet", data_files=settings.data.train_files, cache_dir=str(tmp_path))
    assert len(rows["train"]) == 40  # as veRL reads them
    assert settings.actor_rollout_ref.actor.cartridge.documents == str(out / "documents.jsonl")


@pytest.mark.parametrize("name", ["[x]", "a?b", "a*b", "[!a]", "a[b", "plain", "[[]x]"])
def test_a_data_folder_may_look_like_a_pattern(name: str, tmp_path: Path) -> None:
    """veRL's reader would find nothing, or the files of all folders that fit."""
    for folder in (name, "axb"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "train.parquet"
        parquet.write_table(pyarrow.table({"folder": [folder]}), file)
    file = tmp_path / name / "train.parquet"
    assert path_of(named(file)) == file and problem("data.train_files", named(file)) is None
    [row] = load_dataset("parquet", data_files=named(file), cache_dir=str(tmp_path / "c"))["train"]
    assert row["folder"] == name


def test_a_pattern_and_a_chain_are_refused(tmp_path: Path) -> None:
    assert "reads every file that fits" in str(problem("data.train_files", "/data/*/train.parquet"))
    assert "rename the folder" in str(problem("data.val_files", "/data/a::b/val.parquet"))


def test_a_name_reaches_the_check_and_not_hydras_grammar(tmp_path: Path) -> None:
    run = Run(data=tmp_path, name="Müller [x], y", served_model="a, b", server=("http://h:1",))
    assert configuration(run).trainer.experiment_name == "Müller [x], y"
    assert configuration(run).actor_rollout_ref.actor.cartridge.sync_base_model == "a, b"


def test_the_command_that_writes_missing_data_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "no [such], #1"
    with pytest.raises(launch.checks.NotReady) as refused:
        launch.checks.check_data(Run(model="my model", data=folder))
    found = re.search("`(.* prepare .*)`", str(refused.value))
    assert found is not None
    words = pasted(found[1])
    options = prepare.parse(words[words.index("prepare") + 1 :])
    assert (options.tokenizer, options.out) == ("my model", folder)
