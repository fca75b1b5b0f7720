"""The command `report`: result files of several machines as one table and one page."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console
from rlkit.apps.errors import ExitCode
from rlkit.profiles import mergetext
from rlkit.profiles.merge import Source, merge, read
from rlkit.profiles.merged import Merged
from rlkit.profiles.table import markdown
from rlkit.recover.atomic import refuse_existing, write_text

PAGES = (".html", ".htm")


class Format(StrEnum):
    """How the report is printed."""

    TABLE = "table"
    MD = "md"
    JSON = "json"
    CSV = "csv"


def report(
    files: Annotated[list[Path], typer.Argument(help="Result files of the device scripts and of rlkit bench -o.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write a page: FILE.html.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print the report.")] = Format.TABLE,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
) -> None:
    """Merge measurements of several machines: every test a row, every machine a column, forecasts beside.

    A file that cannot be read is named and left out, and the exit code is 2. Of two results of one test on one machine
    the newer is shown. The page needs no network and no script.

    Example: rlkit report cpu.json webgpu.json laptop/bench.json -o report.html
    """
    form = Format.JSON if json else form
    if output is not None:
        if output.suffix.lower() not in PAGES:
            raise ValueError(f"{output} is no name of a page; end it with .html")
        refuse_existing(output, force=force)
    sources, refused = _read(files)
    if not sources:
        raise refused[0]
    lines = [_line(error) for error in refused]
    for line in lines:
        console.say(f"error: {line}")
    merged = merge(sources, [f"left out: {line}" for line in lines])
    if output is not None:
        from rlkit.profiles.mergepage import to_html

        write_text(output, to_html(merged))
        console.say(f"written to {output}")
    _show(merged, form)
    if refused:
        raise typer.Exit(ExitCode.BAD_INPUT)


def _read(files: list[Path]) -> tuple[list[Source], list[ValueError | OSError]]:
    """What could be read, and why the rest could not; a file named twice is read once."""
    sources, refused = [], []
    for path in {path.resolve(): path for path in files}.values():
        try:
            sources.append(read(path))
        except (ValueError, OSError) as error:
            refused.append(error)
    return sources, refused


def _line(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _show(merged: Merged, form: Format) -> None:
    if form is Format.JSON:
        console.emit_json({**merged.to_json(), "findings": list(mergetext.findings(merged))})
        return
    if form is Format.CSV:
        console.emit(mergetext.to_csv(merged).rstrip())
        return
    for drawn in mergetext.tables(merged, narrow=form is Format.TABLE):
        if form is Format.MD:
            note = f"\n\n{drawn.note}" if drawn.note else ""
            console.emit(f"## {drawn.title}\n\n{markdown(drawn)}{note}\n")
            continue
        console.table(drawn.columns, drawn.rows, title=drawn.title)
        if drawn.note:
            console.emit(drawn.note)
    for line in (*mergetext.findings(merged), *merged.notes):
        console.emit(f"- {line}")
