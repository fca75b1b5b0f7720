"""Synthetic sequences sampled from the model itself, so that recovery needs no text data.

Hybrid sampling after LLM-QAT (Liu et al. 2023, generate_data.py), which Recover-LoRA (2510.08600, section 3) adopts: a
sequence starts from one vocabulary token, continues greedily to a total of 3, 4 or 5 tokens, then is sampled from the
model's own distribution. Some of the sequences (`chat_share`) instead start with the chat template's opening of a user
turn, so that instruct models also visit the states they are used in.

Each batch draws from its own generator (seed, batch number), so the same seed gives the same data, whatever was already
there when the run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.statistics import draw

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to sample: number of sequences, tokens in each, temperature, sequences per batch, and the seed."""

    sequences: int = 384
    length: int = 128
    temperature: float = 1.0
    batch: int = 192
    chat_share: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.batch < 1:
            raise ValueError(f"sequences = {self.sequences} and batch = {self.batch} must be at least 1")
        if self.length < 8:
            raise ValueError(f"length = {self.length} leaves nothing to sample; use at least 8 tokens")
        if not 0 < self.temperature <= 5 or not 0 <= self.chat_share <= 1:
            raise ValueError(f"temperature = {self.temperature} must be in (0, 5] and chat_share in 0..1")


def synthesize(
    model: Any, tokenizer: Any, sampling: Sampling, *, shards: Path | None = None, tell: Tell = silent
) -> Ids:  # (sequences, length)
    """Sample `sampling.sequences` rows of token ids from `model`.

    With `shards`, each finished batch is kept there as a safetensors file and reused on the next call.
    """
    batches = list(_batches(sampling))
    rows: list[Ids] = []
    for index, count in enumerate(batches):
        path = shards / f"synthetic-{sampling.seed}-{index:04d}.safetensors" if shards else None
        kept = _kept(path, count, sampling.length)
        if kept is None:
            kept = _sample_batch(model, tokenizer, sampling, index, count, len(batches), tell)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"ids": kept}, path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
        rows.append(kept)
    return np.concatenate(rows)


def _batches(sampling: Sampling) -> Iterator[int]:
    for start in range(0, sampling.sequences, sampling.batch):
        yield min(sampling.batch, sampling.sequences - start)


def _kept(path: Path | None, count: int, length: int) -> Ids | None:
    if path is None or not path.is_file():
        return None
    ids: Ids = load_file(path)["ids"]
    return ids if ids.shape == (count, length) else None


def _openings(tokenizer: Any, vocab: int, sampling: Sampling, count: int, rng: torch.Generator) -> list[list[int]]:
    """The fixed start of each row: a random vocabulary token, behind a user turn's opening for the chat share."""
    seeds = torch.randint(0, vocab, (count,), generator=rng).tolist()
    turn = _user_turn(tokenizer)
    chats = round(count * sampling.chat_share) if turn else 0
    chosen = set(torch.randperm(count, generator=rng)[:chats].tolist())  # spread, as later stages use the first rows
    return [(turn if row in chosen else []) + [token] for row, token in enumerate(seeds)]


def _user_turn(tokenizer: Any) -> list[int]:
    """Token ids of the chat template up to the first word of the user's message; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    mark = "\u0001"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer.encode(str(text).split(mark, 1)[0], add_special_tokens=False))


@torch.no_grad()
def _sample_batch(  # one batch: prefill of the longest opening, then one token per step
    model: Any, tokenizer: Any, sampling: Sampling, index: int, count: int, total: int, tell: Tell
) -> Ids:
    rng = torch.Generator().manual_seed(sampling.seed * 1_000_003 + index)
    vocab = model.config.vocab_size
    openings = _openings(tokenizer, vocab, sampling, count, rng)
    greedy = torch.randint(2, 5, (count,), generator=rng)  # further tokens chosen greedily: totals of 3, 4, 5
    fixed = torch.tensor([len(opening) for opening in openings])
    ids = torch.zeros((count, sampling.length), dtype=torch.long)
    for row, opening in enumerate(openings):
        ids[row, : len(opening)] = torch.tensor(opening[: sampling.length])
    past, logits = None, None
    for position in range(sampling.length):
        if logits is not None:
            chosen = _choose(logits, sampling.temperature, position < fixed + greedy, rng)
            ids[:, position] = torch.where(position < fixed, ids[:, position], chosen)
        if position + 1 < sampling.length:
            out = model(input_ids=ids[:, position : position + 1], past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[:, -1].float()
        if position % 8 == 7 or position + 1 == sampling.length:
            done = index * sampling.length + position + 1
            tell(Progress("synthesize", done, total * sampling.length, f"{done * count} tokens"))
    return ids.numpy()


def _choose(logits: torch.Tensor, temperature: float, greedy: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    sampled = draw(torch.softmax(logits / temperature, dim=-1), rng)
    return torch.where(greedy, logits.argmax(dim=-1), sampled)
