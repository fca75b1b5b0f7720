"""A run as a trace: what a viewer needs of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.trace import trace, write
from rlkit.profiles.scheduling.traces import together
from rlkit.profiles.scheduling.workload import Stream
from rlkit.runtime.jobs import Option
from simulated import STAND_INS, gaming, one, setting, simulate


@pytest.fixture(scope="module")
def played() -> Run:
    return run(expand(gaming(seconds=2), 5), STAND_INS["fcfs"]())


def of(run: Run, *phases: str) -> list[dict[str, Any]]:
    return [event for event in trace(run)["traceEvents"] if event["ph"] in phases]


def test_every_step_is_a_slice_on_its_units_track(played: Run) -> None:
    slices = of(played, "X")
    assert len(slices) == len(played.rows) + len(played.cut)
    assert Counter(event["tid"] for event in slices) == Counter(row[3].unit for row in (*played.rows, *played.cut))
    names = {event["tid"]: event["args"]["name"] for event in of(played, "M") if event["name"] == "thread_name"}
    assert names == {0: "cpu", 1: "igpu", 2: "npu", 1000: "dropped"}
    for event in slices:
        assert event["ts"] * 1000 == pytest.approx(event["args"]["start_ns"])
        assert event["dur"] * 1000 == pytest.approx(event["args"]["finish_ns"] - event["args"]["start_ns"])
    # Nothing overlaps on a track: viewers would nest it.
    by_track = sorted((event["tid"], event["args"]["start_ns"], event["args"]["finish_ns"]) for event in slices)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(by_track))


def test_arrows_go_from_what_finished_to_what_came_after() -> None:
    eye = Stream("eye", (Option(0, 2000),), 20_000, 20_000)
    gaze = Stream("gaze", (Option(1, 3000),), 20_000, 20_000, after="eye")
    ends = of(simulate(setting(eye, gaze, units=2, duration=60_000)), "s", "f")
    assert [(event["ph"], event["tid"], event["ts"]) for event in ends] == [
        (ph, tid, ts) for start in (0, 20, 40) for ph, tid, ts in (("s", 0, start + 1.999), ("f", 1, start + 2.0))
    ]
    assert len({event["id"] for event in ends}) == 3


def test_counters_follow_bandwidth_and_queue() -> None:
    both = [Stream(f"s{u}", (Option(u, 1000, demand),), 9000, 9000, count=1) for u, demand in ((0, 0.5), (1, 0.75))]
    counted = of(simulate(setting(*both, one("late", 500, 9000), units=2, duration=9000)), "C")
    bandwidth = [(event["ts"], event["args"]["value"]) for event in counted if "bandwidth" in event["name"]]
    queue = [(event["ts"], event["args"]["value"]) for event in counted if "jobs" in event["name"]]
    assert [value for _, value in bandwidth] == [125.0, 75.0, 0.0]
    assert [value for _, value in queue][:2] == [3.0, 2.0] and queue[-1][1] == 0.0


def test_drops_and_late_frames_are_marked() -> None:
    frames = [one("long", 5000, 9000), Stream("gone", (Option(0, 1),), 9000, 100, count=1), one("late", 10, 1000)]
    done = simulate(setting(*frames, duration=9000))
    (drop,) = of(done, "i")
    assert (drop["name"], drop["ts"], drop["tid"]) == ("gone dropped", 5.0, 1000)
    assert [event["args"]["late"] for event in of(done, "X")] == [False, True]


def test_the_file_is_whole_json(tmp_path: Path, played: Run) -> None:
    path = tmp_path / "run.json"
    write(played, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(trace(played)))
    assert list(tmp_path.iterdir()) == [path]


def test_steps_that_the_end_cut_off_say_so() -> None:
    (event,) = of(simulate(setting(one("x", 60, 70), duration=40)), "X")
    assert (event["args"]["fate"], event["dur"]) == ("unfinished", 0.04)


def test_viewers_find_what_they_need_in_every_event(played: Run) -> None:
    """The format's own rules (Trace Event Format): phases with their fields, tracks that are named, arrows in pairs."""
    eye = Stream("eye", (Option(0, 2000),), 20_000, 20_000)
    gaze = Stream("gaze", (Option(1, 9),), 20_000, 20_000, after="eye")
    chain = simulate(setting(eye, gaze, units=2, duration=400_000))
    made = json.loads(json.dumps(together([chain, played, chain])))
    needs = {
        "M": {"args"},
        "X": {"ts", "dur"},
        "C": {"ts", "args"},
        "i": {"ts", "s"},
        "s": {"ts", "id"},
        "f": {"ts", "id"},
    }
    tracks, arrows = set(), []
    for event in made["traceEvents"]:
        assert event.keys() >= {"ph", "pid", "tid", "name"} | needs[event["ph"]]
        assert (
            type(event["pid"]) is int
            and type(event["tid"]) is int
            and min(event.get("ts", 0), event.get("dur", 0)) >= 0
        )
        if event["name"] == "thread_name":
            tracks.add((event["pid"], event["tid"]))
        elif event["ph"] in "Xi":
            assert (event["pid"], event["tid"]) in tracks
        elif event["ph"] in "sf":
            arrows.append((event["id"], event["ph"], event["ts"]))
    ends = sorted(arrows, key=lambda arrow: (arrow[0], arrow[1] == "f"))
    assert len(ends) > 20 and len({number for number, *_ in ends}) == len(ends) / 2
    assert all(
        (a[1], b[1], a[0]) == ("s", "f", b[0]) and a[2] <= b[2] for a, b in zip(ends[::2], ends[1::2], strict=True)
    )
