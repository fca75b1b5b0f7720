"""How often the event loop is woken for the tokens of a reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rlkit.apps.server.flow import _Inbox
from rlkit.runtime.engine import Told
from rlkit.runtime.request import Finished, Reason, Token

NEVER = 3600.0


def token(index: int) -> Token:
    return Token(7, "a", 0.001, index)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_loop(scene: Callable[[_Inbox], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(_Inbox(NEVER))

    asyncio.run(play())


def test_the_first_token_is_taken_at_once_and_the_next_ones_wait_for_the_end_of_the_rest() -> None:
    async def scene(inbox: _Inbox) -> None:
        inbox.put(0, token(0))
        assert [told for _choice, _at, told in await inbox.take()] == [token(0)]
        later = asyncio.ensure_future(inbox.take())
        for index in (1, 2, 3):
            inbox.put(0, token(index))
            await settled()
        assert not later.done()
        inbox._rested()
        assert [told for _choice, _at, told in await later] == [token(1), token(2), token(3)]

    in_loop(scene)


@pytest.mark.parametrize(
    "urgent", [None, ValueError("it broke"), Finished(Reason.STOP), token(0)], ids=["end", "error", "finished", "other"]
)
def test_what_ends_or_begins_a_reply_does_not_wait(urgent: Told) -> None:
    async def scene(inbox: _Inbox) -> None:
        inbox.put(0, token(0))
        await inbox.take()
        inbox.put(0, token(1))
        inbox.put(1, urgent)
        assert [(choice, told) for choice, _at, told in await inbox.take()] == [(0, token(1)), (1, urgent)]

    in_loop(scene)


def test_a_reply_whose_first_token_is_half_a_character_shows_its_second_at_once() -> None:
    async def scene(inbox: _Inbox) -> None:
        inbox.put(0, Token(7, "", 0.001, 0))
        await inbox.take()
        inbox.put(0, token(1))
        assert [told for _choice, _at, told in await inbox.take()] == [token(1)]

    in_loop(scene)


def test_a_token_after_the_rest_is_taken_at_once() -> None:
    async def scene(inbox: _Inbox) -> None:
        inbox.put(0, token(0))
        await inbox.take()
        inbox._rested()
        inbox.put(0, token(1))
        assert [told for _choice, _at, told in await inbox.take()] == [token(1)]

    in_loop(scene)


def test_tokens_of_another_thread_all_arrive_in_order() -> None:
    count = 500

    async def scene(_never: _Inbox) -> None:
        inbox = _Inbox(1e-4)

        def work() -> None:
            for index in range(count):
                inbox.put(0, token(index))
            inbox.put(0, None)

        working = asyncio.ensure_future(asyncio.to_thread(work))
        found: list[Told] = []
        while not found or found[-1] is not None:
            found += [told for _choice, _at, told in await inbox.take()]
        await working
        assert found == [*map(token, range(count)), None]

    in_loop(scene)
