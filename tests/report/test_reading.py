"""Folders of runs are read: what may be absent, and what must not be half there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cartridge_distill.report.groups import group_runs, token_axis, value_at
from cartridge_distill.report.reading import Metrics, Run, read_metrics, read_run
from cartridge_distill.util.errors import ReportError
from tests.report import made


def log(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(made.write_run(tmp_path / "demo", seed=3))
    assert run.metrics.steps == list(range(33))
    assert [step for step, _ in run.metrics.series("val/kl")] == list(range(0, 33, 4))
    assert run.seed == 3 and run.recipe is not None and run.recipe.name == "demo"
    assert run.evaluation is not None
    trained = run.evaluation.get("trained cartridge")
    assert trained is not None and trained.kv_tokens == 128
    assert trained.metrics["generated_accuracy"] is None


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    log(tmp_path / "metrics.jsonl", '{"step":1,"data":{"actor/loss":1.5}}')
    run = read_run(tmp_path)
    assert (run.evaluation, run.recipe, run.seed) == (None, None, None)
    assert run.metrics.series("actor/loss") == [(1, 1.5)]
    assert token_axis([run]) is None


def test_a_resume_that_repeats_steps_counts_once(tmp_path: Path) -> None:
    path = log(
        tmp_path / "metrics.jsonl",
        '{"step":1,"data":{"actor/loss":1.0,"tokens/trained":10}}',
        '{"step":2,"data":{"actor/loss":9.0,"tokens/trained":10}}',
        "",
        '{"step":2,"data":{"actor/loss":0.5,"tokens/trained":10}}',
        '{"step":2,"data":{"val/kl":0.4,"timing_s/rollout":null}}',
    )
    metrics = read_metrics(path)
    assert metrics.series("actor/loss") == [(1, 1.0), (2, 0.5)]
    assert metrics.series("val/kl") == [(2, 0.4)] and metrics.series("timing_s/rollout") == []


def test_what_is_not_drawn_may_be_anything(tmp_path: Path) -> None:
    path = log(tmp_path / "metrics.jsonl", '{"step":1,"data":{"new/list":[1],"actor/loss":1}}')
    assert read_metrics(path).by_step == {1: {"actor/loss": 1.0}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step":2,"data":{"actor/lo', "not JSON"),
        ("[1, 2]", "expected"),
        ('{"step":2}', "expected"),
        ('{"step":"2","data":{}}', "the step is '2'"),
        ('{"step":true,"data":{}}', "the step is True"),
        ('{"step":-1,"data":{}}', "the step is -1"),
        ('{"step":2,"data":{"actor/loss":"low"}}', "actor/loss is 'low', not a number"),
        ('{"step":2,"data":{"val/kl":false}}', "val/kl is False, not a number"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = log(tmp_path / "metrics.jsonl", '{"step":1,"data":{"actor/loss":1}}', line)
    with pytest.raises(ReportError) as error:
        read_metrics(path)
    assert f"{path}:2: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("text", "said"), [("", "holds no step"), ("\n\n", "holds no step")])
def test_an_empty_log_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ReportError, match=said):
        read_run(tmp_path)


def test_no_log_and_no_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="VERL_FILE_LOGGER_PATH"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="no folder of a run"):
        read_run(tmp_path / "absent")


def broken(**changes: Any) -> str:
    return json.dumps({**made.evaluation(), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n"conditions": [,]}', "evaluation.json:2: not JSON"),
        ("{}", "conditions: Field required"),
        (broken(conditions=[{"condition": "x", "kv_tokens": 1}]), "conditions.0.metrics"),
        (
            broken(conditions=[{**made.condition("x", 1, 1, 1, 1), "kv_tokens": "many"}]),
            "conditions.0.kv_tokens",
        ),
        (
            broken(
                conditions=[
                    {
                        "condition": "x",
                        "kv_tokens": 1,
                        "metrics": {"kl": {"mean": 1, "low": 2, "high": 1}},
                    }
                ]
            ),
            "conditions.0.metrics.kl",
        ),
        (broken(conditions=made.evaluation()["conditions"][:1] * 2), "stands there twice"),
        (broken(confidence=95), "confidence"),
        (broken(samples=[{"question": "?"}]), "samples.0.right_answer"),
    ],
)
def test_a_malformed_evaluation_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    made.write_run(tmp_path)
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ReportError) as error:
        read_run(tmp_path)
    assert "evaluation.json" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop(columns="kl_sum"), "no table with the columns"),
        (lambda rows: rows[:0], "holds no question"),
        (lambda rows: rows[1:], "have other questions"),
    ],
)
def test_malformed_questions_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = made.write_questions(made.write_run(tmp_path))
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(ReportError, match=said):
        read_run(tmp_path)
    path.write_bytes(b"no parquet")
    with pytest.raises(ReportError, match="no table"):
        read_run(tmp_path)


def test_an_evaluation_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    made.write_questions(folder)
    (folder / "evaluation").mkdir()
    for name in ("evaluation.json", "evaluation.parquet"):
        (folder / name).rename(folder / "evaluation" / name)
    run = read_run(folder)
    assert run.evaluation is not None and run.questions is not None
    (folder / "evaluation.json").write_text(json.dumps(made.evaluation()))
    with pytest.raises(ReportError, match="two evaluations"):
        read_run(folder)


def test_a_column_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """A changed bit in ``question`` would be a table without texts."""
    path = made.write_questions(made.write_run(tmp_path / "run"))
    pd.read_parquet(path).rename(columns={"question": "puestion"}).to_parquet(path)
    with pytest.raises(ReportError, match="unknown columns: puestion; fix: evaluate again"):
        read_run(tmp_path / "run")


def test_no_cartridge_is_another_word_for_no_document(tmp_path: Path) -> None:
    text = json.dumps(made.evaluation()).replace("no document", "no cartridge")
    made.write_run(tmp_path, evaluated=json.loads(text))
    evaluation = read_run(tmp_path).evaluation
    assert evaluation is not None and evaluation.get("no document") is not None
    assert "no document" in evaluation.samples[0].answers


def test_seeds_of_a_recipe_are_one_group(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in made.write_recipes(tmp_path, seeds=2)]
    groups = group_runs(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("off-policy", 2),
        ("on-policy", 2),
        ("mixed", 2),
    ]
    assert groups[0].run_name(runs[1]) == "off-policy, seed 1"


def test_other_overrides_or_the_same_seed_are_other_groups(tmp_path: Path) -> None:
    runs = [
        read_run(made.write_run(tmp_path / "a")),
        read_run(made.write_run(tmp_path / "b", seed=1, overrides=("lr=1",))),
        read_run(made.write_run(tmp_path / "c")),
    ]
    names = [group.name for group in group_runs(runs)]
    assert len(set(names)) == 3 and all("demo" in name for name in names)


def test_tokens_of_what_all_runs_count(tmp_path: Path) -> None:
    counted = read_run(made.write_run(tmp_path / "a"))
    exact = token_axis([counted])
    assert exact is not None and exact.title == "trained tokens"
    assert exact.at(counted, 0) == 0 and exact.at(counted, 32) > 32 * 190
    lines = [{"step": n, "data": {"perf/tokens": 100}} for n in (1, 2, 3)]
    old = read_run(made.write_run(tmp_path / "b", lines=lines))
    both = token_axis([counted, old])
    assert both is not None and "do not count trained tokens" in both.title
    assert both.at(old, 2) == 200 and both.at(counted, 2) == 2 * 6100


def test_a_log_that_begins_late_is_said(tmp_path: Path) -> None:
    lines = [{"step": n, "data": {"tokens/trained": 10}} for n in (17, 18)]
    axis = token_axis([read_run(made.write_run(tmp_path, lines=lines))])
    assert axis is not None and "earlier steps are not in the log" in axis.title


def test_a_curve_between_two_validations() -> None:
    rows: dict[int, dict[str, float | None]] = {s: {"tokens/trained": 10.0} for s in (1, 2, 3, 4)}
    run = Run(Path("run"), Metrics(rows), None, None, None, None, None)
    axis = token_axis([run])
    assert axis is not None
    points = [(2, 1.0), (4, 0.5)]
    assert value_at(points, run, axis, 30) == 0.75
    assert value_at(points, run, axis, 40) == 0.5
    assert math.isnan(value_at(points, run, axis, 10))
