"""The graph of a model without its matrices: the stock GenAI builder makes it from the configuration alone.

The builder maps a torch model, module by module, to nodes and constants. It gets one whose matrices exist by shape only
(torch's meta device) while norms, biases, sinks and routers are real, read from the store. The graph that comes out is
the one it makes of the whole model; the constants of the big matrices have a name, a type and a shape, but no value
(`hollow`), for `export.fill` to fill one at a time.

    config --builder--> nodes, small constants --take_values--> + hollow constants

Rotary tables are compared with the model's own and replaced where the builder's formula is another (YaRN and linear
scaling of Llamas, local layers of Gemma 3): attention takes any table, so what the model says goes.

Experts of a mixture (GPT-OSS) are not hollow: the builder rounds them itself, one layer in memory at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx_ir as ir

from rlkit.export.families import ADJUSTMENTS, load_experts, translate
from rlkit.export.store import Store
from rlkit.export.targets import Target
from rlkit.recover.progress import Progress, Tell, silent

PRECISION = "int4"  # of the builder's own quantization, which never runs: it decides the type of activations
_POSITIONS = 4096  # of the rotary tables computed at a time
_LAYER_LINE = re.compile(r"Reading layer (\d+)")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A graph whose big matrices have no value yet, its genai_config.json, and the folder of its tokenizer files."""

    model: ir.Model
    config: dict[str, Any]
    folder: Path


def make_skeleton(store: Store, target: Target, options: dict[str, str], folder: Path, tell: Tell = silent) -> Skeleton:
    """Let the stock builder make the graph of the store's model for `target`; everything it writes goes to `folder`.

    `options` are the builder's extra options (prune_lm_head, fuse_qkv, ...). Raises ValueError, one line, where the
    builder refuses the model.
    """
    builder = import_builder()
    source, written = folder / "source", folder / "built"
    store.prepare(source)
    shape = store.inventory.shape

    def heard(line: str) -> None:
        match = _LAYER_LINE.match(line)
        if match:
            tell(Progress("graph", int(match[1]) + 1, shape.layers))

    model = _torch_model(store, source)
    arguments = (str(source), str(source), str(written), PRECISION, target.provider, str(folder / "cache"))
    wanted = {
        "shared_embeddings": "false",
        "hf_token": "false",
        "windowed_kv_cache": "false",
        **_type_option(target),
        **options,
    }
    made: list[Any] = []
    with _quiet(heard), _offline(), _hollow_builder(builder, model, store, made.append):
        try:
            given = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in wanted.items()])
            translate(given["hf_details"]["hf_config"])
            builder.create_model(*arguments, **given)
        except (NotImplementedError, ValueError, KeyError, OSError, AssertionError) as error:
            line = str(error).strip().split("\n")[0] or type(error).__name__
            why = f"the model builder refuses {store.inventory.name}: {line}"
            raise ValueError(f"{why}; `rlkit inspect` shows what it is") from error
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (graph,) = made
    config = json.loads((written / "genai_config.json").read_text(encoding="utf-8"))
    return Skeleton(graph, config, written)


def hollow(model: ir.Model) -> Iterator[ir.Value]:
    """The constants that have a shape but no value."""
    return (value for value in model.graph.initializers.values() if value.const_value is None)


def import_builder() -> Any:
    """The builder's module. Imported before anything is written: third-party imports may swallow a Ctrl-C."""
    with _quiet(None):
        from onnxruntime_genai.models import builder
    return builder


def _type_option(target: Target) -> dict[str, str]:
    return {"use_webgpu_fp32": "true"} if target.provider == "webgpu" and target.dtype == "float32" else {}


@contextlib.contextmanager
def _hollow_builder(builder: Any, model: Any, store: Store, keep: Callable[[ir.Model], None]) -> Iterator[None]:
    """Inside, the builder's model classes take `model` for the weights and hand their graph to `keep`."""
    known = {name: value for name, value in vars(builder).items() if _is_model_class(value, builder.Model)}
    try:
        for name, original in known.items():
            setattr(builder, name, _hollowed(original, model, store, keep))
        yield
    finally:
        for name, original in known.items():
            setattr(builder, name, original)


