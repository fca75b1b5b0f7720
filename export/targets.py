"""Where a bundle runs: the kernels for packed weights there, the operators, and what could not be tried.

A target is an execution provider of ONNX Runtime as the GenAI builder names it, with one type of activations. Whatever
no kernel takes is dequantized whole at every call, or computed on the CPU, without a word from the runtime; `plan`
promises a kernel for every matrix and `lint` holds written files to the same table.

What a source does not say is not in the table: `notes` lists it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

EXACT = 0  # the accuracy level that leaves activations as they are
LEVELS = (0, 1, 2, 3, 4)
WIDTHS = (2, 4, 8)  # bits of MatMulNBits' schema; blocks are powers of two from 16 on
FEATURES = (
    "ragged",  # MatMulNBits with inputs that are no multiple of the block
    "bias",  # MatMulNBits with a bias
    "g_idx",  # MatMulNBits with reordered groups
    "float_zeros",  # MatMulNBits with float zero points
    "implied_zeros",  # MatMulNBits without zero points, which then are the middle code
    "gather",  # GatherBlockQuantized
    "qk_norm",  # GroupQueryAttention that normalizes queries and keys
    "rotary",  # GroupQueryAttention that turns queries and keys
    "packed_qkv",  # GroupQueryAttention that takes query, key and value as one tensor
    "quantized_kv",  # GroupQueryAttention with an int8 or int4 cache and its scales
    "sliding_cache",  # GroupQueryAttention with a cache of the window's size
    "fused_mlp",  # MatMulNBitsMlp and MatMulNBitsQkv
    "experts",  # QMoE
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled multiplication with packed weights, and what it asks of a node."""

    name: str
    bits: int
    blocks: tuple[int, ...]
    levels: tuple[int, ...]
    k_multiple: int = 1
    n_multiple: int = 1

    def takes(self, bits: int, block: int, level: int, k: int | None = None, n: int | None = None) -> bool:
        """Whether a node (n, k) of this form runs here; sizes that are not given are taken to fit."""
        fits = (k is None or k % self.k_multiple == 0) and (n is None or n % self.n_multiple == 0)
        return fits and bits == self.bits and block in self.blocks and level in self.levels

    @property
    def asks(self) -> str:
        """Its conditions in words."""
        words = [f"accuracy_level {_either(self.levels)}" if self.levels != LEVELS else "any accuracy_level"]
        words.append(f"block {_either(self.blocks)}")
        words += [f"{name} % {size} = 0" for name, size in (("K", self.k_multiple), ("N", self.n_multiple)) if size > 1]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a bundle runs; see the module. `supports` holds those of FEATURES that work there."""

    name: str
    device: str  # cpu, igpu or npu
    provider: str  # of the GenAI builder
    dtype: str  # of activations, scales, norms and tables
    kernels: tuple[Kernel, ...]  # the first that takes a node is the one that runs it
    level: int  # accuracy level unless told otherwise
    supports: frozenset[str]
    widened: dict[int, int] = field(default_factory=dict)  # width of codes -> width of the fields they are stored in
    ops: frozenset[str] | None = None  # None: whatever onnxruntime has
    group: int = 128  # for weights that are rounded for this target
    notes: tuple[str, ...] = ()  # what was not verified

    @property
    def float_nbytes(self) -> int:
        """Bytes of one float number."""
        return 2 if self.dtype == "float16" else 4

    @property
    def shares_embedding(self) -> bool:
        """Whether a tied embedding can read the packed rows of lm_head."""
        return "gather" in self.supports

    def kernel(self, bits: int, block: int, level: int, k: int | None = None, n: int | None = None) -> Kernel | None:
        """The kernel that takes such a node; None: it would be dequantized at every call, or leave the device."""
        if k is not None and k % block and "ragged" not in self.supports:
            return None
        return next((kernel for kernel in self.kernels if kernel.takes(bits, block, level, k, n)), None)

    def stored_bits(self, bits: int) -> int:
        """The width in which codes of `bits` are stored for this target."""
        return self.widened.get(bits, bits)

    def remedy(self, bits: int) -> str:
        """What a node of this width must look like to run fast here."""
        if bits in self.widened:
            return f"{self.name} has no kernel for {bits} bits; store the codes in {self.widened[bits]}-bit fields"
        fitting = [kernel for kernel in self.kernels if kernel.bits == bits]
        if not fitting:
            return f"{self.name} has no kernel for {bits} bits; use {_either(self.widths)}"
        asked = " or ".join(f"{kernel.asks}" for kernel in fitting)
        whole = "" if "ragged" in self.supports else " and K a multiple of the block"
        return f"{self.name} runs {bits} bits fast with {asked}{whole}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits for which there is a kernel."""
        return tuple(sorted({kernel.bits for kernel in self.kernels}))


def target_named(device: str, provider: str | None = None, dtype: str | None = None) -> Target:
    """The target of a device (cpu, igpu, npu) or of its own name (webgpu, dml); ValueError naming what there is.

    An igpu is reached through webgpu unless `provider` says dml. `dtype` chooses the type of activations where the
    provider has both.
    """
    if device in DEVICES:
        offered = DEVICES[device]
        name = provider or offered[0]
    else:
        offered, name = (device,), provider or device
    if device not in DEVICES and device not in TARGETS:
        raise ValueError(f"target {device!r} does not exist; use {', '.join(DEVICES)}")
    if name not in offered:
        raise ValueError(f"{device} has no provider {name!r}; use {' or '.join(offered)}, or leave it out")
    target = TARGETS[name]
    if dtype is None or dtype == target.dtype:
        return target
    if dtype not in _DTYPES[name]:
        raise ValueError(f"{name} has no dtype {dtype!r}; use {' or '.join(_DTYPES[name])}, or leave it out")
    return replace(target, dtype=dtype)


