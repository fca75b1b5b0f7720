"""Scenarios by name, as they come with rlkit, or by path."""

from __future__ import annotations

import difflib
from pathlib import Path

from rlkit.profiles.scheduling import scenario
from rlkit.profiles.scheduling.scenario import Scenario

FOLDER = Path(__file__).with_name("scenarios")


def names() -> tuple[str, ...]:
    """The scenarios that come with rlkit."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load(reference: str) -> Scenario:
    """A scenario by name, or from a .toml file.

    Raises FileNotFoundError naming near ones, or ValueError naming file and key of what is wrong in it.
    """
    if reference in names():
        return scenario.read(FOLDER / f"{reference}.toml")
    path = Path(reference).expanduser()
    if path.suffix == ".toml":
        return scenario.read(path)
    near = difflib.get_close_matches(reference, names(), n=2, cutoff=0.4) or names()
    raise FileNotFoundError(f"no scenario {reference!r}; there is {', '.join(near)}, or give a .toml file")
