"""Times an ONNX model frame by frame in plain onnxruntime, and counts what a frame computes; one process per model.

    python -m rlkit.runtime.framebench        a job as JSON on standard input, the answer as JSON on standard output

A frame is one run with all inputs at hand: floats are normal noise, whole numbers zeros, unless the job gives `values`.
What it computes is counted from shapes that the runtime itself reports of a run without optimizations:

    Conv                   2 x outputs x weights of an output channel      MatMul, Gemm   2 x outputs x inner length
    ConvTranspose          2 x inputs x weights of an input channel        LSTM, GRU      2 x steps x weights
    numbers moved          outputs of these operators and their inputs that are no weights, once each

What it does not know: products inside of operators that it has no formula for (named in `uncounted`), and what the
runtime's own fusions save.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.export.reshape import reshaped
from rlkit.recover.memory import peak_nbytes
from rlkit.runtime.devices import seen
from rlkit.runtime.providers import PROVIDERS

Clock = Callable[[], float]
FEWEST, MOST = 5, 2000  # timed frames
WARM_UPS = 2
SILENT = 4  # what goes wrong is raised
# Threads that wait by spinning would take the processor from other models beside this one.
SESSION_ENTRIES = {"session.intra_op.allow_spinning": "0"}
TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
PRODUCTS = ("MatMul", "MatMulInteger", "Gemm", "FusedMatMul")
CONVOLUTIONS = ("Conv", "ConvInteger", "FusedConv")
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
OPAQUE = ("Attention", "MultiHeadAttention", "Einsum", "QLinearConv", "QLinearMatMul", "QAttention", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Job:
    """What to time: a file, where, with which sizes of inputs and which that are not random."""

    model: str
    provider: str = "cpu"
    threads: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 1.0
    count: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What a frame is: floating-point operations, weights, numbers moved, operators, those without a formula."""

    flops: int
    weights: int
    moved: int
    operators: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds of every timed frame, of loading, bytes that the process grew by, and `Work` if it was asked for."""

    seconds: tuple[float, ...]
    load_seconds: float
    memory_nbytes: int | None
    work: Work | None = None


class Frame:
    """An open model with its inputs; `run` computes a frame. `open_frame` makes one."""

    def __init__(self, session: Any, feeds: dict[str, NDArray[Any]]) -> None:
        self._session, self.feeds = session, feeds
        self._binding = session.io_binding()
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, value)
        for value in session.get_outputs():
            self._binding.bind_output(value.name)

    def run(self) -> None:
        """Compute one frame, outputs included."""
        self._session.run_with_iobinding(self._binding)

    def recorded(self) -> list[dict[str, Any]]:
        """End profiling: what the runtime says of every run of an operator, in order; of frames with a `profile`."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]


def open_frame(
    model: Path | bytes,
    *,
    provider: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    values: Mapping[str, float] | None = None,
    profile: str | None = None,
    fused: bool = False,
) -> Frame:
    """Open an ONNX model on one provider, never on another than that.

    `profile`: run without optimizations and write the runtime's record under this prefix; `fused`: with those that
    every processor gets. Raises ValueError for what is no model, for a provider that is not here, and for inputs whose
    sizes or types nobody gave.
    """
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = SILENT
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if fused else level.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape to report
    wanted = available(provider)
    what = "the model" if isinstance(model, bytes) else str(model)
    if isinstance(model, Path) and not model.is_file():
        raise FileNotFoundError(f"no file {model}; give an ONNX file")

    def opened(source: Path | bytes) -> Any:
        try:
            given = source if isinstance(source, bytes) else str(source)
            return ort.InferenceSession(given, options, providers=[wanted], enable_fallback=0)
        except Exception as error:  # of any kind the runtime has
            raise ValueError(f"{what} cannot be opened by onnxruntime {ort.__version__}: {_line(error)}") from error

    session = opened(model)
    if session.get_providers()[0] != wanted:
        raise ValueError(f"onnxruntime gave {session.get_providers()[0]} instead of {wanted}; use another device")
    made = feeds(session.get_inputs(), shapes or {}, values or {}, what)
    if others := _fixed_otherwise(session.get_inputs(), made):
        session = opened(reshaped(model, others))
    return Frame(session, made)