def _is_model_class(value: Any, base: Any) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _hollowed(original: Any, model: Any, store: Store, keep: Callable[[ir.Model], None]) -> Any:
    """A class of the builder that neither loads, nor quantizes, nor writes."""

    import torch

    def experts(name: str) -> Any:
        return torch.from_numpy(load_experts(store, name))

    def load_weights(self: Any, _input_path: str) -> Any:
        _unpack(model, self.q_size, self.kv_size, self.intermediate_size)
        return model

    def save_model(self: Any, _out_dir: str) -> None:
        _settle(self.model)
        _take_tables(self.model, model)
        self.model.graph.sort()
        keep(self.model)

    methods: dict[str, Any] = {"load_weights": load_weights, "save_model": save_model}
    if original.__name__ in ADJUSTMENTS:
        methods |= ADJUSTMENTS[original.__name__](original, experts)
    return type(original.__name__, (original,), methods)


def _torch_model(store: Store, source: Path) -> Any:
    """The model of the configuration: matrices and experts on the meta device, all else from the store."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    for path, module in model.named_modules():
        matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        for leaf, parameter in module.named_parameters(recurse=False):
            if (matrix and leaf == "weight") or parameter.dim() > 2:
                continue
            value = torch.from_numpy(_tensor(store, f"{path}.{leaf}", tuple(parameter.shape)))
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers, from the configuration
    return model


def _tensor(store: Store, name: str, shape: tuple[int, ...]) -> Any:
    found = store.inventory.floats.get(name)
    if found != shape:
        what = "is missing" if found is None else f"is {found}"
        raise ValueError(
            f"{name} {what}, the configuration asks for {shape}; the files are incomplete or another model's"
        )
    return np.array(store.tensor(name), np.float32)  # a copy: what the store gives may be mapped, and read-only


def _unpack(model: Any, query: int, key: int, ffn: int) -> None:
    """Cut fused projections (Phi-3) into their parts; the builder would make each a random matrix first."""
    for module in list(model.modules()):
        if hasattr(module, "qkv_proj"):
            _cut(module, "qkv_proj", {"q_proj": query, "k_proj": key, "v_proj": key})
        if hasattr(module, "gate_up_proj") and hasattr(module.gate_up_proj, "out_features"):
            _cut(module, "gate_up_proj", {"gate_proj": ffn, "up_proj": ffn})


def _cut(module: Any, fused: str, parts: dict[str, int]) -> None:
    import torch

    whole, start = getattr(module, fused), 0
    for name, rows in parts.items():
        part = torch.nn.Linear(whole.in_features, rows, bias=False, device="meta")
        if whole.bias is not None:
            part.bias = torch.nn.Parameter(whole.bias[start : start + rows], requires_grad=False)
        setattr(module, name, part)
        start += rows
    delattr(module, fused)


def _settle(model: ir.Model) -> None:
    """Evaluate what the builder put off: constants become arrays, those on the meta device lose their value."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            tensor = tensor.raw()
        raw = getattr(tensor, "raw", None)
        if getattr(raw, "is_meta", False):
            value.const_value = None
        elif raw is not None and hasattr(raw, "detach"):
            value.const_value = ir.tensor(raw.detach().numpy(), name=value.name)


def _take_tables(model: ir.Model, torch_model: Any) -> None:
    """Replace the rotary tables (positions, head / 2) by what the model itself multiplies with at each position."""
    rotary = torch_model.model.rotary_emb
    if rotary.config.rope_parameters.get("rope_type") == "longrope":
        return  # two tables in one graph, chosen by length: the builder's are right
    constants = model.graph.initializers
    for suffix, arguments in {"": (), "_global": ("full_attention",), "_local": ("sliding_attention",)}.items():
        if f"cos_cache{suffix}" in constants:
            cos, sin = (constants[f"{part}_cache{suffix}"] for part in ("cos", "sin"))
            for value, table in zip((cos, sin), _tables(rotary, cos, arguments), strict=True):
                value.const_value = ir.tensor(table, name=value.name)


def _tables(rotary: Any, like: ir.Value, arguments: tuple[str, ...]) -> tuple[Any, Any]:
    import torch

    old = like.const_value
    assert old is not None
    rows, half = old.numpy().shape
    made = tuple(np.empty((rows, half), old.dtype.numpy()) for _ in "cs")
    for start in range(0, rows, _POSITIONS):
        positions = torch.arange(start, min(start + _POSITIONS, rows))
        for table, values in zip(made, rotary(torch.zeros(1), positions[None], *arguments), strict=True):
            table[start : start + len(positions)] = values[0, :, :half].numpy()
    return made[0], made[1]


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
