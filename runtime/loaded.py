"""The adapters of an open bundle: files of its adapters folder, mapped by genai when first named."""

from __future__ import annotations

import threading
from pathlib import Path

from rlkit.runtime import genai
from rlkit.runtime.plain import ADAPTER_SUFFIX, damaged, first_line

ADAPTERS = "adapters"


class Loaded:
    """What a genai model has mapped of a bundle's adapters; threads may name adapters while another uses them."""

    def __init__(self, folder: Path, model: genai.Model) -> None:
        self._folder, self._model = folder, model
        self._adapters: genai.Adapters | None = None  # genai's, with those in self._names
        self._names: set[str] = set()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the folder now."""
        return tuple(sorted(file.name.removesuffix(ADAPTER_SUFFIX) for file in self._files()))

    def file(self, adapter: str) -> Path:
        """The file of one of `names`: a name is compared with those there are, never made into a path."""
        for file in self._files():
            if file.name == f"{adapter}{ADAPTER_SUFFIX}":
                return file
        there = f"use {', '.join(self.names)}" if self.names else "it has none, so leave the adapter out"
        raise ValueError(f"{self._folder} has no adapter {adapter!r}; {there}")

    def load(self, adapter: str) -> None:
        """Map an adapter if it is not yet; ValueError where it is unknown or damaged."""
        file = self.file(adapter)
        with self._lock:
            if adapter in self._names:
                return
            if self._adapters is None:
                self._adapters = genai.Adapters(self._model)
            try:
                self._adapters.load(str(file), adapter)
            except RuntimeError as error:
                raise damaged(file, error) from error
            self._names.add(adapter)

    def activate(self, generator: genai.Generator, adapter: str) -> None:
        """Have a generator use an adapter; it is loaded once more if it was unloaded since it was asked for."""
        self.load(adapter)
        with self._lock:
            if self._adapters is not None:
                generator.set_active_adapter(self._adapters, adapter)

    def unload(self, adapter: str) -> None:
        """Give an adapter's memory back; ValueError while a generator uses it."""
        self.file(adapter)
        with self._lock:
            if self._adapters is None or adapter not in self._names:
                return
            try:
                self._adapters.unload(adapter)
            except RuntimeError as error:
                why = f"adapter {adapter} cannot be unloaded ({first_line(error)})"
                raise ValueError(f"{why}; end its reply") from error
            self._names.discard(adapter)

    def _files(self) -> list[Path]:
        return [file for file in (self._folder / ADAPTERS).glob(f"*{ADAPTER_SUFFIX}") if file.is_file()]
