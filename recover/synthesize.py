"""Synthetic sequences sampled from the model itself, with its distributions, so that recovery needs no text data.

Hybrid sampling after LLM-QAT (Liu et al. 2023, generate_data.py), which Recover-LoRA (2510.08600, section 3) adopts: a
sequence starts from one vocabulary token, continues greedily to a total of 3, 4 or 5 tokens, then is sampled from the
model's own distribution. Some of the sequences (`chat_share`) instead start with the chat template's opening of a user
turn, so that instruct models also visit the states they are used in.

The logits of each sampling step are also the original's distribution at that position; its top tokens are kept as a
corpus (corpus.py), at temperature 1 whatever temperature sampled. `score` does the same for given text.

Loops and duplicates are filtered, and other rows sampled in their place (quota.py).

Each batch draws from its own generator (seed, batch number), so the same seed gives the same data, whatever was already
there when the run was resumed. For the same reason the number of rows in a batch follows from the model's shape alone:
the largest (at most `batch`) whose keys and values, counted in float32, and four arrays of logits stay within 512 MiB:

    rows * (layers * 2 * kv_heads * head_dim * T * 4 + vocab * 4 * 4) <= 512 MiB
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.corpus import LEAST, LOWEST, Corpus, Ids, Shape, Work, tokenizer_fingerprint
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.quota import Quota

MAX_BYTES = 512 * 2**20
LOGIT_ARRAYS = 4  # the model's logits, their float32 copy, probabilities, and cumulative probabilities
ATTENTION = "rlkit-one-token"
UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures")  # of a configuration: not what it computes

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to sample: how many sequences of how many tokens, from which distribution, and what to keep of it.

    `top_k` limits sampling to the most likely tokens (0: all of them). `kept` is how many log-probabilities are stored
    per position (0: none). `batch` is the most rows sampled at once.
    """

    sequences: int = 384
    length: int = 128
    temperature: float = 1.0
    top_k: int = 0
    batch: int = 192
    chat_share: float = 0.4
    seed: int = 0
    kept: int = 64

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.batch < 1:
            raise ValueError(f"sequences = {self.sequences} and batch = {self.batch} must be at least 1")
        if self.length < 8:
            raise ValueError(f"length = {self.length} leaves nothing to sample; use at least 8 tokens")
        if not 0 < self.temperature <= 5 or not 0 <= self.chat_share <= 1:
            raise ValueError(
                f"temperature = {self.temperature} must be in (0, 5] and chat_share = {self.chat_share} in 0..1"
            )
        if self.top_k < 0 or self.kept < 0:
            raise ValueError(
                f"top_k = {self.top_k} and kept = {self.kept} must be at least 0 (all tokens, and none kept)"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} is no seed; use 0 to {2**32 - 1}")


def synthesize(
    model: Any, tokenizer: Any, sampling: Sampling, out: Path, *, force: bool = False, tell: Tell = silent
) -> Corpus:
    """Sample `sampling.sequences` rows from `model`, in the precision it comes in, into the corpus folder `out`.

    The same call continues an interrupted one with its finished batches. Raises FileExistsError if `out` exists and not
    `force`; ValueError if an option does not fit the model, or if more rows are filtered than were asked for.
    """
    _check(model, sampling.length, max(sampling.kept, sampling.top_k))
    turn = _user_turn(tokenizer) if sampling.chat_share else []
    if sampling.length < len(turn) + 6:
        raise ValueError(
            f"length = {sampling.length} leaves nothing to sample behind the {len(turn)} tokens that open a chat; "
            f"use at least {len(turn) + 6}, or --chat-share 0"
        )
    facts = _facts(model, tokenizer, sampling.length, sampling.kept)
    facts |= {"origin": "sampled", "seed": sampling.seed, "sampling": asdict(sampling)}
    work = Work(out, facts, sampling.sequences, force=force)
    quota = Quota(sampling.sequences, sampling.length, batch_rows(model.config, sampling))
    vocab = min(len(tokenizer), model.config.vocab_size)  # some models have rows that stand for no token
    with torch.no_grad(), _one_token_attention(model):
        while (count := quota.next_count()) > 0:
            index, kept = quota.finished, work.kept(quota.finished)
            if kept is None or kept[1].get("sampled") != count:
                rng = torch.Generator().manual_seed(sampling.seed * 1_000_003 + index)
                openings = _openings(turn, vocab, count, sampling.chat_share, rng)
                tensors = _sample_batch(model, openings, sampling, rng, quota.telling(count, tell))
                usable, counts = quota.judge(tensors["ids"])
                work.write(index, {name: value[usable] for name, value in tensors.items()}, counts)
                kept = tensors["ids"][usable], counts
            quota.take(*kept)
    tell(Progress(*quota.state()))
    return work.publish(quota.finished, quota.counts)


