"""Times generations of a bundle by whatever runtime the interpreter has, rlkit there or not.

    python -I elsewhere.py onnx PROVIDER THREADS BUNDLE     steps of the graph in plain onnxruntime, cache on the device
    python -I elsewhere.py genai PROVIDER THREADS BUNDLE    onnxruntime-genai, as the folder's configuration says
    python -I elsewhere.py facts                            one line: versions and providers of what is installed

It speaks as `rlkit.profiles.worker` does: one JSON object per line, first {"ready", "threads", "provider"}, then an
answer to each request; {"error"} says what went wrong. A provider that cannot be had is an error, never another
provider's result. Nothing but numpy and the runtime is imported. THREADS 0 leaves the choice to the runtime.

The first token's time goes from handing over the prompt to choosing the likeliest token; each later one's is a step of
one token and a choice. What was in the cache before a prompt is kept between generations.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILL_TOKENS = 512  # appended at a time, so that filling a deep cache sets no peak of memory
SILENT = 4
PROVIDERS = {"cpu": "CPUExecutionProvider", "webgpu": "WebGpuExecutionProvider", "dml": "DmlExecutionProvider"}
KINDS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class Graph:
    """A bundle's graph in plain onnxruntime, its cache in one buffer for past and present on the device."""

    def __init__(self, bundle: Path, provider: str, threads: int) -> None:
        import onnxruntime as ort

        self.provider = provider
        self._config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
        self._decoder = self._config["model"]["decoder"]
        if not self._config["search"].get("past_present_share_buffer"):
            raise ValueError(f"{bundle.name} does not keep past and present in one buffer; export it with rlkit")
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise ValueError(f"onnxruntime {ort.__version__} here has no {wanted}")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, SILENT
        options.enable_mem_pattern = provider != "dml"  # DirectML asks for that
        for key, value in (self._decoder.get("session_options") or {}).items():
            if "." in key:
                options.add_session_config_entry(key, str(value))
        path = str(bundle / self._decoder["filename"])
        self._session = ort.InferenceSession(path, options, providers=[wanted], enable_fallback=0)
        if self._session.get_providers()[0] != wanted:
            raise ValueError(f"onnxruntime gave {self._session.get_providers()[0]} instead of {wanted}")
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._cache: dict[str, Any] = {}  # input's name -> a value of the runtime
        self._fill: list[int] = []
        self._room = 0
        self.threads = threads

    def generate(self, fill: list[int], prompt: list[int], new_tokens: int, room: int) -> Iterator[float]:
        """Seconds of each of `new_tokens`, the first from the start of `prompt`; `fill` is in the cache before."""
        self._prepare(fill, room)
        past, ids = len(fill), prompt
        for _ in range(new_tokens):
            began = time.perf_counter()
            token = self.step(ids, past)
            yield time.perf_counter() - began
            past, ids = past + len(ids), [token]

    def _prepare(self, fill: list[int], room: int) -> None:
        limit = int(self._config["model"]["context_length"])
        if room > limit:
            raise ValueError(f"a cache of {room} tokens exceeds the context of {limit}; ask for fewer")
        if room == self._room and fill == self._fill:
            return  # what came after it is written over
        self._cache = self._buffers(room)
        self._fill, self._room = fill, room
        for start in range(0, len(fill), FILL_TOKENS):
            self.step(fill[start : start + FILL_TOKENS], start)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """The names of each layer's cache: as it goes in, as it comes out."""
        inputs, outputs = self._decoder["inputs"], self._decoder["outputs"]
        for layer in range(self._decoder["num_hidden_layers"]):
            for part in ("key", "value"):
                name = inputs[f"past_{part}_names"] % layer
                if name in self._inputs:
                    yield name, outputs[f"present_{part}_names"] % layer

    def _buffers(self, room: int) -> dict[str, Any]:
        """Caches for `room` tokens. On a device the runtime itself makes them, as what a first step leaves there."""
        import onnxruntime as ort

        made = {}
        for name, _present in self._pairs():
            _, heads, _, size = self._inputs[name].shape  # names where the graph leaves them open
            heads = heads if isinstance(heads, int) else self._decoder["num_key_value_heads"]
            size = size if isinstance(size, int) else self._decoder["head_size"]
            zeros = np.zeros((1, heads, room, size), KINDS[self._inputs[name].type])
            made[name] = ort.OrtValue.ortvalue_from_numpy(zeros)
        if self.provider == "cpu":
            return made
        left = self._run([0], 0, made, {})
        return {name: left[present] for name, present in self._pairs()}

    def step(self, ids: list[int], past: int) -> int:
        """Append ids after `past` tokens and return the likeliest next one."""
        presents = {present: self._cache[name] for name, present in self._pairs()}
        found = self._run(ids, past, self._cache, presents)
        logits = found[self._decoder["outputs"].get("logits", "logits")].numpy()
        return int(np.argmax(logits[0, -1]))

    def _run(self, ids: list[int], past: int, cache: dict[str, Any], presents: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name; caches go where `presents` says, or stay on the device."""
        binding = self._session.io_binding()
        total = past + len(ids)
        given: dict[str, NDArray[Any]] = {
            "input_ids": np.asarray([ids]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        for name, array in given.items():
            if name in self._inputs:
                kind = np.int32 if self._inputs[name].type == "tensor(int32)" else np.int64
                binding.bind_cpu_input(name, np.ascontiguousarray(array, kind))
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        kept = {present for _name, present in self._pairs()}
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            if name in presents:
                binding.bind_ortvalue_output(name, presents[name])
            else:
                binding.bind_output(name, self.provider if name in kept else "cpu", 0)
        self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))


class Genai:
    """A folder in onnxruntime-genai, with the providers that its own configuration names."""

    def __init__(self, bundle: Path, provider: str, threads: int) -> None:
        import onnxruntime_genai as og

        self.provider, self.threads = provider, threads
        config = og.Config(str(bundle))
        named = _named_providers(bundle)
        if provider != "cpu" and provider.lower() not in named:
            raise ValueError(f"{bundle.name} names {', '.join(sorted(named)) or 'no provider'}, not {provider}")
        if threads:
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._generator: Any = None
        self._before: tuple[list[int], int] = ([], 0)

    def generate(self, fill: list[int], prompt: list[int], new_tokens: int, room: int) -> Iterator[float]:
        """As Graph.generate."""
        self._prepare(fill, room)
        began = time.perf_counter()
        self._generator.append_tokens(np.asarray([prompt], np.int32))
        for _ in range(new_tokens):
            self._generator.generate_next_token()
            now = time.perf_counter()
            yield now - began
            began = time.perf_counter()

    def _prepare(self, fill: list[int], room: int) -> None:
        import onnxruntime_genai as og

        if self._generator is not None and self._before == (fill, room):
            try:
                self._generator.rewind_to(len(fill))
                return
            except Exception:  # of whatever kind a provider has that keeps no cache to go back to
                self._generator = None
        self._generator = None  # its cache goes before another is made
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        self._generator, self._before = og.Generator(self._model, params), (fill, room)
        for start in range(0, len(fill), FILL_TOKENS):
            self._generator.append_tokens(np.asarray([fill[start : start + FILL_TOKENS]], np.int32))


def _named_providers(bundle: Path) -> set[str]:
    config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    options = (config["model"]["decoder"].get("session_options") or {}).get("provider_options") or []
    return {str(name).lower() for entry in options for name in entry}


def peak_nbytes() -> int | None:
    """The largest resident memory of this process so far; None where the system does not say. No libraries."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:"), None)
    if sys.platform != "win32":
        return None
    # PROCESS_MEMORY_COUNTERS: cb, PageFaultCount (DWORD), PeakWorkingSetSize (SIZE_T), and seven more sizes
    counters = (ctypes.c_size_t * 9)()
    ctypes.cast(counters, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(counters)
    kernel: Any = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    known = kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), counters, ctypes.sizeof(counters))
    return int(counters[1]) if known else None


