"""The command line that all device scripts share, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console, errors
from rlkit.apps.benchmarks.devices import common, items
from rlkit.apps.benchmarks.devices.common import Asked, Choice, Family, Prepared, Tools
from rlkit.profiles import standard
from rlkit.profiles.bench import Kind
from rlkit.profiles.devicerun import Row, Run
from rlkit.profiles.timing import milliseconds


def command(family: Family, tools: Tools | None = None) -> Callable[..., None]:
    """The function behind a family's script."""
    world = tools or Tools()

    def main(  # noqa: PLR0913, one parameter per option of the command
        more: Annotated[
            list[Path] | None, typer.Argument(help="Further bundle folders.", metavar="[FOLDER]...")
        ] = None,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="The result file; it is gone on with.")
        ] = None,
        models: Annotated[str | None, typer.Option(help=f"Of {', '.join(standard.MODELS)}.")] = None,
        recipes: Annotated[str, typer.Option(help="With commas between.")] = ",".join(standard.RECIPES),
        contexts: Annotated[str | None, typer.Option(help="Tokens in the cache before decode is timed.")] = None,
        prompt: Annotated[int | None, typer.Option(min=0, help="Prompt tokens (pp), 512; 0 for none.")] = None,
        generate: Annotated[int | None, typer.Option(min=1, help="Tokens to decode (tg), 128.")] = None,
        repeats: Annotated[int | None, typer.Option(min=1, help="Measured rounds of each test.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="The smallest model, two depths, two rounds.")] = False,
        bundles: Annotated[list[Path] | None, typer.Option(help="Bundle folders in place of random weights.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads; left out, what suits the machine.")] = None,
        device: Annotated[str | None, typer.Option(help="Forecast for this device of `rlkit devices`.")] = None,
        python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with the runtime.")] = None,
        software: Annotated[bool, typer.Option("--software", help="WebGPU on a software driver; labelled so.")] = False,
        resume: Annotated[bool, typer.Option(help="Go on with the file, or begin it anew.")] = True,
        keep: Annotated[bool, typer.Option("--keep", help="Keep the bundles that are made.")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
        json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    ) -> None:
        folders = (*(bundles or ()), *(more or ()))
        if more and not bundles:
            raise ValueError(f"{more[0]} is no option; give bundle folders after --bundles")
        if output is None and not dry_run:
            raise ValueError("there is no file for the result; name it with -o FILE.json")
        if software and family.name != "webgpu":
            raise ValueError(f"--software is for webgpu, not for {family.name}; leave it out")
        scale = standard.SOFTWARE if software else standard.QUICK if quick else standard.FULL
        prompt, generate = scale.prompt if prompt is None else prompt, generate or scale.new_tokens
        asked = Asked(
            output=output or Path(f"{family.name}.json"),
            models=_words(models) if models is not None else () if folders else scale.models,
            recipes=_words(recipes),
            tests=standard.tests_of(_contexts(contexts) or scale.contexts, prompt, generate),
            repeats=repeats or scale.repeats,
            bundles=folders,
            threads=threads,
            device=device,
            python=python,
            software=software,
            resume=resume,
            keep=keep,
            dry_run=dry_run,
        )
        prepared = common.prepare(family, asked, world)
        if dry_run:
            _tell_plan(prepared, json=json)
            return
        with console.progress(quiet=json) as tell:
            found = common.run(prepared, world, tell)
        if json:
            console.emit_json(found.to_json())
        else:
            show(found)
            console.say(f"written to {asked.output}; merge such files with: rlkit report FILE... -o report.html")

    main.__doc__ = (
        f"Measure the standard set on {family.title}: prefill, decode at depths, memory, GB/s, forecasts beside.\n\n"
        "What cannot be measured is skipped, and the file says why. A second run measures what is missing."
    )
    return main


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _contexts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--contexts {text!r} is no list of numbers; write them such as 0,1024") from error


def launch(family: Family, arguments: Sequence[str] | None = None, tools: Tools | None = None) -> int:
    """Run a script's command line; errors are one line on standard error, the exit code is returned."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(family, tools))
    name = f"python -m rlkit.apps.benchmarks.devices.{family.name}"
    try:
        code = typer.main.get_command(app).main(words, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        print(f"error: {' '.join(error.format_message().split()).rstrip('.')}; see {name} --help", file=sys.stderr)
        return errors.ExitCode.BAD_INPUT
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error)
    return code if isinstance(code, int) else errors.ExitCode.OK


def _tell_plan(made: Prepared, *, json: bool) -> None:
    if json:
        tests = [_planned(made, choice) for choice in made.choices]
        skips = [{"what": skip.what, "reason": skip.reason} for skip in made.run.skips if made.ready is None]
        console.emit_json({"schema_version": 1, "forecasts": made.promises.said, "tests": tests, "skips": skips})
        return
    rows = [_plan_cells(made, choice) for choice in made.choices]
    if rows:
        console.table(("model", "recipe", "test", "memory, GB", "forecast, ms", ""), rows)
    for skip in made.run.skips if made.ready is None else ():
        console.emit(f"{skip.what}: skipped, {skip.reason}")
    if made.promises.said:
        console.emit(f"- {made.promises.said}")


def _planned(made: Prepared, choice: Choice) -> dict[str, object]:
    state = "kept" if choice.kept else "skip" if choice.reason else "measure"
    about = {"model": choice.item.model, "recipe": choice.item.recipe_name, "test": choice.test.name}
    promise = made.promises.of(choice.item, choice.test)
    needed = items.needs_nbytes(choice.item, made.target, choice.test.room)
    seconds = None if promise is None else promise.seconds
    return {**about, "state": state, "reason": choice.reason, "needs_nbytes": needed, "forecast_seconds": seconds}


def _plan_cells(made: Prepared, choice: Choice) -> tuple[str, ...]:
    promise = made.promises.of(choice.item, choice.test)
    each = "" if promise is None else milliseconds(promise.seconds)
    needed = items.needs_nbytes(choice.item, made.target, choice.test.room)
    state = "measured before" if choice.kept else f"skipped: {choice.reason}" if choice.reason else "will be measured"
    return (choice.item.model, choice.item.recipe_name, choice.test.name, f"{needed / 1e9:.2f}", each, state)


def show(found: Run) -> None:
    """Print a result: rows, then what was skipped."""
    part, host = found.part, found.host
    label = " (software driver: computes on the CPU)" if part.software else ""
    console.emit(f"{part.family}: {part.name}{label}; {host.cpu}, {found.date}")
    columns = ("model", "recipe", "test", "tokens/s", "ms", "p50", "p95", "MB/token", "GB/s", "peak MB", "forecast")
    if found.rows:
        console.table(columns, [_cells(row) for row in found.rows])
        console.emit(
            "ms: to the first token of a prompt (pp), per token (tg). forecast: its time over what was measured."
        )
    for skip in found.skips:
        console.emit(f"skipped {skip.what}: {skip.reason}")
    for line in filter(None, (found.forecasts, *part.notes)):
        console.emit(f"- {line}")


def _cells(row: Row) -> tuple[str, ...]:
    series = row.series
    times = series.ttft if series.test.kind is Kind.PREFILL else series.token_seconds
    assert times is not None  # one of the two is there
    moved, rate, peak = series.nbytes_per_token, series.bytes_per_s, series.peak_nbytes
    return (
        row.model,
        row.recipe,
        series.test.name,
        series.tokens_per_s.text(2 if series.tokens_per_s.mean < 10 else 1),
        *(milliseconds(value) for value in (times.mean, times.p50, times.p95)),
        "" if moved is None else f"{moved / 1e6:.1f}",
        "" if rate is None else f"{rate / 1e9:.1f}",
        "" if peak is None else f"{peak / 1e6:.0f}",
        "" if row.error is None else f"{100 * row.error:+.0f} %",
    )
