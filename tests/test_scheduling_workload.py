"""Settings that do not fit together, and what a seed draws."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.workload import Arrivals, Lengths, Llm, Phase, Setting, Stream
from rlkit.runtime.jobs import Option
from simulated import gaming, llm, one, phase, setting

# What does not fit together.


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Stream("x", (), 5, 5), "no unit can run its model"),
        (lambda: Stream("x", (Option(0, 1),), 0, 5), "period 0"),
        (lambda: Stream("x", (Option(0, 1),), 5, 5, probability=0.0), r"probability 0\.0"),
        (lambda: setting(Stream("x", (Option(2, 1),), 5, 5), units=2), "a cost on unit 2, the units are 0 to 1"),
        (lambda: setting(one("x", 1, 1), one("x", 1, 1)), "two streams of one name"),
        (lambda: setting(one("x", 1, 1, after="z")), "comes after 'z': name a stream of frames"),
        (lambda: setting(one("x", 1, 1, after="x")), "comes after itself"),
        (lambda: setting(one("x", 1, 1, after="y"), one("y", 1, 1, after="x")), "comes after itself"),
        (lambda: setting(one("y", 1, 1), Stream("x", (Option(0, 1),), 5, 5, after="y")), "differ in rate"),
        (lambda: setting(one("x", 1, 1, load_ns=(1, 1))), "load, switch and move costs"),
        (lambda: setting(llm([phase(0, 1, 1)], [phase(0, 1, 1)], move_ns=((0, 1),))), "load, switch and move costs"),
        (lambda: setting(one("x", 1, 1, weights_nbytes=11), memory_nbytes=10), "weights of 11 bytes in memory of 10"),
        (lambda: setting(duration=10), "give it a unit, a stream"),
        (lambda: Lengths(5, 4), "5 to 4 tokens"),
        (lambda: Lengths(1, 4, median=5), "median of 5"),
        (lambda: Arrivals("often", 5), "arrival process 'often'"),
        (lambda: Arrivals("poisson", 0), "mean gap of 0 ns"),
        (lambda: Arrivals("times", times=(-1,)), "before the start"),
        (lambda: llm([], [phase(0, 1, 1)]), "no unit can run its model"),
        (lambda: llm([phase(0, 1, 1)], [phase(0, 1, 1)], tpot=0), "TPOT target 0"),
        (lambda: Phase((Option(0, 5), Option(1, 5))), "a phase of several units"),
        (lambda: Phase((Option(0, 5),)), "a step of 0 tokens"),
        (lambda: phase(0, 1, 5, least=(1, 1)), "2 least times for 1 contexts"),
        (lambda: phase(0, 1, 5, least=(6,)), "longer than a full one"),
        (lambda: expand(setting(one("x", 1, 1)), -1), "seed -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: Callable[[], object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as error:
        make()
    assert re.search(r": \w", str(error.value)) and "\n" not in str(error.value)


# Arrivals.


def test_arrivals_are_the_seeds_and_streams_draw_for_themselves() -> None:
    case = gaming(seconds=20)
    first, second = expand(case, 3), expand(case, 3)
    assert (first.arrivals, first.prompts, first.outputs) == (second.arrivals, second.prompts, second.outputs)
    assert expand(case, 4).arrivals != first.arrivals
    fewer = expand(Setting("gaming", case.units, case.streams[:2], case.duration), 3)
    mine = [time for time, stream in zip(first.arrivals, first.streams, strict=True) if stream < 2]
    assert fewer.arrivals == mine == sorted(mine)


def test_jitter_moves_arrivals_and_not_deadlines() -> None:
    load = expand(setting(Stream("x", (Option(0, 1),), 1000, 700, jitter=100), duration=100_000), 0)
    late = [time - 1000 * index for time, index in zip(load.arrivals, load.indices, strict=True)]
    assert -50 <= min(late) < -40 and 40 < max(late) <= 50 and load.arrivals[0] >= 0
    assert load.deadlines == [1000 * index + 700 for index in range(100)]


def test_requests_come_as_their_process_says() -> None:
    def drawn(arrivals: Arrivals, **more: object) -> list[int]:
        stream = llm([phase(0, 1, 1)], [phase(0, 1, 1)], **more)
        return expand(
            setting(Llm(**{f: getattr(stream, f) for f in stream.__slots__} | {"arrivals": arrivals})), 1
        ).arrivals

    assert drawn(Arrivals("periodic", 30_000, offset=5)) == [5, 30_005, 60_005, 90_005]
    assert drawn(Arrivals("times", times=(9, 3, 200_000))) == [3, 9]
    times = drawn(Arrivals("poisson", 100, offset=500))
    assert 880 < len(times) < 1120 and times[0] > 500 and times == sorted(times)


def test_lengths_stay_within_their_bounds() -> None:
    wide = {"prompt": Lengths(10, 400, median=50, sigma=1.0), "output": Lengths(2, 4)}
    load = expand(setting(llm([phase(0, 64, 1)], [phase(0, 1, 1)], times=tuple(range(500)), **wide)), 0)
    assert min(load.prompts) == 10 and max(load.prompts) == 400
    assert 40 < sorted(load.prompts)[250] < 60
    assert set(load.outputs) == {2, 3, 4}
