"""A report as tables, as markdown, and as one HTML page that needs nothing else: no script, no link, plots inside.

`tables` is what a terminal prints too. Unknown values are an empty cell, never 0.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from string import Template

from rlkit.profiles.divergence import Divergence
from rlkit.profiles.report import BundleResult, Report, findings
from rlkit.profiles.table import Table, escaped, markdown
from rlkit.profiles.timing import Timing, milliseconds
from rlkit.recover.atomic import write_json, write_text


def tables(report: Report) -> tuple[Table, ...]:
    """Everything countable in the report, as tables; empty ones are left out."""
    made = (_stages(report), _accuracy(report), _speed(report), _sizes(report))
    return tuple(table for table in made if table.rows)


def _stages(report: Report) -> Table:
    columns = ("stage", "KL, nats/token", "median", "p99", "same top token", "perplexity", "seconds")
    rows = [
        (stage.name, *_divergence_cells(stage.divergence, with_tail=True), f"{stage.seconds:.0f}")
        for stage in report.stages
    ]
    note = f"Against the original, on {report.held_out_text}; ± is the standard error over texts."
    return Table("Recovery, stage by stage", columns, tuple(rows), note)


def _accuracy(report: Report) -> Table:
    original = ("KL to original", "same top token", "perplexity")
    columns = ("bundle", "recipe", "bits/weight", *original, "KL to checkpoint", "same top token as checkpoint")
    rows = [
        (
            bundle.name,
            bundle.recipe,
            f"{bundle.bits_per_weight:.2f}",
            *_divergence_cells(bundle.divergence),
            *_divergence_cells(bundle.agreement)[:2],
        )
        for bundle in report.bundles
    ]
    note = f"Each exported file itself, on {report.held_out_text}. Scales, zero points and adapters count as bits."
    return Table("Accuracy of the exported bundles", columns, tuple(rows), note)


def _divergence_cells(found: Divergence | None, *, with_tail: bool = False) -> tuple[str, ...]:
    if found is None:
        return ("",) * (5 if with_tail else 3)
    tail = (f"{found.kl_median:.4f}", f"{found.kl_p99:.2f}") if with_tail else ()
    mean = f"{found.kl_mean:.4f} ± {found.kl_stderr:.4f}"
    return (mean, *tail, f"{100 * found.top1_agreement:.1f} %", f"{found.perplexity_other:.1f}")


def _speed(report: Report) -> Table:
    columns = ("bundle", "", *TIMING_COLUMNS)
    rows: list[tuple[str, ...]] = []
    for bundle in report.bundles:
        rows.append((bundle.name, "measured", *timing_cells(bundle.measurement)))
        rows.append(("", "forecast", *timing_cells(bundle.forecast)))
        rows.append(("", "difference", *_gap_cells(bundle)))
    if not rows:
        return Table("Speed", columns, ())
    work = report.bundles[0].measurement
    note = (
        f"{work.prompt_tokens} prompt and {work.new_tokens} new tokens; medians (10th to 90th percentile"
        f"{f' of {work.spread.repeats} rounds' if work.spread else ''}). The forecast is uncalibrated: each operator's "
        "larger bound, all efficiencies 1. GB/s is what was read per token over its time."
    )
    return Table("Speed, measured and forecast", columns, tuple(rows), note)


TIMING_COLUMNS = ("first token, ms", "per token, ms", "tokens/s", "with prompt", "MB/token", "GB/s", "peak MB")


def timing_cells(timing: Timing) -> tuple[str, ...]:
    """The cells of TIMING_COLUMNS."""
    spread = timing.spread
    ttft, tpot = milliseconds(timing.ttft_seconds), milliseconds(timing.tpot_seconds)
    if spread is not None:
        ttft += f" ({milliseconds(spread.ttft_p10_seconds)} to {milliseconds(spread.ttft_p90_seconds)})"
        tpot += f" ({milliseconds(spread.tpot_p10_seconds)} to {milliseconds(spread.tpot_p90_seconds)})"
    rate = timing.bytes_per_s
    moved = "" if timing.nbytes_per_token is None else f"{timing.nbytes_per_token / 1e6:.1f}"
    peak = "" if timing.peak_nbytes is None else f"{timing.peak_nbytes / 1e6:.0f}"
    speeds = (f"{timing.tokens_per_s:.1f}", f"{timing.end_to_end_tokens_per_s:.1f}")
    return (ttft, tpot, *speeds, moved, "" if rate is None else f"{rate / 1e9:.1f}", peak)


def _gap_cells(bundle: BundleResult) -> tuple[str, ...]:
    gap = bundle.forecast.minus(bundle.measurement)
    peaks = bundle.forecast.peak_nbytes, bundle.measurement.peak_nbytes
    peak = f"{peaks[0] / peaks[1] - 1:+.0%}" if peaks[0] is not None and peaks[1] else ""
    faster = bundle.forecast.tokens_per_s / bundle.measurement.tokens_per_s - 1
    return (f"{gap.ttft_relative:+.0%}", f"{gap.tpot_relative:+.0%}", f"{faster:+.0%}", "", "", "", peak)


def _sizes(report: Report) -> Table:
    kinds = list(dict.fromkeys(kind for bundle in report.bundles for kind in bundle.nbytes_by_kind))
    rows = [(kind, *(_megabytes(bundle.nbytes_by_kind.get(kind)) for bundle in report.bundles)) for kind in kinds]
    if rows:
        rows.append(("all", *(_megabytes(bundle.nbytes) for bundle in report.bundles)))
    return Table("MB by kind of tensor", ("kind", *(bundle.name for bundle in report.bundles)), tuple(rows))


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.2f}"


def machine_text(report: Report) -> str:
    """The machine in one line, with what was measured on it."""
    m = report.machine
    memory = f"{m.memory_nbytes / 2**30:.0f} GiB"
    rates = f"reads {m.read_bytes_per_s / 1e9:.1f} GB/s, {m.flops_per_s / 1e9:.0f} GFLOP/s in float32"
    return f"{m.cpu}, {m.cores} cores, {m.threads} threads used, {memory}, {m.system}; {m.source} {m.date}: {rates}"


def to_markdown(report: Report) -> str:
    """The report as markdown, without plots."""
    parts = [f"# {escaped(report.model)}", "\n".join(f"- {escaped(text)}" for text in findings(report))]
    for table in tables(report):
        lines = [f"## {table.title}", "", markdown(table)]
        parts.append("\n".join([*lines, "", table.note] if table.note else lines))
    if report.chat:
        said = (report.chat.prompt, report.chat.reply)
        quoted = "\n>\n".join("> " + escaped(text) for text in said)
        parts.append(f"## {escaped(report.chat.bundle)} speaks\n\n{quoted}")
    about = [machine_text(report), *report.provenance, _versions(report), f"{report.command}, {report.date}"]
    parts.append("## How this was made\n\n" + "\n".join(f"- {escaped(text)}" for text in about if text))
    return "\n\n".join(parts) + "\n"


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def to_html(report: Report) -> str:
    """The report as one self-contained page."""
    from rlkit.profiles.plots import svg_plots

    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    plots = svg_plots(report)
    chat = report.chat
    spoken = "" if chat is None else f"<h2>{_text(chat.bundle)} speaks</h2>{_turn('you', chat.prompt)}"
    return template.substitute(
        model=_text(report.model),
        subtitle=_text(f"{report.parameters / 1e6:.0f} million parameters · {report.date} · {report.machine.cpu}"),
        findings=_list(findings(report)),
        plots="".join(_plot(title, svg) for title, svg in plots.items()),
        tables="".join(_table(table) for table in tables(report)),
        chat=spoken if chat is None else spoken + _turn("model", chat.reply),
        about=_list([machine_text(report), *report.provenance, _versions(report)]),
        command=_text(report.command),
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items if item) + "</ul>"


def _plot(title: str, svg: str) -> str:
    return f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>"


def _turn(who: str, text: str) -> str:
    return f'<p class="turn {who}"><b>{who}</b> {_text(text)}</p>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(_html_row(row) for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>{_text(table.title)}</h2>{body}{note}</section>"


def _html_row(row: tuple[str, ...]) -> str:
    first, *others = row
    return f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in others) + "</tr>"


def write_report(folder: Path, report: Report) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, each complete or not at all."""
    data, page = folder / "report.json", folder / "report.html"
    write_json(data, report.to_json())
    write_text(page, to_html(report))
    return data, page
