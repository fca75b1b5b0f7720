"""The command `profile-models`: time real ONNX models and bundles on this machine, for schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles.scheduling import profile as profiles
from rlkit.profiles.scheduling import profilerun
from rlkit.recover import assets
from rlkit.runtime import framebench

MOST_SECONDS = 600.0


def profile_models(  # noqa: PLR0913, one parameter per option of the command
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="[NAME=]MODEL: an ONNX asset, an .onnx file or a bundle folder. None: assets that are here."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile; models in it are kept.")] = Path(
        "profile.json"
    ),
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, as 1,2. Left out: 1, 2, 4, ... all.")] = None,
    device: Annotated[str, typer.Option(help="auto: all that are here; or cpu, webgpu, cuda, ...")] = "auto",
    seconds: Annotated[float, typer.Option(help="About how long each model runs, each way.")] = 1.0,
    chunks: Annotated[str, typer.Option(help="Tokens of a prompt per step, for bundles.")] = "256,64",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, for bundles.")] = 512,
    shape: Annotated[list[str] | None, typer.Option(help="Sizes of an input, as input=1,3,224,224.")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="Download the assets named that are not here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure everything again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Time real models on this machine: frames of ONNX files, prompt chunks and tokens of bundles, by threads.

    Each runs in a process of its own: median and 95th percentile, time to load, memory. What the profile has of the
    same file on this machine is kept, so a run that was interrupted goes on. Nothing is downloaded without --pull.

    Example: rlkit pull silero-vad && rlkit profile-models silero-vad -o profile.json
    """
    plan = _plan(threads, device, seconds, chunks, prompt)
    names = models or _here()
    shapes = _shapes(shape or [])
    if shapes and len(names) != 1:
        raise ValueError(f"--shape goes with one model, not {len(names)}; profile them one after the other")
    wanting = _wanting(names)
    if dry_run:
        _show_plan(names, wanting, plan, json=json)
        return
    before = profiles.read(output) if output.exists() and not force else None
    with console.progress(quiet=json) as tell:
        for asset in wanting if pull else ():
            assets.fetch(asset, tell)
        subjects = [profilerun.subject(name, shapes) for name in names]
        made = begun = before or profilerun.fresh()
        for made in profilerun.profile(subjects, plan, begun, tell=tell):
            profiles.write(output, made)
    if json:
        console.emit_json(made.to_json())
        return
    console.table(COLUMNS, [_cells(row) for row in profilerun.to_rows(made)])
    for entry in made.models:
        console.emit(f"- {entry.name}: {entry.origin}{f', {entry.license}' if entry.license else ''}")
    console.emit(f"written to {output}")


COLUMNS = ("model", "on", "threads", "frame or step", "median, ms", "95 %, ms", "load, ms", "memory, MB")


def _plan(threads: str | None, device: str, seconds: float, chunks: str, prompt: int) -> profilerun.Plan:
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"--seconds {seconds} is outside 0..{MOST_SECONDS:.0f}")
    numbers = profilerun.thread_counts() if threads is None else _numbers("--threads", threads, 1024)
    where = [device] if device != "auto" else ["cpu", *framebench.others()]
    for name in where:
        framebench.available(name)  # ValueError if it is not here
    sizes = _numbers("--chunks", chunks, 8192)
    if not max(sizes) <= prompt <= 1 << 20:
        raise ValueError(f"--prompt {prompt} is less than a chunk of {max(sizes)}, or too long; use {2 * max(sizes)}")
    return profilerun.Plan(profilerun.places(where, numbers), seconds, sizes, prompt)


def _numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= most for part in parts):
        raise ValueError(f"{option} {text!r} must be numbers from 1 to {most} with commas between them, as in 1,2")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        if not equals or not name:
            raise ValueError(f"--shape {text!r} is no shape; write it as input=1,3,224,224")
        found[name] = _numbers("--shape", sizes, 1 << 30) if sizes else ()
    return found


def _here() -> list[str]:
    """ONNX assets that are downloaded; ValueError with the command to get one."""
    known = profilerun.onnx_assets()
    found = [asset.name for asset in known if assets.cached(asset) is not None]
    if not found:
        smallest = min(known, key=lambda asset: asset.nbytes)
        names = ", ".join(asset.name for asset in known)
        raise ValueError(f"no ONNX asset is downloaded ({names}); run: rlkit pull {smallest.name}, or name a model")
    return found


def _wanting(names: list[str]) -> list[assets.Asset]:
    """Assets among the names that are not downloaded."""
    known = {asset.name: asset for asset in profilerun.onnx_assets()}
    asked = [name.rpartition("=")[2] for name in names]
    return [known[name] for name in asked if name in known and assets.cached(known[name]) is None]


def _show_plan(names: list[str], wanting: list[assets.Asset], plan: profilerun.Plan, *, json: bool) -> None:
    nbytes = {asset.name: asset.nbytes for asset in wanting}
    if json:
        where = [{"provider": provider, "threads": number} for provider, number in plan.places]
        console.emit_json({"schema_version": 1, "models": names, "places": where, "downloads": nbytes})
        return
    on = ", ".join(f"{provider} x {number}" for provider, number in plan.places)
    for name in names:
        size = nbytes.get(name.rpartition("=")[2])
        console.emit(f"{name}: {on}{'' if size is None else f'; {console.nbytes_text(size)} to download first'}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    steps = row["steps"]
    name = f"{row['name']} {row['recipe']}".strip()
    memory = "" if row["memory_nbytes"] is None else f"{row['memory_nbytes'] / 1e6:.1f}"
    what = " / ".join({0: "frame", 1: "token"}.get(step["tokens"], f"{step['tokens']} tokens") for step in steps)
    medians, late = (" / ".join(f"{1e3 * step[key]:.3g}" for step in steps) for key in ("seconds", "p95_seconds"))
    return name, row["provider"], str(row["threads"]), what, medians, late, f"{1e3 * row['load_seconds']:.0f}", memory
