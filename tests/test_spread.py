"""Work spread over processes and over Ray: the same results, killed processes' tasks done again, nothing twice."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squares
from rlkit.profiles import spread
from rlkit.profiles.crew import TRIES
from rlkit.recover.progress import Progress

NO_RAY = importlib.util.find_spec("ray") is None


def opening(folder: Path) -> spread.Opening:
    return functools.partial(squares.opened, folder)


def key(task: Any) -> str:
    return f"{task:04x}"


def test_processes_do_what_this_one_does_and_are_replaced(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    tasks = list(range(12))
    with spread.team(opening(here)) as one:
        expected = dict(one(tasks))
    (there / "kill").touch()
    with spread.team(opening(there), workers=2) as some:
        given = list(some(tasks))
        assert dict(given) == expected and len(given) == len(tasks)  # each once, task 5 too
        assert [squares.asked(there, task) for task in tasks] == [2 if task == 5 else 1 for task in tasks]
        again = list(some(tasks[:3]))  # by the processes that are there
        assert sorted(again) == [(number, expected[number]) for number in range(3)]
        with pytest.raises(ValueError, match="wrong has no square; give a number"):
            list(some([1, "wrong", 2]))
        with pytest.raises(RuntimeError, match="Fussy: 1 and 2"):
            list(some(["fussy"]))
        with pytest.raises(
            ValueError, match=rf"a process ended {TRIES} times at the same task \(.*\); use fewer --workers than 2"
        ):
            list(some([1, "deadly"]))
        assert squares.asked(there, "deadly") == TRIES
        part = some(tasks)
        next(part)
        part.close()  # what the others were at is of no use to the next call
        assert dict(some([7, 8])) == {0: expected[7], 1: expected[8]}
        processes = [hand.process for hand in (*some._idle, *some._busy)]
    assert not any(process.is_alive() for process in processes)


def test_what_cannot_be_opened_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "closed").touch()
    with spread.team(opening(tmp_path), workers=2) as some:
        assert list(some([])) == [] and not list(tmp_path.glob("process-*"))  # nothing to do, nobody to do it
        with pytest.raises(ValueError, match="it is closed"):
            list(some([1]))


def test_kept_results_are_not_done_again(tmp_path: Path) -> None:
    folder = spread.Folder(tmp_path / "kept", key)
    done: list[int] = []

    def farm(tasks: Any) -> Iterator[tuple[int, dict[str, int]]]:
        for number in reversed(range(len(tasks))):
            done.append(tasks[number])
            yield number, {"square": tasks[number] ** 2}

    farmed = spread.kept(farm, folder)
    first = farmed([3, 1, 3])
    assert next(first) == (1, {"square": 1})  # killed here, what was done is kept
    first.close()
    assert dict(farmed([3, 1, 3])) == {0: {"square": 9}, 1: {"square": 1}, 2: {"square": 9}}
    assert done == [1, 3]
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*.json")) == ["0001.json", "0003.json"]
    for damage in ("{", "[]", '{"schema_version": 0, "found": 1}', '{"schema_version": 1}'):
        folder.path(3).write_text(damage)
        assert dict(farmed([3])) == {0: {"square": 9}}
    assert done == [1, 3, 3, 3, 3, 3] and folder.read(3) == {"square": 9}


def test_order_and_progress() -> None:
    events: list[Progress] = []

    def farm(tasks: Any) -> Iterator[tuple[int, str]]:
        yield from ((number, str(tasks[number])) for number in (2, 0, 3, 1))

    assert list(spread.in_order(spread.told(farm, "squares", events.append))([5, 6, 7, 8])) == ["5", "6", "7", "8"]
    assert [(event.stage, event.done, event.total) for event in events] == [("squares", n, 4) for n in range(5)]


@pytest.mark.parametrize(
    ("workers", "ray", "says"),
    [
        (0, None, "0 workers are not 1 to"),
        (2000, None, "2000 workers are not 1 to"),
        (2, "http://a b", "Ray address 'http://a b' must be auto, local, HOST:PORT"),
        (2, "", "Ray address '' must be"),
    ],
)
def test_bad_places(workers: int, ray: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says), spread.team(lambda: abs, workers, ray):
        pass


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason='ray is not installed: pip install "rlkit-edge[ray]"')
def test_a_local_ray_of_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where its processes find the work
    (tmp_path / "kill").touch()
    folder = spread.Folder(tmp_path / "kept", key)
    tasks = list(range(12))
    with spread.team(opening(tmp_path), workers=2, ray="local") as some:
        given = list(spread.kept(some, folder)(tasks))
        assert dict(given) == {task: {"square": task * task, "opened": True} for task in tasks}
        assert len(given) == len(tasks) == len(list((tmp_path / "kept").rglob("*.json")))
        assert [squares.asked(tmp_path, task) for task in tasks] == [2 if task == 5 else 1 for task in tasks]
        with pytest.raises(ValueError, match="wrong has no square"):
            list(some(["wrong"]))
