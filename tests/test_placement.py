"""Placements: what their text means, which linears get which rank, and what is refused in one line."""

from __future__ import annotations

import pytest

from rlkit.recover.placement import PLACEMENTS, Placement, parse, ranks, to_text

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = [f"model.layers.{i}.{'mlp' if i > 3 else 'self_attn'}.{LINEARS[i]}" for i in range(7)] + ["lm_head"]


def short(found: dict[str, int]) -> dict[str, int]:
    return {name.rpartition(".")[2]: rank for name, rank in found.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gate-up:32,kv:16", {"k_proj": 16, "v_proj": 16, "gate_proj": 32, "up_proj": 32}),
        ("*.down_proj:8", {"down_proj": 8}),
        ("all", dict.fromkeys(LINEARS, 24)),
        (" kv , gate-up : 4 ", {"k_proj": 24, "v_proj": 24, "gate_proj": 4, "up_proj": 4}),
        ("*.k_proj:8,kv:16", {"k_proj": 8, "v_proj": 16}),
        ("model.layers.[0-3].*:0,all:2", {"gate_proj": 2, "up_proj": 2, "down_proj": 2}),
        ("*:1", dict.fromkeys(LINEARS, 1)),
        ("all:0", {}),
    ],
)
def test_text_says_which_linears_get_which_rank(text: str, expected: dict[str, int]) -> None:
    found = ranks(MODULES, parse(text, rank=24))
    assert short(found) == expected
    assert list(found) == [name for name in MODULES if name in found]
    assert ranks(MODULES, parse(to_text(parse(text, rank=24)))) == found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_named_placements_are_known_by_their_name(name: str) -> None:
    assert parse(f"{name}:7") == (Placement(PLACEMENTS[name], 7),)
    assert to_text(parse(f"{name}:7")) == f"{name}:7"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has an empty part; write it like gate-up:32"),
        ("kv:16,", "has an empty part"),
        (":8", "has an empty part"),
        ("kv:", "rank '' is no whole number"),
        ("kv:many", "rank 'many' is no whole number"),
        ("kv:-1", "rank '-1' is no whole number"),
        ("kv:8:9", "rank '8:9' is no whole number"),
        ("kv:²", "is no whole number"),
        ("kv:2000", r"rank 2000 of \*\.k_proj, \*\.v_proj is outside 0\.\.1024"),
        ("gateup:8", "did you mean gate-up"),
        ("q_proj:8", r'or give a pattern such as "\*\.q_proj"'),
    ],
)
def test_bad_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["*.experts:8", "kv:8,*.down_porj:4", "lm_hea?:8"])
def test_placements_without_a_linear_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="match no linear that can take an adapter; there are q_proj, k_proj"):
        ranks(MODULES, parse(text))


def test_no_placement_and_no_module_are_refused() -> None:
    with pytest.raises(ValueError, match="no placement given"):
        ranks(MODULES, ())
    with pytest.raises(ValueError, match="there are none"):
        ranks(["lm_head"], parse("all"))
    with pytest.raises(ValueError, match="names no linear"):
        Placement((), 8)
