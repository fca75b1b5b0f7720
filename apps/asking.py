"""What `run` and `chat` can be asked for: the options both have, and their checks before a model is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkit.apps import kvfrom
from rlkit.runtime.chat import Reply
from rlkit.runtime.request import MOST_LOGPROBS, Grammar, Guidance, Logprob

if TYPE_CHECKING:
    from rlkit.runtime.session import Session

MOST_SCHEMA_NBYTES = 1 << 20
WRONG_EVERYWHERE = (  # as Python's parser says it; what else it refuses may be good elsewhere
    "missing )",
    "unbalanced parenthesis",
    "unterminated character set",
    "nothing to repeat",
    "min repeat greater than max repeat",
    "bad escape (end of pattern)",
    "bad character range",
)

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, made by rlkit export.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="The longest reply, in tokens.")]
System = Annotated[str | None, typer.Option(help="Instructions that come before the conversation.")]
Adapter = Annotated[str | None, typer.Option(help="One of the bundle's adapters; the model as it is unless told.")]

_SAMPLING, _SHAPE, _MACHINE = "Sampling", "Shape of the reply", "Machine"
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; higher is more varied.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Choose among so many tokens; 0 keeps all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Choose among the likeliest tokens of this share in all.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the likeliest.", rich_help_panel=_SAMPLING)
]
Penalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1 makes what was said less likely.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option(help="Repeats a reply made with a temperature above 0.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.", rich_help_panel=_SHAPE)
]
JsonSchema = Annotated[
    str | None,
    typer.Option(metavar="FILE|TEXT", help="The reply is JSON that fits this schema.", rich_help_panel=_SHAPE),
]
Regex = Annotated[str | None, typer.Option(help="The reply matches this expression.", rich_help_panel=_SHAPE)]
Logprobs = Annotated[
    int | None,
    typer.Option(
        min=0, max=MOST_LOGPROBS, help="With --json: each token's, and of so many others.", rich_help_panel=_SHAPE
    ),
]
Device = Annotated[str, typer.Option(help="cpu, auto, or a device that rlkit doctor lists.", rich_help_panel=_MACHINE)]
Kv = Annotated[
    str | None,
    typer.Option(help="Cache of keys and values: float, int8, int4, as the bundle has it.", rich_help_panel=_MACHINE),
]
KvFrom = Annotated[Path | None, typer.Option(help=kvfrom.HELP, rich_help_panel=_MACHINE)]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads to compute with; as measured or as the bundle says.", rich_help_panel=_MACHINE),
]


@dataclass(frozen=True, slots=True)
class Place:
    """How a bundle is opened."""

    device: str = "cpu"
    threads: int | None = None
    kv: str | None = None
    kv_from: Path | None = None

    def told(self, session: Any) -> str:
        """Where a session runs and why, which is said whenever that was not simply the processor."""
        return "" if self.device == "cpu" else f"on {session.device}: {session.why}"

    def open(self, bundle: Path, adapter: str | None = None) -> Session:
        """Open a bundle; ValueError, before its model is loaded, for an adapter that it does not have.

        A result of `rlkit kv` must be of this bundle's model.
        """
        from rlkit.runtime.session import open_bundle, read_bundle

        read_bundle(bundle, self.threads)
        if adapter is not None and adapter not in (there := adapters_in(bundle)):
            raise ValueError(f"{bundle} has no adapter {adapter!r}; there are {', '.join(there) or 'none'}")
        chosen = None if self.kv_from is None else kvfrom.chosen(self.kv, self.kv_from, [bundle])
        kv = self.kv if chosen is None else chosen.kv
        session = open_bundle(bundle, device=self.device, threads=self.threads, kv=kv)
        if chosen is not None and chosen.chunk is not None:
            session.chunk_tokens = chosen.chunk
        return session


def about(bundle: Path, session: Any, adapter: str | None) -> dict[str, Any]:
    """What replies: the beginning of every reply as JSON."""
    found = {"schema_version": 1, "bundle": str(bundle), "adapter": adapter}
    return found | {name: getattr(session, name, None) for name in ("device", "why", "kv", "threads")}


def adapters_in(bundle: Path) -> tuple[str, ...]:
    """The names of a bundle's adapters, from its folder."""
    from rlkit.runtime.plain import ADAPTER_SUFFIX

    files = (bundle / "adapters").glob(f"*{ADAPTER_SUFFIX}")
    return tuple(sorted(file.name.removesuffix(ADAPTER_SUFFIX) for file in files if file.is_file()))


