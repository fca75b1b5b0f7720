"""The part of onnxruntime-genai that computes, called by its C interface, so that other threads run meanwhile.

The library's own Python module keeps the interpreter to itself during a pass over the model: a server could neither
send a token nor accept a request until the next one is done. Names and behaviour are those of that module. What goes
wrong raises RuntimeError with the library's words.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT32 = 1  # OgaElementType_float32
LIBRARIES = {"win32": "onnxruntime-genai.dll", "darwin": "libonnxruntime-genai.dylib"}
INTS = POINTER(c_int32)
OUT = POINTER(c_void_p)
# Functions that return an error or nothing, by the types they take (ort_genai_c.h).
CHECKED: dict[str, tuple[Any, ...]] = {
    "OgaCreateConfig": (c_char_p, OUT),
    "OgaConfigOverlay": (c_void_p, c_char_p),
    "OgaConfigClearProviders": (c_void_p,),
    "OgaConfigAppendProvider": (c_void_p, c_char_p),
    "OgaCreateModelFromConfig": (c_void_p, OUT),
    "OgaCreateGeneratorParams": (c_void_p, OUT),
    "OgaGeneratorParamsSetSearchNumber": (c_void_p, c_char_p, c_double),
    "OgaGeneratorParamsSetSearchBool": (c_void_p, c_char_p, c_bool),
    "OgaGeneratorParamsSetGuidance": (c_void_p, c_char_p, c_char_p, c_bool),
    "OgaCreateGenerator": (c_void_p, c_void_p, OUT),
    "OgaGenerator_AppendTokens": (c_void_p, INTS, c_size_t),
    "OgaGenerator_GenerateNextToken": (c_void_p,),
    "OgaGenerator_GetNextTokens": (c_void_p, POINTER(INTS), POINTER(c_size_t)),
    "OgaGenerator_RewindTo": (c_void_p, c_size_t),
    "OgaGenerator_GetLogits": (c_void_p, OUT),
    "OgaGenerator_SetLogits": (c_void_p, c_void_p),
    "OgaCreateTensorFromBuffer": (c_void_p, POINTER(c_int64), c_size_t, c_int, OUT),
    "OgaTensorGetShapeRank": (c_void_p, POINTER(c_size_t)),
    "OgaTensorGetShape": (c_void_p, POINTER(c_int64), c_size_t),
    "OgaTensorGetData": (c_void_p, OUT),
    "OgaCreateAdapters": (c_void_p, OUT),
    "OgaLoadAdapter": (c_void_p, c_char_p, c_char_p),
    "OgaUnloadAdapter": (c_void_p, c_char_p),
    "OgaSetActiveAdapter": (c_void_p, c_void_p, c_char_p),
}
PLAIN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "OgaResultGetError": (c_char_p, (c_void_p,)),
    "OgaGenerator_IsDone": (c_bool, (c_void_p,)),
    "OgaGenerator_GetSequenceCount": (c_size_t, (c_void_p, c_size_t)),
    "OgaGenerator_GetSequenceData": (INTS, (c_void_p, c_size_t)),
}


@functools.cache
def _library() -> Any:
    import onnxruntime_genai as og  # finds the libraries that this one needs, and shuts it down at the end

    og.disable_telemetry_events()  # nothing about the model or its use leaves this machine
    library = ctypes.CDLL(str(Path(og.__file__).parent / LIBRARIES.get(sys.platform, "libonnxruntime-genai.so")))
    for name, takes in CHECKED.items():
        function = getattr(library, name)
        function.argtypes, function.restype = takes, c_void_p
    for name, (gives, takes) in PLAIN.items():
        function = getattr(library, name)
        function.argtypes, function.restype = takes, gives
    for name in ("Result", "Config", "Model", "GeneratorParams", "Generator", "Tensor", "Adapters"):
        function = getattr(library, f"OgaDestroy{name}")
        function.argtypes, function.restype = (c_void_p,), None
    return library


def _call(name: str, *arguments: Any) -> None:
    """Call a function of CHECKED; RuntimeError with what it says went wrong."""
    library = _library()
    failed = getattr(library, name)(*arguments)
    if failed:
        said = library.OgaResultGetError(failed).decode(errors="replace")
        library.OgaDestroyResult(failed)
        raise RuntimeError(said)


class _Owned:
    """An object of the library, destroyed with the last reference to it, or before the process ends."""

    def __init__(self, kind: str, create: str, *arguments: Any) -> None:
        made = c_void_p()
        _call(create, *arguments, byref(made))
        self.pointer = made
        self._end = weakref.finalize(self, getattr(_library(), f"OgaDestroy{kind}"), made)


class Config(_Owned):
    """The genai_config.json of a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__("Config", "OgaCreateConfig", folder.encode())

    def overlay(self, settings: str) -> None:
        """Lay JSON over it."""
        _call("OgaConfigOverlay", self.pointer, settings.encode())

    def clear_providers(self) -> None:
        """Leave the processor only."""
        _call("OgaConfigClearProviders", self.pointer)

    def append_provider(self, name: str) -> None:
        """Add an execution provider."""
        _call("OgaConfigAppendProvider", self.pointer, name.encode())


