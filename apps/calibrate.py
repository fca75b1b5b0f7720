"""The command `calibrate`: measure this machine for forecasts, and keep what was found as the device `here`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles import calibrate as calibration
from rlkit.profiles import here
from rlkit.profiles.efficiency import Table, attention_work, product_nbytes

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def calibrate(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes: half the time, somewhat less exact.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; left out, all this process may use.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin nothing new after this time.")] = calibration.SECONDS,
    out: Annotated[Path | None, typer.Option(help="Write this device file (.toml) and not this machine's own.")] = None,
    json: Json = False,
) -> None:
    """Measure this machine so that forecasts can be trusted: about two minutes, best while nothing else runs.

    Single operators are timed, no model: reading from memory, products in 2, 4, 8 and 32 bits, attention at depths,
    norms, what starting an operator and each token costs. Forecasts for the device `here` interpolate between them.

    Example: rlkit calibrate && rlkit forecast Qwen/Qwen3-4B --device here
    """
    if out is not None and out.suffix != ".toml":
        raise ValueError(f"{out} is no name of a device file; end it in .toml")
    with console.progress(quiet=json) as tell:
        plan = calibration.QUICK if quick else calibration.FULL
        made = calibration.calibrate(threads, plan=plan, seconds=seconds, tell=tell)
    path = here.save(made, out)
    if made.busy:
        spread = f"trials spread by {100 * made.spread:.0f} %"
        console.say(f"something else was running ({spread}): calibrate again on a quiet machine")
    if made.skipped:
        console.say(f"{made.skipped} measurements did not fit into {seconds:.0f} s; give more with --seconds")
    if json:
        console.emit_json(summary(made, path))
        return
    _show(made, path)


def summary(made: calibration.Calibration, path: Path) -> dict[str, Any]:
    """The result as plain JSON values."""
    return {
        "schema_version": 1,
        "file": str(path),
        "seconds": made.seconds,
        "spread": made.spread,
        "busy": made.busy,
        "skipped": made.skipped,
        **made.table.to_json(),
    }


def _show(made: calibration.Calibration, path: Path) -> None:
    table = made.table
    peaks = table.peaks
    reads = ", ".join(f"{rate / 1e9:.1f} GB/s with {number}" for number, rate in sorted(made.reads.items()))
    console.emit(f"{table.facts['cpu']}: reads {reads} threads; floats {peaks.flops_per_s / 1e9:.0f} GFLOP/s")
    starts = f"starting an operator {1e6 * peaks.dispatch_seconds:.2f} us"
    loop = f"each token {1e6 * table.token_seconds(131072, 28):.0f} us beside a model of 28 layers"
    console.emit(f"{starts}; {loop}, a reply {1e3 * table.prompt_seconds(131072, 28):.1f} ms")
    columns = ("product 2048 x 2048", "one token, us", "GB/s", "512 tokens, ms", "GFLOP/s")
    console.table(columns, [product_row(table, *form) for form in table.formats()])
    figures = ("attention, 16 heads on 4 of 128", "us", "GFLOP/s", "GB/s of cache")
    console.table(figures, [attention_row(table, *sizes) for sizes in ((1, 256), (1, 4096), (512, 0))])
    console.emit(f"spread of trials {100 * made.spread:.1f} %, {console.duration(made.seconds)}; written to {path}")


def product_row(table: Table, bits: int, block: int) -> tuple[str, ...]:
    """One token and a prompt through a matrix of 2048 x 2048."""
    n = k = 2048
    one, many = (table.seconds("linear", bits, block, tokens, n, k) for tokens in (1, 512))
    rates = product_nbytes(bits, block, n, k) / one / 1e9, 2.0 * 512 * n * k / many / 1e9
    name = f"{bits}-bit, blocks of {block}" if block else f"{bits}-bit floats"
    return (name, f"{1e6 * one:.1f}", f"{rates[0]:.1f}", f"{1e3 * many:.2f}", f"{rates[1]:.0f}")


def attention_row(table: Table, tokens: int, past: int) -> tuple[str, ...]:
    """New tokens after cached ones."""
    heads = (16, 4, 128)
    seconds = table.attention_seconds(tokens, past, *heads)
    nbytes, flops = attention_work(tokens, past, *heads)
    name = f"{tokens} tokens after {past}"
    return (name, f"{1e6 * seconds:.1f}", f"{flops / seconds / 1e9:.1f}", f"{nbytes / seconds / 1e9:.1f}")
