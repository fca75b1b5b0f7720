"""The benchmark of the KV frontier: its bars on made-up searches, and every suite on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import tiny
from rlkit.apps.benchmarks import kv_frontier
from rlkit.apps.benchmarks.kv_frontier import Wanted
from rlkit.apps.kvspread import Where
from rlkit.profiles.frontier.search import Evaluated, Found
from rlkit.profiles.frontier.space import Point
from rlkit.profiles.needs import Memory
from rlkit.recover import source
from rlkit.recover.progress import silent

CONTEXT = 960  # a tiny tokenizer needs many tokens for needles and two-hop questions


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    full = tiny.llama(tmp_path_factory.mktemp("kv-frontier") / "full", context=1024, head_dim=64)
    rounded = tiny.checkpoint(full, full.parent / "w4")
    return Wanted(source.resolve(full), str(rounded), (CONTEXT,), 4, 1, Where())


def one(kv: str, nbytes: int, scores: tuple[float, ...], why: str = "", kl: float = 0.1) -> Evaluated:
    chunk = None if kv == "k16v16" else 256
    return Evaluated(Point("float", kv, chunk, CONTEXT), Memory(nbytes, 0, 0), kl, scores, why)


Given = Callable[..., None]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """What searches find, one after the other."""

    def give(*found: Found) -> None:
        waiting = list(found)

        def measured(*_told: Any, whole: tuple[bool, ...], tasks: list[str] | None = None, **_more: Any) -> list[Found]:
            if tasks is not None:
                tasks += ["needle", "needle", "long-qa", "long-qa"]
            return [waiting.pop(0) for _each in whole]

        monkeypatch.setattr(kv_frontier, "_found", measured)

    return give


def test_a_search_has_to_find_the_frontier_for_little(wanted: Wanted, given: Given) -> None:
    half, all_of = (1.0, 0.0), (1.0, 0.0, 1.0, 1.0)
    grid = Found((one("k16v16", 9, all_of), one("k8v8", 5, all_of), one("k2v2", 2, (0.0,) * 4)), 18.0, 18.0)
    good = Found((*grid.points[:2], one("k2v2", 2, (0.0,) * 4)), 9.0, 18.0)
    given(good, grid)
    found = kv_frontier.searched(wanted, silent)
    assert found["item_evaluations_share"] == pytest.approx((9 - 6) / (18 - 6))  # a screen counts as 2 items
    assert found["share_with_screens"] == 0.5 and found["distance"] == 0.0 and found["met"]
    assert [row["point"] for row in found["rows"]] == ["float k2v2, chunks of 256", "float k8v8, chunks of 256"]
    lost = Found((grid.points[0], one("k8v8", 5, half, "left out after 2 items"), grid.points[2]), 9.0, 18.0)
    given(lost, grid)
    found = kv_frontier.searched(wanted, silent)
    assert [row["found"] for row in found["rows"]] == [True, False] and not found["met"] and found["distance"] > 0
    given(Found(grid.points, 18.0, 18.0), grid)
    assert not kv_frontier.searched(wanted, silent)["met"]


@pytest.mark.parametrize(
    ("nbytes", "scores", "met"),
    [(30, (1.0, 1.0, 0.0, 1.0), True), (40, (1.0, 1.0, 0.0, 1.0), False), (30, (1.0, 0.0, 0.0, 1.0), False)],
)
def test_a_reduction_needs_bytes_and_accuracy(
    nbytes: int, scores: tuple[float, ...], met: bool, wanted: Wanted, given: Given
) -> None:
    whole = 2 * source.read_shape(wanted.model).parameters  # whatever the reference's file stores
    points = one("k16v16", 100, (1.0, 1.0, 1.0, 0.0)), one("k4v4", whole * nbytes // 100, scores)
    given(Found(points, 0.0, 0.0))
    found = kv_frontier.reduction(wanted, silent)
    (row,) = found["rows"]
    assert row["saved_least"] == pytest.approx(1 - nbytes / 100, abs=1e-4) and found["met"] == met
    assert row["loss"] == pytest.approx(1 - sum(scores) / 3) and row["loss_error"] > 0
    assert (row["needle_reference"], row["long-qa_reference"]) == (1.0, 0.5)


def test_smoothing_has_to_help(wanted: Wanted, given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    for better in (0.01, 0.2):
        kinds = [(base, kl) for base in kv_frontier.SMOOTHED for kl in (0.1, better)]
        names = [f"{base}:smooth" if kl == better else base for base, kl in kinds]
        points = [one(name, 5, (1.0, 0.0), kl=kl) for name, (_base, kl) in zip(names, kinds, strict=True)]
        given(Found((one("k16v16", 9, (1.0, 1.0)), *points), 0.0, 0.0))
        found = kv_frontier.smoothing(wanted, silent)
        assert found["met"] == (better < 0.1) and found["rows"][0]["times"] == pytest.approx(0.1 / better)
    kv_frontier.show({"model": "tiny", "smoothing": found}, ["smoothing"])
    assert "bar 1: NOT MET" in capsys.readouterr().out


def test_longer_contexts_have_fewer_items(wanted: Wanted) -> None:
    sized = Wanted(wanted.model, "w4", (), 32, 1, Where())
    assert [sized.items_at(context) for context in (512, 1024, 2048, 6144, 100_000)] == [32, 32, 16, 4, 4]


@pytest.mark.slow
def test_every_suite_on_a_tiny_model(wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    for name, value in (
        ("CACHES", ("k8v8", "k2v2")),
        ("SEARCHED", CONTEXT),
        ("BASE", CONTEXT),
        ("SMOOTHED", ("k4v4",)),
    ):
        monkeypatch.setattr(kv_frontier, name, value)
    sizes = {"items": 4, "workers": 1, "threads": 1, "json": True}
    names = ",".join(kv_frontier.SUITES)
    with pytest.raises(typer.Exit):  # random weights have no needle to lose
        kv_frontier.main(tmp_path, names, str(wanted.model.path), wanted.weights, str(CONTEXT), **sizes)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "kv_frontier.json").read_text())
    assert found["search"]["points"] == 6 and found["search"]["items"] == 8
    assert 0 < found["search"]["item_evaluations_share"] <= found["search"]["share_with_screens"] <= 1
    tried = [row["point"].removeprefix(f"{wanted.weights} ") for row in found["reduction"]["rows"]]
    assert tried == [f"{kv}, chunks of 256" for kv in ("k16v16", "k8v4:smooth", "k4v4:g32:smooth")]
    saved = [row["saved_least"] for row in found["reduction"]["rows"]]
    assert 0 < saved[0] < saved[1] < saved[2] < 1
    assert found["smoothing"]["rows"][0]["kl"] > 0
