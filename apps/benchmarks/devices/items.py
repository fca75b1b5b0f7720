"""What a device script measures: shapes with random weights made here, or bundles that are given; what each needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.export.targets import Target
from rlkit.profiles.account import Model
from rlkit.profiles.architecture import of_shape
from rlkit.profiles.bench import Case
from rlkit.profiles.bundle import MANIFEST, BundleSize, size_of
from rlkit.profiles.devicerun import RANDOM
from rlkit.profiles.needs import activations_nbytes, cached_nbytes
from rlkit.profiles.operators import Adapters
from rlkit.profiles.places import HALF, Place
from rlkit.profiles.rates import Peaks
from rlkit.profiles.standard import MODELS, model_name
from rlkit.profiles.storage import Storage
from rlkit.recover import recipe as recipes
from rlkit.recover.source import ModelShape, read_json

CONFIG = "genai_config.json"
COPIES = 2  # of the weights: as they were read, and as the runtime packs them anew or hands them to the device
CHUNK = 512  # tokens of a prompt at once
BUILDERS = ("torch", "transformers", "onnxruntime_genai")


@dataclass(frozen=True, slots=True)
class Item:
    """One model by one recipe; `bundle` is its folder, None where random weights are to be made."""

    model: str
    recipe_name: str
    shape: ModelShape
    recipe: recipes.Recipe | None
    bundle: Path | None = None

    @property
    def weights(self) -> str:
        """What rows say of its weights."""
        return RANDOM if self.bundle is None else self.bundle.resolve().name

    @property
    def name(self) -> str:
        """For progress and reasons."""
        return f"{self.model} {self.recipe_name}"

    def at(self, place: Place) -> Model:
        """The model as it is stored at a place; random weights have no branches."""
        return Model(of_shape(self.shape), self.recipe, place, Adapters(0) if self.bundle is None else None)

    def size(self) -> BundleSize:
        """What its manifest says; only of a bundle that is there."""
        assert self.bundle is not None
        folder = manifest_folder(self.bundle)
        return size_of(read_json(folder / MANIFEST), str(folder / MANIFEST))


def plain(name: str) -> recipes.Recipe:
    """A recipe without its corrections, as random codes have none; ValueError naming the recipes there are."""
    chosen = recipes.load(name)
    rules = (recipes.Rule(rule.match, dataclasses.replace(rule.scheme, adapter_rank=0)) for rule in chosen.rules)
    return recipes.Recipe(chosen.name, tuple(rules))


def stand_ins(models: Iterable[str], asked: Iterable[str]) -> tuple[Item, ...]:
    """Every model by every recipe, with random weights; ValueError for a name that is not known."""
    chosen = [plain(name) for name in asked]
    items = []
    for model in models:
        if model not in MODELS:
            raise ValueError(f"no shape {model!r}; use {', '.join(MODELS)}, or give bundles with --bundles")
        items += [Item(model, recipe.name, MODELS[model], recipe) for recipe in chosen]
    return tuple(items)


def given(folders: Sequence[Path]) -> tuple[Item, ...]:
    """Bundle folders, and those inside of folders that are none.

    Raises FileNotFoundError or ValueError for a folder without any, and for two of one model and recipe.
    """
    found: dict[tuple[str, str], Item] = {}
    for bundle in itertools.chain.from_iterable(map(_bundles, folders)):
        item = _given(bundle)
        other = found.setdefault((item.model, item.recipe_name), item)
        if other is not item:
            raise ValueError(f"{other.bundle} and {bundle} are both {item.name}; give one of them at a time")
    return tuple(found.values())


def _bundles(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; make a bundle with `rlkit export`")
    if (folder / CONFIG).is_file():
        yield folder
        return
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inner:
        raise ValueError(f"{folder} is no bundle and holds none (no {CONFIG}); make one with `rlkit export`")
    yield from inner


def _given(folder: Path) -> Item:
    home = manifest_folder(folder)
    size = size_of(read_json(home / MANIFEST), str(home / MANIFEST))
    own = home / "recipe.toml"
    recipe = recipes.load(own) if own.is_file() else None
    name = model_name(size.shape.architecture, size.shape.parameters)
    return Item(name, size.recipe, size.shape, recipe, folder)


def manifest_folder(bundle: Path) -> Path:
    """Where a bundle's rlkit.json is: in it, or in the folder it was finished from, which is named without the mode.

    Raises ValueError where there is none.
    """
    from rlkit.export.npu import MODES

    whole = bundle.resolve()
    stems = (whole.name.removesuffix(f"-{mode}") for mode in MODES if whole.name.endswith(f"-{mode}"))
    homes = (whole, *(whole.with_name(stem) for stem in stems))
    for home in homes:
        if (home / MANIFEST).is_file():
            return home
    raise ValueError(f"{bundle} has no {MANIFEST}, nor has the folder it was made from; keep both side by side")


def no_kernel(item: Item, target: Target) -> str:
    """Why the target has no kernel for the item's bits, or the bundle is another target's; empty if it has."""
    if item.bundle is None:
        assert item.recipe is not None  # random weights follow one
        bits = {rule.scheme.bits for rule in item.recipe.rules}
    else:
        manifest: dict[str, Any] = read_json(manifest_folder(item.bundle) / MANIFEST)
        made_for = manifest.get("target") or "cpu"
        if made_for != target.name:
            return f"the bundle was made for {made_for}; export it with --target {target.device} ({target.provider})"
        bits = {int(tensor["bits"]) for tensor in manifest["tensors"] if tensor.get("group")}
    missing = sorted(width for width in bits if target.stored_bits(width) not in target.widths)
    return target.remedy(missing[0]) if missing else ""


def nominal(target: Target) -> Place:
    """How the target stores a model, at a place of no particular speed."""
    storage = Storage() if target.float_nbytes == 4 else HALF
    return Place(target.name, Peaks(1e9, 1e9), storage, widened=target.widened)


def needs_nbytes(item: Item, target: Target, room: int) -> int:
    """Memory for weights and their copy, a cache of `room` tokens and activations: an estimate from sizes alone."""
    place = nominal(target)
    stored = item.size().nbytes if item.recipe is None else item.at(place).stored_nbytes
    model = of_shape(item.shape)
    live = activations_nbytes(model, place, CHUNK, 1, 0)
    return COPIES * stored + cached_nbytes(model, place, room, 1) + live


def no_memory(item: Item, target: Target, room: int, free_nbytes: int) -> str:
    """Why a test of that room does not fit into free memory; empty if it does."""
    needed = needs_nbytes(item, target, room)
    if needed <= free_nbytes:
        return ""
    return f"not enough memory: about {needed / 1e9:.1f} GB with a cache of {room}, {free_nbytes / 1e9:.1f} GB are free"


def no_room(item: Item, test: Case) -> str:
    """Why a test does not fit the model's context; empty if it does."""
    limit = item.shape.max_context
    return "" if test.room <= limit else f"{test.room} tokens exceed the model's context of {limit}"


def no_builder() -> str:
    """Why random weights cannot be made here; empty if they can."""
    missing = [name for name in BUILDERS if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f'no {missing[0]} to build it with and no bundle given; pip install "rlkit-edge[export]", or --bundles'
