"""From a scenario and the costs of a device to a `Setting`, which the simulator runs; faults name file and key.

Weights are loaded before the run starts, once in each form in which units that may run a model store them; with
`overheads = "all"` the first step of a model on a unit waits for its weights, with "switch" and "all" the first step
after another model's waits for the switch. A request's cache moves between units of one memory by being read in one
form and written in the other, all at the speed of the shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlkit.profiles.scheduling.costs import Cost, Costs, FrameCost, LanguageCost
from rlkit.profiles.scheduling.scenario import Comings, Frames, Overheads, Process, Requests, Scenario
from rlkit.profiles.scheduling.workload import Arrivals, Lengths, Llm, Phase, Setting, Stream
from rlkit.recover import recipe as recipes
from rlkit.runtime.jobs import Option


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scenario on a device. `setting` gives one run's; `skipped` says what no unit, or not every one, can run."""

    base: Setting
    scenario: Scenario
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def setting(self, seed: int) -> Setting:
        """The setting whose bursts and turns are drawn with this seed; what else is random, `expand` draws."""
        drawn = {
            each.name: times(each, self.scenario.duration, np.random.Generator(np.random.PCG64((seed, place, 9))))
            for place, each in enumerate(self.scenario.requests)
            if each.arrivals.process in (Process.BURSTY, Process.TURNS)
        }
        streams = [
            replace(stream, arrivals=Arrivals("times", times=drawn[stream.name]))
            if isinstance(stream, Llm) and stream.name in drawn
            else stream
            for stream in self.base.streams
        ]
        return replace(self.base, streams=tuple(streams))


def prepare(scenario: Scenario, costs: Costs) -> Prepared:
    """Put a scenario on a device.

    Raises ValueError naming file and key: a model that is not known, or that no unit can run, a unit that the device
    does not have, a context that is too long, and memory over capacity.
    """
    costs, skipped = costs.having(scenario.models), list[str]()
    streams: list[Stream | Llm] = [_stream(scenario, each, costs, skipped) for each in scenario.streams]
    streams += [_llm(scenario, each, costs, skipped) for each in scenario.requests]
    _check_memory(scenario, costs, streams)
    names = tuple(unit.name for unit in costs.units)
    base = Setting(scenario.name, names, tuple(streams), scenario.duration, costs.memory_nbytes)
    return Prepared(base, scenario, tuple(dict.fromkeys(skipped)), costs.notes())


def times(each: Requests, duration: int, rng: np.random.Generator) -> tuple[int, ...]:
    """When the requests of bursts or turns come, within the duration, in order."""
    comings = each.arrivals
    made = _bursts(comings, duration, rng) if comings.process is Process.BURSTY else _turns(each, duration, rng)
    return tuple(sorted(made))


def _bursts(comings: Comings, duration: int, rng: np.random.Generator) -> Iterator[int]:
    at, burst = comings.offset + round(rng.exponential(comings.interval)), comings.burst or Lengths(1, 1)
    while at < duration:
        yield from (then for number in range(_draw(burst, rng)) if (then := at + number * comings.within) < duration)
        at += round(rng.exponential(comings.interval))