def batch_rows(config: Any, sampling: Sampling) -> int:
    """How many rows are sampled at once: the formula of the module's docstring, at least 1."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache: int = config.num_hidden_layers * 2 * kv_heads * head_dim * sampling.length * 4
    logits: int = config.vocab_size * 4 * LOGIT_ARRAYS
    return max(1, min(sampling.batch, MAX_BYTES // (cache + logits)))


def _user_turn(tokenizer: Any) -> list[int]:
    """Token ids of the chat template up to the first word of the user's message; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    mark = "\u0001"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer.encode(str(text).split(mark, 1)[0], add_special_tokens=False))


def _openings(turn: list[int], vocab: int, count: int, chat_share: float, rng: torch.Generator) -> list[list[int]]:
    """The fixed start of each row: a random vocabulary token, behind a user turn's opening for the chat share."""
    seeds = torch.randint(0, vocab, (count,), generator=rng).tolist()
    chats = round(count * chat_share) if turn else 0
    chosen = set(torch.randperm(count, generator=rng)[:chats].tolist())  # spread, as later stages use the first rows
    return [(turn if row in chosen else []) + [token] for row, token in enumerate(seeds)]


def _sample_batch(
    model: Any, openings: list[list[int]], sampling: Sampling, rng: torch.Generator, tell: Tell
) -> Arrays:
    """One batch, a token of every row per step: the tensors of a shard, before filtering."""
    count, length, kept = len(openings), sampling.length, sampling.kept
    greedy = torch.randint(2, 5, (count,), generator=rng)  # further tokens chosen greedily: totals of 3, 4, 5
    fixed = torch.tensor([len(opening) for opening in openings])
    ids = torch.zeros((count, length), dtype=torch.long)
    for row, opening in enumerate(openings):
        ids[row, : len(opening)] = torch.tensor(opening)
    tensors = Shape(count, length, kept, model.config.vocab_size).empty()
    past = None
    tell(Progress("synthesize", 0, length))
    for position in range(length):
        out = model(input_ids=ids[:, position : position + 1].to(model.device), past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].float()  # (B, V)
        values, order = _best(logits, max(kept, sampling.top_k, 1))
        probabilities = torch.softmax(logits, dim=-1)
        following = position + 1
        if following < length:
            sampled = _draw_next(logits, values, order, probabilities, sampling, rng)
            chosen = torch.where(following < fixed + greedy, order[:, 0].cpu(), sampled)
            ids[:, following] = torch.where(following < fixed, ids[:, following], chosen)
        if kept:
            for name, value in _kept(values[:, :kept], order[:, :kept], probabilities).items():
                tensors[name][:, position] = value
        if following % 8 == 0 or following == length:
            tell(Progress("synthesize", following, length))
    tensors["ids"][:] = ids.numpy()
    return tensors


def _draw_next(
    logits: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    probabilities: torch.Tensor,
    sampling: Sampling,
    rng: torch.Generator,
) -> torch.Tensor:  # (B,)
    if sampling.top_k:
        among = draw(torch.softmax(values[:, : sampling.top_k] / sampling.temperature, dim=-1), rng)
        return order.gather(1, among[:, None])[:, 0].cpu()
    if sampling.temperature != 1:
        probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    return draw(probabilities, rng).cpu()


def draw(probabilities: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """One sample per row of (rows, V) by inverting the cumulative distribution; ten times faster than multinomial."""
    cumulative = probabilities.cumsum(-1)
    threshold = torch.rand(len(cumulative), 1, generator=rng).to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold).clamp_(max=cumulative.shape[1] - 1)[:, 0]


