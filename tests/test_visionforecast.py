"""Vision operators counted by hand, their forecast at rates, and rates from chains of single ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import nodes
from rlkit.export import convrepeats
from rlkit.profiles import vision, visionrates
from rlkit.profiles.hardware import Efficiency
from rlkit.profiles.rates import Calibrated, Peaks
from rlkit.profiles.step import Kind, Operator
from rlkit.profiles.visionrates import Conv, Mover, Table, VisionRates
from rlkit.runtime.framebench import open_frame
from rlkit.runtime.framenodes import Node, Value, traced

F = TensorProto.FLOAT
RATES = Peaks(1e9, 1e10, 1e-6, packed_flops_per_s=4e10)


def node(kind: str, *shapes: tuple[int, ...], bits: int = 32) -> Node:
    *ins, out = (Value(bits, shape) for shape in shapes)
    return Node(kind, tuple(ins), (out,))


def one(made: Node, floats: int = 32) -> Operator:
    (found,) = vision.operators([made], floats=floats)
    return found


@pytest.mark.parametrize(
    ("made", "name", "flops", "weights", "moved", "shape"),
    [
        # 2 x outputs x weights of an output channel; each number 4 bytes
        (
            node("FusedConv", (1, 3, 8, 8), (16, 3, 3, 3), (16,), (1, 16, 8, 8)),
            "conv 2d",
            2 * 1024 * 27,
            432,
            192 + 1024,
            (16, 27, 1),
        ),
        (
            node("Conv", (1, 8, 8, 8), (8, 1, 3, 3), (1, 8, 4, 4)),
            "depthwise conv",
            2 * 128 * 9,
            72,
            512 + 128,
            (8, 9, 8),
        ),
        (
            node("Conv", (1, 4, 3, 8, 8), (2, 4, 3, 3, 3), (1, 2, 3, 8, 8)),
            "conv 3d",
            2 * 384 * 108,
            216,
            768 + 384,
            (2, 108, 1),
        ),
        (node("Conv", (1, 8, 4, 4), (4, 4, 1, 1), (1, 4, 4, 4)), "conv 2d", 2 * 64 * 4, 16, 128 + 64, (4, 4, 2)),
        # a joined sum is read as well
        (
            node("FusedConv", (1, 2, 4, 4), (2, 2, 1, 1), (2,), (1, 2, 4, 4), (1, 2, 4, 4)),
            "conv 2d",
            2 * 32 * 2,
            4,
            96,
            (2, 2, 1),
        ),
        (
            node("ConvTranspose", (1, 8, 4, 4), (8, 2, 2, 2), (1, 2, 8, 8)),
            "transposed conv",
            2 * 128 * 8,
            64,
            128 + 128,
            (2, 32, 0),
        ),
    ],
)
def test_convolutions_are_counted_by_hand(
    made: Node, name: str, flops: int, weights: int, moved: int, shape: tuple[int, ...]
) -> None:
    op = one(made)
    assert (op.name, op.kind, op.flops, op.weight_nbytes, op.activation_nbytes) == (
        name,
        Kind.CONV,
        flops,
        4 * weights,
        4 * moved,
    )
    assert (op.shape, op.launches, op.bits) == (shape, 1, 32)
    half = one(made, floats=16)
    assert (half.flops, half.nbytes, half.bits) == (flops, op.nbytes // 2, 16)


def test_integers_are_counted_as_stored_whatever_floats_are() -> None:
    made = node("QLinearConv", (1, 4, 8, 8), (), (), (6, 4, 3, 3), (6,), (6,), (), (), (1, 6, 8, 8), bits=8)
    for floats in (32, 16):
        op = one(made, floats)
        assert (op.flops, op.weight_nbytes, op.activation_nbytes, op.bits) == (2 * 384 * 36, 216, 256 + 384, 8)


def test_what_only_moves_numbers() -> None:
    resize = one(node("Resize", (1, 2, 4, 4), (4,), (1, 2, 8, 8)))
    assert (resize.kind, resize.flops, resize.nbytes) == (Kind.ELEMENTWISE, 7 * 128, 4 * (32 + 4 + 128))
    assert one(node("BatchNormalization", (1, 2, 4, 4), (2,), (2,), (2,), (2,), (1, 2, 4, 4))).flops == 64
    taken = one(node("Slice", (1, 64, 64), (1,), (1, 2, 2)))
    assert (taken.flops, taken.nbytes) == (0, 4 * (4 + 1 + 4))  # of the input only what it takes
    assert one(node("Concat", (1, 2), (1, 3), (1, 5))).nbytes == 4 * 10
    view = one(node("Reshape", (1, 4), (2,), (2, 2)))
    assert (view.flops, view.nbytes, view.launches) == (0, 0, 1)
    product = one(node("MatMul", (1, 5, 8), (8, 3), (1, 5, 3)))
    assert (product.kind, product.flops, product.tokens, product.shape) == (Kind.LINEAR, 2 * 5 * 8 * 3, 5, (3, 8, 0))
    loop = one(Node("Scan", (Value(32, (1, 8)), Value(32, (1, 8, 39))), (Value(32, (1, 8)),)))
    assert (loop.name, loop.launches, loop.nbytes) == (vision.LOOP, 39, 0)
    assert one(Node("Anything", (), ())).nbytes == 0


def test_equal_nodes_are_counted_together() -> None:
    relu = node("Relu", (4,), (4,))
    assert [op.count for op in vision.operators([relu, node("Relu", (8,), (8,)), relu])] == [2, 1]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x (1, 3, H, W): a convolution with norm and activation behind it, a norm alone, and a sum."""
    constants = {"w": np.full((8, 3, 3, 3), 0.1, np.float32), "b": np.ones(8, np.float32)}
    made = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "b"], ["n"]),
        helper.make_node("LeakyRelu", ["n"], ["r"], alpha=0.2),
        helper.make_node("BatchNormalization", ["r", "b", "b", "b", "b"], ["m"]),
        helper.make_node("Add", ["m", "r"], ["y"]),
    ]
    return nodes.save(tmp_path_factory.mktemp("onnx") / "n.onnx", made, constants, {"x": (F, [1, 3, "h", "w"])})


