"""Packages that cannot live together, cannot be installed, or are not what their name says.

The runtime's wheels share one Python package: whichever was installed last has written its files over the others', and
removing one leaves the rest broken. Sources: the wheels' own metadata and the public index, 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

from rlkit.runtime.findings import Finding, Level
from rlkit.runtime.providers import GENAIS, RUNTIMES
from rlkit.runtime.surroundings import Surroundings

AREA = "packages"
OURS = "rlkit-edge"
MALWARE = "onnxruntime-winml"
WATCHED = ("onnxruntime", "onnxruntime-genai", "numpy", "onnx", "onnx-ir", "transformers", "torch", "safetensors")
STALE = {"onnxruntime-genai-directml-ryzenai": (0, 14), "model-generate": (1, 8)}  # the oldest from AMD's own index


def clashes(around: Surroundings, wanted: dict[str, str] | None = None) -> Iterator[Finding]:
    """Everything that is wrong with the installed packages; `wanted` are ranges of versions, ours unless told."""
    yield from _unimportable(around)
    yield from _several(around, RUNTIMES, "onnxruntime")
    yield from _several(around, GENAIS, "onnxruntime_genai")
    yield from _mismatched(around)
    yield from _outside(around, requirements() if wanted is None else wanted)
    yield from _particular(around)


def _unimportable(around: Surroundings) -> Iterator[Finding]:
    for problem in around.problems:
        fix = "pip install --force-reinstall --no-deps " + " ".join(
            around.installed("onnxruntime", "onnxruntime-genai") or ("onnxruntime", "onnxruntime-genai")
        )
        yield Finding(AREA, problem.split()[0], Level.ERROR, problem, fix)


def _several(around: Surroundings, family: dict[str, str], module: str) -> Iterator[Finding]:
    found = around.installed(*family)
    if len(found) > 1:
        names = " and ".join(f"{name} {around.packages[name]}" for name in found)
        text = f"{names} write over each other, as all of them are the Python package {module}"
        keep = found[-1] if module not in ("onnxruntime",) or "onnxruntime" not in found else "onnxruntime"
        fix = f"pip uninstall -y {' '.join(found)} && pip install {keep}   (or another one of them: only one)"
        yield Finding(AREA, module, Level.WARNING, text, fix)
    if not found:
        yield Finding(AREA, module, Level.ERROR, f"no {module} is installed", f"pip install {next(iter(family))}")


def _mismatched(around: Surroundings) -> Iterator[Finding]:
    """genai's variants load the runtime that is there, made for it or not."""
    runtimes, genais = around.installed(*RUNTIMES), around.installed(*GENAIS)
    if len(runtimes) == 1 and len(genais) == 1 and GENAIS[genais[0]] != runtimes[0]:
        if genais[0] == "onnxruntime-genai" and runtimes[0] in ("onnxruntime-gpu", "onnxruntime-webgpu"):
            return  # the plain genai runs on them
        text = f"{genais[0]} is made for {GENAIS[genais[0]]}, but {runtimes[0]} is installed"
        yield Finding(
            AREA,
            genais[0],
            Level.WARNING,
            text,
            f"pip uninstall -y {runtimes[0]} && pip install {GENAIS[genais[0]]}   (in an environment of its own)",
        )


def _outside(around: Surroundings, wanted: dict[str, str]) -> Iterator[Finding]:
    for name, versions in wanted.items():
        version = around.packages.get(name)
        if version is not None and not within(version, versions):
            level = Level.ERROR if name in ("onnxruntime", "onnxruntime-genai") else Level.WARNING
            text = f"{name} {version} is outside of what rlkit was tested with, {versions}"
            yield Finding(AREA, name, level, text, f'pip install "{name}{versions}"')


def _particular(around: Surroundings) -> Iterator[Finding]:
    packages = around.packages
    if MALWARE in packages:
        text = f"{MALWARE} was reported as malware and removed from the index; nothing that ran here can be trusted"
        fix = f"pip uninstall -y {MALWARE}, change the passwords and tokens of this account, set the machine up anew"
        yield Finding(AREA, MALWARE, Level.ERROR, text, fix)
    if numbers(packages.get("onnxruntime-genai-directml", "0"))[:2] >= (0, 14):
        text = "it asks for onnxruntime-directml 1.26 or newer, which does not exist: 1.24.4 was the last"
        fix = "pip install onnxruntime-genai-directml==0.13.1 onnxruntime-directml==1.24.4"
        yield Finding(AREA, "onnxruntime-genai-directml", Level.WARNING, text, fix)
    if "optimum-onnx" in packages:
        text = "optimum-onnx asks for transformers below 4.58, rlkit's recovery and export for 5.23 or newer"
        yield Finding(AREA, "optimum-onnx", Level.WARNING, text, "keep optimum-onnx in an environment of its own")
    for name, oldest in STALE.items():
        if name in packages and numbers(packages[name]) < oldest:
            text = f"{name} {packages[name]} from the public index is old; AMD's own index has the current one"
            yield Finding(AREA, name, Level.WARNING, text, f"pip uninstall -y {name}; install Ryzen AI 1.8 instead")
    for name, version in packages.items():
        if name.startswith("onnxruntime-ep-") and version == "0.0.0":
            text = f"{name} 0.0.0 is a placeholder that holds nothing"
            yield Finding(AREA, name, Level.NOTE, text, f"pip uninstall -y {name}")


def requirements() -> dict[str, str]:
    """The versions that rlkit asks for, of the packages that matter here; extras among them."""
    try:
        lines = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name, versions = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)", line).groups()  # type: ignore[union-attr]
        if name in WATCHED and versions.strip():
            found.setdefault(name, versions.strip())
    return found


def within(version: str, versions: str) -> bool:
    """Whether 1.31.1 is within ">=1.31,<1.32"; conditions other than ==, >=, <=, <, > are not held against it."""
    mine = numbers(version)
    for condition in versions.split(","):
        matched = re.match(r"\s*(==|>=|<=|<|>)\s*([0-9.]+)", condition)
        if matched is None:
            continue
        sign, bound = matched.group(1), numbers(matched.group(2))
        size = max(len(mine), len(bound))
        a, b = (part + (0,) * (size - len(part)) for part in (mine, bound))
        if not {"==": a == b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b}[sign]:
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of 2.13.0+cpu or 2.13.0rc1."""
    matched = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in matched.group().split(".")) if matched else (0,)
