"""One shape for other runtimes: a Q4_0 GGUF with random codes for llama.cpp, and the stock builder's int4 bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlkit.apps import console
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import ModelShape

BLOCK, BLOCK_NBYTES = 32, 18  # of Q4_0: a float16 scale and 32 codes of 4 bits
SCALE = np.float16(2.0**-6)
W4_G32 = Recipe("w4-g32", (Rule(("*",), Scheme(4, 32)),), "what the stock builder makes of a float model by default")
BUILDER = "onnxruntime_genai.models.builder"
# A packed head that the embedding shares makes a graph that the runtime refuses (scales of another rank than the data).
OPTIONS = ("hf_token=false", "shared_embeddings=false")
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_q4_0(shape: ModelShape, path: Path) -> Path:
    """A Qwen3 of that shape as llama.cpp reads it: every matrix Q4_0, norms 1, no vocabulary but its size.

    Written matrix by matrix beside `path` and renamed. Raises ValueError for another architecture.
    """
    import gguf

    if shape.architecture != "Qwen3ForCausalLM" or not shape.tied:
        raise ValueError(f"only tied Qwen3 shapes are written for llama.cpp, not {shape.architecture}; use qwen3-4b")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "qwen3")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    sizes = dict(_sizes(shape))
    for name, (n, k) in sizes.items():
        kind = gguf.GGMLQuantizationType.F32 if k == 0 else gguf.GGMLQuantizationType.Q4_0
        stored = (n,) if k == 0 else (n, k // BLOCK * BLOCK_NBYTES)
        width = np.dtype(np.float32) if k == 0 else np.dtype(np.uint8)
        writer.add_tensor_info(name, stored, width, int(np.prod(stored)) * width.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (n, k) in enumerate(sizes.values()):
        writer.write_tensor_data(np.ones(n, np.float32) if k == 0 else _codes(n, k, number))
    writer.close()
    unfinished.replace(path)
    return path


def _sizes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and sizes (n, k) of matrices; k 0: a vector."""
    yield "token_embd.weight", (shape.vocab, shape.hidden)
    yield "output_norm.weight", (shape.hidden, 0)
    for name, n, k in shape.linears():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part in _PARTS:
            yield f"blk.{layer}.{_PARTS[part]}.weight", (n, k)
    for layer in map(str, range(shape.layers)):
        for part, width in (("attn_norm", shape.hidden), ("ffn_norm", shape.hidden)):
            yield f"blk.{layer}.{part}.weight", (width, 0)
        for part in ("attn_q_norm", "attn_k_norm"):
            yield f"blk.{layer}.{part}.weight", (shape.head_dim, 0)


def _codes(n: int, k: int, seed: int) -> NDArray[np.uint8]:
    """Random Q4_0 blocks (n, bytes of a row) with one scale."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, k // BLOCK, BLOCK_NBYTES), np.uint8)
    blocks[..., :2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    return blocks.reshape(n, -1)


def write_stock(shape: ModelShape, folder: Path) -> Path:
    """The stock builder's int4 bundle of that shape with its default settings: 4 bits, groups of 32, level 4.

    It is made from a checkpoint with random codes of that form, which takes less memory than a float model does, and
    gives the same graph.
    """
    from rlkit.recover.standin import write_packed

    checkpoint = folder.with_name(f"{folder.name}-checkpoint")
    shutil.rmtree(checkpoint, ignore_errors=True)
    write_packed(shape, W4_G32, checkpoint)
    words = [
        "-i",
        str(checkpoint),
        "-o",
        str(folder),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(folder.with_suffix(".cache")),
    ]
    command = [sys.executable, "-m", BUILDER, *words, "--extra_options", *OPTIONS]
    console.say(f"making {folder} with the stock builder")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    shutil.rmtree(checkpoint)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise OSError(f"the stock builder failed with exit code {done.returncode}: {last}")
    return folder
