"""The allocation keeps to its budget and finds what trying everything finds; recipes say it in few rules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.export.plan import plan_recipe
from rlkit.recover import allocate, recipe
from rlkit.recover.allocate import Budget, Choice, Unit, stored, stored_nbytes, to_recipe
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import ModelShape
from shapes import QWEN3_8B, SMOLLM2_135M

S2, S4, S8 = Scheme(2, 64), Scheme(4, 32), Scheme(8, 128)
ADAPTED = Scheme(2, 64, adapter_rank=32)


def unit(name: str, *choices: tuple[int, float], weights: int = 100) -> Unit:
    return Unit((name,), 64, weights, tuple(Choice(S4, nbytes, damage) for nbytes, damage in choices))


def damage(choices: Sequence[Choice]) -> float:
    return sum(choice.damage for choice in choices)


def brute_force(units: Sequence[Unit], nbytes: int) -> float:
    every = itertools.product(*(unit.choices for unit in units))
    return min(damage(choices) for choices in every if stored(choices) <= nbytes)


CHOICES = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 9)), min_size=1, max_size=4)
PROBLEMS = st.lists(CHOICES, min_size=1, max_size=5)


@given(PROBLEMS, st.integers(0, 200))
def test_is_as_good_as_trying_everything(problem: list[list[tuple[int, float]]], extra: int) -> None:
    units = [unit(f"m{i}", *choices) for i, choices in enumerate(problem)]
    nbytes = stored(unit.choices[0] for unit in units) + extra
    found = allocate.allocate(units, nbytes)
    assert stored(found) <= nbytes
    assert all(choice in unit.choices for unit, choice in zip(units, found, strict=True))
    assert damage(found) == pytest.approx(brute_force(units, nbytes), abs=1e-9)


@given(PROBLEMS, st.integers(0, 200), st.integers(2, 9))
@settings(max_examples=60)
def test_on_a_coarse_grid_it_keeps_the_budget_and_loses_a_few_cells(
    problem: list[list[tuple[int, float]]], extra: int, cells: int
) -> None:
    """Rounding up costs each unit less than a cell: as good as anything within the budget less that."""
    units = [unit(f"m{i}", *choices) for i, choices in enumerate(problem)]
    smallest = stored(unit.choices[0] for unit in units)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "CELLS", cells)
        found = allocate.allocate(units, smallest + extra)
    assert stored(found) <= smallest + extra
    spare = min(extra, sum(unit.choices[-1].nbytes for unit in units) - smallest)
    cell = -(-spare // cells)
    assert damage(found) <= brute_force(units, smallest + max(0, spare - (len(units) + 1) * cell)) + 1e-9


def test_hundreds_of_units_come_within_a_hair_of_the_bound() -> None:
    """The bound: spending fractions of the best damage per byte, which no real allocation can beat."""
    units = [unit(f"m{i}", (1_000_003 + i, 4 / (1 + i % 7)), (2_000_029 + 3 * i, 1 / (1 + i % 5))) for i in range(200)]
    smallest = stored(unit.choices[0] for unit in units)
    spare = 100_000_000
    gains = sorted(
        (
            (small.damage - large.damage) / (large.nbytes - small.nbytes),
            large.nbytes - small.nbytes,
        )
        for small, large in (unit.choices for unit in units)
    )
    bound, left = damage([unit.choices[0] for unit in units]), spare
    for gain, nbytes in reversed(gains):
        bound -= max(0.0, gain) * min(nbytes, left)
        left -= min(nbytes, left)
    found = allocate.allocate(units, smallest + spare)
    assert stored(found) <= smallest + spare
    assert bound <= damage(found) <= bound + max(gain * nbytes for gain, nbytes in gains)


def test_of_equal_damage_the_smaller_is_taken() -> None:
    assert [c.nbytes for c in allocate.allocate([unit("m", (5, 1.0), (9, 1.0), (7, 1.0))], 100)] == [5]


def test_more_bytes_that_do_more_damage_are_left_alone() -> None:
    assert [c.nbytes for c in allocate.allocate([unit("m", (5, 1.0), (9, 3.0))], 100)] == [5]


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -1.0])
def test_a_damage_that_is_none_is_refused(damage: float) -> None:
    with pytest.raises(ValueError, match=r"no divergence; look for NaN"):
        Choice(S4, 1, damage)


def test_a_unit_without_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="up_proj: no scheme suits it"):
        Unit(("model.layers.0.mlp.up_proj",), 64, 1, ())


def test_bytes_below_the_smallest_are_refused() -> None:
    with pytest.raises(ValueError, match="6 bytes cannot be met; the smallest choices take 7"):
        allocate.allocate([unit("m", (7, 1.0))], 6)


def matrices(layers: int = 4) -> list[Unit]:
    """Units of 4096 weights with choices of 2, 4 and 8 bits; q, k and v together; and an lm_head."""
    units = []
    for layer in range(layers):
        names = {part: f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}
        attention = tuple(f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv")
        for modules in (attention, *((name,) for name in names.values())):
            choices = [(S2, 1.0), (ADAPTED, 0.5), (S4, 0.1), (Scheme(8, 64), 0.01)]
            units.append(
                Unit(
                    modules,
                    64,
                    4096 * len(modules),
                    tuple(Choice(s, len(modules) * stored_nbytes(s, 64, 64), d) for s, d in choices),
                )
            )
    units.append(Unit(("lm_head",), 64, 8192, (Choice(S4, stored_nbytes(S4, 128, 64), 0.1),)))
    return units


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.0, 5.5, 40.0])
def test_a_budget_of_bits_counts_all_that_is_stored_for_a_weight(bits: float) -> None:
    units = matrices()
    found = allocate.solve(units, Budget(bits))
    assert 8 * stored(found) <= bits * allocate.weights(units)
    assert Budget(bits).excess(units, found) <= 0
    rows = allocate.table(units, found)
    assert sum(row["nbytes"] for row in rows) == stored(found)
    assert rows[0]["unit"] == "model.layers.0.self_attn.[qkv]_proj"
    assert rows[-1] == {
        "unit": "lm_head",
        "bits": 4,
        "group": 32,
        "adapter_rank": 0,
        "nbytes": 5248,
        "bits_per_weight": 5.125,
        "forecast_kl": 0.1,
    }


def test_the_smallest_budget_named_can_be_met_and_less_cannot() -> None:
    units = matrices()
    with pytest.raises(
        ValueError, match=r"1.5 bits per weight cannot be met; the smallest reachable is [\d.]+$"
    ) as info:
        Budget(1.5).allowance(units)
    least = float(str(info.value).rpartition(" ")[2])
    assert stored(allocate.solve(units, Budget(least))) == stored(unit.choices[0] for unit in units)
    with pytest.raises(ValueError, match="cannot be met"):
        Budget(least - 0.002).allowance(units)


def counted(units: Sequence[Unit], fixed: int, factor: int = 1) -> object:
    """A caller's count of a recipe's bytes: `factor` times ours, and `fixed` for everything else."""

    def nbytes(plan: Recipe) -> int:
        total = fixed
        for unit in units:
            scheme = plan.scheme_for(unit.modules[0])
            total += factor * next(choice.nbytes for choice in unit.choices if choice.scheme == scheme)
        return total

    return nbytes


@pytest.mark.parametrize("factor", [1, 2])
def test_max_bytes_bounds_what_the_caller_counts(factor: int) -> None:
    units = matrices()
    nbytes = counted(units, 5000, factor)
    smallest = stored(unit.choices[0] for unit in units)
    budget = Budget(max_bytes=5000 + factor * (smallest + 9000), nbytes=nbytes)  # type: ignore[arg-type]
    found = allocate.solve(units, budget)
    assert budget.excess(units, found) <= 0
    if factor == 1:
        assert damage(found) == damage(allocate.allocate(units, smallest + 9000))


def test_too_few_bytes_are_refused_with_what_would_do() -> None:
    units = matrices()
    nbytes = counted(units, 5000)
    smallest = stored(unit.choices[0] for unit in units)
    with pytest.raises(ValueError, match=f"5001 bytes .* the smallest reachable is {smallest + 5000}, at 2"):
        Budget(max_bytes=5001, nbytes=nbytes).allowance(units)  # type: ignore[arg-type]
    assert allocate.solve(units, Budget(max_bytes=smallest + 5000, nbytes=nbytes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "either bits per weight or bytes"),
        ({"bits_per_weight": 3.0, "max_bytes": 9}, "either bits per weight or bytes"),
        ({"bits_per_weight": 0.0}, "leaves nothing to store"),
        ({"bits_per_weight": float("nan")}, "leaves nothing to store"),
        ({"max_bytes": 9}, "needs nbytes"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(fields: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Budget(**fields)  # type: ignore[arg-type]


def test_budgets_name_themselves() -> None:
    assert [Budget(3.5).name, Budget(4.0).name] == ["3.5", "4"]
    assert Budget(max_bytes=60_200_000, nbytes=lambda _: 0).name == "60.2mb"


def model_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear."""
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inside = {
        "self_attn.q_proj": (heads, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, heads),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    found = {f"model.layers.{layer}.{name}": size for layer in range(shape.layers) for name, size in inside.items()}
    return found | {"lm_head": (shape.vocab, shape.hidden)}


@pytest.mark.parametrize("shape", [SMOLLM2_135M, QWEN3_8B], ids=["tied", "untied"])
def test_stored_bytes_are_those_of_the_planned_bundle(shape: ModelShape) -> None:
    """But for what no recipe changes: the difference between plan and sum is the same for every recipe."""
    rest = set()
    for bits, group, rank in ((4, 32, 0), (8, 64, 0), (2, 64, 32), (2, 32, 24)):
        rules = (Rule(("lm_head",), S4), Rule(("*",), Scheme(bits, group, adapter_rank=rank)))
        plan = Recipe("x", rules[0 if rank else 1 :])
        ours = 0
        for name, (n, k) in model_modules(shape).items():
            scheme = plan.scheme_for(name)
            assert scheme is not None
            ours += stored_nbytes(scheme.resolve(k), n, k)
        rest.add(plan_recipe(shape, plan).nbytes - ours)
    assert len(rest) == 1


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
SCHEMES = st.sampled_from([S2, ADAPTED, S4, S8, Scheme(4, 64, symmetric=True), None])
MODULES = st.integers(1, 34).flatmap(
    lambda layers: st.fixed_dictionaries(
        {f"model.layers.{layer}.{part}": SCHEMES for layer in range(layers) for part in PARTS} | {"lm_head": SCHEMES}
    )
)


@given(MODULES)
@settings(max_examples=50)
def test_a_recipe_gives_every_module_its_scheme_and_survives_toml(chosen: dict[str, Scheme | None]) -> None:
    made = to_recipe("auto-3", chosen, 'KL 0.1 "nats"')
    read = recipe.parse(made.to_toml())
    assert read == made
    assert {name: read.scheme_for(name) for name in chosen} == chosen
    assert len(made.rules) <= 2 * len(set(chosen.values()))


def test_a_recipe_reads_well() -> None:
    chosen: dict[str, Scheme | None] = {
        f"model.layers.{layer}.{part}": S4 for layer in range(112) for part in ("self_attn.q_proj", *PARTS)
    }
    chosen["lm_head"] = S8
    for layer in (3, 10, 12, 15, 24, 25, 26, 27, 107, 111):
        chosen[f"model.layers.{layer}.mlp.gate_proj"] = ADAPTED
    for part in "qkv":
        chosen[f"model.layers.5.self_attn.{part}_proj"] = S2
    chosen["model.layers.5.mlp.down_proj"] = S2
    assert [(rule.match, rule.scheme) for rule in to_recipe("auto", chosen).rules] == [
        (("model.layers.5.self_attn.[qkv]_proj", "model.layers.5.mlp.down_proj"), S2),
        (
            tuple(f"model.layers.{text}.mlp.gate_proj" for text in ("3", "1[025]", "2[4-7]", "107", "111")),
            ADAPTED,
        ),
        (
            (
                "model.layers.*.self_attn.[qkv]_proj",
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.down_proj",
            ),
            S4,
        ),
        (("lm_head",), S8),
    ]


def test_names_that_patterns_of_others_cover_are_spelled_out() -> None:
    chosen = {
        "model.layers.0.mlp.gate_proj": S4,
        "model.layers.1.mlp.gate_proj": S4,
        "model.layers.0.mlp.extra.mlp.gate_proj": S2,  # a pattern's * spans dots, so the first two's covers it
        "odd[0]": S8,
        "model.layers.01.mlp.gate_proj": None,
    }
    made = recipe.parse(to_recipe("auto", chosen).to_toml())
    assert {name: made.scheme_for(name) for name in chosen} == chosen