def _fixed_otherwise(inputs: Sequence[Any], made: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Inputs that the graph was written for in other sizes than they shall have."""
    declared = {value.name: value.shape or () for value in inputs}
    return {
        name: array.shape
        for name, array in made.items()
        if any(isinstance(a, int) and a > 0 and a != b for a, b in zip(declared[name], array.shape, strict=False))
    }


def available(provider: str) -> str:
    """The runtime's name of a provider that is built in here; ValueError if it is not."""
    import onnxruntime as ort

    names = PROVIDERS[provider].eps if provider in PROVIDERS else ()
    found = [name for name in names if name in ort.get_available_providers()]
    if not found:
        raise ValueError(f"onnxruntime {ort.__version__} here has no {provider}; see rlkit doctor")
    return found[0]


def others() -> tuple[str, ...]:
    """Providers beside the processor that are built into the runtime here and have a device, by rlkit's names."""
    ready = {device.provider for device in seen()} | {device.name for device in seen()}
    return tuple(name for name in PROVIDERS if name != "cpu" and name in ready and _builtin(name))


def _builtin(provider: str) -> bool:
    try:
        return bool(available(provider))
    except ValueError:
        return False


def feeds(
    inputs: Sequence[Any], shapes: Mapping[str, Sequence[int]], values: Mapping[str, float], what: str
) -> dict[str, NDArray[Any]]:
    """An array for each input; a first size that is left open is a batch of 1, all others must be given."""
    names = {value.name for value in inputs}
    for name in (*shapes, *values):
        if name not in names:
            raise ValueError(f"{what} has no input {name!r}; it has {', '.join(sorted(names))}")
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for value in inputs:
        if value.type not in TYPES:
            raise ValueError(f"{what}: input {value.name} is a {value.type}, which cannot be made up here")
        shape = _shape(value, shapes.get(value.name), what)
        kind = TYPES[value.type]
        if value.name in values:
            found[value.name] = np.full(shape, values[value.name], kind)
        elif np.issubdtype(kind, np.floating):
            found[value.name] = rng.standard_normal(shape, dtype=np.float32).astype(kind)
        else:
            found[value.name] = np.zeros(shape, kind)
    return found


def _shape(value: Any, given: Sequence[int] | None, what: str) -> tuple[int, ...]:
    declared = list(value.shape or [])
    if given is None:
        sizes = [1 if index == 0 and not isinstance(size, int) else size for index, size in enumerate(declared)]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            said = ",".join(str(size) if isinstance(size, int) else "?" for size in sizes)
            raise ValueError(
                f"{what}: input {value.name} has open sizes ({said}); give them as --shape {value.name}=..."
            )
        return tuple(sizes)
    if declared and len(given) != len(declared):
        raise ValueError(f"{what}: input {value.name} has {len(declared)} sizes, not {len(given)}; give all of them")
    return tuple(given)


def time_frames(frame: Frame, seconds: float, clock: Clock = time.perf_counter) -> tuple[float, ...]:
    """Seconds of each of FEWEST to MOST frames, about `seconds` of them, after WARM_UPS."""
    for _ in range(WARM_UPS):
        frame.run()
    taken: list[float] = []
    began = clock()
    while len(taken) < FEWEST or (clock() - began < seconds and len(taken) < MOST):
        start = clock()
        frame.run()
        taken.append(clock() - start)
    return tuple(taken)


def count(model: Path | bytes, shapes: Mapping[str, Sequence[int]], values: Mapping[str, float]) -> Work:
    """What a frame computes, from one run on the processor."""
    with tempfile.TemporaryDirectory() as folder:
        frame = open_frame(model, shapes=shapes, values=values, profile=str(Path(folder, "run")))
        frame.run()
        return counted(frame.recorded())


def counted(nodes: Any) -> Work:
    """The sums over the runtime's records of nodes: op_name, input_type_shape, output_type_shape."""
    flops = weights = moved = operators = 0
    opaque: list[str] = []
    for node in nodes:
        if "output_type_shape" not in node:  # a start or an end of something
            continue
        operators += 1
        ins, outs = _shapes(node["input_type_shape"]), _shapes(node["output_type_shape"])
        work = _product(node["op_name"], ins, outs)
        if work is None:
            opaque += [node["op_name"]] if node["op_name"] in OPAQUE else []
            continue
        flops, weights, moved = flops + work[0], weights + work[1], moved + work[2]
    return Work(flops, weights, moved, operators, tuple(dict.fromkeys(opaque)))


def _product(name: str, ins: list[list[int]], outs: list[list[int]]) -> tuple[int, int, int] | None:
    """FLOPs, weights and numbers moved of an operator; None for one that multiplies nothing, or in unknown ways."""
    if name in CONVOLUTIONS:
        held, out = math.prod(ins[1]), math.prod(outs[0])
        return 2 * out * held // ins[1][0], held, math.prod(ins[0]) + out
    if name == "ConvTranspose":
        held = math.prod(ins[1])
        return 2 * math.prod(ins[0]) * held // ins[1][0], held, math.prod(ins[0]) + math.prod(outs[0])
    if name in PRODUCTS:
        held, out = math.prod(ins[1]), math.prod(outs[0])
        inner = math.prod(ins[0]) // max(math.prod(outs[0][:-1]), 1)
        return 2 * out * inner, held, math.prod(ins[0]) + out
    if name in RECURRENT:
        held = math.prod(ins[1]) + math.prod(ins[2])
        return 2 * ins[0][0] * ins[0][1] * held, held, math.prod(ins[0]) + math.prod(outs[0] if outs else [])
    return None


def _shapes(listed: list[dict[str, list[int]]]) -> list[list[int]]:
    return [next(iter(each.values()), []) for each in listed]


def answer(job: Job) -> Answer:
    """Time a job in this process; its memory counts from before the model was opened."""
    import onnxruntime  # noqa: F401, its own memory is not the model's

    before = peak_nbytes()
    began = time.perf_counter()
    frame = open_frame(
        Path(job.model), provider=job.provider, threads=job.threads, shapes=job.shapes, values=job.values
    )
    load = time.perf_counter() - began
    taken = time_frames(frame, job.seconds)
    after = peak_nbytes()
    grown = None if before is None or after is None else max(after - before, 0)
    work = count(Path(job.model), job.shapes, job.values) if job.count else None
    return Answer(taken, load, grown, work)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def serve(answering: Callable[[dict[str, Any]], Any]) -> None:
    """Answer the job on standard input with a record, or with what went wrong."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    try:
        said = asdict(answering(json.loads(sys.stdin.read())))
    except (ValueError, OSError) as error:
        said = {"error": _line(error)}
    with contextlib.closing(os.fdopen(out, "w", encoding="utf-8")) as answers:
        json.dump(said, answers)


def main() -> None:
    """Answer the job on standard input."""
    serve(lambda job: answer(Job(**job)))


if __name__ == "__main__":
    main()
