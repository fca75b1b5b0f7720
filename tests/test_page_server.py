"""The web page in Debian's chromium before the real server, with a tiny bundle behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import served
import tiny
from browsing import ask, browsing, ended, see, visiting
from rlkit.apps import serve
from rlkit.apps.server.settings import Settings
from rlkit.export.build import export_bundle

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]  # a browser on a busy machine paints when it likes
CONTEXT = 4096


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf", context=CONTEXT), root / "ckpt", tiny.W4W2)
    return export_bundle(checkpoint, root / "tiny-bundle", accuracy_level=0)


@pytest.fixture
def address(bundle: Path) -> Iterator[str]:
    with served.serving(serve.make_pool([bundle], slots=2, queue=8, memory=None)) as found:
        yield found


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with visiting(browser, address) as opened:
        opened.locator("#model:enabled").wait_for()
        yield opened


def limited(page: Page, tokens: int) -> None:
    """Ask for replies of so many tokens, always the same ones."""
    page.keyboard.press("Alt+s")
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Seed").fill("5")
    page.keyboard.press("Escape")


def test_a_conversation_with_numbers_that_the_server_measured(page: Page) -> None:
    limited(page, 12)
    ask(page, "the cat sat on the mat")
    page.get_by_role("list", name="How fast this reply came").get_by_text("tokens/s", exact=False).wait_for()
    first = page.locator(".reply .prose").last.inner_text()
    assert first.strip()
    ended(page)
    ask(page, "and looked at the dog")
    numbers = page.get_by_role("list", name="How fast this reply came").nth(1)
    numbers.get_by_text("prompt tokens reused").wait_for()
    assert page.get_by_role("meter").get_attribute("aria-valuemax") == str(CONTEXT)
    page.get_by_role("button", name="Regenerate").click()
    numbers.get_by_text("prompt tokens reused").wait_for()


def test_a_long_reply_grows_until_it_is_stopped(page: Page) -> None:
    limited(page, CONTEXT - 200)
    ask(page, "the cat sat")
    reply = page.locator(".reply > .prose").last
    reply.locator("> *").first.wait_for()
    first = len(reply.inner_text())
    page.locator(".reply.live").wait_for()
    while len(reply.inner_text()) <= first:  # ends with the reply at the latest
        assert page.get_by_role("button", name="Stop").is_visible()
    page.keyboard.press("Escape")
    see(page, "Stopped.")
    page.keyboard.press("Alt+p")
    active = page.locator("#stats .tile", has_text="active")
    active.get_by_text("0", exact=True).wait_for()


def test_a_request_that_cannot_run_is_said_in_the_servers_words(page: Page) -> None:
    ask(page, "the cat sat on the mat " * CONTEXT)
    alert = page.locator(".reply .failure")
    alert.wait_for()
    assert str(CONTEXT) in alert.inner_text()
    assert alert.get_by_role("button", name="Try again").is_visible()


def test_the_profile_of_the_bundle(page: Page) -> None:
    limited(page, 8)
    ask(page, "the cat sat on the mat")
    page.locator(".stats li").first.wait_for()
    page.keyboard.press("Alt+p")
    see(page, "Where the bytes are")
    text = page.locator("#profile").inner_text()
    assert "tiny-bundle" in text
    assert "4,096 tokens" in text
    assert "gate up" in text
    assert "2 bit" in text
    see(page, "newest reply")


def test_the_key_of_the_server(browser: Browser, bundle: Path) -> None:
    pool = serve.make_pool([bundle], slots=1, queue=1, memory=None)
    with served.serving(pool, Settings(api_key="s3cret")) as address, visiting(browser, address) as page:
        page.get_by_role("textbox", name="API key").fill("s3cret")
        page.keyboard.press("Enter")
        page.locator("#model:enabled").wait_for()
