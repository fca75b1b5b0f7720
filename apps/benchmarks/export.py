"""What an export costs, and whether the bundle is as large as planned, beside the stock builder on the same folder.

    python -m rlkit.apps.benchmarks.export -o ./bench-export --shape qwen3-4b --repeats 3

packed    a checkpoint of the shape with random codes (gate and up 2-bit, the rest 4-bit, groups of 128): `rlkit export`
          against `python -m onnxruntime_genai.models.builder`, in turns, each in a process of its own
float     a model of the shape in bfloat16 with random weights, rounded on the way by --recipe: peak against its size
bytes     files of the bundles against what their plans said

Seconds are those of whole processes, imports included; memory is each process's high-water mark. Neither the page
cache nor the disk is controlled: a first turn that is not counted reads every input once. --no-measure keeps the gate
out, as the stock builder has none.
"""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles.machine import measure_machine
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json

TIME_BAR, MEMORY_BAR, BYTES_BAR = 1.0, 0.6, 0.02  # of the stock builder's time, of its peak, off the plan
FLOAT_FACTOR, FLOAT_SPARE = 1.5, 2**30  # the peak of a float export: this times the model, and so many bytes
SUITES = ("packed", "float")
BUILDER = "onnxruntime_genai.models.builder"

# Runs a module as __main__ and leaves its process's peak: exact, where sampling from outside would miss the last of it.
CHILD = """
import json, pathlib, runpy, sys
from rlkit.recover.memory import peak_nbytes
out, module, *words = sys.argv[1:]
sys.argv = [module, *words]
code = 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code or 0
pathlib.Path(out).write_text(json.dumps({"peak_nbytes": peak_nbytes()}))
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One export: seconds of its process, its peak memory, and bytes of what it wrote as .onnx and its data."""

    who: str
    seconds: float
    peak_nbytes: int
    nbytes: int
    planned_nbytes: int | None = None


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the models and results.")] = Path("bench-export"),
    shape: Annotated[str, typer.Option(help="qwen3-0.6b, qwen3-1.7b or qwen3-4b, for `packed`.")] = "qwen3-4b",
    float_shape: Annotated[str, typer.Option(help="The same, for `float`.")] = "qwen3-0.6b",
    recipe: Annotated[str, typer.Option(help="How `float` is rounded.")] = "w4",
    suites: Annotated[str, typer.Option(help="Which parts, with commas between.")] = ",".join(SUITES),
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Export random models and print seconds, peak memory and bytes."""
    asked = suites.split(",")
    if unknown := [suite for suite in asked if suite not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {' or '.join(SUITES)}")
    found: dict[str, Any] = {"schema_version": 1, "machine": measure_machine().to_json(), "repeats": repeats}
    if "packed" in asked:
        found["packed"] = packed(out, shape, repeats)
    if "float" in asked:
        found["float"] = floating(out, float_shape, recipe)
    write_json(out / "export.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found)


def packed(out: Path, shape: str, repeats: int) -> dict[str, Any]:
    """rlkit and the stock builder in turns on the same checkpoint, after a turn of each that is not counted."""
    folder = _made(out / f"packed-{shape}", "write_packed", shape)
    runs: list[Run] = []
    for turn in range(repeats + 1):
        pair = [("rlkit", _rlkit(folder)), ("stock", _stock(folder))]
        for who, words in pair if turn % 2 else reversed(pair):  # so that neither always finds the other's cache warm
            run = timed(who, words, out / "work")
            console.say(f"{who}, turn {turn}: {run.seconds:.1f} s, {console.nbytes_text(run.peak_nbytes)}")
            if turn:
                runs.append(run)
    return compared(shape, runs)


def compared(shape: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of seconds and largest peaks, their ratios to the stock builder's, and whether the bars are met."""
    mine, stock = ([run for run in runs if run.who == who] for who in ("rlkit", "stock"))
    seconds = [statistics.median(run.seconds for run in side) for side in (mine, stock)]
    peaks = [max(run.peak_nbytes for run in side) for side in (mine, stock)]
    off = _off_plan(mine[0])
    ratios = {"seconds_ratio": seconds[0] / seconds[1], "peak_ratio": peaks[0] / peaks[1], "off_plan": off}
    met = ratios["seconds_ratio"] <= TIME_BAR and ratios["peak_ratio"] <= MEMORY_BAR and abs(off) <= BYTES_BAR
    return {"shape": shape, "runs": [asdict(run) for run in runs], **ratios, "met": met}


