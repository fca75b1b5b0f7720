"""Simulated beside real: rehearsal, fitted demands, the comparison, and the command."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import nodes
import tiny
from rlkit.apps import cli, schedulevalidate
from rlkit.apps.schedulevalidate import Ground, prepared_ground, validated
from rlkit.export.build import export_bundle
from rlkit.profiles.bundle import MANIFEST
from rlkit.profiles.scheduling import profile, scenario, validation
from rlkit.profiles.scheduling.profile import Entry, Profile, Run, Step
from rlkit.profiles.scheduling.together import fitted, said
from rlkit.recover import atomic
from rlkit.recover.progress import silent
from rlkit.runtime import rehearse, tuned
from rlkit.runtime.jobs import Job, Kind, Option
from rlkit.runtime.rehearse import Act, Beside
from rlkit.runtime.workplan import Finish

MS = 1_000_000
SCENARIO = """
schema_version = 1
title = "t"
duration_ms = 2000
[streams.eyes]
model = "small"
rate = 50
[requests.talk]
model = "chat"
prompt_tokens = { low = 20, high = 40 }
output_tokens = 6
ttft_ms = 100
tpot_ms = 20
chunks = [16]
concurrent = 1
arrivals = { process = "periodic", interval_ms = 200 }
"""
READ = scenario.parse(SCENARIO, "mine.toml")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(tuned.OVERRIDE, tuned.OFF)
    monkeypatch.setattr(schedulevalidate.cores, "allowed", lambda: (0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return nodes.save(path, [node], {"w": np.ones((16, 4), np.float32)}, {"x": (TensorProto.FLOAT, ["rows", 16])})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2), root / "bundle")


@pytest.fixture(scope="module")
def known(model: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of both: frames of 4 ms, chunks of 16 tokens of 8 ms, tokens of 5 ms."""
    steps = (Step(16, 0, 3, 0.008, 0.008), Step(1, 32, 9, 0.005, 0.005))
    frames, talk = (Run("cpu", 1, 0.1, 1, each) for each in ((Step(0, 0, 9, 0.004, 0.004),), steps))
    digests = atomic.sha256(model), atomic.sha256(bundle / MANIFEST)
    small = Entry("small", "frame", "file", "", digests[0], 10**6, (frames,))
    chat = Entry("chat", "language", "bundle", "", digests[1], 10**6, (talk,), "w4w2-gateup", 256, 100)
    path = tmp_path_factory.mktemp("profile") / "p.json"
    profile.write(path, Profile("2026-11-22", tuned.machine_facts(), 1e10, 8 * 10**9, (small, chat)))
    return path


@pytest.fixture
def ground(model: Path, bundle: Path, known: Path) -> Ground:
    return prepared_ground(READ, [str(bundle), f"small={model}"], known, "a=cpu:1,b=cpu:1", silent)


TIMES = {"frame": 4 * MS, "chunk": 8 * MS, "token": 5 * MS}


