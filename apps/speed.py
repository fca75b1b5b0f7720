"""The commands about speed: `bench` measures bundles, `forecast` says what a model's shape promises."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console
from rlkit.profiles import bench as benchmark
from rlkit.profiles import forecast as forecasting
from rlkit.profiles import worker
from rlkit.profiles.bundle import BundleSize, read_size
from rlkit.profiles.machine import measure_machine
from rlkit.profiles.render import TIMING_COLUMNS, timing_cells
from rlkit.recover import recipe as recipes
from rlkit.recover import source
from rlkit.recover.atomic import write_json

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
DEFAULT_RECIPE = "w4w2-gateup"
BUSY = 0.3  # a median this far below the best trial means that something else was running
FORMULAS = (
    "roofline: the sum over operators of the larger of FLOPs / peak and bytes / bandwidth",
    "LIFE (arXiv 2508.00904): first token = the larger of both totals; per token = bytes / bandwidth",
    "bytes/bandwidth: weights and cache alone, the baseline with one parameter",
)


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders; several are measured in turns.")],
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths, with commas between.")] = "64,256",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Measured rounds of each length, after two warm-ups.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads; left out, what each bundle says.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure time to first token, time per token and peak memory of bundles, each in a process of its own.

    pp64: a prompt of 64 tokens up to the first new one. tg64 @ d64: the tokens after it. GB/s: weights and cache read
    per token, over its time. Prompts are random and new in every round.

    Example: rlkit bench rlkit-demo/w4 rlkit-demo/w4w2 --prompt-tokens 64,256
    """
    plan = benchmark.Plan(_lengths(prompt_tokens), new_tokens, repeats)
    sizes = [read_size(bundle) for bundle in bundles]
    setting = worker.Setting(threads=threads)
    with console.progress(quiet=json) as tell:
        found = worker.measure_bundles(bundles, plan, setting, tell)
    ratios = benchmark.ratios(found)
    result = {
        "schema_version": 1,
        "date": datetime.date.today().isoformat(),
        "threads": threads,
        "versions": {name: version(name) for name in ("rlkit-edge", "onnxruntime", "onnxruntime-genai")},
        "measurements": [measured.to_json() for measured in found],
        "ratios": [
            {"name": r.name, "against": r.against, "prompt_tokens": r.prompt_tokens, "ttft": r.ttft, "tpot": r.tpot}
            for r in ratios
        ],
    }
    if output is not None:
        write_json(output, result)
    if json:
        console.emit_json(result)
        return
    columns = ("bundle", "recipe", "MB", "bits/w", "threads", "test", "tokens/s", "ms", "GB/s", "peak MB")
    console.table(columns, [row for pair in zip(found, sizes, strict=True) for row in bench_rows(*pair)])
    for ratio in ratios:
        about = f"{ratio.name} against {ratio.against}, {ratio.prompt_tokens} prompt tokens"
        console.emit(f"{about}: first token {ratio.ttft:.2f} times the time, each later token {ratio.tpot:.2f} times")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--prompt-tokens {text!r} are no lengths; write numbers such as 64,256") from error


def bench_rows(measured: benchmark.Measurement, size: BundleSize) -> list[tuple[str, ...]]:
    """Two rows per prompt length, prefill and decode: tokens/s as mean and standard deviation, ms as median."""
    rows: list[tuple[str, ...]] = []
    stored = f"{size.nbytes / 1e6:.1f}", f"{size.bits_per_weight:.2f}"
    about = (measured.name, size.recipe, *stored, str(measured.threads or ""))
    for timing, rounds in zip(measured.timings, measured.rounds, strict=True):
        prefill = [timing.prompt_tokens / r.ttft_seconds for r in rounds]
        decode = [1.0 / r.tpot_seconds for r in rounds]
        rate = "" if timing.bytes_per_s is None else f"{timing.bytes_per_s / 1e9:.1f}"
        peak = "" if timing.peak_nbytes is None else f"{timing.peak_nbytes / 1e6:.0f}"
        name = f"tg{timing.new_tokens} @ d{timing.prompt_tokens}"
        rows.append((*about, f"pp{timing.prompt_tokens}", _mean(prefill), f"{1e3 * timing.ttft_seconds:.1f}", "", peak))
        rows.append((*about, name, _mean(decode), f"{1e3 * timing.tpot_seconds:.2f}", rate, peak))
    return rows


def _mean(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {deviation:.1f}"


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
