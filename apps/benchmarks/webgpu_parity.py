"""Does WebGPU compute what the CPU computes? Single operators and whole tiny W4/W2 models, also where there is no GPU.

    python -m rlkit.apps.benchmarks.webgpu_parity -o ./bench-webgpu

Both sides are providers of one onnxruntime-webgpu, which lives in an environment of its own (made in the output folder
unless --python names one), as it cannot be installed beside onnxruntime. Without a GPU it runs on the software Vulkan
driver that comes with Chromium; docs/webgpu.md says what was found. Exit code 1: something differs that should not;
77: it could not be tried, with the reason.
"""

from __future__ import annotations

import ctypes
import json as json_text
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from numpy.typing import NDArray

from rlkit.apps import console
from rlkit.apps.benchmarks import webgpu_cases as cases
from rlkit.apps.benchmarks import webgpu_models
from rlkit.profiles.machine import cpu_name
from rlkit.recover.atomic import write_json
from rlkit.runtime import onnxjobs

RUNTIME = "onnxruntime-webgpu==1.27.0"
WEBGPU = "WebGpuExecutionProvider"
LIMIT = 1e-4  # of the largest value
SKIPPED = 77
SOFTWARE_DRIVERS = (Path("/usr/lib/chromium/vk_swiftshader_icd.json"),)

Arrays = dict[str, NDArray[Any]]


class Unavailable(Exception):
    """Why the comparison cannot be made here."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another environment's interpreter, what its processes see of Vulkan, and a folder for jobs and arrays."""

    python: Path
    variables: dict[str, str]
    folder: Path

    def run(self, jobs: list[dict[str, Any]], label: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Run jobs there: what that runtime is, and the answer to each job by name."""
        asked = self.folder / f"{label}.json"
        write_json(asked, {"threads": 1, "jobs": jobs})
        command = [str(self.python), "-I", onnxjobs.__file__, str(asked)]
        environment = {**os.environ, **self.variables}
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
        lines = [json_text.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise Unavailable(f"{self.python} cannot run onnxruntime: {_last_line(done.stderr)}")
        if len(lines) != len(jobs) + 1:
            raise RuntimeError(
                f"the runtime ended after {len(lines) - 1} of {len(jobs)} jobs: {_last_line(done.stderr)}"
            )
        return lines[0], {line["name"]: line for line in lines[1:]}


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the environment, models and results.")] = Path(
        "bench-webgpu"
    ),
    python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with onnxruntime-webgpu.")] = None,
    driver: Annotated[
        str, typer.Option(help="Vulkan driver's .json file, 'system', or 'software' (Chromium's).")
    ] = "software",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Compare WebGPU with the CPU and print the largest errors."""
    try:
        found = compare(out, python, driver)
    except Unavailable as reason:
        console.emit(f"SKIPPED: {reason}")
        raise typer.Exit(SKIPPED) from reason
    except RuntimeError as error:  # the runtime's own, in one line
        console.emit(f"FAILED: {error}")
        raise typer.Exit(1) from error
    write_json(out / "webgpu-parity.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found)
    raise typer.Exit(0 if found["passed"] else 1)


def compare(out: Path, python: Path | None = None, driver: str = "software") -> dict[str, Any]:
    """All comparisons as one report. Raises Unavailable where the runtime or a device for it cannot be had."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    elsewhere = Elsewhere((python or environment(out / "env")).absolute(), vulkan(driver), work_folder(out))
    facts, products = compare_probes(elsewhere, cases.products(), "products")
    subgroup = min((device["subgroup"] for device in facts["vulkan"]), default=0)
    _, attentions = compare_probes(elsewhere, cases.attentions(), "attentions", subgroup)
    bundles = {
        family: webgpu_models.tiny_bundle(family, (out / "models").absolute()) for family in webgpu_models.FAMILIES
    }
    models = [compare_model(elsewhere, family, bundle, subgroup) for family, bundle in bundles.items()]
    rows = [*products, *attentions]
    return {
        "schema_version": 1,
        "limit": LIMIT,
        "runtime": facts["onnxruntime"],
        "vulkan": facts["vulkan"],
        "cpu": cpu_name(),
        "products": products,
        "attentions": attentions,
        "models": models,
        "passed": all(row["passed"] for row in [*rows, *models]),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),  # with those of the processes that ran the jobs
    }


def environment(folder: Path, runtime: str = RUNTIME) -> Path:
    """The interpreter of an environment with the runtime; it is made unless it is there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = folder / "made"  # written last, so that half an environment is made again
    if made.is_file() and made.read_text() == runtime:
        return python
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "-q", runtime],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"no environment with {runtime}: {_last_line(done.stderr or done.stdout)}")
    made.write_text(runtime)
    return python


