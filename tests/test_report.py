"""The report: sentences that follow the numbers, renderings that keep them, a page that needs nothing else."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from reports import bundle, divergence, forecast, measured, report
from rlkit.profiles import plots, render
from rlkit.profiles.bench import Case, Kind, Measurement, Series
from rlkit.profiles.bundle import BundleSize
from rlkit.profiles.report import Accuracy, Report, Stage, bundle_results, findings, read_report, time_ratio
from shapes import SMOLLM2_135M

EVIL = "<script>alert(\"x\")</script> & $x^2$ 'q'"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_it_survives_json_and_a_file(tmp_path: Path) -> None:
    original = report()
    assert Report.from_json(json.loads(json.dumps(original.to_json()))) == original
    data, page = render.write_report(tmp_path, original)
    assert read_report(data) == original and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    bare = replace(original, chat=None, stages=(Stage("quantize", None, 1.0),), bundles=())
    assert Report.from_json(bare.to_json()) == bare


def test_another_schema_and_a_damaged_report_are_refused() -> None:
    table = report().to_json()
    with pytest.raises(ValueError, match="schema_version 2, this rlkit reads 1"):
        Report.from_json({**table, "schema_version": 2})
    del table["bundles"][0]["recipe"]
    with pytest.raises(ValueError, match="no complete report"):
        Report.from_json(table)


def test_it_says_that_two_bits_are_slower_when_they_are() -> None:
    (text,) = [line for line in findings(report()) if line.startswith("2-bit")]
    assert "2-bit (w4w2-gateup) is slower than 4-bit (w4) on this machine: 9.80 ms per token against 7.90 ms" in text
    assert "1.24 times the time, the median of rounds side by side, although it reads 13% fewer bytes" in text
    assert "overlap" not in text


def test_it_says_that_two_bits_are_faster_when_they_are() -> None:
    quick = bundle("w4w2-gateup", measurement=measured(0.15, 0.0058, 73_500_000), tpot_ratio=0.73)
    (text,) = [line for line in findings(report(bundles=(bundle("w4"), quick))) if line.startswith("2-bit")]
    assert "is faster than 4-bit" in text and "side by side, reading 13% fewer bytes" in text
    assert "although" not in text


def test_ratios_within_two_percent_are_equal_and_medians_serve_where_rounds_were_not_paired() -> None:
    same = bundle("w4w2-gateup", measurement=measured(0.15, 0.0080, 73_500_000), tpot_ratio=None)
    assert time_ratio(bundle("w4"), same) == pytest.approx(0.0080 / 0.0079)
    text = " ".join(findings(report(bundles=(bundle("w4"), same))))
    assert "is as fast as" in text and "1.01 times the time, by these medians" in text
    assert "Their times overlap from round to round, so another run may say otherwise." in text


def test_it_says_what_the_reference_is_and_how_much_was_recovered() -> None:
    text = " ".join(findings(report()))
    assert "full-precision reference is what the GGUF Q4_1 file's codes dequantize to" in text
    assert "82% of the divergence is gone" in text and "The original's perplexity is 46.5" in text
    assert "differs from its checkpoint by KL 0.0043 nats, 94.5% the same first choice" in text
    assert "(-71%)" in text and "uncalibrated" in text
    assert "as it came (safetensors bfloat16)" in " ".join(findings(report(reference_format="safetensors bfloat16")))
    worse = (Stage("a", divergence(0.1, 0.9, 47.0), 1.0), Stage("b", divergence(0.2, 0.8, 48.0), 1.0))
    assert "the divergence grew by 100%" in " ".join(findings(report(stages=worse)))


def test_tables_have_a_cell_for_every_column_and_leave_the_unknown_empty() -> None:
    given = report(bundles=(bundle("w4", agreement=None, measurement=replace(MEASURED, peak_nbytes=None)),))
    made = {table.title: table for table in render.tables(given)}
    assert all(len(row) == len(table.columns) for table in made.values() for row in table.rows)
    speed = made["Speed, measured and forecast"]
    assert speed.rows[0][-1] == "" and speed.rows[1][-1] == "230"
    assert speed.rows[0][2] == "152 (146 to 163)"
    assert made["Accuracy of the exported bundles"].rows[0][-2:] == ("", "")
    assert made["Recovery, stage by stage"].rows[0][1] == "2.9900 ± 0.0997"
    assert made["MB by kind of tensor"].rows[-1] == ("all", "86.34")


MEASURED = measured(0.152, 0.0079, 84_240_000)


def test_markdown_escapes_what_it_is_given() -> None:
    text = render.to_markdown(report(model="a|b <i>*x*", command="rlkit demo"))
    assert text.startswith("# a\\|b \\<i\\>\\*x\\*\n")
    assert "| stage | KL, nats/token |" in text and "> The capital of France is Paris." in text


def test_the_page_is_whole_and_points_nowhere() -> None:
    text = render.to_html(report())
    page = parsed(text)
    assert "http" not in text and "//" not in text
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _attributes in page.tags}
    assert "$" not in text
    for _tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "prefers-color-scheme: dark" in text
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 3
    assert all(attributes["role"] == "img" and "w4" in str(attributes["aria-label"]) for attributes in drawn[1:])
    identifiers = [str(attributes["id"]) for _tag, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_drawings_are_valid_and_take_the_colour_of_the_page() -> None:
    made = plots.svg_plots(report())
    assert len(made) == 3
    for svg in made.values():
        ElementTree.fromstring(svg)
        assert "currentColor" in svg and plots.INK not in svg and "<text" in svg
        assert not re.search(r"#0{6}\b", svg)
    texts = "".join(ElementTree.fromstring(made["Forecast beside measurement"]).itertext())
    assert "152 ms" in texts and "9.80 ms" in texts and "2.10 ms" in texts
    assert made == plots.svg_plots(report())  # the same numbers make the same file


def test_names_that_would_break_the_page_are_shown_as_they_are() -> None:
    stages = (Stage(EVIL, divergence(1.0, 0.5, 50.0), 1.0),)
    evil = bundle(EVIL, recipe=EVIL)
    given = report(model=EVIL, stages=stages, bundles=(evil,), provenance=(EVIL,), command=EVIL)
    text = render.to_html(given)
    page = parsed(text)
    assert "script" not in {tag for tag, _attributes in page.tags}
    assert EVIL in "".join(page.text)


def test_bundles_measured_together_become_results() -> None:
    names = ("w4", "w4w2-gateup")
    rounds = (((0.1, 0.1), (0.2, 0.2)), ((0.15, 0.15), (0.3, 0.3)))
    prefill, decodes = Case(Kind.PREFILL, 4), (Case(Kind.DECODE, 2, 4), Case(Kind.DECODE, 2, 9))
    timed = [
        Measurement(name, (Series(prefill, ((1.0,), (1.0,))), *(Series(decode, mine) for decode in decodes)))
        for name, mine in zip(names, rounds, strict=True)
    ]
    sizes = [
        BundleSize("w4", SMOLLM2_135M, {"gate_up": 4000}, 4),
        BundleSize("mixed", SMOLLM2_135M, {"gate_up": 2000}, 2),
    ]
    made = [forecast(0.5, 0.05, 900), forecast(0.5, 0.04, 800)]
    found = bundle_results(sizes, timed, made, [Accuracy(), Accuracy(agreement=divergence(0.01, 0.95, 50.0))])
    assert [result.name for result in found] == list(names)
    assert [result.tpot_ratio for result in found] == [None, pytest.approx(1.5)]
    assert found[1].measurement == timed[1].timing() and found[1].forecast == made[1]
    assert found[1].nbytes == 2000 and found[1].lowest_bits == 2 and found[1].agreement is not None


def test_pngs_are_written(tmp_path: Path) -> None:
    paths = plots.save_pngs(report(), tmp_path, dpi=40)
    assert [path.name for path in paths] == ["divergence.png", "size-speed.png", "forecast.png"]
    width, height = struct.unpack(">II", paths[0].read_bytes()[16:24])
    assert width > 300 and height > 50


def test_a_report_without_numbers_has_no_plots() -> None:
    bare = report(stages=(), bundles=(), chat=None)
    assert plots.svg_plots(bare) == {} and render.tables(bare) == ()
    parsed(render.to_html(bare))
    unmeasured = report(stages=(Stage("a", None, 1.0), Stage("b", divergence(1.0, 0.5, 50.0), 1.0)), bundles=())
    assert "not measured" in next(iter(plots.svg_plots(unmeasured).values()))
