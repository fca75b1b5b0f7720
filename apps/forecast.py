"""The command `forecast`: what a model's architecture promises on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles import charts, here, places, sweeps
from rlkit.profiles.account import Cost, Model
from rlkit.profiles.architecture import Architecture, read_architecture
from rlkit.profiles.device import HERE, Device, find, load
from rlkit.profiles.forecast import FORMULAS, Adapters, Forecast, Peaks, Phase, Workload, forecast_model
from rlkit.profiles.machine import measure_machine
from rlkit.profiles.places import Place
from rlkit.profiles.render import TIMING_COLUMNS, timing_cells
from rlkit.profiles.table import Table
from rlkit.profiles.timing import milliseconds
from rlkit.recover import recipe as recipes
from rlkit.recover import source
from rlkit.recover.atomic import write_json

DEFAULT_RECIPE, NO_RECIPE = "w4w2-gateup", "none"
BUSY = 0.3  # a median this far below the best trial means that something else was running
NAMES = {"roofline": "roofline", "life": "LIFE", "baseline": "bytes/bandwidth"}


def forecast(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A model: asset name, hub id, folder, config.json or .gguf file.")],
    device: Annotated[str | None, typer.Option(help="DEVICE[@MEMORY][:UNIT]; default: this machine.")] = None,
    prefill_device: Annotated[str | None, typer.Option(help="Another unit of it that reads the prompt.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A named recipe, a TOML file, or none for floats; default: the model's own.")
    ] = None,
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after the prompt.")] = 128,
    chunk: Annotated[int | None, typer.Option(help="Read the prompt in chunks of so many tokens.")] = None,
    kv: Annotated[str | None, typer.Option(help="Type of the KV cache: fp32, fp16, int8, int4.")] = None,
    adapters: Annotated[int | None, typer.Option(help="Rank of LoRA branches beside every linear.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    eager: Annotated[bool, typer.Option("--eager", help="Nothing is joined, every score is stored.")] = False,
    sweep: Annotated[str | None, typer.Option(help="contexts, chunks, recipes, or several with commas.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart: FILE.png, .svg or .html.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Read bandwidth in GB/s, in place of a device.")] = None,
    gflops: Annotated[float | None, typer.Option(help="Compute peak in GFLOP/s, in place of a device.")] = None,
    file: Annotated[Path | None, typer.Option(help="A TOML file of your own devices.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Forecast time to first token, tokens/s, memory and energy from a model's configuration: no weights, no run.

    Without --device this machine is meant: as `rlkit calibrate` left it, else with peaks measured now. --sweep writes
    forecast-AXES.json and .png unless -o and --plot name others.

    Example: rlkit forecast Qwen3-4B/config.json --device hx370:igpu --recipe w4w2-gateup --context 2048
    """
    axes = sweeps.axes_of(sweep) if sweep is not None else ()
    if plot is not None:
        charts.check_path(plot)
    work = Workload(context, new_tokens, chunk=chunk, batch=batch)
    asked = _Asked(model, recipe, None if adapters is None else Adapters(adapters))
    architecture = asked.architecture()
    made_of = _Devices(device, prefill_device, file, bandwidth, gflops)
    decode, prefill = (place and place.having(cache=kv, eager=eager) for place in made_of.places(quiet=json))
    assert decode is not None
    prepare = _Preparing(architecture, decode, prefill, asked.branches)
    if axes:
        found = _swept(axes, asked, prepare, work)
        _finish_sweep(found, axes, prepare, work, output=output, plot=plot, json=json)
        return
    prepared = prepare.of(asked.recipe())
    made = forecast_model(prepared.decode, work, prefill=prepared.prefill)
    table = {"reference": model, "architecture": architecture.to_json(), **made.to_json()}
    if output is not None:
        write_json(output, table)
    if plot is not None:
        drawn: dict[str, charts.Draw] = {charts.describe_roofline(made): lambda: charts.draw_roofline(made)}
        charts.save(plot, f"{made.model} as {made.recipe}", drawn, _tables(made))
    if json:
        console.emit_json(table)
    else:
        _show(architecture, made)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The model and how it is stored, as the command line names them."""

    model: str
    named: str | None
    branches: Adapters | None

    def architecture(self) -> Architecture:
        return read_architecture(self.model)

    def recipe(self) -> recipes.Recipe | None:
        """The recipe asked for; else the one that made the checkpoint or bundle; else the default."""
        if self.named is not None:
            return None if self.named == NO_RECIPE else recipes.load(self.named)
        path = Path(self.model).expanduser()
        if not path.is_file():
            where = source.resolve(self.model)
            own = where.path / "recipe.toml"
            if where.kind in (source.SourceKind.CHECKPOINT, source.SourceKind.BUNDLE) and own.is_file():
                return recipes.load(own)
        return recipes.load(DEFAULT_RECIPE)


@dataclass(frozen=True, slots=True)
class _Devices:
    """Where it runs, as the command line names it."""

    device: str | None
    prefill: str | None
    file: Path | None
    bandwidth: float | None
    gflops: float | None

    def places(self, *, quiet: bool) -> tuple[Place, Place | None]:
        """Where it decodes, and where it reads prompts if that is elsewhere."""
        given = self.bandwidth is not None or self.gflops is not None
        if given and (self.device or self.prefill):
            raise ValueError("--bandwidth and --gflops take the place of --device; give one or the other")
        if given:
            return _given(self.bandwidth, self.gflops, quiet=quiet), None
        known = load(self.file)
        name = self.device or (HERE if HERE in known else None)
        if name is None and self.prefill is None:
            return _measured(quiet=quiet), None
        if name is None:
            raise ValueError("--prefill-device needs --device too, the unit that decodes")
        return _place(name, known), None if self.prefill is None else _place(self.prefill, known)


def _place(name: str, known: Mapping[str, Device]) -> Place:
    """A unit by name; of this machine with the table of its calibration."""
    device, unit = find(name, known)
    return places.of_unit(device, unit, here.load_table() if device.name == HERE and unit.name == "cpu" else None)


@dataclass(frozen=True, slots=True)
class _Preparing:
    """What a recipe makes of the model at its places."""

    architecture: Architecture
    decode: Place
    prefill: Place | None
    branches: Adapters | None

    def of(self, recipe: recipes.Recipe | None) -> sweeps.Prepared:
        def at(place: Place) -> Model:
            return Model(self.architecture, recipe, place, self.branches)

        return sweeps.Prepared(at(self.decode), None if self.prefill is None else at(self.prefill))


def _measured(*, quiet: bool) -> Place:
    if not quiet:
        console.say(
            "measuring this machine's read bandwidth and float32 speed (about 4 s); `rlkit calibrate` keeps more"
        )
    machine = measure_machine()
    if not quiet and max(machine.read_spread, machine.flops_spread) > BUSY:
        console.say("the machine was busy meanwhile, so these peaks may be too low; repeat on a quiet machine")
    return places.of_machine(machine)


def _given(bandwidth: float | None, gflops: float | None, *, quiet: bool) -> Place:
    """Rates of the command line; what is left out is measured."""
    if bandwidth is not None and gflops is not None:
        return places.of_rates(Peaks(1e9 * bandwidth, 1e9 * gflops, source="given on the command line"))
    peaks = _measured(quiet=quiet).rates
    assert isinstance(peaks, Peaks)
    bytes_per_s = peaks.bytes_per_s if bandwidth is None else 1e9 * bandwidth
    flops_per_s = peaks.flops_per_s if gflops is None else 1e9 * gflops
    return places.of_rates(Peaks(bytes_per_s, flops_per_s, source=f"partly given, else {peaks.source}"))


def _swept(axes: tuple[str, ...], asked: _Asked, prepare: _Preparing, work: Workload) -> sweeps.Sweep:
    chosen: list[recipes.Recipe | None] = [asked.recipe()]
    if "recipes" in axes:
        chosen = [recipes.load(name) for name in recipes.NAMED]
        chosen += [asked.recipe()] if asked.named not in (None, *recipes.NAMED) else []
    models = {NO_RECIPE if recipe is None else recipe.name: prepare.of(recipe) for recipe in chosen}
    first = next(iter(models.values())).decode
    contexts = sweeps.contexts_of(first, work.new_tokens) if "contexts" in axes else None
    chunks = sweeps.chunks_of(work.prompt_tokens) if "chunks" in axes else None
    return sweeps.sweep(models, work, contexts=contexts, chunks=chunks)


def _finish_sweep(
    found: sweeps.Sweep,
    axes: tuple[str, ...],
    prepare: _Preparing,
    work: Workload,
    *,
    output: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Write a sweep's files and show it; --json alone writes none."""
    if all(point.refused for point in found.points):
        raise ValueError(found.points[0].refused)
    stem = f"forecast-{'-'.join(axes)}"
    write_json(output or Path(f"{stem}.json"), found.to_json()) if output or not json else None
    rows = tuple(_point_cells(point) for point in found.points)
    table = Table(f"{found.model} at {found.decode_place}, {found.label}", POINT_COLUMNS, rows)
    if plot or not json:
        drawn: dict[str, charts.Draw] = {charts.describe_sweep(found): lambda: charts.draw_sweep(found)}
        charts.save(plot or Path(f"{stem}.png"), table.title, drawn, [table])
    if json:
        console.emit_json(found.to_json())
        return
    console.table(table.columns, table.rows, title=table.title)
    console.say(f"written: {output or f'{stem}.json'}, {plot or f'{stem}.png'}")


