"""How much accuracy each method of recovery gives back, for how much text and time.

    python -m rlkit.apps.benchmarks.recovery -o ./bench-recovery --suite methods

In suites of cases gate and up projections go to 2 bits, everything else stays float, so that nothing else is measured;
divergence and perplexity are taken on held-out LAMBADA passages, last-word accuracy on passages of the same file. What
other suites do is in comparisons.py. Every case is kept in the output folder: an interrupted run continues, and suites
share their cases and texts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, heldout
from rlkit.apps.benchmarks import comparisons, texts
from rlkit.apps.benchmarks.texts import BUDGETS, LENGTH, STEPS, Bench
from rlkit.profiles import lastword
from rlkit.profiles.machine import measure_machine
from rlkit.recover import assets, contents, source
from rlkit.recover.atomic import write_json
from rlkit.recover.recipe import METHODS, QUANTIZERS, Recipe, Rule, Scheme

GATE_UP = ("*.gate_proj", "*.up_proj")
PASSAGES = 200
MAX_STATISTICS_ROWS = 512


@dataclass(frozen=True, slots=True)
class Case:
    """One recovery: method, quantizer ("" for the method's own), tokens of text, group, adapter rank, steps."""

    method: str
    quantizer: str = ""
    tokens: str = "16k"
    group: int = 64
    rank: int = 32
    steps: int = 0

    @property
    def name(self) -> str:
        """A folder name that tells cases apart."""
        parts = (self.method, self.quantizer or "own", self.tokens, f"g{self.group}", f"r{self.rank}")
        return "-".join((*parts, f"s{self.steps or STEPS[self.tokens]}"))

    def recipe(self) -> Recipe:
        """Gate and up at 2 bits, the rest as it is."""
        return Recipe(f"gate-up-2-g{self.group}", (Rule(GATE_UP, Scheme(2, self.group, adapter_rank=self.rank)),))


SUITES: dict[str, tuple[Case, ...]] = {
    "methods": tuple(Case(method) for method in METHODS),
    "lora": (Case("recover-lora"), Case("recover-lora", "gptq")),
    "ranks": (Case("full", rank=32), Case("full", rank=64)),
    "budgets": tuple(Case(method, tokens=tokens) for tokens in BUDGETS for method in ("recover-lora", "full")),
    "groups": tuple(Case(method, group=group) for group in (32, 64) for method in ("none", "full")),
    "quantizers": tuple(Case("none", quantizer) for quantizer in QUANTIZERS),
    "quick": (Case("none"), Case("corrected"), Case("full")),
}


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of texts and results.")] = Path("bench-recovery"),
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"Which: {', '.join(SUITES)}, generation, auto, repair, errors; repeatable."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Only cases of these budgets: 16k,64k.")] = None,
    model: Annotated[str, typer.Option(help="A model: asset name, folder or .gguf file.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="Held-out requests: a text asset or .jsonl(.gz) file.")] = "lambada",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Run suites of recovery cases and print their figures."""
    asked = suite or ["quick"]
    unknown = [name for name in asked if name not in (*SUITES, *OTHERS)]
    if unknown:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; there are {', '.join([*SUITES, *OTHERS])}")
    found = source.resolve(model, download=model in assets.registry())
    results: dict[str, Any] = {"schema_version": 1, "model": model, "machine": measure_machine().to_json()}
    with console.progress(quiet=json) as tell:
        bench = Bench(found, heldout.find(found, text), out, tell)
        results |= {name: OTHERS[name].run(bench) for name in asked if name in OTHERS}
        cases = dict.fromkeys(case for name in asked if name in SUITES for case in SUITES[name])
        wanted = [case for case in cases if tokens is None or case.tokens in tokens.split(",")]
        results["cases"] = [_run(case, bench) for case in wanted]
        if wanted:
            results["original"] = _original(bench)
    write_json(out / f"{'-'.join(asked)}.json", results)
    if json:
        console.emit_json(results)
        return
    _show(results)


def _run(case: Case, bench: Bench) -> dict[str, Any]:
    """A case's figures, from its folder if it was run before."""
    kept = bench.out / "cases" / f"{case.name}.json"
    if kept.is_file():
        return source.read_json(kept)
    from rlkit.recover import distill, recovery, workbench

    console.say(f"case {case.name}")
    corpus, synthesis_seconds = bench.text(case.tokens)
    folder, began = bench.out / "checkpoint", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    settings = recovery.Settings(
        method=case.method,
        quantizer=case.quantizer,
        amounts=workbench.Amounts(statistics_rows=min(MAX_STATISTICS_ROWS, BUDGETS[case.tokens] // LENGTH)),
        distillation=distill.Distillation(steps=case.steps or STEPS[case.tokens]),
    )
    against = bench.held_out.against
    recovery.recover(
        bench.model, case.recipe(), folder, settings=settings, against=against, corpus=corpus, tell=bench.tell
    )
    wall = time.perf_counter() - began
    facts = source.read_json(folder / "recovery.json")
    last = facts["stages"][-1]["divergence"]
    result = {
        **asdict(case),
        "stages": facts["stages"],
        **_figures(folder, bench),
        "seconds": round(synthesis_seconds + sum(row["seconds"] for row in facts["stages"]), 1),
        "wall_seconds": round(wall, 1),
        "peak_nbytes": facts["peak_nbytes"],
        **{key: last[key] for key in ("kl_mean", "kl_stderr", "top1_agreement")},
        "measured_tokens": last["tokens"],
        "perplexity": last["perplexity_other"],
        "perplexity_original": last["perplexity_original"],
    }
    write_json(kept, result)
    shutil.rmtree(folder)
    return result


def _original(bench: Bench) -> dict[str, Any]:
    """What the original does with the same last words."""
    kept = bench.out / "original.json"
    if not kept.is_file():
        from rlkit.recover.model import load_model, logits_fn

        model, tokenizer = load_model(bench.model)
        passages = lastword.read_passages(bench.held_out.text, tokenizer.encode, count=PASSAGES)
        said = lastword.accuracy(logits_fn(model), passages, bench.tell)
        write_json(kept, {"last_word": said, "passages": len(passages)})
    return source.read_json(kept)


def _figures(folder: Path, bench: Bench) -> dict[str, Any]:
    """Bits per weight of the 2-bit matrices with their adapters, and last words said."""
    from rlkit.recover.checkpoint import load_checkpoint
    from rlkit.recover.model import logits_fn

    rows = {row["kind"]: row for row in contents.describe(source.resolve(folder))["tensors"]}
    matrices, factors = rows["gate_up"], rows["adapter"]["weights"] if "adapter" in rows else 0
    model, tokenizer = load_checkpoint(folder)
    passages = lastword.read_passages(bench.held_out.text, tokenizer.encode, count=PASSAGES)
    return {
        "bits_per_weight": round(8 * (matrices["nbytes"] + factors) / matrices["weights"], 3),  # factors: 8 bits
        "last_word": lastword.accuracy(logits_fn(model), passages, bench.tell),
    }


def _show_generation(found: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in found["tokens_per_s"].items())
    console.emit(f"generation: {rates}; {found['ratio']:.1f} times")


@dataclass(frozen=True, slots=True)
class Other:
    """A suite that is no list of cases: what it measures, and how its result is shown."""

    run: Callable[[Bench], Any]
    show: Callable[[Any], None]


OTHERS = {
    "generation": Other(texts.generation, _show_generation),
    "auto": Other(comparisons.auto, comparisons.show_auto),
    "repair": Other(comparisons.repair, comparisons.show_repair),
    "errors": Other(comparisons.errors, comparisons.show_errors),
}


def _show(results: dict[str, Any]) -> None:
    for name, other in OTHERS.items():
        if name in results:
            other.show(results[name])
    columns = ("method", "quantizer", "tokens", "group", "rank", "KL", "same top", "perplexity", "last word")
    rows = []
    for row in results["cases"]:
        adapted = row["method"] in ("recover-lora", "corrected", "full")
        rows.append(
            (
                row["method"],
                row["quantizer"] or "its own",
                row["tokens"],
                str(row["group"]),
                str(row["rank"]) if adapted else "-",
                f"{row['kl_mean']:.3f}",
                f"{100 * row['top1_agreement']:.1f}%",
                f"{row['perplexity']:.1f}",
                f"{100 * row['last_word']:.1f}%",
                f"{row['seconds']:.0f}",
                f"{row['bits_per_weight']:.2f}",
            )
        )
    if rows:
        plain, original = results["cases"][0]["perplexity_original"], results["original"]
        words = f"{100 * original['last_word']:.1f}% of {original['passages']} last words"
        console.emit(f"the original: perplexity {plain:.1f}, {words}")
        console.table((*columns, "seconds", "bits/weight"), rows, title=f"{results['model']}, gate and up at 2 bits")


if __name__ == "__main__":
    typer.run(main)