def test_norms_are_folded_and_activations_joined(network: Path) -> None:
    found = traced(network, {"x": (1, 3, 8, 8)})
    assert [each.kind for each in found] == ["FusedConv", "BatchNormalization", "Add"]
    conv = found[0]
    assert conv.ins[0] == Value(32, (1, 3, 8, 8)) and conv.outs == (Value(32, (1, 8, 8, 8)),)
    assert conv.parameter_nbytes == 4 * (216 + 8)


def test_a_forecast_is_the_sum_of_its_operators(network: Path) -> None:
    found = vision.forecast_file(network, RATES, shapes={"x": (1, 3, 8, 8)})
    conv, norm, add = 2 * 512 * 27, 2 * 512, 512
    bytes_of = (4 * (216 + 192 + 512), 4 * (512 + 32 + 512), 4 * 3 * 512)
    assert (found.flops, found.nbytes, found.launches) == (conv + norm + add, sum(bytes_of), 3)
    assert found.seconds == pytest.approx(max(conv / 1e10, bytes_of[0] / 1e9) + sum(bytes_of[1:]) / 1e9 + 3e-6)
    assert found.bound_seconds == pytest.approx(max((conv + norm + add) / 1e10, sum(bytes_of) / 1e9))
    assert found.seconds > found.bound_seconds
    assert found.parts[0].seconds == max(part.seconds for part in found.parts)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds)
    larger = vision.forecast_file(network, RATES, shapes={"x": (1, 3, 16, 16)})
    assert larger.flops == 4 * found.flops
    assert found.to_json()["parts"][0]["name"] == found.parts[0].name
    with pytest.raises(ValueError, match="no operators"):
        vision.forecast([], RATES)


