"""The commands that make folders: `recover` (model -> checkpoint) and `export` (checkpoint -> bundle).

Both do their work elsewhere; here the options are read, the plan is shown for --dry-run, and the result is told. torch
is imported only when there is work to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, heldout
from rlkit.export import plan
from rlkit.recover import assets, atomic, contents, source
from rlkit.recover import recipe as recipes
from rlkit.recover.progress import Tell

Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to make; it is complete or absent.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be made, and stop.")]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Held-out text to measure on: a text asset (lambada), or a .txt or .jsonl file."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def recover(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A model: asset name, hub id, Hugging Face folder or .gguf file.")],
    out: Out,
    recipe: Annotated[
        str, typer.Option(help=f"Which tensors get how many bits: {', '.join(recipes.NAMED)}, or a TOML file.")
    ] = "w4w2-gateup",
    sequences: Annotated[int, typer.Option(min=16, help="How many texts to sample from the model.")] = 384,
    length: Annotated[int, typer.Option(min=8, help="Tokens in each of them.")] = 128,
    steps: Annotated[int, typer.Option(min=0, help="Distillation steps; 0 leaves distillation out.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Sampling and training repeat with the same seed.")] = 0,
    text: Text = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Quantize a model and recover its accuracy on text that the model writes itself; the result is a checkpoint.

    The same call continues where an interrupted one stopped.

    Example: rlkit recover smollm2-135m -o ./checkpoint --recipe w4w2-gateup
    """
    chosen = recipes.load(recipe)
    atomic.refuse_existing(out, force=force)
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        if found.kind not in (source.SourceKind.HF, source.SourceKind.GGUF):
            raise ValueError(f"{model} is a {found.kind} already; name the model it was made of")
        planned = plan.plan_recipe(source.read_shape(found), chosen)
        if dry_run:
            _show_plan(planned, out, json)
            return
        from rlkit.recover import distill, recovery, synthesize

        settings = recovery.Settings(
            sampling=synthesize.Sampling(sequences=sequences, length=length, seed=seed),
            distillation=distill.Distillation(steps=steps, seed=seed),
        )
        against = heldout.find(found, text).against if text else None
        recovery.recover(found, chosen, out, settings=settings, against=against, force=force, tell=tell)
    if not json:
        _show_stages(source.read_json(out / "recovery.json"))
    _made(out, json, next_step=f"rlkit export {out} -o BUNDLE")


def export(  # noqa: PLR0913, one parameter per option of the command
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, made by rlkit recover.")],
    out: Out,
    target: Annotated[str, typer.Option(help=f"Where it will run: {', '.join(plan.TARGETS)}.")] = "cpu",
    accuracy_level: Annotated[int, typer.Option(help="4: int8 activations, fast. 0: exact and slow, for checks.")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads written into the bundle; all cores unless told.")
    ] = None,
    text: Text = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: an ONNX model that stock onnxruntime-genai runs.

    Example: rlkit export ./checkpoint --target cpu -o ./bundle
    """
    atomic.refuse_existing(out, force=force)
    found = source.resolve(checkpoint)
    if found.kind is not source.SourceKind.CHECKPOINT:
        raise ValueError(f"{checkpoint} is a {found.kind}, not a checkpoint; make one with `rlkit recover`")
    if dry_run:
        _show_plan(plan.plan_checkpoint(found.path, target=target, accuracy_level=accuracy_level), out, json)
        return
    from rlkit.export import build

    with console.progress(quiet=json) as tell:
        measure = _measure(found.path, text, tell) if text else None
        build.export_bundle(
            found.path,
            out,
            target=target,
            accuracy_level=accuracy_level,
            threads=threads,
            force=force,
            tell=tell,
            measure=measure,
        )
    _made(out, json, next_step=f'rlkit run {out} "Hello"')


def _measure(checkpoint: Path, text: str, tell: Tell) -> heldout.Measure:
    """The measure of an exported file on `text`, against the model that the checkpoint says it was made of."""
    stated = checkpoint / "recovery.json"
    if not stated.is_file():
        raise ValueError(f"{checkpoint} does not say what it was made of (recovery.json); leave --text out")
    original = source.resolve(source.read_json(stated)["source"]["reference"])
    held_out = heldout.find(original, text)
    heldout.keep_original(held_out, original, tell)
    return heldout.measure_bundle(held_out, checkpoint, tell)


def _show_plan(planned: plan.Plan, out: Path, json: bool) -> None:
    """What a bundle will hold, by kind of tensor."""
    if json:
        console.emit_json({"schema_version": 1, "path": str(out), "plan": planned.to_json()})
        return
    rows: dict[tuple[Any, ...], int] = {}
    for tensor in planned.tensors:
        key = (tensor.kind, tensor.bits, tensor.group or "-", tensor.kernel)
        rows[key] = rows.get(key, 0) + tensor.nbytes
    order = sorted(rows.items(), key=lambda row: contents.KINDS.index(row[0][0]))
    cells = [(*key, console.nbytes_text(nbytes)) for key, nbytes in order]
    cells.append(("all", "-", "-", "-", console.nbytes_text(planned.nbytes)))
    console.table(("tensors", "bits", "group", "kernel", "bytes"), cells, title=f"bundle for {planned.target.name}")
    console.say(f"nothing is made with --dry-run; without it: {out}")


def _show_stages(recovery: dict[str, Any]) -> None:
    """The divergence after each stage that measured one."""
    columns = ("stage", "time", "KL, nats/token", "same top-1")
    rows = [(row["stage"], console.duration(row["seconds"]), *_figures(row)) for row in recovery["stages"]]
    console.emit(f"divergence from the original on {recovery['measured_on']}")
    console.table(columns, rows)


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    found = row["divergence"]
    return (f"{found['kl_mean']:.4f}", f"{100 * found['top1_agreement']:.1f}%") if found else ("-", "-")


def _made(out: Path, json: bool, *, next_step: str) -> None:
    facts = contents.describe(source.resolve(out))
    if json:
        console.emit_json(facts)
        return
    nbytes = sum(row["nbytes"] for row in facts["tensors"])
    console.emit(f"{out}: {facts['kind']}, {console.nbytes_text(nbytes)} of tensors")
    console.say(f"next: {next_step}")