def guidance(json_schema: str | None, regex: str | None) -> Guidance | None:
    """What a reply must follow; ValueError for both at once, and for a schema or expression that is none."""
    if json_schema is not None and regex is not None:
        raise ValueError("--json-schema and --regex cannot both shape a reply; leave one of them out")
    if json_schema is not None:
        return Guidance(Grammar.JSON_SCHEMA, _schema(json_schema))
    if regex is not None:
        _check_regex(regex)
        return Guidance(Grammar.REGEX, regex)
    return None


def check_logprobs(logprobs: int | None, json: bool) -> None:
    """Raise ValueError where there is no place to put them."""
    if logprobs is not None and not json:
        raise ValueError("--logprobs is part of the JSON output; add --json")


def forgiving() -> None:
    """Let input and output replace what is not text in their encoding, instead of ending the program."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError, OSError):  # closed, or half read: then it stays as it is
                stream.reconfigure(errors="replace")


def _schema(asked: str) -> str:
    """A schema given as text (which begins with a brace) or as a file, as text."""
    text, name = asked, "--json-schema"
    if not asked.lstrip().startswith("{"):
        path = Path(asked).expanduser()
        if path.is_file() and path.stat().st_size > MOST_SCHEMA_NBYTES:
            raise ValueError(f"{path} has more than {MOST_SCHEMA_NBYTES} bytes, too large for a schema; name another")
        try:
            text, name = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; give a JSON schema") from error
        except OSError as error:
            why = f"--json-schema {asked!r} is neither JSON nor a file that can be read"
            raise ValueError(f"{why} ({error.strerror}); give a file, or text that begins with a brace") from error
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}); correct the schema") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{name} holds a JSON {type(schema).__name__}, not an object; give a JSON schema")
    return text


def _check_regex(expression: str) -> None:
    """Refuse what no dialect takes; the runtime's own (Rust's, without looking around) is checked once it is there."""
    if not expression:
        raise ValueError("--regex is empty; give an expression, or leave it out")
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(expression)
    except re.error as error:
        if error.msg.startswith(WRONG_EVERYWHERE):
            raise ValueError(f"--regex {expression!r} is no regular expression ({error}); correct it") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"--regex is too deep or counts too far ({error}); make it simpler") from error


def reply_json(reply: Reply, session: Any) -> dict[str, Any]:
    """A reply and its numbers; `session` decodes ids."""
    found: dict[str, Any] = {"text": reply.text}
    if reply.thought:
        found["thought"] = reply.thought
    measured = reply.speed
    found |= {
        "finish_reason": reply.reason.value if reply.reason else None,
        "stop": reply.stop,
        "prompt_tokens": measured.prompt_tokens,
        "reused_tokens": measured.reused_tokens,
        "new_tokens": measured.new_tokens,
        "first_token_seconds": measured.first_token_seconds,
        "tokens_per_s": measured.tokens_per_s,
        "context_length": session.context_length,
    }
    if reply.logprobs:
        found["logprobs"] = [_logprob_json(entry, session.decode) for entry in reply.logprobs]
    return found


def _logprob_json(entry: Logprob, decode: Any) -> dict[str, Any]:
    top: Sequence[tuple[int, float]] = entry.top
    likeliest = [{"id": token, "text": decode([token]), "logprob": value} for token, value in top]
    return {"id": entry.id, "text": decode([entry.id]), "logprob": entry.value, "top": likeliest}
