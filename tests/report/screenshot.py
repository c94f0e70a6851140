"""A picture of a report, taken in headless Chromium.

    python tests/report/screenshot.py runs/demo/report.html docs/report.png
    python tests/report/screenshot.py report.html phone.png --width 390 --height 844 --dark

Chromium is the system's (Debian and Ubuntu: ``apt-get install chromium``; elsewhere name it in
CHROMIUM); playwright drives it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (
    "Chromium is not there: apt-get install chromium, or name the program in the variable CHROMIUM"
)
# What a browser would do on its own: a page that needs no network should see none.
_QUIET = ("--disable-quic", "--disable-background-networking", "--disable-component-update")
_LIMIT_MS = 60_000


def find_chromium() -> str | None:
    """The program, as CHROMIUM names it or PATH has it."""
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else _NAMES
    return next((found for name in named if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, of playwright's; ended with the block.

    Raises:
        FileNotFoundError: it is not installed; the message says how to.
    """
    program = find_chromium()
    if program is None:
        raise FileNotFoundError(INSTALL)
    # Chromium's sandbox does not start for root, as whom containers run.
    arguments = [*_QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def open_report(
    browser: Any,
    report: Path,
    width: int,
    height: int,
    *,
    dark: bool = False,
    scale: float = 1,
    listen: Callable[[Any], None] | None = None,
) -> Any:
    """A page of ``browser`` with the report, when all its plots are drawn; it is offline.

    Below 600 pixels it is a phone: touch, and its way to lay pages out. ``listen`` is given the
    page's context before anything is loaded.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
        color_scheme="dark" if dark else "light",
        offline=True,
        has_touch=width < 600,
        is_mobile=width < 600,
    )
    if listen is not None:
        listen(context)
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("html[data-plots=drawn]", timeout=_LIMIT_MS)
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("report", type=Path, help="HTML file of cartridge-distill report")
    option("picture", type=Path, help="PNG file to write")
    option("--width", type=int, default=1200, help="pixels (%(default)s)")
    option("--height", type=int, default=1500, help="pixels (%(default)s); 0 is the whole page")
    option("--scale", type=float, default=1, help="device pixels a pixel (%(default)s)")
    option("--dark", action="store_true", help="as readers with a dark screen see it")
    options = parser.parse_args(arguments)
    if not options.report.is_file():
        parser.error(f"{options.report} is not there: cartridge-distill report RUN writes one")
    try:
        with chromium() as browser:
            page = open_report(
                browser,
                options.report,
                options.width,
                options.height or 1000,
                dark=options.dark,
                scale=options.scale,
            )
            page.screenshot(path=str(options.picture), full_page=options.height == 0)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
