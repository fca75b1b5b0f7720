"""XRBench's score of a stream of frames (arXiv 2211.08675, as its published code computes it).

    RT     1 / (1 + exp(15 * (finish - deadline in ms))), per frame: almost a step from 1 to 0 at the deadline
    EN     (1500 - mJ) / 1500, per frame
    QoE    1 - dropped / frames
    model  (sum of RT * EN over the frames that ran) / frames * QoE: what is dropped counts twice
    overall  100 * the mean over models

Frames that the end of the run left unfinished past their deadline ran for nothing here: they add 0 and are no drops.
The paper defines an accuracy score as well; its code does not, and neither does this. Language models have no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

__all__ = ["ENERGY_MILLIJOULE", "STEEPNESS", "Score", "overall", "real_time", "score"]

STEEPNESS = 15.0  # per ms
ENERGY_MILLIJOULE = 1500.0  # what scores 0


@dataclass(frozen=True, slots=True)
class Score:
    """Of one stream: `real_time` and `energy` are means over the frames that ran; None where energy is unknown."""

    real_time: float
    energy: float | None
    qoe: float
    model: float | None


def real_time(late_ns: int) -> float:
    """RT of a frame that finished so late, negative = early."""
    power = STEEPNESS * late_ns / 1e6
    return 0.0 if power > 700.0 else 1.0 / (1.0 + exp(power))  # exp(710) is beyond floating point


def score(late_ns: Sequence[int], millijoule: Sequence[float | None], frames: int, dropped: int) -> Score:
    """From the frames that ran, out of all frames, of which so many were dropped. ValueError: no frames."""
    if frames < 1:
        raise ValueError("a score of 0 frames: run for longer than one period")
    times = [real_time(late) for late in late_ns]
    qoe = 1.0 - dropped / frames
    mean = sum(times) / len(times) if times else 0.0
    spent = [mj for mj in millijoule if mj is not None]
    if len(spent) < len(times):
        return Score(mean, None, qoe, None)
    energies = [(ENERGY_MILLIJOULE - mj) / ENERGY_MILLIJOULE for mj in spent]
    model = sum(time * energy for time, energy in zip(times, energies, strict=True)) / frames * qoe
    return Score(mean, sum(energies) / len(energies) if energies else 0.0, qoe, model)


def overall(scores: Sequence[Score]) -> float | None:
    """100 * the mean over models; None without models, or where a model's energy is unknown."""
    models = [score.model for score in scores if score.model is not None]
    return 100.0 * sum(models) / len(models) if models and len(models) == len(scores) else None
