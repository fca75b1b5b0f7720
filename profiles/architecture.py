"""What a forecast needs to know of a model: sizes of every layer, from its configuration alone.

More families than can be recovered or exported are known here (`profiles.families`), since nothing has to be run:
mixtures of experts, latent attention and MLPs without a gate among them. What is not known: layers that are state
spaces, convolutions or linear attention, and what a model sees or hears; of such models the text part is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles import families, ggufs
from rlkit.profiles.layer import Experts, Latent, Layer, check_sizes
from rlkit.recover.ggufheader import read_header
from rlkit.recover.source import ModelShape, Source, SourceKind, read_json, resolve

__all__ = ["Architecture", "Experts", "Latent", "Layer", "of_config", "of_shape", "read_architecture"]

MANIFEST = "rlkit.json"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder: embedding, layers, a last norm if layers have norms, lm_head."""

    name: str
    hidden: int
    vocab: int
    tied: bool
    max_context: int
    layers: tuple[Layer, ...]
    head_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)
        if not self.layers:
            raise ValueError(f"{self.name} has no layers; the model's configuration is damaged")

    @property
    def kinds(self) -> tuple[tuple[Layer, int], ...]:
        """The layers that differ, in the order of their first, and how many there are of each."""
        objects = {id(layer): layer for layer in self.layers}  # readers reuse them, and comparing hundreds is slow
        found: Counter[Layer] = Counter()
        for key, count in Counter(map(id, self.layers)).items():
            found[objects[key]] += count
        return tuple(found.items())

    @property
    def last_norm(self) -> int:
        """Numbers of the norm after the layers."""
        last = self.layers[-1]
        return self.hidden * last.norm_terms if last.norms else 0

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; a tied embedding counts once."""
        layers = sum(count * layer.parameters(self.hidden) for layer, count in self.kinds)
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return layers + tables + self.last_norm + self.vocab * self.head_bias

    @property
    def active_parameters(self) -> int:
        """Numbers that one token uses: of experts the active ones, of the embedding none but lm_head's."""
        layers = sum(count * layer.parameters(self.hidden, active=True) for layer, count in self.kinds)
        return layers + self.vocab * self.hidden + self.last_norm + self.vocab * self.head_bias

    def linears(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (module, N outputs, K inputs, how many: 1 or one per expert), layer by layer, lm_head last."""
        for index, layer in enumerate(self.layers):
            for linear in layer.linears(self.hidden):
                yield f"model.layers.{index}.{linear.module}", linear.n, linear.k, linear.copies
        yield "lm_head", self.vocab, self.hidden, 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: `kinds` are the layers that differ, `layers` the index of each one's kind."""
        kinds = [layer for layer, _count in self.kinds]
        plain = {name: getattr(self, name) for name in ("name", "hidden", "vocab", "tied", "max_context", "head_bias")}
        order = [kinds.index(layer) for layer in self.layers]
        return {**plain, "kinds": [asdict(layer) for layer in kinds], "layers": order}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Architecture:
        """The architecture that `to_json` wrote; ValueError if it is none."""
        try:
            kinds = [Layer.from_json(kind) for kind in value["kinds"]]
            layers = tuple(kinds[index] for index in value["layers"])
            plain = {name: value[name] for name in ("name", "hidden", "vocab", "tied", "max_context")}
            return Architecture(layers=layers, head_bias=value.get("head_bias", False), **plain)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"this is no architecture ({error} is missing or wrong); write it again") from error


def read_architecture(source: Source | Path | str) -> Architecture:
    """The architecture of a model on disk, from the small files beside its weights.

    A path may be a config.json of any name, a folder or a .gguf file. Raises FileNotFoundError or ValueError, one line
    with the remedy.
    """
    if not isinstance(source, Source):
        path = Path(source).expanduser()
        if path.suffix == ".json" and path.is_file():
            return _of_file(path)
        source = resolve(source)
    if source.kind is SourceKind.GGUF:
        return of_config(ggufs.config_of(read_header(source.file), str(source.file)), str(source.file))
    manifest, config = source.path / MANIFEST, source.path / "config.json"
    if source.kind is SourceKind.BUNDLE and manifest.is_file() and "shape" in read_json(manifest):
        return _of_file(manifest)
    if not config.is_file():
        why = f"{source.path}: no {MANIFEST}, and genai_config.json does not state the size of the MLP"
        raise ValueError(f"{why}; put the model's config.json beside it, or export it with `rlkit export`")
    return _of_file(config)


def of_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """The architecture that a config.json describes; `where` names it in errors."""
    values = families.Values(families.text_part(config), where)
    family, name = families.family_of(values)
    context = values.size("max_position_embeddings")
    try:
        layers = tuple(layer.within(context) for layer in families.layers(values, family, name))
        tied = values.flag("tie_word_embeddings", family.tied)
        hidden, vocab = values.size("hidden_size"), values.size("vocab_size")
        return Architecture(name, hidden, vocab, tied, context, layers, name in families.HEAD_BIAS)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def of_shape(shape: ModelShape) -> Architecture:
    """What the rest of rlkit knows of a model, as an architecture; windows are not part of it."""
    family = shape.family
    whole = "all" if shape.architecture in families.WHOLE_QK_NORM else "head"
    mixture = None
    if shape.experts is not None:
        biased = shape.architecture in families.ROUTER_BIAS
        mixture = Experts(shape.experts, shape.active_experts or 1, shape.ffn, router_bias=biased)
    biases = {"qkv": shape.qkv_bias, "o": shape.attention_bias, "mlp": shape.mlp_bias or family.sinks}
    layer = Layer(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn=0 if mixture else shape.ffn,
        qk_norm=whole if shape.qk_norm else "",
        biases=tuple(name for name, there in biases.items() if there),
        sinks=family.sinks,
        norms=len(family.norms) or 2,
        norm_terms=1 if family.norms else 0,
        fused=family.fused,
        experts=mixture,
    )
    layers = (layer,) * shape.layers
    return Architecture(shape.architecture, shape.hidden, shape.vocab, shape.tied, shape.max_context, layers)


def _of_file(path: Path) -> Architecture:
    """From a config.json, or from a bundle's manifest, which holds the shape."""
    value = read_json(path)
    if isinstance(value.get("shape"), dict):
        return of_shape(ModelShape.from_json(value["shape"]))
    return of_config(value, str(path))
