"""A bundle through plain onnxruntime: the logits of whole rows, for measuring accuracy.

Where model.onnx computes only the last token's logits, the bundle has a second graph over the same data that keeps all
of them, and that one is opened. Graphs in float16 run too; logits are float32 always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.export.kvscales import file_name
from rlkit.runtime import kv as kvs

ALL_LOGITS = "logits.onnx"
ADAPTER_SUFFIX = ".onnx_adapter"
SILENT = 4  # what goes wrong is raised; the runtime would print it as well
CACHE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class Plain:
    """An open graph of a bundle; `decoder` is that block of its genai_config.json.

    `kv` is one of the caches it offers (kv.py); attention reads the prompt's own keys and values from there too.
    `whole` False opens the graph that generates, which may compute the last token's logits only. Raises ValueError for
    a cache that the bundle does not have.
    """

    def __init__(
        self, folder: Path, decoder: dict[str, Any], threads: int, kv: str | None = None, *, whole: bool = True
    ) -> None:
        self._folder, self._decoder = folder, decoder
        scheme = kvs.check(folder, decoder, kv)
        name = ALL_LOGITS if whole and (folder / ALL_LOGITS).is_file() else decoder["filename"]
        file = folder / (name if scheme == kvs.FLOAT else file_name(name, scheme))
        self._session = open_graph(file, decoder, threads)
        self._adapters: dict[Path, Any] = {}

    def logits(self, ids: NDArray[np.int64], adapter: Path | None = None) -> NDArray[np.float32]:
        """Logits (B, T, V) of rows of ids (B, T), with an adapter's file or without.

        Raises ValueError for an adapter that is damaged or of another model, and where the graph keeps too few logits.
        """
        options = None if adapter is None else self._run_options(adapter)
        try:
            (found,) = self._session.run(["logits"], self._feeds(ids.astype(np.int64)), options)
        except Exception as error:
            if adapter is None:
                raise
            raise unfit(adapter.name.removesuffix(ADAPTER_SUFFIX), self._folder, error) from error
        if found.shape[1] != ids.shape[1]:
            why = f"{self._folder} computes only the last token's logits and has no {ALL_LOGITS}"
            raise ValueError(f"{why}; export it with all logits to measure it")
        return np.asarray(found, np.float32)

    def outputs(self, names: Sequence[str], ids: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Outputs of the graph by name for rows of ids (B, T): `present.0.key` is (B, KV heads, T, head size)."""
        return list(self._session.run(list(names), self._feeds(ids.astype(np.int64))))

    def forget(self, adapter: Path) -> None:
        """Give an adapter's memory back, if it was read."""
        self._adapters.pop(adapter, None)

    def _feeds(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the graph asks for: the rows (B, T), all of them seen, at positions 0, 1, ..., after an empty cache."""
        positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        known = {"input_ids": rows, "attention_mask": np.ones_like(rows), "position_ids": positions}
        feeds: dict[str, NDArray[Any]] = {}
        for value in self._session.get_inputs():  # an adapter's are not among them: they have defaults
            found = known.get(value.name)
            kind = np.int32 if value.type == "tensor(int32)" else np.int64
            feeds[value.name] = self._empty_past(value, len(rows)) if found is None else found.astype(kind)
        return feeds

    def _empty_past(self, value: Any, rows: int) -> NDArray[Any]:
        """A cache input that holds no token yet: (B, KV heads, 0, head size)."""
        heads, size, kind = cache_of(value, self._decoder, self._folder)
        return np.zeros((rows, heads, 0, size), kind)

    def _run_options(self, adapter: Path) -> Any:
        import onnxruntime as ort

        if adapter not in self._adapters:
            loaded = ort.LoraAdapter()
            try:
                loaded.Load(str(adapter))
            except RuntimeError as error:
                raise damaged(adapter, error) from error
            self._adapters[adapter] = loaded
        options = ort.RunOptions()
        options.log_severity_level = SILENT
        options.add_active_adapter(self._adapters[adapter])
        return options


def cache_of(value: Any, decoder: dict[str, Any], folder: Path) -> tuple[int, int, Any]:
    """KV heads, head size and type of a cache that a graph asks for; ValueError where it is none that we know."""
    if value.type not in CACHE_TYPES or len(value.shape) != 4:
        raise ValueError(f"{folder} asks for {value.name} {value.type}, which rlkit cannot make; see rlkit inspect")
    _, heads, _, size = value.shape  # names where the graph leaves them open
    heads = heads if isinstance(heads, int) else decoder["num_key_value_heads"]
    size = size if isinstance(size, int) else decoder["head_size"]
    return heads, size, CACHE_TYPES[value.type]


def open_graph(path: Path, decoder: dict[str, Any], threads: int, profile: Path | None = None) -> Any:
    """A plain session on the CPU with the options of a bundle; `profile` starts the file name of its profile.

    Raises ValueError where the runtime cannot open it.
    """
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    for key, value in (decoder.get("session_options") or {}).items():
        if "." in key:  # genai passes such keys on as ORT's own config entries
            options.add_session_config_entry(key, str(value))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise damaged(path.parent, error) from error


def damaged(path: Path, error: Exception) -> ValueError:
    """What to say of a bundle or an adapter's file that the runtime cannot open."""
    what = "its files are damaged" if path.is_dir() else "it is damaged"
    return ValueError(f"{path} cannot be opened: {first_line(error)}; {what}, so export it again")


def unfit(adapter: str, folder: Path, error: Exception) -> ValueError:
    """What to say of an adapter that the bundle's graph does not take."""
    why = f"adapter {adapter} does not fit {folder} ({first_line(error)})"
    return ValueError(f"{why}; it is of another model, so remove it or name another")


def first_line(error: Exception) -> str:
    """The part of the runtime's message that says something: its own causes are nested, the innermost last."""
    line = re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip().split("\n")[0])
    line = re.sub(r"^/\S+:\d+ .*\) (?=\w)", "", line)  # where in the runtime's sources it was thrown
    return line[:300].rstrip(". ") or type(error).__name__
