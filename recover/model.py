"""Loading a torch model and its tokenizer from a resolved source; the only place that calls transformers' loaders."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.ggufconfig import rope_parameters
from rlkit.recover.ggufheader import read_header
from rlkit.recover.memory import give_back, map_large_blocks
from rlkit.recover.source import Source, SourceKind, read_shape

Array = NDArray[Any]
FLOAT32_PARAMETERS = 400_000_000  # above this, float32 would cost more memory than its digits are worth


def load_model(source: Source) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer, from local files only.

    A model of up to FLOAT32_PARAMETERS is held in float32, a larger one in the type it is stored in. A GGUF's integer
    weights are dequantized by transformers: those values are then the full-precision reference.
    Raises ValueError for a bundle or checkpoint (neither is a full-precision model) and for unreadable files.
    """
    if source.kind not in (SourceKind.HF, SourceKind.GGUF):
        raise ValueError(
            f"{source.reference} is a {source.kind} folder, which is quantized already; name the full-precision model"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    dtype: Any = torch.float32
    if read_shape(source).parameters > FLOAT32_PARAMETERS:
        dtype = "auto"
        map_large_blocks()
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=dtype, local_files_only=True, trust_remote_code=False, **extra
            )
            tokenizer = AutoTokenizer.from_pretrained(
                source.path, local_files_only=True, trust_remote_code=False, **extra
            )
        except (OSError, KeyError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{source.reference} cannot be loaded: {first}; fetch it again or name another") from error
    if dtype == "auto":  # tensors of a file share its mapped memory, which would stay until the last of them goes
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if source.gguf_file:
        _forget_gguf(model)
        _turn_as_written(model, source)
    return model.eval().requires_grad_(False), tokenizer


def _forget_gguf(model: Any) -> None:
    """Drop the marks of the file format: the weights are plain float now and may be saved as such."""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.architectures = [
        type(model).__name__
    ]  # a GGUF does not name the class, and readers of folders need it


def _turn_as_written(model: Any, source: Source) -> None:
    """Rotary positions as the file's head says: transformers' reader leaves scaling (Llama 3, YaRN, linear) out."""
    rope = rope_parameters(source.file, read_header(source.file), read_shape(source))
    if rope["rope_type"] != "default":
        model.config.rope_parameters = rope
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and remarks out of the terminal; rlkit shows its progress itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def logits_fn(model: Any) -> Any:
    """`model` as a LogitsFn: ids (B, T) int64 -> logits (B, T, V) float32, rows padded on the right."""

    @torch.no_grad()
    def logits(ids: Array) -> Array:
        out: Array = (
            model(input_ids=torch.from_numpy(np.ascontiguousarray(ids)), use_cache=False).logits.float().numpy()
        )
        return out

    return logits


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Every linear by module name, lm_head included, in forward order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def check_weights(model: Any, quantized: Collection[str]) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity, or linear of `quantized` that is all zeros.

    A matrix of zeros that stays float is left alone: it may be meant, and does no harm.
    """
    for parameter, tensor in model.named_parameters(remove_duplicate=False):
        name = parameter.removesuffix(".weight")
        low, high = (float(bound) for bound in torch.aminmax(tensor))  # both NaN if one value is; needs no memory
        if not math.isfinite(high - low):
            raise ValueError(f"{name} holds NaN or infinity, so the file is damaged; fetch the model again")
        if name in quantized and low == high == 0:
            raise ValueError(
                f"{name} holds nothing but zeros, so the file is damaged or incomplete; repair it with `rlkit recover "
                "--degraded DIR --teacher DIR`, or fetch the model again"
            )


@torch.no_grad()
def set_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Overwrite the matrices (N, K) of plain linears, by module name, one at a time."""
    modules = linears(model)
    for name, weight in weights:
        modules[name].weight.copy_(weight)


def drop_matrices(model: Any) -> None:
    """Give back the memory of linears and embeddings of a model that only its configuration is needed of."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to("meta")
    give_back()


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32."""
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32


def autocast() -> torch.autocast:
    """A context in which matrix products run in `fast_dtype`."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)
