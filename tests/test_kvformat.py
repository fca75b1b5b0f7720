from __future__ import annotations

import pytest

from rlkit.recover.kvformat import SCHEMES, SETTLE, KVFormat, KVScheme, nbytes, parse


@pytest.mark.parametrize("name", SCHEMES)
def test_named_schemes_are_found_by_their_names(name: str) -> None:
    assert parse(name) is SCHEMES[name]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("K8V4", "k8v4"),
        ("k8v4:g64:token", "k8v4"),
        ("k8v4:w128:smooth:g32", "k8v4:g32:smooth:w128"),
        ("kivi2:w64", "k2v2:kchannel:g32:min:w64"),
        ("k2v2:kchannel:min:g32:w128", "kivi2"),
        ("k8v8:channel:sym", "int8"),
        ("k4v4:tensor:sym:g32", "int4-tensor"),
        ("k4v4:tensor:g32", "k4v4:tensor"),
        ("k16v4:kchannel", "k16v4"),
        ("k4v4:kchannel:vblock:g16", "k4v4:kchannel:vblock:g16"),
    ],
)
def test_schemes_that_do_the_same_have_one_name(words: str, name: str) -> None:
    scheme = parse(words)
    assert scheme.name == name
    assert parse(scheme.name) == scheme


def test_a_group_from_outside_holds_where_the_name_gives_none() -> None:
    assert parse("k4v4", group=32) == parse("k4v4:g32")
    assert parse("k4v4:g128", group=32) == parse("k4v4:g128")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("fp8", "no simulated cache"),
        ("k3v4", "3 bits"),
        ("k4v4:fast", "option 'fast' does not exist"),
        ("k4v4:smooth:smooth", "twice"),
        ("k4v4:g0", "group of 0"),
        ("k4v4:sym:min", "leave one of them out"),
        ("k16v4:smooth", "not rounded"),
        ("int8:smooth", "scales chosen before"),
        ("k16v16:w8", "in 16 bit already"),
    ],
)
def test_nonsense_is_refused_in_one_line(words: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse(words)
    assert "\n" not in str(caught.value)


def test_formats_check_themselves() -> None:
    for wrong in ({"bits": 5}, {"bits": 4, "granularity": "row"}, {"bits": 4, "group": -1}):
        with pytest.raises(ValueError, match="use"):
            KVFormat(**wrong)
    with pytest.raises(ValueError, match="negative"):
        KVScheme("x", KVFormat(4), KVFormat(4), window=-1)


def test_heads_that_a_group_does_not_divide_are_refused_with_one_that_does() -> None:
    with pytest.raises(ValueError, match="head_dim 80 of the keys is not divisible by groups of 64; use a group of 16"):
        nbytes(parse("k4v4"), 1, 1, 80, 10)
    with pytest.raises(ValueError, match="whole bytes"):
        nbytes(parse("k2v2:channel"), 1, 1, 6, 10)
    assert nbytes(parse("k16v16"), 1, 1, 7, 10) == 2 * 7 * 10 * 2


def test_bytes_per_token_are_those_of_the_paper() -> None:
    """Qwen2.5-3B in 16 bit: 36,864 bytes a token. In int4 with groups of 64: a quarter, and 4 bytes per group."""
    whole = nbytes(parse("k16v16"), 36, 2, 128, 10_000)
    assert whole == 36_864 * 10_000
    assert nbytes(parse("k4v4"), 36, 2, 128, 10_000) == whole // 4 + 10_000 * 2 * 36 * 2 * 2 * 4


def test_bytes_of_windows_groups_means_and_given_scales() -> None:
    codes = nbytes(parse("k8v8:w10:tensor"), 1, 1, 64, 100)
    assert codes == 2 * (90 * 64 + 10 * 64 * 2 + 4)
    assert nbytes(parse("k8v8:block:g16"), 1, 1, 64, 100) == 2 * (96 * 64 + 4 * 64 * 2 + 6 * 4)
    assert nbytes(parse("k8v16:channel:g16"), 1, 1, 64, 100) == (96 + 2 * 4) * 64 + 6 * 64 * 4 + 100 * 64 * 2
    assert nbytes(parse("k4v4:smooth"), 1, 1, 64, 200) == nbytes(parse("k4v4"), 1, 1, 64, 200) + 64 * 2
    assert nbytes(parse("k4v16:smooth"), 1, 1, 64, SETTLE - 1) == 2 * (SETTLE - 1) * 64 * 2
    assert nbytes(parse("int4"), 3, 2, 64, 50) == 2 * 3 * 2 * (50 * 32 + 64 * 4)
    assert nbytes(parse("k4v4"), 1, 1, 64, 10, value_dim=128) == 10 * (36 + 72)
