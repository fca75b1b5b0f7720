from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.recover import recipe
from rlkit.recover.recipe import BITS, GROUPS, NAMED, Recipe, Rule, Scheme

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    adapter_rank=st.integers(0, 1024),
)
# Anything TOML can hold: not lone surrogates, which UTF-8 cannot.
texts = st.text(st.characters(exclude_categories=["Cs"]))
rules = st.builds(Rule, match=st.lists(texts.filter(bool), min_size=1, max_size=3).map(tuple), scheme=schemes)
recipes = st.builds(Recipe, name=texts, rules=st.lists(rules, min_size=1, max_size=4).map(tuple), description=texts)


@given(recipes)
def test_toml_round_trip(value: Recipe) -> None:
    assert recipe.parse(value.to_toml()) == value


@given(recipes)
def test_json_holds_the_same_content(value: Recipe) -> None:
    table = value.to_json()
    assert table["name"] == value.name
    assert [rule["bits"] for rule in table["rule"]] == [rule.scheme.bits for rule in value.rules]


@pytest.mark.parametrize("name", NAMED)
def test_named_recipes_load_and_round_trip(name: str) -> None:
    value = recipe.load(name)
    assert value.name == name
    assert value.description
    assert recipe.parse(value.to_toml()) == value


def test_named_files_and_names_agree() -> None:
    files = Path(recipe.__file__).parent.glob("recipe-*.toml")
    assert sorted(path.stem.removeprefix("recipe-") for path in files) == sorted(NAMED)


def test_w4w2_gives_gate_and_up_two_bits_and_a_correction() -> None:
    value = recipe.load("w4w2-gateup")
    gate = value.scheme_for("model.layers.3.mlp.gate_proj")
    up = value.scheme_for("model.layers.3.mlp.up_proj")
    assert gate == up == Scheme(2, 64, False, 32)
    for module in ("model.layers.3.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"):
        scheme = value.scheme_for(module)
        assert scheme is not None and scheme.bits == 4 and scheme.adapter_rank == 0


def test_first_matching_rule_wins_and_16_bits_means_untouched() -> None:
    rules = [("lm_head", 16), ("*", 8), ("*q_proj", 2)]
    value = recipe.parse("".join(f'[[rule]]\nmatch = "{pattern}"\nbits = {bits}\n' for pattern, bits in rules))
    assert value.scheme_for("lm_head") is None
    q_proj = value.scheme_for("model.layers.0.self_attn.q_proj")
    assert q_proj is not None and q_proj.bits == 8


def test_a_module_no_rule_matches_stays() -> None:
    assert recipe.parse('[[rule]]\nmatch = "a"\nbits = 4\n').scheme_for("b") is None


def test_patterns_are_case_sensitive() -> None:
    assert recipe.parse('[[rule]]\nmatch = "LM_head"\nbits = 4\n').scheme_for("lm_head") is None


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('name = "a"\nbitz = 3\n[[rule]]\nbits = 4\n', 2, "unknown key 'bitz'"),
        ("[[rule]]\nbits = 4\n\n[[rule]]\nmatch = 'x'\nbitts = 2\nbits = 2\n", 6, "unknown key 'bitts'"),
        ("[[rule]]\nbits = 4\n[[rule]]\nbits = 3\n", 4, "bits = 3 is not offered"),
        ("[[rule]]\nbits = 4\ngroup = 48\n", 3, "group = 48"),
        ("[[rule]]\nbits = 4\nadapter_rank = -1\n", 3, "adapter_rank = -1"),
        ('[[rule]]\nbits = "4"\n', 2, "bits must be int"),
        ("[[rule]]\nbits = 4\nsymmetric = 1\n", 3, "symmetric must be bool"),
        ("[[rule]]\nbits = true\n", 2, "bits must be int"),
        ("# head\n\n[[rule]]\nmatch = 'x'\n", 3, "needs bits"),
        ("[[rule]]\nbits = 4\nmatch = []\n", 3, "match is a pattern"),
        ("[[rule]]\nbits = 4\nmatch = [1]\n", 3, "match is a pattern"),
        ("[[rule]]\nbits = 4\n[[ rule ]]\nbits = 5\n", 4, "bits = 5"),
        ("schema_version = 9\n[[rule]]\nbits = 4\n", 1, "reads version 1"),
        ("name = 3\n[[rule]]\nbits = 4\n", 1, "string"),
        ('name = "empty"\n', 1, "at least one"),
        ("rule = [1, 2]\n", 1, "at least one"),
        ("[rule]\nbits = 4\n", 1, "at least one"),
        ("[[rule]]\nbits = 4\n[[rule]]\n  'group' = 7\nbits = 4\n", 4, "group = 7"),
    ],
)
def test_errors_name_the_line_at_fault(text: str, line: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"mine.toml, line {line}: ") as caught:
        recipe.parse(text, where="mine.toml")
    assert word in str(caught.value)


def test_broken_toml_names_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"mine\.toml is not valid TOML: .*line 2"):
        recipe.parse("name = 'a'\nbits = = 3\n", where="mine.toml")


def test_load_reads_a_file_and_names_what_there_is_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[[rule]]\nbits = 8\n", encoding="utf-8")
    assert recipe.load(path).name == "mine"
    with pytest.raises(FileNotFoundError, match="w4, w4w2-gateup, w8"):
        recipe.load("w5")
    with pytest.raises(FileNotFoundError, match="named ones are"):
        recipe.load(tmp_path)


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_bytes(b"GGUF\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        recipe.load(path)


@pytest.mark.parametrize(("k", "asked", "found"), [(576, 128, 64), (1536, 128, 128), (96, 128, 32), (576, 32, 32)])
def test_resolve_takes_the_largest_group_that_divides(k: int, asked: int, found: int) -> None:
    assert Scheme(2, asked).resolve(k).group == found


def test_resolve_refuses_what_no_group_divides() -> None:
    with pytest.raises(ValueError, match="input size 100 is not a multiple of 32"):
        Scheme(4, 32).resolve(100)


def test_stored_bytes_count_codes_scales_and_zero_points() -> None:
    # 576 inputs in 9 groups of 64, 2 bits: 144 bytes of codes, 36 of scales, 9 * 2 bits = 3 bytes of zero points
    assert Scheme(2, 64).nbytes(10, 576) == 10 * (144 + 36 + 3)
    assert Scheme(16, 64).nbytes(10, 576) == 10 * 576 * 2
