"""Arrow streams against what pyarrow wrote, and against bytes that are none."""

from __future__ import annotations

import base64
import zlib

import pytest

import benchmarks
from rlkit.profiles.arrow import read_rows

# flag: bool, who: struct of string and int64, many: list of uint16, text: string; with nulls in every one
ODD = (
    "c-oCpJ5Izf5FO{Ql@TdcD8&{WfMUxnDYvAgO%VvvCQw8o++fQ+#2$j4h9htQjzEohwkN`jh+w3#=Xu^t<`ZL#*(;)wtSm@VMky7r"
    "ASwYSpaN&Yr`HR_9B{80e|#E)fYj!x_>K4;nsKo9J2)%jczOxEVn0&RlI^bUpDecoZ|k{H8E~hZcSF+=YAt{=^7W6Ne^Lef2)bo|"
    "41H|xX$RhMCbzAncRg!p?s~S*mpI<ce2;zIHP(Iwr$jdes><E;N}jFCe(U3ASKoR&aTwv|S^0Tb(R9We(JmXsiTn0}CRqS$w;j7P"
    "t-gDm<TS7q--W=Xz?Hz~g0~j_4gHjj$a5w5*CJml;@e<GRvtwBDB|~gM?sD}n8OtJUraOp=nsE7gJZFSNo&EEdDGx63RH0=bN-j3"
    "e>3i%CHeva5k~F"
)
REFUSED = {
    "dictionary": (
        "c-oCmIS#@=44h3i$qH?eB0?#72qh(-0Er)@;0csGgD3F2Wqfc10m6|pUVChhODW|HpoiE387&$lMzjzS30HCi1AS2LNJfi}?4B9x"
        "4UN<`^c6kAOmI3JCy5h3$;dzJJJUOT%K+=Mom^Qiz7NVDTv^s$R8ecA*G;j_zTYyE8NIUge1)gg_-@&;cYN&&Z|_g}-QG~{IL+=@"
        "&hMzB-jE(s=DOD(bXPxgr$2RyE{Sh8%^Zd"
    ),
    "float": (
        "c-nQ2!3qK~3`AddYb{F;dsxJeS@4%U`U!rrw>Sxr6~Td~lQ5Z#nb{p!aV!iPC%TwWs(RFQ)tXgfy)AY&%^K%Wt?5x_|F5Yf^$+P>"
        "+hQ`Iv-V6M$KaBeN4PQ9@aTN7s2`ESv+bF=aA4v;`WG)hdk0=O&*kh5r)v=W"
    ),
    "compressed": (
        "c-nPPF%E)25S$AK620OI3JMYlFQK$Cv9y#QSXvriW9K*c)j7K?f+kLKH_YzbEO#lTbOjJ0*dm}nj*?%5^VFa!xqI7L=Bo5e#ae-l"
        "x}s&cT(~wb%zsnuKQ)d`Ps<Smo|q;FO+)6<kPcW7Sc&={ljqFUScY5q<~bSuV{hCVcdMTJ$%DRuWp~H=(myEgBFDKue)o4WVsLn!"
        "2Emde_ZEHwGxQn3"
    ),
}


def test_text_numbers_and_lists() -> None:
    rows = read_rows(benchmarks.packed(benchmarks.COPA))
    assert [row["premise"] for row in rows] == ["The cat fell asleep.", "The dog barked.", "It rained."]
    assert [(row["idx"], row["label"]) for row in rows] == [(0, 0), (1, 0), (2, 1)]
    assert read_rows(benchmarks.packed(benchmarks.MMLU))[1]["choices"] == ["7", "8", "9", "11"]


def test_nulls_structs_and_letters_beyond_ascii() -> None:
    assert read_rows(benchmarks.packed(ODD)) == [
        {"flag": True, "who": {"name": "a", "n": 1}, "many": [1, 2], "text": "ä"},
        {"flag": None, "who": None, "many": None, "text": None},
        {"flag": False, "who": {"name": None, "n": 3}, "many": [], "text": ""},
    ]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not read here"):
        read_rows(zlib.decompress(base64.b85decode(REFUSED[kind])))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no stream at all", b"\xff\xff\xff\xff\x10\x00\x00\x00"])
def test_other_bytes_are_no_stream(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no (Arrow )?(stream|message)"):
        read_rows(data)


def test_an_end_that_comes_too_soon_is_noticed_wherever_it_is() -> None:
    whole = benchmarks.packed(benchmarks.COPA)
    complete = read_rows(whole)
    for length in range(8, len(whole) - 8, 97):
        try:
            assert read_rows(whole[:length]) in ([], complete)  # between two messages there is nothing to miss
        except ValueError as error:
            assert "\n" not in str(error)