def _either(values: tuple[int, ...]) -> str:
    return "/".join(str(value) for value in values)


_BLOCKS = (16, 32, 64, 128, 256)

# Source: onnxruntime 1.31 (x64 and arm64), its kernel selection read and each row run on x64 AVX512-VNNI, 2026-11.
_CPU = Target(
    name="cpu",
    device="cpu",
    provider="cpu",
    dtype="float32",
    kernels=(
        Kernel("2-bit x int8 activations", 2, (32, 64, 128), (4,)),
        Kernel("4-bit x int8 activations", 4, _BLOCKS, (4,)),
        Kernel("4-bit x float32 activations", 4, _BLOCKS, (0, 1, 2, 3)),
        Kernel("8-bit x int8 activations", 8, _BLOCKS, (4,)),
    ),
    level=4,
    supports=frozenset(FEATURES) - {"g_idx", "float_zeros", "qk_norm", "fused_mlp"},
)

# Source: onnxruntime main of 2026-08, webgpu/quantization/matmul_nbits (bits 2/4/8, zero points uint8 only, no g_idx,
# bias; the DP4A path), its GroupQueryAttention and fused operators. Every width in blocks of 16 to 256, ragged inputs
# too, run on a software Vulkan driver through onnxruntime-webgpu 1.27 at level 0: within 1e-6 of the CPU, 2026-11.
# Accuracy level 4 is the builder's default there.
_WEBGPU = Target(
    name="webgpu",
    device="igpu",
    provider="webgpu",
    dtype="float16",
    kernels=tuple(
        kernel
        for bits in WIDTHS
        for kernel in (
            Kernel(f"WebGPU {bits}-bit x int8 (DP4A)", bits, (32, 64, 128, 256), (4,), k_multiple=128, n_multiple=16),
            Kernel(f"WebGPU {bits}-bit x float", bits, _BLOCKS, LEVELS),
        )
    ),
    level=4,
    supports=frozenset(
        ["ragged", "bias", "implied_zeros", "gather", "rotary", "packed_qkv", "qk_norm", "fused_mlp", "experts"]
    ),
    notes=(
        "WebGPU: run on a software Vulkan driver only (float32), on no GPU",
        "WebGPU: DP4A also needs subgroups and no Apple GPU; otherwise the same node runs on float activations",
    ),
)

# Source: onnxruntime main of 2026-08, DmlOperatorMatMulNBits.cpp (bits 4/8; K a multiple of the block; no bias, no
# g_idx; dequantize + GEMM on the GPU), GatherBlockQuantized not registered; the builder's own layout for dml. Blocks
# and accuracy levels: no limit found, none tried.
_DML = Target(
    name="dml",
    device="igpu",
    provider="dml",
    dtype="float16",
    kernels=tuple(Kernel(f"DirectML {bits}-bit, dequantize + GEMM", bits, _BLOCKS, LEVELS) for bits in (4, 8)),
    level=EXACT,
    supports=frozenset(["implied_zeros"]),
    widened={2: 4},
    notes=(
        "DirectML is in sustained engineering: onnxruntime-directml ended at 1.24.4 (March 2026); prefer WebGPU",
        "DirectML: not run here, as it needs Windows; the folder was run on the CPU provider",
    ),
)

# The operators that AMD lists for the NPU (Ryzen AI 1.8 documentation, read 2026-11) ...
NPU_OPS = frozenset(
    {
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "MatMulNBits",
        "Add",
        "RotaryEmbedding",
        "GroupQueryAttention",
        "Sigmoid",
        "Mul",
    }
)
# ... and what the GenAI builder's layout for dml, which AMD's flow takes, has around them: the embedding, the lengths
# for attention, reshapes around the norms of queries and keys (builder 0.18, its graphs read 2026-11). These run on
# the host.
HOST_OPS = frozenset(["Constant", "Gather", "Cast", "Shape", "ReduceSum", "Sub", "Reshape"])

# Source: Ryzen AI 1.8 documentation (OGA flow, model preparation) and the published models: AWQ, uint4, asymmetric,
# groups of 128 (schemes for 32 and 64 exist), read 2026-11. The layout is the builder's for dml.
_NPU = Target(
    name="npu",
    device="npu",
    provider="dml",
    dtype="float16",
    kernels=(Kernel("Ryzen AI 4-bit x bfloat16", 4, (32, 64, 128), LEVELS),),
    level=EXACT,
    supports=frozenset(),
    widened={2: 4},
    ops=NPU_OPS | HOST_OPS,
    notes=(
        "NPU: nothing was run on one; the folder was run on the CPU provider, and the table follows AMD's documents",
        "NPU: 2-bit codes are stored in 4-bit fields, so 2 bits save neither time nor memory there",
        "NPU: whether adapters as inputs of the graph run there is not documented",
    ),
)

TARGETS: dict[str, Target] = {target.name: target for target in (_CPU, _WEBGPU, _DML, _NPU)}
DEVICES = {"cpu": ("cpu",), "igpu": ("webgpu", "dml"), "npu": ("npu",)}  # the first provider is the default
# Types of activations for which the GenAI builder 0.18 writes int4 models (float32 on webgpu by use_webgpu_fp32).
_DTYPES = {"cpu": ("float32",), "webgpu": ("float16", "float32"), "dml": ("float16",), "npu": ("float16",)}
