"""Simulated KV caches: what they are called, how keys and values are rounded, and how many bytes that takes. No torch.

    k8v4:g32:smooth:w128     keys in 8 bit, values in 4, groups of 32, keys smoothed, the last 128 tokens in 16 bit

    granularity   numbers that share a scale and a zero point                        group
    token         `group` channels of a token of a KV head                           along the head
    channel       a channel over `group` tokens of a KV head (KIVI's keys)           along the tokens
    block         all channels of `group` tokens of a KV head                        along the tokens
    tensor        everything of a layer; it widens where a token needs more          none

Asymmetric, as in KV Pareto: scale = (max - min) / (2^b - 1), zero = round(-min / scale), value = (code - zero) * scale;
codes of 0 .. 2^b - 1 are the paper's signed ones moved by 2^(b-1). With `minimum`, as in KIVI, the zero point is the
least value itself: value = code * scale + min. `symmetric` has no zero point; per channel and per tensor it means what
ONNX Runtime does: scales chosen beforehand (export/kvscales.py), in float32, the same for every token, no groups.

Scales, zero points, means and whatever is in 16 bit take two bytes a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

BITS = (2, 4, 8, 16)
WHOLE = 16  # bits of what is not rounded to codes
GRANULARITIES = ("token", "channel", "tensor", "block")
GROUP = 64
SETTLE = 32  # tokens that smoothing takes the mean of keys from at least; until there are as many, they stay in 16 bit
HALF, SINGLE = 2, 4  # bytes of a number
_BASE = re.compile(r"k(\d+)v(\d+)")
_COUNT = re.compile(r"([gw])(\d+)")


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys, or values, are kept; `group` counts channels for `token`, tokens for `channel` and `block`."""

    bits: int
    granularity: str = "token"
    group: int = GROUP
    symmetric: bool = False
    minimum: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits are no width of a simulated cache; use {', '.join(map(str, BITS))}")
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"granularity {self.granularity!r} of a KV cache does not exist; use {known}")
        if self.group < 1:
            raise ValueError(f"a group of {self.group} numbers holds nothing; use {GROUP}")
        if self.symmetric and self.minimum:
            raise ValueError("a symmetric format has no zero point, so none that is the minimum; leave one of them out")

    @property
    def whole(self) -> bool:
        """Whether nothing is rounded to codes."""
        return self.bits == WHOLE

    @property
    def static(self) -> bool:
        """Whether scales are given beforehand and hold for every token."""
        return not self.whole and self.symmetric and self.granularity in ("channel", "tensor")

    @property
    def tokens_at_once(self) -> int:
        """How many tokens become codes together."""
        by_tokens = not self.whole and not self.static and self.granularity in ("channel", "block")
        return self.group if by_tokens else 1

    def settled(self, tokens: int, window: int, smooth: bool = False) -> int:
        """How many of a sequence's first `tokens` are codes, where the last `window` stay in 16 bit."""
        if self.whole:
            return 0
        old = max(0, tokens - window)
        if smooth and old < SETTLE:
            return 0
        return old // self.tokens_at_once * self.tokens_at_once

    def refuse(self, head_dim: int, what: str) -> None:
        """Raise ValueError for heads that codes or groups do not divide."""
        if self.whole:
            return
        if head_dim * self.bits % 8:
            raise ValueError(f"{what} of {head_dim} channels are no whole bytes at {self.bits} bits; use more bits")
        if self.granularity == "token" and head_dim % self.group:
            fits = next((size for size in (128, 64, 32, 16, 8) if head_dim % size == 0 and size < self.group), head_dim)
            why = f"head_dim {head_dim} of the {what} is not divisible by groups of {self.group}"
            raise ValueError(f"{why}; use a group of {fits}")

    def nbytes(self, kv_heads: int, head_dim: int, tokens: int, window: int = 0, smooth: bool = False) -> int:
        """Bytes of one layer's keys, or values, after `tokens` of one sequence."""
        codes = self.settled(tokens, window, smooth)
        nbytes = kv_heads * head_dim * codes * self.bits // 8 + HALF * kv_heads * head_dim * (tokens - codes)
        if smooth and codes:
            nbytes += HALF * kv_heads * head_dim
        return nbytes + self._scale_nbytes(kv_heads, head_dim, codes)

    def _scale_nbytes(self, kv_heads: int, head_dim: int, codes: int) -> int:
        if self.static:
            return SINGLE * (kv_heads * head_dim if self.granularity == "channel" else 1)
        pairs = {
            "token": kv_heads * (head_dim // self.group) * codes,
            "channel": kv_heads * head_dim * (codes // self.group),
            "block": kv_heads * (codes // self.group),
            "tensor": min(1, codes),
        }[self.granularity]
        return HALF * pairs * (1 if self.symmetric else 2)


FLOAT = KVFormat(WHOLE)


@dataclass(frozen=True, slots=True)
class KVScheme:
    """A cache: how keys and values are kept, whether keys are smoothed, how many recent tokens stay in 16 bit.

    Smoothing takes a mean per channel from keys before they are rounded, and gives it back after: that of the tokens
    which become codes first, at least SETTLE, a prompt's first chunk. The window bounds 16 bit from below where tokens
    are rounded by groups (KIVI's own bounds its keys from above). `name` is what `parse` reads; schemes that do the
    same have the same one.
    """

    name: str
    keys: KVFormat
    values: KVFormat
    smooth: bool = False
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"a window of {self.window} tokens is negative; use 0 or more")
        if self.smooth and (self.keys.whole or self.keys.static):
            why = "are not rounded" if self.keys.whole else "have scales chosen before, for keys as they are"
            raise ValueError(f"{self.name}: keys {why}, so smoothing has nothing to do; leave smooth out")
        if self.window and self.keys.whole and self.values.whole:
            raise ValueError(f"{self.name}: everything is in 16 bit already, so there is no window; leave w out")

    @property
    def static(self) -> bool:
        """Whether keys or values need scales chosen beforehand."""
        return self.keys.static or self.values.static

    def refuse(self, key_dim: int, value_dim: int | None = None) -> None:
        """Raise ValueError, in one line, for heads of a size that this scheme does not fit."""
        self.keys.refuse(key_dim, "keys")
        self.values.refuse(key_dim if value_dim is None else value_dim, "values")


def nbytes(
    scheme: KVScheme, layers: int, kv_heads: int, head_dim: int, tokens: int, *, value_dim: int | None = None
) -> int:
    """Bytes of a cache after `tokens` of one sequence: codes, scales, zero points, means, and the window.

    Raises ValueError as `KVScheme.refuse` does.
    """
    scheme.refuse(head_dim, value_dim)
    keys = scheme.keys.nbytes(kv_heads, head_dim, tokens, scheme.window, scheme.smooth)
    values = scheme.values.nbytes(kv_heads, value_dim or head_dim, tokens, scheme.window)
    return layers * (keys + values)


def parse(words: str, group: int | None = None) -> KVScheme:
    """A scheme from its name: kKvV or one of SCHEMES, and options behind colons, in any order.

    token, channel, tensor, block: the granularity of both; with k or v in front (kchannel) of keys or values only.
    gN: the group, where `group` does not say it; sym; min; smooth; wN: the last N tokens in 16 bit.

    Raises ValueError for what it does not know, and for options that contradict each other.
    """
    base, *options = words.strip().lower().split(":")
    named = _named(base)
    found = dict.fromkeys(("sym", "min", "smooth"), False)
    sizes = {"w": named.window}
    if group is not None:
        sizes["g"] = group
    grains = {"k": named.keys.granularity, "v": named.values.granularity}
    for number, option in enumerate(options):
        count = _COUNT.fullmatch(option)
        part = option[:1] if option[1:] in GRANULARITIES else ""
        if option in options[:number]:
            raise ValueError(f"kv {words!r} says {option} twice; leave one of them out")
        if option in found:
            found[option] = True
        elif option in GRANULARITIES:
            grains = {"k": option, "v": option}
        elif part in ("k", "v"):
            grains[part] = option[1:]
        elif count is not None:
            sizes[count[1]] = int(count[2])
        else:
            known = f"{', '.join(GRANULARITIES)}, the same with k or v in front, gN, wN, sym, min, smooth"
            raise ValueError(f"kv {words!r}: option {option!r} does not exist; use {known}")
    keys, values = (
        _canonical(
            replace(
                form,
                granularity=grains[part],
                group=sizes.get("g", form.group),
                symmetric=form.symmetric or found["sym"],
                minimum=form.minimum or found["min"],
            )
        )
        for part, form in (("k", named.keys), ("v", named.values))
    )
    return _scheme(keys, values, named.smooth or found["smooth"], sizes["w"])


def _named(base: str) -> KVScheme:
    """One of SCHEMES, or two widths with the defaults of everything else."""
    if base in SCHEMES:
        return SCHEMES[base]
    match = _BASE.fullmatch(base)
    if match is None:
        known = ", ".join(SCHEMES)
        raise ValueError(f"kv {base!r} is no simulated cache; use kKvV with widths of {BITS}, or one of {known}")
    return KVScheme(base, KVFormat(int(match[1])), KVFormat(int(match[2])))


def _canonical(form: KVFormat) -> KVFormat:
    """The same format with what it does not use at its default."""
    if form.whole:
        return FLOAT
    return replace(form, group=GROUP) if form.granularity == "tensor" or form.static else form


def _scheme(keys: KVFormat, values: KVFormat, smooth: bool = False, window: int = 0) -> KVScheme:
    """A scheme with the name that it is known by."""
    for scheme in SCHEMES.values():
        if (scheme.keys, scheme.values, scheme.smooth, scheme.window) == (keys, values, smooth, window):
            return scheme
    return KVScheme(_spelled(keys, values, smooth, window), keys, values, smooth, window)


def _spelled(keys: KVFormat, values: KVFormat, smooth: bool, window: int) -> str:
    """The name that `parse` reads back."""
    rounded = [form for form in (keys, values) if not form.whole]
    words = [f"k{keys.bits}v{values.bits}"]
    grains = {form.granularity for form in rounded}
    if len(grains) == 1:
        words += grains - {"token"}
    else:
        pairs = (("k", keys), ("v", values))
        words += [f"{part}{form.granularity}" for part, form in pairs if form.granularity != "token"]
    groups = {form.group for form in rounded if form.tokens_at_once > 1 or form.granularity == "token"} - {GROUP}
    words += [f"g{group}" for group in sorted(groups)]
    words += ["sym"] * any(form.symmetric for form in rounded)
    words += ["min"] * any(form.minimum for form in rounded)
    words += ["smooth"] * smooth
    words += [f"w{window}"] * (window > 0)
    return ":".join(words)


def _table() -> dict[str, KVScheme]:
    """The paper's pairs, KIVI's defaults, and the caches of the runtime."""
    widths = ((16, 16), (8, 8), (8, 4), (8, 2), (4, 4), (4, 2), (2, 2))
    made = [KVScheme(f"k{k}v{v}", _canonical(KVFormat(k)), _canonical(KVFormat(v))) for k, v in widths]
    for bits in (4, 2):
        keys, values = (KVFormat(bits, grain, 32, minimum=True) for grain in ("channel", "token"))
        made.append(KVScheme(f"kivi{bits}", keys, values, window=128))
    for bits in (8, 4):
        for grain, name in (("channel", f"int{bits}"), ("tensor", f"int{bits}-tensor")):
            form = KVFormat(bits, grain, symmetric=True)
            made.append(KVScheme(name, form, form))
    return {scheme.name: scheme for scheme in made}


SCHEMES = _table()