def test_convolutions_at_the_rates_of_units() -> None:
    """Eight bits at the packed peak; a calibrated unit without convolutions takes the shares of products."""
    op = visionrates.probe("conv 2d", 64, 4096)
    integers = visionrates.probe("int8 conv 2d", 64, 4096)
    assert integers.flops == op.flops and integers.nbytes == op.nbytes / 4
    assert RATES.spent(integers).compute == pytest.approx(RATES.spent(op).compute / 4)
    shares = {"linear": Efficiency(0.5, 0.5)}
    known = Calibrated(RATES, shares, "2026-11-22")
    assert known.spent(op).compute == pytest.approx(2 * RATES.spent(op).compute)
    own = Calibrated(RATES, {**shares, "conv": Efficiency(0.25, 0.5)}, "2026-11-22")
    assert own.spent(op).compute == pytest.approx(4 * RATES.spent(op).compute)
    assert "conv" not in known.assumptions()[-2]  # language models have none


# --- rates of this machine --------------------------------------------------------------------------------------------


def table() -> Table:
    """A machine where every probe takes twice its ideal, and integers in three dimensions ten times."""
    plain = Table(1, 1e9, 1e10, 1e-6, 2e-6, (), (), {"cpu": "a cpu", "date": "2026-11-22", "spread": 0.01})
    convs = []
    for form, channels, size in visionrates.points():
        op = visionrates.probe(form, channels, math.prod(size))
        factor = 10 if form == "int8 conv 3d" else 2
        ideal = max(op.flops / plain.flops_per_s, op.nbytes / plain.bytes_per_s)
        convs.append(Conv(form, channels, math.prod(size), factor * ideal))
    movers = [Mover(kind, nbytes, nbytes / 5e8) for kind in visionrates.MOVERS for nbytes in (1000, 10**6)]
    return replace(plain, convs=tuple(convs), movers=tuple(movers))


def test_rates_go_by_the_operator_that_was_measured() -> None:
    rates = VisionRates(table())
    for form, factor in (("conv 2d", 2), ("depthwise conv", 2), ("int8 conv 3d", 10)):
        for channels, pixels in ((16, 16_384), (1, 64), (32, 1024)):
            if any((row.form, row.channels, row.pixels) == (form, channels, pixels) for row in rates.table.convs):
                op = visionrates.probe(form, channels, pixels)
                ideal = max(op.flops / 1e10, op.nbytes / 1e9)
                assert rates.spent(op).compute == pytest.approx(factor * ideal)
                assert rates.spent(op).dispatch == 1e-6
    between = [rates.spent(visionrates.probe("conv 2d", channels, 4096)).compute for channels in (16, 24, 40, 64)]
    assert between == sorted(between)
    assert rates.roofs == {"fp32": 1e10, "int8": 1e10}  # nothing was faster than products
    fast = replace(table(), convs=(*table().convs, Conv("int8 conv 2d", 256, 64, 1e-5)))
    assert VisionRates(fast).roofs["int8"] == pytest.approx(2 * 64 * 256 * 256 * 9 / 1e-5)
    assert rates.spent(one(node("Resize", (1, 2, 4, 4), (1, 2, 8, 8)))).memory == pytest.approx(4 * 160 / 5e8)
    loop = Operator(vision.LOOP, Kind.ELEMENTWISE, 1, 0, launches=39)
    assert rates.spent(loop).seconds == pytest.approx(39 * 2e-6)
    assert rates.label == "calibrated" and "a cpu" in rates.assumptions()[0]
    wide = one(node("Conv", (1, 3, 64, 64), (48, 3, 3, 3), (1, 48, 64, 64)))
    assert visionrates.equal_channels(wide) == pytest.approx(12)  # as many FLOPs per pixel as 12 to 12
    with pytest.raises(ValueError, match="no convolution was measured"):
        VisionRates(replace(table(), convs=()))


