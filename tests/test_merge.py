"""Merging results: machines as columns, the newer of two, marks, skips, refusals; tables, sentences, the page."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import measured
import runs
from rlkit.profiles import merge, mergecharts, mergepage, mergetext, svg
from rlkit.profiles.devicerun import Part, Run, Skip, read_run
from rlkit.profiles.merge import Source
from rlkit.profiles.merged import Merged
from rlkit.profiles.standard import MODELS, model_name
from rlkit.recover.atomic import write_json

W2 = "w4w2-gateup"


def merged(*contents: Any, **how: Any) -> Merged:
    return merge.merge([Source(f"{number}.json", content) for number, content in enumerate(contents)], **how)


def laptop() -> Merged:
    """A CPU and a GPU of one laptop, and another machine; the GPU is faster at w4 only."""
    cpu = runs.run(
        runs.row(runs.PREFILL, 0.5, promise=0.4),
        runs.row(seconds=0.01, promise=0.011),
        runs.row(seconds=0.008, recipe=W2),
        runs.row(runs.DEEP, 0.02),
    )
    gpu = runs.run(
        runs.row(runs.PREFILL, 0.1, threads=None),
        runs.row(seconds=0.005, threads=None, promise=0.002),
        runs.row(seconds=0.009, recipe=W2, threads=None),
        part=runs.IGPU,
        skips=(Skip("qwen3-4b", "w8", "", "not enough memory: about 8.9 GB"),),
    )
    other = runs.run(runs.row(seconds=0.1, threads=2), host=runs.SERVER, part=replace(runs.CPU, name=runs.SERVER.cpu))
    return merged(cpu, gpu, other)


LABELS = ("AMD Ryzen AI 9 HX 370 CPU", "AMD Radeon 890M webgpu", "AMD EPYC 9V74 CPU")


def test_every_test_is_a_line_and_every_machine_a_column() -> None:
    found = laptop()
    assert tuple(machine.label for machine in found.machines) == LABELS
    assert [line.name for line in found.lines] == [
        "smollm2-135m w4, pp512",
        "smollm2-135m w4, tg4",
        "smollm2-135m w4, tg4 @ d1024",
        f"smollm2-135m {W2}, tg4",
    ]
    prefill, decode, deep, mixed = found.lines
    assert tuple(decode.cells) == LABELS and tuple(deep.cells) == LABELS[:1]
    assert decode.cells[LABELS[1]].tokens_per_s.mean == pytest.approx(200, rel=1e-3)
    assert decode.cells[LABELS[0]].error == pytest.approx(0.1) and mixed.cells[LABELS[0]].error is None
    assert prefill.cells[LABELS[0]].error == pytest.approx(-0.2)
    assert (prefill.best, decode.best, mixed.best) == ((LABELS[1],), (LABELS[1],), (LABELS[0],))
    assert deep.best == ()  # of a single machine


def test_who_is_within_the_scatter_is_marked_too() -> None:
    quick, slow = runs.row(seconds=0.0100, scatter=0.1), runs.row(seconds=0.0101, scatter=0.1, threads=None)
    (line,) = merged(runs.run(quick), runs.run(slow, part=runs.IGPU)).lines
    assert set(line.best) == set(LABELS[:2])


def test_models_are_in_the_order_of_their_size_and_recipes_of_their_standing() -> None:
    rows = [
        runs.row(model=model, recipe=recipe) for model in ("qwen3-4b", "smollm2-135m") for recipe in (W2, "x", "w8")
    ]
    names = [(line.model, line.recipe) for line in merged(runs.run(*rows)).lines]
    order = ["w8", W2, "x"]
    assert names == [(model, recipe) for model in ("smollm2-135m", "qwen3-4b") for recipe in order]


def test_of_two_results_the_newer_is_shown_and_a_note_says_so() -> None:
    old, new = runs.row(seconds=0.02, date="2026-11-01"), runs.row(seconds=0.01, versions={"onnxruntime": "1.32.0"})
    for contents, names in (((old, new), ("1", "0")), ((new, old), ("0", "1"))):
        found = merged(*(runs.run(each) for each in contents))
        (line,) = found.lines
        assert line.cells[LABELS[0]].tokens_per_s.mean == pytest.approx(100, rel=1e-3)
        (note,) = found.notes
        assert f"{LABELS[0]}: smollm2-135m w4, tg4 measured twice; the newer of {names[0]}.json" in note
        assert f"not that of {names[1]}.json (2026-11-01); onnxruntime 1.32.0 in place of 1.31.1" in note


def test_of_one_date_the_later_file_is_shown_and_many_make_one_note() -> None:
    both = [runs.run(runs.row(seconds=s), runs.row(runs.DEEP, s)) for s in (0.01, 0.02)]
    found = merged(*both)
    assert [round(1 / cell.seconds.mean) for line in found.lines for cell in line.cells.values()] == [50, 50]
    (note,) = found.notes
    assert "2 tests measured twice; the newer of 1.json" in note


def test_threads_of_one_processor_are_columns_of_their_own() -> None:
    found = merged(runs.run(runs.row(), runs.row(runs.DEEP, threads=1)))
    assert [machine.label for machine in found.machines] == [f"{LABELS[0]}, 12 threads", f"{LABELS[0]}, 1 thread"]
    assert not found.notes


def test_hosts_that_share_a_name_are_told_apart() -> None:
    hosts = [replace(runs.LAPTOP, memory_nbytes=size * 2**30) for size in (16, 32)]
    hosts.append(replace(runs.LAPTOP, cores=8))
    labels = [machine.label for machine in merged(*(runs.run(runs.row(), host=host) for host in hosts)).machines]
    assert len(set(labels)) == 3
    assert any(label.endswith("16.0 GiB") for label in labels) and any("8 cores" in label for label in labels)


def test_files_of_bench_stand_beside_those_of_scripts() -> None:
    entry = measured.entry("some-folder")
    found = merged(measured.result(entry))
    assert entry.parameters == MODELS["smollm2-135m"].parameters
    assert [line.name for line in found.lines] == ["smollm2-135m w4, pp64", "smollm2-135m w4, tg2 @ d64"]
    (machine,) = found.machines
    assert (machine.label, machine.threads) == ("Some 9000 CPU", 2)
    part = Part("cpu", "CPUExecutionProvider", measured.HOST.cpu)
    own = runs.run(runs.row(threads=2), host=measured.HOST, part=part)
    assert [each.label for each in merged(measured.result(entry), own).machines] == ["Some 9000 CPU"]


def test_two_bundles_of_one_recipe_in_a_file_of_bench_keep_their_names() -> None:
    names = {line.model for line in merged(measured.result(measured.entry("a"), measured.entry("b"))).lines}
    assert names == {"smollm2-135m [a]", "smollm2-135m [b]"}


def test_different_versions_and_software_drivers_are_said() -> None:
    soft = Part("webgpu", "WebGpuExecutionProvider", "SwiftShader", software=True)
    found = merged(runs.run(runs.row()), runs.run(runs.row(versions={"onnxruntime": "1.27.0"}), part=soft))
    assert found.notes == (
        f"different versions of onnxruntime: 1.27.0 (SwiftShader webgpu); 1.31.1 ({LABELS[0]})",
        "SwiftShader webgpu is a software driver: it computes on the CPU, and its speed says nothing of a GPU",
    )


def test_skips_are_listed_unless_another_file_has_the_result() -> None:
    there = Skip("smollm2-135m", "w4", "tg4", "interrupted")
    gone = runs.run(part=Part("npu", "npu", "none"), skips=(Skip("", "", "", "no NPU"),))
    found = merged(runs.run(runs.row(runs.DEEP), skips=(there,)), gone)
    whole = f"npu on {runs.LAPTOP.cpu.split(' w/')[0]}"
    assert [(left.machine, left.what) for left in found.skips] == [
        (LABELS[0], "smollm2-135m, w4, tg4"),
        (whole, "everything"),
    ]
    assert [
        left.what for left in merged(runs.run(runs.row(runs.DEEP), skips=(there,)), runs.run(runs.row())).skips
    ] == []


def test_nothing_to_merge_is_one_line() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge.merge([])


def test_files_are_read_back_and_others_refused(tmp_path: Path) -> None:
    path, run = tmp_path / "a.json", runs.run(runs.row(promise=0.02), skips=(Skip("m", "", "", "why"),))
    write_json(path, run.to_json())
    assert read_run(path) == run and merge.read(path) == Source("a.json", run)
    table = run.to_json()
    cases: list[tuple[dict[str, Any], str]] = [
        ({**table, "schema_version": 9}, "schema_version 9, this rlkit reads 1; measure again"),
        ({**table, "units": {"time": "ms", "size": "B"}}, r"is in units .*'ms'"),
        ({**table, "kind": "gate"}, "holds 'gate', no measurement"),
        ({"schema_version": 2, "kind": "bench"}, "no result of rlkit bench"),
        ({**table, "rows": [{"model": "x"}]}, "no complete result"),
        ({**table, "part": None}, "no complete result"),
        (
            {**table, "rows": [{**table["rows"][0], "forecast": {"seconds": -1, "place": "", "label": ""}}]},
            "no complete",
        ),
    ]
    for content, why in cases:
        write_json(path, content)
        with pytest.raises(ValueError, match=why) as error:
            merge.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_text('{"kind": "device-bench"')
    with pytest.raises(ValueError, match=r"a\.json"):
        merge.read(path)
    with pytest.raises(FileNotFoundError):
        merge.read(tmp_path / "absent.json")


def test_a_result_takes_the_place_of_an_older_one_and_of_the_reason_for_none() -> None:
    reasons = tuple(Skip(*place, "why") for place in (("", "", ""), ("smollm2-135m", "w4", ""), ("qwen3-4b", "w4", "")))
    run = runs.run(skips=reasons).with_row(runs.row(seconds=0.02)).with_row(runs.row(seconds=0.01, date="2027-01-01"))
    assert [row.seconds for row in run.rows] == [0.01] and run.date == "2027-01-01"
    assert [skip.model for skip in run.skips] == ["qwen3-4b"]
    newer = run.with_row(runs.row(versions={"onnxruntime": "2"}))
    assert len(newer.rows) == 2  # another version's stays beside it
    assert [skip.reason for skip in newer.with_skip(Skip("qwen3-4b", "w4", "", "other")).skips] == ["other"]


def test_models_are_named_by_their_sizes() -> None:
    shape = MODELS["qwen3-4b"]
    assert model_name(shape.architecture, shape.parameters) == "qwen3-4b"
    assert model_name("LlamaForCausalLM", 7_000_000_000) == "Llama 7.0B"
    assert model_name("Qwen3ForCausalLM", 1_250_000) == "Qwen3 1M"
    assert model_name("LlamaForCausalLM", 400) == "Llama 400"


def test_shapes_are_those_that_stand_ins_are_made_of() -> None:
    from rlkit.recover.standin import SHAPES

    assert {name: MODELS[name] for name in SHAPES} == SHAPES


def test_tables_have_a_column_for_every_machine() -> None:
    found = laptop()
    speeds, bandwidths, machines, skips = mergetext.tables(found)
    assert speeds.columns == ("model", "recipe", "test", *LABELS)
    assert speeds.rows[1][3:] == ("100.0 ± 1.0 (+10 %)", "200.0 ± 2.0 (-60 %) *", "10.0 ± 0.1")
    assert bandwidths.rows[0][3:] == ("100.0", "10.0", "20.0", "1.0")
    assert machines.rows[1][5:7] == ("WebGpuExecutionProvider", "32.0.1")
    assert skips.rows == ((LABELS[1], "qwen3-4b, w8", "not enough memory: about 8.9 GB"),)
    narrow = mergetext.tables(found, narrow=True)
    assert narrow[0].columns == ("model", "recipe", "test", "A", "B", "C")
    assert narrow[0].rows[1][3:] == ("100.0 +10%", "200.0 -60%*", "10.0")
    assert narrow[2].rows[0][0] == f"A: {LABELS[0]}"


def test_what_rounds_to_nothing_has_no_sign_of_its_own() -> None:
    assert [mergetext.percent(share) for share in (-0.004, 0.004, -0.06)] == ["+0 %", "+0 %", "-6 %"]


def test_findings_are_made_of_the_numbers() -> None:
    text = " ".join(mergetext.findings(laptop()))
    assert f"{LABELS[1]} decodes at 1.44 times the speed of {LABELS[0]} (2 tests)" in text
    assert f"20.00 times the speed of {LABELS[2]} (1 test)" in text
    assert f"reads prompts at 5.00 times the speed of {LABELS[0]} (1 test)" in text
    assert f"2-bit gate and up projections against w4 on {LABELS[0]}: decode +25 % (smollm2-135m, tg4)." in text
    assert f"{LABELS[1]}: decode -44 %" in text
    assert f"{LABELS[0]} 15 %, 20 % (2 tests, uncalibrated)" in text
    assert mergetext.findings(merged(runs.run(runs.row()))) == ()


def test_a_busy_machine_is_named() -> None:
    (said,) = mergetext.findings(merged(runs.run(runs.row(scatter=0.3), runs.row(runs.DEEP))))
    assert said.startswith(f"{LABELS[0]}: the rounds of 1 of 2 tests scatter by more than 10 %")


def test_csv_has_a_line_for_every_result() -> None:
    rows = list(csv.DictReader(io.StringIO(mergetext.to_csv(laptop()))))
    assert len(rows) == 8
    gpu = next(row for row in rows if row["machine"] == LABELS[1] and row["test"] == "tg4")
    assert (float(gpu["tokens_per_s"]), gpu["best"], gpu["threads"]) == (pytest.approx(200, rel=1e-3), "True", "")
    assert float(gpu["forecast_error"]) == pytest.approx(-0.6) and gpu["ttft_seconds"] == ""
    assert mergetext.to_csv(merged(runs.run())) == ""


def test_json_says_everything() -> None:
    table = json.loads(json.dumps(laptop().to_json()))
    assert (table["schema_version"], table["kind"]) == (1, "device-report")
    assert [machine["label"] for machine in table["machines"]] == list(LABELS)
    cell = table["lines"][1]["cells"][LABELS[1]]
    assert cell["error"] == pytest.approx(-0.6) and cell["forecast"]["label"] == "uncalibrated"
    assert table["skips"][0]["reason"].startswith("not enough memory") and table["units"]["time"] == "s"


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a page loads or runs."""

    VOID = ("meta", "br", "img", "link", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_the_same_each_time() -> None:
    text = mergepage.to_html(laptop())
    assert text == mergepage.to_html(laptop())
    page = Page(text)
    assert not page.open and not page.loads
    assert "script" not in page.tags and "link" not in page.tags and "://" not in text and "$" not in text
    assert "prefers-color-scheme: dark" in text
    charts = page.tags.count("svg") - text.count('class="key"')
    assert charts == 2 + 1 + 2  # speeds of two recipes, bandwidth, forecasts of both kinds
    for part in (*LABELS, "smollm2-135m", "200.0 ± 2.0", "forecast -60 %", "not enough memory", "0.json, 1.json"):
        assert part in text
    assert text.count('<td class="best"') == 3


def test_names_cannot_break_the_page() -> None:
    evil = '<script>alert("$x")</script>'
    host = replace(runs.LAPTOP, cpu=evil)
    content = runs.run(
        runs.row(recipe=evil, weights=evil),
        host=host,
        part=replace(runs.IGPU, name=evil),
        skips=(Skip(evil, "", "", evil),),
    )
    text = mergepage.to_html(merged(content, notes=[evil]))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not Page(text).open


def test_a_page_without_any_result_says_why() -> None:
    gone = runs.run(part=Part("npu", "npu", "none"), skips=(Skip("", "", "", "no NPU: none is listed"),))
    text = mergepage.to_html(merged(gone))
    assert (
        "no NPU: none is listed" in text and "nothing measured" in text and "How fast models run on 0 machines" in text
    )
    assert not Page(text).open


def test_software_drivers_are_not_in_the_charts() -> None:
    soft = Part("webgpu", "WebGpuExecutionProvider", "SwiftShader", software=True)
    found = merged(runs.run(runs.row()), runs.run(runs.row(seconds=20.0, threads=None), part=soft))
    ((_model, (chart,)),) = mergecharts.speed_panels(found)
    assert "SwiftShader" not in chart and chart.count('class="mark') == 1
    assert mergecharts.bandwidth_chart(found).count('class="mark') == 1
    only = merged(runs.run(runs.row(), part=soft))
    assert list(mergecharts.speed_panels(only)) == [] and mergecharts.bandwidth_chart(only) == ""


def test_charts_place_what_was_measured() -> None:
    ((_model, charts),) = mergecharts.speed_panels(laptop())
    assert len(charts) == 2 and charts[0].count("<polyline") == 1 and charts[0].count('class="mark') == 4
    token, first = mergecharts.forecast_charts(laptop())
    marks = re.findall(r'points="|cx="', token)
    assert len(marks) == 2 + 2  # two forecasts, two bands
    assert "worst AMD Radeon 890M webgpu, smollm2-135m w4, tg4, -60 %" in token and "1 tests" in first


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 7, [0, 2, 4, 6]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert svg.Scale(low, high, 0, 100).ticks() == pytest.approx(ticks)


def test_ticks_of_powers() -> None:
    assert svg.Scale(1, 10, 0, 100, log=True).ticks() == pytest.approx([1, 2, 5, 10])
    assert svg.Scale(1, 1000, 0, 100, log=True).ticks() == pytest.approx([1, 10, 100, 1000])
    wide = svg.Scale(1, 100, 0, 100, log=True)
    assert wide(10) == pytest.approx(50) and svg.number(1500) == "1.5k" and svg.number(0.25) == "0.25"


def test_a_run_is_plain_json() -> None:
    run = runs.run(runs.row(promise=0.02))
    again = Run.from_json(json.loads(json.dumps(run.to_json())))
    assert again == run and again.to_json() == run.to_json()
