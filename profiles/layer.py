"""One layer of a decoder as forecasts see it: which matrices it has, how much of them a token uses, what it caches.

Sizes are those of the published configurations. `window` is how many tokens a query sees, itself included; None: all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

LARGEST = 10**9  # no size of a model is larger; what is, is a damaged file
QK_NORMS = ("", "head", "all")
BIASES = ("qkv", "o", "mlp")


class Linear(NamedTuple):
    """A weight matrix (n, k) of a layer: `copies` of it (1, or one per expert), of which a token uses `active`.

    `kept_float` marks routers, which nobody quantizes.
    """

    module: str
    n: int
    k: int
    copies: int = 1
    active: int = 1
    biased: bool = False
    kept_float: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Latent attention: keys and values of a token are made of one cached vector of `kv_lora` + `rope` numbers.

    A head's keys are `nope` numbers of the latent and `rope` turned ones that all heads share, its values `v`. Queries
    come from a vector of `q_lora` numbers, or straight from the layer's input if that is None.
    """

    kv_lora: int
    nope: int
    rope: int
    v: int
    q_lora: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture: `count` MLPs of inner size `ffn`, of which each token takes `active`.

    `shared` is the inner size of the MLP that every token passes too (0: none), which `shared_gate` weighs by a number
    of its own. `router_bias`: the router has a number per expert beside its matrix.
    """

    count: int
    active: int
    ffn: int
    shared: int = 0
    shared_gate: bool = False
    router_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, may_be_zero=("shared",))
        if self.active > self.count:
            raise ValueError(f"{self.active} active experts of {self.count} are contradictory; check the configuration")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. `ffn` is 0 where there are only experts.

    qk_norm: "head" norms each head's queries and keys, "all" those of all heads together. biases: which linears have
    one, of "qkv", "o" and "mlp". norms: how many of the layer's width; norm_terms: numbers of each per element (0: no
    weights, 1: a scale, 2: an offset too). fused: q, k and v are one matrix in the model itself, gate and up another.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int = 0
    window: int | None = None
    gated: bool = True
    qk_norm: str = ""
    biases: tuple[str, ...] = ()
    sinks: bool = False
    norms: int = 2
    norm_terms: int = 1
    fused: bool = False
    latent: Latent | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        check_sizes(self, may_be_zero=("ffn", "norms", "norm_terms"))
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} KV heads evenly; the config is damaged")
        if not self.ffn and self.experts is None:
            raise ValueError("a layer with neither an MLP (ffn = 0) nor experts is none; check the configuration")
        if self.qk_norm not in QK_NORMS or not set(self.biases) <= set(BIASES):
            known = f"{QK_NORMS} and {BIASES}"
            raise ValueError(f"qk_norm {self.qk_norm!r} or biases {self.biases} are unknown; there are {known}")

    @property
    def key_size(self) -> int:
        """Numbers of a head's key, as scores multiply them."""
        return self.latent.nope + self.latent.rope if self.latent else self.head_dim

    @property
    def value_size(self) -> int:
        """Numbers of a head's value."""
        return self.latent.v if self.latent else self.head_dim

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """What a token adds to the cache: (vectors, numbers of each), for keys and values or the latent alone."""
        if self.latent:
            return ((1, self.latent.kv_lora + self.latent.rope),)
        return ((self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim))

    @property
    def qk_norm_size(self) -> int:
        """Numbers of the norms of queries and keys."""
        if not self.qk_norm:
            return 0
        return 2 * self.head_dim if self.qk_norm == "head" else (self.heads + self.kv_heads) * self.head_dim

    def visible(self, tokens: int) -> int:
        """How many of `tokens` the last one sees."""
        return tokens if self.window is None else min(tokens, self.window)

    def linears(self, hidden: int) -> Iterator[Linear]:
        """Every matrix in the order of the model, modules named from the layer on ("mlp.down_proj")."""
        yield from self._latent_linears(hidden, self.latent) if self.latent else self._attention_linears(hidden)
        if self.ffn:
            yield from self._mlp("mlp", hidden, self.ffn)
        if self.experts:
            yield from self._expert_linears(hidden, self.experts)

    def _attention_linears(self, hidden: int) -> Iterator[Linear]:
        query, key, biased = self.heads * self.head_dim, self.kv_heads * self.head_dim, "qkv" in self.biases
        sizes = {"qkv_proj": query + 2 * key} if self.fused else {"q_proj": query, "k_proj": key, "v_proj": key}
        for name, n in sizes.items():
            yield Linear(f"self_attn.{name}", n, hidden, biased=biased)
        yield Linear("self_attn.o_proj", hidden, query, biased="o" in self.biases)

    def _latent_linears(self, hidden: int, latent: Latent) -> Iterator[Linear]:
        biased, query = "qkv" in self.biases, self.heads * self.key_size
        if latent.q_lora is None:
            yield Linear("self_attn.q_proj", query, hidden)
        else:
            yield Linear("self_attn.q_a_proj", latent.q_lora, hidden, biased=biased)
            yield Linear("self_attn.q_b_proj", query, latent.q_lora)
        yield Linear("self_attn.kv_a_proj_with_mqa", latent.kv_lora + latent.rope, hidden, biased=biased)
        yield Linear("self_attn.kv_b_proj", self.heads * (latent.nope + latent.v), latent.kv_lora)
        yield Linear("self_attn.o_proj", hidden, self.heads * latent.v, biased="o" in self.biases)

    def _mlp(self, prefix: str, hidden: int, ffn: int, copies: int = 1, active: int = 1) -> Iterator[Linear]:
        sizes = {"gate_proj": ffn, "up_proj": ffn} if self.gated else {"up_proj": ffn}
        if self.gated and self.fused:
            sizes = {"gate_up_proj": 2 * ffn}
        biased = "mlp" in self.biases
        for name, n in sizes.items():
            yield Linear(f"{prefix}.{name}", n, hidden, copies, active, biased)
        yield Linear(f"{prefix}.down_proj", hidden, ffn, copies, active, biased)

    def _expert_linears(self, hidden: int, experts: Experts) -> Iterator[Linear]:
        yield Linear("mlp.router", experts.count, hidden, biased=experts.router_bias, kept_float=True)
        yield from self._mlp("mlp.experts", hidden, experts.ffn, experts.count, experts.active)
        if experts.shared:
            yield from self._mlp("mlp.shared_expert", hidden, experts.shared)
        if experts.shared_gate:
            yield Linear("mlp.shared_expert_gate", 1, hidden, kept_float=True)

    def vectors(self, hidden: int) -> int:
        """Numbers of its norms and sinks: all that is in no matrix and no matrix's bias."""
        found = self.norms * self.norm_terms * hidden + self.heads * self.sinks
        found += self.qk_norm_size
        if self.latent:
            found += (self.latent.q_lora or 0) + self.latent.kv_lora
        return found

    def parameters(self, hidden: int, *, active: bool = False) -> int:
        """Numbers it holds, or those that one token uses."""
        matrices = sum(
            (linear.active if active else linear.copies) * linear.n * (linear.k + linear.biased)
            for linear in self.linears(hidden)
        )
        return matrices + self.vectors(hidden)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Layer:
        """The layer whose fields `dataclasses.asdict` wrote; unknown keys are ignored."""
        latent, experts = value.get("latent"), value.get("experts")
        plain = _known(Layer, value)
        plain["biases"] = tuple(plain.get("biases", ()))
        plain["latent"] = Latent(**_known(Latent, latent)) if latent else None
        plain["experts"] = Experts(**_known(Experts, experts)) if experts else None
        return Layer(**plain)

    def within(self, max_context: int) -> Layer:
        """The same layer; a window that no context reaches is none."""
        return replace(self, window=None) if self.window is not None and self.window >= max_context else self


def check_sizes(value: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError naming the first number of a dataclass that is no size."""
    for field in fields(value):
        found = getattr(value, field.name)
        optional = found is None and "None" in str(field.type)
        if "int" not in str(field.type) or optional:
            continue
        least = 0 if field.name in may_be_zero else 1
        if type(found) is not int or not least <= found <= LARGEST:
            wanted = f"a whole number of {least} to {LARGEST:,}"
            raise ValueError(f"{field.name} = {found!r} is not {wanted}; the model's configuration is damaged")


def _known(kind: type[Any], value: dict[str, Any]) -> dict[str, Any]:
    return {field.name: value[field.name] for field in fields(kind) if field.name in value}
