"""The command `tune`: measure a bundle's session options on this machine, and keep the best for every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console
from rlkit.profiles import options, tunerun
from rlkit.profiles import tune as search
from rlkit.profiles.tune import Outcome, Trial, Verdict
from rlkit.runtime import tuned as settings
from rlkit.runtime import tunedbundle

MOST_SECONDS = 3600.0


def tune(  # noqa: PLR0913, one parameter per option of the command
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, made by rlkit export.")],
    seconds: Annotated[float, typer.Option(help="Begin nothing new after this time.")] = search.SECONDS,
    write: Annotated[
        bool, typer.Option("--write", help="Write into the bundle, to take along, and not into the cache folder.")
    ] = False,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Also try other kernels, which round differently.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and keep nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Keep what was found on a busy machine too.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Measure nothing and go back to the defaults.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Find the fastest threads, affinity, spinning, memory and page options for a bundle here, in under two minutes.

    Each setting runs in a process of its own, in turns with the best so far; it is kept where prompts and replies
    together are faster by more than the noise, and where little else was running. run, chat, serve and bench use what
    was found, on this machine and for bundles of this form; RLKIT_TUNED=off leaves it alone.

    Example: rlkit tune ./bundle && rlkit bench ./bundle
    """
    if forget:
        _forget(bundle, json=json)
        return
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"--seconds {seconds} is outside 0..{MOST_SECONDS:.0f}; a hundred are enough for most")
    with console.progress(quiet=json) as tell:
        outcome = tunerun.tune_bundle(bundle, seconds=seconds, inexact=inexact, tell=tell)
    path = None if dry_run or (outcome.busy and not force) else _keep(bundle, outcome, write=write)
    if json:
        where = None if path is None else str(path)
        console.emit_json({"schema_version": 1, "bundle": str(bundle), "file": where, **outcome.to_json()})
        return
    _show(outcome, path)


def _keep(bundle: Path, outcome: Outcome, *, write: bool) -> Path:
    kept = search.kept(outcome, tunerun.about(bundle))
    if write:
        settings.forget(bundle)  # what the bundle says shall count
        return tunedbundle.write(bundle, kept)
    return settings.save(bundle, kept)


def _forget(bundle: Path, *, json: bool) -> None:
    gone = [path for path in (settings.forget(bundle), tunedbundle.undo(bundle)) if path is not None]
    if json:
        console.emit_json({"schema_version": 1, "bundle": str(bundle), "forgotten": [str(path) for path in gone]})
        return
    console.emit(
        f"forgotten: {', '.join(map(str, gone))}" if gone else f"nothing was kept for {bundle} on this machine"
    )


def _show(outcome: Outcome, path: Path | None) -> None:
    if outcome.busy:
        used = f"other programs used {100 * (outcome.load or 0):.0f} % of the machine"
        advice = "tune again while nothing else runs" + ("" if path else ", or keep it with --force")
        console.say(f"{used}: what was found suits a busy one{'' if path else ' and is not kept'}; {advice}")
    rows = [row(trial) for trial in outcome.trials]
    if rows:
        console.table(("varied", "tried", "time", "prompt", "reply", "noise", ""), rows)
    for line in lines(outcome):
        console.emit(line)
    if path is not None:
        console.emit(f"kept in {path}")


def row(trial: Trial) -> tuple[str, ...]:
    """One line: times relative to what led then, below 100 % is faster."""
    verdict = trial.verdict
    said = "taken" if trial.won else trial.note
    if verdict is None:
        return trial.axis, trial.label, "-", "-", "-", "-", said
    figures = (verdict.cost, verdict.prefill, verdict.decode, verdict.noise)
    return trial.axis, trial.label, *(f"{100 * figure:.1f} %" for figure in figures), said


def lines(outcome: Outcome) -> Iterator[str]:
    """What was found, for a person."""
    if not outcome.changed:
        threads = options.counted(outcome.default.threads)
        yield f"the default is best here: {threads}; {console.duration(outcome.seconds)}"
    else:
        found = [f"{name}={value}" for name, value in outcome.tuned.session_options.items()]
        yield f"best here: {', '.join([options.counted(outcome.tuned.threads), *found])}{_gain(outcome.against)}"
    if outcome.tuned.advice is not None:
        yield f"faster still, where a command is started so, as bench does: {outcome.tuned.advice} rlkit run ..."
    if outcome.left_out:
        yield f"not tried for want of time: {', '.join(outcome.left_out)}; give more with --seconds"


def _gain(against: Verdict | None) -> str:
    if against is None:
        return ""
    prompts, replies = (f"{100 * (1 / time - 1):+.1f} %" for time in (against.prefill, against.decode))
    return f"; against the default prompts {prompts}, replies {replies} tokens/s"
