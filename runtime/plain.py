"""A bundle through plain onnxruntime: the logits of whole rows, for measuring accuracy.

Where model.onnx computes only the last token's logits, the bundle has a second graph over the same data that keeps all
of them, and that one is opened. Graphs in float16 run too; logits are float32 always.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
        (found,) = self._run(["logits"], ids, {}, adapter)
        return np.asarray(found, np.float32)

    def outputs(
        self,
        names: Sequence[str],
        ids: NDArray[np.int64],
        past: Mapping[str, NDArray[Any]] | None = None,
        adapter: Path | None = None,
    ) -> list[NDArray[Any]]:
        """Outputs of the graph by name for rows of ids (B, T): `present.0.key` is (B, KV heads, T, head size).

        They follow the tokens in `past`, if there are any, and `present` holds those as well. Raises ValueError for an
        adapter that is damaged or of another model.
        """
        options = None if adapter is None else self._run_options(adapter)
        try:
            return list(self._session.run(list(names), self._feeds(ids.astype(np.int64), past), options))
        except Exception as error:
            if adapter is None:
                raise
            raise unfit(adapter.name.removesuffix(ADAPTER_SUFFIX), self._folder, error) from error

    def tail(self, ids: NDArray[np.int64], last: int, chunk: int = 512) -> NDArray[np.float32]:
        """Logits (1, last, V) of the end of one row (1, T); what comes before goes into the cache by `chunk` tokens."""
        names = cache_names(self._decoder)
        past: dict[str, NDArray[Any]] = {}
        for start in range(0, ids.shape[1] - last, chunk):
            part = ids[:, start : min(start + chunk, ids.shape[1] - last)].astype(np.int64)
            presents = self._session.run(list(names), self._feeds(part, past))
            past = dict(zip(names.values(), presents, strict=True))
        (found,) = self._session.run(["logits"], self._feeds(ids[:, -last:].astype(np.int64), past))
        return np.asarray(found, np.float32)

    def extend(
        self, ids: NDArray[np.int64], past: Mapping[str, NDArray[Any]], adapter: Path | None = None
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Logits (B, T, V) of rows (B, T) that follow the tokens in `past`, at first empty, and the past with them."""
        names = cache_names(self._decoder)
        found, *presents = self._run(["logits", *names], ids, past, adapter)
        return np.asarray(found, np.float32), dict(zip(names.values(), presents, strict=True))

    def _run(
        self, names: Sequence[str], ids: NDArray[np.int64], past: Mapping[str, NDArray[Any]], adapter: Path | None
    ) -> list[NDArray[Any]]:
        """Outputs by name, the logits of every token first."""
        found = self.outputs(names, ids, past, adapter)
        if found[0].shape[1] != ids.shape[1]:
            why = f"{self._folder} computes only the last token's logits and has no {ALL_LOGITS}"
            raise ValueError(f"{why}; export it with all logits to measure it")
        return found

    def forget(self, adapter: Path) -> None:
        """Give an adapter's memory back, if it was read."""
        self._adapters.pop(adapter, None)

    def _feeds(
        self, rows: NDArray[np.int64], past: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """What the graph asks for: rows (B, T) that follow the tokens in `past`; unless told there are none."""
        past = past or {}
        behind = next(iter(past.values())).shape[2] if past else 0
        places = np.arange(behind, behind + rows.shape[1])
        seen = np.ones((len(rows), behind + rows.shape[1]), np.int64)
        known = {"input_ids": rows, "attention_mask": seen, "position_ids": np.broadcast_to(places, rows.shape)}
        feeds: dict[str, NDArray[Any]] = {}
        for value in self._session.get_inputs():  # an adapter's are not among them: they have defaults
            found = known.get(value.name)
            kind = np.int32 if value.type == "tensor(int32)" else np.int64
            if found is not None:
                feeds[value.name] = found.astype(kind)
            else:
                feeds[value.name] = past[value.name] if past else self._empty_past(value, len(rows))
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


def cache_names(decoder: dict[str, Any]) -> dict[str, str]:
    """The cache's parts by their names among the graph's outputs -> among its inputs."""
    parts = [
        (decoder["outputs"][f"present_{part}_names"], decoder["inputs"][f"past_{part}_names"])
        for part in ("key", "value")
    ]
    return {present % layer: past % layer for layer in range(decoder["num_hidden_layers"]) for present, past in parts}


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
