"""benchmarks/alternatives.py: all ways compute the same, and one that does not is found out.

The children's code runs in this process here; the command with TRL is a long test that needs the
alternatives' environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import alternatives
from benchmarks.side_by_side import cases, environment, floor, ours, peft_loop, plain, table
from benchmarks.side_by_side import work as work_folder
from benchmarks.side_by_side.cases import Case, Sizes
from benchmarks.side_by_side.ours import Ours
from benchmarks.side_by_side.plain import Outcome
from benchmarks.side_by_side.table import Row
from benchmarks.side_by_side.work import Batch
from cartridge_distill.distill.loss import LOSSES, TeacherTopK
from cartridge_distill.model.loading import load_model
from cartridge_distill.util.errors import ConfigError
from tests.tiny import byte_tokenizer, save_model, tiny_model
from tests.training.conftest import Run

peft = pytest.importorskip("peft", reason="PEFT is not installed")

TEXT = "The harbour master keeps the keys of the north gate in a green box. " * 2
SIZES = Sizes(rollouts=5, repeats=1, reread=3)
CASE = Case(answer=4, cartridge=16)


def write_data(folder: Path, text: str = TEXT) -> Path:
    """Ten prompts of five lengths, and a document."""
    folder.mkdir(parents=True, exist_ok=True)
    about = [{"index": n, "document_id": "d"} for n in range(10)]
    prompts = [[{"role": "user", "content": "Who?" * (1 + n % 5)}] for n in range(10)]
    frame = pd.DataFrame({"prompt": prompts, "extra_info": about})
    frame.to_parquet(folder / "train.parquet")
    (folder / "documents.jsonl").write_text(json.dumps({"document_id": "d", "text": text}))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """Our way, on a tiny model."""
    folder = tmp_path_factory.mktemp("alternatives")
    save_model(tiny_model(), folder / "model")
    data, name = write_data(folder / "data"), str(folder / "model")
    return ours.run(load_model(name), byte_tokenizer(), name, data, CASE, SIZES)


def test_our_way_has_every_stage_and_answers_of_one_length(done: Ours, tmp_path: Path) -> None:
    assert [set(step) for step in done.steps] == [set(work_folder.STAGES)]
    assert all(seconds > 0 for step in done.steps for seconds in step.values())
    assert len(done.work.batches) == 2 and done.own < 1e-4
    for batch in done.work.batches:
        assert [len(answer) for answer in batch.answers] == [4] * 5
    work_folder.save(done.work, tmp_path)
    again = work_folder.load(tmp_path)
    assert again.batches == done.work.batches and again.document == done.work.document
    assert torch.equal(again.table_PE, done.work.table_PE)


@pytest.mark.parametrize("reread", [False, True])
def test_pefts_loop_computes_the_same(done: Ours, reread: bool) -> None:
    outcome = peft_loop.of_loop(done.work, reread)
    said = table.agreement("peft", outcome, done.work)
    assert "KL loss" in said and "rollout against" in said
    if reread:
        assert set(outcome.steps[0]) == {"teacher"} and "3 of 5 samples" in outcome.notes[0]
        assert outcome.logprobs is not None and len(outcome.logprobs) == 3 * 4
    else:
        assert set(outcome.steps[0]) == set(work_folder.STAGES)
        # After a step of each optimizer: the gradients were the same.
        assert outcome.losses == pytest.approx(done.work.losses, abs=1e-3)


def test_generate_behind_a_cache_draws_from_the_same(done: Ours) -> None:
    outcome = peft_loop.of_generate(done.work)
    assert "first token" in table.agreement("generate", outcome, done.work)
    assert set(outcome.steps[0]) == {"rollout"} and outcome.logprobs is None


def test_another_document_another_cartridge_and_a_dropped_one_are_found_out(done: Ours) -> None:
    other = replace(done.work, document=done.work.document[:-20])
    with pytest.raises(ConfigError, match="KL loss differ by .* nothing of it is reported"):
        table.agreement("peft", peft_loop.of_loop(other, True), done.work)
    moved = replace(done.work, table_PE=done.work.table_PE * 1.01)
    with pytest.raises(ConfigError, match="computes something else"):
        table.agreement("generate", peft_loop.of_generate(moved), done.work)
    nothing = replace(done.work, table_PE=done.work.table_PE[:1])  # as where generate ignores it
    with pytest.raises(ConfigError, match="first token's log-probs in the rollout"):
        table.agreement("generate", peft_loop.of_generate(nothing), done.work)
    with pytest.raises(ConfigError, match="log-probs of the student differ by nan"):
        nan = [float("nan")] * len(done.work.logprobs)
        table.agreement("broken", Outcome(logprobs=nan), done.work)


def test_a_way_that_padding_puts_wrong_is_right_where_nothing_is_padded(done: Ours) -> None:
    work = done.work
    lengths = [len(prompt) for prompt in work.batches[0].prompts]
    padded = torch.tensor([n < max(lengths) for n in lengths]).repeat_interleave(4)
    first = work.logprobs[::4].tolist()
    outcome = Outcome(logprobs=(work.logprobs + 0.3 * padded).tolist(), first=first)
    assert "off by 0.3 nats" in table.of_padding(outcome, work)
    outcome.logprobs = (work.logprobs + 0.3 * ~padded).tolist()
    with pytest.raises(ConfigError, match="off where nothing is padded"):
        table.of_padding(outcome, work)


def test_the_plain_loss_is_ours() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 50) * 3, torch.randn(7, 50) * 3
    told = TeacherTopK.from_logits(teacher, 5)
    theirs = plain.forward_kl(student, plain.teacher_topk(teacher, 5))
    assert torch.allclose(theirs, LOSSES["forward_kl_topk"](student, told), atol=1e-5)


def test_the_formula_counts_what_torch_counts() -> None:
    model: Any = tiny_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(9)[None], use_cache=False, logits_to_keep=2)
    angles = 2 * 9 * model.config.head_dim // 2  # of the rotary embedding, a product to torch
    # Plain attention computes all of the square.
    assert floor.Shape.of(model).forward(9, 2, 81) == counter.get_total_flops() - angles


def test_beginnings_in_common_count_once(done: Ours) -> None:
    work = replace(done.work, batches=[Batch([[1, 2], [1, 2]], [[3, 3, 3, 3], [4, 3, 3, 3]])])
    shape = floor.Shape(linear=1, head=0, attention=0)
    alone = floor.flops(shape, work, work.batches[0], shared=False)
    shared = floor.flops(shape, work, work.batches[0], shared=True)
    assert (alone["student"], shared["student"]) == (2.0 * 10, 2.0 * 8)
    assert (alone["rollout"], shared["rollout"]) == (2.0 * 10, 2.0 * 8)
    assert floor.product_rate(1) > 1e9


def test_the_tables() -> None:
    stages = {"rollout": 1.0, "teacher": 2.0, "student": 3.0, "update": 4.0}
    mine = Row("ours", [stages, stages])
    twice = Row("twice", [{name: 2 * value for name, value in stages.items()}] * 2)
    part = Row("part", [{"rollout": 3.0}] * 2, partial=True)
    lines = table.markdown([mine, twice, part]).splitlines()
    assert lines[2].split("|")[-3:-1] == [" 10.00 (10.00 to 10.00) ", " 1 "]
    assert "2.00 (2.00 to 2.00) |" in lines[3]
    assert lines[4].endswith("| - | 3.00 (of the rollout) |")
    grown = table.growth([("a case", [mine, twice, part])])
    assert "| a case | 10.0 (1.0) | 20.0 (2.0) |" in grown and "part" not in grown
    again = table.with_reading(twice, "again", [{"teacher": 100.0}] * 2)
    assert again.whole == [116.0, 116.0]


def test_a_document_is_cut_from_the_record_and_the_studys_texts(tmp_path: Path) -> None:
    demo, tokenizer = write_data(tmp_path / "demo"), byte_tokenizer()
    made = cases.data_of(Case(document=500), demo, tokenizer, tmp_path / "data")
    (line,) = (made / "documents.jsonl").read_text().splitlines()
    text = json.loads(line)["text"]
    assert text.startswith(TEXT) and 480 < len(text) <= 500
    with pytest.raises(ConfigError, match="--documents 9000000: .* tokens together; give fewer"):
        cases.data_of(Case(document=9_000_000), demo, tokenizer, tmp_path / "more")
    wanted = cases.cases_of([600], [6, 64], [128])
    assert wanted == [Case(), Case(document=600), Case(answer=64)]


@pytest.mark.parametrize(
    "typed",
    [["--rollouts", "0"], ["--documents", "0"], ["--cartridges", "1"], ["--only", "unsloth"]],
)
def test_numbers_and_names_that_make_no_sense(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        alternatives.parse(typed)
    assert typed[0] in capsys.readouterr().err


def test_an_environment_that_is_no_environment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is there; fix: name a new folder"):
        environment.make(tmp_path)
    with pytest.raises(ConfigError, match="there is no such file"):
        environment.find(tmp_path / "python")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named trl' >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match="(?s)trl ended with status 3.*No module named trl"):
        environment.run(python, "trl_trainer", tmp_path, "trl", tmp_path / "log")


@pytest.mark.long
def test_the_command_in_the_alternatives_environment(run_python: Run, tmp_path: Path) -> None:
    python = os.environ.get("ALTERNATIVES_PYTHON")
    if python is None:
        pytest.skip("ALTERNATIVES_PYTHON names no environment of --make-environment")
    save_model(tiny_model(max_position_embeddings=4096), tmp_path / "model")
    command = ["benchmarks/alternatives.py", "--alternatives-python", python]
    command += ["--model", str(tmp_path / "model"), "--rollouts", "4", "--repeats", "1"]
    ended = run_python(*command, "--reread", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("ours", *alternatives.WAYS.values()):
        assert f"| {name} |" in ended.stdout or name == alternatives.WAYS["torch-linear"]
    assert "peft-kept agrees" in ended.stdout and "in the 1 samples that are not" in ended.stdout
