"""Tensors of a .gguf file for export, without a second rounding where a kernel has the file's grid.

    type    a block of 32 weights in the file          becomes
    Q4_0    float16 d, 32 codes of 4 bits: d (q - 8)   4 bits, group 32, zero point 8: same codes, same scales
    Q8_0    float16 d, 32 int8:            d q         8 bits, group 32, zero point 128: same codes + 128, same scales
    Q4_1    float16 d, m, 32 codes:        d q + m     4 bits, group 32, zero point 8, and offsets m + 8 d (below)
    others                                             float tensors, dequantized by the gguf package

No fast kernel has float zero points. The part of a Q4_1 matrix that integers cannot say is constant within a group, so
it multiplies the sum of the group's inputs:

    y = W x + M s       W (n, k) packed as Q4_0's are, M (n, groups) float: the offsets, s[g] = sum of x over group g

`offsets(module)` gives M, `export.offsets` puts the branch into the graph. On SmolLM2-135M-Instruct in Q4_1 this
reproduces every weight of the file, for 0.75 bytes per weight. Rounding again to integer zero points, the best of a
range search, needs 0.64 and moves the weights by 7.2 % of their spread: 0.28 nats on 768 tokens of prose. That is what
stores do unless asked to carry offsets, for targets that run nothing but packed matrices.

Llama's files hold the rows of the query and key projections in another order (pairs of rotated dimensions lie side by
side); whole rows move, so undoing it is exact for every type. Names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rlkit.export.inventory import EMBEDDING, Inventory, Packed
from rlkit.export.matrix import Matrix
from rlkit.recover import packing
from rlkit.recover.ggufconfig import ROPE_FACTORS, config_values, write_model_files
from rlkit.recover.ggufheader import GgufHeader, GgufTensor, read_header
from rlkit.recover.packing import Bytes, Floats
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import ModelShape, Source, read_shape

GROUP = 32
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # others change values on their way into a file (Gemma's norms, say)
PERMUTED = ("llama",)  # those whose query and key rows are reordered
WITHOUT_USE = (ROPE_FACTORS, ".attn_rot_embd.weight")  # rotary tables: the configuration says the same


@dataclass(frozen=True, slots=True)
class _Grid:
    """How a type's blocks become codes: bits, zero point, bytes of the head of a block, and a function for the rest."""

    bits: int
    zero: int
    head: int
    repack: Callable[[Bytes], Bytes]

    @property
    def has_offsets(self) -> bool:
        """Whether a block states its offset after its scale."""
        return self.head == 4


def _repack4(nibbles: Bytes) -> Bytes:
    """(n, groups, 16), weight i low and i + 16 high in byte i -> (n, groups, 16), two neighbours in a byte."""
    even, odd = nibbles[..., 0::2], nibbles[..., 1::2]
    return np.concatenate([(even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)], axis=-1)


def _repack8(numbers: Bytes) -> Bytes:
    """int8 -> the code 128 above it."""
    return numbers ^ np.uint8(0x80)


GRIDS = {"Q4_0": _Grid(4, 8, 2, _repack4), "Q4_1": _Grid(4, 8, 4, _repack4), "Q8_0": _Grid(8, 128, 2, _repack8)}


