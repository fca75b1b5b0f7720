"""A merged report as tables, as comma-separated numbers, and what its numbers say in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rlkit.profiles.bench import Kind
from rlkit.profiles.merged import Cell, Line, Machine, Merged
from rlkit.profiles.table import Table, csv_text
from rlkit.profiles.timing import milliseconds

MARK = "*"
NOTE = (
    "tokens/s, mean ± standard deviation of rounds; beside it in % the forecast's time over the measured one, less 1. "
    f"{MARK} the fastest of the row, and whoever is within its scatter."
)
PAIR = ("w4", "w4w2-gateup")


SCATTER = 0.1  # a standard deviation above this share of the mean is not the model's
FEW = 2  # machines that a terminal has room for by name


def tables(merged: Merged, *, narrow: bool = False) -> tuple[Table, ...]:
    """Speeds, bandwidth, machines, skips; empty ones are left out.

    `narrow`: for a terminal, where more than FEW machines go by letters that the table of machines explains.
    """
    letters = narrow and len(columns(merged)) > FEW
    made = (speeds(merged, letters=letters), bandwidths(merged, letters=letters), machines(merged, letters=letters))
    return tuple(table for table in (*made, skips(merged)) if table.rows)


def letter(place: int) -> str:
    """A, B, ..., Z, A2, ..."""
    return chr(ord("A") + place % 26) + (str(place // 26 + 1) if place >= 26 else "")


def columns(merged: Merged) -> tuple[str, ...]:
    """Labels of machines that measured anything."""
    have = {label for line in merged.lines for label in line.cells}
    return tuple(machine.label for machine in merged.machines if machine.label in have)


def _heads(merged: Merged, letters: bool) -> tuple[str, ...]:
    labels = columns(merged)
    return tuple(letter(place) for place in range(len(labels))) if letters else labels


def charted(merged: Merged) -> tuple[str, ...]:
    """Labels of machines that charts compare: those of `columns` without software drivers."""
    software = {machine.label for machine in merged.machines if machine.part.software}
    return tuple(label for label in columns(merged) if label not in software)


def speeds(merged: Merged, *, letters: bool = False) -> Table:
    """Every test a row, every machine a column, by its letter if asked."""
    labels = columns(merged)
    rows = [
        (line.model, line.recipe, line.test.name, *(_speed(line, label, short=letters) for label in labels))
        for line in merged.lines
    ]
    return Table("Speed", ("model", "recipe", "test", *_heads(merged, letters)), tuple(rows), NOTE)


def _speed(line: Line, label: str, *, short: bool) -> str:
    cell = line.cells.get(label)
    if cell is None:
        return ""
    if short:  # no spaces but one, as a narrow column breaks there
        error = "" if cell.error is None else f" {percent(cell.error).replace(' ', '')}"
        return f"{rate_text(cell).partition(' ')[0]}{error}{MARK if label in line.best else ''}"
    rate = rate_text(cell)
    error = "" if cell.error is None else f" ({percent(cell.error)})"
    return f"{rate}{error}{f' {MARK}' if label in line.best else ''}"


def rate_text(cell: Cell) -> str:
    """Tokens/s with as many digits as matter."""
    mean = cell.tokens_per_s.mean
    return cell.tokens_per_s.text(2 if mean < 10 else 1 if mean < 1000 else 0)


def percent(share: float) -> str:
    """A share as a signed percentage; what rounds to nothing has no minus."""
    return f"{round(100 * share):+d} %"


def bandwidths(merged: Merged, *, letters: bool = False) -> Table:
    """GB/s that decode reached, beside what a token reads."""
    labels = columns(merged)
    rows = []
    for line in merged.lines:
        if line.test.kind is not Kind.DECODE:
            continue
        moved = next((cell.nbytes_per_token for cell in line.cells.values() if cell.nbytes_per_token), None)
        cells = ("" if (c := line.cells.get(label)) is None else _giga(c.bytes_per_s) for label in labels)
        rows.append((line.model, line.recipe, line.test.name, "" if moved is None else f"{moved / 1e6:.1f}", *cells))
    note = "Weights and cache that a token reads, over its mean time."
    heads = ("model", "recipe", "test", "MB/token", *_heads(merged, letters))
    return Table("Bandwidth of decode, GB/s", heads, tuple(rows), note)


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def machines(merged: Merged, *, letters: bool = False) -> Table:
    """What each machine is, and what ran there."""
    labels = columns(merged)
    named = {label: f"{letter(place)}: {label}" if letters else label for place, label in enumerate(labels)}
    rows = [(named.get(each.label, each.label), *machine_facts(merged, each)) for each in merged.machines]
    names = ("processor", "cores", "memory", "system", "provider", "driver", "versions", "measured")
    return Table("Machines", ("machine", *names), tuple(rows))


def machine_facts(merged: Merged, machine: Machine) -> tuple[str, ...]:
    """Processor, cores, memory, system, provider, driver, versions, dates."""
    cells = cells_of(merged, machine.label)
    versions: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, version in cell.versions.items():
            versions.setdefault(name, {})[version] = None
    said = ", ".join(f"{name} {'/'.join(found)}" for name, found in sorted(versions.items()))
    dates = sorted({cell.date[:10] for cell in cells})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "nothing"
    host, part = machine.host, machine.part
    size = f"{host.memory_nbytes / 2**30:.0f} GiB"
    driver = "software" if part.software else part.driver
    return host.cpu, str(host.cores), size, host.system, part.provider, driver, said, when


def cells_of(merged: Merged, label: str) -> list[Cell]:
    """Everything one machine measured."""
    return [line.cells[label] for line in merged.lines if label in line.cells]


def skips(merged: Merged) -> Table:
    """What was not measured, and why."""
    rows = tuple((left.machine, left.what, left.reason) for left in merged.skips)
    return Table("Not measured", ("machine", "what", "why"), rows)


def findings(merged: Merged) -> tuple[str, ...]:
    """What the numbers say."""
    return (*_fastest(merged), *_gains(merged), *_forecasts(merged), *_scattered(merged))


def _fastest(merged: Merged) -> Iterator[str]:
    """Decode and prefill of the machine that is best in most shared tests against each other one."""
    labels = [machine.label for machine in merged.machines if not machine.part.software]
    for kind, what in ((Kind.DECODE, "decodes"), (Kind.PREFILL, "reads prompts")):
        lines = [line for line in merged.lines if line.test.kind is kind and len(line.cells) > 1]
        top = max(labels, key=lambda label: _standing(label, lines), default="")
        said = []
        for label in labels:
            shared = [line.cells for line in lines if label in line.cells and top in line.cells]
            if label == top or not shared:
                continue
            ratio = statistics.median(cells[top].tokens_per_s.mean / cells[label].tokens_per_s.mean for cells in shared)
            said.append(f"{ratio:.2f} times the speed of {label} ({_tests(len(shared))})")
        if said:
            yield f"{top} {what} at {'; '.join(said)}; medians over shared tests."


def _standing(label: str, lines: Sequence[Line]) -> tuple[int, float]:
    """In how many lines it is best, and how near it comes to the best of each, summed."""
    shares = 0.0
    for line in lines:
        if label in line.cells:
            rates = [cell.tokens_per_s.mean for cell in line.cells.values()]
            shares += line.cells[label].tokens_per_s.mean / max(rates)
    return sum(label in line.best for line in lines), shares


def _tests(count: int) -> str:
    return "1 test" if count == 1 else f"{count} tests"


def _gains(merged: Merged) -> Iterator[str]:
    """What 2-bit gate and up projections bring beside 4 bits, on each machine."""
    pairs: dict[str, list[tuple[float, str]]] = {}
    lines = {(line.model, line.recipe, line.test): line for line in merged.lines}
    for (model, recipe, test), base in lines.items():
        mixed = lines.get((model, PAIR[1], test))
        if recipe != PAIR[0] or mixed is None or test.kind is not Kind.DECODE:
            continue
        for label in base.cells:
            if label in mixed.cells:
                gain = mixed.cells[label].tokens_per_s.mean / base.cells[label].tokens_per_s.mean - 1
                pairs.setdefault(label, []).append((gain, f"{model}, {test.name}"))
    for label, gains in pairs.items():
        low, high = min(gains), max(gains)
        span = f"{percent(low[0])} ({low[1]})"
        span += f" to {percent(high[0])} ({high[1]})" if len(gains) > 1 else ""
        yield f"2-bit gate and up projections against {PAIR[0]} on {label}: decode {span}."


def _forecasts(merged: Merged) -> Iterator[str]:
    """How far forecasts were off, machine by machine."""
    said = []
    for machine in merged.machines:
        cells = cells_of(merged, machine.label)
        errors = [abs(cell.error) for cell in cells if cell.error is not None]
        labels = " and ".join(sorted({cell.forecast.label for cell in cells if cell.forecast is not None}))
        if errors:
            off = f"{100 * statistics.median(errors):.0f} %, {100 * max(errors):.0f} %"
            said.append(f"{machine.label} {off} ({_tests(len(errors))}, {labels})")
    if said:
        yield f"Forecasts were off by, median and worst: {'; '.join(said)}."


def _scattered(merged: Merged) -> Iterator[str]:
    """Machines that were not quiet while they were measured."""
    for machine in merged.machines:
        rates = [cell.tokens_per_s for cell in cells_of(merged, machine.label)]
        busy = sum(rate.std is not None and rate.std > SCATTER * rate.mean for rate in rates)
        if busy:
            said = f"the rounds of {busy} of {_tests(len(rates))} scatter by more than {100 * SCATTER:.0f} %"
            yield f"{machine.label}: {said}; something else was running, measure again on a quiet machine."


def to_csv(merged: Merged) -> str:
    """A line for every test of every machine, in SI units."""
    rows = [
        _numbers(machine, line) for line in merged.lines for machine in merged.machines if machine.label in line.cells
    ]
    return csv_text(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def _numbers(machine: Machine, line: Line) -> dict[str, object]:
    cell = line.cells[machine.label]
    decodes, rate, seconds = line.test.kind is Kind.DECODE, cell.tokens_per_s, cell.seconds
    return {
        "machine": machine.label,
        "cpu": machine.host.cpu,
        "family": machine.part.family,
        "device": machine.part.name,
        "driver": machine.part.driver,
        "software": machine.part.software,
        "threads": machine.threads,
        "model": line.model,
        "recipe": line.recipe,
        "test": line.test.name,
        "tokens": line.test.tokens,
        "depth": line.test.depth,
        "rounds": rate.count,
        "tokens_per_s": rate.mean,
        "tokens_per_s_std": rate.std,
        "ttft_seconds": None if decodes else seconds.p50,
        "token_p50_seconds": seconds.p50 if decodes else None,
        "token_p95_seconds": seconds.p95 if decodes else None,
        "nbytes_per_token": cell.nbytes_per_token,
        "bytes_per_s": cell.bytes_per_s,
        "peak_nbytes": cell.peak_nbytes,
        "forecast_seconds": cell.forecast and cell.forecast.seconds,
        "forecast_label": cell.forecast and cell.forecast.label,
        "forecast_error": cell.error,
        "best": machine.label in line.best,
        "weights": cell.weights,
        "date": cell.date,
        "versions": " ".join(f"{name}={version}" for name, version in sorted(cell.versions.items())),
        "file": cell.file,
    }


def cell_text(cell: Cell, kind: Kind) -> str:
    """Everything a cell knows, in one line, for those who ask."""
    what = "per token" if kind is Kind.DECODE else "to the first token"
    parts = [f"{milliseconds(cell.seconds.p50)} ms {what} (p50), {milliseconds(cell.seconds.p95)} ms (p95)"]
    if cell.forecast is not None:
        parts.append(f"forecast {milliseconds(cell.forecast.seconds)} ms, {cell.forecast.label}")
    if cell.bytes_per_s is not None and cell.nbytes_per_token is not None:
        parts.append(f"{cell.nbytes_per_token / 1e6:.1f} MB per token, {cell.bytes_per_s / 1e9:.1f} GB/s")
    if cell.peak_nbytes is not None:
        parts.append(f"peak {cell.peak_nbytes / 1e6:.0f} MB")
    return "; ".join([*parts, f"{cell.tokens_per_s.count} rounds", cell.weights, cell.date, cell.file])
