"""Two result files compared: what they share, how sure a difference is, and what else is different."""

from __future__ import annotations

from dataclasses import replace

import pytest

from measured import HOST, entry, result
from rlkit.profiles import changes
from rlkit.profiles.timing import Summary

STEADY, SLOWER = (0.50, 0.51, 0.49, 0.50), (0.60, 0.61, 0.59, 0.60)


def test_a_difference_beyond_the_noise_is_told() -> None:
    found = changes.compare(result(entry("a", prefill=STEADY)), result(entry("a", prefill=SLOWER)))
    prefill, decode = found
    assert (prefill.name, prefill.test.name, decode.test.name) == ("a", "pp64", "tg2 @ d64")
    assert prefill.ratio == pytest.approx(0.5 / 0.6, rel=1e-3) and prefill.significant is True
    assert prefill.error == pytest.approx(0.0095, abs=0.001)
    drawn = changes.change_table(found)
    assert drawn.rows[0][-1] == "B is slower" and drawn.rows[0][-2].startswith("0.833 ± 0.0")
    back = changes.compare(result(entry("a", prefill=SLOWER)), result(entry("a", prefill=STEADY)))
    assert changes.change_table(back).rows[0][-1] == "B is faster"


def test_noise_is_called_noise_and_single_rounds_unknown() -> None:
    noisy = changes.compare(result(entry("a", prefill=(0.4, 0.6))), result(entry("a", prefill=(0.42, 0.66))))
    assert changes.change_table(noisy).rows[0][-1] == "within the noise"
    lone = changes.compare(result(entry("a", prefill=(0.4,))), result(entry("a", prefill=(0.8,))))
    assert lone[0].significant is None and lone[0].error is None
    assert changes.change_table(lone).rows[0][-2:] == ("0.500", "one round: unknown")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([10.0, 10.0], [10.0, 10.0], False),  # no scatter at all
        ([10.0, 10.0], [11.0, 11.0], True),
        ([10.0, 12.0], [11.0, 13.0], False),
        ([9.0, 10.0, 11.0], [12.4, 13.4, 14.4], True),  # t = 4.16 with 4 degrees of freedom, above 2.78
        ([9.0, 10.0, 11.0], [11.2, 12.2, 13.2], False),  # t = 2.69
    ],
)
def test_welch(a: list[float], b: list[float], expected: bool) -> None:
    assert changes.significant(Summary.of(a), Summary.of(b)) is expected
    assert changes.significant(Summary.of(b), Summary.of(a)) is expected


def test_bundles_are_matched_by_name_or_alone() -> None:
    both = result(entry("a"), entry("b"))
    assert [change.name for change in changes.compare(both, result(entry("b"), entry("c")))] == ["b", "b"]
    assert [change.name for change in changes.compare(result(entry("old")), result(entry("new")))] == ["new / old"] * 2
    with pytest.raises(ValueError, match=r"share no test: a, pp64; .* against c, pp64"):
        changes.compare(both, result(entry("c"), entry("d")))


def test_other_differences_are_listed() -> None:
    a = result()
    quick = replace(a.entries[0], measurement=replace(a.entries[0].measurement, threads=8))
    b = replace(a, host=replace(HOST, cpu="Other"), versions={**a.versions, "onnxruntime": "1.30"}, entries=(quick,))
    assert list(changes.differences(a, a)) == []
    assert list(changes.differences(a, b)) == [
        "machine: Some CPU 9000 against Other",
        "onnxruntime: 1.31.1 against 1.30",
        "threads: 2 against 8",
    ]


def test_changes_are_plain_json() -> None:
    (prefill, _decode) = changes.compare(result(), result())
    assert prefill.to_json()["test"] == "pp64" and prefill.to_json()["ratio"] == 1.0
