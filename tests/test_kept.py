"""Layer states on disk: what comes back is what was kept, and a file that was cut off is no state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlkit.recover.correct import LowRank
from rlkit.recover.kept import Kept, States
from rlkit.recover.layers import LayerState
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.recipe import Scheme

SCHEMES = {"model.layers.0.a": Scheme(2, 64), "model.layers.0.b": Scheme(4, 32), "lm_head": Scheme(8, 32)}


def quantized(name: str, seed: int = 0) -> Quantized:
    rng = torch.Generator().manual_seed(seed)
    return quantize_nearest(torch.randn(5, 192, generator=rng), SCHEMES[name])


def state(prefix: str, *names: str, corrected: bool = False) -> LayerState:
    pairs = {name: (quantized(name, 1), LowRank(torch.randn(3, 192), torch.randn(5, 3))) for name in names if corrected}
    others = {"model.layers.0.norm.weight": torch.rand(7)}
    return LayerState(prefix, {name: quantized(name) for name in names}, pairs, others, {"layer": prefix})


def assert_same(found: Quantized, expected: Quantized) -> None:
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert found.scheme == expected.scheme


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    made = Kept(tmp_path, SCHEMES)
    made.save(state("model.layers.0", "model.layers.0.a", "model.layers.0.b", corrected=True))
    made.save(state("", "lm_head"))
    return made


def test_what_comes_back_is_what_was_kept(kept: Kept, tmp_path: Path) -> None:
    for found in (kept, Kept(tmp_path, SCHEMES)):
        assert list(found.logs) == ["model.layers.0", ""]
        for name in SCHEMES:
            assert_same(found.quantized(name), quantized(name))
        pair = found.corrected("model.layers.0.b")
        assert pair is not None and pair[1].a.shape == (3, 192)
        assert_same(pair[0], quantized("model.layers.0.b", 1))
        assert found.corrected("lm_head") is None
        assert dict(found.others()).keys() == {"model.layers.0.norm.weight"}


def test_a_file_that_was_cut_off_is_done_again(kept: Kept, tmp_path: Path) -> None:
    last = sorted(tmp_path.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-9])
    assert list(Kept(tmp_path, SCHEMES).logs) == ["model.layers.0"]
    assert not last.exists()


def test_states_are_read_when_asked_for(kept: Kept) -> None:
    scales = torch.full((5, 6), 0.5)
    states = States(kept, list(SCHEMES), {"model.layers.0.a"}, {"model.layers.0.b": scales})
    assert list(states) == list(SCHEMES) and len(states) == 3
    assert_same(states["model.layers.0.a"], quantized("model.layers.0.a", 1))
    assert torch.equal(states["model.layers.0.b"].scales, scales)
    assert torch.equal(states["model.layers.0.b"].codes, quantized("model.layers.0.b").codes)
    with pytest.raises(KeyError):
        states["model.norm"]
