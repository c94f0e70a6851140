"""The page as a reader has it: opened in headless Chromium, offline.

Skipped where Chromium is not installed; with REQUIRE_CHROMIUM=1 that is a failure instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from cartridge_distill.report.page import write_report
from tests.report import made
from tests.report.screenshot import INSTALL, chromium, find_chromium, main, open_report
from tests.training.conftest import ROOT, child_environment

expect.set_options(timeout=60_000)  # a busy machine draws slowly
pytestmark = pytest.mark.integration

# Shapes with coordinates that plotly drew into one figure: lines, marks, areas, bars.
_DRAWN = """div => [...div.querySelectorAll('.scatterlayer path, .barlayer path')]
    .filter(path => (path.getAttribute('d') || '').length > 10).length"""
_OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def _need_chromium() -> None:
    if find_chromium() is None:
        if os.environ.get("REQUIRE_CHROMIUM") == "1":
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    _need_chromium()
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    demo = made.write_run(folder / "demo")
    made.write_questions(demo)
    made.write_shading(demo)
    return {
        "one": write_report([demo], folder / "one.html"),
        "several": write_report(made.write_recipes(folder, seeds=2), folder / "several.html"),
        "short": write_report(
            [made.write_run(folder / "short", lines=made.metrics(4))], folder / "short.html"
        ),
        "attacked": write_report([made.attacked(folder / "run")], folder / "attacked.html"),
    }


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a report; at the end, nothing was fetched and nothing complained."""
    requests: list[str] = []
    complaints: list[str] = []
    pages = []

    def listen(context: Any) -> None:
        context.on("request", lambda request: requests.append(request.url))
        context.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        context.on("weberror", lambda error: complaints.append(str(error.error)))

    def open_(report: Path, width: int = 1200, **more: Any) -> Any:
        page = open_report(browser, report, width, 900, listen=listen, **more)
        pages.append((page, report.resolve().as_uri()))
        return page

    yield open_
    own = {address for _, address in pages}
    for page, _ in pages:
        page.context.close()
    assert pages and {url for url in requests if not url.startswith("data:")} == own
    assert complaints == []


def test_every_figure_is_drawn(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["one"])
    page.locator("details.flat > summary").click()
    places = page.query_selector_all(".canvas")
    assert len(places) == 13
    for place in places:
        assert place.evaluate(_DRAWN) > 0, place.get_attribute("id")
        box = place.query_selector(".main-svg").bounding_box()
        assert box["width"] > 200 and box["height"] > 100
    assert "closes 69\N{NO-BREAK SPACE}% [64, 75]" in page.inner_text("h1")
    assert page.locator("#samples .sample").count() == 3
    page.evaluate("Plotly.react('val-kl', [], {})")  # the measure measures: without data, nothing
    assert page.query_selector("#val-kl").evaluate(_DRAWN) == 0


def test_steps_become_tokens(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["one"])
    title = page.locator("#val-kl .xtitle")
    expect(title).to_have_text("step")
    page.get_by_text("tokens", exact=True).click()
    expect(title).to_have_text("trained tokens")
    assert page.evaluate("Math.max(...document.getElementById('val-kl').data[0].x)") > 6000


def test_the_last_step_has_its_whole_bar(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["short"])
    end, last = page.evaluate(
        "(div => [div.layout.xaxis.range[1], Math.max(...div.data[0].x)])"
        "(document.getElementById('stages'))"
    )
    assert end >= last + 0.5


def test_several_runs_lie_on_the_same_axes(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["several"])
    lines = page.locator("#val-kl .scatterlayer .trace")
    expect(lines).to_have_count(6)  # a mean and a band for each of three recipes
    page.get_by_role("button", name="on-policy").click()
    expect(lines).to_have_count(4)
    assert "has the lowest KL to the full document" in page.inner_text("h1")
    assert page.evaluate(_OVERFLOW) == 0


@pytest.mark.parametrize("report", ["one", "several", "attacked"])
def test_a_phone_scrolls_down_only(opened: Open, reports: dict[str, Path], report: str) -> None:
    page = opened(reports[report], 390)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate(_OVERFLOW) <= 0
    assert page.evaluate("innerWidth") == 390
    wide = page.evaluate(
        "[...document.querySelectorAll('main *:not(svg *)')]"
        ".filter(e => e.getBoundingClientRect().right > 391 && !e.closest('thead'))"
        ".map(e => e.tagName + '.' + e.className)"
    )
    assert wide == []


def test_questions_are_filtered(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["one"])
    rows = page.locator("table.marks tbody tr:visible")
    expect(rows).to_have_count(30)
    for chosen, count in (("wrong", 6), ("missed", 6), ("right", 24), ("all", 30)):
        page.select_option("#which", chosen)
        expect(rows).to_have_count(count)
        expect(page.locator("#count")).to_have_text(f"Shown: {count} of 30.")


def test_the_data_and_the_command_can_be_taken(
    opened: Open, reports: dict[str, Path], tmp_path: Path
) -> None:
    page = opened(reports["one"])
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "data.json")
    [run] = json.loads((tmp_path / "data.json").read_text())
    assert len(run["metrics"]) == 33 and len(run["questions"]) == 150
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("button.copy")
    expect(page.locator("button.copy")).to_have_text("Copied")
    command = page.inner_text("pre.command")
    assert page.evaluate("navigator.clipboard.readText()") == command and "--seed 0" in command


def test_the_document_can_be_read(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["one"])
    assert page.inner_text("#document .text") == "The lighthouse was built\nin 1871 by Holt."
    grounds = page.evaluate(
        "[...document.querySelectorAll('#document .text .shade')]"
        ".map(each => getComputedStyle(each).backgroundColor)"
    )
    assert len(set(grounds)) == 6


def test_dark_and_light_follow_the_reader(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["one"])
    body, title = page.locator("body"), page.locator("#val-kl .xtitle")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    expect(title).to_have_css("fill", "rgb(93, 101, 112)")
    page.emulate_media(color_scheme="dark")
    expect(body).to_have_css("background-color", "rgb(20, 22, 26)")
    expect(title).to_have_css("fill", "rgb(160, 168, 179)")


def test_an_answer_cannot_run(opened: Open, reports: dict[str, Path]) -> None:
    page = opened(reports["attacked"])
    assert page.title() != "taken"
    assert page.locator("img").count() == 0
    assert "<script>document.title" in page.inner_text("#samples")


def test_a_script_that_came_in_all_the_same_is_not_run(
    browser: Any, reports: dict[str, Path], tmp_path: Path
) -> None:
    """The page's policy holds even where an escape would be missing."""
    broken = tmp_path / "broken.html"
    text = reports["one"].read_text().replace("</main>", "<script>window.taken = 1</script></main>")
    broken.write_text(text)
    page = open_report(browser, broken, 1200, 900)
    assert page.evaluate("window.taken") is None
    page.context.close()


def test_a_picture_for_the_readme(reports: dict[str, Path], tmp_path: Path) -> None:
    _need_chromium()
    picture = tmp_path / "report.png"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tests" / "report" / "screenshot.py")),
            *(str(reports["one"]), str(picture), "--height", "700"),
        ],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 400_000


def test_without_chromium_it_says_how_to_get_it(
    reports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "absent"))
    assert main([str(reports["one"]), str(tmp_path / "x.png")]) == 1
    assert "apt-get install chromium" in capsys.readouterr().err