def test_a_table_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    visionrates.write(path, table())
    assert visionrates.read(path) == table()
    for text, why in (('{"schema_version": 9}', "schema_version 9 is not 1"), ('{"schema_version": 1}', "is no table")):
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            visionrates.read(path)


def test_every_probe_runs_and_is_what_its_operator_says() -> None:
    """The models of probes have the operators that rates count for them."""
    for form, channels, size in (
        ("conv 2d", 4, (8, 8)),
        ("conv 3d", 4, (2, 8, 8)),
        ("int8 conv 2d", 4, (8, 8)),
        ("int8 conv 3d", 4, (2, 8, 8)),
        ("depthwise conv", 32, (8, 8)),
    ):
        groups = channels if form == "depthwise conv" else 1
        model = convrepeats.convolutions(channels, size, 3, groups=groups, int8=form.startswith("int8"))
        found = [op for op in vision.operators(traced(model)) if op.kind == Kind.CONV]
        wanted = visionrates.probe(form, channels, math.prod(size))
        bias = [(op.name, op.flops, op.nbytes, op.bits, op.tokens, op.shape[:2]) for op in found]
        assert bias == [(wanted.name, wanted.flops, wanted.nbytes, wanted.bits, wanted.tokens, wanted.shape[:2])]
        assert sum(op.count for op in found) == 3
    for kind in visionrates.MOVERS:
        runs, nbytes = visionrates.moved(kind, (2, 8, 8))
        found = list(vision.operators(traced(convrepeats.movers(kind, (2, 8, 8), 3))))
        assert sum(op.count * op.launches for op in found) == 3 * runs
        assert sum(op.count * op.nbytes for op in found) == pytest.approx(3 * nbytes, rel=0.25)  # parameters on top
    steps = [op.launches for op in vision.operators(traced(convrepeats.loop(6))) if op.name == vision.LOOP]
    assert steps == [5]
    assert open_frame(convrepeats.loop(6)).feeds["x"].shape == (1, 8, 32, 6)


def test_measuring_asks_for_every_point_and_takes_starts_off() -> None:
    asked: list[int] = []

    def timed(model: bytes, threads: int, seconds: float) -> float:
        asked.append(threads)
        return 64e-6  # whatever it is: 1 us to start an operator, 16 us for one of a chain of four

    found = visionrates.measure(3, timed=timed)
    assert len(asked) == len(found.convs) + len(found.movers) + 2 and set(asked) == {3}
    assert found.dispatch_seconds == pytest.approx(1e-6) and found.step_seconds == 0
    assert {row.form for row in found.convs} == set(visionrates.FORMS)
    assert all(row.seconds == pytest.approx(15e-6) for row in found.convs)
    assert {row.kind: round(1e9 * row.seconds) for row in found.movers} == {
        "add": 15000,
        "normalize": 15000,
        "slice": 7000,
        "pool": 7000,
        "integer": 15000,
    }
    with pytest.raises(ValueError, match="0 threads"):
        visionrates.measure(0)


def test_this_machines_table_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visionrates, "cache_folder", lambda: tmp_path)
    made: list[int] = []

    def measure(threads: int, **_more: object) -> Table:
        made.append(threads)
        return replace(table(), threads=threads, facts={"cpu": visionrates.machine.cpu_name()})

    monkeypatch.setattr(visionrates, "measure", measure)
    assert visionrates.here(2) == visionrates.here(2) and made == [2]
    visionrates.here(2, force=True)
    (tmp_path / "devices" / "vision-2.json").write_text("{}")
    visionrates.here(2)
    visionrates.write(tmp_path / "devices" / "vision-2.json", table())  # of another processor
    visionrates.here(2)
    assert made == [2, 2, 2, 2]
