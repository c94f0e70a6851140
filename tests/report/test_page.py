"""The file: whole in itself, escaped, and with everything the runs hold."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cartridge_distill.cli.main import app
from cartridge_distill.report import colours
from cartridge_distill.report.groups import group_runs
from cartridge_distill.report.page import condition_rows, write_report
from cartridge_distill.report.reading import read_run
from cartridge_distill.util.errors import ReportError
from tests.report import made


def test_texts_from_outside_stay_text(tmp_path: Path) -> None:
    page = write_report([made.attacked(tmp_path / "run")], tmp_path / "r.html").read_text()
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;document.title") >= 5


def test_nothing_is_fetched(tmp_path: Path) -> None:
    out = write_report([made.write_run(tmp_path / "run")], tmp_path / "r.html")
    page = out.read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "default-src 'none'" in page and "@import" not in page
    assert out.stat().st_size < 2.5e6


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run")
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html><title>My notes</title>")
    with pytest.raises(ReportError, match="notes.html is there and is no report"):
        write_report([run], notes)
    assert "My notes" in notes.read_text()
    with pytest.raises(ReportError, match="is a folder"):
        write_report([run], tmp_path)
    first = write_report([run], tmp_path / "r.html").stat().st_mtime_ns
    assert write_report([run], tmp_path / "r.html").stat().st_mtime_ns >= first


def test_it_repeats_to_the_byte(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run")
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert first == write_report([run], tmp_path / "b.html").read_bytes()


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"data":{"actor/loss":1.5}}\n')
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "No verdict" in page and "recipe.json is not in the run’s folder" in page
    assert 'id="actor-loss"' in page
    for absent in ("conditions", "samples", "stages", "val-kl"):
        assert f'id="{absent}"' not in page
    assert 'name="axis"' not in page  # there are no tokens to choose


def test_a_figure_for_each_kind_of_number(tmp_path: Path) -> None:
    page = write_report([made.write_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures = json.loads(found.group(1))
    assert set(figures) == {
        *("conditions-kl", "conditions-log_loss", "conditions-accuracy"),
        *("val-kl", "val-log_loss", "val-accuracy", "actor-loss", "stages"),
        *("actor-logprob_diff-max", "training-staleness", "actor-on_policy_fraction"),
        *("actor-grad_norm", "actor-lr"),
    }
    references = {trace["name"]: trace["y"] for trace in figures["val-kl"]["data"][1:]}
    assert references == {"best chunk": [0.871, 0.871], "full document": [0.0, 0.0]}
    bound = figures["actor-logprob_diff-max"]["data"][-1]
    assert bound["name"] == "bound" and bound["y"] == [1e-3, 1e-3]
    stages = [trace["name"] for trace in figures["stages"]["data"]]
    assert stages == ["rollout", "update", "sync", "validation", "other"]
    loss = figures["actor-loss"]["data"][0]
    assert loss["meta"]["step"] == list(range(1, 33)) and loss["meta"]["tokens"][-1] > 6000


def test_what_never_changed_is_folded_away_and_said(tmp_path: Path) -> None:
    page = write_report([made.write_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    folded = re.search(
        r"<details class=\"flat\">\s*<summary>(.*?)</summary>(.*?)</details>", page, re.S
    )
    assert folded is not None
    assert (
        folded.group(1)
        == "Never changed: Learning rate 0.02, Staleness 0, On-policy fraction 100 %"
    )
    for key in ("actor-lr", "training-staleness", "actor-on_policy_fraction"):
        assert f'id="{key}"' in folded.group(2)
    assert 'id="actor-grad_norm"' not in folded.group(2)


def test_the_page_says_what_the_run_took(tmp_path: Path) -> None:
    page = write_report([made.write_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    said = re.search(r'class="totals">(.*?)</p>', page)
    assert said is not None
    lines = made.metrics()
    seconds = sum(line["data"].get("timing_s/step", 0) for line in lines)
    trained = lines[-1]["data"]["tokens/total_trained"]
    assert said.group(1) == (
        f"32 steps · {trained:,} tokens trained on · 6,144 tokens written in rollouts · "
        f"{seconds // 60:.0f} min {round(seconds) % 60:02d} s of training"
    )


def test_all_questions_stand_there_with_marks(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    made.write_questions(folder)
    page = write_report([folder], tmp_path / "r.html").read_text()
    rows = re.findall(r'<tr data-right="(\d)" data-missed="(\d)">(.*?)</tr>', page, re.S)
    assert len(rows) == 30 and "All 30 questions" in page
    for place, (right, missed, row) in enumerate(rows):
        assert f"What is fact {place}?" in row and row.count("<td") == 5
        # accuracy 0.8: four of five; the full document has 0.9, all five
        assert (right, missed) == (("1", "0") if place % 5 < 4 else ("0", "1"))


def test_questions_of_several_runs_have_a_column_for_each_cartridge(tmp_path: Path) -> None:
    folders = [made.write_run(tmp_path / name, name=name) for name in ("one", "two", "three")]
    for folder, count in zip(folders, (30, 30, 20), strict=True):
        made.write_questions(folder, count)
    page = write_report(folders, tmp_path / "r.html").read_text()
    head = re.search(r'class="marks">\s*<thead>(.*?)</thead>', page, re.S)
    assert head is not None
    names = re.findall(r"</span>([^<]+)</th>", head.group(1))
    assert [*names[-3:]] == ["one", "two", "full document"]
    assert "No column for three: it was asked other questions, or none." in page


def test_the_document_is_shaded_and_its_text_whole(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    made.write_shading(folder)
    page = write_report([folder], tmp_path / "r.html").read_text()
    text = re.search(r'<p class="text">(.*?)</p>', page, re.S)
    assert text is not None
    plain = html.unescape(re.sub(r"<[^>]+>", "", text.group(1)))
    assert plain == "The lighthouse was built\nin 1871 by Holt."
    spans = re.findall(r'<span class="shade l(\d)"([^>]*)>([^<]*)</span>', text.group(1))
    assert [(level, shown) for level, _, shown in spans] == [
        *(("0", "The"), ("1", " lighthouse"), ("0", " was"), ("2", " built\nin"), ("0", " ")),
        *(("5", "1871"), ("3", " by"), ("4", " Holt"), ("0", ".")),
    ]
    assert "the cartridge says “1872” (5.1 nats)" in spans[5][1]
    assert "“ &lt;b&gt;”" in spans[7][1]
    assert "2 of 8 tokens wrong" in page and "the beginning alone" not in page


def test_the_data_of_the_page_can_be_taken_away(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    made.write_questions(folder)
    page = write_report([folder], tmp_path / "r.html").read_text()
    found = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert found is not None
    [run] = json.loads(found.group(1))
    assert run["metrics"]["32"]["actor/loss"] == made.metrics()[-1]["data"]["actor/loss"]
    assert len(run["questions"]) == 150 and run["evaluation"]["confidence"] == 0.95
    assert run["recipe"]["seed"] == 0


def test_two_runs_are_told_apart_everywhere(tmp_path: Path) -> None:
    """Two folders of one recipe: cartridges side by side, whose text it is, no word of seeds."""
    runs = [made.write_run(tmp_path / name) for name in ("mine", "mine-2")]
    for run in runs:
        made.write_questions(run)
    made.write_shading(runs[1])
    page = write_report(runs, tmp_path / "r.html").read_text()
    marks = re.search(r'<table class="marks">.*?</thead>', page, re.S)
    assert marks is not None
    columns = re.findall(r"</span>([^<]+)</th>", marks.group())
    assert [name.partition(" (")[0] for name in columns] == [
        *("no document", "best chunk", "untrained cartridge", "demo", "demo", "full document")
    ]
    assert columns[3].endswith("mine)") and columns[4].endswith("mine-2)")
    assert re.search(r"<summary>demo \([^<]*mine-2\): light<small>", page)
    assert "greatest of the seeds" not in page and "No column for" not in page
    assert "those a cartridge gets wrong" in page and "those every cartridge gets right" in page


def test_seeds_are_a_mean_in_a_band(tmp_path: Path) -> None:
    page = write_report(made.write_recipes(tmp_path), tmp_path / "r.html").read_text()
    found = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    band, mean = json.loads(found.group(1))["val-kl"]["data"][:2]
    high, low = band["y"][:9], band["y"][:8:-1]
    assert band["fill"] == "toself" and len(mean["y"]) == 9
    assert all(a <= b <= c for a, b, c in zip(low, mean["y"], high, strict=True))
    assert mean["meta"]["tokens"] == sorted(mean["meta"]["tokens"])


def test_rows_that_are_equal_in_all_runs_stand_there_once(tmp_path: Path) -> None:
    groups = group_runs([read_run(folder) for folder in made.write_recipes(tmp_path)])
    rows = condition_rows(groups)
    assert [row.name for row in rows] == [
        *("no document", "best chunk", "untrained cartridge"),
        *("off-policy", "on-policy", "mixed", "full document"),
    ]
    assert [row.style for row in rows[3:6]] == [colours.of_run(place) for place in range(3)]
    found = rows[3].metrics["log_loss"]
    assert found is not None and found.mean == pytest.approx(1.93)


@pytest.mark.parametrize(("shift", "times"), [(0.0, 1), (0.01, 2)])
def test_a_row_is_another_one_by_its_mean_and_not_by_its_interval(
    tmp_path: Path, shift: float, times: int
) -> None:
    """Other seeds draw other questions for the interval, from the same figures."""
    folders = made.write_recipes(tmp_path)
    for file in tmp_path.glob("mixed-*/evaluation.json"):
        evaluation = json.loads(file.read_text())
        row = next(row for row in evaluation["conditions"] if row["condition"] == "best chunk")
        for interval in filter(None, row["metrics"].values()):
            interval["mean"] += shift
            interval["low"] -= 0.01
        file.write_text(json.dumps(evaluation))
    names = [row.name for row in condition_rows(group_runs([read_run(each) for each in folders]))]
    assert sum(name.startswith("best chunk") for name in names) == times
    assert sum(name.startswith("no document") for name in names) == 1


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two ``#rrggbb`` colours, 1 to 21."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_are_readable_on_both_grounds_and_differ() -> None:
    style = (Path(colours.__file__).parent / "page.css").read_text()
    light, dark = re.findall(r"--ground: (#\w+);", style)
    used = [colours.of_run(place).colour for place in range(6)]
    used += [style.colour for style in colours.CONDITIONS.values()]
    for colour in used:
        assert contrast(colour, light) >= 3
        assert contrast(colour, dark) >= 3
    assert len(set(used[:6])) == 6
    assert colours.of_run(6) != colours.of_run(0)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


def test_the_command(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and done.output.strip() == str(run / "report.html")
    other = made.write_run(tmp_path / "other", name="other")
    done = CliRunner().invoke(app, ["report", str(run), str(other)])
    assert done.exit_code == 1 and "--out" in done.output
    out = tmp_path / "deep" / "both.html"
    done = CliRunner().invoke(app, ["report", str(run), str(other), "--out", str(out)])
    assert done.exit_code == 0 and out.is_file()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "absent")])
    assert done.exit_code == 1 and "no folder of a run" in done.output


def test_a_run_named_twice_is_refused(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run")
    with pytest.raises(ReportError, match="twice"):
        write_report([run, tmp_path / "." / "run"], tmp_path / "r.html")


def measured(entry: dict[str, Any], kl: float, points: int = 8) -> dict[str, Any]:
    """A condition as an evaluation with ``--measures`` writes it."""
    positions = [
        {
            "first": n,
            "last": n,
            "tokens": 9,
            "student_kl": made.interval(kl * n, 0.1),
            "student_reverse_kl": made.interval(2 * kl * n, 0.1),
        }
        for n in range(1, points + 1)
    ]
    more = {"student_kl": made.interval(kl, 0.1), "generated_match": made.interval(0.5, 0.1)}
    return {**entry, "metrics": entry["metrics"] | more, "positions": positions}


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_a_curve_over_position_for_every_condition(tmp_path: Path) -> None:
    entries = [
        measured(entry, 0.1 * place) for place, entry in enumerate(made.evaluation()["conditions"])
    ]
    run = made.write_run(tmp_path / "run", evaluated=made.evaluation(conditions=entries))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "KL on own text" in page and "Right in free answer" in page
    figures = figures_of(page)
    for metric, factor in (("student_kl", 1), ("student_reverse_kl", 2)):
        traces = figures[f"positions-{metric}"]["data"]
        lines = {trace["name"]: trace for trace in traces if "markers" in trace["mode"]}
        assert list(lines) == [entry["condition"] for entry in entries]
        found = lines["trained cartridge"]
        assert found["x"] == pytest.approx(range(1, 9))
        assert found["y"] == pytest.approx([factor * 0.3 * n for n in range(1, 9)])
    plain = made.write_run(tmp_path / "plain")
    without = write_report([plain], tmp_path / "p.html").read_text()
    assert "KL on own text" not in without and "positions-student_kl" not in figures_of(without)


def test_seeds_share_a_curve_where_all_have_it(tmp_path: Path) -> None:
    runs = []
    for seed, points in ((0, 8), (1, 5)):
        entries = [
            measured(each, 0.1 + 0.2 * seed, points) for each in made.evaluation()["conditions"]
        ]
        evaluated = made.evaluation(conditions=entries, seed=seed)
        runs.append(
            made.write_run(tmp_path / f"{seed}", name="one", seed=seed, evaluated=evaluated)
        )
    [row, *_] = condition_rows(group_runs([read_run(run) for run in runs]))
    assert [each.first for each in row.positions] == [1, 2, 3, 4, 5]
    means = [each.student_kl.mean for each in row.positions if each.student_kl]
    assert means == pytest.approx([0.2 * n for n in range(1, 6)])
