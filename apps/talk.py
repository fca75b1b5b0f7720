"""The command `run`: one prompt, one reply.

The reply goes to standard output as it comes; everything else (numbers, hints, what the model thinks) goes to standard
error.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from rlkit.apps import asking, console
from rlkit.apps.asking import Place
from rlkit.apps.chatscreen import Nothing, Plain, Screen
from rlkit.runtime.chat import Hearing, Manner, Message
from rlkit.runtime.request import Prefilled, Sampling
from rlkit.runtime.thoughts import opens_thought


def run(  # noqa: PLR0913, one parameter per option of the command
    bundle: asking.Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say; - reads standard input.")],
    max_new_tokens: asking.Tokens = 256,
    system: asking.System = None,
    adapter: asking.Adapter = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
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
    json: Annotated[bool, typer.Option("--json", help="Print the reply and its numbers as JSON.")] = False,
) -> None:
    """Answer one prompt, or with --raw continue it.

    Example: rlkit run ./bundle "What is the capital of France?"
    """
    if raw and system:
        raise ValueError("--raw has no place for --system; leave one of them out")
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, repetition_penalty)
    shape = asking.guidance(json_schema, regex)
    manner = Manner(max_new_tokens, sampling, tuple(stop or ()), shape, logprobs)
    asking.check_logprobs(logprobs, json)
    asking.forgiving()
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; say something")
    place = Place(device, threads, kv, kv_from)
    session = place.open(bundle, adapter)
    if not json and (where := place.told(session)):
        console.say(where)
    asked = [*([Message("system", system)] if system else []), Message("user", text)]
    prompted = text if raw else session.apply_template([message.to_json() for message in asked])
    ids = session.encode(prompted)
    hearing = Hearing(len(ids), thinking=None if raw else opens_thought(prompted))
    screen: Screen = Nothing() if json else Plain()
    with contextlib.closing(session.stream(manner.request(ids, adapter))) as events:
        for event in events:
            if isinstance(event, Prefilled):
                screen.show(event)
            for piece in hearing.hear(event):
                screen.show(piece)
    for piece in hearing.rest():
        screen.show(piece)
    reply = hearing.reply()
    screen.end()
    if json:
        console.emit_json({**asking.about(bundle, session, adapter), **asking.reply_json(reply, session)})
    else:
        console.say(str(reply.speed))
