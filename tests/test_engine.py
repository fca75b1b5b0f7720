"""Several requests on one session: turns, the queue, cancelling, failures, the end. No test waits for a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime.engine import CHUNK_TOKENS, SHARED_CHUNK_TOKENS, Engine, QueueFull, Ticket
from rlkit.runtime.request import Event, Finished, Grammar, Guidance, Prefilled, Reason, Request, Sampling, Token
from rlkit.runtime.session import Session, open_bundle

LONG = 60  # seconds after which a test that hangs is given up; none takes a noticeable part of it


class Scripted:
    """A session without a model: a token for each id asked for, one at a time as far as `allow` has let it go."""

    def __init__(self, *, free: bool = True) -> None:
        self.pulled: list[int] = []  # the first prompt id of each stream that was pulled at, in order
        self.chunks: list[int] = []
        self.closed: list[int] = []
        self.began = threading.Semaphore(0)
        self._steps = None if free else threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        assert self._steps is not None
        self._steps.release(steps)

    def check(self, request: Request) -> None:
        if request.prompt_ids[0] == 13:
            raise ValueError("13 cannot run")

    def stream(self, request: Request, *, chunk_tokens: Callable[[], int]) -> Generator[Event, None, None]:
        who = request.prompt_ids[0]
        try:
            yield self._step(who, Prefilled(len(request.prompt_ids), len(request.prompt_ids), 0.0, reused=1))
            for index in range(request.max_new_tokens):
                self.chunks.append(chunk_tokens())
                if who == 66 and index == 1:
                    raise RuntimeError("the runtime failed")
                yield self._step(who, Token(index, f"{who}.{index} ", 0.0, index))
            yield Finished(Reason.LENGTH, new_tokens=request.max_new_tokens)
        finally:
            self.closed.append(who)
            if who == 77:
                raise OSError("closing failed")

    def _step(self, who: int, event: Event) -> Event:
        self.pulled.append(who)
        self.began.release()
        if self._steps is not None:
            assert self._steps.acquire(timeout=LONG)
        return event


def request(who: int, tokens: int = 3) -> Request:
    return Request((who, 5, 6), tokens)


def text(ticket: Ticket) -> str:
    return "".join(event.text for event in ticket if isinstance(event, Token | Finished))


def started(session: Scripted) -> None:
    assert session.began.acquire(timeout=LONG)


def test_one_request_from_start_to_end() -> None:
    with Engine(Scripted()) as engine:
        events = list(engine.submit(request(1)))
        assert [type(event) for event in events] == [Prefilled, Token, Token, Token, Finished]
        stats = engine.stats()
    assert (stats.done, stats.tokens, stats.prompt_tokens, stats.reused_tokens) == (1, 3, 3, 1)
    assert (stats.active, stats.waiting, stats.cancelled, stats.failed) == (0, 0, 0, 0)


def test_active_streams_take_turns_and_share_chunks() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=3) as engine:
        first = engine.submit(request(1, 4))
        started(session)  # alone, in its first piece
        others = [engine.submit(request(who, 4)) for who in (2, 3)]
        session.allow(100)
        assert [text(ticket) for ticket in (first, *others)] == [
            "".join(f"{who}.{index} " for index in range(4)) for who in (1, 2, 3)
        ]
    assert session.pulled == [1, 2, 3] * 5
    assert set(session.chunks[:6]) == {SHARED_CHUNK_TOKENS}


def test_a_stream_alone_has_whole_chunks() -> None:
    session = Scripted()
    with Engine(session) as engine:
        list(engine.submit(request(1)))
    assert session.chunks == [CHUNK_TOKENS] * 3


def test_a_long_request_does_not_keep_short_ones_waiting() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=2) as engine:
        long = engine.submit(request(1, 1000))
        started(session)
        short = engine.submit(request(2, 2))
        session.allow(7)  # three of the short one, and a turn of the long one before each and before the end
        assert text(short) == "2.0 2.1 "
        assert session.pulled.count(1) <= 5
        long.cancel()
        session.allow(1000)
        assert not any(isinstance(event, Finished) for event in long)


def test_what_waits_gets_a_slot_when_one_is_free() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=1, queue=2) as engine:
        tickets = [engine.submit(request(1, 1))]
        started(session)
        tickets += [engine.submit(request(who, 1)) for who in (2, 3)]
        stats = engine.stats()
        assert (stats.active, stats.waiting) == (1, 2)
        with pytest.raises(QueueFull, match="2 requests are waiting already; try again in 1 s") as caught:
            engine.submit(request(4))
        assert caught.value.retry_after_seconds >= 1
        session.allow(100)
        assert [text(ticket) for ticket in tickets] == ["1.0 ", "2.0 ", "3.0 "]
        assert session.pulled == [1, 1, 2, 2, 3, 3]
        assert text(engine.submit(request(5, 1))) == "5.0 "


def test_without_a_queue_slots_are_all_there_is() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=1, queue=0) as engine:
        ticket = engine.submit(request(1))
        with pytest.raises(QueueFull):
            engine.submit(request(2))
        ticket.cancel()
        session.allow(100)
        assert list(engine.submit(request(3)))[-1] == Finished(Reason.LENGTH, new_tokens=3)


def test_waits_are_as_long_as_replies_took() -> None:
    times = iter(range(0, 10_000, 7))
    session = Scripted(free=False)
    with Engine(session, slots=1, queue=0, clock=lambda: float(next(times))) as engine:
        session.allow(2)
        list(engine.submit(request(1, 1)))  # three turns of seven seconds
        engine.submit(request(2, 1))
        with pytest.raises(QueueFull) as caught:
            engine.submit(request(3, 1))
        assert caught.value.retry_after_seconds == 21
        assert engine.stats().busy_seconds >= 21
        session.allow(100)


def test_cancelling_frees_the_slot_at_once() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=1, queue=1) as engine:
        first = engine.submit(request(1, 100))
        started(session)
        waiting = engine.submit(request(2, 1))
        first.cancel()
        first.cancel()  # again, nothing
        assert first.cancelled
        stats = engine.stats()  # the runtime is still in the middle of a piece
        assert (stats.active, stats.waiting, stats.cancelled) == (1, 0, 1)
        session.allow(100)
        assert text(waiting) == "2.0 "
        assert list(first) == []
        assert session.pulled == [1, 2, 2]
        assert session.closed == [1, 2]
        waiting.cancel()
        assert not waiting.cancelled  # it had ended
    assert engine.stats().cancelled == 1


def test_what_waits_can_be_cancelled_and_never_begins() -> None:
    session = Scripted(free=False)
    with Engine(session, slots=1) as engine:
        first = engine.submit(request(1, 1))
        started(session)
        second = engine.submit(request(2, 1))
        second.cancel()
        session.allow(100)
        assert list(second) == []
        assert text(first) == "1.0 "
    assert set(session.pulled) == {1}


def test_a_failing_stream_hurts_no_other() -> None:
    session = Scripted(free=False)
    with Engine(session) as engine:
        tickets = {who: engine.submit(request(who)) for who in (1, 66, 2)}
        session.allow(100)
        assert text(tickets[1]) == "1.0 1.1 1.2 "
        assert text(tickets[2]) == "2.0 2.1 2.2 "
        events = iter(tickets[66])
        assert isinstance(next(events), Prefilled)
        assert isinstance(next(events), Token)
        with pytest.raises(RuntimeError, match="the runtime failed"):
            next(events)
        assert list(tickets[66]) == []
        assert engine.stats().failed == 1
        assert text(engine.submit(request(3, 1))) == "3.0 "


def test_a_stream_that_cannot_be_closed_hurts_no_other() -> None:
    with Engine(Scripted()) as engine:
        events = iter(engine.submit(request(77, 1)))
        assert isinstance([next(events) for _ in range(3)][-1], Finished)
        with pytest.raises(OSError, match="closing failed"):
            next(events)
        assert text(engine.submit(request(1, 1))) == "1.0 "


def test_what_cannot_run_is_refused_at_once() -> None:
    with Engine(Scripted()) as engine:
        with pytest.raises(ValueError, match="13 cannot run"):
            engine.submit(request(13))
        assert engine.stats().waiting == 0
    with pytest.raises(ValueError, match="0 slots and 3 places cannot serve"):
        Engine(Scripted(), slots=0, queue=3)


def test_listeners_are_told_everything_in_order_and_from_the_engines_thread() -> None:
    session = Scripted(free=False)
    told: list[object] = []
    threads: set[str] = set()
    ended = threading.Event()

    def listener(event: object) -> None:
        told.append(event)
        threads.add(threading.current_thread().name)
        if event is None:
            ended.set()

    with Engine(session) as engine:
        ticket = engine.submit(request(1, 2))
        started(session)
        ticket.listen(listener)
        session.allow(100)
        assert ended.wait(LONG)
    assert [type(event) for event in told] == [Prefilled, Token, Token, Finished, type(None)]
    assert threads == {"engine"}


def test_a_late_listener_hears_what_it_missed() -> None:
    with Engine(Scripted()) as engine:
        ticket = engine.submit(request(66))
        engine.submit(request(1, 1))
    told: list[object] = []
    ticket.listen(told.append)
    assert told[-1] is None
    assert told.count(None) == 1


def test_a_listener_that_raises_cancels_its_request_only() -> None:
    session = Scripted(free=False)
    heard: list[object] = []

    def broken(event: object) -> None:
        heard.append(event)
        raise OSError("the client is gone")

    with Engine(session) as engine:
        gone = engine.submit(request(1, 1000))
        started(session)
        gone.listen(broken)
        other = engine.submit(request(2, 2))
        session.allow(20)
        assert text(other) == "2.0 2.1 "
        assert gone.cancelled
        assert len(heard) == 1


def test_a_listener_may_cancel() -> None:
    session = Scripted(free=False)
    ended = threading.Event()
    with Engine(session) as engine:
        ticket = engine.submit(request(1, 1000))
        started(session)

        def listener(event: object) -> None:
            if event is None:
                ended.set()
            else:
                ticket.cancel()

        ticket.listen(listener)
        session.allow(1)
        assert ended.wait(LONG)
    assert session.closed == [1]


def test_closing_ends_everything() -> None:
    session = Scripted(free=False)
    engine = Engine(session, slots=1)
    tickets = [engine.submit(request(who, 1000)) for who in (1, 2)]
    started(session)
    closing = threading.Thread(target=engine.close)
    closing.start()
    session.allow(1)  # the piece that is being computed
    closing.join(LONG)
    assert not closing.is_alive()
    assert [list(ticket) for ticket in tickets] == [[], []]
    assert all(ticket.cancelled for ticket in tickets)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(request(3))
    assert session.closed == [1]
    assert not any(thread.name == "engine" and thread.is_alive() for thread in threading.enumerate())


def test_many_threads_submit_listen_and_cancel() -> None:
    """Whatever the order, every request ends once, and the counts say how."""
    outcomes: list[str] = []
    lock = threading.Lock()

    def client(number: int, engine: Engine) -> None:
        for turn in range(6):
            try:
                ticket = engine.submit(request(number + 100, 5))
            except QueueFull:
                outcome = "refused"
            else:
                if (number + turn) % 3 == 0:
                    ticket.cancel()
                outcome = "done" if any(isinstance(event, Finished) for event in ticket) else "cancelled"
            with lock:
                outcomes.append(outcome)

    session = Scripted()
    with Engine(session, slots=3, queue=5) as engine:
        clients = [threading.Thread(target=client, args=(number, engine)) for number in range(12)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(LONG)
        stats = engine.stats()
    assert len(outcomes) == 72
    assert stats.done == outcomes.count("done") > 0
    assert stats.done + stats.cancelled == 72 - outcomes.count("refused")
    assert (stats.active, stats.waiting, stats.failed) == (0, 0, 0)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("engine")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt")
    return open_bundle(export_bundle(checkpoint, root / "bundle", accuracy_level=0), threads=1)


def test_together_requests_get_what_they_get_alone(session: Session) -> None:
    asked = [
        Request(tuple(range(20, 40)), 8, ignore_stop=True),
        Request(tuple(range(20, 60)), 8, Sampling(1.0, seed=5), ignore_stop=True),
        Request(tuple(range(9, 200)), 5, Sampling(0.7, top_k=0, top_p=0.9, seed=6), ignore_stop=True),
        Request((7, 8), 30, guidance=Guidance(Grammar.REGEX, "[a-c]{3}")),
    ]
    session.keep_caches(0)
    alone = [[event.id for event in session.stream(one) if isinstance(event, Token)] for one in asked]
    with Engine(session, slots=3) as engine:
        tickets = [engine.submit(one) for one in asked]
        together = [[event.id for event in ticket if isinstance(event, Token)] for ticket in tickets]
        assert engine.stats().tokens == sum(len(tokens) for tokens in together)
    assert together == alone


def test_text_is_encoded_while_the_engine_works(session: Session, tmp_path: Path) -> None:
    words = "the cat sat on the mat"
    expected = session.encode(words)
    with Engine(session) as engine:
        ticket = engine.submit(Request(tuple(expected), 100, ignore_stop=True))
        assert all(session.encode(words) == expected for _ in range(50))
        assert len([event for event in ticket if isinstance(event, Token)]) == 100
