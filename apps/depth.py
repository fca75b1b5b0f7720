"""The commands `depth ...`: train, slim, export, eval, demo; depth from one image, or disparity of a pair.

Options become a work folder's settings here; what is done in the folder is depthwork.py and depthsuite.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, depthscore, depthsuite, depthwork
from rlkit.apps.depthdemo import demo
from rlkit.apps.depthshow import check_cuts, finish, held_out, show, work_of
from rlkit.apps.depthsuite import Asked
from rlkit.apps.depthwork import CUTS, DEFAULTS, FULL, SAME, Settings, Work
from rlkit.profiles.depthresult import DepthResult, Row, Suite
from rlkit.recover import depthfile
from rlkit.recover.atomic import refuse_existing
from rlkit.recover.depthfile import Kind

ABOUT = """Depth from one image, or disparity of a pair: train networks, make smaller ones, export and measure them.

Networks learn from rendered scenes or a folder of KITTI, SceneFlow or DIODE. `train` makes a work folder with the full
network, `slim` adds smaller ones and measures all; every command but export takes --json.

Example: rlkit depth demo
"""
app = typer.Typer(help=ABOUT, add_completion=False)
app.command()(demo)

KindOption = Annotated[Kind, typer.Argument(help="mono: depth from one image; stereo: disparity of a pair.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="Work folder; a second call goes on in it.")]
Steps = Annotated[int | None, typer.Option(min=0, help="Training steps.")]
Size = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH of what is learned from, multiples of 16; 96x128, 128x256.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Images or pairs per step.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate.")]
Pool = Annotated[int | None, typer.Option(min=1, help="Rendered scenes to learn from.")]
DataFolder = Annotated[
    Path | None, typer.Option(help="A folder of KITTI, SceneFlow or DIODE to learn from, instead of rendered scenes.")
]
Seed = Annotated[int, typer.Option(min=0, help="Draws scenes, cuts and first weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Count = Annotated[int, typer.Option(min=1, help="Held-out scenes, or samples of a folder, to measure on.")]
Motorcycle = Annotated[bool, typer.Option(help="Also measure on the Motorcycle pair (12 MB, fetched once).")]


@app.command()
def train(  # noqa: PLR0913, one parameter per option of the command
    kind: KindOption,
    output: Out,
    steps: Steps = None,
    size: Size = None,
    batch: Batch = None,
    rate: Rate = None,
    pool: Pool = None,
    data: DataFolder = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a depth network from nothing, into OUTPUT/networks/full; an interrupted call goes on.

    Example: rlkit depth train mono -o ./depth
    """
    given = {"steps": steps, "batch": batch, "rate": rate, "pool": pool, "data": data and data.absolute()}
    settings = _settings(DEFAULTS[kind], size, seed, given)
    work = Work(output, settings)
    with console.progress(quiet=json) as tell:
        work.train_full(tell)
    made = depthfile.read(work.folder(FULL))
    if json:
        console.emit_json({"schema_version": 1, "folder": str(work.folder(FULL)), **made.to_json()["made"]})
        return
    console.say(f"network: {work.folder(FULL)}")
    console.say(f"next: rlkit depth slim {output}")


@app.command()
def slim(  # noqa: PLR0913, one parameter per option of the command
    folder: Annotated[Path, typer.Argument(help="A work folder of rlkit depth train.")],
    cuts: Annotated[
        str | None, typer.Option(help="level, widths:0.5, prune:0.25[:FLOPs], spn:4, + between steps, commas between.")
    ] = None,
    steps: Steps = None,
    rate: Rate = None,
    lesson: Annotated[
        str | None, typer.Option(help="What smaller networks learn from: truth, teacher (the full one), both.")
    ] = None,
    count: Count = 64,
    data: Annotated[Path | None, typer.Option(help="A folder to measure on as well: KITTI, SceneFlow, DIODE.")] = None,
    motorcycle: Motorcycle = True,
    int8: Annotated[bool, typer.Option(help="Also make int8 files.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="Time frames for so long; 0 = not.")] = 20.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a timed network.")] = 1,
    forecast: Annotated[bool, typer.Option(help="Also forecast frames; measures single operators once.")] = True,
    json: Json = False,
) -> None:
    """Make smaller networks of the full one, let it teach them, and measure all: a frontier, with baselines.

    Writes depth.json, report.html and pictures into the folder. Networks that are there stay; other cuts are added.

    Example: rlkit depth slim ./depth --cuts level,widths:0.5,prune:0.1
    """
    work = work_of(folder, steps=steps, rate=rate, lesson=lesson)
    names = words(cuts) or CUTS[work.settings.kind]
    check_cuts(work.settings.kind, names)
    with console.progress(quiet=json) as tell:
        for name in (SAME, *names):
            work.slim(name, tell)
        held = held_out(work.settings, count, tell, data=data, motorcycle=motorcycle)
        asked = Asked(int8=int8, seconds=seconds, threads=threads, forecast=forecast)
        suite = depthsuite.measure(work, (FULL, SAME, *names), held, asked, tell)
    finish(folder, (suite,), json=json)


