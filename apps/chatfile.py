"""Conversations on disk: JSON with a schema_version, messages as chat templates and servers take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.atomic import write_json
from rlkit.runtime.chat import Message

SCHEMA_VERSION = 1
MOST_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """A conversation, and what it was held with: the bundle's folder name and its adapter."""

    messages: tuple[Message, ...]
    bundle: str
    adapter: str | None = None

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[:1]
        return first[0].content if first and first[0].role == "system" else None

    @property
    def turns(self) -> Sequence[Message]:
        """All but the system message."""
        return self.messages[self.system is not None :]


def write(path: Path, saved: Saved, *, force: bool = False) -> None:
    """Write a conversation, complete or not at all. FileExistsError where the file exists and not `force`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; /save --force {path} replaces it")
    entries = [_message_json(message) for message in saved.messages]
    about = {"schema_version": SCHEMA_VERSION, "bundle": saved.bundle, "adapter": saved.adapter}
    write_json(path, {**about, "messages": entries})


def read(path: Path) -> Saved:
    """Read a conversation. FileNotFoundError or ValueError, one line, for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; /save FILE writes one")
    if path.stat().st_size > MOST_NBYTES:
        raise ValueError(f"{path} has more than {MOST_NBYTES} bytes, too large for a conversation; name another")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); name a file that /save wrote") from error
    if not isinstance(found, dict) or not isinstance(found.get("messages"), list):
        raise ValueError(f"{path} holds no conversation: it has no list of messages; name a file that /save wrote")
    version = found.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version {version!r}, not one of 1..{SCHEMA_VERSION}; update rlkit")
    messages = tuple(_message(entry, index, path) for index, entry in enumerate(found["messages"]))
    adapter = found.get("adapter")
    return Saved(messages, str(found.get("bundle", "")), adapter if isinstance(adapter, str) else None)


def _message_json(message: Message) -> dict[str, str]:
    return message.to_json() | ({"thought": message.thought} if message.thought else {})


def _message(entry: Any, index: int, path: Path) -> Message:
    entry = entry if isinstance(entry, dict) else {}
    role, content, thought = entry.get("role"), entry.get("content"), entry.get("thought", "")
    if not (isinstance(role, str) and isinstance(content, str) and isinstance(thought, str)):
        raise ValueError(f"{path}: message {index + 1} lacks role or content as text; correct or remove it")
    if role == "system" and index:
        raise ValueError(f"{path}: message {index + 1} is a system message, which may only be the first; remove it")
    return Message(role, content, thought)