def floating(out: Path, shape: str, recipe: str) -> dict[str, Any]:
    """The peak of one export of a float model, against the model's size."""
    folder = _made(out / f"float-{shape}", "write_random", shape)
    run = timed("rlkit", [*_rlkit(folder), "--recipe", recipe], out / "work")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    limit, off = int(stored * FLOAT_FACTOR + FLOAT_SPARE), _off_plan(run)
    facts = {"shape": shape, "recipe": recipe, "float_nbytes": stored, "limit_nbytes": limit, "off_plan": off}
    return {**facts, "runs": [asdict(run)], "met": run.peak_nbytes <= limit and abs(off) <= BYTES_BAR}


def show(found: dict[str, Any]) -> None:
    """The results as tables."""
    for suite in SUITES:
        if suite not in found:
            continue
        part = found[suite]
        rows = [
            (run["who"], f"{run['seconds']:.1f}", *(console.nbytes_text(run[key]) for key in ("peak_nbytes", "nbytes")))
            for run in part["runs"]
        ]
        console.table(("exporter", "s", "peak", "bundle"), rows, title=f"{suite}: {part['shape']}")
        if suite == "packed":
            console.emit(
                f"time {part['seconds_ratio']:.2f} of the stock builder's (bar {TIME_BAR:.2f}), "
                f"peak {part['peak_ratio']:.2f} (bar {MEMORY_BAR:.2f})"
            )
        else:
            stored, limit = (console.nbytes_text(part[key]) for key in ("float_nbytes", "limit_nbytes"))
            console.emit(f"the float model has {stored}; the bar is a peak of {limit}")
        console.emit(f"bundle {100 * part['off_plan']:+.2f} % off its plan (bar {100 * BYTES_BAR:.0f} %)")
        console.emit("bars met" if part["met"] else "BARS NOT MET")


def _off_plan(run: Run) -> float:
    """By which share the files are larger than planned."""
    if not run.planned_nbytes:
        raise ValueError(f"the bundle of {run.who} states no plan; export it with this rlkit")
    return run.nbytes / run.planned_nbytes - 1


def _made(folder: Path, function: str, shape: str) -> Path:
    """A stand-in model, made in a process of its own, so that this one stays small."""
    what = "standin.W4W2_G128" if function == "write_packed" else "standin.byte_tokenizer()"
    program = (
        "import sys, pathlib\n"
        "from rlkit.recover import standin\n"
        f"standin.{function}(standin.SHAPES[sys.argv[1]], {what}, pathlib.Path(sys.argv[2]))"
    )
    if not folder.is_dir():
        console.say(f"making {folder}")
        subprocess.run([sys.executable, "-c", program, shape, str(folder)], check=True)
    return folder


def _rlkit(folder: Path) -> list[str]:
    return ["rlkit.apps.cli", "export", str(folder), "-o", "OUT", "--no-measure", "--json"]


def _stock(folder: Path) -> list[str]:
    words = ["-i", str(folder), "-o", "OUT", "-p", "int4", "-e", "cpu", "-c", "CACHE", "--extra_options"]
    return [BUILDER, *words, "shared_embeddings=true", "accuracy_level=4", "hf_token=false"]


def timed(who: str, words: Sequence[str], work: Path) -> Run:
    """One export in a process of its own; what it writes is measured and removed."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    places = {"OUT": str(work / "out"), "CACHE": str(work / "cache")}
    command = [sys.executable, "-c", CHILD, str(work / "peak.json"), *(places.get(word, word) for word in words)]
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise OSError(f"{who} failed with exit code {done.returncode}: {last}; run it alone to see more")
    out = work / "out"
    nbytes = sum(file.stat().st_size for file in out.iterdir() if file.name.endswith((".onnx", ".onnx.data")))
    peak = jsonlib.loads((work / "peak.json").read_text())["peak_nbytes"]
    planned = read_json(out / "rlkit.json")["plan"]["nbytes"] if (out / "rlkit.json").is_file() else None
    shutil.rmtree(work)
    return Run(who, seconds, peak, nbytes, planned)


if __name__ == "__main__":
    typer.run(main)
