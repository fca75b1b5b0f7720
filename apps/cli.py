"""The command `rlkit`: one table of commands; a command's module is imported only when that command is called.

Typer wants every function to draw the list of commands, so commands that are not called stand in as empty functions
with the table's line as their help. That keeps `rlkit --help` from importing what the commands need.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer

from rlkit.apps import errors

ABOUT = (
    "Make a language model small, accurate and fast on this computer: quantize, recover, export, run, profile.\n\n"
    "First steps: rlkit demo. A MODEL is an asset name (rlkit assets), a hub id, a Hugging Face folder, "
    "a .gguf file, or a folder that rlkit made. Exit codes: 0 ok, 1 failed, 2 bad usage or input, 130 interrupted."
)


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command's function lives, its line in the list, and its part of the list.

    `foreign` commands hand options that they do not know to another program.
    """

    function: str
    line: str
    panel: str
    foreign: bool = False


HOLDING_WEIGHTS = ("run", "chat", "serve", "calibrate", "compare")  # start themselves once more, to have huge pages
COMMANDS = {
    "demo": Command("rlkit.apps.demo:demo", "The whole path on a small real model, ending in a report.", "Start here"),
    "assets": Command("rlkit.apps.get:assets", "List the named models and texts.", "Models"),
    "pull": Command("rlkit.apps.get:pull", "Download a named model or text, or a model of the hub.", "Models"),
    "inspect": Command("rlkit.apps.get:inspect", "Say what a model is: shape, bits and bytes.", "Models"),
    "corrupt": Command("rlkit.apps.damage:corrupt", "Damage a model on purpose, to recover it.", "Make"),
    "synthesize": Command("rlkit.apps.synth:synthesize", "Let a model write text to learn from.", "Make"),
    "recover": Command("rlkit.apps.make:recover", "Quantize a model and recover its accuracy.", "Make"),
    "export": Command("rlkit.apps.ship:export", "Turn a model or checkpoint into an ONNX bundle.", "Make"),
    "lint": Command("rlkit.apps.check:lint", "Find what would run slowly or not at all on a device.", "Make"),
    "kv-calibrate": Command("rlkit.apps.kvcalibrate:kv_calibrate", "Add quantized KV caches to a bundle.", "Make"),
    "card": Command("rlkit.apps.publish:card", "Write a bundle's model card from its manifest.", "Make"),
    "push": Command("rlkit.apps.publish:push", "Upload a bundle to the hub.", "Make"),
    "run": Command("rlkit.apps.talk:run", "Complete or answer one prompt.", "Use"),
    "chat": Command("rlkit.apps.chat:chat", "Talk with a bundle in the terminal.", "Use"),
    "tune": Command("rlkit.apps.tune:tune", "Find the fastest settings for a bundle on this machine.", "Use"),
    "doctor": Command("rlkit.apps.doctor:doctor", "What this machine can run, what is missing, the fix.", "Know"),
    "serve": Command("rlkit.apps.serve:serve", "Serve bundles to OpenAI's clients, with a web page.", "Use"),
    "bench": Command("rlkit.apps.measure:bench", "Measure time to first token, tokens/s and memory.", "Know"),
    "compare": Command("rlkit.apps.compare:compare", "Put the forecast beside what a bundle does here.", "Know"),
    "eval": Command("rlkit.apps.evaluate:run_eval", "Measure accuracy on benchmarks, and recovery.", "Know"),
    "lm-eval": Command("rlkit.apps.lmeval:harness", "Run lm-evaluation-harness on a bundle.", "Know", foreign=True),
    "depth": Command("rlkit.apps.depth:app", "Depth networks: train, make smaller, export, measure.", "Make"),
    "kv": Command("rlkit.apps.frontier:frontier", "Find the frontier of memory and accuracy over KV caches.", "Know"),
    "calibrate": Command("rlkit.apps.calibrate:calibrate", "Measure this machine, for forecasts.", "Know"),
    "devices": Command("rlkit.apps.devices:devices", "What is known of processors, with every source.", "Know"),
    "forecast": Command("rlkit.apps.forecast:forecast", "Forecast speed, memory and energy on a device.", "Know"),
    "profile-models": Command(
        "rlkit.apps.profilemodels:profile_models", "Time real ONNX models here, for schedules.", "Know"
    ),
    "schedule": Command("rlkit.apps.schedule:schedule", "Compare scheduling policies on a scenario.", "Know"),
    "report": Command("rlkit.apps.report:report", "Merge several machines' results into a table and a page.", "Know"),
}


def load(command: Command) -> Callable[..., Any]:
    """Import a command's function."""
    module, _colon, name = command.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application for these arguments: only the command they name is imported."""
    app = typer.Typer(help=ABOUT, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        function = load(command) if name == called else _elsewhere
        described = command.line if function is _elsewhere else None
        settings = {"ignore_unknown_options": command.foreign}
        shown: dict[str, Any] = {"help": described, "short_help": command.line, "rich_help_panel": command.panel}
        if isinstance(function, typer.Typer):  # a command that has commands
            app.add_typer(function, name=name, short_help=command.line, rich_help_panel=command.panel)
            continue
        app.command(name, context_settings=settings, **shown)(function)
    return app


def _elsewhere() -> None:
    """Stands in for a command that is not called."""


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _version(asked), help="Show the version.")
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"rlkit {version('rlkit-edge')}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command line (none means --help); errors are printed, the exit code is returned."""
    words = list(arguments) or ["--help"]
    try:
        code = typer.main.get_command(build(words)).main(words, prog_name="rlkit", standalone_mode=False)
    except typer.TyperException as error:  # bad usage: the parser's own words
        return _bad_usage(error)
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error)
    if code == errors.ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code
        return errors.report(KeyboardInterrupt())
    return code if isinstance(code, int) else errors.ExitCode.OK


def _bad_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "rlkit"
    message = " ".join(error.format_message().split()).rstrip(".")
    print(f"error: {message}; see `{path} --help`", file=sys.stderr)
    return errors.ExitCode.BAD_INPUT


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminated)
    if sys.argv[1:2] and sys.argv[1] in HOLDING_WEIGHTS:
        from rlkit.runtime import hugepages

        hugepages.restart()
    code = run(sys.argv[1:])
    if code == errors.ExitCode.INTERRUPTED:
        # Python ends itself with SIGINT if the interrupt ever passed through an exec() of a library, handled or not.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