def _turns(each: Requests, duration: int, rng: np.random.Generator) -> Iterator[int]:
    """A turn, its answer at the pace of its targets, a pause, the next turn."""
    comings, output = each.arrivals, each.output
    answer = each.ttft + each.tpot * (output.median or (output.low + output.high) // 2)
    at = comings.offset
    while at < duration:
        yield at
        at += answer + round(comings.interval * float(np.exp(comings.sigma * rng.standard_normal())))


def _draw(lengths: Lengths, rng: np.random.Generator) -> int:
    if lengths.median is None:
        return int(rng.integers(lengths.low, lengths.high, endpoint=True))
    drawn = round(lengths.median * float(np.exp(lengths.sigma * rng.standard_normal())))
    return min(max(drawn, lengths.low), lengths.high)


def _units(scenario: Scenario, key: str, part: Frames | Requests, costs: Costs) -> tuple[tuple[int, str], ...]:
    """(index, name) of the units that a part of the scenario may use."""
    names = [unit.name for unit in costs.units]
    if not costs.known(part.model):
        known = ", ".join(costs.names()) or "none"
        raise ValueError(
            f"{scenario.where}: {key}.model = {part.model!r} is not known of {costs.name}; there is {known}"
        )
    wrong = [name for name in part.units if name not in names]
    if part.units and len(wrong) == len(part.units):
        have = ", ".join(names)
        raise ValueError(f"{scenario.where}: {key}.units = {list(part.units)}: {costs.name} has {have}")
    return tuple((names.index(name), name) for name in part.units or names if name in names)


def _stream(scenario: Scenario, part: Frames, costs: Costs, skipped: list[str]) -> Stream:
    key = f"streams.{part.name}"
    found: dict[int, FrameCost] = {}
    reasons = []
    for index, unit in _units(scenario, key, part, costs):
        try:
            found[index] = costs.frame(part.model, unit)
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        _refuse(scenario, key, part.model, reasons)
    skipped += reasons
    weights = _by_form(each.weights_nbytes for each in found.values())
    load, switch = _overheads(scenario, costs, {index: each.weights_nbytes for index, each in found.items()})
    return Stream(
        name=part.name,
        options=tuple(Option(index, *each.cost) for index, each in found.items()),
        period=part.interval,
        deadline=part.deadline,
        offset=part.offset,
        jitter=part.jitter,
        priority=part.priority,
        late=part.late,
        after=part.after,
        probability=part.probability,
        weights_nbytes=weights,
        load_ns=load,
        switch_ns=switch,
        count=part.count,
        model=part.model,
    )


def _llm(scenario: Scenario, part: Requests, costs: Costs, skipped: list[str]) -> Llm:
    key, tokens = f"requests.{part.name}", part.prompt.high + part.output.high
    _check_recipes(scenario, key, part)
    found: dict[tuple[int, int], LanguageCost] = {}
    reasons = []
    for index, unit in _units(scenario, key, part, costs):
        context = costs.context(part.model)
        if context is not None and tokens > context:
            why = f"up to {tokens} tokens, but the context of {part.model} is {context}"
            raise ValueError(f"{scenario.where}: {key}.prompt_tokens and output_tokens: {why}; ask for fewer")
        for place, recipe in enumerate(part.recipes):
            try:
                found[index, place] = costs.language(part.model, unit, recipe, part.chunks, tokens)
            except ValueError as error:
                reasons.append(str(error))
    if not found:
        _refuse(scenario, key, part.model, reasons)
    skipped += reasons
    kinds = [part.qualities, part.recipes, part.chunks]
    held: dict[int, int] = {}
    for (index, _place), each in found.items():
        held[index] = held.get(index, 0) + each.weights_nbytes
    load, switch = _overheads(scenario, costs, held)
    move, per_token = _moves(costs, {index: each.kv_nbytes for (index, _place), each in found.items()})
    coming = part.arrivals
    return Llm(
        name=part.name,
        prefill=tuple(_prefills(found, kinds)),
        decode=tuple(_decodes(found, kinds)),
        arrivals=_arrivals(coming),
        prompt=part.prompt,
        output=part.output,
        ttft=part.ttft,
        tpot=part.tpot,
        priority=part.priority,
        concurrent=part.concurrent,
        droppable=part.droppable,
        after=coming.stream,
        probability=coming.probability,
        weights_nbytes=sum(
            _by_form(each.weights_nbytes for (_, place), each in found.items() if place == one)
            for one in range(len(part.recipes))
        ),
        kv_nbytes=max(each.kv_nbytes for each in found.values()),
        load_ns=load,
        switch_ns=switch,
        move_ns=move,
        move_token_ns=per_token,
        model=part.model,
    )


def _arrivals(coming: Comings) -> Arrivals:
    """As the workload has them; what it has no word for is drawn later, by `Prepared.setting`."""
    if coming.process in (Process.POISSON, Process.PERIODIC):
        return Arrivals(str(coming.process), coming.interval, coming.offset)
    return Arrivals("times")


def _prefills(found: dict[tuple[int, int], LanguageCost], kinds: Sequence[Sequence[object]]) -> Iterator[Phase]:
    """Every unit, recipe and chunk size; a unit's first is the one as asked, or the nearest to it there."""
    qualities, recipe_names, chunks = kinds
    for (index, place), each in found.items():
        for number, chunk in enumerate(chunks):
            assert isinstance(chunk, int)
            parts = [str(recipe_names[place])] * (place > 0) + [f"chunk={chunk}"] * (number > 0)
            made = each.prefill[chunk]
            options = _options(made, index, ",".join(parts), qualities[place], chunk)
            least = tuple(min(one, cost.ns) for one, cost in zip(each.least, made, strict=True))
            yield Phase(options, least)


def _decodes(found: dict[tuple[int, int], LanguageCost], kinds: Sequence[Sequence[object]]) -> Iterator[Phase]:
    qualities, recipe_names, _chunks = kinds
    for (index, place), each in found.items():
        yield Phase(_options(each.decode, index, str(recipe_names[place]) * (place > 0), qualities[place], 1))


def _options(costs: Sequence[Cost], unit: int, variant: str, quality: object, units: int) -> tuple[Option, ...]:
    assert isinstance(quality, float)
    return tuple(Option(unit, *cost, variant=variant, quality=quality, units=units) for cost in costs)


def _by_form(nbytes: Iterator[int]) -> int:
    """Bytes of one model's weights in all forms: units that store as many bytes share a form."""
    return sum(set(nbytes))


def _overheads(scenario: Scenario, costs: Costs, held: dict[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """ns of the first use of a model, and of switching to it, by unit."""
    if scenario.overheads is Overheads.NONE:
        return (), ()
    switch = tuple(unit.switch_ns for unit in costs.units)
    if scenario.overheads is Overheads.SWITCH:
        return (), switch
    rates = [unit.load_bytes_per_s for unit in costs.units]
    return tuple(round(1e9 * held.get(index, 0) / rate) for index, rate in enumerate(rates)), switch


def _moves(costs: Costs, kv: dict[int, int]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """ns of handing a cache over, fixed and per token, from unit (row) to unit (column)."""
    count = len(costs.units)
    fixed = tuple(tuple(0 if a == b else costs.units[b].start_ns for b in range(count)) for a in range(count))
    each = tuple(
        tuple(0.0 if a == b else 1e9 * (kv.get(a, 0) + kv.get(b, 0)) / costs.bytes_per_s for b in range(count))
        for a in range(count)
    )
    return fixed, each


def _check_recipes(scenario: Scenario, key: str, part: Requests) -> None:
    for name in part.recipes:
        try:
            recipes.load(name)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{scenario.where}: {key}.recipes: {error}") from error


def _refuse(scenario: Scenario, key: str, model: str, reasons: Sequence[str]) -> None:
    why = "; ".join(dict.fromkeys(reasons))
    raise ValueError(f"{scenario.where}: {key}.model = {model!r}: no unit can run it: {why}")


def _check_memory(scenario: Scenario, costs: Costs, streams: Sequence[Stream | Llm]) -> None:
    """Weights of all models, and the longest request of each, one at a time, must fit."""
    if costs.memory_nbytes is None:
        return
    held: dict[str, int] = {}
    for stream in streams:
        held[stream.model] = max(held.get(stream.model, 0), stream.weights_nbytes)
    weights, limit = sum(held.values()), costs.memory_nbytes
    said = f"of {costs.name} ({limit / 1e9:.2f} GB)"
    if weights > limit:
        largest = max(streams, key=lambda stream: stream.weights_nbytes)
        key = f"{'requests' if isinstance(largest, Llm) else 'streams'}.{largest.name}.model"
        why = f"{largest.model} takes {largest.weights_nbytes / 1e9:.2f} of {weights / 1e9:.2f} GB of weights"
        raise ValueError(f"{scenario.where}: {key}: {why}, over the memory {said}; use smaller models or fewer units")
    for stream in streams:
        if isinstance(stream, Llm):
            cache = stream.kv_nbytes * (stream.prompt.high + stream.output.high)
            if weights + cache > limit:
                why = f"a cache of {cache / 1e9:.2f} GB beside {weights / 1e9:.2f} GB of weights is over the memory"
                raise ValueError(f"{scenario.where}: requests.{stream.name}.prompt_tokens: {why} {said}; ask for fewer")