def facts() -> dict[str, Any]:
    """Versions of the runtimes here, by the names they were installed under, and onnxruntime's providers."""
    names = {str(found.metadata["Name"]).lower(): found.version for found in distributions()}
    versions = {name: version for name, version in sorted(names.items()) if name.startswith("onnxruntime")}
    try:
        import onnxruntime as ort

        return {"versions": versions, "providers": ort.get_available_providers()}
    except ImportError as error:
        return {"versions": versions, "providers": [], "error": str(error)}


def main(argv: list[str]) -> int:
    """Answer on a pipe of its own: runtimes print where answers would go, so their lines go to standard error."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    if argv[0] == "facts":
        say(facts())
        return 0
    engine, provider, threads, bundle = argv
    try:
        about = Path(bundle), provider, int(threads)
        made = Genai(*about) if engine == "genai" else Graph(*about)
        say({"ready": True, "threads": made.threads, "provider": provider})
        for line in sys.stdin:
            asked = json.loads(line)
            if "prompt" in asked:
                seconds = made.generate(asked["fill"], asked["prompt"], asked["new_tokens"], asked["room"])
                say({"seconds": list(seconds)})
            else:
                say({"peak_nbytes": peak_nbytes()})
    except Exception as error:  # of any kind the runtime has: the other end says it
        say({"error": " ".join((str(error) or type(error).__name__).split())})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
