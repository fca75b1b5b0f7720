"""What the runtime asks of single nodes, target by target: the rules that `export.lint` holds every node to.

A rule is a function (Site) -> findings; RULES names those of each operator. Two things may be wrong with a node:

    slow         it runs, but dequantizes a whole matrix at every call (20 to 300 times slower), or on another device
    unsupported  the session, or the target's tool, refuses it

Nothing here reads a weight: types, shapes and attributes say all there is to know.

Sources: kernel selection of onnxruntime 1.31 and of its WebGPU and DirectML providers; cases marked (run) were tried
with onnxruntime 1.31.1 on the CPU, 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from rlkit.export.kvrules import quantized_cache
from rlkit.export.targets import WIDTHS, Target

Severity = Literal["slow", "unsupported"]
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
LEVEL_OF_PAIRS = 4  # of the MatMulNBits that the runtime makes of DequantizeLinear + MatMul, unless an option says more
# Operators without a bfloat16 kernel on the CPU (run).
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Tanh", "Sigmoid", "Softmax", "Gelu")
NO_BF16 = frozenset({*_ELEMENTWISE, "MatMul", "Gemm", "MatMulNBits", "RotaryEmbedding", "GroupQueryAttention"})
_PACKED_TYPES = {
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A node that would run slowly or not at all, why, and what to change."""

    node: str
    op: str
    reason: str
    fix: str
    severity: Severity

    def to_json(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Site:
    """A node where it stands; `parameters` are inputs of the function around it, whose values nobody knows here."""

    node: ir.Node
    target: Target
    where: str = ""
    lut: bool = False  # session option mlas.use_lut_gemm
    parameters: frozenset[int] = frozenset()

    @property
    def lost(self) -> Severity:
        """What becomes of a node that no kernel of the target takes: elsewhere it goes to the CPU."""
        return "unsupported" if self.target.ops is not None else "slow"

    def finding(self, severity: Severity, reason: str, fix: str, op: str = "") -> Finding:
        """A finding about this node."""
        made = next((value.name for value in self.node.outputs if value.name), "nothing")
        name = self.node.name or f"the unnamed node that makes {made}"
        return Finding(f"{self.where}{name}", op or self.node.op_type, reason, fix, severity)

    def has(self, feature: str) -> bool:
        """Whether the target supports it."""
        return feature in self.target.supports

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return integer(self.node, name, default)

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        return default if name not in self.node.attributes else str(_typed(self.node, name, ir.AttributeType.STRING))

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return default if name not in self.node.attributes else float(_typed(self.node, name, ir.AttributeType.FLOAT))

    def input(self, index: int) -> ir.Value | None:
        """An input that is not left out."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None or not value.name else value

    def is_parameter(self, value: ir.Value) -> bool:
        """Whether only the callers of the function around know its value."""
        return id(value) in self.parameters


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node; ValueError if it is of another type."""
    return default if name not in node.attributes else int(_typed(node, name, ir.AttributeType.INT))


def _typed(node: ir.Node, name: str, kind: ir.AttributeType) -> Any:
    attribute = node.attributes[name]
    if attribute.type != kind:
        why = f"attribute {name} of {node.name or node.op_type} is of type {attribute.type.name}, not {kind.name}"
        raise ValueError(f"{why}; the model is damaged, so export it again")
    return attribute.value


def check(site: Site) -> Iterator[Finding]:
    """All findings about one node."""
    node, target = site.node, site.target
    if node.domain not in DOMAINS:
        found = f"its domain {node.domain!r} is not in onnxruntime"
        yield site.finding("unsupported", found, "load the library it comes from, or export without it")
        return
    if target.ops is not None and node.op_type not in target.ops:
        found = f"{node.op_type} is not among the operators that {target.name} is known to run"
        yield site.finding("unsupported", found, _OTHER_OPS.get(node.op_type, "build the model in the dml layout"))
        return
    if target.name == "cpu" and node.op_type in NO_BF16 and _is_bf16(site):
        found = "it computes in bfloat16, for which the CPU has no kernel"
        yield site.finding("unsupported", found, "export with float32 or float16 activations")
        return
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return  # in a function whose callers choose the form
    for rule in RULES.get(node.op_type, ()):
        yield from rule(site)


def _is_bf16(site: Site) -> bool:
    return any(value is not None and value.dtype == ir.DataType.BFLOAT16 for value in site.node.inputs)


_OTHER_OPS = {
    "MatMul": "quantize it to 4 bits, or merge the adapter it belongs to",
    "GatherBlockQuantized": "give the embedding a float table of its own",
    "DequantizeLinear": "write MatMulNBits instead of DequantizeLinear and MatMul",
}


def matmul_nbits(site: Site) -> Iterator[Finding]:
    """MatMulNBits: a kernel for its form, constants, zero points, no extras that the target lacks."""
    bits, block = site.integer("bits", 4), site.integer("block_size", 0)
    if wrong := _no_such_form(bits, block):
        yield site.finding("unsupported", *wrong)
        return
    if site.integer("weight_prepacked", 0):
        yield site.finding("unsupported", "its weight is packed ahead for CUDA", "export it without weight_prepacked")
        return
    yield from _sizes(site, bits, block)
    yield from _constants(site)
    if _by_lut(site, bits, block):
        return
    yield from _kernel(site, bits, block)
    yield from _zero_points(site)
    if site.input(4) is not None and not site.has("g_idx"):
        found = "it has g_idx, reordered groups"
        yield site.finding(site.lost, found, "store the columns in group order and drop g_idx")
    if site.input(5) is not None and not site.has("bias"):
        found = f"it has a bias, which {site.target.name} does not take"
        yield site.finding(site.lost, found, "add the bias in an Add node behind it")


def _no_such_form(bits: int, block: int) -> tuple[str, str] | None:
    if bits not in WIDTHS:
        return f"{bits} bits do not exist in MatMulNBits", "use 2, 4 or 8 bits"
    if block < 16 or block & (block - 1):
        return f"blocks of {block} are no power of two from 16 on", "use blocks of 32, 64 or 128"
    if bits == 2 and block > 256:  # (run): the session is refused
        return f"2 bits in blocks of {block} are refused", "use blocks of 32, 64 or 128"
    return None


def _sizes(site: Site, bits: int, block: int) -> Iterator[Finding]:
    """Counts of the constants against N, K, bits and block; where shapes are known."""
    n, k = site.integer("N", 0), site.integer("K", 0)
    blocks = -(-k // block)
    expected = {1: ("weight", n * blocks * block * bits // 8), 2: ("scales", n * blocks)}
    zeros = site.input(3)
    if zeros is not None and zeros.dtype == ir.DataType.UINT8:
        expected[3] = ("zero points", n * -(-blocks * bits // 8))
    for index, (what, count) in expected.items():
        value = site.input(index)
        tensor = None if value is None else value.const_value
        if tensor is not None and tensor.size != count:
            found = f"its {what} hold {tensor.size} numbers, but N, K and block ask for {count}"
            yield site.finding("unsupported", found, "write the node again; its constants belong to another")


def _constants(site: Site) -> Iterator[Finding]:
    remedies = {1: ("weight", "packed weight"), 2: ("scales", "scales"), 3: ("zero points", "zero points")}
    for index, (what, remedy) in remedies.items():
        value = site.input(index)
        if value is None or site.is_parameter(value):
            continue
        if value.is_graph_input() and value.const_value is not None:
            found = f"its {what} can be overridden, as an input of the graph has that name"
            yield site.finding(site.lost, found, "take the name off the graph's inputs")
        elif ir.convenience.get_const_tensor(value) is None:
            computed = "is computed, not a constant" if index == 1 else "are computed, not constants"
            yield site.finding(site.lost, f"its {what} {computed}", f"store the {remedy} as an initializer")


def _kernel(site: Site, bits: int, block: int) -> Iterator[Finding]:
    target, level = site.target, site.integer("accuracy_level", 0)
    k, n = site.integer("K", 0), site.integer("N", 0)
    if target.kernel(bits, block, level) is None:
        found = f"{bits} bits in blocks of {block} at accuracy_level {level} have no kernel on {target.name}"
        refused = f"; the lookup tables that are on need {_LUT_NEEDS}" if site.lut and bits == 2 else ""
        yield site.finding(site.lost, found + refused, target.remedy(bits))
    elif target.kernel(bits, block, level, k, n) is None:
        found = f"its {k} inputs are no multiple of the block {block}, which {target.name} asks for"
        yield site.finding(site.lost, found, "split the blocks into smaller ones that divide the inputs")


def _zero_points(site: Site) -> Iterator[Finding]:
    zeros = site.input(3)
    if zeros is None:
        if not site.has("implied_zeros"):
            found = f"it has no zero points, and {site.target.name} is known to run explicit ones only"
            yield site.finding(site.lost, found, "write the middle code (8 at 4 bits) for every block")
    elif zeros.dtype is not None and zeros.dtype != ir.DataType.UINT8 and not site.has("float_zeros"):
        severity: Severity = "slow" if site.target.name == "cpu" else "unsupported"
        found = f"its zero points are {zeros.dtype.name}, not packed uint8"
        yield site.finding(severity, found, "round them to integers and pack them, or leave them out")


_LUT_NEEDS = "2 bits, blocks and K multiples of 32, K % block = 0, N % 128 = 0, float32 activations, no g_idx"


def _by_lut(site: Site, bits: int, block: int) -> bool:
    """Whether the CPU's lookup tables take the node; they come before its other kernels."""
    k, n, scales = site.integer("K", 0), site.integer("N", 0), site.input(2)
    sizes = bits == 2 and block % 32 == 0 and k % block == 0 and n % 128 == 0
    wide = scales is not None and scales.dtype in (None, ir.DataType.FLOAT)
    return site.lut and site.target.name == "cpu" and sizes and wide and site.input(4) is None


def by_lut(site: Site) -> bool:
    """Whether the session option mlas.use_lut_gemm decides how this node runs."""
    if site.node.op_type != "MatMulNBits":
        return False
    return _by_lut(site, site.integer("bits", 4), site.integer("block_size", 0))


def dequantized_pair(site: Site) -> Iterator[Finding]:
    """MatMul of a DequantizeLinear: the runtime joins the two into MatMulNBits, or dequantizes at every call (run)."""
    weight = site.input(1)
    source = None if weight is None else weight.producer()
    turned = source is not None and source.op_type == "Transpose"
    if source is not None and turned and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    packed = None if source is None or source.op_type != "DequantizeLinear" else source.inputs[0]
    if source is None or packed is None or packed.dtype not in _PACKED_TYPES:
        return
    op, bits = "DequantizeLinear + MatMul", _PACKED_TYPES[packed.dtype]
    reason = _why_not_joined(site, source, turned)
    fix = "write MatMulNBits, or a weight (K, N) of its own in blocks of 32/64/128 along axis 0"
    if reason:
        yield site.finding(site.lost, f"{reason}, so its {bits}-bit weight is dequantized at every call", fix, op)
        return
    block = integer(source, "block_size", 0)
    if site.target.kernel(bits, block, LEVEL_OF_PAIRS) is None:
        found = f"joined, it is {bits} bits in blocks of {block}, which have no kernel on {site.target.name}"
        yield site.finding(site.lost, found, site.target.remedy(bits), op)


def _why_not_joined(site: Site, source: ir.Node, turned: bool) -> str:
    axis, block = integer(source, "axis", 1), integer(source, "block_size", 0)
    packed = source.inputs[0]
    if site.node.op_type != "MatMul":
        return "a Gemm is not joined"
    if turned:
        return "a Transpose stands between the two"
    if axis != 0:
        return f"its blocks run along axis {axis}, not 0"
    if block < 16 or block & (block - 1):
        return f"its block_size is {block}, no power of two from 16 on"
    if sum(len(value.uses()) for value in source.outputs) > 1:
        return "several nodes share it"
    if packed is not None and not site.is_parameter(packed) and ir.convenience.get_const_tensor(packed) is None:
        return "its weight is no constant"
    return ""


def gather_block_quantized(site: Site) -> Iterator[Finding]:
    """GatherBlockQuantized: packed embeddings."""
    if not site.has("gather"):
        found = f"{site.target.name} has no GatherBlockQuantized, so the embedding is looked up on the CPU"
        yield site.finding(site.lost, found, _OTHER_OPS["GatherBlockQuantized"])
        return
    block, data, zeros = site.integer("block_size", 128), site.input(0), site.input(3)
    bits, kind = site.integer("bits", 4), None if data is None else data.dtype
    if block < 16 or block & (block - 1):
        yield site.finding("unsupported", f"its block_size {block} is no power of two from 16 on", "use 32, 64 or 128")
    if kind == ir.DataType.UINT8 and bits not in WIDTHS:
        yield site.finding("unsupported", f"{bits} bits in uint8 do not exist", "use 2, 4 or 8 bits")
    if kind == ir.DataType.UINT8 and site.integer("gather_axis", 0) != 0:
        found = f"it gathers packed uint8 along axis {site.integer('gather_axis', 0)}"
        yield site.finding("unsupported", found, "store the table with one row per token, gather_axis = 0")
    if zeros is not None and None not in (kind, zeros.dtype) and zeros.dtype != kind:
        found = f"its zero points are {_named(zeros.dtype)}, its data {_named(kind)}"
        yield site.finding("unsupported", found, "store both in the same integer type")


def _named(kind: ir.DataType | None) -> str:
    return "of unknown type" if kind is None else kind.name


def group_query_attention(site: Site) -> Iterator[Finding]:
    """GroupQueryAttention: norms, rotation, packed inputs and caches that not every provider has."""
    name = site.target.name
    if not site.has("qk_norm") and (site.input(14) is not None or site.input(15) is not None):
        found = f"it normalizes queries and keys, which {name} refuses"
        yield site.finding("unsupported", found, "build with fuse_qk_norm_gqa=false, or put the norms before it")
    if not site.has("rotary") and site.integer("do_rotary", 0):
        found = f"it turns queries and keys itself (do_rotary), which {name} does not do"
        yield site.finding(site.lost, found, "put RotaryEmbedding nodes before it, as the dml layout has them")
    if not site.has("packed_qkv") and site.input(0) is not None and site.input(1) is None and site.input(2) is None:
        found = f"query, key and value come as one tensor, which {name} does not take"
        yield site.finding(site.lost, found, "build with fuse_qkv=false")
    if site.integer("sliding_window_cache", 0) and not site.has("sliding_cache"):
        found = f"its cache holds only the window (sliding_window_cache), which {name} refuses"
        yield site.finding("unsupported", found, "build without windowed_kv_cache")
    yield from quantized_cache(site)


def fused_product(site: Site) -> Iterator[Finding]:
    """MatMulNBitsMlp and MatMulNBitsQkv: WebGPU, 4 bits in blocks of 32."""
    bits, block = site.integer("bits", 4), site.integer("block_size", 32)
    if not site.has("fused_mlp"):
        found = f"{site.target.name} has no {site.node.op_type}"
        yield site.finding("unsupported", found, "keep the MatMulNBits nodes apart")
    elif (bits, block) != (4, 32):
        found = f"it is {bits} bits in blocks of {block}, but exists for 4 bits in blocks of 32"
        yield site.finding("unsupported", found, "keep the MatMulNBits nodes apart")


def experts(site: Site) -> Iterator[Finding]:
    """QMoE: quantized experts."""
    if not site.has("experts"):
        found = f"{site.target.name} has no quantized experts"
        yield site.finding("unsupported", found, "export for cpu or webgpu")
        return
    weight, block = site.input(2), site.integer("block_size", 0)
    bits = site.integer("expert_weight_bits", 4)
    if site.target.name != "webgpu" or weight is None or weight.shape is None or not block:
        return
    width = weight.shape[-1]
    if isinstance(width, int) and (k := width * 8 // bits) % block:
        found = f"the {k} inputs of its experts are no multiple of the block {block}, which webgpu asks for"
        yield site.finding("unsupported", found, "use a moe block that divides the inputs")


Rule = Callable[[Site], Iterator[Finding]]
RULES: dict[str, tuple[Rule, ...]] = {
    "MatMulNBits": (matmul_nbits,),
    "MatMul": (dequantized_pair,),
    "Gemm": (dequantized_pair,),
    "GatherBlockQuantized": (gather_block_quantized,),
    "GroupQueryAttention": (group_query_attention,),
    "MatMulNBitsMlp": (fused_product,),
    "MatMulNBitsQkv": (fused_product,),
    "QMoE": (experts,),
}