POINT_COLUMNS = (
    "recipe",
    "context",
    "chunk",
    "first token, s",
    "per token, ms",
    "tokens/s",
    "MB/token",
    "memory, GB",
    "",
)


def _point_cells(point: sweeps.Point) -> tuple[str, ...]:
    head = (point.recipe, f"{point.context:,}", "" if point.chunk is None else str(point.chunk))
    if point.ttft_seconds is None or point.tpot_seconds is None:
        return (*head, "", "", "", "", "", point.refused)
    moved, memory = (point.nbytes_per_token or 0) / 1e6, (point.memory_nbytes or 0) / 1e9
    times = f"{point.ttft_seconds:.3g}", milliseconds(point.tpot_seconds), f"{point.tokens_per_s:.1f}"
    return (*head, *times, f"{moved:.0f}", f"{memory:.2f}", "")


def _show(architecture: Architecture, made: Forecast) -> None:
    work = made.workload
    sizes = f"{architecture.parameters / 1e9:.3f} billion parameters, {made.memory.weights_nbytes / 1e6:.0f} MB"
    console.emit(
        f"{made.model}: {sizes} as {made.recipe}; {work.prompt_tokens} prompt and {work.new_tokens} new tokens"
    )
    for table in _tables(made):
        console.table(table.columns, table.rows, title=table.title)
    for line in _conclusions(made):
        console.emit(line)
    for name, said in FORMULAS.items():
        console.emit(f"- {NAMES[name]}: {said}")
    for line in made.assumptions:
        console.emit(f"- {line}")


