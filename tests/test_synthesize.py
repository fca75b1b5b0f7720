"""Synthetic sequences repeat with their seed, survive interruption, and follow the model they are sampled from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import tiny
from rlkit.recover.model import load_model
from rlkit.recover.progress import Progress
from rlkit.recover.source import resolve
from rlkit.recover.synthesize import Sampling, synthesize

PLAN = Sampling(sequences=10, length=20, batch=4, seed=3)
TURN = tiny.tokenizer().encode("<|im_start|>user\n")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))


def log_probabilities(model: Any, ids: np.ndarray) -> torch.Tensor:
    """What `model` says of each next token: (rows, T - 1, V)."""
    return torch.log_softmax(torch.from_numpy(tiny.logits(model, ids))[:, :-1], dim=-1)


def test_same_seed_same_data(loaded: tuple[Any, Any]) -> None:
    first, again = (synthesize(*loaded, PLAN) for _ in range(2))
    other = synthesize(*loaded, Sampling(sequences=10, length=20, batch=4, seed=4))
    assert first.dtype == np.int64
    assert first.shape == (10, 20)
    assert 0 <= first.min() <= first.max() < tiny.VOCAB
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert len(np.unique(first[:, len(TURN) :], axis=0)) == 10


def test_an_interrupted_run_continues_with_the_same_data(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.done > 25:  # in the second of three batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(*loaded, PLAN, shards=tmp_path / "shards", tell=stop)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    told: list[Progress] = []
    resumed = synthesize(*loaded, PLAN, shards=tmp_path / "shards", tell=told.append)
    np.testing.assert_array_equal(resumed, synthesize(*loaded, PLAN))
    assert min(event.done for event in told) > 20  # the first batch was not sampled again
    np.testing.assert_array_equal(resumed, synthesize(None, None, PLAN, shards=tmp_path / "shards"))


def test_a_shard_of_another_size_is_ignored(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    synthesize(*loaded, PLAN, shards=tmp_path)
    shard = sorted(tmp_path.iterdir())[1]
    save_file({"ids": np.zeros((4, 19), np.int64)}, shard)
    expected = synthesize(*loaded, PLAN)
    np.testing.assert_array_equal(synthesize(*loaded, PLAN, shards=tmp_path), expected)
    np.testing.assert_array_equal(synthesize(None, None, PLAN, shards=tmp_path), expected)  # and it was replaced


def test_progress_reaches_its_end(loaded: tuple[Any, Any]) -> None:
    told: list[Progress] = []
    synthesize(*loaded, PLAN, tell=told.append)
    done = [event.done for event in told]
    assert done == sorted(done)
    assert (told[-1].done, told[-1].total) == (60, 60)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_chat_rows_start_with_the_users_turn(loaded: tuple[Any, Any], share: float) -> None:
    plan = Sampling(sequences=16, length=12, batch=8, chat_share=share)
    opened = (synthesize(*loaded, plan)[:, : len(TURN)] == TURN).all(axis=1)
    assert opened.reshape(2, 8).sum(axis=1).tolist() == [8 * share, 8 * share]


def test_without_a_chat_template_there_are_no_chats(loaded: tuple[Any, Any]) -> None:
    plain = tiny.tokenizer()
    plain.chat_template = None
    ids = synthesize(loaded[0], plain, PLAN)
    assert not (ids[:, : len(TURN)] == TURN).all(axis=1).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_second_to_fifth_token_are_greedy(loaded: tuple[Any, Any], share: float) -> None:
    ids = synthesize(*loaded, Sampling(sequences=64, length=24, chat_share=share))
    best = log_probabilities(loaded[0], ids).argmax(-1).numpy()
    opening = 1 + (len(TURN) if share else 0)
    greedy = (ids[:, 1:] == best)[:, opening - 1 :]  # column 0: the first token behind the opening
    runs = np.where(greedy.all(axis=1), greedy.shape[1], greedy.argmin(axis=1))
    assert runs.min() == 2
    assert {2, 3, 4} <= set(runs.tolist())
    assert (runs <= 4).mean() > 0.5  # sampling may hit the likeliest token, too
    assert greedy[:, 4:].mean() < 0.9


def test_later_tokens_follow_the_models_distribution(loaded: tuple[Any, Any]) -> None:
    """Their mean log-likelihood is minus the entropy; at a lower temperature it is higher."""
    plan = Sampling(sequences=128, length=40, chat_share=0)
    ids = synthesize(*loaded, plan)
    log_p = log_probabilities(loaded[0], ids)[:, 8:]
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    reached = float(log_p.gather(-1, torch.from_numpy(ids)[:, 9:, None]).mean())
    assert 1 < entropy < 6  # neither flat nor certain, so that the comparison can fail
    assert reached == pytest.approx(-entropy, abs=0.1)
    cold = synthesize(*loaded, Sampling(sequences=128, length=40, chat_share=0, temperature=0.5))
    assert float(log_probabilities(loaded[0], cold)[:, 8:].gather(-1, torch.from_numpy(cold)[:, 9:, None]).mean()) > (
        reached + 0.5
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sequences": 0}, "sequences = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"length": 7}, "length = 7"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": 5.1}, "temperature = 5.1"),
        ({"chat_share": 1.1}, "chat_share"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**changes)
