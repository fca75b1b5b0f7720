"""Measured seconds of every class of operator in one step of a bundle: onnxruntime's profiler over a plain session.

    kernels    every kernel's median over steps, summed by class: what disturbs one kernel of a step leaves no trace
    gaps       every pause between two kernels, likewise; the profiler's own writing is among it
    dispatch   the step's wall time without the profiler, less the kernels; on a busy machine that is too much, so at
               most the gaps
    overhead   the wall time with the profiler, less that without

A step is a prefill of so many tokens, or the decoding of one, after so many others (`runtime.stepper`). The runtime
writes whole microseconds and cuts off the rest, so half a microsecond is added to every kernel and taken from every
gap. What it does not know: which of two kernels waited for the other's data. The run without the profiler comes before
the one with it, so a machine that changes its speed in between shifts the overhead, even below 0.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.profiles.step import Kind
from rlkit.profiles.table import Table
from rlkit.profiles.timing import milliseconds
from rlkit.recover.source import read_json

if TYPE_CHECKING:  # made by export/nodes.py, which imports onnx_ir
    from rlkit.export.nodes import LinearNode

SCHEMA_VERSION = 1
OTHER = "other"  # the class of what is none of Kind
WARM_UPS = 2
CUT_SECONDS = 0.5e-6  # the mean of what is lost when a duration becomes whole microseconds
_KERNEL = "_kernel_time"
_CONTROL = ("If", "Loop", "Scan")  # their time is that of the kernels inside, which have events of their own


@dataclass(frozen=True, slots=True)
class Row:
    """Kernels of one class in one step: seconds of all `count` together; `bits` of a linear's weights, else 0.

    `kind` is one of step.Kind or "other"; names are those of profiles.operators wherever it has one.
    """

    kind: str
    name: str
    bits: int
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OperatorSeconds:
    """One step of `prompt_tokens` new tokens after `past_tokens`, medians over `steps` of them.

    `gap_seconds` are those between kernels with the profiler; `wall_seconds` is a step without it, `profiled_seconds`
    one with it.
    """

    prompt_tokens: int
    past_tokens: int
    threads: int
    steps: int
    rows: tuple[Row, ...]
    gap_seconds: float
    wall_seconds: float
    profiled_seconds: float

    @property
    def kernel_seconds(self) -> float:
        """All kernels of a step."""
        return sum(row.seconds for row in self.rows)

    @property
    def dispatch_seconds(self) -> float:
        """What is left of a step between its kernels: wall time less kernels, from 0 to the gaps."""
        return max(0.0, min(self.wall_seconds - self.kernel_seconds, self.gap_seconds))

    @property
    def seconds(self) -> float:
        """A step that nothing disturbs: kernels and dispatch."""
        return self.kernel_seconds + self.dispatch_seconds

    @property
    def overhead_seconds(self) -> float:
        """What the profiler adds to a step."""
        return self.profiled_seconds - self.wall_seconds

    @property
    def launches(self) -> int:
        """Kernels started in a step."""
        return sum(row.count for row in self.rows)

    def by_kind(self) -> dict[str, float]:
        """Seconds of every kind, and what is left as "dispatch"."""
        found: dict[str, float] = {}
        for row in self.rows:
            found[row.kind] = found.get(row.kind, 0.0) + row.seconds
        return {**found, "dispatch": self.dispatch_seconds}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what follows from the numbers is included for readers."""
        names = ("seconds", "kernel_seconds", "dispatch_seconds", "overhead_seconds", "launches")
        derived = {name: getattr(self, name) for name in names}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": [asdict(r) for r in self.rows], **derived}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> OperatorSeconds:
        """The inverse of `to_json`; ValueError for another schema version."""
        if table.get("schema_version") != SCHEMA_VERSION:
            why = f"schema_version {table.get('schema_version')!r}, this rlkit reads {SCHEMA_VERSION}"
            raise ValueError(f"the profile has {why}; measure again")
        kept = {name: table[name] for name in cls.__slots__}
        return cls(**{**kept, "rows": tuple(Row(**row) for row in table["rows"])})