class GgufStore:
    """A .gguf file of a decoder; see `export.store.Store`. Headers are checked at once, tensors read when asked for."""

    def __init__(self, source: Source, *, carry_offsets: bool = False) -> None:
        """Open a .gguf file.

        Who passes `carry_offsets=True` adds the branch of every module in `offset_modules` (`export.offsets`); without
        it, matrices with float offsets are rounded again.
        Raises ValueError, one line with the remedy, for a damaged file or one that is no complete model known here.
        """
        self._source, self._path = source, source.file
        header, shape = read_header(self._path), read_shape(source)
        if _architecture(header) not in ARCHITECTURES:
            why = f"{_architecture(header)} is none of {', '.join(ARCHITECTURES)}, whose files can be exported"
            raise ValueError(f"{self._path}: {why}; use a Hugging Face folder of the model")
        config_values(source, header)  # complains of what cannot be expressed
        self._places = _places(self._path, header, shape)
        self._permuted = _architecture(header) in PERMUTED
        exact = {module: found for module, found in _linears(shape) if self._places[found].type in GRIDS}
        if shape.tied and "lm_head" in exact and GRIDS[self._places[EMBEDDING].type].has_offsets:
            del exact["lm_head"]  # its rows are the embedding's, which no operator gathers with float offsets
        with_offsets = {module for module, name in exact.items() if GRIDS[self._places[name].type].has_offsets}
        self.offset_modules = frozenset(with_offsets if carry_offsets else ())
        self._rounded = frozenset(() if carry_offsets else with_offsets)
        packed = {module: self._packed(module, name) for module, name in exact.items()}
        gone = {name for name in exact.values() if name != EMBEDDING}
        floats = {name: tensor.shape for name, tensor in self._places.items() if name not in gone}
        self._shape = shape
        self.inventory = Inventory(source.reference, shape, packed, floats, {})
        self.report: list[dict[str, Any]] = [self._row(name) for name in self._places]

    def matrix(self, module: str) -> Matrix:
        """A packed matrix: the file's codes and scales; of one with offsets, the part that integers say."""
        if module not in self.inventory.packed:
            raise ValueError(f"{self._path} holds no packed {module}; ask for its float tensor")
        name = self.inventory.weight_name(module)
        if module in self._rounded:
            from rlkit.recover.rounding import round_matrix

            codes, scales, zeros = round_matrix(self.tensor(name), Scheme(4, GROUP))
            return Matrix.of(codes, scales, zeros, 4, GROUP)
        grid, blocks = self._blocks(name)
        n, groups = blocks.shape[:2]
        qweight = grid.repack(blocks[..., grid.head :]).reshape(n, -1)
        zeros = packing.pack(np.full((n, groups), grid.zero, np.uint8), grid.bits)
        return Matrix(qweight, self._halves(name, blocks, 0), zeros, grid.bits, GROUP, groups * GROUP)

    def offsets(self, module: str) -> Floats | None:
        """What `matrix` leaves out of every weight of a group: float32 (n, groups); None where it is complete."""
        if module not in self.offset_modules:
            return None
        name = self.inventory.weight_name(module)
        grid, blocks = self._blocks(name)
        return self._halves(name, blocks, 2) + grid.zero * self._halves(name, blocks, 0)

    def tensor(self, name: str) -> Floats:
        """A tensor in float32, dequantized if it was packed; the name is Hugging Face's."""
        if name == "lm_head.weight" and self._shape.tied:
            name = EMBEDDING
        if name not in self._places:
            raise ValueError(f"{self._path} holds no {name}; its inventory lists what there is")
        tensor = self._places[name]
        raw = self._raw(name)
        found: Floats = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type])
        return np.array(found, np.float32).reshape(tensor.shape)  # a copy: what was mapped is let go

    def prepare(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the tokenizer, as read from the file's metadata."""
        write_model_files(self._source, folder)

    def _packed(self, module: str, name: str) -> Packed:
        n, k = self._places[name].shape
        bits = GRIDS[self._places[name].type].bits
        return Packed(module, n, k, bits, GROUP, module in self._rounded, module in self.offset_modules)

    def _raw(self, name: str) -> Bytes:
        """A tensor's bytes, a row of the matrix a row of the array, in Hugging Face's order."""
        tensor = self._places[name]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        try:
            raw = np.memmap(self._path, np.uint8, "r", tensor.start, (rows, tensor.nbytes // rows))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path} has changed or cannot be read ({error}); download it again") from error
        return raw[self._order(name, rows)] if rows > 1 else np.asarray(raw)

    def _order(self, name: str, rows: int) -> Any:
        heads = {"q_proj": self._shape.heads, "k_proj": self._shape.kv_heads}.get(name.split(".")[-2])
        if not self._permuted or heads is None:
            return slice(None)
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _blocks(self, name: str) -> tuple[_Grid, Bytes]:
        """A packed matrix as it lies in the file: uint8 (n, groups, bytes of a block)."""
        grid, tensor = GRIDS[self._places[name].type], self._places[name]
        n, k = tensor.shape
        return grid, self._raw(name).reshape(n, k // GROUP, -1)

    def _halves(self, name: str, blocks: Bytes, at: int) -> Floats:
        """The float16 at a place of every block: float32 (n, groups)."""
        found = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)
        if not np.isfinite(found).all():
            raise ValueError(f"{self._path}: {name} has scales that are NaN or infinite; download the file again")
        return found

    def _row(self, name: str) -> dict[str, Any]:
        """One line of the report."""
        kind = self._places[name].type
        module = "lm_head" if name == EMBEDDING and self._shape.tied else name.removesuffix(".weight")
        if module in self._rounded:
            became, why = "4 bits, group 32", "rounded again: the target has no float offsets"
        elif module in self.offset_modules:
            became, why = "4 bits, group 32, and a branch of offsets", "same codes, scales and offsets"
        elif module in self.inventory.packed:
            became, why = f"{GRIDS[kind].bits} bits, group 32", "same codes and scales, implied zero point"
        elif kind in ("F32", "F16", "BF16"):
            became, why = "float", "not quantized in the file"
        elif kind in GRIDS:
            became, why = "float", "dequantized: rows of an embedding are gathered as floats"
        else:
            became, why = "float", f"dequantized: no kernel has the grid of {kind}"
        return {"tensor": name, "type": kind, "became": became, "why": why}


def _linears(shape: ModelShape) -> Iterator[tuple[str, str]]:
    """Every linear and the tensor that holds it; a tied lm_head has the embedding's."""
    for module, _n, _k in shape.linears():
        yield module, EMBEDDING if module == "lm_head" and shape.tied else f"{module}.weight"


def _architecture(header: GgufHeader) -> str:
    return str(header.metadata.get("general.architecture"))


def _expected(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """All tensors of such a model, by Hugging Face's names."""
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, shape.hidden)}
    linears = {f"{module}.weight": (n, k) for module, n, k in shape.linears()}
    if shape.tied:
        del linears["lm_head.weight"]
    return {**found, **linears, **dict(shape.others())}


def _places(path: Path, header: GgufHeader, shape: ModelShape) -> dict[str, GgufTensor]:
    """Where every tensor of the model lies, by Hugging Face's names; ValueError if some are missing or too many."""
    there = {tensor.name: tensor for tensor in header.tensors}
    found: dict[str, GgufTensor] = {}
    for name, (gguf_name, size) in _gguf_names(header, shape).items():
        tensor = there.pop(gguf_name, None)
        if tensor is None:
            raise ValueError(f"{path} lacks {gguf_name} ({name}); it is incomplete, so download another file")
        if tensor.shape != size:
            why = f"{gguf_name} is {tensor.shape}, but its metadata ask for {size}"
            raise ValueError(f"{path}: {why}; it is damaged or of another model, so download another file")
        found[name] = tensor
    if strange := [name for name in there if not name.endswith(WITHOUT_USE)]:
        why = f"{shape.architecture} has no use for {strange[0]!r:.90} and {len(strange) - 1} more of its tensors"
        raise ValueError(f"{path}: {why}, so it is another kind of model; use a Hugging Face folder of it")
    return found


def _gguf_names(header: GgufHeader, shape: ModelShape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name -> the file's name and the shape that the metadata ask for."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[_architecture(header)], shape.layers)
    found = {}
    for name, size in _expected(shape).items():
        base, _dot, part = name.rpartition(".")
        found[name] = f"{names.get_name(base)}.{part}", size
    return found
