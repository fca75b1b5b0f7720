"""What begins with a slash in a conversation: a table of commands, their help, their completion."""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlkit.apps import chatfile, console
from rlkit.apps.chatroom import SURVIVED, Room, complain
from rlkit.runtime.chat import VARIED

NONE = "none"
FORCE = "--force"


@dataclass(frozen=True, slots=True)
class Command:
    """How it is written, what it does in a line, and the function that does it with the rest of the line."""

    usage: str
    line: str
    act: Callable[[Room, str], None]


def obey(room: Room, line: str) -> None:
    """Do what a line that begins with a slash says; EOFError for the one that leaves."""
    name, _space, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        meant = f"did you mean {near[0]}? " if near else ""
        console.say(f"no command {name}; {meant}/help lists them all, a space before the slash makes it a message")
        return
    try:
        command.act(room, rest.strip())
    except SURVIVED as error:
        complain(error)


def completions(room: Room, line: str) -> list[str]:
    """What the last word of a line may become: a command, an adapter, a path."""
    name, space, rest = line.partition(" ")
    if not name.startswith("/"):
        return []
    if not space:
        return [known for known in COMMANDS if known.startswith(name)]
    word = rest.split(" ")[-1]
    if name == "/adapter":
        return [known for known in (*room.talk.adapters, NONE) if known.startswith(word)]
    return _paths(word) if name in ("/model", "/save", "/load") else []


def _paths(word: str) -> list[str]:
    found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
    return [path + os.sep if os.path.isdir(path) else path for path in found]


def _help(_room: Room, _rest: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        console.say(f"  {command.usage:{width}}  {command.line}")
    console.say('A line that ends with \\ goes on; a block between lines of """ is one message. Tab completes.')
    console.say("Ctrl-C stops a reply, twice on an empty line leaves, as Ctrl-D does.")


def _model(room: Room, rest: str) -> None:
    if not rest or room.opened is None:
        console.say(f"model: {room.bundle}; {_facts(room)}")
        return
    path, adapter, before = _path(rest), room.talk.adapter, room.talk.model
    model = room.opened(path)
    room.talk.use(model)
    room.bundle = path
    close = getattr(before, "close", None)
    if close is not None:
        close()
    left = f"; adapter {adapter} stays behind" if adapter and room.talk.adapter is None else ""
    console.say(f"model: {path}; {_facts(room)}{left}; the conversation goes on")


def _facts(room: Room) -> str:
    model = room.talk.model
    parts = [f"context of {model.context_length} tokens"]
    if (device := getattr(model, "device", None)) is not None:
        parts.append(f"on {device}")
    if (kv := getattr(model, "kv", None)) is not None:
        parts.append(f"{kv} cache")
    if (threads := getattr(model, "threads", None)) is not None:
        parts.append(f"{threads} threads")
    return ", ".join(parts)


def _adapter(room: Room, rest: str) -> None:
    if rest:
        room.talk.adapter = None if rest == NONE else rest
    there = ", ".join(room.talk.adapters) or "the bundle has no others"
    console.say(f"adapter: {room.talk.adapter or NONE} ({there})")


def _system(room: Room, rest: str) -> None:
    if rest:
        room.talk.system = None if rest == NONE else rest
    console.say(f"system: {room.talk.system or NONE}")


def _stats(room: Room, _rest: str) -> None:
    last = room.talk.last
    console.say(str(last.speed) if last else "no reply yet")
    chosen = room.manner.sampling
    asked = f"temperature {chosen.temperature:g}, top-k {chosen.top_k}, top-p {chosen.top_p:g}, min-p {chosen.min_p:g}"
    console.say(f"{room.bundle}, {_facts(room)}; adapter {room.talk.adapter or NONE}; {asked}")
    console.say(f"{room.replies} replies, {room.tokens} tokens; {room.context()}")


def _save(room: Room, rest: str) -> None:
    force = rest.startswith(f"{FORCE} ")
    path = _path(rest.removeprefix(FORCE) if force else rest)
    saved = chatfile.Saved(tuple(room.talk.messages), room.bundle.name, room.talk.adapter)
    chatfile.write(path, saved, force=force)
    console.say(f"saved {len(saved.turns)} messages as {path}")


def _load(room: Room, rest: str) -> None:
    path = _path(rest)
    saved = chatfile.read(path)
    room.talk.restore(saved.turns, saved.system)
    adapter = ""
    if saved.adapter != room.talk.adapter:
        try:
            room.talk.adapter = saved.adapter
        except ValueError:
            adapter = f"; it was held with adapter {saved.adapter}, which is not here"
    console.say(f"loaded {len(saved.turns)} messages from {path}{adapter}")


def _retry(room: Room, _rest: str) -> None:
    if room.manner.sampling.temperature == 0:
        console.say(f"(with temperature {VARIED}, as 0 would repeat the reply)")
    room.retry()


def _undo(room: Room, _rest: str) -> None:
    question = " ".join(room.talk.undo().split())
    console.say(f"undone: {question[:60]}{'...' if len(question) > 60 else ''}")


def _clear(room: Room, _rest: str) -> None:
    room.talk.clear()
    console.say("the conversation is forgotten")


def _quit(_room: Room, _rest: str) -> None:
    raise EOFError


def _path(text: str) -> Path:
    name = text.strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    if not name:
        raise ValueError("no path is given; add one after the command")
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # ~nobody
        path = path.expanduser()
    return path


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/help", "list these commands", _help),
        Command("/model PATH", "go on with another bundle; without PATH, say which it is", _model),
        Command("/adapter NAME|none", "reply with this adapter; without NAME, list them", _adapter),
        Command("/system TEXT|none", "instructions that come before the conversation", _system),
        Command("/stats", "how fast the last reply came, and how full the context is", _stats),
        Command("/retry", "another reply to the last message", _retry),
        Command("/undo", "forget the last message and its reply", _undo),
        Command("/clear", "forget the conversation", _clear),
        Command("/save FILE", f"write the conversation as JSON; {FORCE} FILE replaces one", _save),
        Command("/load FILE", "go on with a saved conversation", _load),
        Command("/quit", "leave", _quit),
    )
}
