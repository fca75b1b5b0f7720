"""A work folder of depth networks: the full one, its smaller ones, their ONNX files, and what is known of all of them.

    OUT/networks/NAME     rlkit.recover.depthfile's folder, complete or absent
    OUT/onnx/NAME.onnx    float32, any size;  NAME-int8.onnx and .json (depthint8.py)
    OUT/state/NAME        how far a training is; gone when its network is complete
    OUT/depth.json        profiles/depthresult.py, with pictures.safetensors, report.html and pictures/*.png

A second call goes on where the first one stopped. A network in the folder that was made with other settings is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.apps import depthscore
from rlkit.apps.depthscore import Held, Predict
from rlkit.profiles.depthresult import Row
from rlkit.recover import depthfile
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthsample import LogScale
from rlkit.recover.progress import Tell
from rlkit.recover.scenes import View

if TYPE_CHECKING:
    from rlkit.recover.depthbatches import Samples
    from rlkit.recover.depthtrain import Training

FULL, SAME = "full", "same"
INT8 = "-int8"
LESSONS = ("truth", "teacher", "both")
Module = Any  # a torch.nn.Module
MAX_SEED = 2**31 - 2
SLIM_ONLY = ("slim_steps", "slim_rate", "lesson")


@dataclass(frozen=True, slots=True)
class Settings:
    """How networks of a work folder learn. pool: scenes to learn from. data: a folder instead of scenes.

    Smaller networks start from cut weights, so `slim_rate` is lower than the `rate` that the full one learns at.
    """

    kind: Kind
    size: tuple[int, int]
    batch: int
    steps: int
    slim_steps: int
    rate: float
    slim_rate: float
    pool: int
    lesson: str = "both"
    seed: int = 0
    data: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED or self.pool < 1:
            raise ValueError(f"seed {self.seed}, pool {self.pool}: use a seed from 0 to {MAX_SEED}, a pool from 1")

    def to_json(self, *, slim: bool) -> dict[str, Any]:
        """Plain JSON values of what decides the full network, or one that is cut from it."""
        fields = asdict(self)
        fields |= {"kind": str(self.kind), "size": list(self.size), "data": self.data and str(self.data)}
        return {name: value for name, value in fields.items() if slim or name not in SLIM_ONLY}


DEFAULTS = {
    Kind.MONO: Settings(Kind.MONO, (96, 128), 8, 700, 350, 2e-3, 2.5e-3, 3000),
    Kind.STEREO: Settings(Kind.STEREO, (128, 256), 6, 600, 300, 1e-2, 4e-3, 800),
}
CUTS = {
    Kind.MONO: ("level", "widths:0.497", "prune:0.25:0.4", "prune:0.1:0.3", "prune:0.05:0.2"),  # half would be 74.9 %
    Kind.STEREO: ("spn:4", "spn:1", "spn:0", "spn:0+prune:0.5", "spn:0+prune:0.25", "spn:0+prune:0.1"),
}


def settings_of(
    full: Description,
    smaller: Description | None = None,
    *,
    steps: int | None = None,
    rate: float | None = None,
    lesson: str | None = None,
) -> Settings:
    """The settings that a full network was made with; of smaller ones as told, else as `smaller` was made, or as usual.

    Raises ValueError for networks that were not made in a work folder, and for a lesson that is none.
    """
    if lesson not in (None, *LESSONS):
        raise ValueError(f"lesson {lesson!r} is none; use one of {', '.join(LESSONS)}")
    asked = {"slim_steps": steps, "slim_rate": rate, "lesson": lesson}
    told: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    try:
        made = {name: value for name, value in full.made["settings"].items() if name not in ("kind", *SLIM_ONLY)}
        made |= {"size": tuple(made["size"]), "data": made["data"] and Path(made["data"])}
        made |= {name: smaller.made["settings"][name] for name in SLIM_ONLY} if smaller else {}
        return replace(DEFAULTS[full.kind], **{**made, **told})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the full network does not say how it was made ({error!r}); train it again") from error


def view_of(settings: Settings) -> View:
    """What scenes show: for pairs a quarter more than a cut, so that cuts differ."""
    height, width = settings.size
    if settings.kind is Kind.STEREO:
        height, width = height + height // 4, width + width // 4
    return View(height, width, max_disparity=min(60.0, width / 4))


@lru_cache(1)
def samples_of(settings: Settings) -> Samples:
    """What networks learn from; all of a work folder share what was rendered or read."""
    from rlkit.recover import depthbatches

    if settings.data is not None:
        return depthbatches.of_folder(settings.kind, settings.data)
    return depthbatches.of_scenes(settings.kind, view_of(settings), settings.seed, settings.pool)


def training_of(settings: Settings, *, slim: bool, lesson: str = "truth") -> Training:
    """The training of the full network, or of one that was cut."""
    from rlkit.recover.depthtrain import Lesson, Training

    steps, rate = (settings.slim_steps, settings.slim_rate) if slim else (settings.steps, settings.rate)
    seed = settings.seed + int(slim)  # another order of the same samples
    return Training(steps, settings.batch, settings.size, rate, seed=seed, lesson=Lesson(lesson))


def file_name(name: str) -> str:
    """A cut as the name of a file."""
    return re.sub(r"[^\w.+-]+", "-", name)


@dataclass(frozen=True, slots=True)
class Work:
    """A work folder and how networks in it learn."""

    out: Path
    settings: Settings

    def folder(self, name: str) -> Path:
        """Where a network is or will be."""
        return self.out / "networks" / file_name(name)

    def onnx(self, name: str, suffix: str = "") -> Path:
        """Where its ONNX file is or will be."""
        return self.out / "onnx" / f"{file_name(name)}{suffix}.onnx"

    def state(self, name: str) -> Path:
        """Where it is kept how far a training is."""
        return self.out / "state" / f"{file_name(name)}.safetensors"

    def done(self, name: str) -> bool:
        """Whether a network is there; ValueError if it was made otherwise."""
        if not self.folder(name).is_dir():
            return False
        made = depthfile.read(self.folder(name)).made.get("settings") or {}
        wanted = self.settings.to_json(slim=name != FULL)
        if other := [f"{key} {made.get(key)}, not {value}" for key, value in wanted.items() if made.get(key) != value]:
            why = f"{self.folder(name)} was made with other settings ({'; '.join(other[:3])})"
            raise ValueError(f"{why}; give those, remove it, or choose another folder")
        return True

    def train_full(self, tell: Tell, shape: Mapping[str, Any] | None = None) -> None:
        """Make the full network, or one of another shape, from nothing."""
        if self.done(FULL):
            return
        kind = self.settings.kind
        scale = LogScale() if kind is Kind.MONO else None
        description = Description(kind, dict(shape or full_shape(kind)), self.settings.size, scale)
        self._learn(FULL, depthfile.build(description, self.settings.seed), description, None, tell)

    def slim(self, cut: str, tell: Tell) -> None:
        """Make a smaller network of the full one, or with the cut `same` let it learn on for as long.

        The teacher is the full network that has learned on, if it is there: what it knows more, smaller ones learn.
        """
        if self.done(cut):
            return
        from rlkit.recover import depthtrain

        full, description = depthfile.load(self.folder(FULL))
        if cut == SAME:
            return self._learn(cut, full, description, None, tell)
        plan = training_of(self.settings, slim=True)
        small: Module = depthtrain.slimmed(full, cut, samples_of(self.settings), plan, description.scale)
        shape = small.shape.to_json()
        teacher = depthfile.load(self.folder(SAME))[0] if self.done(SAME) else full
        self._learn(cut, small, replace(description, shape=shape), teacher, tell)

    def _learn(self, name: str, network: Module, description: Description, teacher: Module | None, tell: Tell) -> None:
        from rlkit.recover import depthtrain

        lesson = "truth" if teacher is None else self.settings.lesson
        plan = training_of(self.settings, slim=name != FULL, lesson=lesson)
        state = self.state(name)
        if lesson == "truth":
            teacher = None
        steps = depthtrain.train(
            network, samples_of(self.settings), plan, scale=description.scale, teacher=teacher, state=state
        )
        facts = depthtrain.fold(steps, plan, f"train {name}", tell)
        made = {"cut": name, "training": facts, "settings": self.settings.to_json(slim=name != FULL)}
        int8 = self.onnx(name, INT8)
        for old in (self.onnx(name), int8, int8.with_suffix(".json")):  # of a network that was removed
            old.unlink(missing_ok=True)
        depthfile.save(self.folder(name), network, replace(description, made=made))
        state.unlink(missing_ok=True)

    def predict(self, name: str) -> Predict:
        """A network as a function of images."""
        from rlkit.recover import depthpredict

        network, description = depthfile.load(self.folder(name))
        return depthpredict.predictor(network, description.scale)

    def row(self, name: str, held: Sequence[Held], frame: tuple[int, int]) -> Row:
        """What is known of a network: its scores, its sizes for a frame of height x width, how it was made."""
        from rlkit.recover import depthpredict, slim

        network, description = depthfile.load(self.folder(name))
        found = depthscore.scores(held, depthpredict.predictor(network, description.scale), description.scale)
        sizes = slim.sizes(network, *frame)
        training = description.made["training"]
        return Row(
            name,
            _how(name, training),
            found,
            sizes.parameters,
            sizes.flops,
            sizes.nbytes,
            folder=str(self.folder(name).relative_to(self.out)),
            train_steps=training["steps"],
            train_seconds=training["seconds"],
        )


def _how(name: str, training: Mapping[str, Any]) -> str:
    taught = {"truth": "the truth", "teacher": "the full network's answers", "both": "truth and the full network"}
    learned = f"{training['steps']} steps from {taught[training['lesson']]}"
    if name == FULL:
        return f"from nothing, {learned}"
    return f"the full network, {learned} more" if name == SAME else f"cut, then {learned}"


def full_shape(kind: Kind) -> dict[str, Any]:
    """The published network of a kind."""
    from rlkit.recover import anynet, depthnets

    return depthnets.FULL.to_json() if kind is Kind.MONO else anynet.AnyShape().to_json()
