"""The scheduler held to its bars: speed of the simulator, policies on the shipped scenarios, distance to the oracle.

    python -m rlkit.apps.benchmarks.scheduling --suites speed,policies,oracle --seeds 5

speed      events per second of processor time on one core, by policy; wall time of 1,000 one-minute simulations of the
           gaming scenario on two processes, arrivals and metrics included; the five policies in turns
policies   every shipped scenario on forecasts of two devices: violation rates (mean over streams and seeds), the spread
           of the five beside the paper's, our policy against whichever of the five is best in each case
oracle     violations beyond the optimum on small random cases, which are searched exhaustively, and on short XRBench
           runs beyond the best schedule that a search found, which may not be the best there is

Speeds are of a machine that does nothing else. `--json` prints everything; the exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from rlkit.apps import console, scenariofiles
from rlkit.profiles import device as devices
from rlkit.profiles.scheduling import comparison, oracle, vary
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.comparison import OURS, PAPER
from rlkit.profiles.scheduling.costs import Forecast
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.farm import Task, farm, simulate
from rlkit.profiles.scheduling.metrics import Metrics, spread
from rlkit.profiles.scheduling.outcome import summarize
from rlkit.profiles.scheduling.policies import FIVE, POLICIES
from rlkit.profiles.scheduling.settings import Prepared, prepare
from rlkit.profiles.scheduling.workload import Setting, Stream, Workload
from rlkit.recover import cache
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell
from rlkit.runtime.jobs import Option

EVENTS_BAR = 300_000  # per second on one core
SIMULATIONS, SECONDS_BAR = 1000, 60.0  # of a minute each, on two cores
RATIO_BAR, POINTS_BAR = 0.7, 1.0  # our violations over the best of the five's; points above it in any case
ROUNDS = 3  # of a speed, of which the best counts
EQUAL = 1e-9  # rates that differ by less are the same
MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured."""

    scenarios: tuple[str, ...]
    devices: tuple[str, ...]
    seeds: int
    simulations: int
    cases: int
    workers: int


