"""Charts: drawn without a display, self-contained, with every operator and curve that there are numbers for."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import configs
from rlkit.profiles import charts
from rlkit.profiles.account import Model
from rlkit.profiles.architecture import of_config
from rlkit.profiles.device import find
from rlkit.profiles.forecast import Forecast, Peaks, Workload, forecast
from rlkit.profiles.places import of_rates, of_unit
from rlkit.profiles.sweeps import Prepared, Sweep, sweep
from rlkit.profiles.table import Table
from rlkit.recover import recipe

QWEN3 = of_config(configs.QWEN3_4B)
PLACE = of_rates(Peaks(40e9, 1e12, packed_flops_per_s=4e12))


def made(unit: str = "hx370:cpu") -> Forecast:
    return forecast(QWEN3, recipe.load("w4w2-gateup"), of_unit(*find(unit)), Workload(512, 8))


def swept(*names: str, **how: object) -> Sweep:
    models = {name: Prepared(Model(QWEN3, recipe.load(name), PLACE)) for name in names}
    return sweep(models, Workload(512, 8), **how)  # type: ignore[arg-type]


def svg(tmp_path: Path, draw: charts.Draw) -> str:
    return charts.save(tmp_path / "chart.svg", "title", {"words": draw}).read_text()


def test_a_roofline_shows_both_phases_roofs_and_the_slowest_operators(tmp_path: Path) -> None:
    text = svg(tmp_path, lambda: charts.draw_roofline(made()))
    ElementTree.fromstring(text)
    for part in ("prefill of 512 tokens", "one token after them", "fp32: 1.50 T/s", "int8-vnni: 5.99 T/s", "120 GB/s"):
        assert part in text
    assert "uncalibrated" in text and re.search(r"down_proj \(\d+%\)", text)
    assert "mathdefault" not in text and charts.INK not in text


def test_operators_lie_on_or_below_their_roof() -> None:
    figure = charts.draw_roofline(made())
    phases = (made().prefill, made().decode)
    for axis, phase in zip(figure.axes, phases, strict=True):
        roof = max(phase.place.rates.roofs.values())
        points = [tuple(place) for marks in axis.collections for place in marks.get_offsets().tolist()]
        assert len(points) == sum(bool(cost.flops and cost.nbytes) for cost in phase.costs) > 8
        for intensity, speed in points:
            assert speed <= min(roof, intensity * phase.place.rates.bytes_per_s) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("names", "how", "curves"),
    [
        (("w4", "w8"), {"contexts": (128, 1024, 8192)}, 2),
        (("w4",), {"chunks": (32, 128, None)}, 1),
        (("w4", "w8"), {"contexts": (128, 1024), "chunks": (64, None)}, 4),
    ],
)
def test_a_sweep_has_a_curve_for_each_combination(names: tuple[str, ...], how: dict[str, object], curves: int) -> None:
    found = swept(*names, **how)
    for axis in charts.draw_sweep(found).axes:
        assert len(axis.lines) == curves
    assert len(charts.describe_sweep(found).split("; ")) == curves


def test_recipes_are_bars() -> None:
    left, right = charts.draw_sweep(swept("w4", "w4w2-gateup", "w8")).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["w4", "w4w2-gateup", "w8"]
    assert len(left.patches) == len(right.patches) == 3


def test_points_without_numbers_are_left_out() -> None:
    found = swept("w4", contexts=(128, 256, 99_999))
    left = charts.draw_sweep(found).axes[0]
    assert list(left.lines[0].get_xdata()) == [128, 256]


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    table = Table("A <table>", ("name", "value"), (("a & b", "1"),), "a note")
    drawn: dict[str, charts.Draw] = {
        charts.describe_roofline(made()): lambda: charts.draw_roofline(made()),
        "a sweep": lambda: charts.draw_sweep(swept("w4", contexts=(128, 256))),
    }
    text = charts.save(tmp_path / "page.html", "Title & more", drawn, [table]).read_text()
    assert text.count("<svg") == 2 and text.count('role="img"') == 2 and "Title &amp; more" in text
    assert "<td>a &amp; b</td>" in text and "A &lt;table&gt;" in text and "a note" in text
    assert not re.search(r"(src|href)=\"(?!#)", text) and "<script" not in text
    assert html.escape("Roofline of Qwen3ForCausalLM as w4w2-gateup. Prefill: ") in text


def test_pictures_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "chart.png"
    charts.save(path, "title", {"words": lambda: charts.draw_roofline(made())})
    assert path.read_bytes().startswith(b"\x89PNG") and [each.name for each in path.parent.iterdir()] == ["chart.png"]
    with pytest.raises(ValueError, match=r"end it with \.png, \.svg, \.html"):
        charts.save(tmp_path / "chart", "title", {"words": lambda: charts.draw_roofline(made())})
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_hybrids_show_the_roofs_of_both_units() -> None:
    igpu, npu = (of_unit(*find(f"hx370:{unit}")) for unit in ("igpu", "npu"))
    both = forecast(QWEN3, recipe.load("w4"), igpu, Workload(512, 8), prefill_at=npu)
    titles = [axis.get_title(loc="left") or axis.get_title() for axis in charts.draw_roofline(both).axes]
    assert "hx370:npu" in titles[0] and "hx370:igpu" in titles[1]
    slow = replace(PLACE, rates=Peaks(1e6, 1e6))
    assert charts.draw_roofline(forecast(QWEN3, None, slow, Workload(1, 1))).axes