class Machine:
    """Workers and work in time of their own: frames of 4 ms, chunks of 8, tokens of 5, times `slower`.

    With `shares`, a step that starts beside another one takes half as long again.
    """

    def __init__(self, slower: float = 1.0, *, shares: bool = False) -> None:
        self.time, self.slower, self.shares = 0, slower, shares
        self.until: dict[int, int] = {}
        self.taken = 0
        self.frames: dict[tuple[int, int], Any] = {}
        self.sessions: dict[tuple[int, int], Any] = {}
        self.forgotten = 0

    def begin(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time

    def start(self, unit: int, task: Callable[[], object]) -> None:
        task()
        self.until[unit] = self.time + round(self.taken * (1.5 if self.shares and self.until else 1.0))

    def wait(self, until: int) -> Sequence[Finish]:
        self.time = max(self.time, min(min(self.until.values(), default=until), until))
        return [Finish(unit, self.until.pop(unit)) for unit in sorted(self.until) if self.until[unit] <= self.time]

    def rest(self) -> Sequence[Finish]:
        self.time = max([self.time, *self.until.values()])
        return self.wait(self.time)

    def take(self, what: str) -> None:
        self.taken = round(TIMES[what] * self.slower)

    def run(self) -> None:
        self.take("frame")

    def open(self, crew: Machine, options: Sequence[Sequence[Option]]) -> None:
        assert crew is self
        for unit in (0, 1):
            self.frames[0, unit], self.sessions[1, unit] = self, Session(self)

    def step(self, job: Job, option: Option) -> None:
        self.take("frame" if job.kind is Kind.FRAME else "token")
        if job.kind is Kind.PREFILL:  # a chunk of one token takes as long as a token, and 16 as long as a chunk
            more = round((TIMES["chunk"] - TIMES["token"]) * self.slower)
            self.taken += more * (option.units - 1) // 15

    def leave(self, job: Job) -> None:
        raise AssertionError("nobody gives a request up here")

    def forget(self, lengths: dict[int, tuple[int, int]]) -> None:
        assert all(20 <= prompt <= 40 and output == 6 for prompt, output in lengths.values())
        self.forgotten += 1


class Session:
    """What rehearsals do with a session, in the machine's time."""

    vocab_size = 100

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def stream(self, request: Any, *, chunk_tokens: Callable[[], int]) -> Iterator[Any]:
        from rlkit.runtime.request import Prefilled, Token

        total, done = len(request.prompt_ids), 0
        while done < total:
            self.machine.take("chunk")
            done = min(done + chunk_tokens(), total)
            yield Prefilled(done, total, 0.0)
        for index in range(request.max_new_tokens):
            if index:
                self.machine.take("token")
            yield Token(5, "", 0.0, index)


def on(machine: Machine) -> Callable[[Ground], Any]:
    return lambda ground: contextlib.nullcontext((machine, machine))


def test_what_is_as_profiled_runs_as_simulated(ground: Ground) -> None:
    """Exact clocks: every measure is the same, and all seeds and policies are there."""
    machine = Machine()
    found, runs = validated(ground, ["edf", "fcfs"], [0, 1], silent, 0.05, on(machine))
    assert [(case.policy, case.seed) for case in found.cases] == [("edf", 0), ("edf", 1), ("fcfs", 0), ("fcfs", 1)]
    assert machine.forgotten == 4 and validation.met(found)
    assert {value for value in found.slower.values()} == {1.0} and set(found.switch.values()) == {(0, 0)}
    assert all(demand <= 0.5 for demand in found.demands.values())  # two beside each other: nothing is slowed
    for case in found.cases:
        assert case.simulated.streams == case.real.streams and case.simulated.utilization == case.real.utilization
        assert case.effort.decisions > 100
    assert [run.policy for run in runs[:2]] == ["edf", "edf, real"]
    assert len(runs[0].rows) == len(runs[1].rows) > 150
    said = found.to_json()
    json.dumps(said, allow_nan=False)
    assert said["met"] and said["compared"][0]["within"] and len(said["cases"]) == 4


def test_a_slower_machine_is_met_by_rehearsal_not_by_the_profile(ground: Ground) -> None:
    """Frames of 24 ms, due after 20."""
    found, _ = validated(ground, ["fcfs"], [0], silent, 0.05, on(Machine(6.0)))
    assert set(found.slower.values()) == {6.0} and validation.met(found)
    rows = {row.measure: row for row in validation.rows(found)}
    row = rows["violations, of all"]
    assert row.plain == 0.0 and row.simulated == row.real and row.real is not None and row.real > 50
    ttft = rows["TTFT, median"]
    assert ttft.plain is not None and ttft.real is not None and ttft.real > 5 * ttft.plain and ttft.apart == 0.0


def test_steps_that_slow_each_other_get_demands_that_say_so(ground: Ground) -> None:
    """Half as long again beside another one: each asks for three quarters of what is shared."""
    found, _ = validated(ground, ["edf"], [0], silent, 0.05, on(Machine(shares=True)))
    assert found.demands == {kind: pytest.approx(0.7, abs=0.1) for kind in found.demands} and len(found.demands) == 3
    busy = [row for row in validation.rows(found) if row.measure == "busy"]
    assert all(row.simulated is not None and row.plain is not None and row.simulated > row.plain for row in busy)


def test_bars() -> None:
    """5 points of violations, 20 % of the time to the first token; what was not measured breaks none."""
    row = validation.Row("edf", "all", "violations", "%", 0.0, 1.0, 6.0, 5.0, validation.MOST_POINTS)
    assert row.within and not replace(row, apart=-5.1).within
    assert replace(row, most=None).within is None and replace(row, apart=None).within is None


def test_demands_are_fitted_to_pairs() -> None:
    """What the model of one shared good says of two steps is found again; a step that slows nobody asks for nothing."""
    true = {"a": 0.8, "b": 0.6, "c": 0.1}
    pairs = []
    for one, other in (("a", "a"), ("a", "b"), ("b", "b"), ("a", "c"), ("b", "c")):
        times = said(true, Beside(one, other, 1.0, 1.0))
        pairs.append(Beside(one, other, *times))
    found = fitted(pairs)
    assert found["a"] == pytest.approx(0.8, abs=0.02) and found["b"] == pytest.approx(0.6, abs=0.02)
    assert all(said(found, pair) == pytest.approx((pair.one_slower, pair.other_slower), abs=0.03) for pair in pairs)
    assert fitted([]) == {}
    faster = fitted([Beside("a", "b", 0.7, 0.9)])  # noise: nothing runs faster beside another
    assert said(faster, Beside("a", "b", 0.7, 0.9)) == (1.0, 1.0)


def test_rehearsals_count_what_runs_beside_and_after() -> None:
    """A step that finds another model's traces takes 3 ms more; beside the other unit, twice as long."""
    machine = Machine()
    last: dict[int, str] = {}

    def act(kind: str, unit: int, ns: int) -> Act:
        def step() -> None:
            other = len(machine.until) > 0
            machine.taken = ns * (1 + other) + (3 * MS if last.get(unit, kind) != kind else 0)
            last[unit] = kind

        return Act(kind, unit, step)

    found = rehearse.rehearse(machine, [act("x", 0, 4 * MS), act("y", 0, 10 * MS), act("x", 1, 4 * MS)], 0.1)
    assert found.acts["y", 0] == rehearse.Kept(10 * MS, 3 * MS) and found.acts["x", 0].after == 3 * MS
    assert found.acts["x", 1] == rehearse.Kept(4 * MS, None)
    assert [(pair.one, pair.other) for pair in found.pairs] == [("x", "x"), ("y", "x")]
    assert found.pairs[1] == Beside("y", "x", 2.0, 2.0)


def test_moving_a_cache_costs_nothing_within_a_session_and_a_reading_beyond(
    model: Path, bundle: Path, ground: Ground
) -> None:
    (talk,) = (each for each in ground.setting(0).streams if each.name == "talk")
    assert talk.move_token_ns == ((0.0, 0.0), (0.0, 0.0)) and talk.move_ns == ()  # type: ignore[union-attr]
    apart = replace(ground, places=(ground.places[0], replace(ground.places[1], threads=2)))
    (talk,) = (each for each in apart.setting(0).streams if each.name == "talk")
    assert talk.move_token_ns == ((0.0, 8 * MS / 16), (8 * MS / 16, 0.0))  # type: ignore[union-attr]


def test_units_and_models_that_do_not_fit(model: Path, bundle: Path, known: Path) -> None:
    def refused(said: str, *bundles: str, units: str = "a=cpu:1", path: Path | None = known) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            prepared_ground(READ, bundles, path, units, silent)
        assert "\n" not in str(caught.value)

    refused("--units take 3 processors, this process may use 2", str(bundle), units="a=cpu:2,b=cpu:1")
    refused(r"mine.toml: requests.talk.model = 'chat' needs a bundle; give it: --bundle FOLDER", f"small={model}")
    refused(r"mine.toml: streams.eyes.model: 'small' is no ONNX file, .*; give --bundle small=FILE", str(bundle))
    refused("has no model 'other', but small, chat", f"other={bundle}")
    refused(r"'small': .* is not an .onnx file", f"small={bundle}", str(bundle))
    refused(r"'chat': .* is not a bundle folder", f"small={model}", f"chat={model}")


def test_assets_that_are_not_here_are_named(bundle: Path, known: Path) -> None:
    read = scenario.parse(SCENARIO.replace('"small"', '"nsnet2"'), "mine.toml")
    with pytest.raises(FileNotFoundError, match=r"mine.toml: streams.eyes.model: nsnet2 .*; run: rlkit pull nsnet2$"):
        prepared_ground(read, [str(bundle)], known, None, silent)


def test_a_profile_of_another_machine_is_refused(model: Path, bundle: Path, known: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    read = profile.read(known)
    profile.write(path, replace(read, machine={**read.machine, "cpu": "another processor"}))
    with pytest.raises(ValueError, match=r"other\.json: machine\.cpu = 'another processor' there, .* measure here"):
        prepared_ground(READ, [str(bundle), f"small={model}"], path, None, silent)


def test_the_command_runs_for_real(
    model: Path, bundle: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Real sessions for a moment: everything is there; how fast it was is of no account."""
    monkeypatch.undo()
    monkeypatch.setattr(schedulevalidate, "REHEARSAL_SECONDS", 0.0)
    file, out, trace = tmp_path / "mine.toml", tmp_path / "out.json", tmp_path / "trace.json"
    file.write_text(SCENARIO)
    words = ["schedule", str(file), "--validate", "--bundle", str(bundle), "--bundle", f"small={model}"]
    words += ["--profile", str(known), "--units", "a=cpu:1", "--policies", "edf", "--seeds", "1", "--duration", "0.3"]
    assert cli.run([*words, "-o", str(out), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "talk" in shown and "TTFT, median" in shown and "decisions took" in shown
    said = json.loads(out.read_text())
    assert said["units"] == ["a=cpu:1"] and said["duration_s"] == 0.3 and said["machine"] == tuned.machine_facts()
    (case,) = said["cases"]
    assert case["real"]["streams"][0]["jobs"] == case["simulated"]["streams"][0]["jobs"] == 15
    assert json.loads(trace.read_text())["otherData"]["policies"] == ["edf", "edf, real"]
    assert cli.run([*words, "--html", str(tmp_path / "p.html")]) == 2
    assert "--validate runs on this machine" in capsys.readouterr().err
