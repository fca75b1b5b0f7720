"""The command `compare`: what a bundle does on this machine beside what was forecast, or two stored files of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.apps.measure import Format
from rlkit.profiles import bench, charts, gapchart, gaps, here, places, stored, worker
from rlkit.profiles.compare import Comparison, Where, compare_step, findings
from rlkit.profiles.device import HERE, find, load
from rlkit.profiles.machine import measure_machine
from rlkit.profiles.opprofile import profile_bundle
from rlkit.profiles.places import Place
from rlkit.profiles.stated import Stated, read_stated
from rlkit.profiles.table import Table, markdown
from rlkit.recover.atomic import refuse_existing, write_json
from rlkit.recover.progress import Progress, Tell

ROUNDS = 3  # of genai's time, each as long as the steps that are profiled
PROMPTS = 4  # a prompt is profiled so many times less often than a token


def compare(  # noqa: PLR0913, one parameter per option of the command
    paths: Annotated[list[Path], typer.Argument(help="A bundle; or a stored forecast and a result of rlkit bench.")],
    device: Annotated[
        str | None, typer.Option(help="Whose forecast; default: this machine, calibrated or with peaks measured now.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt; 0 for none.")] = 512,
    depth: Annotated[str, typer.Option(help="Tokens before the one that is decoded, with commas between.")] = "0,1024",
    steps: Annotated[int, typer.Option(help="Steps of each kind that are measured.")] = 12,
    threads: Annotated[int | None, typer.Option(help="Threads; left out, what the bundle says.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print results.")] = Format.TABLE,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a chart: FILE.html, .svg or .png.")] = None,
) -> None:
    """Run a bundle and put what every class of operators takes beside what was forecast; name the largest gap.

    Kernels are timed by onnxruntime's profiler, whole steps without it, and generation by genai, so that what the loop
    adds is seen apart. `rlkit calibrate` first makes the forecast one of this machine's kernels.

    Example: rlkit compare bundles/w4w2-gateup --depth 0,1024,4096 --plot gaps.html

    Example: rlkit compare forecast.json bench.json
    """
    form = Format.JSON if json else form
    if output is not None:
        refuse_existing(output, force=force)
    if plot is not None:
        charts.check_path(plot)
    if len(paths) == 2:
        if plot is not None:
            raise ValueError(f"two files hold no operators to draw; leave out --plot {plot}, or compare a bundle")
        _stored(paths[0], paths[1], form, output)
        return
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} paths are given; name one bundle, or a stored forecast and a result of bench")
    asked = _Asked(paths[0], prompt, _numbers(depth), steps, threads)
    _finish(asked.run(device, quiet=form is Format.JSON), form, output, plot)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--depth {text!r} is no list of numbers; write them such as 0,4096") from error


class _Asked:
    """A bundle and the steps to compare, as the command line names them."""

    def __init__(self, bundle: Path, prompt: int, depths: Sequence[int], steps: int, threads: int | None) -> None:
        if steps < 1:
            raise ValueError(f"--steps {steps} measures nothing; use at least 1")
        if prompt < 0 or min(depths) < 0:
            raise ValueError(f"--prompt {prompt} and --depth {min(depths)}: neither may be negative")
        prompts = [bench.Case(bench.Kind.PREFILL, prompt)] if prompt else []
        self.cases = (*prompts, *(bench.Case(bench.Kind.DECODE, steps, depth) for depth in depths))
        self.bundle, self.steps, self.threads = bundle, steps, threads

    def run(self, device: str | None, *, quiet: bool) -> Comparison:
        """Read the bundle, time it, forecast it."""
        stated = read_stated(self.bundle)
        place, where = _place(device, quiet=quiet)
        with console.progress(quiet=quiet) as tell:
            return self._compared(stated, place, where, tell)

    def _compared(self, stated: Stated, place: Place, where: Where, tell: Tell) -> Comparison:
        plan, model = bench.Plan(self.cases, ROUNDS), stated.model_at(place)
        (timed,) = worker.measure_bundles([self.bundle], plan, worker.Setting(threads=self.threads), tell)
        found = []
        for done, series in enumerate(timed.series):
            tell(Progress("profile", done, len(self.cases), series.test.name))
            decodes = series.test.kind is bench.Kind.DECODE
            size = (1, series.test.depth) if decodes else (series.test.tokens, 0)
            steps = self.steps if decodes else -(-self.steps // PROMPTS)
            profile = profile_bundle(self.bundle, *size, timed.threads or self.threads, steps)
            taken = series.token_seconds or series.ttft
            seconds = None if taken is None else taken.p50
            found.append(compare_step(model, profile, seconds, all_logits=stated.all_logits))
        tell(Progress("profile", len(self.cases), len(self.cases)))
        return Comparison(
            bundle=stated.name,
            recipe=stated.recipe,
            where=where,
            threads=timed.threads or 0,
            steps=self.steps,
            compared=tuple(found),
            generator_seconds=model.rates.prompt_seconds,
            assumptions=model.rates.assumptions(),
        )


def _place(name: str | None, *, quiet: bool) -> tuple[Place, Where]:
    """The CPU to forecast, by default this machine's."""
    known = load()
    table = None
    if name is None and HERE not in known:
        if not quiet:
            console.say("measuring this machine's peaks (about 4 s); `rlkit calibrate` makes forecasts of its kernels")
        place = places.of_machine(measure_machine())
    else:
        device, unit = find(name or f"{HERE}:cpu", known)
        if unit.name != "cpu":
            raise ValueError(f"{device.name}:{unit.name} cannot be measured here, the CPU can; name {device.name}:cpu")
        table = here.load_table() if device.name == HERE else None
        place = places.of_unit(device, unit, table)
    rates = place.rates
    peak = max(rates.roofs.values())
    where = Where(place.name, rates.label, rates.bytes_per_s, peak, None if table is None else table.peaks.threads)
    return place, where


def _finish(found: Comparison, form: Format, output: Path | None, plot: Path | None) -> None:
    drawn = gaps.tables(found)
    if output is not None:
        write_json(output, found.to_json())
    if plot is not None:
        pictures: dict[str, charts.Draw] = {gapchart.describe(found): lambda: gapchart.draw_gaps(found)}
        charts.save(plot, f"{found.bundle}: forecast and measurement", pictures, drawn)
    if form is Format.JSON:
        console.emit_json(found.to_json())
    elif form is Format.CSV:
        console.emit(gaps.to_csv(found).rstrip())
    else:
        _print(drawn, (*findings(found), *found.assumptions), form)


def _print(drawn: Sequence[Table], lines: Sequence[str], form: Format) -> None:
    for table in drawn:
        if form is Format.MD:
            console.emit(f"{table.title}\n\n{markdown(table)}\n")
        else:
            console.table(table.columns, table.rows, title=table.title)
    for note in dict.fromkeys(table.note for table in drawn if table.note):
        console.emit(note)
    for line in lines:
        console.emit(f"- {line}")


def _stored(first: Path, second: Path, form: Format, output: Path | None) -> None:
    """A stored forecast beside a stored measurement, in either order."""
    found = stored.compare_files(first, second)
    table: dict[str, Any] = found.to_json()
    if output is not None:
        write_json(output, table)
    if form is Format.JSON:
        console.emit_json(table)
    elif form is Format.CSV:
        console.emit(stored.to_csv(found).rstrip())
    else:
        _print((stored.table(found),), found.notes, form)
