"""The command `export`: a model, GGUF or checkpoint -> a bundle for a device, checked on the file that ships.

The work is done elsewhere; here options are read, the plan is shown for --dry-run, and the result is told.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, gate, heldout, kvfrom
from rlkit.apps import kvcalibrate as caches
from rlkit.export import npu, plan, request, targets
from rlkit.export.kvscales import SCHEMES, refuse, schemes_named
from rlkit.recover import assets, atomic, contents, source
from rlkit.recover import recipe as recipes

FLOAT = "float"  # as a recipe: round nothing


def export(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, asset name, hub id, Hugging Face folder or .gguf file.", metavar="MODEL"),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make; it is complete or absent.")],
    target: Annotated[str, typer.Option(help=f"Where it will run: {', '.join(targets.DEVICES)}.")] = "cpu",
    provider: Annotated[
        str | None, typer.Option(help="For igpu: webgpu (the default, native 2-bit) or dml (Windows, 2 bits in 4).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of activations where there is a choice: float16, float32.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Bits of a float model, rounded on the way: {', '.join(recipes.NAMED)}, {FLOAT}, or a TOML file; "
            "4 unless given, in groups that suit model and target. `rlkit recover` first keeps more accuracy."
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="4: int8 activations, fast on CPUs. 0: exact and slow, for checks.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads written into the bundle; all cores unless told.")
    ] = None,
    logits: Annotated[
        str, typer.Option(help="last: a prompt's last token only, the rest in logits.onnx. all: every token's.")
    ] = "last",
    fuse: Annotated[
        bool | None, typer.Option(help="Gate and up of a layer as one product; on CPUs unless told.")
    ] = None,
    adapters: Annotated[
        str, typer.Option(help=f"What becomes of the model's own adapter: {', '.join(request.ADAPTER_FORMS)}.")
    ] = "branch",
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR: a PEFT folder kept as a file, switched at run time; repeatable.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Held-out text to measure on: builtin, a text asset (lambada), a .txt or .jsonl file.")
    ] = heldout.BUILTIN,
    measure: Annotated[bool, typer.Option(help="Compare the written file with the model it was made of.")] = True,
    max_kl: Annotated[
        float | None, typer.Option(help="Refuse to ship a file that is further from it, in nats per token.")
    ] = None,
    mode: Annotated[str, typer.Option(help=f"How an NPU runs it: {', '.join(npu.MODES)}.")] = "hybrid",
    finish: Annotated[
        bool, typer.Option("--finish", help="For npu: let AMD's installed tool make the folder that the NPU runs.")
    ] = False,
    kv: Annotated[
        str | None,
        typer.Option(
            help=f"Also quantized KV caches, with commas between: {', '.join(SCHEMES)}; see `rlkit kv-calibrate`."
        ),
    ] = None,
    kv_from: Annotated[
        Path | None, typer.Option(help="The caches that `rlkit kv` chose for this model: its result file.")
    ] = None,
    allow_slow: Annotated[bool, typer.Option("--allow-slow", help="Ship what `rlkit lint` finds fault with.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be made, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Turn a model into a bundle: an ONNX model that stock onnxruntime-genai runs.

    Example: rlkit export ./checkpoint --target cpu -o ./bundle
    """
    atomic.refuse_existing(out, force=force)
    shut = gate.Gate(max_kl)
    if max_kl is not None and not measure:
        raise ValueError(f"--max-kl {max_kl} needs a measurement; leave --no-measure out")
    where = targets.target_named(target, provider, dtype)
    if finish and where.device != "npu":
        raise ValueError(f"--finish is for NPUs, and this is for {where.name}; add --target npu, or leave it out")
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        if kv_from is not None:
            kv = kvfrom.chosen(kv, kv_from, [found]).caches
        wanted = None if kv is None else caches.Wanted(schemes_named(kv), measure=measure, allow_slow=allow_slow)
        options: request.Options = {
            "target": target,
            "provider": provider,
            "dtype": dtype,
            "recipe": _recipe(recipe, found, where),
            "accuracy_level": accuracy_level,
            "threads": threads,
            "logits": logits,
            "fuse": fuse,
            "adapters": adapters,
            "adapter_files": _named_folders(adapter or []),
            "allow_slow": allow_slow,
            "mode": mode,
        }
        planned = request.plan_export(found, **options)
        if wanted is not None:
            refuse(where.name, source.read_shape(found).head_dim, wanted.schemes)
        if dry_run:
            show_plan(planned, out, json)
            return
        from rlkit.export import build

        measured = gate.measure_export(found, gate=shut, yardstick=gate.Yardstick(text), tell=tell) if measure else None
        build.export_bundle(found, out, force=force, tell=tell, measure=measured, **options)
        if wanted is not None:
            caches.add_caches(out, wanted, tell)
        finished = npu.finish(out, force=force, tell=tell) if finish else None
    made(out, json, next_step=_next_step(out, where, finished))