def speed(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Events per second by policy, and seconds of many simulations."""
    prepared = _prepared("gaming", wanted.devices[0])
    load = expand(prepared.setting(0), 0)
    rows: list[dict[str, Any]] = [_events(load, name) for name in (*FIVE, OURS)]
    slowest = min(row["events_per_s"] for row in rows if row["policy"] in FIVE)
    before = _children()
    began = time.monotonic()
    names = list(FIVE)
    tasks = [Task(prepared, number // len(names), names[number % len(names)]) for number in range(wanted.simulations)]
    with farm(wanted.workers) as farmed:
        simulate(farmed, tasks, "simulations", tell)
    seconds = time.monotonic() - began
    bar = SECONDS_BAR * wanted.simulations / SIMULATIONS
    many = {"simulations": wanted.simulations, "workers": wanted.workers, "seconds": seconds}
    return {
        "rows": rows,
        "many": {**many, "processor_seconds": _children() - before, "bar": bar},
        "bars": [
            _bar(
                f"events per second, the slowest of the five, at least {EVENTS_BAR:,}", slowest, slowest >= EVENTS_BAR
            ),
            _bar(
                f"seconds of {wanted.simulations:,} simulations of a minute, at most {bar:g}", seconds, seconds <= bar
            ),
        ],
    }


def _events(load: Workload, name: str) -> dict[str, Any]:
    """The best of some rounds, in processor time."""
    best, events = math.inf, 0
    for _ in range(ROUNDS):
        began = time.process_time()
        events = run(load, POLICIES[name]()).events
        best = min(best, time.process_time() - began)
    return {"policy": name, "events": events, "seconds": best, "events_per_s": events / best}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _bar(what: str, value: float, met: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "met": met}


def _prepared(name: str, device: str) -> Prepared:
    return prepare(scenariofiles.load(name), Forecast(devices.find(device)[0]))


def policies(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Violation rates of every policy in every case; spreads; ours against the best of the five."""
    cases, left_out = [], []
    for device in wanted.devices:
        for name in wanted.scenarios:
            try:
                cases.append((device, name, _prepared(name, device)))
            except ValueError as error:
                left_out.append(f"{name} on {device}: {error}")
    names = tuple(POLICIES)
    tasks = [Task(made, seed, name) for *_, made in cases for seed in range(wanted.seeds) for name in names]
    with farm(wanted.workers, folder=cache.cache_folder() / "schedules") as farmed:
        found = simulate(farmed, tasks, "policies", tell)
    rows = []
    each = wanted.seeds * len(names)
    for number, (device, scenario, case) in enumerate(cases):
        mine = found[number * each : (number + 1) * each]
        made = {name: summarize(mine[place :: len(names)]) for place, name in enumerate(names)}
        rates = {name: one.rate for name, one in made.items()}
        pooled = {name: one.pooled for name, one in made.items()}
        floor = _floor(case, [one.metrics for one in mine[:: len(names)]])
        row = {"device": device, "scenario": scenario, "unavoidable": floor, "rates": rates, "of_all": pooled}
        rows.append({**row, **_against(rates, floor)})
    return {"seeds": wanted.seeds, "rows": rows, "left_out": left_out, "reading": comparison.READING, **_overall(rows)}


def _floor(prepared: Prepared, runs: Sequence[Metrics]) -> float:
    """A violation rate that no schedule is below: what takes too long even alone. Mean over streams and runs."""
    found = []
    for one in runs:
        lost = oracle.unavoidable(expand(prepared.setting(one.seed), one.seed))
        targets = [stream.targets for stream in one.streams]
        found.append(statistics.fmean(count / of for count, of in zip(lost, targets, strict=True) if of))
    return statistics.fmean(found)


def _against(rates: Mapping[str, float], floor: float) -> dict[str, Any]:
    """The spread of the five, and ours against their best, in all and of what could be avoided."""
    made = spread({name: rates[name] for name in FIVE})
    ours = rates[OURS]
    ratio = ours / made.lowest if made.lowest else None
    figures = {"spread": made.relative, "spread_points": made.points, "best": made.best, "worst": made.worst}
    over = made.lowest - floor
    avoidable = max(ours - floor, 0.0) / over if over > EQUAL else None
    return {**figures, "ratio": ratio, "avoidable_ratio": avoidable, "points_above": 100 * (ours - made.lowest)}


def _overall(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over cases. Without violations there is no ratio, and no spread to speak of."""
    means = {name: statistics.fmean(row["rates"][name] for row in rows) for name in POLICIES}
    best = statistics.fmean(min(row["rates"][name] for name in FIVE) for row in rows)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    avoidable = [row["avoidable_ratio"] for row in rows if row["avoidable_ratio"] is not None]
    differing = [row for row in rows if row["rates"][row["worst"]] > 0]
    worst = max(rows, key=lambda row: row["points_above"])
    where = f"{worst['scenario']}, {worst['device']}"
    ratio = statistics.fmean(ratios) if ratios else 0.0
    return {
        "means": means,
        "best_of_five": best,
        "spread": statistics.fmean(row["spread"] for row in differing) if differing else 0.0,
        "spread_points": statistics.fmean(row["spread_points"] for row in rows),
        "spread_of_means": spread({name: means[name] for name in FIVE}).relative,
        "paper_spread": PAPER,
        "ratio_of_means": means[OURS] / best if best else None,
        "avoidable_ratio": statistics.fmean(avoidable) if avoidable else None,
        "avoidable_cases": len(avoidable),
        "bars": [
            _bar(
                f"{OURS} / best of the five, mean of {len(ratios)} cases, at most {RATIO_BAR}",
                ratio,
                ratio <= RATIO_BAR,
            ),
            _bar(
                f"points above the best of the five at worst ({where}), at most {POINTS_BAR:g}",
                worst["points_above"],
                worst["points_above"] <= POINTS_BAR,
            ),
        ],
    }


def beyond_oracle(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Violations of every policy beyond the best schedule known."""
    rows = []
    for name, loads, bound in (
        ("small random cases, exhaustive", list(_small(wanted.cases)), oracle.exhaustive),
        ("XRBench, 0.35 s, search", list(_short(wanted)), oracle.search),
    ):
        bounds = [bound(load) for load in loads]
        targets = sum(len(load) for load in loads)
        least = sum(one.violations for one in bounds)
        row = {"cases": name, "count": len(loads), "proven": sum(one.proven for one in bounds)}
        totals = {
            policy: sum(oracle.violations(run(load, make())) for load in loads) for policy, make in POLICIES.items()
        }
        rows.append({**row, "targets": targets, "oracle": least, "violations": totals})
    return {"rows": rows, "bars": []}


def _small(count: int) -> Iterator[Workload]:
    """Two or three streams of up to three frames on two units that are not equal, tight."""
    for seed in range(count):
        rng = Random(seed)
        streams = []
        for place in range(rng.choice((2, 3))):
            period = rng.randint(8, 20) * MS
            work = rng.randint(2, 9) * MS
            options = (Option(0, work), Option(1, round(work * rng.uniform(0.5, 2.5))))
            deadline = round(period * rng.uniform(0.5, 1.0))
            offset = rng.randint(0, 5) * MS
            streams.append(Stream(f"s{place}", options, period, deadline, offset=offset, count=3))
        yield expand(Setting("small", ("a", "b"), tuple(streams), 60 * MS), seed)


def _short(wanted: Wanted) -> Iterator[Workload]:
    for name in wanted.scenarios:
        if name.startswith("xrbench-"):
            scenario = vary.lasting(scenariofiles.load(name), 0.35)
            yield expand(prepare(scenario, Forecast(devices.find(wanted.devices[0])[0])).setting(0), 0)


SUITES: dict[str, Callable[[Wanted, Tell], dict[str, Any]]] = {
    "speed": speed,
    "policies": policies,
    "oracle": beyond_oracle,
}


def main(  # noqa: PLR0913, one parameter per option of the command
    suites: Annotated[str, typer.Option(help="With commas between.")] = ",".join(SUITES),
    device: Annotated[str, typer.Option("--devices", help="Registered devices, with commas between.")] = "hx370,max395",
    scenarios: Annotated[str, typer.Option(help="all, or names with commas between.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Of each case of the policies.")] = 5,
    simulations: Annotated[int, typer.Option(min=1, help="Of the speed's second bar.")] = SIMULATIONS,
    cases: Annotated[int, typer.Option(min=1, help="Small ones of the oracle.")] = 40,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Hold the scheduler to its bars; the exit code is 1 if one is missed."""
    names = suites.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {', '.join(SUITES)}")
    shipped = scenariofiles.names() if scenarios == "all" else tuple(scenarios.split(","))
    wanted = Wanted(shipped, tuple(device.split(",")), seeds, simulations, cases, workers)
    found: dict[str, Any] = {"schema_version": 1}
    with console.progress(quiet=json) as tell:
        for name in names:
            found[name] = SUITES[name](wanted, tell)
    if output is not None:
        write_json(output, found)
    if json:
        console.emit_json(found)
    else:
        for name in names:
            SHOWN[name](found[name])
            for bar in found[name]["bars"]:
                console.emit(f"{bar['what']}: {bar['value']:,.4g}, {'met' if bar['met'] else 'NOT MET'}")
    if not all(bar["met"] for name in names for bar in found[name]["bars"]):
        raise typer.Exit(1)


def _show_speed(found: dict[str, Any]) -> None:
    rows = [
        (row["policy"], f"{row['events']:,}", f"{row['seconds']:.3f}", f"{row['events_per_s']:,.0f}")
        for row in found["rows"]
    ]
    console.table(("policy", "events", "seconds", "events/s"), rows, title="A minute of gaming on one core")
    many = found["many"]
    console.emit(
        f"{many['simulations']:,} simulations in {many['workers']} processes: {many['seconds']:.1f} s, "
        f"{many['processor_seconds']:.1f} s of processors"
    )


def _show_policies(found: dict[str, Any]) -> None:
    columns = ("case", *(SHORT.get(name, name) for name in POLICIES), "spread, %", "ratio", "points")
    rows = [
        (
            f"{row['scenario'].removeprefix('xrbench-')} {row['device']}",
            *(f"{100 * row['rates'][name]:.1f}" for name in POLICIES),
            f"{100 * row['spread']:.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['points_above']:+.1f}",
        )
        for row in found["rows"]
    ]
    means = (f"{100 * found['means'][name]:.1f}" for name in POLICIES)
    rows.append(("mean", *means, f"{100 * found['spread']:.0f}", "", ""))
    title = f"Violated, %: mean over streams and {found['seeds']} seeds; ratio and points: {OURS}, best of the five"
    console.table(columns, rows, title=title)
    of_means = f"of the means {100 * found['spread_of_means']:.1f} %; {found['spread_points']:.1f} points"
    said = (
        f"spread of the five: {100 * found['spread']:.1f} % of the highest, mean of cases with violations; {of_means}"
    )
    console.emit(f"{said}; the paper's {100 * PAPER:.1f} %")
    console.emit(found["reading"])
    if found["ratio_of_means"] is not None:
        console.emit(f"{OURS} / best of the five, of mean rates: {found['ratio_of_means']:.2f}")
    if found["avoidable_ratio"] is not None:
        cases = f"mean of {found['avoidable_cases']} cases in which the best of the five misses something avoidable"
        console.emit(
            f"{OURS} / best of the five, above what no schedule meets: {found['avoidable_ratio']:.2f}, {cases}"
        )
    floors = [
        f"{row['scenario']} {row['device']} {100 * row['unavoidable']:.1f}"
        for row in found["rows"]
        if row["unavoidable"]
    ]
    console.emit(f"what no schedule meets, %: {', '.join(floors) or 'none known'}")
    for line in found["left_out"]:
        console.emit(f"left out: {line}")


SHORT = {"greedy-latency": "greedy", "hetero-eft": "eft", "round-robin": "rr", "rate-monotonic": "rm", OURS: "ours"}


def _show_oracle(found: dict[str, Any]) -> None:
    columns = ("cases", "count", "proven", "targets", "oracle", *(SHORT.get(name, name) for name in POLICIES))
    rows = [
        (
            row["cases"],
            row["count"],
            row["proven"],
            row["targets"],
            row["oracle"],
            *(f"+{row['violations'][name] - row['oracle']}" for name in POLICIES),
        )
        for row in found["rows"]
    ]
    console.table(columns, rows, title="Violations: the best schedule known, and each policy's beyond it")


SHOWN: dict[str, Callable[[dict[str, Any]], None]] = {
    "speed": _show_speed,
    "policies": _show_policies,
    "oracle": _show_oracle,
}

if __name__ == "__main__":
    typer.run(main)
