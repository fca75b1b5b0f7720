"""What is combined: points each once, the reference first, and space files with their faults in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlkit.profiles.frontier import space
from rlkit.profiles.frontier.space import Point, Space


def test_every_combination_once_with_its_reference_first() -> None:
    found = Space(weights=("float", "w4"), kv=("k8v8", "k4v4:smooth"), chunks=(64, None), contexts=(128, 512)).points()
    assert len(found) == len(set(found)) == 2 * 2 * 3 * 2
    assert found[0] == Point("float", "k16v16", None, 128)
    assert next(point for point in found if point.context == 512) == Point("float", "k16v16", None, 512)
    assert {point.kv for point in found} == {"k16v16", "k8v8", "k4v4:smooth"}
    assert len({point.key for point in found}) == len(found)
    assert all(Point.from_json(point.to_json()) == point for point in found)


def test_groups_are_of_those_that_do_not_say_theirs_and_name_nothing_twice() -> None:
    names = list(Space(kv=("k4v4", "k8v8:g16", "k4v4:g32", "k16v16"), groups=(32, 64)).schemes())
    assert names == ["k16v16", "k4v4:g32", "k4v4", "k8v8:g16"]


def test_a_chunk_of_the_whole_prompt_is_no_chunk() -> None:
    points = Space(kv=("k8v8",), chunks=(64, 256, None), contexts=(128,)).points()
    assert {point.chunk for point in points} == {None, 64}


def test_bundles_have_their_own_caches_and_no_chunks() -> None:
    found = Space(weights=("float", "b"), kv=("k8v8",), contexts=(128,), bundles={"b": ("float", "int8")}).points()
    assert [(point.kv, point.chunk) for point in found if point.weights == "b"] == [("float", None), ("int8", None)]
    alone = Space(weights=("b",), contexts=(128,), bundles={"b": ("float", "int8")})
    assert alone.points()[0] == alone.reference(128) == Point("b", "float", None, 128) and len(alone.points()) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ("needles",)}, "there is no task 'needles' here; use needle, long-qa, lambada, gsm8k, mmlu"),
        ({"contexts": ()}, "contexts is empty"),
        ({"contexts": (4,)}, "a context of 4 tokens holds no task"),
        ({"chunks": (0,)}, "a chunk of 0 tokens reads nothing"),
        ({"kv": ("k8v8", "k8v8")}, "kv has a value twice"),
        ({"kv": ("k3v3",)}, "3 bits are no width"),
        ({"kv": ("wide",)}, "kv 'wide' is no simulated cache"),
        ({"groups": (0,)}, "a group of 0 numbers"),
        ({"items": 1}, "1 items of a task are not 4 to 10000"),
    ],
)
def test_values_that_no_point_can_have(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Space(**changes)


def test_too_many_points_are_refused() -> None:
    many = Space(contexts=tuple(range(1000, 4000)), kv=("k8v8", "k4v4"), chunks=tuple(range(1, 9)))
    with pytest.raises(ValueError, match=r"75,000 points are more than 20,000; combine less"):
        many.points()


def test_a_file_gives_what_space_takes(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text('kv = ["k8v8", "k4v4:smooth"]\nchunks = [64, "whole"]\ncontexts = 512\nitems = 8\n')
    found = Space(**space.read(file))
    assert found.chunks == (64, None) and found.contexts == (512,) and found.items == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("depth = [1]", "unknown key 'depth'; known here: weights, kv, groups, chunks, contexts, tasks, items"),
        ("bundles = {}", "unknown key 'bundles'"),
        ("kv = [8]", "kv is a list of strings, and 8 is none"),
        ('contexts = ["long"]', "contexts is a list of whole numbers, and 'long' is none"),
        ("contexts = [true]", "contexts is a list of whole numbers, and True is none"),
        ('chunks = ["all"]', "chunks is a list of whole numbers, and 'all' is none"),
        ("items = 2.5", "items is a whole number, not 2.5"),
        ("kv = [", "is not valid TOML"),
    ],
)
def test_faults_of_a_file_are_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        space.read(tmp_path / "space.toml")
    assert "space.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no space file"):
        space.read(tmp_path / "absent.toml")


def test_chunks_as_words() -> None:
    assert (space.chunk_of("whole"), space.chunk_of("64")) == (None, 64)
    with pytest.raises(ValueError, match="a chunk of 'most' is no number of tokens"):
        space.chunk_of("most")
