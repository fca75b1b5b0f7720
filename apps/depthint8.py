"""Int8 files of a work folder's networks: quantized as they are and, where that loses, after they learned to bear it.

    OUT/onnx/NAME-int8.onnx    the better one of the two
    OUT/onnx/NAME-int8.json    how it was made, and what it loses

What is lost is judged on training samples, so that held-out ones decide nothing.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlkit.apps import depthscore
from rlkit.apps.depthscore import Predict
from rlkit.apps.depthwork import INT8, Work, samples_of, training_of
from rlkit.recover import depthfile
from rlkit.recover.atomic import write_bytes, write_json
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Tell
from rlkit.recover.source import read_json

CALIBRATED_ON, JUDGED_ON = 8, 16  # training samples
TOLERANCE = {Kind.MONO: 0.005, Kind.STEREO: 0.005}  # share of SSIM lost, three-pixel error added (half a point)
STEPS_SHARE, RATE_SHARE = 0.5, 0.1  # of those of smaller networks
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Int8:
    """How an int8 file was made. lost: by the network as it was, and by the file; steps: of learning in between."""

    method: str
    keep: str
    lost_at_once: float
    lost: float
    steps: int = 0

    @property
    def how(self) -> str:
        """In words."""
        kept = {"none": "", "ends": ", first and last convolutions in float"}[self.keep]
        learned = f", after {self.steps} steps with simulated int8" if self.steps else ""
        return f"the row without int8, statically quantized (QDQ, {self.method}{kept}){learned}"


def make(work: Work, name: str, tell: Tell) -> Int8:
    """Write the int8 file of a network whose float file is there, unless it is there too; how it was made."""
    path = work.onnx(name, INT8)
    facts = path.with_suffix(".json")
    if path.is_file() and facts.is_file():
        found = read_json(facts)
        try:
            return Int8(**{key: value for key, value in found.items() if key != "schema_version"})
        except TypeError as error:
            raise ValueError(f"{facts} does not say how int8 was made; remove it to make the file again") from error
    judge = _Judge(work, name)
    with tempfile.TemporaryDirectory() as folder:
        best, data = judge.quantized(work.onnx(name), Path(folder))
        if best.lost > TOLERANCE[work.settings.kind]:
            best, data = min((best, data), _recovered(work, name, judge, best, tell), key=lambda each: each[0].lost)
    write_bytes(path, data)
    write_json(facts, {"schema_version": SCHEMA_VERSION, **asdict(best)})
    _state(work, name).unlink(missing_ok=True)
    return best


def _state(work: Work, name: str) -> Path:
    return work.state(f"{name}{INT8}")


def _recovered(work: Work, name: str, judge: _Judge, before: Int8, tell: Tell) -> tuple[Int8, bytes]:
    """The network in int8 after it learned what its float values say."""
    from rlkit.export.vision import to_onnx
    from rlkit.recover import depthtrain, int8aware

    network, description = depthfile.load(work.folder(name))
    plan = training_of(work.settings, slim=True, lesson="teacher")
    plan = replace(plan, steps=max(1, round(STEPS_SHARE * plan.steps)), rate=RATE_SHARE * plan.rate)
    samples = samples_of(work.settings)
    steps = int8aware.recover(network, samples, plan, scale=description.scale, state=_state(work, name))
    depthtrain.fold(steps, plan, f"int8 {name}", tell)
    with tempfile.TemporaryDirectory() as folder:
        learned = Path(folder, "learned.onnx")
        learned.write_bytes(to_onnx(network, description))
        found, data = judge.quantized(learned, Path(folder))
    return replace(found, lost_at_once=before.lost, steps=plan.steps), data


class _Judge:
    """Quantizes files and says what that loses against the float network of a name."""

    def __init__(self, work: Work, name: str) -> None:
        description = depthfile.read(work.folder(name))
        self.kind, self.scale = description.kind, description.scale
        samples = samples_of(work.settings)
        self.calibrated_on = samples.first(CALIBRATED_ON)
        judged = [samples.get(samples.count - 1 - index) for index in range(min(samples.count, JUDGED_ON))]
        self.held = depthscore.held_samples("judged", judged, description.size)
        self.wanted = self._leading(work.predict(name))

    def quantized(self, model: Path, folder: Path) -> tuple[Int8, bytes]:
        """An int8 file of a float one; where the figure says nothing, lost is how far the answers are apart."""
        from rlkit.runtime.visionquant import quantize_static
        from rlkit.runtime.visionrun import open_depth

        out = folder / "int8.onnx"
        chosen = quantize_static(model, out, self.calibrated_on).chosen
        run = open_depth(out)
        lost = depthscore.worse(self.kind, self._leading(lambda *images: [run(*images)]), self.wanted)
        lost = chosen.error if lost is None else lost
        return Int8(chosen.method, chosen.keep, lost, lost), out.read_bytes()

    def _leading(self, predict: Predict) -> float | None:
        return depthscore.leading(self.kind, depthscore.scores([self.held], predict, self.scale))