@app.command("export")
def export_network(
    network: Annotated[Path, typer.Argument(help="A network's folder, such as ./depth/networks/level.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: NAME.onnx.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; any multiples of the stride unless told.")] = None,
    stage: Annotated[int | None, typer.Option(help="Of a stereo network: end there.")] = None,
    unroll: Annotated[bool, typer.Option("--unroll", help="No loop in the graph, for devices that run none.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a network as ONNX, for any size of image or for one.

    Example: rlkit depth export ./depth/networks/level -o level.onnx
    """
    from rlkit.export.vision import export_depth

    refuse_existing(output, force=force)
    export_depth(network, output, size=None if size is None else size_of(size), stage=stage, unroll=unroll)
    console.say(f"file: {output} ({console.nbytes_text(output.stat().st_size)})")
    console.say(f"next: rlkit depth eval {output}")


@app.command("eval")
def evaluate(
    network: Annotated[Path, typer.Argument(help="A network's folder, or its .onnx file.")],
    count: Count = 64,
    data: Annotated[Path | None, typer.Option(help="A folder to measure on as well: KITTI, SceneFlow, DIODE.")] = None,
    motorcycle: Motorcycle = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime, for .onnx files.")] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result, its page and pictures as PNG.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure a network on held-out data, with a constant and (for pairs) semi-global matching in the same table.

    Example: rlkit depth eval ./depth/networks/full -o ./measured
    """
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists already; choose another -o")
    description, predict = _opened(network, threads)
    settings = _learned_with(description)
    with console.progress(quiet=json) as tell:
        held = held_out(settings, count, tell, data=data, motorcycle=motorcycle)
        scored = depthscore.scores(held, predict, description.scale)
        learned = depthwork.samples_of(settings).first(depthscore.LEARNED_FROM)
        rows = [_sized(Row(network.name, "as given", scored), network, description)]
        rows += depthscore.baselines(held, learned, description.scale, tell)
        shown = depthscore.pictures(held, {network.name: predict}) if output else ()
    suite = Suite(description.kind, *description.size, tuple(each.data for each in held), tuple(rows), pictures=shown)
    if output is not None:
        finish(output, (suite,), json=json)
    elif json:
        console.emit_json(DepthResult((suite,)).to_json())
    else:
        show(suite)


def _learned_with(description: depthfile.Description) -> Settings:
    """How a network learned, so that the constant is that of its data; the usual way if it does not say."""
    try:
        settings = depthwork.settings_of(description)
    except ValueError:
        settings = DEFAULTS[description.kind]
    data = settings.data if settings.data and settings.data.is_dir() else None
    return replace(settings, size=description.size, data=data)


def _sized(row: Row, network: Path, description: depthfile.Description) -> Row:
    """A row with the sizes of a network's folder; a file may hold a part of its network, so that it is not counted."""
    if network.suffix == ".onnx":
        return row
    from rlkit.recover import slim

    sizes = slim.sizes(depthfile.load(network)[0], *description.size)
    return replace(row, parameters=sizes.parameters, flops=sizes.flops, nbytes=sizes.nbytes)


def _opened(network: Path, threads: int) -> tuple[depthfile.Description, depthscore.Predict]:
    if network.suffix == ".onnx":
        from rlkit.runtime.visionrun import open_depth

        run = open_depth(network, threads=threads)
        return run.facts.description, lambda *images: [run(*images)]
    from rlkit.recover import depthpredict

    module, description = depthfile.load(network)
    return description, depthpredict.predictor(module, description.scale)


def _settings(base: Settings, size: str | None, seed: int, given: dict[str, Any]) -> Settings:
    told: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    told |= {} if size is None else {"size": size_of(size)}
    return replace(base, seed=seed, **told)


def size_of(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as two numbers; ValueError if it is none."""
    height, by, width = text.partition("x")
    if not (by and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"size {text!r} is none of an image; write HEIGHTxWIDTH, such as 96x128")
    return int(height), int(width)


def words(text: str | None) -> tuple[str, ...]:
    """What stands between commas, each once, without spaces."""
    return tuple(dict.fromkeys(filter(None, ("".join(part.split()) for part in (text or "").split(",")))))
