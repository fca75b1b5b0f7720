"""Timed generation over a cache that is filled beforehand: how many times come, and what the cache holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime import clocked
from rlkit.runtime.clocked import Clocked
from rlkit.runtime.session import Session, open_bundle

FILL, PROMPT = list(range(20, 60)), [7, 8, 9]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("clocked")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt")
    return open_bundle(export_bundle(checkpoint, root / "bundle", accuracy_level=0), threads=1)


def generated(timed: Clocked, count: int) -> list[int]:
    return [int(token) for token in timed._generator.get_sequence(0)[-count:]]


def test_tokens_are_those_of_the_whole_prompt_however_often_the_cache_is_reused(session: Session) -> None:
    expected = [token.id for token in session.generate(FILL + PROMPT, 6, ignore_stop=True)]
    timed = Clocked(session)
    for other in (PROMPT, [3, 4], PROMPT):  # the second time the fill is kept, behind it everything is new
        seconds = list(timed.generate(FILL, other, 6, 60))
        assert len(seconds) == 6 and min(seconds) > 0
    assert generated(timed, 6) == expected
    kept = timed._generator
    list(timed.generate(FILL[:10], PROMPT, 6, 60))
    assert timed._generator is not kept
    assert generated(timed, 6) == [token.id for token in session.generate(FILL[:10] + PROMPT, 6, ignore_stop=True)]


def test_an_empty_cache_is_a_depth_too(session: Session) -> None:
    timed = Clocked(session)
    for _ in range(2):
        assert len(list(timed.generate([], PROMPT, 4, 7))) == 4
    assert generated(timed, 4) == [token.id for token in session.generate(PROMPT, 4, ignore_stop=True)]


def test_a_deep_cache_is_filled_in_pieces(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocked, "FILL_TOKENS", 16)
    timed = Clocked(session)
    list(timed.generate(FILL, PROMPT, 6, 49))
    assert generated(timed, 6) == [token.id for token in session.generate(FILL + PROMPT, 6, ignore_stop=True)]


@pytest.mark.parametrize(
    ("fill", "prompt", "new_tokens", "room"),
    [([], [], 4, 8), ([], PROMPT, 0, 8), (FILL, PROMPT, 6, 48), (FILL, PROMPT, 6, 300)],
)
def test_what_does_not_fit_is_refused(
    fill: list[int], prompt: list[int], new_tokens: int, room: int, session: Session
) -> None:
    with pytest.raises(ValueError, match="do not fit a context of 256"):
        list(Clocked(session).generate(fill, prompt, new_tokens, room))


def test_another_provider_is_asked_for_and_never_replaced(session: Session) -> None:
    assert session.device == "cpu"
    with pytest.raises(ValueError, match="a bundle made for cpu does not run on dml"):
        open_bundle(Path(session.facts()["folder"]), device="dml")
    assert np.isfinite(session.logits(np.array([PROMPT]))).all()
