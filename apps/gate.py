"""The gate of an export: how far the written file itself is from the model it was made of, and how far it may be.

    the original      in full precision, where it is at hand: the model exported, or what a checkpoint was made of
    the checkpoint    dequantized, where only that is at hand, or fits into this machine's memory
    nothing           where neither does: the reason takes the figures' place

The reference runs first and leaves its logits on disk; then the file is opened. They are never in memory together.
What the figures do not say: how good the original is, and how the file does on text of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlkit.apps import heldout
from rlkit.apps.console import nbytes_text
from rlkit.apps.heldout import HeldOut, Measure
from rlkit.profiles.divergence import LogitsFn
from rlkit.recover import memory, source
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import Source, SourceKind

FLOAT_KINDS = (SourceKind.HF, SourceKind.GGUF)
# Peak while loading, in bytes per parameter: SmolLM2-135M, transformers 5.23, 2026-11. A Hugging Face folder is mapped.
LOADING = {SourceKind.GGUF: 7.0, SourceKind.CHECKPOINT: 11.2}
LOGITS_COPIES = 4  # of one batch, float32: the model's, shifted, and what they are made of


@dataclass(frozen=True, slots=True)
class Gate:
    """How far an exported file may be from its reference: `max_kl` in nats per token; None measures only."""

    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise ValueError(f"max KL = {self.max_kl} is no limit; give nats per token above 0, such as 0.2")

    def check(self, measured: dict[str, Any]) -> None:
        """Raise ValueError if what was measured is above the limit, or if nothing was measured against it."""
        if self.max_kl is None:
            return
        if "kl_mean" not in measured:
            why = f"the exported file cannot be held to a KL of {self.max_kl}: {measured['skipped']}"
            raise ValueError(f"{why}; leave --max-kl out, or export where it can be measured")
        found, whose = measured["kl_mean"], measured["reference"]
        if found > self.max_kl:
            what = f"the exported file is {found:.4f} nats per token from the {whose['kind']} {whose['name']}"
            raise ValueError(
                f"{what}, more than the {self.max_kl} asked for; use more bits or adapters, or raise --max-kl"
            )


@dataclass(frozen=True, slots=True)
class Reference:
    """A model at hand that an exported file can be compared with; `why` it is not the original, if it is not."""

    kind: str
    model: Source
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {"kind": self.kind, "name": shown(self.model)}
        return named | ({"why": self.why} if self.why else {})


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What to measure on, and how much memory may be taken for it; `room` gives bytes."""

    text: str = heldout.BUILTIN
    min_tokens: int = 4000
    room: Callable[[], int] = lambda: int(psutil.virtual_memory().available)


def measure_export(
    model: Source, *, gate: Gate | None = None, yardstick: Yardstick | None = None, tell: Tell = silent
) -> Measure:
    """What `export_bundle` wants: folder -> manifest["divergence"], with ValueError if the gate stays shut.

    The figures are those of `Divergence`, with "text", "reference" and, for checkpoints, "to_checkpoint"; or
    {"skipped": reason}. Raises FileNotFoundError or ValueError at once if there is no such text.
    """
    stick, shut = yardstick or Yardstick(), gate or Gate()
    heldout.find_text(stick.text)

    def measure(folder: Path) -> dict[str, Any]:
        found = _measured(folder, model, stick, tell)
        if "skipped" in found:
            tell(Progress("gate", 1, 1, f"not measured: {found['skipped']}"))
        shut.check(found)
        return found

    return measure


def references(model: Source) -> Iterator[Reference]:
    """What a model can be compared with, best first."""
    if model.kind in FLOAT_KINDS:
        yield Reference("original", model)
        return
    found, why = original_of(model)
    if found is not None:
        yield Reference("original", found)
    yield Reference("checkpoint", model, why)


def original_of(checkpoint: Source) -> tuple[Source | None, str]:
    """The full-precision model that a checkpoint says it was made of; or None, and why it cannot be had."""
    stated = checkpoint.path / "recovery.json"
    facts = source.read_json(stated).get("source") if stated.is_file() else None
    reference = facts.get("reference") if isinstance(facts, dict) else None
    if not isinstance(reference, str) or not reference:
        return None, f"{shown(checkpoint)} does not say what it was made of"
    try:
        found = source.resolve(reference)
        same = found.kind in FLOAT_KINDS and source.read_shape(found) == source.read_shape(checkpoint)
    except (ValueError, OSError):
        return None, f"its original {_bare(reference)} is not at hand"
    return (found, "") if same else (None, f"{_bare(reference)} is another model by now")


