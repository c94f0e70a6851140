"""The page in headless Chromium: three answers, errors in words, a phone, the dark, the keyboard.

Skipped where Chromium is not installed; with REQUIRE_CHROMIUM=1 that is a failure instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from cartridge_distill.server.running import BackgroundServer
from tests.report.screenshot import INSTALL, chromium, find_chromium
from tests.server.playground_server import MARKUP, playground_server

expect.set_options(timeout=60_000)  # a busy machine draws slowly
pytestmark = pytest.mark.integration
_OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_chromium() is None:
        if os.environ.get("REQUIRE_CHROMIUM") == "1":
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    folder = tmp_path_factory.mktemp("playground")
    with playground_server(folder, ("Who keeps the keys?", f"And {MARKUP}?")) as running:
        yield running


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: BackgroundServer) -> Iterator[Open]:
    """Opens the page; at the end, nobody but this server was asked, and nothing complained."""
    asked: list[str] = []
    complaints: list[str] = []
    contexts = []

    def open_(width: int = 1280, *, quiet: bool = True, **more: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            has_touch=width < 600,
            is_mobile=width < 600,
            **more,
        )
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        if quiet:
            context.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_
    for context in contexts:
        context.close()
    strange = [url for url in asked if not url.startswith((server.url, "data:"))]
    assert strange == [] and complaints == []


def column(page: Any, name: str) -> Any:
    return page.get_by_role("region", name=name, exact=True)


def answer_of(page: Any, name: str) -> Any:
    return column(page, name).locator(".answer")


def figures_of(page: Any, name: str) -> Any:
    return column(page, name).locator(".figures")


NAMES = ("No document", "Cartridge", "Full document")


@pytest.mark.parametrize("together", [False, True])
def test_a_question_gets_three_answers_and_what_each_took(opened: Open, together: bool) -> None:
    page = opened()
    page.get_by_label("tokens", exact=True).fill("5")
    if together:
        page.get_by_label("all at once").check()
    page.get_by_label("Question", exact=True).fill("Who?")
    page.keyboard.press("Enter")
    texts = []
    for name in NAMES:
        expect(figures_of(page, name)).to_contain_text("5 tokens \N{MIDDLE DOT}")
        expect(figures_of(page, name)).to_contain_text("cut off at the limit")
        texts.append(answer_of(page, name).text_content())
    assert len(set(texts)) == 3 and all(texts)
    memory = [column(page, name).locator(".memory").inner_text() for name in NAMES]
    assert memory[0] == "nothing before the question"
    assert memory[1].startswith("16 KV tokens, 8.19 kB")
    assert "kB" in memory[2] and int(memory[2].split()[0]) > 128
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_an_answer_can_be_stopped_by_button_and_by_key(opened: Open) -> None:
    page = opened()
    page.get_by_label("tokens", exact=True).fill("16000")
    for stop in (
        page.get_by_role("button", name="Stop").click,
        lambda: page.keyboard.press("Escape"),
    ):
        page.get_by_label("Question", exact=True).fill("Who?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(answer_of(page, "No document")).not_to_be_empty()
        stop()
        expect(figures_of(page, "No document")).to_contain_text("stopped")
        expect(figures_of(page, "Cartridge")).to_have_text("")  # it was not asked any more
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_examples_ask_and_another_cartridge_says_what_is_missing(opened: Open) -> None:
    page = opened()
    page.get_by_label("tokens", exact=True).fill("3")
    page.get_by_role("button", name="Who keeps the keys?").click()
    expect(page.get_by_label("Question", exact=True)).to_have_value("Who keeps the keys?")
    expect(figures_of(page, "Full document")).to_contain_text("ms")
    page.get_by_role("radio", name="ben").check()
    expect(answer_of(page, "Full document")).to_have_text(f"Not known. {MARKUP}")
    expect(page.get_by_role("button", name="Who keeps the keys?")).to_have_count(0)


def test_errors_are_said_in_words(opened: Open) -> None:
    page = opened(quiet=False)  # the browser logs every answer that is an error
    page.get_by_label("Question", exact=True).fill("Who?")
    page.get_by_label("tokens", exact=True).fill("16384")
    page.keyboard.press("Enter")
    error = column(page, "Cartridge").get_by_role("alert")
    expect(error).to_contain_text("maximum context length is 16384")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("tokens", exact=True).fill("5")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(error).to_have_text("The server does not answer. Is it still running?")
    broken = {"error": {"message": f"The engine failed. {MARKUP}"}}
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=f"data: {json.dumps(broken)}\n\n"),
    )
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(error).to_have_text(f"The engine failed. {MARKUP}")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<h1>"))
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(error).to_have_text("The server answered with HTTP 502.")


def test_what_is_answered_is_text(opened: Open) -> None:
    page = opened()
    text = f"{MARKUP}<script>document.title='taken'</script>"
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    events = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=events))
    page.get_by_label("Question", exact=True).fill("Who?")
    page.keyboard.press("Enter")
    expect(answer_of(page, "Full document")).to_have_text(text)
    assert page.title() == "Cartridge playground"
    assert page.locator("img").count() == 0


def test_markup_that_came_in_all_the_same_is_not_run(opened: Open) -> None:
    """The policy holds where the code would not."""
    page = opened(quiet=False)
    page.locator("#status").evaluate(f"(place) => {{ place.innerHTML = {json.dumps(MARKUP)}; }}")
    page.wait_for_selector("#status img", state="attached")
    assert page.title() == "Cartridge playground"


def test_a_phone_scrolls_down_only_and_dark_follows_the_reader(opened: Open) -> None:
    page = opened(390)
    page.get_by_label("tokens", exact=True).fill("60")
    page.get_by_label("Question", exact=True).fill("Who?" * 60)
    page.get_by_role("button", name="Ask", exact=True).tap()
    expect(figures_of(page, "Full document")).to_contain_text("ms")
    assert page.evaluate(_OVERFLOW) <= 0
    body = page.locator("body")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    page.emulate_media(color_scheme="dark")
    expect(body).to_have_css("background-color", "rgb(20, 22, 26)")


def test_the_keyboard_reaches_everything(opened: Open) -> None:
    page = opened()
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(document.activeElement.textContent.trim() || document.activeElement.id)"
            )
        )
    assert "Ask" in reached and "tokens" in reached and "together" in reached
