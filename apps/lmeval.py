"""Bundles for lm-evaluation-harness: its tasks, our sessions; the harness is imported when it is asked for.

Its own command finds only the models it ships with, so `rlkit lm-eval` is that command with a model `rlkit` besides;
from Python, `register` adds it:

    from rlkit.apps.lmeval import register
    register()
    lm_eval.simple_evaluate(model="rlkit", model_args={"bundle": "./bundle"}, tasks=["arc_easy"])

Text becomes ids as in the harness's class for Hugging Face models (lmtokens.py). Requests that were cut, or had nothing
to judge, are said and counted in the results' config.
"""

from __future__ import annotations

import contextlib
import functools
import json as jsons
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from rlkit.apps import console
from rlkit.apps.lmmodel import open_model

NAME = "rlkit"
UNASKED_DEVICE = "cuda:0"  # what the harness's command says unless told
SAID = {
    "truncated": "%d requests were longer than the context; their beginning was cut off",
    "windowed": "%d continuations were longer than the context and judged in parts",
    "empty": "%d requests had nothing to judge: minus infinity as a continuation, 0 as a whole text",
}
T = TypeVar("T")
log = logging.getLogger(__name__)


class Methods:
    """What the harness calls, for `lm_class`; batch sizes are nothing to it, as what is shared brings more."""

    cache_hook: Any  # the harness's, set by its class

    def __init__(
        self, bundle: str | None = None, batch_size: Any = None, max_batch_size: Any = None, **more: Any
    ) -> None:
        super().__init__()
        self.model = open_model(bundle, **more)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """A model by model_args as one text."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """A model by model_args; where they name a device it counts, not the harness's option."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == UNASKED_DEVICE:
            del options["device"]
        return cls(**{**options, **arg_dict})

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(logprob, greedy) of each request's continuation."""
        found = self.model.loglikelihoods([request.args for request in requests])
        return _gathered(self, "loglikelihood", requests, found, silent=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The logprob of each request's text."""
        found = self.model.rolling([request.args[0] for request in requests])
        return _gathered(self, "loglikelihood_rolling", requests, found, silent=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The reply to each request."""
        found = self.model.generate([request.args for request in requests])
        return _gathered(self, "generate_until", requests, found, silent=disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as a prompt."""
        return self.model.template(chat_history, opened=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self.model.tokens.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is applied, where one is asked for."""
        return self.model.tokens.chat_template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to the results' config."""
        return {NAME: self.model.facts()}


@functools.cache
def lm_class() -> Any:
    """The harness's kind of model; its arguments are those of `open_model`."""
    from lm_eval.api.model import LM

    return type("Bundle", (Methods, LM), {})


def _gathered(
    lm: Methods, kind: str, requests: Sequence[Any], found: Iterator[tuple[int, T]], *, silent: bool
) -> list[T]:
    """What comes in any order in the order of the requests; the harness keeps it as it comes, if told to."""
    from tqdm import tqdm

    before = asdict(lm.model.counts)
    results: dict[int, T] = {}
    with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=silent) as bar:
        for place, value in found:
            results[place] = value
            lm.cache_hook.add_partial(kind, requests[place].args, value)
            bar.update()
    _say(before, asdict(lm.model.counts))
    return [results[place] for place in range(len(requests))]


def _say(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """What had to be done to requests since `before`."""
    for name, line in SAID.items():
        if after[name] > before[name]:
            log.warning(line, after[name] - before[name])


def register() -> None:
    """Make the harness know the model `rlkit`; may be called again."""
    import lm_eval.models  # noqa: F401, its own come first: it adds them where it finds no model at all
    from lm_eval.api.registry import model_registry

    model_registry.register(NAME, target=lm_class())


def harness(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="...", help="lm_eval's own: run (or nothing), ls, validate; options.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the harness's results as one line of JSON.")] = False,
) -> None:
    """Run lm-evaluation-harness with bundles: its own command lm_eval, which here knows the model rlkit.

    --model_args takes bundle=FOLDER, and where wanted adapter=, device=, kv=, threads=, workers=, max_length=,
    add_bos_token= and prefix_token_id=. Other options are the harness's: rlkit lm-eval -- run --help lists them.

    Example: rlkit lm-eval --model_args bundle=./bundle --tasks arc_easy,hellaswag --limit 100
    """
    words = list(arguments or [])
    register()
    if words and words[0] not in ("ls", "validate") and not _names(words, "--model", "-M", "--config", "-C"):
        words += ["--model", NAME]
    if not json:
        _call(words)
        return
    if _names(words, "--output_path", "-o"):
        raise ValueError("--json prints what --output_path writes; leave one of them out")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        _call([*words, "--output_path", f"{folder}/results.json"])
        written = list(Path(folder).glob("results_*.json"))
        results = _read(written[0]) if written else {}
    console.emit_json_line({"schema_version": 1, **results})


def _read(file: Path) -> dict[str, Any]:
    """The harness's results; what is no number there is null."""
    found: dict[str, Any] = jsons.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _name: None)
    return found


def _names(words: Sequence[str], *options: str) -> bool:
    return any(word in options or word.startswith(tuple(f"{option}=" for option in options)) for word in words)


def _call(words: Sequence[str]) -> None:
    """The harness's own command; it reads its arguments from the process's."""
    from lm_eval.__main__ import cli_evaluate

    kept = sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = kept
