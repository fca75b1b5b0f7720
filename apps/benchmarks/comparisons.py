"""Suites of the recovery benchmark that compare something else than methods on gate and up.

auto     the automatic recipe against the fixed one at the same stored bytes, everything quantized, before training
repair   a float model damaged by noise, before and after its repair
errors   what each quantizer does to the outputs of one layer's gate and up, on the text it saw and on other text
"""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

from rlkit.apps import console
from rlkit.apps.benchmarks.texts import STEPS, Bench
from rlkit.recover import allocate, recipe, source
from rlkit.recover.atomic import write_json

TOKENS = "16k"
FIXED = "w4w2-gateup"
ROWS = 32  # of 128 tokens: what the moments are taken from
SCHEME = recipe.Scheme(2, 64)


def auto(bench: Bench) -> list[dict[str, Any]]:
    """Both recipes by codes alone and with closed-form corrections: bits stored per weight, KL, seconds."""
    rows = []
    for method in ("none", "corrected"):
        bits = _fixed_bits(bench, method)
        for name, wanted in ((FIXED, recipe.load(FIXED)), ("auto", allocate.Budget(bits_per_weight=bits))):
            kept = bench.out / "cases" / f"auto-{method}-{name}.json"
            if not kept.is_file():
                console.say(f"case auto, {name} by {method}")
                write_json(kept, {"recipe": name, "method": method, **_recovered(bench, method, wanted, bits)})
            rows.append(source.read_json(kept))
    return rows


def _fixed_bits(bench: Bench, method: str) -> float:
    """Bits per weight that the fixed recipe stores, counted as the search for an automatic one does."""
    from rlkit.recover import candidates, methods, model, sensitivity

    search = candidates.Search()
    if not methods.find(method).adapters:
        search = search.without_adapters()
    units = candidates.plan_units(model.load_model(bench.model)[0], search)
    (fixed,) = (plan for plan in search.fixed if plan.name == FIXED)
    choices = sensitivity.follow(fixed, units)
    assert choices is not None
    return 8 * allocate.stored(choices) / allocate.weights(units)


def _recovered(bench: Bench, method: str, wanted: recipe.Recipe | allocate.Budget, bits: float) -> dict[str, Any]:
    from rlkit.recover import recovery, workbench

    corpus, folder = bench.text(TOKENS)[0], bench.out / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    settings = recovery.Settings(method=method, amounts=workbench.Amounts(statistics_rows=ROWS, output_rows=ROWS))
    began = time.perf_counter()
    recovery.recover(
        bench.model, wanted, folder, settings=settings, against=bench.held_out.against, corpus=corpus, tell=bench.tell
    )
    facts = source.read_json(folder / "recovery.json")
    found = facts.get("auto", {}).get("figures", {})
    shutil.rmtree(folder)
    return {
        "bits_per_weight": found.get("bits_per_weight", bits),
        "seconds": time.perf_counter() - began,
        **{key: facts["stages"][-1]["divergence"][key] for key in ("kl_mean", "kl_stderr", "top1_agreement")},
        "figures": found or None,
    }


