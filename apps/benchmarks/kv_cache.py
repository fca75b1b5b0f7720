"""What a quantized KV cache saves and costs: bytes, peak memory and time at depth, and predictions against float's.

    python -m rlkit.apps.benchmarks.kv_cache ./bundle -o ./bench-kv --text lambada

Every cache of the bundle runs in two processes of its own. One fills a context and then generates, by the clock; its
high-water mark counts the weights, the cache and what the runtime needs besides. The other computes the logits of the
last tokens of long rows of text, the rows' beginnings in the cache, and compares them with those of the float cache.
Cases that are done are kept in the output folder.
"""

from __future__ import annotations

import json as jsons
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from rlkit.apps import console, heldout
from rlkit.profiles import text
from rlkit.profiles.divergence import LogitsFn, compare, live
from rlkit.recover import memory
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json
from rlkit.runtime import kv
from rlkit.runtime.clocked import Clocked
from rlkit.runtime.plain import Plain
from rlkit.runtime.session import open_bundle, read_bundle, threads_here

LIMITS = {"int8": 0.27, "int4": 0.15}  # of the float cache's bytes
NEW = 32  # tokens by the clock


@dataclass(frozen=True, slots=True)
class Case:
    """One process: which figures of which cache; `rows` of text for each of `contexts`, `last` tokens compared."""

    what: str  # memory or cost
    bundle: str
    kv: str
    out: str
    depth: int
    contexts: tuple[int, ...]
    rows: int
    last: int
    text: str
    threads: int | None


def at_depth(case: Case) -> dict[str, Any]:
    """Peak memory after a short prompt and with a full context, and seconds per token there."""
    session = open_bundle(Path(case.bundle), kv=case.kv, threads=case.threads)
    ids = np.random.default_rng(0).integers(3, session.vocab_size, case.depth).tolist()
    clocked = Clocked(session)
    short = list(clocked.generate([], ids[:32], NEW, 32 + NEW))
    before = memory.peak_nbytes()
    fill = ids[: case.depth - NEW - 1]
    deep = list(clocked.generate(fill, ids[-1:], NEW, case.depth))
    config, _manifest = read_bundle(Path(case.bundle))
    _file, cache = kv.graph_of(Path(case.bundle), config, case.kv)
    return {
        "nbytes_per_token": cache.nbytes_per_token,
        "cache_nbytes": cache.nbytes_per_token * case.depth,
        "peak_nbytes_short": before,
        "peak_nbytes": memory.peak_nbytes(),
        "seconds_per_token_short": statistics.median(short[1:]),
        "seconds_per_token": statistics.median(deep[1:]),
    }


def cost(case: Case) -> dict[str, Any]:
    """KL and agreement with the float cache at the end of each context; the float cache's own case keeps its logits."""
    folder = Path(case.bundle)
    config, manifest = read_bundle(folder)
    plain = Plain(folder, config["model"]["decoder"], case.threads or threads_here(config, manifest), case.kv)
    found: dict[str, Any] = {}
    rows = _rows(case)
    for number, row in enumerate(rows):
        kept = Path(case.out) / f"reference-{number}.npy"
        logits = plain.tail(row, case.last)
        if case.kv == kv.FLOAT:
            np.save(kept, logits[0])
            continue
        batch = text.Batch(row[:, -case.last :], np.array([case.last]))
        reference = np.load(kept)
        divergence = compare(live(_fixed(reference[None]), [batch]), _fixed(logits), [batch])
        found.setdefault(str(row.shape[1]), []).append(divergence.to_json())
    return {"contexts": {length: _mean(parts) for length, parts in found.items()}}


def _fixed(logits: NDArray[np.float32]) -> LogitsFn:
    return lambda _ids: logits


def _mean(parts: list[dict[str, Any]]) -> dict[str, float]:
    names = ("kl_mean", "top1_agreement", "perplexity_original", "perplexity_other", "tokens")
    means = {name: float(np.mean([part[name] for part in parts])) for name in names}
    return {**means, "rows": len(parts)}


def _rows(case: Case) -> list[NDArray[np.int64]]:
    """Rows (1, T) of documents one after the other, each row of other text; ValueError where there is too little."""
    kept = Path(case.out) / "rows.json"
    if not kept.is_file():
        session = open_bundle(Path(case.bundle), threads=case.threads)
        documents = text.read_documents(heldout.find_text(case.text))
        random.Random(0).shuffle(documents)
        needed, ids = sum(case.contexts) * case.rows, list[int]()
        for document in documents:
            if len(ids) >= needed:
                break
            ids += session.encode(document + "\n\n")
        if len(ids) < needed:
            raise ValueError(f"{case.text} has {len(ids)} tokens, fewer than {needed}; ask for fewer or give more text")
        write_json(kept, ids[:needed])
    ids, at, rows = jsons.loads(kept.read_text(encoding="utf-8")), 0, []
    for context in case.contexts:
        for _ in range(case.rows):
            rows.append(np.array([ids[at : at + context]], np.int64))
            at += context
    return rows


