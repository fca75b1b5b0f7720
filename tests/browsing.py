"""Debian's chromium for tests of the web page; a test that asks for it is skipped, with the reason, where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
EXPECTED = ("Failed to load resource",)  # what the browser says of every answer that is no success


@contextmanager
def browsing() -> Iterator[Browser]:
    """One browser for many pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}; .ci/chromium installs it")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    """A page at `url` in a profile of its own; fails if a script fails or the policy is broken meanwhile."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
    faults: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    assert [fault for fault in faults if not fault.startswith(EXPECTED)] == []


def ask(page: Page, text: str) -> None:
    """Type a message and send it."""
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def ended(page: Page) -> None:
    """Wait until no reply is being written."""
    page.get_by_role("button", name="Send", exact=True).wait_for()


def see(page: Page, text: str) -> None:
    """Wait until the view shows this text; what is read out or fades does not count."""
    page.locator("#stage").get_by_text(text).first.wait_for()
