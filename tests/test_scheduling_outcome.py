"""What runs were worth: JSON there and back, means over seeds, XRBench without energy, spreads and their words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlkit.profiles.scheduling import comparison
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.outcome import Outcome, outcome, summarize
from rlkit.profiles.scheduling.policies import FIVE, POLICIES
from rlkit.profiles.scheduling.workload import Late, Lengths, Setting, Stream
from rlkit.runtime.jobs import Option
from simulated import llm, phase, setting

MS = 1_000_000


def frames(name: str, period: int, ns: int, millijoule: float | None = None) -> Stream:
    return Stream(name, (Option(0, ns, 0.0, millijoule),), period * MS, period * MS, late=Late.DROP)


def requests() -> Setting:
    talk = llm(
        [phase(0, 256, 3 * MS)], [phase(0, 1, MS)], (0, 20 * MS), output=Lengths(5, 5), ttft=10 * MS, tpot=3 * MS
    )
    return setting(frames("A", 10, 2 * MS), talk, duration=100 * MS)


def found(case: Setting, policy: str = "edf", seed: int = 0) -> Outcome:
    return outcome(run(expand(case, seed), POLICIES[policy]()))


@pytest.mark.parametrize("case", [requests(), setting(frames("A", 10, 2 * MS, 5.0), duration=50 * MS)])
def test_an_outcome_comes_back_from_json(case: Setting) -> None:
    made = found(case)
    assert Outcome.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_latencies_are_of_the_requests_of_all_streams() -> None:
    made = found(requests())
    assert made.ttft is not None and made.tpot is not None
    talk = made.metrics.streams[1].language
    assert talk is not None and talk.ttft == made.ttft and talk.tpot == made.tpot  # the only requests
    assert made.tokens_per_s == pytest.approx(talk.tokens_per_s) and made.rate == made.pooled == 0.0
    frames_only = found(setting(frames("A", 10, 2 * MS), duration=50 * MS))
    assert frames_only.ttft is frames_only.tokens_per_s is None


def test_the_score_without_energy_counts_drops_twice() -> None:
    """One of two streams of equal rate always loses: it runs in half of its periods on time, half of it is dropped."""
    case = setting(frames("A", 10, 6 * MS), frames("B", 10, 6 * MS), duration=200 * MS)
    made = found(case, "fcfs")
    assert made.metrics.xrbench is None  # nothing is known of its energy
    expected = [
        one.score.real_time * one.done / one.targets * (1 - one.dropped / one.targets)
        for one in made.metrics.streams
        if one.score is not None
    ]
    assert made.without_energy == pytest.approx(100 * sum(expected) / 2) and 0 < made.without_energy < 100
    easy = found(setting(frames("A", 10, 2 * MS, 0.0), duration=100 * MS))
    assert easy.without_energy == easy.metrics.xrbench == pytest.approx(100.0)


def test_a_summary_is_the_mean_over_seeds() -> None:
    one, other = found(requests()), found(requests(), seed=1)
    lost = tuple(replace(stream, violations=stream.targets) for stream in other.metrics.streams)
    worse = replace(other, metrics=replace(other.metrics, streams=lost))
    both = summarize([one, worse])
    assert both.rates == (0.0, 1.0) and both.rate == 0.5 and both.deviation == pytest.approx(0.7071, abs=1e-4)
    assert summarize([one]).deviation is None
    assert [stream.rate for stream in both.streams] == [0.5, 0.5] and both.streams[0].ttft is None
    assert both.energy_joules is None  # of frames nothing is known
    with pytest.raises(ValueError, match="a summary of 2 policies"):
        summarize([one, found(requests(), "fcfs")])


def test_spreads_are_of_the_five_where_they_are_all_there() -> None:
    rates = dict(zip(FIVE, (0.4, 0.3, 0.2, 0.2, 0.1), strict=True)) | {"lookahead": 0.0}
    found = comparison.spread_json(rates)
    assert found["five"]["relative"] == pytest.approx(0.75) and found["five"]["points"] == pytest.approx(30)
    assert found["all"]["relative"] == 1.0 and found["all"]["best"] == "lookahead"
    (line,) = comparison.spread_lines(rates)
    assert line == (
        "violations of the five: 10.0 % (hetero-eft) to 40.0 % (fcfs), 30.0 points, 75.0 % of the highest "
        "(the paper's: 41.7 %)"
    )
    some = {"edf": 0.2, "lookahead": 0.1}
    assert "these policies" in next(comparison.spread_lines(some)) and "chosen" in comparison.spread_json(some)


def test_a_summary_has_percentiles_by_name_and_the_parts_of_the_score() -> None:
    case = setting(frames("A", 10, 6 * MS, 300.0), frames("B", 10, 6 * MS, 300.0), duration=200 * MS)
    one = found(case, "fcfs")
    made = summarize([one, replace(one, metrics=replace(one.metrics, xrbench=None))])
    assert made.xrbench is None  # not of one of the runs
    json_values = json.loads(json.dumps(summarize([one]).to_json()))
    scores = [stream["score"] for stream in json_values["streams"]]
    assert all(score["energy"] == pytest.approx(0.8) for score in scores)
    assert json_values["xrbench"] == pytest.approx(50 * sum(score["model"] for score in scores))
    assert [score["qoe"] for score in scores] == [1 - stream["dropped"] / 20 for stream in json_values["streams"]]
    assert all(0 < score["real_time"] <= 1 for score in scores)
    talk = json.loads(json.dumps(summarize([found(requests())]).to_json()))["streams"]
    assert set(talk[1]["ttft"]) == set(talk[1]["tpot"]) == {"p50", "p95", "p99"}
    assert talk[1]["score"] is None and talk[0]["score"]["energy"] is None