def show_auto(rows: list[dict[str, Any]]) -> None:
    """One line for each recipe and method."""
    cells = [
        (
            row["recipe"],
            row["method"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl_mean']:.3f}",
            f"{100 * row['top1_agreement']:.1f}%",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    console.table(("recipe", "method", "bits/weight", "KL", "same top", "seconds"), cells, title="before training")


def repair(bench: Bench) -> dict[str, Any]:
    """A model with noise in its matrices, then corrected, then distilled: the divergence after each stage."""
    kept = bench.out / "cases" / "repair-noise.json"
    if kept.is_file():
        return source.read_json(kept)
    from rlkit.recover import corrupt, distill, recovery, workbench
    from rlkit.recover import repair as repairs

    corpus, damaged, folder = bench.text(TOKENS)[0], bench.out / "damaged", bench.out / "repaired"
    damage = corrupt.Damage("noise")
    if not damaged.is_dir():
        corrupt.corrupt(bench.model, damage, damaged, tell=bench.tell)
    shutil.rmtree(folder, ignore_errors=True)
    settings = recovery.Settings(
        amounts=workbench.Amounts(statistics_rows=ROWS, output_rows=ROWS),
        distillation=distill.Distillation(steps=STEPS[TOKENS]),
    )
    repairs.repair(
        bench.model,
        source.resolve(damaged),
        folder,
        settings=settings,
        against=bench.held_out.against,
        corpus=corpus,
        tell=bench.tell,
    )
    stages = source.read_json(folder / "recovery.json")["stages"]
    for made in (damaged, folder):
        shutil.rmtree(made)
    write_json(kept, {"damage": damage.kind, "amount": damage.strength, "stages": stages})
    return source.read_json(kept)


def show_repair(result: dict[str, Any]) -> None:
    """One line for each measured stage."""
    rows = [
        (row["stage"], f"{row['divergence']['kl_mean']:.3f}", f"{100 * row['divergence']['top1_agreement']:.1f}%")
        for row in result["stages"]
        if row["divergence"]
    ]
    seconds = sum(row["seconds"] for row in result["stages"])
    title = f"{result['damage']} {result['amount']:g} in every matrix, repaired in {seconds:.0f} s"
    console.table(("stage", "KL", "same top"), rows, title=title)


def errors(bench: Bench) -> list[dict[str, Any]]:
    """trace(E H E^T) / trace(W H W^T) of gate and up together, by quantizer; H from the text it saw and from other."""
    from rlkit.recover import layers, model, quantizers
    from rlkit.recover.corpus import Corpus

    ids = Corpus.open(bench.text(TOKENS)[0]).ids
    loaded, scratch = model.load_model(bench.model)[0], bench.out / "moments"
    seen, other = (_middle(loaded, ids[start : start + ROWS], scratch) for start in (0, ROWS))
    names = ("mlp.gate_proj", "mlp.up_proj")
    rows = []
    for quantizer in quantizers.QUANTIZERS.values():
        treatment = layers.Treatment({seen.full(name): SCHEME for name in names}, {}, quantizer, None)
        began = time.perf_counter()
        state = layers.treat(copy.deepcopy(seen), treatment)  # which is changed by some
        seconds = time.perf_counter() - began
        rows.append(
            {"quantizer": quantizer.name, "layer": seen.prefix, "seconds": seconds, **_errors(state, seen, other)}
        )
    return rows


def _middle(model: Any, ids: Any, scratch: Path) -> Any:
    """The moments of the layer in the middle over ids (rows, T); those before are only passed through."""
    from rlkit.recover.sweep import Rows, sweep

    before = [f"model.layers.{index}" for index in range(model.config.num_hidden_layers // 2)]
    return next(sweep(model, Rows(ids), [], scratch, done=before))


def _errors(state: Any, seen: Any, other: Any) -> dict[str, float]:
    """Errors of the matrices as they act on the layer's own inputs: equalization has moved scales into the norm."""
    from rlkit.recover.compensate import output_error

    norm = "post_attention_layernorm"
    kept = state.others.get(seen.full(f"{norm}.weight"))
    scale = 1.0 if kept is None else (kept / seen.weight(norm)).nan_to_num(1.0)  # (K,)
    found = {}
    for key, moments in (("error", seen), ("error_elsewhere", other)):
        left = whole = 0.0
        for full, quantized in state.quantized.items():
            name = full.removeprefix(f"{seen.prefix}.")
            weight, moment = seen.weight(name), moments.inputs[name]
            left += float(output_error(weight - quantized.dequantize() * scale, moment).sum())
            whole += float(output_error(weight, moment).sum())
        found[key] = left / whole
    return found


def show_errors(rows: list[dict[str, Any]]) -> None:
    """One line for each quantizer."""
    cells = [
        (row["quantizer"], f"{row['error']:.4f}", f"{row['error_elsewhere']:.4f}", f"{row['seconds']:.2f}")
        for row in rows
    ]
    title = f"relative output error of gate and up of {rows[0]['layer']} at {SCHEME.bits} bits, group {SCHEME.group}"
    console.table(("quantizer", "on its text", "on other text", "seconds"), cells, title=title)
