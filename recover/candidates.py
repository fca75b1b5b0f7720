"""Every way to store every matrix of a model, carried out and kept on disk, with a forecast of the damage each does.

For a weight error E (N, K) the forecast is trace(G E H E^T) / 2 nats per token (K-FAC, see sweep.py): right in
proportion within one kind of matrix, not in absolute terms, which `sensitivity.py` sees to. lm_head has no G; there the
forecast is the plain output error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlkit.recover import packing
from rlkit.recover.adapter import snap
from rlkit.recover.allocate import Choice, Unit, stored_nbytes
from rlkit.recover.atomic import need_space
from rlkit.recover.compensate import Compensation, compensate
from rlkit.recover.correct import LowRank, Moments, forecast
from rlkit.recover.layers import PARTS, alternate, stacked
from rlkit.recover.model import linears
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.quantizers import Quantize
from rlkit.recover.recipe import GROUPS, NAMED, Recipe, Scheme, load
from rlkit.recover.sweep import HEAD, LayerMoments, Rows, sweep

Key = tuple[str, Scheme]  # full module name and the scheme carried out


def quantize(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme) -> Quantized:
    """Error compensation; at 8 bits the nearest codes, as there is next to no error to compensate."""
    if scheme.bits == 8:
        return quantize_nearest(weight, scheme, moment.diagonal())
    return compensate(weight, moment, scheme, Compensation(damping=0.01, rounds=1))


@dataclass(frozen=True, slots=True)
class Search:
    """What is tried.

    schemes: for every matrix, groups fitted to its input size; head_schemes: for lm_head, which takes no adapter.
    fixed: recipes that the result has to hold its own against; their schemes are tried too.
    rounds: how often quantization and correction alternate after the first of each.
    """

    schemes: tuple[Scheme, ...] = (
        Scheme(2, 64),
        Scheme(2, 64, adapter_rank=32),
        Scheme(4, 128),
        Scheme(4, 128, adapter_rank=32),  # for about the bytes of group 32, less damage
    )
    head_schemes: tuple[Scheme, ...] = (Scheme(4, 128), Scheme(4, 32))
    fixed: tuple[Recipe, ...] = field(default_factory=lambda: tuple(load(name) for name in NAMED))
    rounds: int = 1
    quantize: Quantize = quantize

    def without_adapters(self) -> Search:
        """The same search for a method that keeps no adapters, so that no bytes are set aside for them."""
        schemes = dict.fromkeys(replace(scheme, adapter_rank=0) for scheme in self.schemes)
        return replace(self, schemes=tuple(schemes), fixed=tuple(_bare(recipe) for recipe in self.fixed))


def _bare(recipe: Recipe) -> Recipe:
    rules = (replace(rule, scheme=replace(rule.scheme, adapter_rank=0)) for rule in recipe.rules)
    return replace(recipe, rules=tuple(rules))


def plan_units(model: Any, search: Search) -> list[Unit]:
    """The units of a model and their choices, damage still unknown; what no group divides is left out.

    q, k and v of a layer are one unit: with one scheme, export packs them into one matrix.
    """
    modules = {name: module for name, module in linears(model).items() if module.in_features % min(GROUPS) == 0}
    together: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        together.setdefault(f"{parent}.qkv" if last in ("q_proj", "k_proj", "v_proj") else name, []).append(name)
    units = []
    for names in together.values():
        sizes = [(modules[name].out_features, modules[name].in_features) for name in names]
        found = _schemes(names[0], sizes[0][1], search)
        choices = [Choice(scheme, sum(stored_nbytes(scheme, n, k) for n, k in sizes)) for scheme in found]
        units.append(Unit(tuple(names), sizes[0][1], sum(n * k for n, k in sizes), tuple(choices)))
    if not units:
        raise ValueError(
            f"no linear of this model has an input size that is a multiple of {min(GROUPS)}; use no recipe"
        )
    return units


def _schemes(name: str, k: int, search: Search) -> list[Scheme]:
    offered = search.head_schemes if name == HEAD else search.schemes
    fixed = [recipe.scheme_for(name) for recipe in search.fixed]
    found = [scheme.resolve(k) for scheme in (*offered, *fixed) if scheme is not None]
    return list(dict.fromkeys(replace(scheme, adapter_rank=0) if name == HEAD else scheme for scheme in found))


def quantize_all(
    model: Any, rows: Rows, units: Sequence[Unit], search: Search, scratch: Path, *, tell: Tell = silent
) -> Candidates:
    """Carry out every choice of every unit, layer by layer; layers that `scratch` holds already are not done again.

    `scratch` belongs to one model; another one's candidates would be taken for this one's. Needs about as many bytes of
    disk as all candidates take.
    """
    wanted = {name: [choice.scheme for choice in unit.choices] for unit in units for name in unit.modules}
    for name in wanted:
        if not torch.isfinite(model.get_submodule(name).weight).all():
            raise ValueError(f"{name} has NaN or infinite weights, so nothing can be measured; repair the model first")
    kept = Candidates(scratch / f"candidates-{_fingerprint(rows, wanted, search)}")
    prefixes = list(dict.fromkeys(_prefix(name) for name in wanted))
    if set(kept.done) >= set(prefixes):
        return kept
    if not kept.done:
        need_space(scratch, sum(choice.nbytes for unit in units for choice in unit.choices))
    others = [name for name in wanted if name != HEAD]
    for layer in sweep(model, rows, others, scratch / "moments", done=kept.done, tell=tell):
        if layer.prefix in prefixes:
            kept.add(layer.prefix, try_layer(layer, wanted, search))
        tell(Progress("candidates", len(kept.done), len(prefixes), layer.prefix or HEAD))
    return kept


def _prefix(module: str) -> str:
    return "" if module == HEAD else ".".join(module.split(".")[:3])


def _fingerprint(rows: Rows, wanted: Mapping[str, Sequence[Scheme]], search: Search) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(rows.ids).tobytes())
    digest.update(repr((rows.ids.shape, rows.output_rows, rows.seed, search.rounds, wanted)).encode())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A matrix carried out in one scheme: codes, the correction if it has a rank, and the forecast of its damage."""

    quantized: Quantized
    low_rank: LowRank | None
    forecast: float


