"""Devices that a bundle can run on here, and the explicit choice of one: never another than the one asked for.

choose("auto", "webgpu") -> Choice(Device("webgpu", kind="gpu", ...), why="...")
choose("npu", "cpu")     -> ValueError: what is missing, and the command that changes it
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import psutil

from rlkit.runtime.gpus import Hardware
from rlkit.runtime.processor import cpu_name
from rlkit.runtime.providers import PROVIDERS, Provider, Standing, State, fitting, standing
from rlkit.runtime.surroundings import Surroundings, look

AUTO = "auto"
KINDS = {"cpu": "cpu", "gpu": "gpu", "igpu": "gpu", "npu": "npu"}
SOURCE = "onnxruntime.get_ep_devices"

# Targets of export/targets.py -> providers that run such a bundle, the best first; those after None only where they are
# asked for by name. CPU: the graph is made for that processor's kernels; other providers take it operator by operator.
# NPU: the folder as exported is for AMD's tool, and runs on the processor for a numerical check.
RUNS_ON: dict[str, tuple[str | None, ...]] = {
    "cpu": ("cpu", None, "webgpu", "cuda", "openvino"),
    "webgpu": ("webgpu", "cpu", None, "cuda"),
    "dml": ("dml", "cpu", None, "webgpu", "cuda"),
    "npu": ("ryzenai", "vitisai", "cpu"),
}
EVERYTHING: tuple[str | None, ...] = ("cpu", None, *(name for name in PROVIDERS if name != "cpu"))


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a provider. `name` is what --device takes, `provider` what genai's configuration does.

    The runtime opens a provider's first device; those after it are named webgpu:1 and so on, to be seen, not chosen.
    `memory_nbytes` is the device's own or what it shares, None where nobody tells. `source` says who offered it.
    """

    name: str
    kind: str  # cpu, gpu or npu
    provider: str
    vendor: str
    title: str
    memory_nbytes: int | None
    source: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A device and why it was taken, in words for a person."""

    device: Device
    why: str


def seen(around: Surroundings | None = None) -> tuple[Device, ...]:
    """Every device that is ready for use here, by the order of the runtime; the processor is always among them."""
    where = _around() if around is None else around
    found = []
    for provider in PROVIDERS.values():
        if standing(provider, where).state is State.READY:
            found += _devices(provider, where)
    return tuple(found)


def choose(asked: str, target: str, around: Surroundings | None = None) -> Choice:
    """The device for a bundle made for `target` (of rlkit.json; any other word: somebody else's bundle).

    `asked`: auto, a kind (cpu, gpu, npu) or a provider (webgpu, cuda, dml, ...). What was asked for or nothing: raises
    ValueError with the reason and the fix where it is not there or cannot run such a bundle. "cpu" looks at nothing.
    """
    word = asked.strip().lower()
    if word == "cpu":
        return Choice(processor(), "asked for" if target == "cpu" else f"asked for; the bundle is made for {target}")
    if word not in (AUTO, *KINDS, *PROVIDERS):
        offered = ", ".join([AUTO, "cpu", "gpu", "npu", *(name for name in PROVIDERS if name != "cpu")])
        raise ValueError(f"device {asked!r} does not exist; use {offered}")
    best = _best_first(target)
    if word == AUTO and best[0] == "cpu":
        made = f"bundles for {target} run fastest there" if target in RUNS_ON else "its target is not known"
        return Choice(processor(), f"the processor: {made}; name another device to have it")
    where = _around() if around is None else around
    return _automatic(best, target, where) if word == AUTO else _explicit(word, target, where)


def processor() -> Device:
    """The processor as a device."""
    return Device("cpu", "cpu", "cpu", "", cpu_name(), int(psutil.virtual_memory().total), "the system")


def target_of(manifest: dict[str, object]) -> str:
    """The target that a bundle's rlkit.json states; "unknown" for somebody else's bundle."""
    return str(manifest.get("target") or "unknown")


@functools.cache
def _around() -> Surroundings:
    return look()  # once: plug-ins are registered by it, and devices do not come and go


def _best_first(target: str) -> tuple[str, ...]:
    """Providers that auto may take."""
    names = RUNS_ON.get(target, EVERYTHING)
    stop = names.index(None) if None in names else len(names)
    return tuple(name for name in names[:stop] if name is not None)


def _automatic(names: tuple[str, ...], target: str, around: Surroundings) -> Choice:
    passed: list[str] = []
    for name in names:
        if name == "cpu":
            return Choice(processor(), f"the processor, as {'; '.join(passed)}")
        where = standing(PROVIDERS[name], around)
        if where.state is State.READY:
            device = _devices(where.provider, around)[0]
            return Choice(device, f"{device.title or name} by {name}: the best here for a bundle made for {target}")
        passed.append(f"{name} is {_reason(where)}")
    raise ValueError(f"nothing here runs a bundle made for {target}: {'; '.join(passed)}")


def _explicit(word: str, target: str, around: Surroundings) -> Choice:
    runs = tuple(name for name in RUNS_ON.get(target, EVERYTHING) if name is not None)
    kind = KINDS.get(word)
    wanted = [word] if kind is None else [name for name, one in PROVIDERS.items() if kind in one.kinds and name in runs]
    foreign = kind == "npu" and target in RUNS_ON and target != "npu"  # no NPU takes a graph made for something else
    if foreign or not wanted or wanted[0] not in runs:
        better = "export it again with --target" + (" npu" if kind == "npu" or _is_npu(word) else " igpu")
        raise ValueError(f"a bundle made for {target} does not run on {word}; {better}")
    missing: list[Standing] = []
    for name in sorted(wanted, key=runs.index):
        where = standing(PROVIDERS[name], around)
        if where.state is State.READY:
            suiting = [device for device in _devices(where.provider, around) if kind in (None, device.kind)]
            if suiting:
                return Choice(suiting[0], _asked_why(target, name))
            where = Standing(where.provider, State.NO_DEVICE, f"it has no {kind} here", f"needs {where.provider.needs}")
        missing.append(where)
    likely = min(missing, key=lambda one: (_order(one), runs.index(one.provider.name)))
    more = "" if len(missing) == 1 else f"; all {len(missing)} ways to one: rlkit doctor"
    remedy = f"; {likely.fix}" if likely.fix else "; use another device"
    raise ValueError(f"no {word} to run on: {likely.provider.name} is {_reason(likely)}{remedy}{more}")


def _asked_why(target: str, name: str) -> str:
    first = _best_first(target)[0]
    return "asked for" if name == first else f"asked for; bundles made for {target} are meant for {first}"


def _is_npu(name: str) -> bool:
    return name in PROVIDERS and PROVIDERS[name].kinds == ("npu",)


def _order(where: Standing) -> int:
    """Which of several missing providers is nearest to use."""
    order = (State.CLASH, State.BROKEN, State.NO_DEVICE, State.NOT_INSTALLED, State.ELSEWHERE)
    return order.index(where.state)


def _reason(where: Standing) -> str:
    return f"{where.state} ({where.why})"


def _of_system(provider: Provider, part: Hardware, index: int) -> Device:
    name = f"{provider.name}:{index}" if index else provider.name
    return Device(name, part.kind, provider.genai, part.vendor, part.title, part.memory_nbytes, "the system")


def _devices(provider: Provider, around: Surroundings) -> list[Device]:
    """The devices of one provider that is ready."""
    if provider.name == "cpu":
        return [processor()]
    offered = [one for one in around.seen if one.ep in provider.eps and one.kind in provider.kinds]
    if not offered:  # a built-in provider that lists none: what the system shows
        parts = enumerate(fitting(provider, around))
        return [_of_system(provider, part, index) for index, part in parts]
    names = [provider.name if index == 0 else f"{provider.name}:{index}" for index in range(len(offered))]
    made = []
    for name, one in zip(names, offered, strict=True):
        known = [part for part in around.hardware if part.kind == one.kind and part.vendor == one.vendor]
        memory = one.memory_nbytes or (known[0].memory_nbytes if len(known) == 1 else None)
        title = one.title or (known[0].title if len(known) == 1 else provider.title)
        made.append(Device(name, one.kind, provider.genai, one.vendor, title, memory, SOURCE))
    return made
