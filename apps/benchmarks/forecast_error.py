"""How far forecasts of a calibrated machine are from what it does: TPOT at depths and TTFT, over shapes and recipes.

    rlkit calibrate
    python -m rlkit.apps.benchmarks.forecast_error -o ./bench-forecast --shapes qwen3-0.6b,qwen3-4b

Models have random weights of the named shapes (smollm2-135m is the real one's shape), so only a tokenizer of bytes is
needed. Calibration times single operators and has seen none of these models: every row is a shape left out. Beside the
calibrated forecast stands the baseline it has to beat, bytes over bandwidth. What is timed counts as it does when
calibrating: the median of the faster half, since other work only ever makes a machine slower. A row that was measured
is kept in the output folder: an interrupted run goes on.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.apps.benchmarks.devices.items import plain
from rlkit.profiles import bench, device, here, places, worker
from rlkit.profiles.forecast import Workload, forecast
from rlkit.profiles.machine import measure_machine
from rlkit.profiles.operators import Adapters
from rlkit.profiles.standard import MODELS
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell
from rlkit.recover.source import ModelShape, read_json
from rlkit.runtime.probe import Trials

RECIPES = ("w8", "w4", "w4w2-gateup")
PROMPT, NEW = 512, 32
TPOT_BAR, TTFT_BAR, WORST_BAR = 0.10, 0.15, 0.30  # medians of the absolute error, and of any


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the models and results.")] = Path(
        "bench-forecast"
    ),
    shapes: Annotated[
        str, typer.Option(help="smollm2-135m, qwen3-0.6b, qwen3-1.7b, qwen3-4b, with commas between.")
    ] = ("smollm2-135m,qwen3-0.6b"),
    asked: Annotated[str, typer.Option("--recipes", help="With commas between.")] = ",".join(RECIPES),
    depths: Annotated[str, typer.Option(help="Tokens in the cache before those that are timed.")] = "0,1024,4096",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of every test.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure random models and set the forecasts of the device `here` beside it."""
    table = here.load_table()
    if table is None:
        raise typer.BadParameter("this machine is not calibrated; run `rlkit calibrate` first")
    place = places.of_unit(*device.find("here:cpu"), table)
    wanted = [int(depth) for depth in depths.split(",")]
    rows: list[dict[str, Any]] = []
    with console.progress(quiet=json) as tell:
        for shape in shapes.split(","):
            for recipe in asked.split(","):
                rows += _rows(shape, recipe, place, wanted, repeats, out, tell)
    found = {"schema_version": 1, "machine": measure_machine().to_json(), "rows": rows, **summary(rows)}
    write_json(out / "forecast-error.json", found)
    if json:
        console.emit_json(found)
        return
    _show(found)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and the worst of the absolute errors, of forecasts and of the baseline, by what was timed."""
    found: dict[str, Any] = {}
    for kind in ("tpot", "ttft"):
        part = [row for row in rows if row["kind"] == kind]
        for name in ("error", "baseline_error"):
            errors = [abs(row[name]) for row in part]
            if errors:
                found[f"{kind}_{name}"] = {
                    "median": statistics.median(errors),
                    "worst": max(errors),
                    "rows": len(errors),
                }
    return found


def shape_named(name: str) -> ModelShape:
    """A shape by name; ValueError naming them."""
    if name not in MODELS:
        raise ValueError(f"no shape {name!r}; use {', '.join(MODELS)}")
    return MODELS[name]


def _rows(
    shape: str, recipe: str, place: places.Place, depths: list[int], repeats: int, out: Path, tell: Tell
) -> list[dict[str, Any]]:
    kept = out / "measured" / f"{shape}-{recipe}.json"
    if not kept.is_file():
        write_json(kept, {"series": _measured(shape, recipe, depths, repeats, out, tell)})
    model, chosen = shape_named(shape), plain(recipe)
    rows = []
    for series in read_json(kept)["series"]:
        kind, depth, seconds = series["kind"], series["depth"], series["seconds"]
        workload = Workload(PROMPT, 1) if kind == "ttft" else Workload(max(depth, 1), NEW)
        made = forecast(model, chosen, place, workload, adapters=Adapters(0))
        said = {name: getattr(getattr(made, name), f"{kind}_seconds") for name in ("roofline", "baseline")}
        if kind == "ttft":  # the clock starts when there is a generator; a forecast counts the making of one
            said["roofline"] -= place.rates.fitted(0.0, model.vocab, model.layers).prompt_seconds
        errors = {"error": said["roofline"] / seconds - 1, "baseline_error": said["baseline"] / seconds - 1}
        about = {"shape": shape, "recipe": recipe, "kind": kind, "depth": depth, "measured_seconds": seconds}
        rows.append({**about, "forecast_seconds": said["roofline"], **errors})
    return rows


def _measured(shape: str, recipe: str, depths: list[int], repeats: int, out: Path, tell: Tell) -> list[dict[str, Any]]:
    """Seconds of a prompt of PROMPT tokens, and of a token at every depth that the context allows."""
    from rlkit.export.build import export_bundle
    from rlkit.recover.standin import write_packed

    model, folder = shape_named(shape), out / f"{shape}-{recipe}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        export_bundle(write_packed(model, plain(recipe), folder / "checkpoint"), folder / "bundle", tell=tell)
        cases = [bench.Case(bench.Kind.PREFILL, PROMPT, 0)]
        cases += [bench.Case(bench.Kind.DECODE, NEW, depth) for depth in depths if depth + NEW < model.max_context]
        plan = bench.Plan(tuple(cases), repeats, 1)
        (measured,) = worker.measure_bundles([folder / "bundle"], plan, worker.Setting(), tell)
        return [_series(series) for series in measured.series]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _series(series: bench.Series) -> dict[str, Any]:
    """What was timed, as calibration counts: the median of the faster half, every token as one, beside that of all."""
    kind = "ttft" if series.test.kind is bench.Kind.PREFILL else "tpot"
    taken = Trials.of([second for seconds in series.rounds for second in seconds])
    return {"kind": kind, "depth": series.test.depth, "seconds": taken.seconds, "median_seconds": taken.median}


def _show(found: dict[str, Any]) -> None:
    cells = [
        (
            row["shape"],
            row["recipe"],
            row["kind"].upper() + (f" @ d{row['depth']}" if row["kind"] == "tpot" else f" {PROMPT}"),
            f"{1e3 * row['measured_seconds']:.2f}",
            f"{1e3 * row['forecast_seconds']:.2f}",
            f"{100 * row['error']:+.0f} %",
            f"{100 * row['baseline_error']:+.0f} %",
        )
        for row in found["rows"]
    ]
    columns = ("shape", "recipe", "test", "measured, ms", "forecast, ms", "error", "bytes/bandwidth")
    console.table(columns, cells, title="forecast of the calibrated machine")
    shapes = dict.fromkeys(row["shape"] for row in found["rows"])
    parts = [_shape_cells(shape, summary([row for row in found["rows"] if row["shape"] == shape])) for shape in shapes]
    heads = ("shape", "TPOT: median, worst", "bytes/bandwidth", "TTFT: median, worst", "bytes/bandwidth")
    console.table(heads, parts, title="absolute errors by shape, none of which calibration has seen")
    for kind, bar in (("tpot", TPOT_BAR), ("ttft", TTFT_BAR)):
        if f"{kind}_error" in found:
            ours, theirs = found[f"{kind}_error"], found[f"{kind}_baseline_error"]
            words = f"{kind.upper()}: median error {100 * ours['median']:.0f} % (bar {100 * bar:.0f} %), worst "
            words += f"{100 * ours['worst']:.0f} % (bar {100 * WORST_BAR:.0f} %); bytes over bandwidth "
            console.emit(words + f"{100 * theirs['median']:.0f} % and {100 * theirs['worst']:.0f} %")


def _shape_cells(shape: str, found: dict[str, Any]) -> tuple[str, ...]:
    cells = [shape]
    for kind in ("tpot", "ttft"):
        ours, theirs = found.get(f"{kind}_error"), found.get(f"{kind}_baseline_error")
        both = "" if ours is None else f"{100 * ours['median']:.0f} %, {100 * ours['worst']:.0f} %"
        cells += [both, "" if theirs is None else f"{100 * theirs['median']:.0f} %"]
    return tuple(cells)


if __name__ == "__main__":
    typer.run(main)
