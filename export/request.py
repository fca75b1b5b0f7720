"""What an export is asked for, and what it would make of a model: from headers alone, without torch or onnx.

A model on disk becomes a store of tensors (store.py) under the request's recipe, and the store's inventory a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

from rlkit.export.npu import mode_named
from rlkit.export.plan import Plan, plan_inventory
from rlkit.export.store import Store, open_store
from rlkit.export.targets import Target, target_named
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import ModelShape, Source, resolve

SMALL_PARAMETERS, SMALL_GROUP = 1_000_000_000, 32
ADAPTER_FORMS = ("branch", "files", "merged", "none")
LOGITS = ("last", "all")
FUSED_ON = ("cpu",)  # devices on which gate and up as one product was measured: docs/log.md


class Options(TypedDict, total=False):
    """The fields of Request, for calls that name them."""

    target: str
    provider: str | None
    dtype: str | None
    recipe: Recipe | None
    accuracy_level: int | None
    threads: int | None
    logits: str
    fuse: bool | None
    adapters: str
    adapter_files: Mapping[str, Path]
    allow_slow: bool
    mode: str


@dataclass(frozen=True, slots=True)
class Request:
    """What an export is asked for.

    target, provider, dtype: as targets.target_named takes them. recipe: bits of float matrices, rounded on the
    way; None leaves them float. accuracy_level: 4 multiplies in int8, the only fast form of 2 and 8 bits on CPUs; 0 is
    exact and slow, for checks; None is the target's. threads: written into the bundle; None is this process's cores.
    logits: "last" computes them for the last token only, "all" for every token of the prompt. fuse: gate and up of a
    layer as one product; None where that was measured to be faster. adapters: what becomes of the source's own one, of
    ADAPTER_FORMS; adapter_files: further ones by name, PEFT folders. allow_slow: ship what lint finds fault with.
    mode: how an NPU runs it, a name of npu.MODES.
    """

    target: str = "cpu"
    provider: str | None = None
    dtype: str | None = None
    recipe: Recipe | None = None
    accuracy_level: int | None = None
    threads: int | None = None
    logits: str = "last"
    fuse: bool | None = None
    adapters: str = "branch"
    adapter_files: Mapping[str, Path] = field(default_factory=dict)
    allow_slow: bool = False
    mode: str = "hybrid"

    def __post_init__(self) -> None:
        if self.logits not in LOGITS:
            raise ValueError(f"logits = {self.logits!r} is not offered; use {' or '.join(LOGITS)}")
        if self.adapters not in ADAPTER_FORMS:
            raise ValueError(f"adapters = {self.adapters!r} is not offered; use {', '.join(ADAPTER_FORMS)}")
        mode_named(self.mode)

    def where(self) -> Target:
        """The target, by its description."""
        return target_named(self.target, self.provider, self.dtype)

    @property
    def joins(self) -> bool:
        """Whether gate and up become one product."""
        return self.where().device in FUSED_ON if self.fuse is None else self.fuse

    def store(self, source: Source) -> Store:
        """The tensors of a model as this request wants them."""
        carry = self.where().ops is None  # the branch is of more than packed matrices
        return open_store(source, self.recipe, adapters=self.adapters, carry_offsets=carry)

    def plan(self, store: Store) -> Plan:
        """What they become on the target."""
        return plan_inventory(store.inventory, target=self.where(), accuracy_level=self.accuracy_level)


def plan_export(source: Source | Path, **options: Unpack[Options]) -> Plan:
    """What an export would make."""
    request = Request(**options)
    return request.plan(request.store(found(source)))


def found(source: Source | Path) -> Source:
    """A path's model; FileNotFoundError if nothing is there."""
    if isinstance(source, Source):
        return source
    if not source.exists():
        raise FileNotFoundError(f"no folder or file {source}; make a checkpoint with: rlkit recover MODEL -o {source}")
    return resolve(source)


def default_recipe(target: Target, shape: ModelShape) -> Recipe:
    """Bits of a float model that is exported without a recipe: 4, in the groups that are fastest on the target.

    A model of few parameters gets small groups: it is fast all the same, and plain rounding costs it more (SmolLM2-135M
    on the built-in text: 0.32 nats per token in groups of 32, 0.62 in groups of 64; 2026-11).
    """
    group = SMALL_GROUP if shape.parameters < SMALL_PARAMETERS else target.group
    return Recipe(f"w4-g{group}", (Rule(("*",), Scheme(4, group)),))
