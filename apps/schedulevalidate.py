"""`rlkit schedule --validate`: a scenario simulated and run for real on this machine, with the same arrivals.

profile    frames and steps of each model by themselves, in processes of their own (what --profile has is kept)
rehearse   in the process of the run: each alone, after other models, and two beside each other; costs, demands
           and switches of the simulation are scaled by that (`profiles/scheduling/together.py`)
simulate   with the profile's costs as they are, and with the rehearsed ones
execute    the same workload under the same policy, by the clock
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rlkit.apps import console
from rlkit.profiles.bundle import read_size
from rlkit.profiles.scheduling import profile as profiles
from rlkit.profiles.scheduling import profilerun, validation
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.measured import Measured, Part, parts
from rlkit.profiles.scheduling.metrics import measure
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.profile import FRAME, LANGUAGE, Profile
from rlkit.profiles.scheduling.profilerun import Subject
from rlkit.profiles.scheduling.realrun import lengths, planned
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.scenario import Scenario
from rlkit.profiles.scheduling.settings import Prepared, prepare
from rlkit.profiles.scheduling.together import adjusted, fitted, said
from rlkit.profiles.scheduling.validation import Case, Validation
from rlkit.profiles.scheduling.workload import Llm, Setting, Stream
from rlkit.recover import cores
from rlkit.recover.atomic import write_json, write_text
from rlkit.recover.progress import Progress, Tell
from rlkit.runtime import rehearse
from rlkit.runtime.crew import Threads
from rlkit.runtime.dispatch import dispatch
from rlkit.runtime.jobs import Option
from rlkit.runtime.realsteps import Model, Place, RealWork, shared
from rlkit.runtime.rehearse import Act, Rehearsed

PROFILE_SECONDS, REHEARSAL_SECONDS = 1.0, 0.3
ROOM = 16  # tokens that profiles make after a prompt


@dataclass(frozen=True, slots=True)
class Ground:
    """What is there before anything runs: the scenario with the bundles' recipes, units, and costs as profiled."""

    scenario: Scenario
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    subjects: Mapping[str, Subject]
    profile: Profile
    prepared: Prepared

    def setting(self, seed: int) -> Setting:
        """A run's, with what moving a cache costs here."""
        setting = self.prepared.setting(seed)
        return replace(
            setting, streams=tuple(self._moving(each) if isinstance(each, Llm) else each for each in setting.streams)
        )

    def _moving(self, llm: Llm) -> Llm:
        """Units of one session hand a cache over at once; on another one the text is read again."""
        each = {phase.options[0].unit: phase.options[0].ns / phase.options[0].units for phase in reversed(llm.prefill)}
        count = range(len(self.places))

        def cost(one: int, other: int) -> float:
            same = shared(self.places[one]) and self.places[one].threads == self.places[other].threads
            return 0.0 if one == other or (same and shared(self.places[other])) else each.get(other, 0.0)

        return replace(llm, move_ns=(), move_token_ns=tuple(tuple(cost(a, b) for b in count) for a in count))


def validate(  # noqa: PLR0913, one parameter per option of the command
    scenario: Scenario,
    policies: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    bundles: Sequence[str] = (),
    profile: Path | None = None,
    units: str | None = None,
    json: bool = False,
    output: Path | None = None,
    traced: Path | None = None,
) -> None:
    """Validate and print; `output` and `traced` are written, too.

    `bundles`: [NAME=]FOLDER for language models, NAME=FILE.onnx for others; what is an asset needs none. `profile`: a
    file that is read, and gets what it lacks. `units`: NAME=PROVIDER:THREADS with commas, halves of the processors
    unless told. Raises FileNotFoundError or ValueError in one line, for a profile of another machine as well.
    """
    if not json:
        real = len(policies) * len(seeds) * scenario.duration / 1e9
        console.say(f"policies: {len(policies)}, seeds: {len(seeds)}; real runs take {console.duration(real)}")
    with console.progress(quiet=json) as tell:
        ground = prepared_ground(scenario, bundles, profile, units, tell)
        found, runs = validated(ground, policies, seeds, tell)
    if output is not None:
        write_json(output, found.to_json())
    if traced is not None:
        from json import dumps

        from rlkit.profiles.scheduling.traces import together

        write_text(traced, dumps(together(runs), separators=(",", ":")))
    if json:
        console.emit_json(found.to_json())
    else:
        _show(found)


