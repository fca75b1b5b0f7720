"""Would every node of a written ONNX file run fast on the target? The runtime does not say when it does not.

Works on anybody's model: graphs inside nodes and local functions are walked too, and of the weights only types, shapes
and places are looked at, so that a file of many gigabytes is checked in the time its graph takes to parse. `rules` says
what is asked of each node; here files and folders are found, read and reported on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rlkit.export import rules
from rlkit.export.kvscales import SCHEMES, file_name
from rlkit.export.rules import Finding, Site
from rlkit.export.targets import TARGETS, Target, target_named
from rlkit.recover.source import read_json

__all__ = ["Finding", "Linted", "lint_file", "lint_folder", "lint_model", "lint_path"]

CONFIG, MANIFEST, LUT = "genai_config.json", "rlkit.json", "mlas.use_lut_gemm"
_PROVIDERS = {"dml": "dml", "webgpu": "webgpu", "ryzenai": "npu", "vitisai": "npu"}  # as genai_config.json names them


@dataclass(frozen=True, slots=True)
class Linted:
    """What was found, and what could not be checked (`notes`); nodes counts all that were looked at."""

    target: Target
    files: tuple[str, ...]
    nodes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target.name,
            "files": list(self.files),
            "nodes": self.nodes,
            "findings": [finding.to_json() for finding in self.findings],
            "notes": list(self.notes),
        }


def lint_file(path: Path, *, target: Target | str | None = None) -> list[Finding]:
    """The findings about an ONNX file or a bundle folder; see `lint_path`."""
    return list(lint_path(path, target).findings)


def lint_path(path: Path, target: Target | str | None = None) -> Linted:
    """Check an ONNX file, anybody's, or the files of a bundle folder.

    A folder's own target counts unless another is given; a file alone is checked for the CPU. Raises FileNotFoundError
    or ValueError, one line with the remedy, if something cannot be read.
    """
    where = target_named(target) if isinstance(target, str) else target
    if path.is_dir():
        return lint_folder(path, where)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give an .onnx file or a bundle folder")
    return _lint_files(path.parent, [path.name], where or TARGETS["cpu"], lut=False)


def lint_folder(folder: Path, target: Target | None = None) -> Linted:
    """Check the models that a folder's genai_config.json names, and those with other KV caches beside them.

    All .onnx files are checked where there is no such configuration.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    names = sorted(set(_file_names(config))) or sorted(file.name for file in folder.glob("*.onnx"))
    caches = {file_name(name, scheme) for name in _file_names(config) for scheme in SCHEMES if not _leaves(name)}
    names += sorted(name for name in caches - {*names} if (folder / name).is_file())
    if not names:
        raise ValueError(f"{folder} holds no model: no {CONFIG} and no .onnx file; give a bundle folder")
    for name in names:
        if _leaves(name):
            raise ValueError(f"{folder / CONFIG} names {name!r}, outside its folder; correct it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its {CONFIG} names; export it again")
    own, note = _target_of(folder, config)
    lut = any(str(options.get(LUT, "0")) == "1" for options in _session_options(config))
    linted = _lint_files(folder, names, target or own, lut=lut)
    notes = linted.notes if target is not None or not note else (note, *linted.notes)
    return Linted(linted.target, linted.files, linted.nodes, linted.findings, notes)


def lint_model(model: ir.Model, target: Target, *, lut: bool = False) -> list[Finding]:
    """Check a graph in memory."""
    return [finding for site in _sites(model, target, lut) for finding in rules.check(site)]


def _lint_files(folder: Path, names: list[str], target: Target, *, lut: bool) -> Linted:
    findings: list[Finding] = []
    notes: list[str] = []
    nodes, decided_by_lut = 0, False
    for name in names:
        model = _load(folder / name)
        prefix = f"{name}: " if len(names) > 1 else ""
        for site in _sites(model, target, lut, prefix):
            nodes += 1
            decided_by_lut = decided_by_lut or rules.by_lut(site)
            findings += rules.check(site)
        wrong, missing = _external_data(model, folder, prefix)
        findings += wrong
        notes += missing
    if decided_by_lut:
        findings.append(_LUT_FINDING)
    return Linted(target, tuple(names), nodes, tuple(findings), tuple(dict.fromkeys(notes)))


