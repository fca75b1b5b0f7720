"""Reading tables of a TOML file key by key, so that every fault is one line that names the file and the key."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MOST_NBYTES = 1 << 20  # files read here are hundreds of times smaller


def parse(text: str, where: str) -> Table:
    """The top table of TOML text; ValueError naming `where` if it is none."""
    try:
        return Table(tomllib.loads(text), where)
    except (ValueError, RecursionError) as error:  # also integers of more digits than Python reads
        said = " ".join(str(error).split())
        raise ValueError(f"{where} is not valid TOML: {said}; see docs/scenarios.md for its form") from error


def read(path: Path, what: str) -> Table:
    """The top table of a TOML file; `what` names the kind of file in errors.

    Raises FileNotFoundError, or ValueError for what is too large or no TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} {path}; see docs/scenarios.md for its form")
    if path.stat().st_size > MOST_NBYTES:
        raise ValueError(f"{path} is too large for a {what}; give the TOML file")
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no {what}") from error


class Table:
    """A table of a file; every getter takes a key off, and `done` refuses those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        self.where, self.path = where, path
        self._values = dict(values)
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def fail(self, key: str, why: str) -> NoReturn:
        """Raise ValueError: file, key, what is wrong."""
        name = ".".join(part for part in (self.path, key) if part)
        raise ValueError(f"{self.where}: {name}{'' if why.startswith((' ', ':')) else ' '}{why}")

    def take(self, key: str) -> Any:
        """The value as it is, None if it is absent."""
        self._known.append(key)
        return self._values.pop(key, None)

    def done(self) -> None:
        """Refuse what is left."""
        for key in self._values:
            self.fail(key, f"is an unknown key; here are {', '.join(dict.fromkeys(self._known))}")

    def text(self, key: str, default: str | None = None) -> str:
        """A line of text."""
        value = self.take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            self.fail(key, "is missing; give a line of text" if value is None else f"= {value!r} is no line of text")
        return value

    def choice(self, key: str, names: Sequence[str], default: str | None = None) -> str:
        """One of `names`."""
        value = self.text(key, default)
        if value not in names:
            self.fail(key, f"= {value!r} is not known; use {', '.join(names)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, f"= {value!r} is neither true nor false")
        return default if value is None else value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number from low to high, both included."""
        value = self.take(key)
        if value is None:
            if default is None:
                self.fail(key, f"is missing; give a number from {low:g} to {high:g}")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(key, f"= {value!r} is no number")
        if not low <= value <= high:
            why = "is negative" if value < 0 <= low else "is zero" if value == 0 else "is out of range"
            self.fail(key, f"= {value} {why}; use {low:g} to {high:g}")
        return float(value)

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from low to high, both included."""
        value = self.number(key, low, high, default)
        if value != int(value):
            self.fail(key, f"= {value} is no whole number")
        return int(value)

    def texts(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """A list of different lines of text."""
        value = self.take(key)
        if value is None:
            return tuple(default)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            self.fail(key, f"= {value!r} is no list of names")
        if len(set(value)) < len(value):
            self.fail(key, f"= {value!r} names something twice")
        return tuple(value)

    def numbers(self, key: str, low: int, high: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """A list of different whole numbers from low to high."""
        value = self.take(key)
        if value is None:
            return tuple(default)
        if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
            self.fail(key, f"= {value!r} is no list of whole numbers")
        if not all(low <= item <= high for item in value) or len(set(value)) < len(value):
            self.fail(key, f"= {value!r} must be different numbers from {low} to {high}")
        return tuple(value)

    def table(self, key: str) -> Table:
        """A table inside this one, empty if it is absent."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, f"= {value!r} is no table")
        return Table(value or {}, self.where, ".".join(part for part in (self.path, key) if part))

    def tables(self, key: str) -> dict[str, Table]:
        """The tables inside a table, by name."""
        inner = self.table(key)
        return {name: inner.table(name) for name in list(inner._values)}
