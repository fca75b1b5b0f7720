"""The command `chat`: a conversation with a bundle in the terminal.

Replies go to standard output as they come; everything else (numbers, hints) goes to standard error.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Protocol

import typer

from rlkit.apps import asking, chatcommands, chatscreen, console
from rlkit.apps.asking import Place
from rlkit.apps.chatinput import Keyboard, Said
from rlkit.apps.chatroom import Room
from rlkit.runtime.chat import Chat, Manner
from rlkit.runtime.request import Sampling

GREETING = "/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves"
AGAIN = "(Ctrl-C once more leaves, as Ctrl-D does; /help lists the commands)"


def chat(  # noqa: PLR0913, one parameter per option of the command
    bundle: asking.Bundle,
    max_new_tokens: asking.Tokens = 512,
    system: asking.System = None,
    adapter: asking.Adapter = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show replies as they are, without drawing Markdown.")] = False,
    temperature: asking.Temperature = 0.0,
    top_k: asking.TopK = 50,
    top_p: asking.TopP = 1.0,
    min_p: asking.MinP = 0.0,
    repetition_penalty: asking.Penalty = 1.0,
    seed: asking.Seed = None,
    stop: asking.Stop = None,
    json_schema: asking.JsonSchema = None,
    regex: asking.Regex = None,
    logprobs: asking.Logprobs = None,
    device: asking.Device = "cpu",
    kv: asking.Kv = None,
    kv_from: asking.KvFrom = None,
    threads: asking.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print each reply as one line of JSON, complete.")] = False,
) -> None:
    """Talk with a bundle; one line is one message, /help lists what else can be typed.

    Example: rlkit chat ./bundle --system "Answer in one sentence."
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, repetition_penalty)
    shape = asking.guidance(json_schema, regex)
    manner = Manner(max_new_tokens, sampling, tuple(stop or ()), shape, logprobs)
    asking.check_logprobs(logprobs, json)
    asking.forgiving()
    place = Place(device, threads, kv, kv_from)
    session = place.open(bundle, adapter)
    talk = Chat(session, system=system, adapter=adapter)
    screen = chatscreen.screen(plain=plain, json=json)
    room = Room(talk, bundle, manner, place.open, screen, json)
    keyboard = Keyboard(partial(chatcommands.completions, room))
    if keyboard.interactive:
        console.say(f"{bundle}: context of {session.context_length} tokens, {session.threads} threads")
        if where := place.told(session):
            console.say(where)
        if session.adapters:
            chatcommands.obey(room, "/adapter")
        console.say(GREETING)
    converse(room, keyboard)


class Source(Protocol):
    """Where messages come from."""

    @property
    def interactive(self) -> bool:
        """Whether a person types them."""

    @property
    def empty(self) -> bool:
        """Whether nothing of a message had been typed when it was given up."""

    def message(self) -> Said:
        """The next message; EOFError at the end, KeyboardInterrupt where it was given up."""


def converse(room: Room, source: Source) -> None:
    """Answer messages and obey commands until the source ends or a command leaves."""
    given_up = 0  # empty messages in a row
    while True:
        try:
            said = source.message()
        except EOFError:
            if source.interactive:
                console.say("")
            return
        except KeyboardInterrupt:
            if not source.interactive:
                raise
            given_up = given_up + 1 if source.empty else 0
            if given_up > 1:
                console.say("")
                return
            console.say(f"\n{AGAIN}" if given_up else "")
            continue
        given_up = 0
        try:
            _act(room, said)
        except EOFError:
            return
        except KeyboardInterrupt:  # such as while another bundle is opened
            console.say("(stopped)")


def _act(room: Room, said: Said) -> None:
    if said.command:
        chatcommands.obey(room, said.text)
    elif said.text:
        room.say(said.text)
