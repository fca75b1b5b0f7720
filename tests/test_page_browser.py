"""The web page in Debian's chromium, before a stand-in for the server that says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browsing import ask, browsing, ended, see, visiting
from pageserver import CUT, MEASURED, WAIT, Broken, Refused, Server, Thought, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]  # a browser on a busy machine paints when it likes
STORED = "JSON.stringify({...localStorage})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as told:
        yield told


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visiting(browser, server.url) as opened:
        opened.locator("#model:enabled").wait_for()
        yield opened


def said(page: Page) -> str:
    return page.locator(".reply").last.locator(":scope > .prose").inner_text()


@pytest.mark.parametrize("how", ["the button", "Escape"])
def test_a_reply_streams_and_stops(page: Page, server: Server, tmp_path: Path, how: str) -> None:
    server.replies.append(["Once upon ", WAIT, "a time ", WAIT, *["x" * 4096] * 2000])
    ask(page, "Tell me a story")
    see(page, "Once upon")
    first = said(page)
    server.go()
    see(page, "Once upon a time")
    second = said(page)
    assert second.startswith(first)
    assert len(second) > len(first)
    assert page.screenshot(path=tmp_path / "streaming.png")[:4] == b"\x89PNG"
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    see(page, "Stopped.")
    server.go()
    assert server.left.wait(20), "the server was not told that nobody listens any more"
    assert said(page) == second
    assert page.get_by_role("button", name="Send", exact=True).is_visible()


def test_numbers_stand_under_a_reply_and_the_context_fills(page: Page, server: Server) -> None:
    server.replies.append(["one ", "two ", "three"])
    ask(page, "Count")
    see(page, "42.5 tokens/s")
    numbers = page.get_by_role("list", name="How fast this reply came").inner_text()
    assert "to the first token" in numbers
    assert "3 tokens" in numbers
    assert "24 of 40 prompt tokens reused" in numbers
    assert page.get_by_role("meter").get_attribute("aria-valuetext") == "43 of 512 tokens"


def test_settings_go_with_the_request(page: Page, server: Server) -> None:
    page.get_by_role("button", name="Settings").click()
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    typed = {"System message": "Be brief.", "Temperature": "0.7", "Top-p": "0.9", "Max tokens": "64", "Seed": "7"}
    for label, value in {**typed, "Stop strings": "END\n\\n\\n", "JSON schema": json.dumps(schema)}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Adapter").select_option("pirate")
    ask(page, "Hello")
    see(page, "I am a stand-in")
    (body,) = server.asked
    assert body["model"] == "smollm2-135m-w4:pirate"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    wanted = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64, "seed": 7, "stop": ["END", "\n\n"]}
    assert {name: body[name] for name in wanted} == wanted
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert body["stream_options"] == {"include_usage": True}


def test_what_is_empty_is_left_to_the_server(page: Page, server: Server) -> None:
    ask(page, "Hello")
    see(page, "I am a stand-in")
    ended(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("")
    see(page, "temperature of the server")
    ask(page, "Hello")
    page.get_by_text("42.5 tokens/s").nth(1).wait_for()
    least = {"model", "messages", "stream", "stream_options"}
    assert [set(body) for body in server.asked] == [least | {"temperature"}, least]


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("Temperature", "-1"),
        ("Temperature", "NaN"),
        ("Top-p", "0"),
        ("Max tokens", "1.5"),
        ("Seed", "seven"),
        ("JSON schema", "{"),
        ("JSON schema", "[]"),
        ("Stop strings", "\n".join("abcdefghijklmnopq")),
    ],
)
def test_a_wrong_setting_is_shown_and_nothing_is_sent(page: Page, server: Server, label: str, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(label).fill(value)
    assert page.locator(".wrong:visible").count() == 1
    ask(page, "Hello")
    assert page.get_by_label(label).get_attribute("aria-invalid") == "true"
    assert page.get_by_label(label).evaluate("node => node === document.activeElement")
    assert server.asked == []
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.locator(".wrong:visible").count() == 0


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (Refused(429, "the queue is full", 3), "the queue is full (try again in 3 s)"),
        (Refused(400, "the prompt is too long"), "the prompt is too long"),
        (["It begins", Broken("the model ran out of memory")], "the model ran out of memory"),
        (["It begins", CUT], "The connection ended before the reply did"),
    ],
)
def test_errors_are_shown_in_place_and_can_be_tried_again(page: Page, server: Server, reply: Any, shown: str) -> None:
    server.replies.append(reply)
    ask(page, "Hello")
    alert = page.locator(".reply .failure")
    alert.wait_for()
    assert shown in alert.inner_text()
    alert.get_by_role("button", name="Try again").click()
    see(page, "I am a stand-in")
    assert page.locator(".reply").count() == 1
    assert server.asked[0] == server.asked[1]


def test_a_server_that_went_away_is_said(browser: Browser) -> None:
    with serving() as told, visiting(browser, told.url) as page:
        page.locator("#model:enabled").wait_for()
        page.context.set_offline(True)
        ask(page, "Hello")
        see(page, "The server does not answer")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        see(page, "I am a stand-in")


def test_thoughts_are_folded_and_not_sent_back(page: Page, server: Server) -> None:
    server.replies.append([Thought("The user "), Thought("greets."), WAIT, "Hello!"])
    server.replies.append(["<think>Inside", " the text</think>\n\nAgain!"])
    ask(page, "Hi")
    thoughts = page.locator(".thoughts")
    see(page, "Thinking…")
    assert not thoughts.locator(".prose").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.locator(".prose").inner_text() == "The user greets."
    server.go()
    ended(page)
    ask(page, "And again")
    see(page, "Again!")
    ended(page)
    assert said(page) == "Again!"
    ask(page, "Third")
    see(page, "I am a stand-in")
    told = [message["content"] for message in server.asked[-1]["messages"]]
    assert told == ["Hi", "Hello!", "And again", "Again!", "Third"]


def test_regenerating_and_editing_replace_what_came_after(page: Page, server: Server) -> None:
    server.replies.extend([["First answer"], ["Second answer"], ["Third answer"]])
    ask(page, "Question")
    see(page, "First answer")
    page.get_by_role("button", name="Regenerate").click()
    see(page, "Second answer")
    ended(page)
    assert page.locator(".reply").count() == 1
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_label("Edit your message").fill("Better question")
    page.get_by_role("button", name="Send again", exact=True).click()
    see(page, "Third answer")
    assert [body["messages"] for body in server.asked] == [
        [{"role": "user", "content": text}] for text in ("Question", "Question", "Better question")
    ]


def test_replies_and_code_are_copied_as_they_were_written(browser: Browser, server: Server) -> None:
    text = "Some **bold** text\n\n```python\nprint('<b>')\n```"
    server.replies.append([text])
    with visiting(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.locator("#model:enabled").wait_for()
        ask(page, "Write")
        see(page, "42.5 tokens/s")
        page.locator(".foot").get_by_role("button", name="Copy", exact=True).click()
        page.locator("#live", has_text="Copied").wait_for(state="attached")
        assert page.evaluate("navigator.clipboard.readText()") == text
        page.get_by_role("button", name="Copy code").click()
        page.locator(".code use[href='#icon-check']").wait_for(state="attached")
        assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


def test_conversations_are_kept_exported_and_taken_in_again(page: Page, server: Server, tmp_path: Path) -> None:
    ask(page, "Remember me")
    see(page, "I am a stand-in")
    ended(page)
    page.reload()
    page.locator(".bubble", has_text="Remember me").wait_for()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "chats.json"
    waiting.value.save_as(file)
    assert json.loads(file.read_text())["conversations"][0]["messages"][0]["content"] == "Remember me"
    kept = page.locator("#conversations a")
    kept.hover()
    page.get_by_role("button", name="Delete “Remember me”").click()
    assert kept.count() == 0
    page.get_by_role("button", name="Undo").click()
    assert kept.count() == 1
    page.locator("#import-file").set_input_files(file)
    page.get_by_text("1 conversation imported").wait_for()
    assert kept.count() == 2
    for content, why in (
        ("{", "is no JSON"),
        ('{"schema_version": 9}', "schema_version 9"),
        ("{}", "without messages"),
    ):
        file.write_text(content)
        page.locator("#import-file").set_input_files(file)
        page.locator("#toast", has_text=why).wait_for()
    assert kept.count() == 2


def test_a_reply_goes_on_while_another_conversation_is_open(page: Page, server: Server) -> None:
    server.replies.append(["Slow ", WAIT, "and done"])
    ask(page, "First")
    see(page, "Slow")
    page.keyboard.press("Alt+n")
    ask(page, "Second")
    see(page, "I am a stand-in")
    server.go()
    page.locator("#toast", has_text="“First” has its reply").wait_for()
    page.get_by_role("link", name="First").click()
    see(page, "Slow and done")


def test_the_key_is_asked_for_and_kept_in_this_tab_only(browser: Browser) -> None:
    with serving(key="s3cret") as told, visiting(browser, told.url) as page:
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        dialog.get_by_role("button", name="Cancel").click()
        see(page, "This server asks for an API key")
        page.get_by_role("button", name="Try again").click()
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("did not accept that key").wait_for()
        page.get_by_role("textbox", name="API key").fill("s3cret")
        page.keyboard.press("Enter")
        page.locator("#model:enabled").wait_for()
        ask(page, "Hello")
        see(page, "I am a stand-in")
        assert "s3cret" not in page.evaluate(STORED)
        page.reload()
        page.locator("#model:enabled").wait_for()
        assert dialog.count() == 0


def test_profile_shows_facts_forecast_and_measurement(browser: Browser, tmp_path: Path) -> None:
    with serving(measured=MEASURED) as told, visiting(browser, told.url) as page:
        page.get_by_role("link", name="Profile").click()
        page.locator(".chart svg").first.wait_for()
        text = page.locator("#profile").inner_text()
        for wanted in (
            "w4w2-gateup",
            "135 million",
            "118 MB",
            "7.04",
            "0.0312",
            "91.4 %",
            "97.2",
            "forecast 107 at 256",
        ):
            assert wanted in text
        assert "/home/" not in text
        assert page.locator(".chart").count() == 3
        assert page.locator(".chart circle.dots").count() == 3 + 3 + 2  # one prompt was reused in part
        page.locator("#stats", has_text="1,234").wait_for()
        with page.expect_response("**/rlkit/stats"):
            pass  # it goes on looking
        assert page.screenshot(path=tmp_path / "profile.png")[:4] == b"\x89PNG"


def test_profile_says_why_there_is_no_forecast(browser: Browser) -> None:
    with serving(forecast=False) as told, visiting(browser, f"{told.url}#/profile") as page:
        see(page, "There is no forecast: this machine is not calibrated.")
        see(page, "Nothing is measured yet")
        assert page.locator(".chart").count() == 0
