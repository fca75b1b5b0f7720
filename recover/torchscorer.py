"""A torch model as a scorer: what continuations' contexts share is read once, and many rows in one pass.

Rows of a pass may follow memories of different lengths: those are padded on the left, their ids on the right, and a
mask hides the padding on the left; what is on the right follows everything that is judged. Every layer remembers all
tokens, those with a sliding window too, so that a memory may be cut; the model's own mask bounds what such layers see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.likelihood import Continuation, Likelihood, Outcome, Pair, Part, alike
from rlkit.recover.source import Source

CPU_IDS = 512  # of one pass; more gain nothing there, and logits over a vocabulary of 150,000 take 314 MB
DEVICE_IDS = 16384
CPU_PASS, DEVICE_PASS = 16, 4096  # what a pass costs beside its ids, in ids: reading the weights, starting kernels
LOGITS_NBYTES = 2**30  # of one pass on a device
CPU_REPLIES, DEVICE_REPLIES = 8, 32  # written at a time: the weights are read once for all of them

Past = list[torch.Tensor]
"""Keys and values (parts, KV heads, T, head size) of one row: those of all layers in one tensor for each head size, so
that a memory is put in its place by few kernels, however many layers there are."""


class TorchReader:
    """Reads parts by a causal model of transformers, on the device and in the type that it has."""

    def __init__(self, model: Any, context_length: int) -> None:
        self.context_length = context_length
        self._model = model
        self._device = next(model.parameters()).device
        vocab = int(model.config.get_text_config().vocab_size)
        roomy = max(256, LOGITS_NBYTES // (4 * vocab))
        self.max_ids = CPU_IDS if self._device.type == "cpu" else min(DEVICE_IDS, roomy)
        self._pass_ids = CPU_PASS if self._device.type == "cpu" else DEVICE_PASS
        self.switch = switch_of(model.config.get_text_config())
        self._places: list[tuple[int, int]] = []  # of each layer's keys and values: the group and the number in it
        self._partly = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        """Yield (number of the part, Outcome)."""
        most = self.max_ids if self.switch is None else max(self.max_ids, self.context_length)
        together = [number for number, part in enumerate(parts) if len(part.ids) <= most]
        for number, part in enumerate(parts):
            if len(part.ids) > most:
                yield number, self._long(part)
        for group in alike([len(parts[number].ids) for number in together], self._pass_ids):
            some = [together[at] for at in group]
            yield from zip(some, self._pass([parts[number] for number in some]), strict=True)

    def cut(self, past: Past, length: int) -> Past:
        """The memory of the first `length` tokens."""
        return [tensor[:, :, :length] for tensor in past]

    def _long(self, part: Part) -> Outcome:
        """Read one part piece by piece."""
        past, length, kept = part.past, part.past_length, []
        for start in range(0, len(part.ids), self.max_ids):
            ids = part.ids[start : start + self.max_ids]
            wanted = part.positions[(part.positions >= start) & (part.positions < start + len(ids))] - start
            more = part.keep or start + self.max_ids < len(part.ids)
            (outcome,) = self._pass([Part(ids, past, length, wanted, more)])
            past, length = outcome.past, length + len(ids)
            kept.append(outcome.logits)
        return Outcome(np.concatenate(kept), past)

    def _pass(self, parts: Sequence[Part]) -> list[Outcome]:
        """Read parts in one pass."""
        width, behind = max(len(part.ids) for part in parts), max(part.past_length for part in parts)
        ids = torch.zeros((len(parts), width), dtype=torch.long)
        seen = torch.ones((len(parts), behind + width), dtype=torch.long)
        places = torch.arange(width)[None] + torch.tensor([[part.past_length] for part in parts])
        for row, part in enumerate(parts):
            ids[row, : len(part.ids)] = torch.from_numpy(part.ids)
            seen[row, : behind - part.past_length] = 0
        first = min((int(part.positions[0]) for part in parts if len(part.positions)), default=width - 1)
        extra: dict[str, Any] = {"logits_to_keep": width - first} if self._partly else {}
        cache = self._cache(parts, behind)
        found = self._model(
            input_ids=ids.to(self._device),
            attention_mask=seen.to(self._device),
            position_ids=places.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        logits, first = found.logits, first if self._partly else 0
        memory = self._stacked(cache) if any(part.keep for part in parts) else []
        return [
            Outcome(_picked(logits[row], part.positions - first), _kept(memory, row, part, behind))
            for row, part in enumerate(parts)
        ]

    def _cache(self, parts: Sequence[Part], behind: int) -> Any:
        """What the parts remember, padded on the left to `behind` tokens, as transformers wants it."""
        from transformers import DynamicCache

        if not behind:
            return DynamicCache()
        like: Past = next(part.past for part in parts if part.past)
        memory = []
        for at, tensor in enumerate(like):
            count, heads, _length, size = tensor.shape
            whole = tensor.new_zeros((count, len(parts), heads, behind, size))
            for row, part in enumerate(parts):
                if part.past_length:
                    whole[:, row, :, behind - part.past_length :] = part.past[at]
            memory.append(whole)
        both = [memory[group][number] for group, number in self._places]
        return DynamicCache(list(zip(both[::2], both[1::2], strict=True)))

    def _stacked(self, cache: Any) -> list[torch.Tensor]:
        """Keys and values (parts, B, KV heads, T, head size) of all layers; remembers which is where."""
        groups: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._places = []
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                key = (tensor.shape[1], tensor.shape[3])
                group = groups.setdefault(key, [])
                self._places.append((list(groups).index(key), len(group)))
                group.append(tensor)
        return [torch.stack(group) for group in groups.values()]


def switch_of(config: Any) -> int | None:
    """The length of rows beyond which a model turns all positions in another way, if it does."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    known = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(known or config.max_position_embeddings)


