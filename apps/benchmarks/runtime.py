"""How fast bundles run beside llama.cpp and the stock builder's, and how much of the memory's speed they reach.

    python -m rlkit.apps.benchmarks.runtime -o ./bench-runtime --shape qwen3-4b --peer PEER_ENVIRONMENT/bin/python

w4w2     our bundle: gate and up 2-bit, the rest 4-bit, groups of 128, opened as `rlkit run` does
w4       the same with 4 bits everywhere
stock    the stock GenAI builder's int4 bundle with its default settings, opened as onnxruntime-genai does
q4_0     a Q4_0 GGUF of the same shape in llama.cpp with as many threads; --peer names the Python of an environment with
         llama-cpp-python, which is no dependency of this package; left out, it is not measured

All have random weights. Each runs in a process of its own; rounds alternate between them, and ratios are medians over
rounds that ran side by side. Achieved bandwidth is what a decode step has to read over its time, as a share of what
reading memory reaches in the same minute.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.apps.benchmarks import peers
from rlkit.apps.benchmarks.gateup_forecast import random_bundle
from rlkit.profiles import bench, machine, worker
from rlkit.profiles.bundle import read_size
from rlkit.recover.atomic import write_json
from rlkit.recover.source import ModelShape

BARS = {("q4_0", "tg"): 1.25, ("q4_0", "pp"): 1.2, ("stock", "tg"): 2.0}  # our W4/W2's speed over theirs
READ_BAR = 0.6
OURS = "w4w2"


@dataclass(frozen=True, slots=True)
class Side:
    """One runtime with its model: how to start it, and what a decode step reads at a depth, where that is known."""

    name: str
    command: list[str]
    nbytes_at: Callable[[int], int | None]
    environment: dict[str, str] = field(default_factory=dict)


def main(  # noqa: PLR0913, one parameter per option of the command
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the models and results.")] = Path("bench-runtime"),
    shape: Annotated[str, typer.Option(help="qwen3-0.6b, qwen3-1.7b or qwen3-4b.")] = "qwen3-4b",
    sides: Annotated[str, typer.Option(help="With commas between.")] = "w4w2,w4,stock,q4_0",
    peer: Annotated[str | None, typer.Option(help="Python with llama-cpp-python.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure our bundles beside others of the same shape."""
    from rlkit.recover.standin import SHAPES

    if shape not in SHAPES:
        raise typer.BadParameter(f"no shape {shape!r}; use {', '.join(SHAPES)}")
    plan = bench.Plan(bench.standard((prompt,), new_tokens), repeats)
    asked = [name for name in sides.split(",") if name != "q4_0" or peer]
    made = [side(name, shape, SHAPES[shape], out, plan.room, peer) for name in asked]
    threads = machine.usable_threads()
    with contextlib.ExitStack() as stack, console.progress(quiet=json) as tell:
        subjects = []
        for each in made:
            running = stack.enter_context(worker.start(each.name, each.command, each.environment))
            subjects.append(bench.Subject(each.name, running.generate, running.peak_nbytes, each.nbytes_at))
        measured = bench.measure(subjects, plan, tell)
        read = machine.measure_read(threads, seconds=2.0)
    found = {
        "schema_version": 1,
        "shape": shape,
        "machine": machine.measure_machine().to_json(),
        "read_bytes_per_s": read.best,
        "measured": [each.to_json() for each in measured],
        **compared(measured, read.best),
    }
    write_json(out / "runtime.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found)


def side(name: str, shape_name: str, shape: ModelShape, out: Path, room: int, peer: str | None) -> Side:
    """A side by name, its model made if it is not there; ValueError naming the sides."""
    if name in ("w4w2", "w4"):
        folder = random_bundle(shape_name, name, out)
        ours = worker.environment(folder, worker.Setting())
        return Side(name, worker.command(folder), read_size(folder).nbytes_at, ours)
    if name == "stock":
        folder = out / f"{shape_name}-stock"
        if not (folder / "genai_config.json").is_file():
            peers.write_stock(shape, folder)
        return Side(
            name, [sys.executable, "-m", "rlkit.apps.benchmarks.stock_worker", str(folder)], lambda _depth: None
        )
    if name == "q4_0" and peer is not None:
        path = out / f"{shape_name}-q4_0.gguf"
        if not path.is_file():
            console.say(f"making {path}")
            peers.write_q4_0(shape, path)
        script = Path(__file__).with_name("llamacpp_worker.py")
        return Side(name, [peer, str(script), str(path), str(machine.usable_threads()), str(room)], lambda _depth: None)
    raise ValueError(f"no side {name!r}; use w4w2, w4, stock or q4_0")


def compared(measured: Sequence[bench.Measurement], read_bytes_per_s: float) -> dict[str, Any]:
    """Our speed over each other's by test, with the bars; and what share of the reading speed decoding reaches."""
    ours = [each for each in measured if each.name == OURS]
    others = [each for each in measured if each.name != OURS]
    rows = [
        {
            "against": ratio.name,
            "test": ratio.test.name,
            "speed_ratio": ratio.time,
            "bar": BARS.get((ratio.name, str(ratio.test.kind))),
        }
        for ratio in (bench.ratios([*ours, *others]) if ours else ())  # their time over ours
    ]
    shares = {}
    for each in measured:
        for series in each.series:
            if series.nbytes_per_token and series.token_seconds:
                shares[each.name] = series.nbytes_per_token / series.token_seconds.p50 / read_bytes_per_s
    return {"ratios": rows, "read_shares": shares}


def show(found: dict[str, Any]) -> None:
    """Speeds, ratios and shares as tables."""
    cells = []
    for each in found["measured"]:
        for series in each["series"]:
            speed = series["tokens_per_s"]
            rate = series["bytes_per_s"]
            achieved = "" if rate is None else f"{rate / 1e9:.1f}"
            cells.append((each["name"], series["test"], f"{speed['p50']:.2f}", f"{speed['std']:.2f}", achieved))
    console.table(("side", "test", "tokens/s", "+-", "GB/s"), cells, title=f"{found['shape']}, random weights")
    for row in found["ratios"]:
        bar = (
            ""
            if row["bar"] is None
            else f" (bar {row['bar']:.2f}: {'met' if row['speed_ratio'] >= row['bar'] else 'NOT MET'})"
        )
        console.emit(f"{OURS} against {row['against']}, {row['test']}: {row['speed_ratio']:.2f} times as fast{bar}")
    for name, share in found["read_shares"].items():
        reads = f"{found['read_bytes_per_s'] / 1e9:.1f} GB/s"
        console.emit(
            f"{name} reads weights at {100 * share:.0f} % of {reads} while decoding (bar {100 * READ_BAR:.0f} %)"
        )


if __name__ == "__main__":
    typer.run(main)
