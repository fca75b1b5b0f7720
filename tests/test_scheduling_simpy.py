"""The simulator against the same rules written a second time, as processes of simpy: identical times of every event.

The second version shares no code with the first: its own queue, its own policy, bisection for the shared memory. simpy
orders what happens at one time by priority: finishes, arrivals, decisions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from typing import Any

import pytest
import simpy

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.workload import Arrivals, Late, Lengths, Llm, Setting, Stream, Workload
from rlkit.runtime.jobs import Option
from simulated import STAND_INS, phase

FINISH, ARRIVE, DECIDE = 1, 2, 3
Steps = list[tuple[int, int, int, int]]


def scenario(seed: int) -> Setting:
    """Two or three units, up to five streams, chains, late ones dropped or not, costs of loading; often a model."""
    draw = random.Random(seed)
    count = draw.randint(2, 3)
    grain = draw.choice([1, 100])  # on a coarse grain, much happens at the same time

    def time(low: int, high: int) -> int:
        return draw.randint(low // grain, high // grain) * grain

    def demand() -> float:
        return draw.choice([0.0, round(draw.random(), 2), 1.0])

    def switching() -> dict[str, Any]:
        costs = [tuple(time(0, 300) for _ in range(count)) for _ in range(2)]
        return {"load_ns": costs[0], "switch_ns": costs[1]} if draw.random() < 0.5 else {}

    streams: list[Stream | Llm] = []
    for index in range(draw.randint(2, 4)):
        units = draw.sample(range(count), draw.randint(1, count))
        after = f"s{draw.randrange(index)}" if index and draw.random() < 0.4 else ""
        period = next((s.period for s in streams if s.name == after and isinstance(s, Stream)), time(900, 3000))
        options = tuple(Option(unit, time(100, 1500), demand()) for unit in units)
        rest: dict[str, Any] = {"jitter": draw.choice([0, 100]), "probability": draw.choice([0.5, 1.0]), **switching()}
        due, late = time(500, 4000), draw.choice(list(Late))
        streams.append(Stream(f"s{index}", options, period, due, late=late, after=after, **rest))
    if draw.random() < 0.7:
        share = demand()
        chunks = [phase(unit, 64, time(500, 900), time(900, 1500), demand=share) for unit in range(count)]
        tokens = [phase(unit, 1, time(100, 300), time(300, 400), demand=demand()) for unit in range(count)]
        arrivals = Arrivals("poisson", draw.randint(3000, 12000))
        rest = {"concurrent": draw.randint(0, 2), **switching()}
        if draw.random() < 0.5:
            rest["move_ns"] = tuple(
                tuple(0 if a == b else draw.randint(1, 200) for b in range(count)) for a in range(count)
            )
        lengths = Lengths(10, 200), Lengths(1, 12)
        streams.append(Llm("llm", tuple(chunks), tuple(tokens), arrivals, *lengths, 3000, 500, **rest))
    names = tuple(f"u{index}" for index in range(count))
    return Setting("random", names, tuple(streams), 40_000, cap=draw.choice([1.0, 1.3]))


def shared(demands: list[float], cap: float) -> list[float]:
    """Speeds under a common slowdown of the memory, found by bisection."""
    if sum(demands) <= cap:
        return [1.0] * len(demands)
    low, high = 1.0, 1e9
    while low < (middle := (low + high) / 2) < high:
        moved = sum(d / (1 - d + d * middle) for d in demands)
        low, high = (middle, high) if moved > cap else (low, middle)
    return [1 / (1 - d + d * high) for d in demands]


class Second:
    """The rules of the simulator, written with simpy."""

    def __init__(self, load: Workload, policy: str) -> None:
        self.load, self.policy = load, policy
        self.streams = load.setting.streams
        self.env = simpy.Environment()
        self.steps: Steps = []
        self.over: dict[int, str] = {}
        self.ended: dict[str, dict[int, int]] = {"done": {}, "dropped": {}}  # when, by job
        self.tokens: dict[int, list[int]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.lobby: list[dict[str, Any]] = []
        self.slots: list[dict[str, Any] | None] = [None] * len(load.setting.units)
        self.loaded: list[list[str]] = [[] for _ in load.setting.units]  # the last one runs or ran last
        self.over_event = {number: self.env.event() for number in range(len(load))}
        for number, arrival in enumerate(load.arrivals):
            event = self.env.event()
            event.callbacks.append(lambda _, number=number: self.env.process(self.arrive(number)))
            event._ok, event._value = True, None
            self.env.schedule(event, priority=ARRIVE, delay=arrival)  # type: ignore[arg-type]

    def at(self, time: int, priority: int) -> simpy.Event:
        event = self.env.event()
        event._ok, event._value = True, None
        self.env.schedule(event, priority=priority, delay=time - self.env.now)  # type: ignore[arg-type]
        return event

    def arrive(self, number: int) -> Generator[simpy.Event, Any, None]:
        parent = self.load.parents[number]
        if parent >= 0 and parent not in self.over:
            yield self.over_event[parent]
        if parent >= 0 and self.over[parent] == "dropped":
            self.end(number, "dropped")
            return
        stream = self.streams[self.load.streams[number]]
        job = {"number": number, "stream": stream, "arrival": self.env.now, "due": self.load.deadlines[number]}
        job |= {"past": 0, "home": None, "tokens": []}
        if isinstance(stream, Llm):
            job["due"] = self.env.now + stream.ttft
            self.tokens[number] = job["tokens"]
            self.lobby.append(job)
            self.admit()
        else:
            self.jobs.append(job)
        self.ask()
        yield self.env.timeout(0)

    def admit(self) -> None:
        for job in list(self.lobby):
            bound = job["stream"].concurrent
            if not bound or sum(other["stream"] is job["stream"] for other in self.present()) < bound:
                self.lobby.remove(job)
                self.jobs.append(job)

    def present(self) -> list[dict[str, Any]]:
        return self.jobs + [slot["job"] for slot in self.slots if slot]

    def end(self, number: int, how: str) -> None:
        self.over[number] = how
        self.ended[how][number] = int(self.env.now)
        self.over_event[number].succeed()

    def ask(self) -> None:
        event = self.at(self.env.now, DECIDE)
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self.decide())

    def ways(self, job: dict[str, Any]) -> list[tuple[int, int, float, int]]:
        """(ns, unit, demand, tokens) of the next step on each unit."""
        stream, past = job["stream"], job["past"]
        if isinstance(stream, Stream):
            return [(o.ns, o.unit, o.demand, 0) for o in stream.options]
        prompt = self.load.prompts[job["number"]]
        table = stream.prefill if past < prompt else stream.decode
        cells = [phase.options[min(past // 128, len(phase.options) - 1)] for phase in table]
        return [(o.ns, o.unit, o.demand, min(o.units, prompt - past) if past < prompt else 1) for o in cells]

    def rank(self, job: dict[str, Any]) -> tuple[int, int, int]:
        key = {"fcfs": job["arrival"], "edf": job["due"]}[self.policy]
        return key, job["arrival"], job["number"]

    def decide(self) -> None:
        now = self.env.now
        if self.jobs and not all(self.slots):
            for job in list(self.jobs):
                if isinstance(job["stream"], Stream) and job["stream"].late is Late.DROP and job["due"] < now:
                    self.jobs.remove(job)
                    self.end(job["number"], "dropped")
        while True:
            found = [(job, [w for w in self.ways(job) if not self.slots[w[1]]]) for job in self.jobs]
            able = [(job, ways) for job, ways in found if ways]
            if not able:
                return
            job, ways = min(able, key=lambda pair: self.rank(pair[0]))
            self.start(job, min(ways, key=lambda way: way[0]))

    def start(self, job: dict[str, Any], way: tuple[int, int, float, int]) -> None:
        ns, unit, demand, tokens = way
        stream, held = job["stream"], self.loaded[unit]
        if stream.name not in held:
            ns += stream.load_ns[unit] if stream.load_ns else 0
        elif held[-1] != stream.name:
            ns += stream.switch_ns[unit] if stream.switch_ns else 0
        self.loaded[unit] = [name for name in held if name != stream.name] + [stream.name]
        if job["home"] not in (None, unit) and isinstance(stream, Llm) and stream.move_ns:
            ns += stream.move_ns[job["home"]][unit]
        job["home"] = unit
        self.jobs.remove(job)
        self.slots[unit] = {"job": job, "left": ns, "speed": 1.0, "demand": demand, "tokens": tokens}
        self.slots[unit] |= {"began": self.env.now, "seen": self.env.now, "alarm": None}  # type: ignore[operator]
        self.retime(unit)

    def retime(self, fresh: int | None = None) -> None:
        """The set of running steps has changed: new speeds, and a new alarm where the speed is another."""
        now = self.env.now
        running = [(unit, slot) for unit, slot in enumerate(self.slots) if slot]
        speeds = shared([slot["demand"] for _, slot in running], self.load.setting.cap)
        for (unit, slot), speed in zip(running, speeds, strict=True):
            if speed != slot["speed"]:
                slot["left"] -= (now - slot["seen"]) * slot["speed"]
                slot["speed"], slot["seen"] = speed, now
            elif unit != fresh:
                continue
            slot["alarm"] = alarm = self.at(max(now, now + math.ceil(slot["left"] / speed - 1e-6)), FINISH)
            alarm.callbacks.append(lambda event, unit=unit: self.finish(unit, event))

    def finish(self, unit: int, alarm: simpy.Event) -> None:
        slot = self.slots[unit]
        if slot is None or slot["alarm"] is not alarm:
            return  # planned before the speed changed
        job, now = slot["job"], self.env.now
        number = job["number"]
        self.slots[unit] = None
        self.steps.append((slot["began"], now, unit, number))
        self.retime()
        if isinstance(job["stream"], Stream):
            self.end(number, "done")
        else:
            job["past"] += slot["tokens"]
            if job["past"] >= self.load.prompts[number]:
                job["tokens"].append(now)
                job["due"] = now + job["stream"].tpot
            if len(job["tokens"]) < self.load.outputs[number]:
                self.jobs.append(job)
            else:
                self.end(number, "done")
                self.admit()
        self.ask()


@pytest.mark.parametrize("seed", range(50))
def test_events_happen_at_the_same_times_as_in_simpy(seed: int) -> None:
    load = expand(scenario(seed), seed)
    policy = ("fcfs", "edf")[seed % 2]
    second = Second(load, policy)
    second.env.run(until=load.setting.duration + 1)
    first = run(load, STAND_INS[policy]())
    assert sorted(row[:4] for row in first.steps) == sorted(second.steps)
    assert {number: time for number, time in enumerate(first.finished) if time >= 0} == second.ended["done"]
    assert {number: time for number, time in enumerate(first.dropped) if time >= 0} == second.ended["dropped"]
    assert {number: times for number, times in first.tokens.items() if times} == {
        n: t for n, t in second.tokens.items() if t
    }
    assert len(first.steps) > 10


def test_the_random_scenarios_hold_what_they_are_meant_to() -> None:
    """Contention, drops, chains, switches and language models all occur."""
    cases = [scenario(seed) for seed in range(50)]
    runs = [run(expand(case, seed), STAND_INS["edf"]()) for seed, case in enumerate(cases)]
    assert sum(any(time >= 0 for time in done.dropped) for done in runs) > 10
    assert sum(bool(done.tokens) for done in runs) > 20
    assert sum(any(parent >= 0 for parent in done.workload.parents) for done in runs) > 20
    assert sum(any(stream.switch_ns for stream in case.streams) for case in cases) > 20
    slowed = [finish - start > option.ns for done in runs for start, finish, _, option in done.rows]
    assert 0.1 < sum(slowed) / len(slowed) < 0.9