@torch.no_grad()
def try_layer(layer: LayerMoments, wanted: Mapping[str, Sequence[Scheme]], search: Search) -> dict[Key, Candidate]:
    """Every wanted scheme of a layer's linears; matrices that share their input are quantized as one."""
    groups: dict[tuple[int, Scheme], list[str]] = {}
    for name, moment in layer.inputs.items():
        for scheme in wanted.get(layer.full(name), ()):
            groups.setdefault((id(moment), scheme), []).append(name)
    modules = linears(layer.layer)
    plain: dict[Key, Quantized] = {}  # where the alternation starts from, too
    made: dict[Key, Candidate] = {}
    for (_, scheme), names in groups.items():
        base = replace(scheme, adapter_rank=0)
        quantize = partial(stacked, moment=layer.inputs[names[0]], scheme=base, quantize=search.quantize)
        weights = {name: modules[name].weight.detach().float() for name in names}
        if not all((name, base) in plain for name in names):
            plain |= {(name, base): state for name, state in quantize(weights).items()}
        states = {name: plain[name, base] for name in names}
        pairs: dict[str, tuple[Quantized, LowRank]] = {}
        if scheme.adapter_rank:
            pairs = alternate(layer, dict.fromkeys(names, scheme.adapter_rank), states, quantize, search.rounds)
        for name, weight in weights.items():
            state, low_rank = pairs.get(name, (states[name], None))
            low_rank = None if low_rank is None else snap(low_rank)  # on the 8-bit grid, as it would be kept
            error = weight - state.dequantize()
            error = error if low_rank is None else error - low_rank.product()
            damage = forecast(error, Moments(layer.inputs[name], layer.outputs.get(name)))
            made[layer.full(name), scheme] = Candidate(state, low_rank, damage)
    return made


class Candidates:
    """Candidates on disk, one file per layer; a file cut off in writing is as good as none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []  # prefixes of the layers that are complete
        self._files: dict[str, Path] = {}
        self._forecasts: dict[tuple[str, str], float] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._enter(path)

    def add(self, prefix: str, made: Mapping[Key, Candidate]) -> None:
        """Keep a layer's candidates."""
        tensors: dict[str, torch.Tensor] = {}
        for (module, scheme), candidate in made.items():
            at, state = f"{module}/{_tag(scheme)}", candidate.quantized
            codes = packing.pack(state.codes.numpy(), scheme.bits)
            tensors |= {f"{at}/codes": torch.from_numpy(codes), f"{at}/scales": state.scales.half()}
            tensors[f"{at}/zeros"] = state.zeros
            if candidate.low_rank is not None:
                tensors |= {f"{at}/a": candidate.low_rank.a, f"{at}/b": candidate.low_rank.b}
        forecasts = [[module, _tag(scheme), candidate.forecast] for (module, scheme), candidate in made.items()]
        facts = {"prefix": prefix, "forecasts": json.dumps(forecasts)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{prefix or HEAD}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".part"), facts)
        path.with_suffix(".part").replace(path)
        self._enter(path)

    def _enter(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
        except SafetensorError:
            path.unlink()
            return
        self.done.append(facts["prefix"])
        for module, tag, damage in json.loads(facts["forecasts"]):
            self._forecasts[module, tag] = damage
            self._files[module] = path

    def forecast(self, module: str, scheme: Scheme) -> float:
        """The damage forecast for a module in a scheme, only proportional."""
        return self._forecasts[module, _tag(scheme)]

    def weight(self, module: str, scheme: Scheme) -> torch.Tensor:
        """The float32 matrix (N, K) that a candidate stands for, its correction added."""
        at = f"{module}/{_tag(scheme)}"
        with safe_open(self._files[module], framework="pt") as file:
            packed, scales, zeros = (file.get_tensor(f"{at}/{part}") for part in PARTS)
            factors = [file.get_tensor(f"{at}/{part}") for part in "ba"] if scheme.adapter_rank else []
        codes = torch.from_numpy(packing.unpack(packed.numpy(), scheme.bits, scales.shape[1] * scheme.group))
        weight = Quantized(codes, scales.float(), zeros, scheme).dequantize()
        return weight.addmm_(*factors) if factors else weight


def _tag(scheme: Scheme) -> str:
    return f"{scheme.bits}-{scheme.group}-{scheme.adapter_rank}" + ("-symmetric" if scheme.symmetric else "")
