"""The commands that use a bundle: `run` for one prompt, `chat` for a conversation.

Replies go to standard output as they come; everything else (numbers, hints) goes to standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.runtime.chat import Chat, Message, Speed, prompt_ids, speed
from rlkit.runtime.session import Sampling, Token, open_bundle

HELP = (
    "/clear forgets the conversation, /stats says how fast the last reply came, /adapter NAME or none changes the"
    " adapter, /quit leaves; Ctrl-C stops a reply"
)
NO_ADAPTER = "none"

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, made by rlkit export.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="The longest reply, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
Seed = Annotated[int | None, typer.Option(help="Repeats a reply made with a temperature above 0.")]
System = Annotated[str | None, typer.Option(help="Instructions that come before the conversation.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; as the bundle says unless told.")]
Adapter = Annotated[str | None, typer.Option(help="One of the bundle's adapters; the model as it is unless told.")]
Json = Annotated[bool, typer.Option("--json", help="Print the reply and its numbers as JSON and nothing else.")]


def run(  # noqa: PLR0913, one parameter per option of the command
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say; - reads standard input.")],
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    threads: Threads = None,
    adapter: Adapter = None,
    json: Json = False,
) -> None:
    """Answer one prompt, or with --raw continue it.

    Example: rlkit run ./bundle "What is the capital of France?"
    """
    if raw and system:
        raise ValueError("--raw has no place for --system; leave one of them out")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; say something")
    Sampling(temperature, seed=seed)  # complains before the model is loaded
    session = open_bundle(bundle, threads=threads)
    ids = session.encode(text) if raw else prompt_ids(session, _messages(system, text))
    tokens: list[Token] = []
    for token in session.generate(ids, max_new_tokens, temperature=temperature, seed=seed, adapter=adapter):
        tokens.append(token)
        if not json:
            _show(token)
    measured = speed(len(ids), [token.seconds for token in tokens])
    if json:
        reply = "".join(token.text for token in tokens)
        about = {"schema_version": 1, "bundle": str(bundle), "adapter": adapter}
        console.emit_json({**about, "text": reply, **_speed_json(measured)})
    else:
        console.emit("")
        console.say(str(measured))


def chat(  # noqa: PLR0913, one parameter per option of the command
    bundle: Bundle,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    system: System = None,
    threads: Threads = None,
    adapter: Adapter = None,
    json: Annotated[bool, typer.Option("--json", help="Print each reply as one line of JSON, complete.")] = False,
) -> None:
    """Talk with a bundle; one line is one message.

    Example: rlkit chat ./bundle --system "Answer in one sentence."
    """
    sampling = Sampling(temperature, seed=seed)
    session = open_bundle(bundle, threads=threads)
    talk = Chat(session, system=system, adapter=adapter)
    if sys.stdin.isatty():
        console.say(f"{bundle}: context of {session.context_length} tokens, {session.threads} threads")
        if session.adapters:
            console.say(_adapters(talk))
        console.say(HELP)
    converse(talk, max_new_tokens=max_new_tokens, sampling=sampling, json=json)


def converse(
    talk: Chat,
    *,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    ask: Callable[[], str] | None = None,
    json: bool = False,
) -> None:
    """Read messages with `ask` until it raises EOFError or /quit comes; stream each reply, or print it as JSON."""
    while True:
        try:
            text = (ask or _ask)().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.say("\n" + HELP)
            continue
        if text == "/quit":
            return
        if text.startswith("/"):
            _command(talk, text)
        elif text:
            _answer(talk, text, max_new_tokens, sampling, json)


def _answer(talk: Chat, text: str, max_new_tokens: int, sampling: Sampling | None, json: bool) -> None:
    note, said = "", []
    try:
        with contextlib.closing(talk.reply(text, max_new_tokens=max_new_tokens, sampling=sampling)) as reply:
            for token in reply:
                said.append(token.text)
                if not json:
                    _show(token)
    except KeyboardInterrupt:  # the reply stops, the conversation goes on
        note = " (stopped)"
    except ValueError as error:  # such as a message that does not fit the context
        console.say(f"error: {error}")
        return
    if json:
        numbers = _speed_json(talk.last_speed) if talk.last_speed else {}
        console.emit_json_line({"schema_version": 1, "text": "".join(said), "stopped": bool(note), **numbers})
        return
    console.emit(note)
    console.say(f"[{talk.last_speed}]")


def _command(talk: Chat, text: str) -> None:
    if text == "/clear":
        talk.clear()
        console.say("the conversation is forgotten")
    elif text == "/stats":
        console.say(str(talk.last_speed or "no reply yet"))
    elif text.split()[0] == "/adapter":
        _change_adapter(talk, text.split()[1:])
    else:
        console.say(f"no command {text}: {HELP}")


def _change_adapter(talk: Chat, names: list[str]) -> None:
    if names:
        try:
            talk.adapter = None if names == [NO_ADAPTER] else " ".join(names)
        except ValueError as error:
            console.say(f"error: {error}")
            return
    console.say(_adapters(talk))


def _adapters(talk: Chat) -> str:
    there = ", ".join(talk.adapters) or "the bundle has no others"
    return f"adapter: {talk.adapter or NO_ADAPTER} ({there})"


def _ask() -> str:
    if sys.stdin.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _messages(system: str | None, text: str) -> list[Message]:
    return [*([Message("system", system)] if system else []), Message("user", text)]


def _show(token: Token) -> None:
    sys.stdout.write(token.text)
    sys.stdout.flush()


def _speed_json(measured: Speed) -> dict[str, Any]:
    return {
        "prompt_tokens": measured.prompt_tokens,
        "new_tokens": measured.new_tokens,
        "first_token_seconds": measured.first_token_seconds,
        "tokens_per_s": measured.tokens_per_s,
    }
