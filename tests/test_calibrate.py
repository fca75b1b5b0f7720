"""Calibration with made-up instruments: what is measured, in which order, what a short budget leaves, what is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rlkit.apps import calibrate as command
from rlkit.profiles import calibrate, device, here
from rlkit.profiles.calibrate import FULL, QUICK, Calibration, Form, Heads, Plan, Room, Shape
from rlkit.profiles.efficiency import product_nbytes
from rlkit.recover.progress import Progress
from rlkit.runtime.probe import TokenTrials, Trials
from test_efficiency import attention_law, law

MB = 2**20
ROOM = Room(cache_nbytes=32 * MB, far_nbytes=256 * MB)
SMALL = Plan(
    formats=((32, 0), (4, 128), (2, 64)),
    shapes=((2048, 2048), (512, 512), (8192, 2048)),
    branches=((8, 64, (64, 2048)),),
    attentions=((16, 4, 128),),
    passes=((1, 0), (1, 1024), (512, 0)),
    ladder=((2048, 8), (2048, 64), (2048, 256)),
    rows=(1, 512),
    widths=(128, 4096),
)


@dataclass
class MadeUp:
    """Instruments that know the answer; every call takes a second of the fake clock."""

    noise: float = 1.0
    now: float = 0.0
    asked: list[str] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def trials(self, seconds: float, name: str) -> Trials:
        self.now += 1.0
        self.asked.append(name)
        return Trials(seconds, seconds * self.noise, 5)

    def read(self, threads: int) -> Trials:
        return self.trials(1.0 / (1e10 * min(threads, 2)), "read")

    def products(self, form: Form, shape: Shape, count: int, tokens: Sequence[int], seconds: float) -> list[Trials]:
        total = count * product_nbytes(*form, *shape)
        self.totals.append(total)
        cached = total <= ROOM.cache_nbytes / 2
        return [self.trials(law(*form, number, *shape, cached=cached), f"{form} {shape}") for number in tokens]

    def chain(self, form: Form, width: int, count: int, seconds: float) -> Trials:
        total = 2 * count * product_nbytes(*form, width, width)
        product = law(*form, 1, width, width, cached=total <= ROOM.cache_nbytes / 2)
        return self.trials(2 * product + 2 * (1e-6 + 1e-9 * width), f"chain of {width}")

    def attention(self, heads: Heads, tokens: int, past: int, count: int, seconds: float) -> Trials:
        return self.trials(attention_law(tokens, past, *heads), "attention")

    def rowwise(self, kind: str, tokens: int, width: int, count: int, seconds: float) -> Trials:
        return self.trials(1e-6 + 1e-9 * tokens * width, kind)

    def around(self, vocab: int, layers: int, seconds: float) -> TokenTrials:
        return TokenTrials(self.trials(1e-2, "around"), self.trials(5e-6 + 7e-10 * vocab + 6e-7 * layers, "around"))


def run(tools: MadeUp, plan: Plan = SMALL, seconds: float = 1e9, threads: int = 4) -> Calibration:
    return calibrate.calibrate(threads, plan=plan, seconds=seconds, instruments=tools, room=ROOM, clock=tools.clock)


def test_the_table_answers_for_sizes_that_were_not_measured() -> None:
    made = run(MadeUp())
    for n, k, tokens in ((4096, 2048, 1), (2048, 2048, 512), (1024, 1024, 256)):
        assert made.table.seconds("linear", 4, 128, tokens, n, k) == pytest.approx(
            law(4, 128, tokens, n, k, cached=False), rel=0.15
        )
    assert made.table.attention_seconds(1, 512, 16, 4, 128) == pytest.approx(
        attention_law(1, 512, 16, 4, 128), rel=0.15
    )
    assert made.table.token_seconds(50000, 10) == pytest.approx(5e-6 + 3.5e-5 + 6e-6)
    assert made.table.dispatch_seconds == pytest.approx(1e-6, rel=0.01)
    assert made.reads == {1: 1e10, 2: 2e10, 4: 2e10}
    assert made.skipped == 0
    assert not made.busy


def test_weights_are_read_in_turn_from_far_beyond_the_caches_and_from_within_them() -> None:
    tools = MadeUp()
    made = run(tools)
    assert max(tools.totals) < ROOM.far_nbytes + 64 * MB
    far = [row for row in made.table.products if not row.cached and row.tokens == 1]
    near = [row for row in made.table.products if row.cached and row.tokens == 1]
    assert {(row.n, row.k) for row in far if row.bits == 4} == set(SMALL.shapes)
    assert near
    assert made.table.seconds("linear", 4, 128, 1, 2048, 2048, 1 * MB) < made.table.seconds(
        "linear", 4, 128, 1, 2048, 2048
    )


@dataclass
class SlowAtFirst(MadeUp):
    """Something else runs while a product is measured for the first time."""

    def products(self, form: Form, shape: Shape, count: int, tokens: Sequence[int], seconds: float) -> list[Trials]:
        slow = 1.0 if f"{form} {shape}" in self.asked else 3.0
        return [
            replace(each, seconds=slow * each.seconds) for each in super().products(form, shape, count, tokens, seconds)
        ]


@pytest.mark.parametrize(("twice", "factor"), [(True, 1.0), (False, 3.0)])
def test_products_of_a_decode_step_count_as_the_faster_of_two_rounds(twice: bool, factor: float) -> None:
    told = run(SlowAtFirst(), replace(SMALL, twice=twice)).table.seconds("linear", 4, 128, 1, 512, 512)
    assert told == pytest.approx(factor * law(4, 128, 1, 512, 512, cached=False))


def test_a_short_budget_keeps_what_forecasts_need_and_says_what_it_left_out() -> None:
    tools = MadeUp()
    made = run(tools, seconds=0.5)
    assert made.skipped > 0
    assert made.table.facts["skipped"] == made.skipped
    assert made.table.products
    assert made.table.seconds("linear", 32, 0, 1, 512, 512) > 0
    assert made.table.attention_seconds(1, 4, 16, 4, 128) > 0
    assert made.table.seconds("norm", tokens=1, n=512) > 0
    assert tools.now < run(MadeUp()).seconds / 2


def test_a_busy_machine_is_noticed() -> None:
    assert run(MadeUp(noise=1.5)).busy
    assert not run(MadeUp(noise=1.02)).busy


def test_progress_grows_to_its_end() -> None:
    events: list[Progress] = []
    tools = MadeUp()
    calibrate.calibrate(2, plan=SMALL, tell=events.append, instruments=tools, room=ROOM, clock=tools.clock)
    done = [event.done for event in events]
    assert done == sorted(done)
    assert (events[0].done, events[-1].done) == (0, events[-1].total)
    assert all(event.note for event in events[:-1])


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_plans_measure_floats_first_and_every_width_of_weights(plan: Plan) -> None:
    assert plan.formats[0] == (32, 0)
    assert {bits for bits, _block in plan.formats} == {2, 4, 8, 32}
    assert {(4, 32), (4, 128), (2, 64), (8, 128)} <= set(plan.formats)
    made = run(MadeUp(), plan)
    assert made.table.formats() == tuple(sorted({*plan.formats, *((b, g) for b, g, _s in plan.branches)}))


def test_quick_measures_less() -> None:
    full, quick = MadeUp(), MadeUp()
    run(full, FULL)
    run(quick, QUICK)
    assert len(quick.asked) < len(full.asked) / 1.5


@pytest.mark.parametrize(("threads", "seconds"), [(0, 10.0), (2, 0.0), (-1, 10.0), (2, float("nan"))])
def test_a_budget_that_is_none_is_refused(threads: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="give at least 1 thread"):
        run(MadeUp(), threads=threads, seconds=seconds)


def test_thread_counts_double_and_end_with_all() -> None:
    assert [calibrate.thread_counts(number) for number in (1, 2, 3, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_the_cache_is_the_largest_that_the_system_tells_of(tmp_path: Path) -> None:
    assert calibrate.cache_nbytes(tmp_path) == calibrate.CACHE_NBYTES
    for index, size in enumerate(("48K", "1024K", "96M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert calibrate.cache_nbytes(tmp_path) == 96 * MB
    assert Room.here().far_nbytes > 0


def test_this_machine_becomes_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path))
    assert here.load_table() is None
    made = run(MadeUp())
    path = here.save(made)
    assert path == device.here_path()
    found, unit = device.find("here")
    assert (found.calibrated, unit.name, unit.calibrated) == (True, "cpu", True)
    assert unit.bytes_per_s == 2e10
    assert unit.peak("fp32").value == made.table.peaks.flops_per_s
    assert {"linear", "attention", "norm", "elementwise"} == set(unit.efficiency)
    assert len(unit.efficiency["linear"].samples) == len(made.table.products)
    assert here.load_table() == made.table


def test_a_device_file_elsewhere_has_its_table_beside_it(tmp_path: Path) -> None:
    path = here.save(run(MadeUp()), tmp_path / "laptop.toml")
    assert here.load_table(path) == run(MadeUp()).table
    assert here.table_path(path) == tmp_path / "laptop.json"
    with pytest.raises(ValueError, match=r"end it in \.toml"):
        here.save(run(MadeUp()), tmp_path / "laptop.json")


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_the_command_says_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], noise: float
) -> None:
    made = replace(run(MadeUp(noise=noise)), skipped=int(noise) - 1)
    monkeypatch.setattr(command.calibration, "calibrate", lambda *_args, **_options: made)
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path))
    command.calibrate()
    printed = capsys.readouterr()
    assert "4-bit, blocks of 128" in printed.out
    assert str(device.here_path()) in printed.out
    assert ("something else was running" in printed.err) == (noise > 1.5)
    assert ("did not fit" in printed.err) == (noise > 1.5)
    command.calibrate(out=tmp_path / "x.toml", json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["file"] == str(tmp_path / "x.toml")
    assert result["busy"] == (noise > 1.5)
    assert len(result["products"]["rows"]) == len(made.table.products)


def test_a_name_that_is_no_device_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end it in \.toml"):
        command.calibrate(out=tmp_path / "x.json")


def test_real_instruments_measure_something() -> None:
    tiny = Plan(
        formats=((32, 0), (4, 32)),
        shapes=((64, 64),),
        branches=(),
        attentions=((4, 2, 16),),
        passes=((1, 0), (4, 3)),
        ladder=((512, 1),),
        rows=(1, 2),
        widths=(16,),
        arounds=((100, 1),),
        slice_seconds=0.0,
    )

    class Still(calibrate.Onnx):
        """Reading half a gigabyte is no test."""

        def read(self, threads: int) -> Trials:
            return Trials(1e-10, 1e-10, 3)

    made = calibrate.calibrate(1, plan=tiny, instruments=Still(1), room=Room(MB, 2**18))
    assert made.table.seconds("linear", 4, 32, 1, 64, 64) > 0
    assert made.table.attention_seconds(1, 0, 4, 2, 16) > 0
    assert {row.kind for row in made.table.rowwise} == {"norm", "add", "activation"}
    assert made.table.token_seconds(100, 1) > 0