def vulkan(driver: str) -> dict[str, str]:
    """Environment variables that make the Vulkan loader take this driver, and be found itself."""
    if driver == "system":
        return {}
    candidates = SOFTWARE_DRIVERS if driver == "software" else (Path(driver),)
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise Unavailable(f"no Vulkan driver at {', '.join(map(str, candidates))}; install Debian's package chromium")
    variables = {"VK_ICD_FILENAMES": str(file), "VK_DRIVER_FILES": str(file)}
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:  # Chromium brings a loader of its own
        variables["LD_LIBRARY_PATH"] = str(file.parent)
    return variables


def work_folder(out: Path) -> Path:
    """An empty folder for jobs, models and arrays."""
    folder = out / "work"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    return folder.absolute()


def compare_probes(
    elsewhere: Elsewhere, asked: Sequence[cases.Case], label: str, subgroup: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every single-node model on both providers: what the runtime is, and a row per case."""
    jobs, feeds = [], []
    for index, case in enumerate(asked):
        probe = cases.probe(case, seed=index)
        stem = elsewhere.folder / f"{label}-{index}"
        stem.with_suffix(".onnx").write_bytes(probe.model.SerializeToString())
        onnxjobs.save_arrays(stem.with_suffix(".npz"), probe.feeds)
        feeds.append(probe.feeds)
        jobs += [_job(f"{index} {short}", stem, provider, short) for short, provider in _PROVIDERS.items()]
    facts, answers = elsewhere.run(jobs, label)
    _refuse_no_device(facts, answers)
    rows = []
    for index, case in enumerate(asked):
        said = {short: answers[f"{index} {short}"].get("error") for short in _PROVIDERS}
        stem = elsewhere.folder / f"{label}-{index}"
        outputs = {short: onnxjobs.load_arrays(_out(stem, short)) for short in _PROVIDERS if said[short] is None}
        rows.append(cases.judge(case, feeds[index], outputs, said, LIMIT, subgroup))
    return facts, rows


_PROVIDERS = {"cpu": onnxjobs.CPU, "webgpu": WEBGPU}


def _job(name: str, stem: Path, provider: str, short: str) -> dict[str, Any]:
    runs = [{"feeds": str(stem.with_suffix(".npz")), "out": str(_out(stem, short))}]
    model = str(stem.with_suffix(".onnx"))
    return {"name": name, "model": model, "provider": provider, "strict": provider == WEBGPU, "runs": runs}


def _out(stem: Path, short: str) -> Path:
    return stem.with_name(f"{stem.name}-{short}.npz")


def _refuse_no_device(facts: dict[str, Any], answers: dict[str, dict[str, Any]]) -> None:
    if WEBGPU not in facts["providers"]:
        raise Unavailable(f"onnxruntime {facts['onnxruntime']} has no {WEBGPU}; use {RUNTIME}")
    for answer in answers.values():
        if "WebGPU adapter" in answer.get("error", ""):
            raise Unavailable("WebGPU finds no device; install a Vulkan driver, or use --driver software")


def compare_model(elsewhere: Elsewhere, name: str, bundle: Path, subgroup: int) -> dict[str, Any]:
    """A bundle, run as a whole and node by node on what the CPU had computed."""
    from rlkit.export import probes

    path = bundle / "model.onnx"
    whole = elsewhere.folder / "whole.onnx"
    whole.write_bytes(probes.exposed(path).SerializeToString())
    operators = probes.operators(path)
    values = _cpu_values(elsewhere, whole, bundle)
    first = next(iter(values.values()))
    parts = elsewhere.folder / "parts.onnx"
    model = probes.cut(path, first)
    parts.write_bytes(model.SerializeToString())
    for step, stored in values.items():
        onnxjobs.save_arrays(elsewhere.folder / f"{step}-parts.npz", probes.cut_feeds(model, stored))
    jobs = [_model_job(elsewhere, whole, list(values), "webgpu"), _model_job(elsewhere, parts, list(values), "parts")]
    _, answers = elsewhere.run(jobs, "model")
    for answer in answers.values():
        if "error" in answer:
            raise RuntimeError(f"{name} does not run on WebGPU: {answer['error']}")
    steps = []
    for step in values:
        found = {
            short: onnxjobs.load_arrays(elsewhere.folder / f"{step}-{short}.out.npz") for short in ("webgpu", "parts")
        }
        steps.append(cases.judge_step(step, values[step], found, operators, LIMIT, subgroup))
    return {
        "name": name,
        "steps": steps,
        "placed": answers["parts"]["placed"],
        "passed": all(step["passed"] for step in steps),
    }


def _model_job(elsewhere: Elsewhere, model: Path, steps: Sequence[str], kind: str) -> dict[str, Any]:
    feeds = "parts" if kind == "parts" else "feeds"
    runs = [
        {
            "feeds": str(elsewhere.folder / f"{step}-{feeds}.npz"),
            "out": str(elsewhere.folder / f"{step}-{kind}.out.npz"),
        }
        for step in steps
    ]
    provider = onnxjobs.CPU if kind == "cpu" else WEBGPU
    return {"name": kind, "model": str(model), "provider": provider, "strict": False, "runs": runs}


def _cpu_values(elsewhere: Elsewhere, whole: Path, bundle: Path) -> dict[str, Arrays]:
    """Step -> inputs and every value on the CPU; a step's cache is what the CPU's step before left."""
    values: dict[str, Arrays] = {}
    before: Arrays = {}
    for step in cases.STEPS:
        feeds = cases.step_feeds(step, bundle, before)
        onnxjobs.save_arrays(elsewhere.folder / f"{step.name}-feeds.npz", feeds)
        _, answers = elsewhere.run([_model_job(elsewhere, whole, [step.name], "cpu")], "cpu")
        if "error" in answers["cpu"]:
            raise RuntimeError(f"{bundle.name} does not run on the CPU: {answers['cpu']['error']}")
        found = onnxjobs.load_arrays(elsewhere.folder / f"{step.name}-cpu.out.npz")
        values[step.name] = {**found, **feeds}
        before = found
    return values


def show(found: dict[str, Any]) -> None:
    """Print a report as tables."""
    devices = ", ".join(f"{device['name']} (subgroups of {device['subgroup']})" for device in found["vulkan"])
    console.emit(f"onnxruntime {found['runtime']} on {devices or 'the system device'}, {found['cpu']}")
    console.table(("MatMulNBits", "cases", "largest error", "at"), _by_width(found["products"]))
    rows = [cases.cells(row) for row in found["attentions"]]
    console.table(("GroupQueryAttention", "error", "to the shader's model", ""), rows)
    for model in found["models"]:
        _show_model(model)
    console.emit(
        f"{'passed' if found['passed'] else 'FAILED'} in {found['seconds']} s ({found['cpu_seconds']} s of CPU time)"
    )


def _by_width(rows: list[dict[str, Any]]) -> list[tuple[str, int, str, str]]:
    """One line for each width and accuracy level, and one for every case that fails."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = row["name"].split()
        kinds.setdefault(f"{words[0]}, level {words[-1]}", []).append(row)
    lines = []
    for kind, members in kinds.items():
        worst = max(members, key=lambda row: row["error"] or 0.0)
        lines.append((kind, len(members), cases.cells(worst)[1], worst["name"]))
        lines += [
            ("", 1, cases.cells(row)[1], f"FAILED {row['name']} {row['note']}") for row in members if not row["passed"]
        ]
    return lines


def _show_model(model: dict[str, Any]) -> None:
    steps = model["steps"]
    errors: dict[str, dict[str, str]] = {row["op"]: {} for step in steps for row in step["operators"]}
    for step in steps:
        for row in step["operators"]:
            errors[row["op"]][step["name"]] = f"{row['error']:.1e}"
    names = [step["name"] for step in steps]
    rows = [(op, *(by_step.get(name, "") for name in names)) for op, by_step in errors.items()]
    title = f"{model['name']}: {steps[0]['nodes']} values, node by node on the CPU's, largest error"
    console.table(("operator", *names), rows, title=title)
    for step in steps:
        first = f"first to differ: {step['first'] or 'none'}"
        verdict = "" if step["passed"] else "; FAILED"
        console.emit(f"{step['name']}: logits of the whole model off by {step['logits']:.1e}; {first}{verdict}")
    outside = [op for op, providers in model["placed"].items() if providers != [WEBGPU]]
    console.emit(f"operators that WebGPU left to the CPU provider: {', '.join(outside) or 'none'}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    typer.run(main)
