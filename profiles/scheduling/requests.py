"""Requests to language models within a run: admission by memory, their steps, the way of their caches; model setup."""

from __future__ import annotations

from math import ceil

from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.steps import Steps
from rlkit.profiles.scheduling.workload import CONTEXT, Llm, Workload
from rlkit.runtime.jobs import Job, Kind, Option

__all__ = ["Request", "Requests", "Setups"]


class Request(Job):
    """A request under way."""

    __slots__ = ("bucket", "cache_nbytes", "llm", "output", "past", "prompt", "times")

    llm: Llm
    past: int  # tokens in its cache
    bucket: int  # of its present options
    prompt: int
    output: int
    cache_nbytes: int
    times: list[int]  # of its tokens


class Setups:
    """By stream and unit: ns until its model could begin there; streams of one model share one list."""

    __slots__ = ("_last", "_streams", "lists")

    def __init__(self, workload: Workload) -> None:
        self._streams = workload.setting.streams
        units = len(workload.setting.units)
        models: dict[str, list[int]] = {}
        for stream in self._streams:
            models.setdefault(stream.model or stream.name, list(stream.load_ns) or [0] * units)
        self.lists = [models[stream.model or stream.name] for stream in self._streams]
        self._last = [-1] * units

    def switch(self, index: int, stream: int) -> None:
        """A stream's model runs on a unit now: it is loaded, and the one before would have to be switched to."""
        before = self._last[index]
        self._last[index] = stream
        if before >= 0 and self.lists[before] is not self.lists[stream]:
            switch = self._streams[before].switch_ns
            self.lists[before][index] = switch[index] if switch else 0
        self.lists[stream][index] = 0

    def of(self, request: Request) -> list[int]:
        """What a request's next step costs on top: its model's setup, and on another unit the way of its cache."""
        shared, llm, home = self.lists[request.stream], request.llm, request.home
        if home < 0 or not (llm.move_ns or llm.move_token_ns):
            return shared
        setup = list(shared)
        for index in range(len(setup)):
            if index != home:
                setup[index] += llm.move_ns[home][index] if llm.move_ns else 0
                setup[index] += ceil(llm.move_token_ns[home][index] * request.past) if llm.move_token_ns else 0
        return setup


class Requests:
    """Requests that wait for a place, and those under way; `ready` is the engine's list in order of arrival."""

    __slots__ = ("_active", "_free", "_ready", "_record", "_setups", "_steps", "_waiting", "_workload")

    def __init__(self, workload: Workload, record: Run, ready: list[Job], setups: Setups) -> None:
        setting = workload.setting
        self._workload, self._record, self._ready, self._setups = workload, record, ready, setups
        self._steps = {i: Steps(s, len(setting.units)) for i, s in enumerate(setting.streams) if isinstance(s, Llm)}
        self._waiting: list[int] = []
        self._active = [0] * len(setting.streams)
        self._free = setting.free_nbytes

    def submit(self, number: int, now: int) -> None:
        """It could run from now on."""
        self._record.submitted[number] = now
        self._waiting.append(number)
        self._admit()

    def advance(self, request: Request, option: Option, now: int) -> bool:
        """A chunk or a token is done; what comes next is ready, or the request is over, which True says."""
        request.past += option.units
        if request.kind is Kind.PREFILL and request.past < request.prompt:
            choice = self._steps[request.stream].prefill(request.past, request.prompt)
            request.options, request.remaining = choice
        else:
            times = request.times
            made = 1 if request.kind is Kind.PREFILL else option.units
            times += [now] * min(made, request.output - len(times))
            if len(times) >= request.output:
                self.leave(request)
                return True
            request.deadline = now + request.llm.tpot
            bucket = request.past // CONTEXT
            if request.kind is Kind.PREFILL or bucket != request.bucket:
                request.kind, request.bucket = Kind.DECODE, bucket
                request.options, request.remaining = self._steps[request.stream].decode(request.past)
        request.setup = self._setups.of(request)
        self._insert(request)
        return False

    def leave(self, request: Request) -> None:
        """It is over: its memory and its place are free."""
        if self._free is not None:
            self._free += request.cache_nbytes
        self._active[request.stream] -= 1
        self._admit()

    def switched(self) -> None:
        """Setups have changed: so have those that hold a cache's way as well."""
        for job in self._ready:
            if type(job) is Request:
                job.setup = self._setups.of(job)

    def _admit(self) -> None:
        """Let requests in by order of arrival: past those whose stream has no place, not past one that lacks memory."""
        for number in list(self._waiting):
            place = self._workload.streams[number]
            llm = self._workload.setting.streams[place]
            assert isinstance(llm, Llm)
            if llm.concurrent and self._active[place] >= llm.concurrent:
                continue
            nbytes = (self._workload.prompts[number] + self._workload.outputs[number]) * llm.kv_nbytes
            if self._free is not None:
                if nbytes > self._free:
                    return
                self._free -= nbytes
            self._waiting.remove(number)
            self._active[place] += 1
            self._insert(self._made(number, place, llm, nbytes))

    def _made(self, number: int, place: int, llm: Llm, nbytes: int) -> Request:
        workload, arrival = self._workload, self._record.submitted[number]
        prompt = workload.prompts[number]
        options, remaining = self._steps[place].prefill(0, prompt)
        request = Request(
            number,
            place,
            llm.name,
            Kind.PREFILL,
            workload.indices[number],
            arrival,
            arrival + llm.ttft,
            0,
            llm.priority,
            llm.droppable,
            options,
            remaining,
            self._setups.lists[place],
        )
        request.llm, request.past, request.bucket = llm, 0, 0
        request.prompt, request.output, request.cache_nbytes = prompt, workload.outputs[number], nbytes
        request.times = self._record.tokens[number] = []
        return request

    def _insert(self, job: Job) -> None:
        """Back into the order of arrival; requests are among the oldest, so from the front."""
        ready, arrival, number = self._ready, job.arrival, job.number
        place = 0
        for other in ready:
            if other.arrival > arrival or (other.arrival == arrival and other.number > number):
                break
            place += 1
        ready.insert(place, job)