def shown(model: Source) -> str:
    """A model's name as manifests and cards tell it to others: without the folders of this machine."""
    return model.file.name if Path(model.reference).exists() else _bare(model.reference)


def _bare(reference: str) -> str:
    return Path(reference).name if Path(reference).is_absolute() else reference


def needed_nbytes(model: Source) -> int:
    """The memory that a model takes as a reference: its float form while it is loaded, and one batch of logits."""
    shape = source.read_shape(model)
    logits = LOGITS_COPIES * 4 * heldout.MAX_WINDOW * shape.vocab
    if model.kind in LOADING:
        return int(LOADING[model.kind] * shape.parameters) + logits
    from rlkit.recover.model import FLOAT32_PARAMETERS

    stored = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    return logits + (4 * shape.parameters if shape.parameters <= FLOAT32_PARAMETERS else stored)


def _measured(folder: Path, model: Source, stick: Yardstick, tell: Tell) -> dict[str, Any]:
    reasons: list[str] = []
    for reference in references(model):
        with ExitStack() as stack:
            kept = _kept(reference, stick, stack, tell)
            if isinstance(kept, HeldOut):
                also = Reference("checkpoint", model) if model.kind is SourceKind.CHECKPOINT else None
                chosen = replace(reference, why="; ".join(reasons) or reference.why)
                return _compared(folder, (chosen, kept), also, stick, tell)
            reasons.append(kept)
    return {"skipped": "; ".join(reasons)}


def _compared(
    folder: Path, against: tuple[Reference, HeldOut], also: Reference | None, stick: Yardstick, tell: Tell
) -> dict[str, Any]:
    """The divergence of the file in `folder` from what is kept, and from its checkpoint unless that is the same."""
    reference, held_out = against
    with ExitStack() as stack:
        checkpoint: HeldOut | str | None = None
        if also is not None and reference.kind != also.kind:
            checkpoint = _kept(also, stick, stack, tell, windows=held_out)
        logits = _opened(folder, held_out)
        if isinstance(logits, str):
            return {"skipped": logits}
        found = {**held_out.divergence(logits, tell).to_json(), "text": held_out.label}
        found["reference"] = reference.to_json()
        if isinstance(checkpoint, HeldOut):
            found["to_checkpoint"] = checkpoint.divergence(logits, tell).to_json()
        elif isinstance(checkpoint, str):
            found["to_checkpoint"] = {"skipped": checkpoint}
        return found


def _kept(
    reference: Reference, stick: Yardstick, stack: ExitStack, tell: Tell, *, windows: HeldOut | None = None
) -> HeldOut | str:
    """The reference's logits on disk, those of a checkpoint until `stack` closes; or why there are none."""
    model = reference.model
    held_out = windows or heldout.find(model, stick.text, min_tokens=stick.min_tokens)
    if reference.kind == "original" and held_out.ready:
        return held_out
    try:
        needed, room = needed_nbytes(model), stick.room()
    except ValueError as error:
        return _one_line(error)
    if needed > room:
        what = f"the {reference.kind} {shown(model)} needs {nbytes_text(needed)} of memory to run"
        return f"{what}, and {nbytes_text(room)} are free"
    try:
        loaded = heldout.load(model)
    except ValueError as error:
        return f"the {reference.kind} {shown(model)} cannot be loaded ({_one_line(error)})"
    own = held_out if reference.kind == "original" else stack.enter_context(heldout.borrowed(held_out))
    heldout.keep(own, loaded, tell)
    del loaded
    memory.give_back()  # the exported file wants it
    return own


def _opened(folder: Path, held_out: HeldOut) -> LogitsFn | str:
    """The file's logits; or, of a file for another target, why this machine's CPU cannot run it."""
    target = source.read_json(folder / "rlkit.json")["target"]
    try:
        logits = heldout.logits_of(folder)
        logits(np.ascontiguousarray(held_out.batches()[-1].ids[:1, :2]))
    except Exception as error:
        if target == "cpu":
            raise
        return f"a file for {target} does not run on this machine's CPU ({_one_line(error)})"
    return logits


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
