"""The words of scheduling: what they refuse, and what a policy sees."""

from __future__ import annotations

import pytest

from rlkit.runtime.jobs import Job, Kind, Option, State, Unit, Upcoming


def job(number: int) -> Job:
    return Job(number, 0, "eye", Kind.FRAME, number, 5, 9, 4, 0, True, (Option(0, 3),), (3,), (0,))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ((-1, 5), "unit -1"),
        ((0, 0), "0 ns"),
        ((0, 2.5), "2.5 ns"),
        ((0, 5, 1.5), "demand 1.5"),
        ((0, 5, float("nan")), "demand nan"),
        ((0, 5, 0.5, -1.0), "-1.0 mJ"),
        ((0, 5, 0.5, None, "w2", 2.0), "quality 2.0"),
        ((0, 5, 0.5, None, "w2", 1.0, -1), "-1 tokens"),
    ],
)
def test_an_option_that_cannot_be_is_refused(values: tuple[object, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Option(*values)  # type: ignore[arg-type]


def test_a_policy_sees_idle_units_and_what_streams_will_bring() -> None:
    frames = [Upcoming(time, 0, time + 5, (Option(0, 3),)) for time in (10, 20, 30)]
    state = State([Unit(0, "cpu"), Unit(1, "npu")], 1.0, lambda now, until: [f for f in frames if now < f[0] <= until])
    state.now = 10
    state.units[0].running = job(0)
    assert [unit.name for unit in state.idle()] == ["npu"]
    assert [frame.arrival for frame in state.upcoming(20)] == [20, 30]
    assert State([Unit(0, "cpu")]).upcoming(100) == ()


def test_a_job_and_a_unit_say_what_they_are() -> None:
    unit = Unit(1, "npu")
    unit.running, unit.until = job(7), 12
    assert repr(job(7)) == "Job(7: eye[7] FRAME, deadline 9)"
    assert repr(unit) == "Unit(1: npu, Job(7: eye[7] FRAME, deadline 9), until 12)"
    assert job(7).steps_done == 0 and job(7).home == -1
