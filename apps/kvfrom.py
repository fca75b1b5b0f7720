"""What `--kv-from` says: the cache, and the tokens of a prompt read at once, that `rlkit kv` chose for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit.apps import console

if TYPE_CHECKING:
    from rlkit.profiles.frontier.result import KvSettings
    from rlkit.recover.source import Source

HELP = "The cache, and the chunks of prompts, that `rlkit kv` chose: its result file."


def chosen(kv: str | None, kv_from: Path, models: Sequence[Path | Source]) -> KvSettings:
    """What a result chose, said to the person; it must be of the model of each of these.

    Raises FileNotFoundError, or ValueError for a result of another model, one that chose nothing, and where `kv` names
    a cache too.
    """
    from rlkit.profiles.frontier import result
    from rlkit.recover import source

    if kv is not None:
        raise ValueError(f"--kv {kv} and --kv-from {kv_from} both say which cache; leave one of them out")
    found = [result.read_settings(kv_from, source.resolve(one) if isinstance(one, Path) else one) for one in models]
    console.say(f"{kv_from}: {found[0].text}")
    return found[0]
