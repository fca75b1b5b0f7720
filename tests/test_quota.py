"""Loops and duplicates are found, counted and replaced, in bounds, whether or not a run was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from rlkit.recover.model import load_model
from rlkit.recover.progress import Progress
from rlkit.recover.quota import Quota, find_loops
from rlkit.recover.source import resolve
from rlkit.recover.synthesize import Sampling, synthesize


def row(length: int, period: int | None = None, tail: int = 0) -> np.ndarray:
    """Different tokens; the last `tail` of them repeat with `period`."""
    ids = np.arange(100, 100 + length)
    if period:
        ids[length - tail :] = np.arange(tail) % period
    return ids


@pytest.mark.parametrize(
    ("length", "period", "tail", "loop"),
    [
        (128, None, 0, False),
        (128, 1, 32, True),
        (128, 16, 32, True),
        (128, 16, 31, False),  # shorter than T / 4
        (128, 17, 128, False),  # longer than the longest period
        (256, 16, 64, True),
        (256, 16, 60, False),
        (40, 8, 16, True),
        (40, 9, 40, False),  # not even two periods in 16 tokens
        (8, 4, 8, True),
    ],
)
def test_a_row_that_ends_in_a_short_period_is_a_loop(length: int, period: int | None, tail: int, loop: bool) -> None:
    assert find_loops(np.stack([row(length), row(length, period, tail)])).tolist() == [False, loop]


def test_a_loop_that_ended_is_none() -> None:
    ids = row(64, 2, 64)
    ids[-1] = 7
    assert find_loops(ids[None]).tolist() == [False]


def batch(seeds: list[int], loops: int = 0) -> np.ndarray:
    """Rows of 16 tokens, one per seed (the same seed gives the same row), then loops."""
    rows = [np.random.default_rng(seed).integers(0, 1000, 16) for seed in seeds]
    return np.array(rows + [np.full(16, 5)] * loops)


def test_duplicates_are_found_within_and_across_batches() -> None:
    quota = Quota(6, 16, 4)
    assert quota.next_count() == 4
    usable, counts = quota.judge(batch([0, 1, 0], loops=1))
    assert usable.tolist() == [0, 1] and counts == {"sampled": 4, "loops": 1, "duplicates": 1}
    quota.take(batch([0, 1]), counts)
    assert quota.next_count() == 2
    usable, counts = quota.judge(batch([1, 2]))
    assert usable.tolist() == [1] and counts == {"sampled": 2, "loops": 0, "duplicates": 1}
    quota.take(batch([2]), counts)
    assert quota.counts == {"sampled": 6, "loops": 1, "duplicates": 2}
    assert quota.next_count() == 4  # 3 are missing, every second one was usable, but no more than a batch
    usable, counts = quota.judge(batch([3, 4, 5, 6]))
    assert usable.tolist() == [0, 1, 2]  # no more than were asked for
    quota.take(batch([3, 4, 5]), counts)
    assert quota.next_count() == 0


@given(st.integers(1, 60), st.integers(1, 20), st.lists(st.booleans(), min_size=200, max_size=200))
def test_there_are_as_many_rows_as_asked_for_or_an_error(wanted: int, rows: int, fates: list[bool]) -> None:
    """Whatever is filtered: never more than twice the rows are sampled, and never more than a batch at once."""
    quota, kept, seed, usable = Quota(wanted, 16, rows), 0, 0, np.empty(0)
    try:
        while count := quota.next_count():
            assert 0 < count <= rows
            ids = batch(list(range(seed, seed + count)))
            ids[[not fate for fate in fates[seed : seed + count]]] = 5
            seed += count
            usable, counts = quota.judge(ids)
            quota.take(ids[usable], counts)
            kept += len(usable)
        assert kept == wanted
    except ValueError:
        assert quota.counts["loops"] > wanted > kept
    assert seed == quota.counts["sampled"] <= 2 * wanted


def test_too_many_loops_are_an_error_that_says_what_to_do() -> None:
    quota = Quota(4, 16, 4)
    quota.take(batch([0])[:1], {"sampled": 4, "loops": 3, "duplicates": 0})
    quota.take(batch([])[:0].reshape(0, 16), {"sampled": 3, "loops": 1, "duplicates": 2})
    said = r"only 1 of 7 sampled rows are usable: 4 end in a loop, 2 repeat another row; raise the temperature"
    with pytest.raises(ValueError, match=said):
        quota.next_count()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))


def trap(model: Any, share: float) -> None:
    """From now on, each of the first `share` of all tokens is followed by itself."""
    end = int(share * tiny.VOCAB)

    def stuck(_module: Any, inputs: Any, keywords: dict[str, Any], out: Any) -> Any:
        ids = keywords["input_ids"]
        rows, positions = (ids < end).nonzero(as_tuple=True)
        out.logits[rows, positions, ids[rows, positions]] += 100
        return out

    model.register_forward_hook(stuck, with_kwargs=True)


@pytest.fixture
def stuck(loaded: tuple[Any, Any], tmp_path: Path) -> tuple[Any, Any]:
    """A model that falls into a loop in about a quarter of its rows of 24 tokens."""
    model, tokenizer = load_model(resolve(Path(loaded[0].config._name_or_path)))
    trap(model, 0.01)
    return model, tokenizer


PLAN = Sampling(sequences=40, length=24, batch=16, chat_share=0, kept=4)


def test_loops_are_counted_and_replaced(stuck: tuple[Any, Any], tmp_path: Path) -> None:
    told: list[Progress] = []
    corpus = synthesize(*stuck, PLAN, tmp_path / "out", tell=told.append)
    counts = corpus.facts["counts"]
    assert corpus.ids.shape == (40, 24) and not find_loops(corpus.ids).any()
    assert counts["loops"] > 0 and counts["duplicates"] == 0 and 40 + counts["loops"] <= counts["sampled"] <= 80
    assert sum(part["rows"] for part in corpus.facts["shards"]) == 40 and len(corpus.facts["shards"]) > 3
    assert corpus.targets(np.array([0, 39])).ids.shape == (2, 24, 4)
    done = [event.done for event in told]
    assert done == sorted(done) and told[-1].done == told[-1].total == counts["sampled"] * 24
    assert [event.stage for event in told][0 :: len(told) - 1] == ["synthesize", "replace filtered rows"]


@pytest.mark.parametrize("tokens", [0, 400, 800, 970])
def test_replacing_is_the_same_after_an_interrupt(stuck: tuple[Any, Any], tmp_path: Path, tokens: int) -> None:
    def stop(event: Progress) -> None:
        if event.done > tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(*stuck, PLAN, tmp_path / "out", tell=stop)
    resumed = synthesize(*stuck, PLAN, tmp_path / "out")
    whole = synthesize(*stuck, PLAN, tmp_path / "whole")
    assert resumed.facts == whole.facts
    np.testing.assert_array_equal(resumed.ids, whole.ids)
    rows = np.arange(40)
    np.testing.assert_array_equal(resumed.targets(rows).log_probs, whole.targets(rows).log_probs)


def test_duplicates_are_counted_and_replaced(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Greedy rows that begin with one of few tokens: most of them were there before."""
    corpus = synthesize(*loaded, replace(PLAN, sequences=64, top_k=1, length=12), tmp_path / "out")
    assert len(np.unique(corpus.ids, axis=0)) == 64
    assert corpus.facts["counts"]["duplicates"] > 0


def test_a_model_that_only_loops_is_told(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = load_model(resolve(Path(loaded[0].config._name_or_path)))
    trap(model, 1.0)
    told: list[Progress] = []
    with pytest.raises(ValueError, match=r"only 0 of \d+ sampled rows are usable: .*; raise the temperature"):
        synthesize(model, tokenizer, PLAN, tmp_path / "out", tell=told.append)
    assert max(event.done for event in told) <= 80 * 24 and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="only 0 of"):  # from what is kept: nothing is sampled again
        synthesize(model, tokenizer, PLAN, tmp_path / "out", tell=lambda event: pytest.fail(str(event)))
