"""Where low-rank adapters sit and how large they are: an ordered list of (module patterns, rank), written as text.

    gate-up:32,kv:16        named groups of linears, each with its rank
    *.down_proj:8           a shell pattern over module names
    *.layers.0.*:0,all:32   the first placement that matches a module counts; rank 0 says none

lm_head never takes an adapter: the loss is taken right behind its frozen weight. No torch here.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

PLACEMENTS = {"gate-up": ("*.gate_proj", "*.up_proj"), "kv": ("*.k_proj", "*.v_proj"), "all": ("*_proj",)}
LARGEST_RANK = 1024
EXAMPLE = "gate-up:32,kv:16"


@dataclass(frozen=True, slots=True)
class Placement:
    """Patterns of module names and the rank of their adapters; 0 means that they get none."""

    match: tuple[str, ...]
    rank: int

    def __post_init__(self) -> None:
        if not self.match or not all(self.match):
            raise ValueError(f'placement {self.match} names no linear; use patterns like "*.k_proj"')
        if not 0 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank {self.rank} of {', '.join(self.match)} is outside 0..{LARGEST_RANK}; use 8 to 64")

    def matches(self, module: str) -> bool:
        """Whether one of the patterns covers `module` (case matters); lm_head never."""
        return module != "lm_head" and any(fnmatch.fnmatchcase(module, pattern) for pattern in self.match)


def parse(text: str, *, rank: int = 32) -> tuple[Placement, ...]:
    """Read placements such as "gate-up:32,kv:16"; a part without a rank of its own takes `rank`.

    Raises ValueError for an unknown name, a rank that is no whole number of 0..1024, or an empty part.
    """
    return tuple(_part(part.strip(), rank, text) for part in text.split(","))


def ranks(modules: Iterable[str], placements: Iterable[Placement]) -> dict[str, int]:
    """The rank of every adapted module, in the order of `modules`; those without an adapter are left out.

    Raises ValueError for a placement that matches none of the modules, which is most likely a slip of the pen.
    """
    names, placements = list(modules), tuple(placements)
    if not placements:
        raise ValueError(f"no placement given, so there is nothing to adapt; name one, such as {EXAMPLE}")
    for placement in placements:
        if not any(placement.matches(name) for name in names):
            found = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names if name != "lm_head")) or "none"
            what = f"{' and '.join(placement.match)} match no linear that can take an adapter"
            raise ValueError(f"{what}; there are {found}")
    chosen = {name: next((p.rank for p in placements if p.matches(name)), 0) for name in names}
    return {name: rank for name, rank in chosen.items() if rank}


def to_text(placements: Iterable[Placement]) -> str:
    """The text that `parse` reads back to placements that choose the same ranks."""
    names = {match: name for name, match in PLACEMENTS.items()}
    parts = [((names[p.match],) if p.match in names else p.match, p.rank) for p in placements]
    return ",".join(f"{pattern}:{rank}" for patterns, rank in parts for pattern in patterns)


def _part(part: str, default: int, text: str) -> Placement:
    name, colon, number = (piece.strip() for piece in part.partition(":"))
    if not name:
        raise ValueError(f"placement {text!r} has an empty part; write it like {EXAMPLE}")
    if colon and not (number.isascii() and number.isdigit()):
        raise ValueError(f"placement {part!r}: rank {number!r} is no whole number; write it like {EXAMPLE}")
    if name not in PLACEMENTS and not any(mark in name for mark in "*?["):
        close = difflib.get_close_matches(name, PLACEMENTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f'or give a pattern such as "*.{name}"'
        raise ValueError(f"no placement {name!r}: named ones are {', '.join(PLACEMENTS)}; {hint}")
    return Placement(PLACEMENTS.get(name, (name,)), int(number) if colon else default)
