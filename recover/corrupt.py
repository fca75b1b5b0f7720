"""Damage done on purpose: a full-precision model with its weights degraded in one of several ways, to be recovered.

Recover-LoRA in its first form (2510.08600) regains the accuracy that a model lost to anything which degrades weights,
improper serialization for one. Its corruption procedure is not published; these six cover what happens to files:

    noise     Gaussian noise; amount = its standard deviation as a fraction of each matrix's root mean square
    dtype     a round trip through float8 e4m3 (3 mantissa bits, smallest step 2^-9, largest value 448) by a writer that
              forgot the scale per tensor; amount = how many powers of two the weights were scaled down meanwhile, so
              that small ones lose bits or vanish; 0 = written as they are
    zero      blocks of 64 x 64 weights set to zero, as unwritten pages of a file; amount = their share
    swap      blocks of 16 rows exchanged in pairs, as chunks written in the wrong order; amount = the share moved
    truncate  mantissa bits cut off (towards zero); amount = bits kept, of float32's 23, float16's 10, bfloat16's 7
    prune     the smallest weights of each matrix set to zero; amount = their share

Every matrix draws from a generator of its own (seed, kind, name): the same call gives the same damage however the model
is cut into files.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rlkit.recover import weights
from rlkit.recover.atomic import fresh_folder, refuse_existing, write_json
from rlkit.recover.progress import Tell, silent
from rlkit.recover.source import Source, read_json, read_shape

SCHEMA_VERSION = 1
FILE = "corruption.json"
BLOCK = 64
ROWS = 16
E4M3_MAX = 448.0
Corrupt = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]  # (N, K) float32, amount -> (N, K) float32


def noise(weight: torch.Tensor, amount: float, rng: torch.Generator) -> torch.Tensor:
    """Add Gaussian noise of `amount` times the matrix's root mean square."""
    spread = amount * float(weight.square().mean().sqrt())
    return weight + spread * torch.randn(weight.shape, generator=rng)


def dtype(weight: torch.Tensor, amount: float, _rng: torch.Generator) -> torch.Tensor:
    """Round to float8 e4m3 after scaling down by 2^amount, then scale back up."""
    stored = (weight * 2.0**-amount).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    back: torch.Tensor = stored.float() * 2.0**amount
    return back


def zero(weight: torch.Tensor, amount: float, rng: torch.Generator) -> torch.Tensor:
    """Set a share of the 64 x 64 blocks to zero, at least one."""
    n, k = weight.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    chosen = torch.randperm(rows * columns, generator=rng)[: max(1, round(amount * rows * columns))]
    lost = torch.zeros(rows * columns, dtype=torch.bool)
    lost[chosen] = True
    mask = lost.view(rows, columns).repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return weight.masked_fill(mask, 0.0)


