"""Interpolated seconds of operators: what was measured comes back, what lies between is near a known law."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.profiles import efficiency
from rlkit.profiles.efficiency import (
    Around,
    Attention,
    Ladder,
    Peaks,
    Product,
    Rowwise,
    Table,
    attention_work,
    product_nbytes,
)
from rlkit.profiles.surface import Surface

PEAKS = Peaks(bytes_per_s=2e10, flops_per_s=1e11, dispatch_seconds=1e-6, threads=2)
FORMS = ((4, 128), (4, 32), (2, 64), (32, 0))
SIZES = (512, 2048, 8192)
TOKENS = (1, 8, 64, 512)


def law(bits: int, block: int, tokens: int, n: int, k: int, *, cached: bool) -> float:
    """A machine whose caches read five times as fast as its memory and whose kernels unpack weights."""
    nbytes = product_nbytes(bits, block, n, k)
    reading = nbytes / (1e11 if cached else 2e10)
    return 3e-6 + max(reading, n * k / 2e11) + 2.0 * tokens * n * k / 3e11


def attention_law(tokens: int, past: int, heads: int, kv_heads: int, head_dim: int) -> float:
    nbytes, flops = attention_work(tokens, past, heads, kv_heads, head_dim)
    return 5e-6 + nbytes / 1.5e10 + flops / (2e10 if tokens == 1 else 6e10)


def made_table() -> Table:
    products = [
        Product(*form, tokens, n, k, cached, law(*form, tokens, n, k, cached=cached))
        for form in FORMS
        for n in SIZES
        for k in SIZES
        for tokens in TOKENS
        for cached in ((True, False) if tokens < 64 else (True,))
    ]
    attentions = [
        Attention(*step, *heads, attention_law(*step, *heads))
        for heads in ((16, 4, 64), (16, 16, 64), (16, 4, 128), (16, 16, 128))
        for step in ((1, 0), (1, 256), (1, 1024), (1, 4096), (64, 0), (64, 1024), (512, 0), (512, 1024))
    ]
    rowwise = [
        Rowwise(kind, tokens, width, 1e-6 + tokens * width * 1e-9)
        for kind in efficiency.ACCESSES
        for tokens in (1, 32, 1024)
        for width in (128, 1024, 8192)
    ]
    near, far = (law(4, 128, 1, 2048, 2048, cached=cached) for cached in (True, False))
    ladder = [
        Ladder(megabytes * 2**20, 2048, near + share * (far - near))
        for megabytes, share in ((4, 0.0), (32, 0.25), (256, 1.0))
    ]
    around = [
        Around(v, n, 1e-2 + 1e-5 * n, 5e-6 + 7e-10 * v + 6e-7 * n) for v, n in ((1024, 1), (131072, 1), (1024, 32))
    ]
    rows = tuple(products), tuple(attentions), tuple(rowwise), tuple(ladder), tuple(around)
    return Table(PEAKS, *rows, facts={"cpu": "made up"})


TABLE = made_table()
SIZE = 2048 * 2048


def test_what_was_measured_comes_back() -> None:
    for row in TABLE.products:
        streamed = 1.0 if row.cached else None
        told = TABLE.seconds("linear", row.bits, row.block, row.tokens, row.n, row.k, streamed)
        assert told == pytest.approx(row.seconds)
    for step in TABLE.attentions:
        told = TABLE.attention_seconds(step.tokens, step.past, step.heads, step.kv_heads, step.head_dim)
        assert told == pytest.approx(step.seconds)
    for each in TABLE.rowwise:
        assert TABLE.seconds(each.kind, tokens=each.tokens, n=each.width) == pytest.approx(each.seconds)
    for loop in TABLE.around:
        assert TABLE.token_seconds(loop.vocab, loop.layers) == pytest.approx(loop.token_seconds)
        assert TABLE.prompt_seconds(loop.vocab, loop.layers) == pytest.approx(loop.prompt_seconds)


@pytest.mark.parametrize(("n", "k"), [(6144, 2560), (1024, 1024), (9728, 2560), (576, 1536), (151936, 2560)])
@pytest.mark.parametrize("form", FORMS[:3])  # floats of a prompt wait for memory, and were measured without
@pytest.mark.parametrize("tokens", [1, 128, 512, 2048])
def test_sizes_that_were_not_measured_are_near(form: tuple[int, int], n: int, k: int, tokens: int) -> None:
    told = TABLE.seconds("linear", *form, tokens, n, k)
    assert told == pytest.approx(law(*form, tokens, n, k, cached=False), rel=0.12)


@pytest.mark.parametrize("heads", [(9, 3, 64), (16, 8, 128), (32, 8, 128)])
@pytest.mark.parametrize("step", [(1, 600), (1, 2048), (256, 0), (128, 512)])
def test_attention_between_depths_and_shapes_is_near(heads: tuple[int, int, int], step: tuple[int, int]) -> None:
    assert TABLE.attention_seconds(*step, *heads) == pytest.approx(attention_law(*step, *heads), rel=0.3)


def test_beyond_the_grid_time_grows_with_the_work() -> None:
    one, two = (TABLE.seconds("linear", 4, 128, tokens, 8192, 8192) for tokens in (4096, 8192))
    assert two / one == pytest.approx(2.0, rel=0.05)
    deep, deeper = (TABLE.attention_seconds(1, past, 16, 4, 128) for past in (32768, 65536))
    assert deeper / deep == pytest.approx(2.0, rel=0.05)
    assert TABLE.seconds("linear", 4, 128, 1, 16, 16) > PEAKS.dispatch_seconds / 10


@given(st.floats(1e5, 1e10), st.floats(1e5, 1e10))
def test_a_larger_working_set_is_never_faster(one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert TABLE.kept_share(small, SIZE) >= TABLE.kept_share(large, SIZE)
    near, far = (TABLE.seconds("linear", 4, 128, 1, 2048, 2048, streamed) for streamed in (small, large))
    assert near <= far * (1 + 1e-9)


def test_a_working_set_lies_between_the_ends_of_the_ladder() -> None:
    assert TABLE.kept_share(None, SIZE) == 0.0
    assert TABLE.kept_share(2**20, SIZE) == pytest.approx(1.0)
    assert TABLE.kept_share(32 * 2**20, SIZE) == pytest.approx(0.75)
    assert TABLE.kept_share(2**40, SIZE) == pytest.approx(0.0, abs=1e-9)
    assert replace(TABLE, ladder=()).kept_share(2**20, SIZE) == 0.0


def test_small_products_have_a_ladder_of_their_own() -> None:
    small = law(4, 128, 1, 512, 512, cached=False)
    waiting = replace(TABLE, ladder=(*TABLE.ladder, Ladder(2**20, 512, 2 * small), Ladder(2**30, 512, 2 * small)))
    assert waiting.kept_share(2**20, SIZE) == pytest.approx(1.0)
    assert waiting.kept_share(2**20, 512 * 512) < 0.0  # in a chain they take longer than alone
    between = waiting.kept_share(2**20, 1024 * 1024)
    assert waiting.kept_share(2**20, 512 * 512) < between < 1.0
    assert waiting.seconds("linear", 4, 128, 1, 512, 512, 2**20) == pytest.approx(2 * small)


def test_a_block_that_was_not_measured_is_answered_by_its_nearest() -> None:
    assert TABLE.seconds("linear", 4, 256, 1, 2048, 2048) == TABLE.seconds("linear", 4, 128, 1, 2048, 2048)
    assert TABLE.seconds("linear", 4, 16, 1, 2048, 2048) == TABLE.seconds("linear", 4, 32, 1, 2048, 2048)
    assert TABLE.formats() == ((2, 64), (4, 32), (4, 128), (32, 0))


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda: TABLE.seconds("linear", 3, 64, 1, 512, 512), "3 bits were not measured"),
        (lambda: TABLE.seconds("sorting", tokens=1, n=512), "'sorting' are not measured"),
        (lambda: TABLE.seconds("linear", 4, 64, 0, 512, 512), "use positive sizes"),
        (lambda: TABLE.attention_seconds(1, 5, 9, 4, 64), "9 heads on 4"),
        (lambda: TABLE.attention_seconds(1, -1, 8, 4, 64), "is none"),
        (lambda: replace(TABLE, attentions=()).attention_seconds(1, 5, 8, 4, 64), "no attention was measured"),
        (lambda: replace(TABLE, products=()).seconds("linear", 4, 64, 1, 512, 512), "not measured here"),
        (lambda: replace(TABLE, rowwise=()).seconds("norm", tokens=1, n=512), "nothing was measured"),
        (lambda: replace(TABLE, ladder=(Ladder(1, 512, 0.0),)), "repeat it"),
        (lambda: replace(TABLE, peaks=replace(PEAKS, bytes_per_s=math.inf)), "repeat it"),
        (lambda: replace(TABLE, peaks=replace(PEAKS, dispatch_seconds=-1.0)), "repeat it"),
    ],
)
def test_what_was_not_measured_is_refused(ask: object, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        ask()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_loop_that_was_not_measured_costs_nothing_and_none_is_negative() -> None:
    assert replace(TABLE, around=()).token_seconds(1000, 10) == 0.0
    odd = replace(
        TABLE, around=(Around(1000, 1, 1e-2, 5e-6), Around(100000, 1, 1e-2, 1e-4), Around(1000, 9, 1e-2, 1e-6))
    )
    assert odd.token_seconds(1000, 1000) > 0


def test_a_table_survives_json(tmp_path: Path) -> None:
    efficiency.save(TABLE, tmp_path / "here.json")
    assert efficiency.load(tmp_path / "here.json") == TABLE
    assert Table.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE


@pytest.mark.parametrize("change", ["version", "columns", "rows", "peaks", "text", "none"])
def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path, change: str) -> None:
    path = tmp_path / "here.json"
    value = TABLE.to_json()
    if change == "version":
        value["schema_version"] = 99
    elif change == "columns":
        value["products"]["columns"][0] = "colour"
    elif change == "rows":
        value["ladder"]["rows"][0] = [1]
    elif change == "peaks":
        del value["peaks"]["bytes_per_s"]
    path.write_text("{" if change == "text" else json.dumps(value))
    if change == "none":
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"calibrat|damaged") as caught:
        efficiency.load(path)
    assert "\n" not in str(caught.value)


def test_leaving_rows_out_shows_how_well_the_rest_foretells_them() -> None:
    errors = efficiency.leave_one_out(TABLE)
    assert {name: len(found) for name, found in errors.items()} == {
        name: len(getattr(TABLE, name)) for name in ("products", "attentions", "rowwise")
    }
    assert sorted(errors["rowwise"])[len(TABLE.rowwise) // 2] > 0.01
    assert efficiency.leave_one_out(replace(TABLE, products=(), attentions=(), rowwise=TABLE.rowwise[:1])) == {}


def test_a_machine_of_constant_utilisation_is_foretold_exactly() -> None:
    def ideal(row: Product) -> float:
        nbytes = product_nbytes(row.bits, row.block, row.n, row.k) + 4 * row.tokens * (row.n + row.k)
        flops = 2.0 * row.tokens * row.n * row.k
        return PEAKS.dispatch_seconds + nbytes / PEAKS.bytes_per_s + flops / PEAKS.flops_per_s

    constant = replace(TABLE, products=tuple(replace(row, seconds=2 * ideal(row)) for row in TABLE.products))
    assert max(efficiency.leave_one_out(constant)["products"]) < 1e-9


def test_a_surface_fills_its_gaps_from_either_side_and_then_with_the_nearest() -> None:
    surface = Surface.through({(1, 1): 2.0, (4, 4): 8.0}, "x")
    assert surface.at((1, 1)) == pytest.approx(2.0)
    assert surface.at((4, 4)) == pytest.approx(8.0)
    assert surface.at((4, 1)) == pytest.approx(4.0)  # as near to either
    assert surface.at((2, 2)) == pytest.approx(4.0)
    assert surface.at((0.001, 0.001)) == pytest.approx(2.0)
    assert surface.at((1e9, 1e9)) == pytest.approx(8.0)
    row = Surface.through({(1, 1): 1.0, (1, 16): 16.0, (2, 1): 1.0, (2, 4): 4.0, (2, 16): 16.0}, "x")
    assert row.at((1, 4)) == pytest.approx(4.0)  # not its neighbour's, but what lies between on its line


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_a_surface_goes_through_its_points_and_stays_within_them(points: list[tuple[int, int, float]]) -> None:
    table = {(x, y): value for x, y, value in points}
    surface = Surface.through(table, "x")
    for place, value in table.items():
        assert surface.at(place) == pytest.approx(value)
    assert min(table.values()) * 0.999 <= surface.at((7, 9)) <= max(table.values()) * 1.001
