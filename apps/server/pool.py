"""The bundles that a server offers: opened when first asked for, closed when their memory is needed.

An engine that works on a request is in use and stays; of the others the one used longest ago goes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.apps.server.refusals import Refusal, crowded
from rlkit.recover.source import read_json
from rlkit.runtime.engine import Engine
from rlkit.runtime.loaded import ADAPTERS
from rlkit.runtime.plain import ADAPTER_SUFFIX
from rlkit.runtime.session import Session

BUSY_SECONDS = 5.0  # when to come back if every other bundle is in use


@dataclass(slots=True)
class Served:
    """An open bundle; `users` are the requests that are being worked on.

    `vocab` is how many tokens there are (None: not stated), `knows_tools` whether its chat template takes them.
    `tokenizing` is held while text is encoded.
    """

    name: str
    folder: Path
    session: Session
    engine: Engine
    vocab: int | None = None
    knows_tools: bool = False
    users: int = 0
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    _names: dict[int, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What it takes now, caches too."""
        return self.session.nbytes

    def name_of(self, token: int) -> str:
        """The text of one token."""
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self.session.decode([token])
        return found

    def without_paths(self, message: str) -> str:
        """A message for other machines: where the bundle lies here is nobody's business."""
        return message.replace(str(self.folder), self.name)


class Pool:
    """Names to open bundles within a bound of memory; safe to use from several threads.

    `bundles` are folders by name, `open_one` opens one. ValueError for a bundle that alone exceeds `memory_nbytes`.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        open_one: Callable[[Path], tuple[Session, Engine]],
        memory_nbytes: int | None = None,
    ) -> None:
        if not bundles:
            raise ValueError("no bundle to serve; name at least one folder")
        self._bundles, self._open, self.memory_nbytes = dict(bundles), open_one, memory_nbytes
        for name, folder in self._bundles.items():
            size = size_of(folder)
            if memory_nbytes is not None and size > memory_nbytes:
                why = f"{name} takes {size / 1e9:.2f} GB, more than the {memory_nbytes / 1e9:.2f} GB there are for all"
                raise ValueError(f"{why}; raise --memory or leave it out")
        self._loaded: dict[str, Served] = {}  # used longest ago first
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The bundles, in the order of the command line."""
        return tuple(self._bundles)

    def folder(self, name: str) -> Path:
        """Where a bundle lies."""
        return self._bundles[name]

    def adapters(self, name: str) -> tuple[str, ...]:
        """The adapters in a bundle's folder now."""
        files = (self._bundles[name] / ADAPTERS).glob(f"*{ADAPTER_SUFFIX}")
        return tuple(sorted(file.name.removesuffix(ADAPTER_SUFFIX) for file in files if file.is_file()))

    def resolve(self, model: str | None) -> tuple[str, str | None]:
        """(bundle, adapter) of a model's name, "bundle" or "bundle:adapter"; the first bundle for none."""
        if model is None:
            return self.names[0], None
        if model in self._bundles:
            return model, None
        name, _, adapter = model.rpartition(":")
        if name in self._bundles and adapter in self.adapters(name):
            return name, adapter
        known = name in self._bundles
        what = f"bundle {name} has no adapter {adapter[:100]!r}" if known else f"no model {model[:100]!r}"
        why = f"{what}; GET /v1/models lists what there is: {', '.join(self._bundles)}"
        raise Refusal(404, why, param="model", code="model_not_found")

    def take(self, name: str) -> Served | None:
        """An open bundle, in use from now on; None if it is not open."""
        with self._lock:
            found = self._loaded.pop(name, None)
            if found is not None:
                self._loaded[name] = found  # the newest
                found.users += 1
            return found

    def open(self, name: str) -> Served:
        """The same, opening it first if need be, which takes seconds: not for the event loop.

        Raises Refusal: 429 where no memory can be freed now, 503 where the bundle cannot be opened.
        """
        with self._opening:
            found = self.take(name)
            if found is not None:
                return found
            folder = self._bundles[name]
            self._make_room(name, size_of(folder))
            try:
                session, engine = self._open(folder)
            except (ValueError, OSError) as error:
                why = str(error).replace(str(folder), name)
                raise Refusal(503, f"model {name} cannot be opened: {why}", code="model_unavailable") from error
            made = _loaded(name, folder, session, engine)
            with self._lock:
                if not self._closed:
                    self._loaded[name] = made
                    return made
        _close(made)
        raise Refusal(503, "the server is ending", code="shutting_down")

    def give_back(self, loaded: Served) -> None:
        """End a use."""
        with self._lock:
            loaded.users -= 1

    def loaded(self) -> Sequence[Served]:
        """What is open now, used longest ago first."""
        with self._lock:
            return tuple(self._loaded.values())

    def stats(self) -> dict[str, dict[str, Any]]:
        """The numbers of every engine, by name."""
        return {loaded.name: numbers(loaded.engine) for loaded in self.loaded()}

    def close(self) -> None:
        """Close all; what is asked for afterwards is refused."""
        with self._lock:
            self._closed = True
            found = list(self._loaded.values())
            self._loaded.clear()
        for loaded in found:
            _close(loaded)

    def _make_room(self, name: str, wanted: int) -> None:
        """Close idle bundles until `wanted` bytes fit."""
        if self.memory_nbytes is None:
            return
        gone = []
        with self._lock:
            room = self.memory_nbytes - sum(loaded.nbytes for loaded in self._loaded.values())
            for loaded in [loaded for loaded in self._loaded.values() if not loaded.users]:
                if room >= wanted:
                    break
                gone.append(self._loaded.pop(loaded.name))
                room += loaded.nbytes
        for loaded in gone:
            _close(loaded)
        if room < wanted:
            why = f"model {name} needs {wanted / 1e9:.2f} GB, and what is loaded is in use"
            raise crowded(f"{why}; try again soon", BUSY_SECONDS)


def _loaded(name: str, folder: Path, session: Session, engine: Engine) -> Served:
    vocab = read_json(folder / "genai_config.json")["model"].get("vocab_size")
    return Served(name, folder, session, engine, vocab, knows_tools="tools" in _template(folder), users=1)


def _template(folder: Path) -> str:
    """A bundle's chat template, wherever it is; "" for none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(read_json(config).get("chat_template", "")) if config.is_file() else ""


def size_of(folder: Path) -> int:
    """Bytes of a bundle's weights: what opening it maps or reads at least."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*") if file.is_file())


def numbers(engine: Engine) -> dict[str, Any]:
    """An engine's stats by name."""
    stats = engine.stats()
    return {key: getattr(stats, key) for key in stats.__slots__}


def _close(loaded: Served) -> None:
    loaded.engine.close()
    loaded.session.close()
