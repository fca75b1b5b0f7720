"""The command `forecast`: what a model's shape promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from rlkit.apps import console
from rlkit.profiles import forecast as forecasting
from rlkit.profiles.machine import measure_machine
from rlkit.profiles.render import TIMING_COLUMNS, timing_cells
from rlkit.recover import recipe as recipes
from rlkit.recover import source

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
DEFAULT_RECIPE = "w4w2-gateup"
BUSY = 0.3  # a median this far below the best trial means that something else was running
FORMULAS = (
    "roofline: the sum over operators of the larger of FLOPs / peak and bytes / bandwidth",
    "LIFE (arXiv 2508.00904): first token = the larger of both totals; per token = bytes / bandwidth",
    "bytes/bandwidth: weights and cache alone, the baseline with one parameter",
)


def forecast(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A model: asset name, hub id, folder, config.json or .gguf file.")],
    recipe: Annotated[str | None, typer.Option(help="A named recipe or a TOML file; default: the model's own.")] = None,
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after the prompt.")] = 128,
    last_logits: Annotated[bool, typer.Option("--last-logits", help="Prefill computes one token's logits.")] = False,
    bandwidth: Annotated[float | None, typer.Option(help="Read bandwidth in GB/s instead of measuring it.")] = None,
    gflops: Annotated[float | None, typer.Option(help="Compute peak in GFLOP/s instead of measuring it.")] = None,
    json: Json = False,
) -> None:
    """Forecast time to first token, tokens/s and memory from a model's shape: no weights, no run.

    Example: rlkit forecast Qwen3-4B/config.json --recipe w4w2-gateup --context 2048
    """
    where = source.resolve(model)
    shape = source.read_shape(where)
    chosen = recipe_of(where, recipe)
    work = forecasting.Workload(context, new_tokens, all_logits=not last_logits)
    made = forecasting.forecast(shape, chosen, _peaks(bandwidth, gflops, quiet=json), work)
    if json:
        console.emit_json({"model": model, "shape": shape.to_json(), **made.to_json()})
        return
    sizes = f"{shape.parameters / 1e9:.3f} billion parameters, {made.stored_nbytes / 1e6:.0f} MB"
    console.emit(f"{model}: {sizes} as {chosen.name}; {context} prompt and {new_tokens} new tokens")
    for title, costs in (("prefill", made.prefill), (f"one token after {context}", made.decode)):
        console.table((title, "GFLOP", "MB", "ms", "share", "bound"), forecast_rows(costs))
    formulas = {"roofline": made.roofline, "LIFE": made.life, "bytes/bandwidth": made.baseline}
    console.table(("formula", *TIMING_COLUMNS), [(name, *timing_cells(timing)) for name, timing in formulas.items()])
    for line in (*FORMULAS, *made.assumptions):
        console.emit(f"- {line}")


def forecast_rows(costs: Sequence[forecasting.Cost]) -> list[tuple[str, ...]]:
    """One row per operator class, and their sum."""
    total = sum(cost.seconds for cost in costs)
    rows = [_cost_row(cost.name, cost.flops, cost.nbytes, cost.seconds / total, total, cost.bound) for cost in costs]
    sums = sum(cost.flops for cost in costs), sum(cost.nbytes for cost in costs)
    return [*rows, _cost_row("all", *sums, 1.0, total, "")]


def _cost_row(name: str, flops: int, nbytes: int, share: float, total: float, bound: str) -> tuple[str, ...]:
    amounts = f"{flops / 1e9:.3f}", f"{nbytes / 1e6:.2f}", f"{1e3 * share * total:.3f}"
    return (name, *amounts, f"{100 * share:.1f} %", bound)


def recipe_of(where: source.Source, asked: str | None) -> recipes.Recipe:
    """The recipe asked for; else the one that made the checkpoint or bundle; else the default."""
    own = where.path / "recipe.toml"
    if asked is None and where.kind in (source.SourceKind.CHECKPOINT, source.SourceKind.BUNDLE) and own.is_file():
        return recipes.load(own)
    return recipes.load(asked or DEFAULT_RECIPE)


def _peaks(bandwidth: float | None, gflops: float | None, *, quiet: bool) -> forecasting.Peaks:
    if bandwidth is not None and gflops is not None:
        return forecasting.Peaks(1e9 * bandwidth, 1e9 * gflops, source="given on the command line")
    if not quiet:
        console.say("measuring this machine's read bandwidth and float32 speed (about 4 s)")
    machine = measure_machine()
    if not quiet and max(machine.read_spread, machine.flops_spread) > BUSY:
        console.say("the machine was busy meanwhile, so these peaks may be too low; repeat on a quiet machine")
    measured = forecasting.Peaks.of(machine)
    if bandwidth is None and gflops is None:
        return measured
    bytes_per_s = measured.bytes_per_s if bandwidth is None else 1e9 * bandwidth
    flops_per_s = measured.flops_per_s if gflops is None else 1e9 * gflops
    return forecasting.Peaks(bytes_per_s, flops_per_s, source=f"partly given, else {measured.source}")
