"""Points of a KV frontier measured by several processes: the same as by one, whoever is killed, and nothing twice."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.apps import cli, kvspread
from rlkit.apps.kvpoints import Bench, Setup
from rlkit.apps.kvspread import Where
from rlkit.profiles.frontier.search import Job, Measured
from rlkit.profiles.frontier.space import Point
from rlkit.profiles.frontier.store import Store
from rlkit.profiles.needs import Memory

NO_RAY = importlib.util.find_spec("ray") is None
CONTEXT = 450
POINTS = [Point("float", kv, 64, CONTEXT) for kv in ("k16v16", "k8v8:g32", "k4v4:g32:smooth")]
JOBS = [Job(point, *span) for span in ((0, 0), (0, 4), (4, 8)) for point in POINTS]


class _Team:
    """Does jobs in reverse, as another machine would."""

    def __init__(self, bench: Bench) -> None:
        self.asked: list[Job | None] = []
        self._do = kvspread.opened(bench.setup, kvspread.version(kvspread.PACKAGE))

    def __call__(self, tasks: Any) -> Iterator[tuple[int, Any]]:
        for number in reversed(range(len(tasks))):
            self.asked.append(tasks[number])
            yield number, self._do(tasks[number])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("kvspread") / "full", context=512)


@pytest.fixture
def setup(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    return Setup({"float": str(full)}, {"float": 1000}, ("needle",), 8, threads=1)


def alone(setup: Setup, folder: Path) -> list[Measured]:
    bench = Bench(setup)
    with kvspread.measuring(bench, Store(folder, bench.identify), Where()) as run:
        return list(run(JOBS))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def test_what_is_known_is_not_asked_for(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(setup, tmp_path / "one")
    assert [len(one.scores) for one in expected] == [0] * 3 + [4] * 6
    files(tmp_path / "one")[0].unlink()
    bench = Bench(setup)
    team, store = _Team(bench), Store(tmp_path / "one", bench.identify)
    assert list(kvspread._run(bench, store, team, JOBS)) == expected  # in their order
    assert len([job for job in team.asked if job is not None]) == 1
    many, others = Store(tmp_path / "many", bench.identify), _Team(bench)
    assert list(kvspread._run(bench, many, others, JOBS)) == expected
    assert others.asked[0] is None and len(others.asked) == 1 + len(JOBS)  # the reference's logits come first
    names = [[path.name for path in files(tmp_path / name)] for name in ("one", "many")]
    assert names[0] == names[1] and len(names[0]) == len(JOBS)
    timed = Measured((), Memory(1, 2, 3), 0.5, 1.0, 0.1)
    monkeypatch.setattr(kvspread, "_is_timed", lambda _setup, job: not job.items)
    monkeypatch.setattr(Bench, "measure", lambda *_job: timed)
    last, asked = Store(tmp_path / "timed", bench.identify), _Team(Bench(setup))
    monkeypatch.setattr(asked, "_do", lambda _job: timed if _job is None else Measured((1.0,) * 4))
    assert list(kvspread._run(bench, last, asked, JOBS)) == [timed] * 3 + [Measured((1.0,) * 4)] * 6
    assert all(job is not None and job.items for job in asked.asked)  # what is timed is timed here


def test_setups_that_move(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full.parent)
    setup = Setup({"float": "full", "named": "smollm2-135m"}, {}, (), 4)
    moved = kvspread._movable(setup, Where(2))
    assert moved.weights == {"float": str(full), "named": "smollm2-135m"} and moved.text == "builtin"
    assert moved.threads is not None and moved.threads >= 1
    assert kvspread._movable(Setup({}, {}, (), 4, threads=3), Where(2)).threads == 3
    with pytest.raises(ValueError, match=r"has rlkit .*, this one 0\.0; install the same everywhere"):
        kvspread.opened(setup, "0.0")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--workers", "0"], "0 workers are not 1 to"), (["--ray", "nowhere"], "Ray address 'nowhere' must be auto")],
)
def test_bad_places_are_one_line(words: list[str], says: str, full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kv", str(full), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(NO_RAY, reason='ray is not installed: pip install "rlkit-edge[ray]"')
def test_a_cluster_that_is_not_there_is_said_at_once(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kv", str(full), "--ray", "127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no Ray cluster answers at 127.0.0.1:1 (") and line.endswith("or use --ray local")


def test_a_cluster_without_ray(full: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    assert cli.run(["kv", str(full), "--ray", "auto"]) == 1
    assert 'this needs ray, which is not installed; run: pip install "rlkit-edge[ray]"' in capsys.readouterr().err


@pytest.mark.slow
def test_processes_and_one_of_them_killed(setup: Setup, tmp_path: Path) -> None:
    expected = alone(setup, tmp_path / "one")
    bench = Bench(setup)
    with kvspread.measuring(bench, Store(tmp_path / "many", bench.identify), Where(2)) as run:
        found = []
        for one in run(JOBS):
            found.append(one)
            if len(found) == 2:
                victim = multiprocessing.active_children()[0].pid
                assert victim is not None
                os.kill(victim, signal.SIGKILL)
    assert found == expected
    assert [path.name for path in files(tmp_path / "many")] == [path.name for path in files(tmp_path / "one")]


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason='ray is not installed: pip install "rlkit-edge[ray]"')
def test_the_command_on_a_local_ray(
    full: Path, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--contexts", str(CONTEXT), "--tasks", "needle", "--items", "4", "--groups", "32", "--chunks", "64"]
    words = ["kv", str(full), *asked, "--kv", "k8v8,k4v4:smooth", "--threads", "1", "--json"]
    found = []
    for where in ((), ("--workers", "2", "--ray", "local")):
        monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / f"cache{len(found)}"))
        capsys.readouterr()
        assert cli.run([*words, *where]) == 0
        table = json.loads(capsys.readouterr().out)
        found.append({key: value for key, value in table.items() if key != "about"})
        assert len(files(tmp_path / f"cache{len(found) - 1}" / "kv" / "points")) == 2 * len(table["points"])
    assert found[0] == found[1]
