"""Pictures of reckoned memory: a model's totals over contexts, and reported savings beside ours.

Drawn with matplotlib, imported only when a picture is asked for (see charts.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkit.profiles.charts import COLOURS
from rlkit.profiles.frontier import published
from rlkit.profiles.frontier.analytic import Analytic
from rlkit.profiles.plots import BLUE, GREEN, GREY, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = (("weights", BLUE), ("cache", ORANGE), ("activations", GREEN))


def describe(found: Analytic) -> str:
    """The picture of `draw` in words."""
    ends = (found.at(context)[0] for context in dict.fromkeys((found.contexts[0], found.contexts[-1])))
    said = ", ".join(f"{one.nbytes() / 1e9:.1f} GB at {one.point.context:,} tokens" for one in ends)
    return f"Total memory of {found.name} over contexts by weights and caches; the reference takes {said}."


def draw(found: Analytic) -> Figure:
    """A line for the reference, and a band for each weights from the fewest bits of cache to the most."""
    figure, (axis,) = _figure(1)
    contexts = found.contexts
    reference = [found.at(context)[0].nbytes() / 1e9 for context in contexts]
    axis.plot(contexts, reference, color=GREY, linestyle="--", marker="s", label="16 bit, whole prompts")
    names = dict.fromkeys(one.point.weights for one in found.estimates)
    for name, colour in zip(names, COLOURS, strict=False):
        groups = [[one for one in found.at(context)[1:] if one.point.weights == name] for context in contexts]
        if not all(groups):
            continue
        low, high = ([end(one.nbytes() for one in group) / 1e9 for group in groups] for end in (min, max))
        axis.fill_between(contexts, low, high, color=colour, alpha=0.25)
        axis.plot(contexts, high, color=colour, marker="o", label=f"{name}, the most bytes of cache")
        axis.plot(contexts, low, color=colour, marker="v", label=f"{name}, the fewest")
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=30)
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("GB")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{found.name}: weights + cache + peak of activations")
    axis.legend(fontsize=8)
    return figure


def describe_published() -> str:
    """The picture of `draw_published` in words."""
    each = (published.compare(one) for one in published.models().values())
    said = "; ".join(f"{one.published.name} {one.saved['flash']:.0%} of {one.published.saved:.0%}" for one in each)
    return f"Memory saved at 10k tokens, reckoned of reported: {said}."


def draw_published() -> Figure:
    """The parts of reference and point of each of the five, and the total that the reported share implies."""
    figure, (left, right) = _figure(2)
    compared = [published.compare(one) for one in published.models().values()]
    bottoms = [[0.0] * len(compared), [0.0] * len(compared)]
    for name, colour in PARTS:
        for number, (of, hatch) in enumerate((("reference", ""), ("point", "//"))):
            heights = [getattr(getattr(one, of).memory, f"{name}_nbytes") / 1e9 for one in compared]
            places = [at - 0.2 + 0.4 * number for at in range(len(compared))]
            label = name if number == 0 else None
            left.bar(places, heights, 0.38, bottom=bottoms[number], color=colour, hatch=hatch, label=label)
            bottoms[number] = [low + height for low, height in zip(bottoms[number], heights, strict=True)]
    implied = [one.point.nbytes() / (1 - one.published.saved) / 1e9 for one in compared]
    left.plot([at - 0.2 for at in range(len(compared))], implied, "_", color=INK, markersize=16, label="implied total")
    left.set_ylabel("GB")
    left.set_title("reference, and the reported point (hatched)")
    for kind, colour, shape in (("flash", BLUE, "o"), ("logits", ORANGE, "^"), ("eager", GREEN, "s")):
        right.plot([100 * one.saved[kind] for one in compared], shape, color=colour, label=kind)
    right.plot([100 * one.published.saved for one in compared], "X", color=INK, label="reported")
    right.set_title("saved, %, by what the reference's peak counts")
    names = [one.published.name for one in compared]
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, rotation=20)
        axis.legend(fontsize=8)
    return figure


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4 if panels > 1 else 8.0, 4.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.patch.set_alpha(0.0)
        axis.grid(visible=True, alpha=0.25, linewidth=0.6)
    return figure, axes
