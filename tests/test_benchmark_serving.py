"""The benchmark of the server: what it concludes from replies and from a crowd, and a short run of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.apps.benchmarks import serving
from rlkit.apps.benchmarks.serving import Reply


def reply(rate: float, first: float = 0.1, prompt: float | None = 0.095) -> Reply:
    return Reply(first, 10 / rate, first + 10 / rate, 11, prompt)


def test_the_overhead_is_the_median_of_paired_rounds() -> None:
    found = serving.compared([reply(98.0), reply(99.0), reply(50.0)], [reply(100.0), reply(100.0), reply(100.0)])
    assert found["overhead"] == pytest.approx(0.02)
    assert found["first_byte_seconds"]["p50"] == pytest.approx(0.005)
    assert found["met"]
    late = serving.compared([reply(99.0, first=0.2)], [reply(100.0)])
    assert not late["met"]
    with pytest.raises(ValueError, match="no prompt_seconds"):
        serving.compared([reply(99.0, prompt=None)], [reply(100.0)])
    with pytest.raises(ValueError, match="came in one piece"):
        serving.compared([Reply(0.1, 0.0, 0.1, 1, 0.1)], [reply(100.0)])


@pytest.mark.parametrize(
    ("counts", "last", "left", "met"),
    [
        ({"200": 5, "429": 2, "hung up": 1}, 100, 0, True),
        ({"200": 5, "500": 1}, 100, 0, False),
        ({"200": 5, "ConnectionResetError: gone": 1}, 100, 0, False),
        ({"200": 5}, 104, 0, False),
        ({"200": 5}, 100, 1, False),
    ],
)
def test_under_load_nothing_fails_grows_or_stays(counts: dict[str, int], last: int, left: int, met: bool) -> None:
    memory = [(float(at), 10 if at < 20 else 100 if at < 60 else last) for at in range(100)]
    assert serving.judged(counts, memory, left, 50, 100.0)["met"] is met


@pytest.mark.slow
def test_the_server_survives_a_crowd_and_answers_as_a_bare_session_does(tmp_path: Path) -> None:
    bundle = serving.tiny_bundle(tmp_path)
    found = serving.load(bundle, 20, 10.0)
    assert not found["failures"]
    assert found["left_running"] == 0
    assert found["answers"]["200"] > 0
    beside = serving.overhead(bundle, 16, 16, 3)
    assert beside["rounds"] == 3
    assert beside["tokens_per_s"] > 0