FIGURES: dict[str, Callable[[Case], dict[str, Any]]] = {"memory": at_depth, "cost": cost}


def _measured(case: Case) -> dict[str, Any]:
    """The figures of a case, by a process of its own, or kept from before."""
    kept = Path(case.out) / f"{case.what}-{case.kv}.json"
    if not kept.is_file():
        console.say(f"{case.what} of {case.kv}")
        words = [
            sys.executable,
            "-m",
            "rlkit.apps.benchmarks.kv_cache",
            "--case",
            jsons.dumps(asdict(case)),
            "-o",
            case.out,
        ]
        done = subprocess.run([*words, case.bundle], check=True, stdout=subprocess.PIPE, text=True)
        write_json(kept, jsons.loads(done.stdout))
    return read_json(kept)


def main(  # noqa: PLR0913, one parameter per option
    bundle: Annotated[
        Path, typer.Argument(help="A bundle with quantized caches: rlkit kv-calibrate BUNDLE --add int8,int4.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the cases and results.")] = Path("bench-kv"),
    depth: Annotated[int, typer.Option(help="Context for memory and time, in tokens.")] = 8192,
    contexts: Annotated[str, typer.Option(help="Lengths at whose end predictions are compared.")] = "512,2048,8192",
    rows: Annotated[int, typer.Option(help="Rows of text for each length.")] = 1,
    last: Annotated[int, typer.Option(help="Tokens compared at the end of each row.")] = 256,
    words: Annotated[str, typer.Option("--text", help="The text: an asset or a file, not what was calibrated on.")] = (
        "lambada"
    ),
    threads: Annotated[int | None, typer.Option(help="Threads; left out, what the bundle says.")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure every cache that a bundle offers, print what each saves and costs, and hold the bytes to their limits."""
    if case is not None:
        told = jsons.loads(case)
        given = Case(**{**told, "contexts": tuple(told["contexts"])})
        console.emit(jsons.dumps(FIGURES[given.what](given)))
        return
    config, _manifest = read_bundle(bundle)
    limit = int(config["model"]["context_length"])
    lengths = tuple(min(int(length), limit) for length in contexts.split(","))
    shared = (str(out), min(depth, limit), lengths, rows, last, words, threads)
    out.mkdir(parents=True, exist_ok=True)
    names = kv.offered(bundle, config)
    found = {
        name: {
            key: value for what in FIGURES for key, value in _measured(Case(what, str(bundle), name, *shared)).items()
        }
        for name in names
    }
    whole = found[kv.FLOAT]["nbytes_per_token"]
    for name, facts in found.items():
        facts["share"] = facts["nbytes_per_token"] / whole
        facts["within_limit"] = facts["share"] <= LIMITS.get(name, 1.0)
    result = {"schema_version": 1, "bundle": bundle.name, "depth": min(depth, limit), "caches": found}
    write_json(out / "kv_cache.json", result)
    if json:
        console.emit_json(result)
    else:
        show(result)
    if not all(facts["within_limit"] for facts in found.values()):
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """The results as two tables."""
    columns = ("cache", "bytes per token", "of float", "cache MB", "peak MB", "ms per token", "at the start")
    cells = [
        (
            name,
            facts["nbytes_per_token"],
            f"{facts['share']:.1%}",
            f"{facts['cache_nbytes'] / 1e6:.1f}",
            f"{facts['peak_nbytes'] / 1e6:.0f}",
            f"{1e3 * facts['seconds_per_token']:.2f}",
            f"{1e3 * facts['seconds_per_token_short']:.2f}",
        )
        for name, facts in result["caches"].items()
    ]
    console.table(columns, cells, title=f"{result['bundle']}, {result['depth']} tokens")
    costs = [
        (name, length, f"{part['kl_mean']:.4f}", f"{part['top1_agreement']:.1%}", f"{part['perplexity_other']:.2f}")
        for name, facts in result["caches"].items()
        for length, part in facts["contexts"].items()
    ]
    console.table(("cache", "context", "KL to float", "same likeliest token", "perplexity"), costs)


if __name__ == "__main__":
    typer.run(main)
