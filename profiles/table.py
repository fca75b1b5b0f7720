"""Tables of text, for a terminal, a page or a README: a title, column names, rows, and what the columns mean."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column names, and rows of text; `note` says what the columns mean. Unknown values are empty cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def markdown(table: Table) -> str:
    """The columns and rows as lines of markdown, without the title."""
    return "\n".join(markdown_row(row) for row in (table.columns, ["---"] * len(table.columns), *table.rows))


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text that stays inside its cell and is not taken for markup."""
    for mark in "\\`*_<>|[]#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated lines ending in a newline; None is an empty field, and no field starts a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_field(cell) for cell in row] for row in rows)
    return out.getvalue()


def _field(cell: object) -> object:
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@"):  # a spreadsheet would compute it
        return f"'{cell}"
    return "" if cell is None else cell