def _best(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits and their ids, (B, count) each. Raises ValueError if the logits are no numbers."""
    values, order = logits.topk(count, dim=-1)
    if not bool(values[:, 0].isfinite().all()):  # NaN counts as largest
        raise ValueError("the model's logits are not finite, so its weights are damaged; fetch the model again")
    return values, order


def _kept(values: torch.Tensor, order: torch.Tensor, probabilities: torch.Tensor) -> Arrays:
    """What is stored of some positions (B, V) with their largest logits (B, k); uses up `probabilities`.

    The largest probability is at least 1 / V, so the logs taken from it lose nothing; and the rest is summed from the
    other tokens, as 1 - sum would lose it where it is small.
    """
    log_probs = values - values[:, :1] + probabilities.gather(1, order[:, :1]).log()
    rest = probabilities.scatter_(1, order, 0).sum(-1).clamp_min_(math.exp(LEAST)).log()
    return {
        "top_ids": order.to(torch.int32).cpu().numpy(),
        "top_log_probs": log_probs.clamp_min_(LOWEST).half().cpu().numpy(),
        "rest": rest.half().cpu().numpy(),
    }


@contextlib.contextmanager
def _one_token_attention(model: Any) -> Iterator[None]:
    """On a CPU, attend from single tokens by plain matrix products meanwhile.

    torch's fused attention takes several times as long for a single query per head, most of all in bfloat16: with it a
    step at 128 tokens took 2.3 times as long (SmolLM2-135M, 80 rows).
    """
    before = model.config._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    _module: Any,
    query: torch.Tensor,  # (B, heads, 1, D)
    key: torch.Tensor,  # (B, kv_heads, T, D)
    value: torch.Tensor,
    _mask: None,  # a single token sees all before it
    scaling: float,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    rows, heads, _one, dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, dim)  # the heads that share keys
    scores = (grouped @ key.transpose(2, 3)) * scaling
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).reshape(rows, 1, heads, dim), None


def score(  # noqa: PLR0913, text and how much of it to keep
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    out: Path,
    *,
    length: int = 128,
    sequences: int = 384,
    kept: int = 64,
    batch: int = 192,
    seed: int = 0,
    force: bool = False,
    tell: Tell = silent,
) -> Corpus:
    """Make the same kind of folder from given text: documents joined by the end-of-text token, cut into rows.

    Where there are more than `sequences` rows, they are chosen by `seed`; where there are fewer, all are used. `batch`
    is the most rows of a shard. Raises ValueError if the text is shorter than a row.
    """
    options = Sampling(sequences=sequences, length=length, batch=batch, chat_share=0, seed=seed, kept=kept)
    _check(model, length, kept)
    ids = _text_rows(tokenizer, documents, options)
    if ids.max() >= model.config.vocab_size:
        raise ValueError(f"token {ids.max()} is not in the model's vocabulary; the tokenizer belongs to another model")
    facts = _facts(model, tokenizer, length, kept) | {"origin": "text", "seed": seed}
    facts |= {"text": hashlib.sha256(ids.tobytes()).hexdigest()}
    work = Work(out, facts, len(ids), force=force)
    shards = range(0, len(ids), batch)
    for index, start in enumerate(shards):
        rows = ids[start : start + batch]
        if work.kept(index) is None:
            work.write(index, _score_rows(model, rows, kept, _telling_of(start, ids, tell)), {})
    tell(Progress("score", ids.size, ids.size))
    return work.publish(len(shards), {})


def _telling_of(before: int, ids: Ids, tell: Tell) -> Tell:
    length = ids.shape[1]

    def rows_done(event: Progress) -> None:
        tell(Progress("score", (before + event.done) * length, ids.size))

    return rows_done


def _text_rows(tokenizer: Any, documents: Iterable[str], options: Sampling) -> Ids:
    """The rows (at most `sequences`, T) of a text."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [
        np.array(tokenizer.encode(document, add_special_tokens=False, verbose=False) + end, np.int64)
        for document in documents
    ]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    rows = len(tokens) // options.length
    if not rows:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one row of {options.length}; give more text")
    ids: Ids = tokens[: rows * options.length].reshape(rows, options.length)
    if rows > options.sequences:
        ids = ids[np.random.default_rng(options.seed).permutation(rows)[: options.sequences]]
    return ids


@torch.no_grad()
def _score_rows(model: Any, ids: Ids, kept: int, tell: Tell) -> Arrays:
    """The tensors of a shard for given rows, from forward passes over a few of them at a time."""
    tensors = Shape(len(ids), ids.shape[1], kept, model.config.vocab_size).empty()
    tensors["ids"][:] = ids
    step = max(1, MAX_BYTES // (ids.shape[1] * model.config.vocab_size * 4 * LOGIT_ARRAYS))
    tell(Progress("score", 0, len(ids)))
    for start in range(0, len(ids), step) if kept else ():
        rows = torch.from_numpy(ids[start : start + step]).to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits.flatten(0, 1).float()  # (rows * T, V)
        values, order = _best(logits, kept)
        for name, value in _kept(values, order, torch.softmax(logits, dim=-1)).items():
            tensors[name][start : start + step] = value.reshape(len(rows), ids.shape[1], *value.shape[1:])
        tell(Progress("score", start + len(rows), len(ids)))
    return tensors


def _check(model: Any, length: int, largest: int) -> None:
    context = getattr(model.config, "max_position_embeddings", length)
    if length > context:
        raise ValueError(f"length = {length} is more than the model's context of {context} tokens; use at most that")
    if largest > model.config.vocab_size:
        raise ValueError(f"{largest} tokens are more than the vocabulary of {model.config.vocab_size}; keep fewer")


def _facts(model: Any, tokenizer: Any, length: int, kept: int) -> dict[str, Any]:
    """What decides the data and every shard's shape."""
    return {
        "length": length,
        "top_k": kept,
        "vocab": model.config.vocab_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": model_fingerprint(model),
    }


def model_fingerprint(model: Any) -> str:
    """A hash of configuration and weights that tells models apart: exact sums of all bits, and a sample of values."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in UNIMPORTANT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        flat = weight.reshape(-1)
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        sample = bits[:: max(1, len(bits) // 256)].tolist()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(bits.sum())} {sample}".encode())
    return digest.hexdigest()
