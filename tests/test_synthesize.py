"""Synthetic corpora repeat with their seed, survive interruption, and tell the truth about the model they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import tiny
from rlkit.recover import synthesize as module
from rlkit.recover.corpus import LEAST, Corpus
from rlkit.recover.model import load_model
from rlkit.recover.progress import Progress
from rlkit.recover.source import resolve
from rlkit.recover.synthesize import Sampling, batch_rows, draw, model_fingerprint, score, synthesize

PLAN = Sampling(sequences=10, length=20, batch=4, seed=3)
TURN = tiny.tokenizer().encode("<|im_start|>user\n")
Made = Callable[..., Corpus]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))


@pytest.fixture
def make(loaded: tuple[Any, Any], tmp_path: Path) -> Made:
    """Sample another corpus of the model with each call; keywords change the plan."""
    made: list[Corpus] = []

    def call(plan: Sampling = PLAN, **changes: Any) -> Corpus:
        made.append(synthesize(*loaded, replace(plan, **changes), tmp_path / f"corpus-{len(made)}"))
        return made[-1]

    return call


def log_probabilities(model: Any, ids: np.ndarray) -> torch.Tensor:
    """What `model` says of the token behind each: (rows, T, V)."""
    return torch.log_softmax(torch.from_numpy(tiny.logits(model, ids)), dim=-1)


def assert_same(one: Corpus, other: Corpus) -> None:
    """Both folders hold the same bytes in the same files."""
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in other.folder.iterdir())
    for name in names:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


def test_same_seed_same_data(make: Made) -> None:
    first, again, other = make(), make(), make(seed=4)
    assert first.ids.dtype == np.int64
    assert first.ids.shape == (10, 20)
    assert 0 <= first.ids.min() <= first.ids.max() < tiny.VOCAB
    assert_same(first, again)
    assert (first.ids != other.ids).mean() > 0.5
    assert len(np.unique(first.ids, axis=0)) == 10
    assert first.facts["counts"] == {"sampled": 10, "loops": 0, "duplicates": 0}
    assert (first.facts["origin"], first.facts["seed"], first.facts["sampling"]["batch"]) == ("sampled", 3, 4)
    first.check_tokenizer(tiny.tokenizer())


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, {"top_k": 5}, {"kept": 7}], ids=str)
def test_kept_distributions_are_the_models_own(make: Made, loaded: tuple[Any, Any], changes: dict[str, Any]) -> None:
    """At every position, the last one included; at temperature 1 whatever sampled."""
    corpus = make(**changes)
    k = changes.get("kept", 64)
    assert corpus.top_k == k
    expected = log_probabilities(loaded[0], corpus.ids)
    found = corpus.targets(np.arange(10))
    best, order = expected.topk(k, dim=-1)
    assert found.ids.shape == (10, 20, k)
    assert (found.ids == order.numpy()).mean() > 0.999  # near ties may change places
    np.testing.assert_allclose(found.log_probs, expected.gather(-1, torch.from_numpy(found.ids)), atol=0.006)
    np.testing.assert_allclose(found.log_probs, best, atol=0.006)
    np.testing.assert_allclose(found.rest, torch.log1p(-best.exp().sum(-1)), atol=0.006)


def test_a_model_that_is_certain_leaves_a_finite_rest(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    """Float16 has no place for what is left; none of it may become infinite or NaN."""
    folder = tiny.llama(tmp_path / "hf", tied=False)
    model, tokenizer = load_model(resolve(folder))
    model.lm_head.weight.mul_(200)
    corpus = score(model, tokenizer, [" ".join(tiny.SENTENCES)], tmp_path / "out", length=16, kept=8)
    stored = load_file(corpus.folder / "shard-00000.safetensors")
    assert all(np.isfinite(stored[name]).all() for name in ("rest", "top_log_probs"))
    assert stored["rest"].min() == LEAST and stored["top_log_probs"].min() < -100
    found = corpus.targets(np.arange(len(corpus.ids)))
    mass = np.exp(found.log_probs).sum(-1) + np.exp(found.rest)
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_all_tokens_may_be_kept(make: Made) -> None:
    found = make(sequences=2, kept=tiny.VOCAB).targets(np.array([0, 1]))
    np.testing.assert_allclose(found.rest, LEAST, atol=0.002)
    assert (np.sort(found.ids, axis=-1) == np.arange(tiny.VOCAB)).all()


def test_no_distributions_on_request(make: Made) -> None:
    plain, bare = make(), make(kept=0)
    np.testing.assert_array_equal(bare.ids, plain.ids)
    assert bare.top_k == 0 and bare.facts["shards"][0]["nbytes"] < 1000


def test_sampling_top_k_limits_what_is_sampled(make: Made, loaded: tuple[Any, Any]) -> None:
    def ranks(corpus: Corpus) -> np.ndarray:
        """The place of each sampled token among all, likeliest first."""
        log_p = log_probabilities(loaded[0], corpus.ids)[:, :-1]
        own = log_p.gather(-1, torch.from_numpy(corpus.ids)[:, 1:, None])
        return (log_p > own + 1e-4).sum(-1).numpy()[:, 4:]

    plan = Sampling(sequences=64, length=24, chat_share=0)
    limited = ranks(make(plan, top_k=3))
    assert set(np.unique(limited)) == {0, 1, 2}
    assert ranks(make(plan)).max() > 20
    assert ranks(make(plan, top_k=100, kept=2)).max() > 20  # more than are kept
    assert ranks(make(plan, top_k=1, temperature=2.0)).max() == 0


def test_sampling_top_k_keeps_proportions(make: Made, loaded: tuple[Any, Any]) -> None:
    ids = make(Sampling(sequences=256, length=40, chat_share=0), top_k=2).ids
    best = log_probabilities(loaded[0], ids)[:, 4:-1].topk(2, dim=-1)
    first = torch.softmax(best.values, dim=-1)[..., 0]
    share = (best.indices[..., 0].numpy() == ids[:, 5:]).mean()
    assert 0.5 < share < 0.95
    assert share == pytest.approx(float(first.mean()), abs=0.02)


def stop_after(tokens: int) -> Callable[[Progress], None]:
    def tell(event: Progress) -> None:
        if event.done > tokens:
            raise KeyboardInterrupt

    return tell


def interrupted(loaded: tuple[Any, Any], out: Path, plan: Sampling = PLAN, tokens: int = 85) -> Path:
    """Leave the work of a run that was stopped after `tokens`, in its second batch; return its folder."""
    with pytest.raises(KeyboardInterrupt):
        synthesize(*loaded, plan, out, tell=stop_after(tokens))
    assert not out.exists()
    (work,) = (out.with_name(f".{out.name}.work")).iterdir()
    return work


def test_an_interrupted_run_continues_with_the_same_data(loaded: tuple[Any, Any], tmp_path: Path, make: Made) -> None:
    out = tmp_path / "out"
    work = interrupted(loaded, out)
    assert [path.name for path in work.iterdir()] == ["shard-00000.safetensors"]
    told: list[Progress] = []
    resumed = synthesize(*loaded, PLAN, out, tell=told.append)
    assert_same(resumed, make())
    assert min(event.done for event in told) == 80  # the first batch was not sampled again
    assert not work.parent.exists()


@pytest.mark.parametrize("damage", ["cut", "shape", "count"])
def test_a_damaged_shard_is_sampled_again(loaded: tuple[Any, Any], tmp_path: Path, make: Made, damage: str) -> None:
    out = tmp_path / "out"
    work = interrupted(loaded, out, tokens=165)
    first, second = sorted(work.iterdir())
    kept = second.read_bytes()
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:500])
    elif damage == "shape":
        save_file({"ids": np.zeros((4, 19), np.int32)}, first, {"counts": json.dumps({"rows": 4, "sampled": 4})})
    else:
        tensors = {name: value[:3] for name, value in load_file(first).items()}
        counts = {"rows": 3, "sampled": 3, "loops": 0, "duplicates": 0}
        save_file(tensors, first, {"counts": json.dumps(counts)})
    told: list[Progress] = []

    def tell(event: Progress) -> None:
        told.append(event)
        if event.done > 80:
            assert second.read_bytes() == kept

    assert_same(synthesize(*loaded, PLAN, out, tell=tell), make())
    assert [event.done for event in told if event.done < 160] == [0, 32, 64, 80]  # the second was kept


@pytest.mark.parametrize("other", ["seed", "top_k", "model", "tokenizer"])
def test_another_job_neither_uses_nor_loses_what_is_finished(
    loaded: tuple[Any, Any], tmp_path: Path, other: str
) -> None:
    out = tmp_path / "out"
    work = interrupted(loaded, out)
    model, tokenizer, plan = *loaded, PLAN
    if other == "model":
        model, _tokenizer = load_model(resolve(tiny.llama(tmp_path / "hf", initializer_range=0.1, seed=1)))
    elif other == "tokenizer":
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens(["more"])
    else:
        plan = replace(plan, **{other: 5})
    told: list[Progress] = []

    def tell(event: Progress) -> None:
        told.append(event)
        if event.done > 85:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(model, tokenizer, plan, out, tell=tell)
    assert told[0].done == 0
    assert len(list(work.parent.iterdir())) == 2 and (work / "shard-00000.safetensors").is_file()


def test_an_existing_corpus_is_replaced_only_by_force(loaded: tuple[Any, Any], make: Made) -> None:
    first = make()
    with pytest.raises(FileExistsError, match="pass --force"):
        synthesize(*loaded, PLAN, first.folder)
    other = synthesize(*loaded, replace(PLAN, seed=9), first.folder, force=True)
    assert (other.ids != first.ids).any() and Corpus.open(first.folder).facts["seed"] == 9


def test_progress_counts_tokens_to_its_end(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    told: list[Progress] = []
    synthesize(*loaded, PLAN, tmp_path / "out", tell=told.append)
    done = [event.done for event in told]
    assert done == sorted(done) and done[0] == 0
    assert {event.stage for event in told} == {"synthesize"} and {event.total for event in told} == {200}
    assert done[-1] == 200


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_chat_rows_start_with_the_users_turn(make: Made, share: float) -> None:
    ids = make(Sampling(sequences=16, length=14, batch=8, chat_share=share)).ids
    opened = (ids[:, : len(TURN)] == TURN).all(axis=1)
    assert opened.reshape(2, 8).sum(axis=1).tolist() == [8 * share, 8 * share]


def test_without_a_chat_template_there_are_no_chats(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plain = tiny.tokenizer()
    plain.chat_template = None
    ids = synthesize(loaded[0], plain, PLAN, tmp_path / "out").ids
    assert not (ids[:, : len(TURN)] == TURN).all(axis=1).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_second_to_fifth_token_are_greedy(make: Made, loaded: tuple[Any, Any], share: float) -> None:
    ids = make(Sampling(sequences=64, length=24, chat_share=share)).ids
    log_p = log_probabilities(loaded[0], ids)[:, :-1]
    own = log_p.gather(-1, torch.from_numpy(ids)[:, 1:, None])[..., 0]
    opening = 1 + (len(TURN) if share else 0)
    greedy = (own > log_p.amax(-1) - 1e-5).numpy()[:, opening - 1 :]  # column 0: the first token behind the opening
    runs = np.where(greedy.all(axis=1), greedy.shape[1], greedy.argmin(axis=1))
    assert runs.min() == 2
    assert {2, 3, 4} <= set(runs.tolist())
    assert (runs <= 4).mean() > 0.5  # sampling may hit the likeliest token, too
    assert greedy[:, 4:].mean() < 0.9


def test_later_tokens_follow_the_models_distribution(make: Made, loaded: tuple[Any, Any]) -> None:
    """Their mean log-likelihood is minus the entropy; at a lower temperature it is higher."""
    ids = make(Sampling(sequences=128, length=40, chat_share=0)).ids
    log_p = log_probabilities(loaded[0], ids)[:, 8:-1]
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    reached = float(log_p.gather(-1, torch.from_numpy(ids)[:, 9:, None]).mean())
    assert 1 < entropy < 6  # neither flat nor certain, so that the comparison can fail
    assert reached == pytest.approx(-entropy, abs=0.1)
    cold = make(Sampling(sequences=128, length=40, chat_share=0, temperature=0.5)).ids
    colder = log_probabilities(loaded[0], cold)[:, 8:-1].gather(-1, torch.from_numpy(cold)[:, 9:, None])
    assert float(colder.mean()) > reached + 0.5


def test_draw_follows_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0]).expand(20000, -1)
    counts = torch.bincount(draw(p, torch.Generator().manual_seed(0)), minlength=6) / 20000
    np.testing.assert_allclose(counts, p[0], atol=0.015)
    assert counts[[0, 3, 5]].sum() == 0


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=str)
def test_attention_from_single_tokens_changes_no_result(tmp_path: Path, changes: dict[str, int]) -> None:
    model, tokenizer = load_model(resolve(tiny.llama(tmp_path / "hf", initializer_range=0.1, **changes)))
    before = model.config._attn_implementation
    corpus = synthesize(model, tokenizer, PLAN, tmp_path / "out")
    assert model.config._attn_implementation == before == "sdpa"
    expected = log_probabilities(model, corpus.ids)
    found = corpus.targets(np.arange(10))
    np.testing.assert_allclose(found.log_probs, expected.gather(-1, torch.from_numpy(found.ids)), atol=0.006)


def test_attention_is_put_back_after_an_interrupt(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    interrupted(loaded, tmp_path / "out")
    assert loaded[0].config._attn_implementation == "sdpa"


def test_the_model_may_come_in_bfloat16(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = load_model(resolve(Path(loaded[0].config._name_or_path)))
    corpus = synthesize(model.bfloat16(), tokenizer, PLAN, tmp_path / "out")
    found = corpus.targets(np.arange(10))
    expected = log_probabilities(loaded[0], corpus.ids).gather(-1, torch.from_numpy(found.ids))
    assert np.abs(found.log_probs - expected.numpy()).mean() < 0.1
    assert model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("config", "length", "rows"),
    [  # rows * (layers * 2 * kv_heads * head_dim * T * 4 + vocab * 16) <= 512 MiB
        ((30, 9, 3, 64, 49152), 128, 80),
        ((30, 9, 3, 64, 49152), 256, 42),
        ((28, 16, 8, 128, 151936), 128, 16),
        ((36, 32, 8, 128, 151936), 4096, 1),
        ((2, 4, 2, 32, 512), 64, 192),
    ],
)
def test_batches_are_bounded_by_the_models_shape(config: tuple[int, ...], length: int, rows: int) -> None:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    shape = SimpleNamespace(**dict(zip(names, config, strict=True)), hidden_size=config[1] * config[3])
    assert batch_rows(shape, Sampling(length=length)) == rows
    del shape.head_dim  # which is then hidden_size / heads
    assert batch_rows(shape, Sampling(length=length)) == rows
    assert batch_rows(shape, Sampling(length=length, batch=7)) == min(rows, 7)


def test_bounded_batches_are_bounded_shards(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 3 * (2 * 2 * 2 * 32 * 20 * 4 + tiny.VOCAB * 16))
    assert [part["rows"] for part in make().facts["shards"]] == [3, 3, 3, 1]


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model, tokenizer = load_model(resolve(tiny.llama(tmp_path / "hf")))
    model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    for call in (
        lambda: synthesize(model, tokenizer, PLAN, tmp_path / "out"),
        lambda: score(model, tokenizer, [" ".join(tiny.SENTENCES)], tmp_path / "out", length=8),
    ):
        with pytest.raises(ValueError, match="logits are not finite, so its weights are damaged; fetch"):
            call()
    assert not (tmp_path / "out").exists()


def test_fingerprints_tell_models_apart(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    path = Path(loaded[0].config._name_or_path)
    model = load_model(resolve(path))[0]
    assert model_fingerprint(model) == model_fingerprint(loaded[0])
    weight = model.model.layers[1].mlp.down_proj.weight
    swapped = weight[:64].clone()
    weight[:64] = weight[64:]
    weight[64:] = swapped
    assert model_fingerprint(model) != model_fingerprint(loaded[0])
    again = load_model(resolve(path))[0]
    again.model.layers[0].self_attn.q_proj.weight[5, 7] += 1e-3
    assert model_fingerprint(again) != model_fingerprint(loaded[0])
    assert model_fingerprint(load_model(resolve(path))[0].bfloat16()) != model_fingerprint(loaded[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sequences": 0}, "sequences = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"length": 7}, "length = 7"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"temperature": 5.1}, "temperature = 5.1"),
        ({"chat_share": 1.1}, "chat_share = 1.1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"kept": -1}, "kept = -1"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 257}, "length = 257 is more than the model's context of 256 tokens"),
        ({"kept": 513}, "513 tokens are more than the vocabulary of 512"),
        ({"top_k": 600}, "600 tokens are more than the vocabulary of 512"),
        ({"length": len(TURN) + 5}, rf"behind the {len(TURN)} tokens that open a chat; use at least {len(TURN) + 6}"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    loaded: tuple[Any, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        synthesize(*loaded, replace(PLAN, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
