"""Checkpoint folder -> bundle folder: the stock GenAI builder makes the graph, our passes finish it.

    read_checkpoint -> plan -> builder -> graph passes -> lint -> bundle

The builder is the one place of this room that imports torch, and only when it runs. It works offline: a checkpoint
folder holds all it needs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from rlkit.export import bundle
from rlkit.export.inventory import Adapter, Inventory, adapter_tensor, read_checkpoint
from rlkit.export.plan import EXACT, Plan, plan_inventory
from rlkit.recover.atomic import fresh_folder, need_space, refuse_existing
from rlkit.recover.progress import Progress, Tell, silent

_LAYER_LINE = re.compile(r"Reading layer (\d+)")
_SPARE_NBYTES = 64 * 2**20  # tokenizer, manifests, and the room a file system wants


def export_bundle(  # noqa: PLR0913, the options of one command
    checkpoint: Path,
    out: Path,
    *,
    target: str = "cpu",
    accuracy_level: int = 4,
    threads: int | None = None,
    force: bool = False,
    tell: Tell = silent,
    measure: bundle.Measure | None = None,
) -> Path:
    """Export a checkpoint folder to the bundle folder `out`, which is complete or absent; return `out`.

    `accuracy_level` 4 multiplies in int8, the only fast form of 2 and 8 bits; 0 is exact and slow, for checks.
    `threads` is written into the bundle; None means the cores this process may use. `measure` gets the finished folder
    before it is renamed; what it returns becomes the manifest's `divergence`.

    Raises FileNotFoundError, FileExistsError, OSError (no space) or ValueError, one line with the remedy.
    """
    refuse_existing(out, force=force)
    _refuse_foreign(out)
    inventory = read_checkpoint(checkpoint)
    plan = plan_inventory(inventory, target=target, accuracy_level=accuracy_level)
    settings = bundle.Settings(plan, threads)
    need_space(out.parent, 2 * plan.nbytes + _SPARE_NBYTES)
    tell(Progress("builder", 0, inventory.shape.layers, "loading"))
    _import_builder()
    with fresh_folder(out, force=force) as work:
        built = work / ".build"
        _run_builder(checkpoint, inventory, plan, built, tell)
        tensors = _finish_graph(checkpoint, inventory, plan, built, work, tell)
        bundle.finish(bundle.Parts(work, built, checkpoint, inventory, tensors), settings, measure=measure, tell=tell)
    return out


def _refuse_foreign(out: Path) -> None:
    """--force replaces bundles, not whatever folder a slip of the hand names."""
    if out.is_dir() and any(out.iterdir()) and not (out / "genai_config.json").is_file():
        raise ValueError(f"{out} holds something that is no bundle, so it is not replaced; choose another -o")
    if out.is_file():
        raise ValueError(f"{out} is a file, so no bundle folder can take its place; choose another -o")


def _finish_graph(
    checkpoint: Path, inventory: Inventory, plan: Plan, built: Path, work: Path, tell: Tell
) -> list[dict[str, Any]]:
    from rlkit.export import graph, lint

    tell(Progress("graph", 0, 1))
    model = graph.load(built / bundle.MODEL)
    graph.square_scales(model)
    graph.set_accuracy_level(model, plan.accuracy_level)
    for adapter, a, b in _adapters(checkpoint, inventory):
        graph.add_adapter(model, adapter, a, b, level=plan.accuracy_level)
    graph.save(model, work / bundle.MODEL)
    tensors = [tensor.to_json() for tensor in graph.stored_tensors(model)]
    tell(Progress("graph", 1, 1))
    findings = lint.lint_file(work / bundle.MODEL, target=plan.target.name)
    if findings and plan.accuracy_level != EXACT:
        first = findings[0]
        raise ValueError(f"{len(findings)} nodes would run slowly, first {first.node}: {first.reason}; {first.fix}")
    tell(Progress("lint", 1, 1, f"{len(findings)} findings"))
    return tensors


def _adapters(
    checkpoint: Path, inventory: Inventory
) -> Iterator[tuple[Adapter, NDArray[np.float32], NDArray[np.float32]]]:
    from safetensors.numpy import load_file

    if not inventory.adapters:
        return
    stored = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    for module, adapter in inventory.adapters.items():
        a, b = (stored[adapter_tensor(module, letter)].astype(np.float32) for letter in "AB")
        yield adapter, a, b


def _import_builder() -> Any:
    """The builder's module. Imported before anything is written: third-party imports may swallow a Ctrl-C."""
    with _quiet(None):
        from onnxruntime_genai.models import builder
    return builder


def _run_builder(checkpoint: Path, inventory: Inventory, plan: Plan, built: Path, tell: Tell) -> None:
    """Let the stock builder write its folder `built`; its complaints become one-line ValueErrors."""
    builder, layers = _import_builder(), inventory.shape.layers

    def heard(line: str) -> None:
        match = _LAYER_LINE.match(line)
        if match:
            tell(Progress("builder", int(match[1]) + 1, layers))

    with _quiet(heard), _offline():
        folder, cache = str(checkpoint), str(built / ".cache")
        arguments = (folder, folder, str(built), "int4", plan.target.provider, cache)
        try:
            options = builder.parse_extra_options(*arguments, _builder_options(inventory, plan))
            builder.create_model(*arguments, **options)
        except (NotImplementedError, ValueError, KeyError) as error:
            line = str(error).strip().split("\n")[0]
            raise ValueError(f"the model builder refuses {checkpoint}: {line}; see `rlkit inspect`") from error
    shutil.rmtree(built / ".cache", ignore_errors=True)


def _builder_options(inventory: Inventory, plan: Plan) -> list[str]:
    options = [
        f"shared_embeddings={str(inventory.shape.tied).lower()}",
        f"accuracy_level={plan.accuracy_level}",
        "hf_token=false",
    ]
    if "lm_head" not in inventory.packed:  # the builder would quantize it to 4 bits by itself
        options.append("nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather")
    if any(module.endswith(("q_proj", "k_proj", "v_proj")) for module in inventory.adapters):
        options.append("fuse_qkv=false")  # so that each has a node for its branch
    return options


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Forbid the hub's client to use the network: everything is in the folder."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(heard: Any) -> Iterator[None]:
    """Hear what this thread prints instead of showing it; other threads (progress bars) print as ever."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out, err = _Ear(sys.stdout, heard), _Ear(sys.stderr, None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:  # the builder's imports set up logging for the whole process
            root.setLevel(level)
            root.handlers[:] = handlers


class _Ear(io.TextIOBase):
    """A text stream that passes each line written by its own thread to `heard`, and the rest on to `stream`."""

    def __init__(self, stream: TextIO, heard: Any) -> None:
        self._stream, self._heard = stream, heard
        self._thread = threading.get_ident()
        self._listening = True

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread or not self._listening:
            return self._stream.write(text)
        if self._heard is not None:
            self._listening = False  # what the listener prints is meant to be seen
            try:
                self._heard(text)
            finally:
                self._listening = True
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
