"""The command `schedule`: policies on a scenario and a device, simulated over seeds, rates, assignments."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console, schedulerun
from rlkit.apps.schedulerun import ALL, Asked, Where
from rlkit.profiles.device import HERE
from rlkit.profiles.scheduling import comparison, explore, vary
from rlkit.profiles.scheduling.comparison import Comparison
from rlkit.profiles.scheduling.explore import Explored, Space
from rlkit.recover.atomic import refuse_existing, write_json, write_text

PAGES = (".html", ".htm")
SEEDS, VALIDATED = 3, "edf"  # unless told
MOST_SEEDS, MOST_WORKERS, MOST_ASSIGNMENTS, MOST_ROUNDS = 10_000, 256, 100_000, 100


def schedule(  # noqa: PLR0913, one parameter per option of the command
    scenario: Annotated[str, typer.Argument(help="A scenario that comes with rlkit, or a .toml file.")],
    device: Annotated[
        str | None, typer.Option(help="DEVICE[@MEMORY], as in rlkit devices; here with --profile, or once calibrated.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option(help="all, five, or names with commas between; all unless told, edf to --validate.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs with different arrivals, the same for every policy; 3, to --validate 1.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds simulated, in place of the scenario's.")] = None,
    rates: Annotated[
        str, typer.Option(help="How many times as often frames and requests come; several are swept: 1,1.25,1.5.")
    ] = "1",
    explored: Annotated[
        bool, typer.Option("--explore", help="Sweep which unit may run which model, and report the best.")
    ] = False,
    assignments: Annotated[int, typer.Option(help="Assignments in the sweep of --explore.")] = 24,
    rounds: Annotated[int, typer.Option(help="Then vary the best ones by a model at a time, so often.")] = 2,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores for long sweeps unless told.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Simulate on Ray: auto, HOST:PORT, ray://HOST:PORT, local.", metavar="ADDRESS")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Costs measured here: a file of rlkit profile-models.")] = None,
    units: Annotated[
        str | None, typer.Option(help="With --profile: NAME=PROVIDER:THREADS, with commas between.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A TOML file of your own devices.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Run it for real on this machine, and compare with the simulation.")
    ] = False,
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="With --validate: [NAME=]FOLDER, the language models; NAME=FILE.onnx for what is no asset."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts: FILE.html.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the first seed's runs for ui.perfetto.dev: FILE.json.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be simulated, and stop.")] = False,
) -> None:
    """Compare scheduling policies on a scenario and a device: missed deadlines, latencies, use of the units.

    Nothing runs but a simulator, unless told to --validate; costs are forecast for the device, or measured with rlkit
    profile-models. What was simulated is kept, so an interrupted sweep goes on.

    Example: rlkit schedule gaming --device hx370 --html gaming.html

    Example: rlkit schedule laptop-call --validate --bundle ./bundle --policies fcfs,edf --seeds 1

    Example: rlkit schedule video-conferencing --device max395 --explore --rates 1,1.5,2 --policies edf,lookahead
    """
    space = Space(
        policies=schedulerun.policies((VALIDATED if validate else ALL) if policies is None else policies),
        seeds=_whole("--seeds", (1 if validate else SEEDS) if seeds is None else seeds, 1, MOST_SEEDS),
        factors=schedulerun.factors(rates),
        most=_whole("--assignments", assignments, 1, MOST_ASSIGNMENTS) if explored else 1,
        rounds=_whole("--rounds", rounds, 0, MOST_ROUNDS) if explored else 0,
    )
    asked = Asked(
        scenario=schedulerun.load(scenario, duration),
        names=space.policies,
        seeds=space.seeds,
        where=Where(device, profile, units, file),
        workers=None if workers is None else _whole("--workers", workers, 1, MOST_WORKERS),
        ray=ray,
    )
    files = _Files(output, html, trace)
    files.check(sweep=space.swept, force=force)
    if bundle and not validate:
        raise ValueError("--bundle names what runs for real; give --validate as well, or a --profile of it")
    if dry_run and validate:
        spent = asked.scenario.duration / 1e9 * len(asked.names) * asked.seeds
        console.emit(f"{asked.scenario.title}: {', '.join(asked.names)} for {spent:g} s, after timing its models")
    elif dry_run:
        _show_plan(asked, space, json=json)
    elif validate:
        _validate(asked, space, bundle or [], files, json=json)
    elif space.swept:
        with console.progress(quiet=json) as tell:
            found = schedulerun.swept(asked, space, tell)
        _finish_sweep(found, files, json=json)
    else:
        with console.progress(quiet=json) as tell:
            made = schedulerun.compared(asked, space.factors[0], tell)
        _finish(asked, made, files, json=json)


class _Files:
    """What is written beside the table."""

    def __init__(self, output: Path | None, html: Path | None, trace: Path | None) -> None:
        self.output, self.html, self.trace = output, html, trace

    def check(self, *, sweep: bool, force: bool) -> None:
        """Refuse names that do not fit, before anything is simulated."""
        if self.html is not None and self.html.suffix.lower() not in PAGES:
            raise ValueError(f"{self.html} is no name of a page; end it with .html")
        if self.trace is not None and sweep:
            raise ValueError("--trace shows single runs; leave away --explore, and give one of --rates")
        for path in filter(None, (self.output, self.html, self.trace)):
            refuse_existing(path, force=force)


def _whole(option: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ValueError(f"{option} {value} is outside {least} to {most:,}")
    return value


def _finish(asked: Asked, made: Comparison, files: _Files, *, json: bool) -> None:
    """Files, then what is printed."""
    if files.output is not None:
        write_json(files.output, made.to_json())
    if files.html is not None:
        from rlkit.profiles.scheduling.page import to_html

        write_text(files.html, to_html(made, list(schedulerun.runs(asked, made.factor))))
    if files.trace is not None:
        from rlkit.profiles.scheduling.traces import together

        write_text(files.trace, jsons.dumps(together(schedulerun.runs(asked, made.factor)), separators=(",", ":")))
    if json:
        console.emit_json(made.to_json())
        return
    for table in comparison.tables(made):
        console.table(table.columns, table.rows, title=table.title)
    console.emit(comparison.overview(made).note)
    _say([*comparison.findings(made), comparison.READING, *made.prepared.notes, *made.prepared.skipped])
    _say_files(files)


def _finish_sweep(found: Explored, files: _Files, *, json: bool) -> None:
    if files.output is not None:
        write_json(files.output, found.to_json())
    if files.html is not None:
        from rlkit.profiles.scheduling.page import sweep_to_html

        write_text(files.html, sweep_to_html(found))
    if json:
        console.emit_json(found.to_json())
        return
    for table in explore.tables(found):
        console.table(table.columns, table.rows, title=table.title)
    _say([*explore.findings(found), comparison.READING, *found.notes])
    _say_files(files)


def _say(lines: list[str]) -> None:
    for line in lines:
        console.emit(f"- {line}")


def _say_files(files: _Files) -> None:
    for name, path in (("result", files.output), ("page", files.html), ("trace for ui.perfetto.dev", files.trace)):
        if path is not None:
            console.say(f"{name}: {path}")


def _show_plan(asked: Asked, space: Space, *, json: bool) -> None:
    """Streams with what their steps take, and how much would be simulated."""
    prepared = asked.prepared(space.factors[0])
    tried = vary.assignments(prepared, space.most)
    runs = space.runs // space.most * len(tried)
    table = comparison.costs(prepared.base)
    if json:
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        names = [each.name for each in tried]
        facts = {"scenario": asked.scenario.name, "duration_s": asked.scenario.duration / 1e9, "runs": runs}
        console.emit_json({"schema_version": 1, **facts, "streams": rows, "assignments": names})
        return
    console.table(table.columns, table.rows, title=f"{table.title}, {asked.scenario.title}")
    console.emit(table.note)
    parts = f"{len(space.policies)} policies x {space.seeds} seeds x {len(space.factors)} rates"
    more = f" x {len(tried)} assignments, then up to {space.rounds} rounds" if space.most > 1 else ""
    console.emit(f"{runs:,} runs of {asked.scenario.duration / 1e9:g} s: {parts}{more}")
    _say([*prepared.notes, *prepared.skipped])


def _validate(asked: Asked, space: Space, bundles: list[str], files: _Files, *, json: bool) -> None:
    """Real execution lives in a module of its own, which brings ONNX sessions."""
    from rlkit.apps import schedulevalidate

    if asked.where.device not in (None, HERE) or space.swept or files.html is not None:
        raise ValueError("--validate runs on this machine: leave away --device, --explore, several --rates and --html")
    schedulevalidate.validate(
        vary.faster(asked.scenario, space.factors[0]),
        asked.names,
        seeds=range(asked.seeds),
        bundles=bundles,
        profile=asked.where.profile,
        units=asked.where.units,
        json=json,
        output=files.output,
        traced=files.trace,
    )