def _kept(memory: Sequence[torch.Tensor], row: int, part: Part, behind: int) -> Past | None:
    """What a row remembers after a pass, without padding, on its own so that the other rows' memory can go."""
    if not part.keep:
        return None
    span = slice(behind - part.past_length, behind + len(part.ids))
    return [tensor[:, row, :, span].clone() for tensor in memory]


def _picked(logits: torch.Tensor, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits (n, V) at positions of a row's (T, V)."""
    found: NDArray[np.float32] = logits[torch.from_numpy(positions).to(logits.device)].float().cpu().numpy()
    return found


def torch_scorer(model: Any, *, context_length: int | None = None) -> Likelihood:
    """The scorer of a causal model of transformers; `context_length` None means what its configuration says."""
    length = context_length or int(model.config.get_text_config().max_position_embeddings)
    return Likelihood(TorchReader(model, length))


def replies(model: Any) -> Callable[[Sequence[int], int], list[int]]:
    """The likeliest reply of a model: prompt ids and the most new tokens -> new ids, the end of text left out."""
    together = replies_together(model)
    return lambda ids, most: next(made for _number, made in together([ids], [most]))


Replies = Callable[[Sequence[Sequence[int]], Sequence[int]], Iterator[tuple[int, list[int]]]]
"""Prompts and the most new tokens of each -> (number of the prompt, ids of its likeliest reply), in any order."""


def replies_together(model: Any, rows: int | None = None) -> Replies:
    """Replies to several prompts at a time, `rows` of them unless None; a row that ended leaves the pass.

    One at a time where a model turns the positions of long rows in another way: all rows of a pass would follow.
    """
    ends = _ends(model)
    count = rows or (CPU_REPLIES if model.device.type == "cpu" else DEVICE_REPLIES)
    count = count if switch_of(model.config.get_text_config()) is None else 1

    def found(prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        for start in range(0, len(order), count):
            some = order[start : start + count]
            made = _greedy(model, [prompts[number] for number in some], [most[number] for number in some], ends)
            yield from ((some[row], ids) for row, ids in made)

    return found


def _ends(model: Any) -> set[int]:
    """The tokens that end a reply; none where nothing says."""
    stops = model.generation_config.eos_token_id
    if stops is None:
        stops = model.config.get_text_config().eos_token_id
    return set() if stops is None else {stops} if isinstance(stops, int) else set(stops)


@torch.no_grad()
def _greedy(
    model: Any, prompts: Sequence[Sequence[int]], most: Sequence[int], ends: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield (row, new ids) as rows end: at a token of `ends`, which is left out, or after `most` of them."""
    from transformers import DynamicCache

    width, device = max(map(len, prompts)), model.device
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    seen = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all rows go on at the same place
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        seen[row, width - len(prompt) :] = 1
    places, cache = (seen.cumsum(-1) - 1).clamp(min=0), DynamicCache()
    rows, made = list(range(len(prompts))), [list[int]() for _ in prompts]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    step, seen, places = ids.to(device), seen.to(device), places.to(device)
    while rows:
        logits = model(
            input_ids=step,
            attention_mask=seen,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).logits[:, -1]
        tokens = logits.argmax(dim=-1)
        going = []
        for at, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            made[row] += [] if token in ends else [token]
            if token in ends or len(made[row]) >= most[row]:
                yield row, made[row]
            else:
                going.append(at)
        if going and len(going) < len(rows):
            chosen = torch.tensor(going, device=device)
            cache.batch_select_indices(chosen)
            tokens, seen, places = tokens[chosen], seen[chosen], places[chosen]
        rows = [rows[at] for at in going]
        step, places = tokens[:, None], places[:, -1:] + 1
        seen = torch.nn.functional.pad(seen, (0, 1), value=1)


class TorchWorker:
    """A causal model of transformers that scores and replies."""

    def __init__(self, model: Any) -> None:
        self._scorer, self._together = torch_scorer(model), replies_together(model)
        vocab = int(model.config.get_text_config().vocab_size)
        self._facts = (self._scorer.context_length, vocab, str(model.device), str(model.dtype).removeprefix("torch."))

    def facts(self) -> tuple[int, int, str, str]:
        """Its context in tokens, its vocabulary, the device it is on and the type it has."""
        return self._facts

    @property
    def context_length(self) -> int:
        """The most tokens of a pair, but for its last, that are read."""
        return self._scorer.context_length

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """As `Likelihood.score`."""
        return self._scorer.score(pairs)

    def replies(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """As `Replies` says."""
        return self._together(prompts, most)


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a folder or .gguf file, without its model. Raises ValueError where it cannot be read."""
    from transformers import AutoTokenizer

    from rlkit.recover.model import quiet_transformers

    extra: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False, **extra)
    except (OSError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer of {source.reference} cannot be loaded: {first}; fetch it again") from error


def spread(device: str, number: int) -> str:
    """The device of process `number`: those of one kind in turn, where several are there and none is named."""
    kind, _, index = _named(device).partition(":")
    if index or kind not in ("cuda", "xpu") or not torch.accelerator.is_available():
        return device
    return f"{kind}:{number % torch.accelerator.device_count()}"


def _named(device: str) -> str:
    """`auto` as the fastest device there is."""
    if device != "auto":
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator.type)


def placed(model: Any, device: str, dtype: str | None = None, threads: int | None = None) -> Any:
    """The model on a device (cpu, cuda, cuda:1, mps, or auto: the fastest there is) and in a type of torch.

    `threads` are those of the whole process on the CPU.

    Raises ValueError for a device that is not there and for a type that is none.
    """
    device = _named(device)
    if threads is not None:
        torch.set_num_threads(threads)
    kind = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and (not isinstance(kind, torch.dtype) or not kind.is_floating_point):
        raise ValueError(f"dtype {dtype!r} is no type of weights; use float32, bfloat16 or float16")
    try:
        return model.to(device=torch.device(device), dtype=kind)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {first}; use cpu, or auto for what there is") from error
