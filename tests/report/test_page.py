"""The file: whole in itself, escaped, and with everything the runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cartridge_distill.cli.main import app
from cartridge_distill.report import colours
from cartridge_distill.report.groups import group_runs
from cartridge_distill.report.page import condition_rows, write_report
from cartridge_distill.report.reading import read_run
from cartridge_distill.util.errors import ReportError
from tests.report import made

ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def attacked(folder: Path) -> Path:
    """A run whose every text from outside is an attack."""
    sample = {
        "question": ATTACK,
        "right_answer": ATTACK,
        "answers": {"trained cartridge": ATTACK, ATTACK: ATTACK},
    }
    conditions = [*made.evaluation()["conditions"], made.condition(ATTACK, 3, 1, 1, 0.5)]
    return made.write_run(
        folder,
        name=ATTACK,
        overrides=(ATTACK,),
        evaluated=made.evaluation(samples=[sample], conditions=conditions, model=ATTACK),
    )


def test_texts_from_outside_stay_text(tmp_path: Path) -> None:
    page = write_report([attacked(tmp_path / "run")], tmp_path / "r.html").read_text()
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
    }
    bound = figures["actor-logprob_diff-max"]["data"][-1]
    assert bound["name"] == "bound" and bound["y"] == [1e-3, 1e-3]
    stages = [trace["name"] for trace in figures["stages"]["data"]]
    assert stages == ["rollout", "update", "sync", "validation", "other"]
    loss = figures["actor-loss"]["data"][0]
    assert loss["meta"]["step"] == list(range(1, 33)) and loss["meta"]["tokens"][-1] > 6000


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