class Model(_Owned):
    """A model in memory."""

    def __init__(self, config: Config) -> None:
        super().__init__("Model", "OgaCreateModelFromConfig", config.pointer)


class GeneratorParams(_Owned):
    """Options of a generator."""

    def __init__(self, model: Model) -> None:
        super().__init__("GeneratorParams", "OgaCreateGeneratorParams", model.pointer)

    def set_search_options(self, **options: bool | float) -> None:
        """Options by genai's names."""
        for name, value in options.items():
            kind, given = ("Bool", value) if isinstance(value, bool) else ("Number", float(value))
            _call(f"OgaGeneratorParamsSetSearch{kind}", self.pointer, name.encode(), given)

    def set_guidance(self, kind: str, text: str) -> None:
        """What the reply shall follow; text ends at its first NUL."""
        _call("OgaGeneratorParamsSetGuidance", self.pointer, kind.encode(), text.encode(), False)


class Adapters(_Owned):
    """Adapters of a model by name."""

    def __init__(self, model: Model) -> None:
        super().__init__("Adapters", "OgaCreateAdapters", model.pointer)

    def load(self, file: str, name: str) -> None:
        """Read a file."""
        _call("OgaLoadAdapter", self.pointer, file.encode(), name.encode())

    def unload(self, name: str) -> None:
        """Forget one; RuntimeError while a generator uses it."""
        _call("OgaUnloadAdapter", self.pointer, name.encode())


class Generator(_Owned):
    """One sequence and its cache."""

    def __init__(self, model: Model, params: GeneratorParams) -> None:
        super().__init__("Generator", "OgaCreateGenerator", model.pointer, params.pointer)

    def set_active_adapter(self, adapters: Adapters, name: str) -> None:
        """Use an adapter from now on."""
        _call("OgaSetActiveAdapter", self.pointer, adapters.pointer, name.encode())

    def append_tokens(self, ids: NDArray[np.int32] | Sequence[int]) -> None:
        """Compute ids (T,) or (1, T) behind those it has."""
        given = np.ascontiguousarray(ids, np.int32).reshape(-1)
        _call("OgaGenerator_AppendTokens", self.pointer, given.ctypes.data_as(INTS), given.size)

    def generate_next_token(self) -> None:
        """Compute what was chosen last, and choose."""
        _call("OgaGenerator_GenerateNextToken", self.pointer)

    def get_next_tokens(self) -> NDArray[np.int32]:
        """The token chosen last (1,)."""
        tokens, count = INTS(), c_size_t()
        _call("OgaGenerator_GetNextTokens", self.pointer, byref(tokens), byref(count))
        return np.array(tokens[: count.value], np.int32)

    def get_sequence(self, index: int) -> NDArray[np.int32]:
        """All ids (T,)."""
        library = _library()
        count = library.OgaGenerator_GetSequenceCount(self.pointer, index)
        return np.array(library.OgaGenerator_GetSequenceData(self.pointer, index)[:count], np.int32)

    def get_logits(self) -> NDArray[np.float32]:
        """Logits of the token to come (1, 1, V), computed if they are not yet."""
        tensor = _Owned("Tensor", "OgaGenerator_GetLogits", self.pointer)
        rank, data = c_size_t(), c_void_p()
        _call("OgaTensorGetShapeRank", tensor.pointer, byref(rank))
        shape = (c_int64 * rank.value)()
        _call("OgaTensorGetShape", tensor.pointer, shape, rank)
        _call("OgaTensorGetData", tensor.pointer, byref(data))
        if data.value is None:
            raise RuntimeError("the runtime gave no logits")
        numbers = ctypes.cast(data, POINTER(ctypes.c_float))
        return np.array(np.ctypeslib.as_array(numbers, tuple(shape)), np.float32)  # a copy: the tensor goes

    def set_logits(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token by logits of the shape of `get_logits`."""
        given = np.ascontiguousarray(logits, np.float32)
        shape = (c_int64 * given.ndim)(*given.shape)
        buffer = given.ctypes.data_as(c_void_p)
        tensor = _Owned("Tensor", "OgaCreateTensorFromBuffer", buffer, shape, given.ndim, FLOAT32)
        _call("OgaGenerator_SetLogits", self.pointer, tensor.pointer)

    def rewind_to(self, length: int) -> None:
        """Forget all ids from `length` on."""
        _call("OgaGenerator_RewindTo", self.pointer, length)

    def is_done(self) -> bool:
        """Whether its own loop is at the end."""
        return bool(_library().OgaGenerator_IsDone(self.pointer))
