"""Devices: the package's numbers and their provenance, names, what a unit answers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkit.profiles import device, devicefile
from rlkit.profiles.device import Device, Memory, Unit
from rlkit.profiles.step import Kind
from test_devicefile import measured

RYZEN = ("7840u", "7840hs", "8845hs", "hx370", "ai7-350", "max395", "hx470")
BUILT_IN = device.built_in()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def values(table: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value below a device's table, with the path to it."""
    if isinstance(table, dict) and "value" in table:
        yield key, table
    elif isinstance(table, dict | list):
        items = table.items() if isinstance(table, dict) else enumerate(table)
        for name, item in items:
            yield from values(item, f"{key}.{name}")


ALL_VALUES = [
    pytest.param(table, id=f"{found.name}{key}")
    for found in BUILT_IN.values()
    for key, table in values(devicefile.to_table(found))
]


def computed(expression: str) -> float:
    """The value of the arithmetic that a note begins with: numbers, x, /, +, brackets."""
    signs = {ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Add: operator.add}

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        assert isinstance(node, ast.BinOp), expression
        return float(signs[type(node.op)](value(node.left), value(node.right)))

    return value(ast.parse(expression.replace(" x ", " * "), mode="eval").body)


# --- the package's file ---------------------------------------------------------------------------------------------


def test_every_unit_of_the_ryzen_parts_and_the_comparison_parts_are_there() -> None:
    assert {name: tuple(BUILT_IN[name].units) for name in RYZEN} == dict.fromkeys(RYZEN, ("cpu", "igpu", "npu"))
    assert set(BUILT_IN) - set(RYZEN) == {"v100-pcie", "v100-sxm2", "h100", "m4", "x-elite", "lunar-lake"}
    for name in RYZEN:
        cpu, igpu, npu = BUILT_IN[name].units.values()
        assert cpu.peak("fp32").value < igpu.peak("fp32").value < igpu.peak("fp16").value
        assert npu.peak("int8").value > cpu.peak("int8").value
        assert BUILT_IN[name].tdp_watts