_LUT_FINDING = Finding(
    CONFIG,
    "session option",
    f"{LUT} is on and takes 2-bit products from the int8 kernels, which prefill about twice as fast since 1.28",
    "remove the option, and write accuracy_level 4 into 2-bit nodes",
    "slow",
)


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no readable ONNX model ({line}); export it again") from error


def _sites(model: ir.Model, target: Target, lut: bool, prefix: str = "") -> Iterator[Site]:
    """Every node of the graph, of graphs inside it, and of local functions; calls of functions are not nodes."""
    local = {(function.domain, function.name) for function in model.functions.values()}
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) not in local:
            yield Site(node, target, prefix, lut)
    for function in model.functions.values():
        parameters = frozenset(id(value) for value in function.inputs)
        for node in function.all_nodes():
            if (node.domain, node.op_type) not in local:
                yield Site(node, target, f"{prefix}function {function.name}: ", lut, parameters)


def _external_data(model: ir.Model, folder: Path, prefix: str) -> tuple[list[Finding], list[str]]:
    """Tensors that lie outside the file: misplaced or cut off (findings), or not there (notes)."""
    findings: list[Finding] = []
    missing: dict[str, int] = {}
    for tensor in _external_tensors(model):
        location = str(tensor.location)
        if _leaves(location):
            reason = f"its data lies in {location!r}, outside the model's folder, where the runtime does not look"
            findings.append(_about(tensor, prefix, reason, "put the data beside the model"))
        elif not (folder / location).is_file():
            missing[location] = missing.get(location, 0) + 1
        elif (tensor.offset or 0) + (tensor.length or tensor.nbytes) > (folder / location).stat().st_size:
            reason = f"its data ends behind the end of {location}"
            findings.append(_about(tensor, prefix, reason, "fetch or export the file again"))
    notes = [f"{name} is missing: the data of {count} tensors was not checked" for name, count in missing.items()]
    return findings, notes


def _leaves(name: str) -> bool:
    """Whether a relative name points out of its folder. Links may: the hub's cache is made of them."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def _about(tensor: ir.ExternalTensor, prefix: str, reason: str, fix: str) -> Finding:
    return Finding(f"{prefix}{tensor.name}", "initializer", reason, fix, "unsupported")


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def _file_names(config: Any) -> Iterator[str]:
    """Every value of a key `filename` that names an ONNX file, wherever it stands."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "filename" and isinstance(value, str) and value.endswith(".onnx"):
                yield value
            yield from _file_names(value)
    elif isinstance(config, list):
        for item in config:
            yield from _file_names(item)


def _session_options(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        if isinstance(config.get("session_options"), dict):
            yield config["session_options"]
        for value in config.values():
            yield from _session_options(value)
    elif isinstance(config, list):
        for item in config:
            yield from _session_options(item)


def _target_of(folder: Path, config: dict[str, Any]) -> tuple[Target, str]:
    """What the folder was made for, by its manifest or its provider options; a note where that is a guess."""
    if (folder / MANIFEST).is_file():
        name = read_json(folder / MANIFEST).get("target")
        if isinstance(name, str):
            return target_named(name), ""
    named = [str(name) for options in _session_options(config) for name in _provider_names(options)]
    for name in named:
        if name.lower() in _PROVIDERS:
            return TARGETS[_PROVIDERS[name.lower()]], ""
    unknown = f"no rules are known for the provider {named[0]}: checked for the CPU" if named else ""
    return TARGETS["cpu"], unknown


def _provider_names(options: dict[str, Any]) -> Iterator[str]:
    listed = options.get("provider_options")
    for entry in listed if isinstance(listed, list) else ():
        yield from entry if isinstance(entry, dict) else ()