def swap(weight: torch.Tensor, amount: float, rng: torch.Generator) -> torch.Tensor:
    """Exchange a share of the blocks of rows in pairs, at least one pair; a rest of fewer rows stays in place."""
    size = max(1, min(ROWS, len(weight) // 2))
    count = len(weight) // size
    pairs = min(count // 2, max(1, round(amount * count / 2)))
    chosen = torch.randperm(count, generator=rng)[: 2 * pairs]
    order = torch.arange(count)
    order[chosen] = chosen.view(2, pairs).flip(0).reshape(-1)
    rows = (order[:, None] * size + torch.arange(size)).reshape(-1)
    return torch.cat([weight[rows], weight[count * size :]])


def truncate(weight: torch.Tensor, amount: float, _rng: torch.Generator) -> torch.Tensor:
    """Keep `amount` bits of each float32 mantissa."""
    mask = -1 << (23 - int(amount))
    return (weight.contiguous().view(torch.int32) & mask).view(torch.float32)


def prune(weight: torch.Tensor, amount: float, _rng: torch.Generator) -> torch.Tensor:
    """Set the smallest share of the weights to zero."""
    flat = weight.flatten().clone()
    flat[flat.abs().argsort(stable=True)[: round(amount * flat.numel())]] = 0.0
    return flat.view(weight.shape)


@dataclass(frozen=True, slots=True)
class Corruption:
    """One way to damage a matrix: what it does, what its amount is, the usual one, and the range allowed."""

    apply: Corrupt
    about: str
    amount: float
    least: float
    most: float
    whole: bool = False

    def refuse(self, kind: str, amount: float) -> None:
        """Raise ValueError unless `amount` makes sense."""
        if not self.least <= amount <= self.most or (self.whole and amount != int(amount)):
            what = "a whole number of" if self.whole else "in"
            span = f"{self.least:g}..{self.most:g}"
            raise ValueError(f"amount = {amount:g} of {kind} must be {what} {span}: it is the {self.about}")


CORRUPTIONS = {
    "noise": Corruption(noise, "noise as a fraction of each matrix's root mean square", 0.2, 1e-6, 10.0),
    "dtype": Corruption(dtype, "powers of two by which weights were scaled down in float8 e4m3", 5, 0, 16, True),
    "zero": Corruption(zero, "share of 64 x 64 blocks set to zero", 0.05, 1e-6, 1.0),
    "swap": Corruption(swap, "share of blocks of 16 rows that change places", 0.05, 1e-6, 1.0),
    "truncate": Corruption(truncate, "number of mantissa bits kept", 1, 0, 22, True),
    "prune": Corruption(prune, "share of the smallest weights set to zero", 0.4, 1e-6, 1.0),
}


@dataclass(frozen=True, slots=True)
class Damage:
    """What to do to which modules; without an amount, the kind's usual one."""

    kind: str
    amount: float | None = None
    match: tuple[str, ...] = ("*_proj",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CORRUPTIONS:
            raise ValueError(f"kind {self.kind!r} is no damage known here; use one of {', '.join(CORRUPTIONS)}")
        if not self.match or not all(self.match):
            raise ValueError('an empty pattern matches no module; use one such as "*_proj"')
        CORRUPTIONS[self.kind].refuse(self.kind, self.strength)

    @property
    def strength(self) -> float:
        """The amount that counts."""
        return CORRUPTIONS[self.kind].amount if self.amount is None else self.amount

    def apply(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """The damaged matrix of `module` in the type of `weight`."""
        digest = hashlib.sha256(f"{self.seed} {self.kind} {module}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return CORRUPTIONS[self.kind].apply(weight.float(), self.strength, rng).to(weight.dtype)

    def matrices(self, source: Source) -> dict[str, tuple[int, int]]:
        """(N, K) of every module to be damaged; a tied lm_head is `model.embed_tokens`, which both names match.

        Raises ValueError for a model that is quantized already and for a pattern that matches nothing.
        """
        weights.need_float(source)
        shape = read_shape(source)
        sizes = {name: (n, k) for name, n, k in shape.linears() if not (shape.tied and name == "lm_head")}
        sizes["model.embed_tokens"] = (shape.vocab, shape.hidden)
        names = {name: [name] for name in sizes}
        if shape.tied:
            names["model.embed_tokens"].append("lm_head")
        chosen: set[str] = set()
        for pattern in self.match:
            hit = {name for name, known in names.items() if any(fnmatch.fnmatchcase(n, pattern) for n in known)}
            if not hit:
                few = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in sizes))
                raise ValueError(f"pattern {pattern!r} matches no matrix of {source.reference}; there are {few}")
            chosen |= hit
        return {name: size for name, size in sizes.items() if name in chosen}


def corrupt(source: Source, damage: Damage, out: Path, *, force: bool = False, tell: Tell = silent) -> Path:
    """Write a damaged copy of `source` as the Hugging Face folder `out`, with `corruption.json`, and return it.

    Raises ValueError for a source or pattern that cannot be used, FileExistsError if `out` exists and not `force`.
    """
    refuse_existing(out, force=force)
    if out.exists() and out.resolve() == source.path.resolve():
        raise ValueError(f"{out} is the model itself, which would be lost; choose another -o")
    sizes = damage.matrices(source)
    alias = {"lm_head": "model.embed_tokens"} if read_shape(source).tied else {}  # both stored: both damaged alike
    rows: dict[str, dict[str, Any]] = {}

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        module, _dot, part = name.rpartition(".")
        module = alias.get(module, module)
        if part != "weight" or module not in sizes:
            return weight
        damaged = _damaged(source, damage, module, weight, sizes[module])
        rows[module] = {"shape": list(weight.shape), "relative_error": relative_error(weight, damaged)}
        return damaged

    with fresh_folder(out, force=force) as folder:
        weights.rewrite(source, folder, change, tell)
        missing = [name for name in sizes if name not in rows]
        if missing:
            raise ValueError(f"{source.reference} lacks {missing[0]}.weight; fetch the model again")
        if not any(row["relative_error"] for row in rows.values()):
            what = f"{damage.kind} with amount {damage.strength:g} changes nothing in this model's number format"
            raise ValueError(f"{what}; choose another amount")
        write_json(folder / FILE, _facts(source, damage, {name: rows[name] for name in sizes}))
    return out


def _damaged(source: Source, damage: Damage, module: str, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(weight.shape) != size:
        what = f"{module} is {tuple(weight.shape)} where the config says {size}"
        raise ValueError(f"{source.reference}: {what}; fetch the model again")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{source.reference}: {module} holds NaN or infinity already; name a sound model")
    return damage.apply(module, weight)


def relative_error(weight: torch.Tensor, damaged: torch.Tensor) -> float:
    """|| damaged - weight || / || weight ||, Frobenius; 0 for a matrix of zeros, which none of these damages."""
    size = float(weight.float().norm())
    return float((damaged.float() - weight.float()).norm()) / size if size else 0.0


def _facts(source: Source, damage: Damage, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    earlier = source.path / FILE
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {"reference": source.reference, "kind": str(source.kind), "identity": weights.identity(source)},
        "damage": {**asdict(damage), "amount": damage.strength, "match": list(damage.match)},
        "about": CORRUPTIONS[damage.kind].about,
        "matrices": rows,
        "earlier": read_json(earlier) if earlier.is_file() else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
