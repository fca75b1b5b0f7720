"""The fields of requests that are read, and their types; pydantic is used here and nowhere else.

Fields that are not listed are ignored, as OpenAI's servers ignore what they do not know of older clients; those listed
only to be refused would change the reply if they were ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlkit.apps.server.refusals import bad

MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_BIASES = 1024


class Strict(BaseModel):
    """No number from a text, no text from a number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Strict):
    """`include_usage` adds a last chunk with the counts of tokens."""

    include_usage: bool | None = None


class JsonSchema(Strict):
    """A named schema."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class ResponseFormat(Strict):
    """What a reply has to follow; regex and lark are this server's own."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    lark: str | None = None


class Function(Strict):
    """A tool as the model is told of it."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """One tool."""

    type: Literal["function"] = "function"
    function: Function


class Named(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: Named


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text", "refusal"]
    text: str = ""


class FunctionCall(Strict):
    """What was called, as the model wrote it."""

    name: str
    arguments: str = "{}"


class ToolCall(Strict):
    """A call of a message before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Common(Strict):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=MOST_BIASES)
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None


class ChatBody(Common):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    modalities: list[Literal["text"]] | None = None


Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class CompletionBody(Common):
    """A request to /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


Body = TypeVar("Body", bound=Common)


def parse(kind: type[Body], found: dict[str, Any]) -> Body:
    """A body of this kind. Refusal (400) that names the first field that is wrong."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # Parts of a path that name a branch of a union are not in the request.
        place = [str(part) for part in first["loc"] if _is_place(part)]
        param = ".".join(place)
        raise bad(f"{param or 'the body'}: {first['msg']}", param or None) from error


def _is_place(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "bool", "float"))
