"""The command `bench`: measure bundles as llama-bench does, or compare two files of results."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles import bench as benchmark
from rlkit.profiles import benchfile, changes, worker
from rlkit.profiles.table import Table, csv_text, markdown
from rlkit.recover.atomic import refuse_existing, write_json


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    MD = "md"
    JSON = "json"
    CSV = "csv"


def bench(  # noqa: PLR0913, one parameter per option of the command
    bundles: Annotated[list[Path] | None, typer.Argument(help="Bundle folders; several are measured in turns.")] = None,
    prompt: Annotated[str, typer.Option(help="Prompt tokens (pp), with commas between; 0 for none.")] = "512",
    generate: Annotated[int, typer.Option(help="Tokens to generate (tg); 0 for none.")] = 128,
    depth: Annotated[str, typer.Option(help="Tokens in the cache beforehand (@ d), such as 0,4096.")] = "0",
    repeats: Annotated[int, typer.Option(help="Measured rounds of each test.")] = 5,
    warmups: Annotated[int, typer.Option(help="Rounds of each test that do not count.")] = benchmark.WARM_UPS,
    threads: Annotated[int | None, typer.Option(help="Threads; left out, what each bundle says.")] = None,
    provider: Annotated[str, typer.Option(help="cpu, cuda, dml, webgpu, openvino or qnn, where there is one.")] = "cpu",
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two result files A and B: print B's speed over A's.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print results.")] = Format.TABLE,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the results to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Measure prompt and generation speed, time to first token and peak memory of bundles, each in its own process.

    pp512: a prompt of 512 tokens up to the first new one. tg128 @ d4096: 128 tokens, one by one, after 4096 others that
    are in the cache already. Prompts are random and new in every round.

    Example: rlkit bench bundles/w4 bundles/w4w2-gateup --depth 0,4096 -o bench.json

    Example: rlkit bench --compare before.json after.json
    """
    form = Format.JSON if json else form
    if compare is not None:
        if bundles:
            raise ValueError(f"--compare reads two files and measures nothing; leave out {bundles[0]}")
        _compare(*compare, form)
        return
    tests = benchmark.standard(_numbers("--prompt", prompt), generate, _numbers("--depth", depth))
    plan = benchmark.Plan(tests, repeats, warmups)
    if output is not None:
        refuse_existing(output, force=force)
    with console.progress(quiet=form is Format.JSON) as tell:
        found = worker.measure_bundles(bundles or [], plan, worker.Setting(provider, threads), tell)
    result = benchfile.result_of(found, bundles or [], plan)
    if output is not None:
        write_json(output, result.to_json())
    _show(result, form)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is no list of numbers; write them such as 0,4096") from error


def _show(result: benchfile.Result, form: Format) -> None:
    if form is Format.JSON:
        console.emit_json(result.to_json())
    elif form is Format.CSV:
        console.emit(benchfile.to_csv(result).rstrip())
    else:
        for drawn in (benchfile.table(result),) if form is Format.MD else benchfile.tables(result):
            _print(drawn, form)
        for line in benchfile.notes(result):
            console.emit(f"- {line}")


def _compare(first: Path, second: Path, form: Format) -> None:
    a, b = benchfile.read_result(first), benchfile.read_result(second)
    found, others = changes.compare(a, b), list(changes.differences(a, b))
    if form is Format.JSON:
        rows: list[dict[str, Any]] = [change.to_json() for change in found]
        console.emit_json({"schema_version": changes.SCHEMA_VERSION, "changes": rows, "differences": others})
    elif form is Format.CSV:
        drawn = changes.change_table(found)
        console.emit(csv_text(drawn.columns, drawn.rows).rstrip())
    else:
        _print(changes.change_table(found), form)
        for line in others:
            console.emit(f"- {line}")


def _print(drawn: Table, form: Format) -> None:
    if form is Format.MD:
        console.emit(f"{markdown(drawn)}\n\n{drawn.title}. {drawn.note}\n")
        return
    console.table(drawn.columns, drawn.rows, title=drawn.title)
    if drawn.note:
        console.emit(drawn.note)