@pytest.mark.parametrize("table", ALL_VALUES)
def test_every_value_says_where_it_is_from(table: dict[str, Any]) -> None:
    assert " " in table["source"] or "." in table["source"]  # a short name that [sources] lacks would be one word
    assert re.fullmatch(r"20\d\d-\d\d", table["date"])
    if table["basis"] == "derived":
        assert computed(table["note"].partition(":")[0]) == pytest.approx(table["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("unit", "data_type", "expected"),
    [
        ("7840u:cpu", "fp32", 1306e9),
        ("7840u:cpu", "int8", 5.2e12),
        ("hx370:cpu", "fp32", 1498e9),
        ("ai7-350:cpu", "fp32", 1088e9),
        ("max395:cpu", "fp32", 5222e9),
        ("max395:cpu", "int8", 20.9e12),
        ("8845hs:igpu", "fp32-valu", 4.15e12),
        ("8845hs:igpu", "fp32-dual", 8.29e12),
        ("8845hs:igpu", "fp16", 16.6e12),
        ("hx370:igpu", "fp16", 23.8e12),
        ("ai7-350:igpu", "fp32-valu", 3.07e12),
        ("max395:igpu", "fp16", 59.4e12),
        ("hx470:igpu", "fp32-dual", 12.7e12),
        ("7840hs:npu", "int8-rated", 10e12),
        ("7840hs:npu", "int8", 6.76e12),
        ("8845hs:npu", "int8-rated", 16e12),
        ("hx370:npu", "bf16", 14.71e12),
        ("max395:npu", "int8", 38.05e12),
        ("v100", "fp16", 112e12),
        ("v100-sxm2", "fp16", 125e12),
        ("h100", "bf16", 989e12),
        ("m4:npu", "int8", 38e12),
    ],
)
def test_peaks_are_the_published_ones(unit: str, data_type: str, expected: float) -> None:
    assert device.find(unit, BUILT_IN)[1].peak(data_type).value == pytest.approx(expected, rel=5e-3)


RANKS = ("wmma", "tensor", "dual", "valu", "vnni", "gemm", "synthetic", "rated")


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_default_variant_follows_the_order_that_the_file_states(name: str) -> None:
    for unit in BUILT_IN[name].units.values():
        for kind, chosen in unit.defaults.items():
            variants = [peak for peak in unit.peaks if device.type_of(peak) == kind]
            assert chosen == min(variants, key=lambda peak: RANKS.index(peak.partition("-")[2]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_unit_reads_more_than_the_memory_gives(name: str) -> None:
    found = BUILT_IN[name]
    for unit in found.units.values():
        assert found.bandwidth is not None and 0 < unit.bytes_per_s <= found.bandwidth.value


def test_bandwidth_belongs_to_the_unit_and_is_capped_by_the_memory() -> None:
    halo = BUILT_IN["max395"]
    assert [unit.bytes_per_s for unit in halo.units.values()] == [108.6e9, 212e9, 256e9]
    slow = replace(halo, memories=(Memory("slow", measured(150e9, "B/s")),))
    assert [unit.bytes_per_s for unit in slow.units.values()] == [108.6e9, 150e9, 150e9]


def test_what_is_known_of_dispatch_and_power() -> None:
    npu = BUILT_IN["ai7-350"].units["npu"]
    assert (npu.dispatch_seconds, npu.watts) == (63e-6, 1.24)
    cpu = BUILT_IN["hx370"].units["cpu"]
    assert (cpu.dispatch_seconds, cpu.watts, cpu.memory_nbytes) == (0.0, None, None)


def test_the_classes_of_efficiency_are_the_kinds_of_operators() -> None:
    assert set(device.CLASSES) == set(Kind)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "name", "unit"),
    [
        ("hx370", "hx370", "cpu"),
        ("hx370:igpu", "hx370", "igpu"),
        ("HX 370:NPU", "hx370", "npu"),
        ("ryzen ai 9 hx 370", "hx370", "cpu"),
        ("AI Max+ 395:igpu", "max395", "igpu"),
        ("strix-halo:cpu", "max395", "cpu"),
        ("V100", "v100-pcie", "gpu"),
        ("ai7_350@DDR5-5600:igpu", "ai7-350", "igpu"),
    ],
)
def test_names_and_aliases(asked: str, name: str, unit: str) -> None:
    found, part = device.find(asked)
    assert (found.name, part.name) == (name, unit)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hx371", r"no device 'hx371'; did you mean hx370 or hx470\?"),
        ("qqqq", "known are 7840u, 7840hs"),
        ("", "known are 7840u"),
        ("hx370:gpu", "hx370 has no unit 'gpu' .* hx370:cpu, hx370:igpu, hx370:npu"),
        ("hx370:", "hx370 has no unit ''"),
        ("m4:cpu", "m4 has no unit 'cpu'"),
        ("hx370@ddr4:cpu", "hx370 has no memory 'ddr4'; there is LPDDR5X-7500, LPDDR5X-8000, DDR5-5600"),
        ("hx370@0GB", "no memory '0GB'"),
        ("here", "run `rlkit calibrate`"),
    ],
)
def test_unknown_names_say_what_is_near(asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        device.find(asked)
    assert "\n" not in str(caught.value)


def test_another_memory_changes_what_all_units_read_and_hold() -> None:
    assert device.find("hx370@ddr5-5600:igpu")[1].bytes_per_s == 89.6e9
    assert device.find("hx370@ddr5-5600@32gb:igpu")[1].memory_nbytes == 32 * 10**9
    assert device.find("max395")[1].memory_nbytes == 128 * 10**9  # the largest that is sold
    assert device.find("max395@64 GB")[1].memory_nbytes == 64 * 10**9
    assert device.find("hx370@ddr5-5600")[0].memory == BUILT_IN["hx370"].memories[2]


# --- what a unit answers --------------------------------------------------------------------------------------------


def test_a_type_without_a_rate_is_computed_in_a_wider_one() -> None:
    cpu, npu = BUILT_IN["hx370"].units["cpu"], BUILT_IN["hx370"].units["npu"]
    assert cpu.peak_name("fp16") == cpu.peak_name("bf16") == "fp32"
    assert cpu.peak_name("int4") == "int8-vnni"
    assert npu.peak_name("fp8") == "bf16-gemm"
    assert BUILT_IN["m4"].units["igpu"].peak_name("int8") == "fp32"
    with pytest.raises(ValueError, match="the npu has no known rate for fp32, nor for a wider type; it has int8-rated"):
        npu.peak("fp32")
    with pytest.raises(ValueError, match="no known rate for fp128"):
        cpu.peak("fp128")


def test_a_unit_without_bandwidth_says_so_when_asked() -> None:
    with pytest.raises(ValueError, match="the gpu has no known bandwidth"):
        _ = Unit("gpu").bytes_per_s


def test_the_smaller_limit_of_memory_counts() -> None:
    unit = Unit("npu", memory=measured(4e9, "B"))
    assert unit.memory_nbytes == 4 * 10**9
    assert Device("d", "d", {"npu": unit}, installed_nbytes=10**9).units["npu"].memory_nbytes == 10**9
    assert Device("d", "d", {"npu": unit}, installed_nbytes=10**10).units["npu"].memory_nbytes == 4 * 10**9