def _tables(made: Forecast) -> list[Table]:
    work = made.workload
    chunks = "" if work.chunk is None else f" in chunks of {work.chunk}"
    titles = {f"prefill{chunks}": made.prefill, f"one token after {work.prompt_tokens}": made.decode}
    columns = ("GFLOP", "MB", "ms", "share", "bound")
    tables = [
        Table(f"{title}: {phase.place.name}, {phase.place.rates.label}", ("operator", *columns), _rows(phase))
        for title, phase in titles.items()
    ]
    rows = tuple((NAMES[name], *timing_cells(getattr(made, name))) for name in NAMES)
    return [*tables, Table("both formulas and the baseline", ("formula", *TIMING_COLUMNS), rows)]


def _rows(phase: Phase) -> tuple[tuple[str, ...], ...]:
    """One row per name of operator, and their sum."""
    whole = sum(cost.seconds for cost in phase.costs)
    both = sum(cost.flops for cost in phase.costs), sum(cost.nbytes for cost in phase.costs)
    return tuple(_cost_cells(cost, whole) for cost in (*phase.costs, Cost("all", *both, whole, "")))


def _cost_cells(cost: Cost, whole: float) -> tuple[str, ...]:
    amounts = f"{cost.flops / 1e9:.3f}", f"{cost.nbytes / 1e6:.2f}", f"{1e3 * cost.seconds:.3f}"
    return (cost.name, *amounts, f"{100 * cost.seconds / whole:.1f} %", cost.bound)


def _conclusions(made: Forecast) -> list[str]:
    """Depth, band, memory and energy in sentences."""
    work, roofline = made.workload, made.roofline
    each = f" for {work.batch} sequences together" if work.batch > 1 else ""
    (low, high), (soon, late) = made.interval("tpot"), made.interval("ttft")
    lines = [
        f"{made.label}, roofline: {made.tokens_per_s:.1f} tokens/s{each} at depth {work.prompt_tokens}",
        f"expected: first token in {milliseconds(soon)} to {milliseconds(late)} ms, {milliseconds(low)} to "
        f"{milliseconds(high)} ms per token ({made.band.basis})",
    ]
    memory, place = made.memory, roofline and made.decode.place.name
    if memory.limit_nbytes is None:
        fits = f"how much {place} has is not known; name it as in --device NAME@32GB"
    else:
        fits = f"fits into {memory.limit_nbytes / 1e9:.2f} GB"
    lines.append(f"memory: {memory.text}; {fits}")
    joules: Any = made.energy
    parts = [
        f"{value:.3g} J {what}"
        for value, what in ((joules.prefill_joules, "for the prompt"), (joules.step_joules, "per token"))
        if value is not None
    ]
    lines.append(f"energy: {', '.join(parts) or 'not known'} ({joules.basis})")
    return lines
