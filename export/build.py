"""A model on disk -> bundle folder.

    open_store -> plan -> skeleton (the stock builder's graph, no matrices) -> fill -> passes -> write -> lint -> bundle

The graph comes from the configuration, matrices go from the source's file to the bundle's one at a time, so memory is
what the largest of them needs. Everything works offline: the source folder holds all that is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import onnx_ir as ir

from rlkit.export import adapters as adapter_files
from rlkit.export import bundle, fill, graph, lint, offsets, passes, skeleton, write
from rlkit.export.inventory import Adapter, Inventory, adapter_tensor
from rlkit.export.plan import Plan
from rlkit.export.request import Options, Request, found
from rlkit.export.store import Floats, Store, load_adapter
from rlkit.export.targets import Target
from rlkit.recover.atomic import fresh_folder, need_space, refuse_existing
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import Source

OWN_ADAPTER = "recovered"  # the name of the source's own adapter among adapter files
_SPARE_NBYTES = 64 * 2**20  # tokenizer, manifests, and the room a file system wants


def export_bundle(
    source: Source | Path,
    out: Path,
    *,
    force: bool = False,
    tell: Tell = silent,
    measure: bundle.Measure | None = None,
    **options: Unpack[Options],
) -> Path:
    """Export a model or checkpoint to the bundle folder `out`, which is complete or absent; return `out`.

    `measure` gets the finished folder before it is renamed; what it returns becomes the manifest's `divergence`, and
    what it raises leaves nothing behind. Options are those of Request.

    Raises FileNotFoundError, FileExistsError, OSError (no space) or ValueError, one line with the remedy.
    """
    refuse_existing(out, force=force)
    _refuse_foreign(out)
    request, model = Request(**options), found(source)
    store = request.store(model)
    plan = request.plan(store)
    settings = bundle.Settings(plan, request.threads, request.logits, request.recipe, request.mode)
    need_space(out.parent, plan.nbytes + _SPARE_NBYTES)
    tell(Progress("graph", 0, store.inventory.shape.layers, "loading"))
    skeleton.import_builder()
    peft = {name: adapter_files.read_peft(folder) for name, folder in _file_adapters(model, request).items()}
    with fresh_folder(out, force=force) as work, tempfile.TemporaryDirectory() as scratch:
        builder_options = _builder_options(store.inventory, plan.target)
        made = skeleton.make_skeleton(store, plan.target, builder_options, Path(scratch), tell)
        _finish_graph(made.model, store, plan, request, model.path)
        slots = adapter_files.add_inputs(made.model, adapter_files.wanted_modules(peft))
        findings, digest = _write(made.model, work, plan, request, tell)
        files = [adapter_files.write_adapter(work, name, low_ranks, slots) for name, low_ranks in peft.items()]
        parts = bundle.Parts(
            work=work,
            skeleton=made,
            source=model,
            store=store,
            tensors=[tensor.to_json() for tensor in graph.stored_tensors(made.model)],
            adapters=[file.to_json() for file in files],
            findings=findings,
            name=out.name,
            digests={f"{bundle.MODEL}{write.DATA_SUFFIX}": digest},
        )
        bundle.finish(parts, settings, measure=measure, tell=tell)
    return out


def _builder_options(inventory: Inventory, target: Target) -> dict[str, str]:
    """q, k and v as one matrix, unless they are stored differently or one of them has an adapter."""
    schemes: dict[str, set[Any]] = {}
    for layer in range(inventory.shape.layers):
        base = f"model.layers.{layer}.self_attn"
        schemes[base] = {_scheme(inventory, f"{base}.{part}") for part in fill.QKV}
    apart = any(len(kinds) > 1 for kinds in schemes.values())
    adapted = any(module.endswith(fill.QKV) for module in inventory.adapters)
    options = {"fuse_qkv": "false"} if apart or adapted else {}
    if "qk_norm" in target.supports:  # attention that normalizes runs there alone: neither the gate nor WebGPU 1.27
        options["fuse_qk_norm_gqa"] = "false"
    return options


def _scheme(inventory: Inventory, module: str) -> Any:
    packed = inventory.packed.get(module)
    return None if packed is None else (packed.bits, packed.group, packed.zero_points)


def _finish_graph(model: ir.Model, store: Store, plan: Plan, request: Request, source: Path) -> None:
    """Everything between the builder's graph and the one that is written."""
    inventory = store.inventory
    if request.joins:
        passes.join_gate_and_up(model, _joinable(inventory))
    fill.fill(model, store, plan)
    if store.offset_modules:
        offsets.add_offsets(model, inventory, store.offset_modules, store.offsets)
    for adapter, a, b in _branches(inventory, source):
        graph.add_adapter(model, adapter, a, b, level=plan.accuracy_level)


def _joinable(inventory: Inventory) -> frozenset[str]:
    """MLPs whose gate and up are packed alike and have no adapter in the graph."""
    bases = [f"model.layers.{layer}.mlp" for layer in range(inventory.shape.layers)]
    pairs = {base: [f"{base}.{part}" for part in fill.GATE_UP] for base in bases}
    return frozenset(
        base
        for base, pair in pairs.items()
        if len({_scheme(inventory, module) for module in pair} - {None}) == 1
        and all(module in inventory.packed and module not in inventory.adapters for module in pair)
    )


def _branches(inventory: Inventory, source: Path) -> Iterator[tuple[Adapter, Floats, Floats]]:
    """The source's own adapter, module by module."""
    if inventory.adapters:
        stored = load_adapter(source / "adapter")
        for module, adapter in inventory.adapters.items():
            a, b = (stored[adapter_tensor(module, letter)] for letter in "AB")
            yield adapter, a, b


def _file_adapters(source: Source, request: Request) -> dict[str, Path]:
    """PEFT folders to be kept as adapter files, by name."""
    own = {OWN_ADAPTER: source.path / "adapter"} if request.adapters == "files" else {}
    if own and not own[OWN_ADAPTER].is_dir():
        raise ValueError(f"{source.reference} has no adapter to keep as a file; leave --adapters out")
    return {**own, **request.adapter_files}


def _write(model: ir.Model, work: Path, plan: Plan, request: Request, tell: Tell) -> tuple[int, str]:
    """The graph and its constants, then the same with the last token's logits only.

    Returns how many nodes lint faults, and the SHA-256 of the constants.
    """
    digest = write.write_constants(model, work / bundle.MODEL, tell=tell)
    if request.logits == "last":
        write.write_graph(model, work / bundle.ALL_LOGITS)
        passes.keep_last_logits(model)
    write.write_graph(model, work / bundle.MODEL)
    findings = lint.lint_file(work / bundle.MODEL, target=plan.target.name)
    tell(Progress("lint", 1, 1, f"{len(findings)} findings"))
    if findings and not (plan.exact or request.allow_slow):
        first = findings[0]
        why = f"{len(findings)} nodes would run slowly or not at all, first {first.node}: {first.reason}; {first.fix}"
        raise ValueError(f"{why}; --allow-slow ships it all the same")
    return len(findings), digest


def _refuse_foreign(out: Path) -> None:
    """--force replaces bundles, not whatever folder a slip of the hand names."""
    if out.is_dir() and any(out.iterdir()) and not (out / "genai_config.json").is_file():
        raise ValueError(f"{out} holds something that is no bundle, so it is not replaced; choose another -o")
    if out.is_file():
        raise ValueError(f"{out} is a file, so no bundle folder can take its place; choose another -o")
