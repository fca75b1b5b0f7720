"""The web page for everybody: by keyboard alone, in the dark, on a telephone, read aloud."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsing import ask, browsing, ended, see, visiting
from pageserver import MEASURED, WAIT, Server, Thought, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]  # a browser on a busy machine paints when it likes
EVERYTHING = """A **bold** word, `code`, a [link](https://example.org) and a very-long-word-without-any-space-%s

1. one
   - two

```python
print("a line of code that is a good deal longer than the width of any telephone that people carry")
```

| a column | another column | a third column | a fourth column | a fifth column |
|---|---|---|---|---|
| with a few words | with a few words | with a few words | with a few words | with a few words |
""" % ("x" * 300)
# The colours of every element with text of its own, and what lies behind it, as [r, g, b] of 0..255.
COLOURS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = (node) => {
        for (let one = node; one; one = one.parentElement) {
            const found = rgb(getComputedStyle(one).backgroundColor);
            if (found[3] > 250) return found;
        }
        return rgb("white");
    };
    const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    return [...document.querySelectorAll("body *")]
        .filter((node) => own(node) && node.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
        .filter((node) => !node.closest(".unseen, svg, :disabled"))
        .map((node) => [node.textContent.trim().slice(0, 40), rgb(getComputedStyle(node).color), behind(node)]);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(measured=MEASURED) as told:
        yield told


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visiting(browser, server.url) as opened:
        opened.locator("#model:enabled").wait_for()
        yield opened


FOCUSED = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"


def focused(page: Page) -> str:
    """Id or name of what has the focus."""
    return page.evaluate(FOCUSED)


def focuses(page: Page, name: str) -> None:
    """Wait until what has this id or name has the focus."""
    page.wait_for_function(f"name => ({FOCUSED}) === name", arg=name)


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_everything_works_without_a_mouse(page: Page, server: Server) -> None:
    server.replies.extend([["First ", WAIT, "reply"], ["Second reply"], ["Third reply"]])
    keys = page.keyboard
    focuses(page, "prompt")
    keys.type("Hello")
    keys.press("Shift+Enter")
    keys.type("there")
    keys.press("Enter")
    see(page, "First")
    keys.press("Escape")
    see(page, "Stopped.")
    assert server.asked[0]["messages"][0]["content"] == "Hello\nthere"
    keys.press("Alt+r")
    see(page, "Second reply")
    ended(page)
    keys.press("ArrowUp")
    focuses(page, "Edit your message")
    keys.press("Control+a")
    keys.type("Other words")
    keys.press("Enter")
    see(page, "Third reply")
    ended(page)
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Other words"}]


def test_views_and_panels_are_reached_by_shortcuts(page: Page, server: Server) -> None:
    server.replies.append(["The only reply"])
    keys = page.keyboard
    keys.type("Hello")
    keys.press("Enter")
    see(page, "The only reply")
    ended(page)
    keys.press("Alt+n")
    focuses(page, "prompt")
    page.wait_for_function("() => !document.querySelector('.message')")
    keys.press("Alt+ArrowDown")
    see(page, "The only reply")
    keys.press("Alt+s")
    focuses(page, "set-system")
    keys.press("Escape")
    focuses(page, "settings-toggle")
    keys.press("Alt+m")
    focuses(page, "model")
    keys.press("ArrowDown")
    assert page.locator("#model").input_value() == "tiny"
    keys.press("Alt+p")
    page.get_by_role("heading", name="Profile").wait_for()
    keys.press("Alt+p")
    see(page, "The only reply")
    keys.press("/")
    focuses(page, "prompt")


def test_the_list_of_shortcuts_opens_and_closes(page: Page) -> None:
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    dialog.wait_for()
    page.keyboard.press("Alt+n")  # does nothing below a dialog
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    focuses(page, "help")
    page.get_by_label("Your message").focus()
    page.keyboard.type("really?")
    assert page.get_by_label("Your message").input_value() == "really?"


def test_the_tab_key_reaches_every_control_and_the_focus_shows(page: Page, server: Server) -> None:
    server.replies.append([Thought("hm"), EVERYTHING])
    ask(page, "Hello")
    page.locator(".stats li").first.wait_for()
    reached, rings = [], set()
    ring = "(({ outlineStyle: a, outlineWidth: b }) => `${a} ${b}`)(getComputedStyle(document.activeElement))"
    page.evaluate("document.body.tabIndex = -1, document.body.focus()")
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if reached[-1] not in ("", "prompt"):  # the message box has its ring around the whole box
            rings.add(page.evaluate(ring))
    wanted = {"new-chat", "theme", "help", "export", "import", "sidebar-toggle", "model", "adapter", "tab-chat"}
    wanted |= {"tab-profile", "settings-toggle", "prompt", "Copy", "Regenerate", "Edit and send again", "Copy code"}
    wanted |= {"Table", "Code, python"}
    assert wanted <= set(reached)
    assert rings == {"solid 2px"}


def test_what_happens_is_said_once_and_not_word_by_word(page: Page, server: Server) -> None:
    server.replies.append(["Good ", WAIT, "morning"])
    live = page.locator("#live")
    ask(page, "Hello")
    live.get_by_text("The model is answering").wait_for(state="attached")
    see(page, "Good")
    assert live.inner_text() == "The model is answering"
    assert page.locator(".reply").get_attribute("aria-busy") == "true"
    server.go()
    live.get_by_text("Reply: Good morning").wait_for(state="attached")
    assert page.locator(".reply").get_attribute("aria-busy") == "false"
    assert page.get_by_role("log").get_attribute("aria-live") == "off"
    tree = page.locator("body").aria_snapshot()
    for role in ("complementary", "navigation", "main", "log", "article", "meter", "textbox", "combobox"):
        assert re.search(rf"- {role}\b", tree), role


def test_every_button_has_a_name(page: Page, server: Server) -> None:
    server.replies.append([EVERYTHING])
    ask(page, "Hello")
    page.locator(".stats li").first.wait_for()
    nameless = "[...document.querySelectorAll('button, a')].filter((b) => !b.ariaLabel && !b.textContent.trim()).length"
    assert page.evaluate(nameless) == 0


def test_light_and_dark_follow_the_system_until_one_is_chosen(browser: Browser, server: Server, tmp_path: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        with visiting(browser, server.url, color_scheme=scheme) as page:
            page.locator("#model:enabled").wait_for()
            shades[scheme] = background(page)
            page.screenshot(path=tmp_path / f"{scheme}.png")
    assert shades["light"] != shades["dark"]
    with visiting(browser, server.url, color_scheme="light") as page:
        button = page.locator("#theme")
        seen = [button.inner_text()]
        for _ in range(3):
            button.click()
            seen.append(button.inner_text())
        assert seen == ["System theme", "Light theme", "Dark theme", "System theme"]
        assert background(page) == shades["light"]
        button.click()
        button.click()
        assert background(page) == shades["dark"]
        page.reload()
        assert background(page) == shades["dark"]
        assert button.inner_text() == "Dark theme"


def _luminance(colour: list[int]) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [value / 255 for value in colour[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, server: Server, scheme: str) -> None:
    """At least 4.5 to 1, as WCAG 2.2 asks of text (AA)."""
    server.replies.append([Thought("hm"), EVERYTHING, *["x"] * 3])
    with visiting(browser, server.url, color_scheme=scheme) as page:
        page.locator("#model:enabled").wait_for()
        weak = []
        for address in ("", "#/profile"):
            if not address:
                ask(page, "Hello")
                page.locator(".stats li").first.wait_for()
            else:
                page.get_by_role("link", name="Profile").click()
                page.locator(".chart svg").first.wait_for()
            found = page.evaluate(COLOURS)
            assert len(found) > 20
            for name, colour, behind in found:
                low, high = sorted((_luminance(colour), _luminance(behind)))
                if (high + 0.05) / (low + 0.05) < 4.5:
                    weak.append((name, colour, behind))
        assert weak == []


def test_a_narrow_screen_shows_everything(browser: Browser, server: Server, tmp_path: Path) -> None:
    server.replies.append([EVERYTHING])
    with visiting(browser, server.url, viewport={"width": 400, "height": 780}) as page:
        page.locator("#model:enabled").wait_for()
        ask(page, "A message with " + "averylongword" * 30)
        page.locator(".stats li").first.wait_for()
        for step in ("chat", "profile"):
            if step == "profile":
                page.get_by_role("link", name="Profile").click()
                page.locator(".chart svg").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            area = page.locator("#scroller" if step == "chat" else "#profile")
            assert area.evaluate("node => node.scrollWidth <= node.clientWidth")
            page.screenshot(path=tmp_path / f"narrow-{step}.png")
        page.get_by_role("link", name="Chat").click()
        chats = page.get_by_role("button", name="New chat")
        assert not chats.is_visible()
        page.get_by_role("button", name="Conversations").click()
        chats.wait_for()
        focuses(page, "new-chat")
        page.keyboard.press("Escape")
        chats.wait_for(state="hidden")
        page.get_by_role("button", name="Settings").click()
        assert page.locator("#settings").bounding_box()["x"] >= 0  # type: ignore[index]  # it is visible


def test_no_motion_where_none_is_wanted(browser: Browser, server: Server) -> None:
    server.replies.append(["Quietly ", WAIT])
    with visiting(browser, server.url, reduced_motion="reduce") as page:
        page.locator("#model:enabled").wait_for()
        ask(page, "Hello")
        see(page, "Quietly")
        caret = "getComputedStyle(document.querySelector('.live .prose > :last-child'), '::after').animationName"
        assert page.evaluate(caret) == "none"