def profile_bundle(
    folder: Path, prompt_tokens: int, past_tokens: int = 0, threads: int | None = None, steps: int = 10
) -> OperatorSeconds:
    """Run steps of a bundle on the CPU without and with the profiler; 1 prompt token is a decode step.

    `threads` None means what the bundle says. Raises ValueError for sizes that the context does not hold, and
    FileNotFoundError or ValueError for a folder that is no bundle.
    """
    from rlkit.export.nodes import linear_nodes
    from rlkit.runtime.stepper import open_stepper

    if steps < 1:
        raise ValueError(f"{steps} steps measure nothing; use at least 1")

    def walls(profile: Path | None) -> tuple[list[float], list[dict[str, Any]], int]:
        stepper = open_stepper(folder, threads, profile)
        taken = [stepper.step(prompt_tokens, past_tokens, seed) for seed in range(WARM_UPS + steps)]
        return taken[WARM_UPS:], stepper.close(), stepper.threads

    plain, _none, used = walls(None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        profiled, events, _used = walls(Path(scratch, "profile"))
    filename = read_json(folder / "genai_config.json")["model"]["decoder"]["filename"]
    rows, gaps = summed(runs_of(events)[WARM_UPS:], linear_nodes(folder / filename))
    timed = statistics.median(plain), statistics.median(profiled)
    return OperatorSeconds(prompt_tokens, past_tokens, used, steps, rows, gaps, *timed)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a session, in whole microseconds: its kernels (node, operator, duration), and the gaps around them."""

    kernels: tuple[tuple[str, str, int], ...]
    gaps: tuple[int, ...]


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs that a profile tells of, in their order."""
    found = sorted((event for event in events if "ts" in event), key=lambda event: int(event["ts"]))
    whole = [event for event in found if event.get("name") == "model_run"]
    starts = [int(event["ts"]) for event in whole]
    kernels: list[list[Mapping[str, Any]]] = [[] for _ in whole]
    for event in found:
        index = bisect_right(starts, int(event["ts"])) - 1
        if index >= 0 and _is_kernel(event):
            kernels[index].append(event)
    return [_run(event, inside) for event, inside in zip(whole, kernels, strict=True)]


def _is_kernel(event: Mapping[str, Any]) -> bool:
    named = event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL)
    return named and event["args"].get("op_name") not in _CONTROL


def _run(event: Mapping[str, Any], inside: Sequence[Mapping[str, Any]]) -> Run:
    begins = [*(int(kernel["ts"]) for kernel in inside), int(event["ts"]) + int(event["dur"])]
    ends = [int(event["ts"]), *(int(kernel["ts"]) + int(kernel["dur"]) for kernel in inside)]
    kernels = tuple(
        (str(kernel["name"]).removesuffix(_KERNEL), str(kernel["args"]["op_name"]), int(kernel["dur"]))
        for kernel in inside
    )
    return Run(kernels, tuple(begin - end for begin, end in zip(begins, ends, strict=True)))


def summed(runs: Sequence[Run], linears: Mapping[str, LinearNode]) -> tuple[tuple[Row, ...], float]:
    """Every class's seconds in the order of the graph, and those between kernels, from medians over runs.

    Raises ValueError where there are no kernels, or not the same ones in every run.
    """
    orders = {tuple(node for node, _op, _duration in run.kernels) for run in runs}
    if len(orders) != 1 or not runs[0].kernels:
        why = f"{len(runs)} runs with {len(orders)} different orders of kernels"
        raise ValueError(f"the profile holds {why}; measure again, with this package's own onnxruntime")
    found: dict[tuple[str, str, int], list[float]] = {}
    for same in zip(*(run.kernels for run in runs), strict=True):
        node, op, _duration = same[0]
        seconds = 1e-6 * statistics.median(duration for *_names, duration in same) + CUT_SECONDS
        found.setdefault(classify(node, op, linears.get(node)), []).append(seconds)
    gaps = [1e-6 * statistics.median(same) - CUT_SECONDS for same in zip(*(run.gaps for run in runs), strict=True)]
    return tuple(Row(*key, len(taken), sum(taken)) for key, taken in found.items()), max(0.0, sum(gaps))


