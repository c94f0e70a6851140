"""The folder of a run: what it goes on from, and what it refuses to touch."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import OWNED
from cartridge_distill.util.same_settings import OtherSettings
from verl_patches.pipeline.settings import Distillation, Prepared, as_run
from verl_patches.pipeline.state import DATA, STAGES, TRAINING, State, begin, check_folder


@pytest.fixture
def wanted(handbook: Path, tmp_path: Path) -> Distillation:
    return Distillation(str(handbook), "someone/model", tmp_path / "run", steps=8)


def begun(wanted: Distillation, *done: str) -> None:
    state = check_folder(wanted, overwrite=False)
    begin(state)
    for stage in done:
        state.finish(stage)
    state.release()


def look(wanted: Distillation, overwrite: bool = False) -> State:
    """What another command would find."""
    state = check_folder(wanted, overwrite)
    state.release()
    return state


def saved(wanted: Distillation, step: int) -> None:
    (wanted.out / "checkpoints").mkdir()
    (wanted.out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_looking_writes_nothing_and_what_is_done_is_remembered(wanted: Distillation) -> None:
    assert look(wanted).is_new and not wanted.out.exists()
    begun(wanted, DATA)
    again = look(wanted)
    assert again.done == [DATA] and not again.is_new and not again.finished
    for stage in STAGES[1:]:
        again.finish(stage)
    assert look(wanted).finished


def test_settings_that_differ_are_refused_by_name(wanted: Distillation) -> None:
    begun(wanted, DATA)
    saved(wanted, 2)
    with pytest.raises(OtherSettings, match=r"(?s)fix: give the same.*lr: 0.02 there, 0.5 now"):
        look(replace(wanted, lr=0.5))
    with pytest.raises(OtherSettings, match="overrides"):
        look(replace(wanted, overrides=("data.shuffle=False",)))
    may = replace(wanted, threads=7, server="http://one:1", log_to="tensorboard", wait=3.0)
    assert look(may).done == [DATA]


def test_before_the_first_saved_step_other_settings_lose_nothing(wanted: Distillation) -> None:
    begun(wanted, DATA)
    state = look(replace(wanted, lr=0.5))
    assert state.is_new and state.done == []
    (wanted.out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        look(replace(wanted, lr=0.5))


def test_documents_that_changed_are_another_run(wanted: Distillation, handbook: Path) -> None:
    begun(wanted, DATA, TRAINING)
    (handbook / "a.txt").write_text("something else entirely")
    with pytest.raises(ConfigError, match="has changed since .* began; fix: "):
        look(wanted)


def test_questions_that_changed_are_another_run(wanted: Distillation, tmp_path: Path) -> None:
    questions = tmp_path / "questions.csv"
    questions.write_text("question,answer\nWhen?,At noon\nWhere?,At the door\n")
    asked = replace(wanted, questions=str(questions))
    begun(asked, DATA, TRAINING)
    assert look(asked).done == [DATA, TRAINING]
    with pytest.raises(ConfigError, match="questions"):
        look(wanted)
    questions.write_text("question,answer\nWhen?,At nine\nWhere?,At the door\n")
    with pytest.raises(ConfigError, match="questions.csv has changed since"):
        look(asked)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(wanted: Distillation, overwrite: bool) -> None:
    wanted.out.mkdir()
    (wanted.out / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="did not write"):
        look(wanted, overwrite)
    (wanted.out / OWNED).touch()  # a run's folder, with somebody's file in it
    (wanted.out / "metrics.jsonl").touch()
    with pytest.raises((FileExistsError, ConfigError)):
        look(wanted, overwrite)
    assert (wanted.out / "thesis.tex").read_text() == "precious"


def test_an_earlier_run_is_replaced_when_asked(wanted: Distillation) -> None:
    begun(wanted, DATA, TRAINING)
    (wanted.out / "metrics.jsonl").write_text("{}")
    state = check_folder(replace(wanted, lr=0.5), overwrite=True)
    begin(state)
    state.release()
    assert sorted(path.name for path in wanted.out.iterdir()) == [OWNED, "distill.json"]
    assert json.loads((wanted.out / "distill.json").read_text())["settings"]["lr"] == 0.5


def test_two_commands_do_not_work_in_one_folder(wanted: Distillation) -> None:
    state = check_folder(wanted, False)
    begin(state)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="another command works in .*; fix: wait"):
            check_folder(replace(wanted, lr=0.5), overwrite)
    state.release()
    assert look(wanted, True).is_new


def test_a_state_that_is_damaged_is_named(wanted: Distillation) -> None:
    begun(wanted)
    (wanted.out / "distill.json").write_text("{")
    with pytest.raises(ConfigError, match=r"distill.json cannot be read .*fix: "):
        look(wanted)


@pytest.mark.parametrize("steps", [1, 2, 7, 36, 100, 2000])
def test_every_validated_step_is_saved_and_little_is_lost(wanted: Distillation, steps: int) -> None:
    run = as_run(replace(wanted, steps=steps), data=Prepared(questions=3))
    assert run.test_every and run.save_every and run.test_every % run.save_every == 0
    assert run.save_every <= max(1, steps // 12) and run.save_every <= 25
    without = as_run(replace(wanted, steps=steps))
    assert without.test_every is None and without.save_every == min(25, max(1, steps // 12))


def test_several_documents_begin_as_the_one_that_was_chosen(wanted: Distillation) -> None:
    key = "actor_rollout_ref.actor.cartridge.init_document"
    assert f"{key}='b.txt'" in as_run(wanted, data=Prepared(init_document="b.txt")).overrides or (
        f"{key}=b.txt" in as_run(wanted, data=Prepared(init_document="b.txt")).overrides
    )
    mine = replace(wanted, overrides=(f"{key}=a.txt",))
    run = as_run(mine, data=Prepared(init_document="b.txt"))
    assert [o for o in run.overrides if o.startswith(key)] == [f"{key}=a.txt"]


def test_what_the_cartridge_begins_as(wanted: Distillation) -> None:
    key = "actor_rollout_ref.actor.cartridge.init"
    spans = replace(wanted, init="spans")
    assert f"{key}=spans" in as_run(spans).overrides and not spans.begins_elsewhere
    mine = replace(spans, overrides=(f"{key}=attended",))  # the last one counts
    said = [each for each in as_run(mine).overrides if each.startswith(f"{key}=")]
    assert said == [f"{key}=spans", f"{key}=attended"] and not mine.begins_elsewhere
    assert replace(spans, overrides=(f"{key}=random",)).begins_elsewhere
    again = as_run(replace(spans, rebuild="runs/old")).overrides
    assert [each for each in again if each.startswith(f"{key}=")] == [f"{key}=checkpoint"]


def test_a_server_that_was_given_gets_its_versions_by_upload(wanted: Distillation) -> None:
    assert as_run(wanted).sync_dir == wanted.out / "cartridges"
    given = as_run(replace(wanted, server="http://h:1"), "http://h:1")
    assert given.sync_dir is None and given.server == ("http://h:1",)


def test_a_run_over_names_that_are_no_text_goes_on(wanted: Distillation, tmp_path: Path) -> None:
    """File systems take any bytes for a name; the state's file has to hold them."""
    folder = tmp_path / os.fsdecode(b"h\xe4ndbuch")
    folder.mkdir()
    document = folder / os.fsdecode(b"b\xffad.txt")
    document.write_text("The house stands by the sea.")
    for documents in (document, folder):
        named = replace(wanted, documents=str(documents))
        begun(named, DATA, TRAINING)
        assert look(named).done == [DATA, TRAINING]
        other = replace(wanted, documents=str(tmp_path / os.fsdecode(b"h\xfcndbuch")))
        with pytest.raises(OtherSettings, match="documents"):
            look(other)
        assert look(named, overwrite=True).is_new
        shutil.rmtree(wanted.out)
