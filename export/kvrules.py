"""What the runtime asks of attention with a quantized KV cache; it says so only when the first token is computed.

Source: onnxruntime 1.31.1 on the CPU, every form below run, 2026-11. Scales that are negative or zero run as well; the
export writes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from rlkit.export.kvscales import PER, TENSOR

if TYPE_CHECKING:
    from rlkit.export.rules import Finding, Site

SCALES = {12: "k_scale", 13: "v_scale"}
TYPES = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}


def quantized_cache(site: Site) -> Iterator[Finding]:
    """A cache of integers: on the CPU only, keys and values of one kind and width, with scales of the right number."""
    schemes = {site.text(name, "NONE") for name in ("k_quant_type", "v_quant_type")}
    if schemes == {"NONE"}:
        if site.integer("kv_cache_bit_width", 0):
            found = "it has a width for a quantized cache, and no quant types"
            yield site.finding("unsupported", found, "write k_quant_type and v_quant_type, or drop kv_cache_bit_width")
        return
    name = site.target.name
    if not site.has("quantized_kv"):
        found = f"its cache is quantized ({', '.join(sorted(schemes))}), which {name} has no kernel for"
        other = "set the provider option kvCacheQuantizationBits=4 instead" if name == "webgpu" else "use a float cache"
        yield site.finding("unsupported", found, f"build without kv_cache_quant_scheme; {other}")
        return
    if len(schemes) > 1:
        found = f"keys and values are quantized differently ({', '.join(sorted(schemes))})"
        yield site.finding(
            "unsupported", found, "quantize both in the same way; one scale may be written for each channel"
        )
        return
    (scheme,) = schemes
    if scheme not in PER.values():
        yield site.finding("unsupported", f"its quant type {scheme} does not exist", f"use {' or '.join(PER.values())}")
        return
    yield from _form(site, scheme)
    yield from _off_the_flash_kernel(site)


def _form(site: Site, scheme: str) -> Iterator[Finding]:
    bits = site.integer("kv_cache_bit_width", 0)
    if bits not in TYPES:
        yield site.finding("unsupported", "its cache is neither 4 nor 8 bits wide", "use 4 or 8")
        return
    past = site.input(3)
    if past is not None and past.dtype not in (TYPES[bits], None):
        found = f"its cache is {bits} bits wide and of type {past.dtype.name}"
        yield site.finding("unsupported", found, f"declare past and present as {TYPES[bits].name}")
    width = past.shape[-1] if past is not None and past.shape is not None and len(past.shape) == 4 else None
    head = width * 8 // bits if isinstance(width, int) else None
    count = 1 if scheme == PER[TENSOR] else head and head * site.integer("kv_num_heads", 0)
    for place, part in SCALES.items():
        value = site.input(place)
        if value is None:
            yield site.finding("unsupported", f"it has no {part}", "write the scales as float32 initializers")
        elif value.const_value is not None and count is not None and value.const_value.size != count:
            found = f"its {part} holds {value.const_value.size} numbers, not {count}"
            yield site.finding("unsupported", found, "write 1 for PER_TENSOR, KV heads x head size for PER_CHANNEL")


def _off_the_flash_kernel(site: Site) -> Iterator[Finding]:
    extras = {"softcap": site.number("softcap", 0.0) != 0.0, "smooth_softmax": site.integer("smooth_softmax", 0) > 0}
    extras |= {"head_sink": site.input(11) is not None, "qk_output": site.integer("qk_output", 0) > 0}
    if used := [extra for extra, there in extras.items() if there]:
        found = f"with a quantized cache, {' and '.join(used)} keep it from the flash kernel"
        yield site.finding("slow", found, "use a float cache for this model")