_PRODUCTS = ("MatMulNBits", "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulBnb4", "DynamicQuantizeMatMul")
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "PagedAttention", "SparseAttention")
_ELEMENTWISE = (
    (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Sqrt",
        "Pow",
        "Clip",
        "Where",
        "Identity",
        "Range",
        "Less",
        "Greater",
        "Equal",
    ),
    (
        "Tanh",
        "Sigmoid",
        "Relu",
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "BiasGelu",
        "BiasSplitGelu",
        "Silu",
        "Swish",
        "Softmax",
    ),
    ("Split", "Concat", "Slice", "Cast", "Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Shape", "Gather"),
    ("GatherElements", "ScatterElements", "ReduceSum", "ReduceMean", "TopK", "RotaryEmbedding"),
)
# What a node's name says, tried in turn: (pattern, kind, name).
_PLACES = (
    (re.compile(r"/lora_\w*Add"), Kind.ELEMENTWISE, "adapters: sum"),
    (re.compile(r"/lora_"), Kind.ADAPTER, "adapters"),
    (re.compile(r"/offsets/"), Kind.ADAPTER, "offsets"),
    (re.compile(r"embed_tokens"), Kind.EMBEDDING, "embedding"),
    (re.compile(r"/[qk]_norm/"), Kind.NORM, "head norm"),
    (re.compile(r"/(?:\w+_proj|router|lm_head)/Add$"), Kind.LINEAR, "bias"),
    (re.compile(r"attn_mask_reformat|/last/Gather"), Kind.ELEMENTWISE, "inputs"),
)
_NAMES = (
    (re.compile(r"act_fn|/mlp/Mul"), "activation"),
    (re.compile(r"Rotary|rotemb"), "rotary"),
    (re.compile(r"/Split$"), "split"),
    (re.compile(r"/(?:moe|router|experts)/"), "routing"),
)


def classify(node: str, op: str, linear: LinearNode | None = None) -> tuple[str, str, int]:
    """(kind, name, bits) of a kernel, from its node's name, its operator, and what the graph says of its weights."""
    bits = linear.bits if linear else 0
    for pattern, kind, name in _PLACES:
        if pattern.search(node):
            return str(kind), name, bits if kind is Kind.ADAPTER else 0
    if op in _PRODUCTS:
        module = linear.module if linear else node.strip("/").replace("/", ".").removesuffix(f".{op}")
        return str(Kind.EXPERTS if ".experts." in module else Kind.LINEAR), module.rpartition(".")[2], bits
    if op in ("MoE", "QMoE"):
        return str(Kind.EXPERTS), "experts", bits
    if op in _ATTENTION:
        return str(Kind.ATTENTION), "attention", 0
    if op.endswith(("LayerNormalization", "RMSNormalization", "LayerNorm")):
        return str(Kind.NORM), "residual and norm" if op.startswith("Skip") else "norm", 0
    named = next((name for pattern, name in _NAMES if pattern.search(node)), op)
    return str(Kind.ELEMENTWISE) if any(op in some for some in _ELEMENTWISE) else OTHER, named, 0


def table(found: OperatorSeconds) -> Table:
    """One row per class with its share of the step, then what is left and the whole."""
    whole = found.seconds
    rows = [(r.kind, r.name, str(r.bits or ""), str(r.count), *_share(r.seconds, whole)) for r in found.rows]
    rows.append(("dispatch", "between kernels", "", "", *_share(found.dispatch_seconds, whole)))
    rows.append(("all", "", "", str(found.launches), *_share(whole, whole)))
    step = f"{found.prompt_tokens} new tokens after {found.past_tokens}, {found.threads} threads"
    walls = f"A step took {milliseconds(found.wall_seconds)} ms, {milliseconds(found.profiled_seconds)} ms with the"
    note = f"Medians of {found.steps} steps, kernel by kernel. {walls} profiler; more than all here is disturbance."
    return Table(step, ("kind", "operator", "bits", "kernels", "ms", "share"), tuple(rows), note)


def _share(seconds: float, whole: float) -> tuple[str, str]:
    return f"{1e3 * seconds:.3f}", f"{seconds / whole:.1%}"