def prepared_ground(
    scenario: Scenario, bundles: Sequence[str], path: Path | None, units: str | None, tell: Tell
) -> Ground:
    """Find the models, profile what is not profiled yet, and put the scenario on this machine."""
    chosen = parts(units.split(",")) if units is not None else _halves()
    where = _places(chosen)
    subjects = _subjects(scenario, bundles)
    recipes = {name: read_size(each.path).recipe for name, each in subjects.items() if each.kind == LANGUAGE}
    made = before = profiles.read(path) if path is not None and path.exists() else profilerun.fresh()
    for made in profilerun.profile(list(subjects.values()), _plan(scenario, chosen), before, tell=tell):
        if path is not None:
            profiles.write(path, made)
    mine = tuple(entry for entry in made.models if entry.recipe == recipes.get(entry.name, ""))
    made = replace(made, models=mine)
    requests = tuple(replace(each, recipes=(recipes[each.model],), qualities=(1.0,)) for each in scenario.requests)
    fitting = replace(scenario, requests=requests)
    return Ground(fitting, chosen, where, subjects, made, prepare(fitting, Measured(made, chosen)))


def _halves() -> tuple[Part, ...]:
    """Two units of the processor's threads, or one where there is one thread."""
    count = len(cores.allowed())
    if count < 2:
        return (Part("cpu", "cpu", 1),)
    return tuple(Part(f"cpu{index}", "cpu", count // 2) for index in range(2))


def _places(chosen: Sequence[Part]) -> tuple[Place, ...]:
    """Processors of its own for each unit of the processor; ValueError where there are too few."""
    allowed = cores.allowed()
    first = cores.one_per_core(allowed)
    free = [*first, *(number for number in allowed if number not in first)]
    wanted = sum(part.threads for part in chosen if part.provider == "cpu")
    if wanted > len(free):
        raise ValueError(f"--units take {wanted} processors, this process may use {len(free)}; ask for fewer threads")
    made = []
    for part in chosen:
        mine = [free.pop(0) for _ in range(part.threads)] if part.provider == "cpu" else []
        made.append(Place(part.provider, part.threads, tuple(mine)))
    return tuple(made)


def _subjects(scenario: Scenario, bundles: Sequence[str]) -> dict[str, Subject]:
    """The scenario's models by name, as files that are here."""
    language = {each.model: f"requests.{each.name}" for each in scenario.requests}
    keys = {**{each.model: f"streams.{each.name}" for each in scenario.streams}, **language}
    given: dict[str, str] = {}
    for text in bundles:
        name, equals, rest = text.partition("=")
        if equals and not Path(text).exists():
            if name not in keys:
                raise ValueError(f"--bundle {text}: {scenario.name} has no model {name!r}, but {', '.join(keys)}")
            given[name] = rest
        else:
            given |= dict.fromkeys(language, text)
    found = {}
    for model, key in keys.items():
        if model in language and model not in given:
            raise ValueError(f"{scenario.where}: {key}.model = {model!r} needs a bundle; give it: --bundle FOLDER")
        try:
            found[model] = profilerun.subject(f"{model}={given.get(model, model)}")
        except FileNotFoundError as error:
            said = str(error).removesuffix(", or pass --pull")
            raise FileNotFoundError(f"{scenario.where}: {key}.model: {said}") from error
        except ValueError as error:
            raise ValueError(f"{scenario.where}: {key}.model: {error}; give --bundle {model}=FILE") from error
        if (found[model].kind == LANGUAGE) != (model in language):
            what = "a bundle folder" if model in language else "an .onnx file"
            raise ValueError(f"{scenario.where}: {key}.model = {model!r}: {given[model]} is not {what}; give one")
    return found


def _plan(scenario: Scenario, chosen: Sequence[Part]) -> profilerun.Plan:
    """Sizes of chunks and the depth of prompts as the scenario has them."""
    where = tuple(dict.fromkeys((part.provider, part.threads) for part in chosen))
    sizes = tuple(dict.fromkeys(chunk for each in scenario.requests for chunk in each.chunks)) or (64,)
    longest = max((each.prompt.high + each.output.high - ROOM for each in scenario.requests), default=0)
    return profilerun.Plan(where, PROFILE_SECONDS, sizes, max(longest, *sizes))


def validated(
    ground: Ground,
    policies: Sequence[str],
    seeds: Sequence[int],
    tell: Tell,
    seconds: float | None = None,
    machine: Callable[[Ground], AbstractContextManager[tuple[Threads, RealWork]]] | None = None,
) -> tuple[Validation, list[Run]]:
    """Rehearse, then simulate and execute every policy and seed; also the runs, simulated and real in turn.

    `machine` opens the workers and the work; this one's threads and sessions unless told.
    """
    base = ground.prepared.base
    with (machine or _machine)(ground) as (crew, work):
        total = len(policies) * len(seeds)
        tell(Progress("rehearse", 0, 1))
        work.open(crew, [stream.options for stream in base.streams])
        heard = rehearse.rehearse(crew, _acts(ground, work), REHEARSAL_SECONDS if seconds is None else seconds)
        tell(Progress("rehearse", 1, 1))
        tuned = Tuned(ground, heard)
        cases, runs = list[Case](), list[Run]()
        for number, (policy, seed) in enumerate((policy, seed) for policy in policies for seed in seeds):
            tell(Progress("run", number, total, f"{policy}, seed {seed}"))
            plain = ground.setting(seed)
            load = expand(tuned.setting(plain), seed)
            simulated = run(load, POLICIES[policy]())
            plan, record = planned(load, f"{policy}, real")
            work.forget(lengths(load))
            crew.begin()
            effort = dispatch(plan, POLICIES[policy](), crew, work)
            before = measure(run(expand(plain, seed), POLICIES[policy]()))
            cases.append(Case(policy, seed, before, measure(simulated), measure(record), effort))
            runs += [simulated, record]
        tell(Progress("run", total, total))
    return tuned.validation(cases), runs


@contextlib.contextmanager
def _machine(ground: Ground) -> Iterator[tuple[Threads, RealWork]]:
    models = [_model(ground.subjects[stream.model]) for stream in ground.prepared.base.streams]
    work = RealWork(ground.places, models, {})
    try:
        with Threads([place.processors for place in ground.places]) as crew:
            yield crew, work
    finally:
        work.close()  # when no step runs any more


def _model(subject: Subject) -> Model:
    return Model(subject.path, subject.shapes, subject.values)


def _kind(model: str, phase: str, place: Place) -> str:
    return f"{model} {phase}, {place.provider}:{place.threads}"


def _acts(ground: Ground, work: RealWork) -> list[Act]:
    """Every kind of step on every unit that may run it; tokens before chunks, so that they follow another model."""
    frames: dict[tuple[str, int], Act] = {}
    steps: dict[tuple[str, int], Act] = {}
    for (stream, unit), frame in work.frames.items():
        kind = _kind(ground.prepared.base.streams[stream].model, FRAME, ground.places[unit])
        frames.setdefault((kind, unit), Act(kind, unit, frame.run))
    for (stream, unit), session in work.sessions.items():
        llm = ground.prepared.base.streams[stream]
        assert isinstance(llm, Llm)
        size = _first(llm, "chunk", unit).units
        context = min(entry.context for entry in ground.profile.models if entry.name == llm.model)
        room = min(rehearse.REPLY, context - rehearse.SHORT)
        for phase, step in (("token", rehearse.tokens(session, room)), ("chunk", rehearse.chunks(session, size))):
            kind = _kind(llm.model, phase, ground.places[unit])
            steps.setdefault((kind, unit), Act(kind, unit, step))
    return [*frames.values(), *steps.values()]


def _first(stream: Stream | Llm, phase: str, unit: int) -> Option:
    """A unit's step as asked, of a request with little context before it."""
    if isinstance(stream, Llm):
        phases = stream.prefill if phase == "chunk" else stream.decode
        return next(each.options[0] for each in phases if each.options[0].unit == unit)
    return next(option for option in stream.options if option.unit == unit)


class Tuned:
    """Costs as rehearsed: times scaled, demands fitted, switches as measured."""

    def __init__(self, ground: Ground, heard: Rehearsed) -> None:
        self._ground, self._heard = ground, heard
        self.demands = fitted(heard.pairs)
        self.slower: dict[tuple[str, int], float] = {}
        self.switch: dict[int, tuple[int, ...]] = {}
        for place, stream in enumerate(ground.prepared.base.streams):
            phases = ("chunk", "token") if isinstance(stream, Llm) else (FRAME,)
            switch = [0] * len(ground.places)
            for unit in sorted({option.unit for option in stream.options}):
                for phase in phases:
                    kind = _kind(stream.model, phase, ground.places[unit])
                    kept = heard.acts[kind, unit]
                    self.slower[kind, unit] = kept.alone / _first(stream, phase, unit).ns
                    switch[unit] = max(round(kept.after or 0.0), 0)  # the last phase's: of a token, it is least noise
            self.switch[place] = tuple(switch)

    def setting(self, plain: Setting) -> Setting:
        """A run's setting with these costs."""
        return adjusted(plain, partial(self._option, plain), self.switch)

    def _option(self, plain: Setting, place: int, option: Option) -> Option:
        stream = plain.streams[place]
        phase = (FRAME, "token", "chunk")[min(option.units, 2)]
        kind = _kind(stream.model, phase, self._ground.places[option.unit])
        ns = max(round(option.ns * self.slower[kind, option.unit]), 1)
        return replace(option, ns=ns, demand=self.demands.get(kind, option.demand))

    def validation(self, cases: Sequence[Case]) -> Validation:
        """The result, with what the costs rest on."""
        ground = self._ground
        return Validation(
            scenario=ground.scenario.name,
            duration=ground.scenario.duration,
            machine=ground.profile.machine,
            units=tuple(f"{part.name}={part.provider}:{part.threads}" for part in ground.parts),
            models={name: each.origin for name, each in ground.subjects.items()},
            cases=tuple(cases),
            rehearsed=self._heard,
            demands=self.demands,
            slower={f"{kind}, {ground.parts[unit].name}": value for (kind, unit), value in self.slower.items()},
            switch={stream.name: self.switch[place] for place, stream in enumerate(ground.prepared.base.streams)},
            notes=(*ground.prepared.notes, *ground.prepared.skipped),
        )


COLUMNS = ("policy", "stream or unit", "measure", "profile alone", "simulated", "real", "apart", "within")


def _show(found: Validation) -> None:
    slowed = _slowed(found)
    if slowed:
        console.table(
            ("step", "slowed most by", "times as long", "fitted"), slowed, title="Steps beside another unit's"
        )
    title = f"{found.scenario}, {found.duration / 1e9:g} s on {', '.join(found.units)}: simulated and real"
    console.table(COLUMNS, [_cells(row) for row in validation.rows(found)], title=title)
    for line in _findings(found):
        console.emit(f"- {line}")


def _slowed(found: Validation) -> list[tuple[str, ...]]:
    """Every kind of step with the one that slows it most."""
    most: dict[str, tuple[float, float, str]] = {}
    for pair in found.rehearsed.pairs:
        one, other = said(found.demands, pair)
        for kind, by, times, fit in (
            (pair.one, pair.other, pair.one_slower, one),
            (pair.other, pair.one, pair.other_slower, other),
        ):
            most[kind] = max(most.get(kind, (0.0, 0.0, "")), (times, fit, by))
    return [(kind, by, f"{times:.2f}", f"{fit:.2f}") for kind, (times, fit, by) in most.items()]


def _cells(row: validation.Row) -> tuple[str, ...]:
    figures = [
        "" if value is None else f"{value:.1f}{row.unit and f' {row.unit}'}"
        for value in (row.plain, row.simulated, row.real)
    ]
    apart = "" if row.apart is None else f"{row.apart:+.1f} points" if row.unit == "%" else f"{100 * row.apart:+.1f} %"
    bar = "" if row.within is None else "yes" if row.within else "no"
    return (row.policy, row.stream, row.measure, *figures, apart, bar)


def _findings(found: Validation) -> list[str]:
    decisions = sum(case.effort.decisions for case in found.cases)
    spent = sum(case.effort.ns for case in found.cases)
    longest = max(case.effort.longest for case in found.cases)
    bars = f"violation rates within {validation.MOST_POINTS:g} points and TTFT within {100 * validation.MOST_TTFT:g} %"
    worst = max(found.slower.items(), key=lambda item: abs(item[1] - 1), default=("", 1.0))
    return [
        f"{bars}: {'yes' if validation.met(found) else 'no'}",
        f"{decisions:,} decisions took {spent / max(decisions, 1) / 1e3:.0f} us each, the longest "
        f"{longest / 1e6:.2f} ms; the simulator counts them as nothing",
        f"farthest from its profile when rehearsed alone: {worst[0]}, {worst[1]:.2f} times as long",
        *found.notes,
    ]