def _next_step(out: Path, where: targets.Target, finished: Path | None) -> str:
    if finished is not None:
        return f"copy {finished} to where Ryzen AI runs it"
    if where.device == "npu":
        return str(source.read_json(out / npu.NOTES)["next"][-1])
    return f'rlkit run {out} "Hello"'


def _recipe(asked: str | None, found: source.Source, where: targets.Target) -> recipes.Recipe | None:
    """The recipe for float matrices: none for a checkpoint unless it is asked for."""
    if asked == FLOAT:
        return None
    if asked is not None:
        return recipes.load(asked)
    return (
        None if found.kind is source.SourceKind.CHECKPOINT else request.default_recipe(where, source.read_shape(found))
    )


def _named_folders(words: list[str]) -> dict[str, Path]:
    """NAME=DIR words by name."""
    named: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter {word!r} is not NAME=DIR; write --adapter german=./adapters/german")
        if name in named:
            raise ValueError(f"--adapter names {name!r} twice; give each adapter a name of its own")
        named[name] = Path(folder)
    return named


def show_plan(planned: plan.Plan, out: Path, json: bool) -> None:
    """What a bundle will hold, by kind of tensor, and why."""
    if json:
        console.emit_json({"schema_version": 1, "path": str(out), "plan": planned.to_json()})
        return
    columns = ("tensors", "bits", "block", "zero points", "level", "kernel", "bytes")
    cells: list[tuple[Any, ...]] = []
    for row in planned.summary():
        level = "-" if row["accuracy_level"] is None else row["accuracy_level"]
        form = (row["kind"], row["bits"], row["group"] or "-", "yes" if row["zero_points"] else "-", level)
        cells.append((*form, row["kernel"], console.nbytes_text(row["nbytes"])))
    cells.append(("all", *["-"] * 5, console.nbytes_text(planned.nbytes)))
    console.table(columns, cells, title=f"bundle for {planned.target.name}")
    for reason in dict.fromkeys(reason for row in planned.summary() for reason in row["reasons"]):
        console.emit(f"- {reason}")
    for note in planned.target.notes:
        console.emit(f"- not verified: {note}")
    console.say(f"nothing is made with --dry-run; without it: {out}")


def made(out: Path, json: bool, *, next_step: str) -> None:
    """Say what a folder that was just made is."""
    facts = contents.describe(source.resolve(out))
    if json:
        console.emit_json(facts)
        return
    nbytes = sum(row["nbytes"] for row in facts["tensors"])
    console.emit(f"{out}: {facts['kind']}, {console.nbytes_text(nbytes)} of tensors")
    for line in _report(out):
        console.emit(line)
    divergence = facts.get("divergence")
    if divergence and "kl_mean" in divergence:
        same = f"{100 * divergence['top1_agreement']:.1f}% same likeliest token"
        console.emit(f"the file that ships: KL {divergence['kl_mean']:.4f} nats per token, {same}")
    elif divergence and "skipped" in divergence:
        console.emit(f"the file that ships was not measured: {divergence['skipped']}")
    for line in _caches(out):
        console.emit(line)
    console.say(f"next: {next_step}")


def _caches(out: Path) -> list[str]:
    """What the quantized KV caches of a bundle save and cost."""
    manifest = out / "rlkit.json"
    found = source.read_json(manifest).get("kv_cache") or {} if manifest.is_file() else {}
    lines = []
    for name, facts in found.items():
        share = f"{facts['nbytes_per_token'] / facts['float_nbytes_per_token']:.1%} of the float cache's bytes"
        cost = facts.get("divergence")
        lines.append(f"kv {name}: {share}" + (f", KL {cost['kl_mean']:.4f} nats per token to it" if cost else ""))
    return lines


def _report(out: Path) -> list[str]:
    """What happened to the tensors of a GGUF, one line for each kind of change; rlkit.json has every tensor."""
    manifest = out / "rlkit.json"
    rows = source.read_json(manifest).get("report") or [] if manifest.is_file() else []
    counts = Counter((row["type"], row["became"], row["why"]) for row in rows)
    return [f"- {count} tensors of {kind}: {became} ({why})" for (kind, became, why), count in counts.items()]
