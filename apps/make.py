"""The command `recover`: model -> checkpoint.

The work is done elsewhere; here the options are read, the plan is shown for --dry-run, and the result is told. torch
is imported only when there is work to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, damage, heldout, ship
from rlkit.export import plan
from rlkit.recover import allocate, assets, atomic, source
from rlkit.recover import recipe as recipes
from rlkit.recover.progress import silent
from rlkit.recover.recipe import METHODS, QUANTIZERS

Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to make; it is complete or absent.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be made, and stop.")]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Held-out text to measure on: a text asset (lambada), or a .txt or .jsonl file."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def recover(  # noqa: PLR0913, one parameter per option of the command
    out: Out,
    model: Annotated[
        str, typer.Argument(help="A model: asset name, hub id, Hugging Face folder or .gguf file.", show_default=False)
    ] = "",
    recipe: Annotated[
        str, typer.Option(help=f"Which tensors get how many bits: {', '.join(recipes.NAMED)}, auto, or a TOML file.")
    ] = "w4w2-gateup",
    budget: Annotated[
        float | None, typer.Option(help="With --recipe auto: stored bits per weight, adapters included.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="With --recipe auto: bytes of the bundle's tensors.")] = None,
    method: Annotated[
        str,
        typer.Option(help=f"How accuracy is recovered: {', '.join(METHODS)}. Unless told, the recipe's, else full."),
    ] = "",
    quantizer: Annotated[
        str,
        typer.Option(
            help=f"How codes are chosen: {', '.join(QUANTIZERS)}. Unless told, the recipe's, else the method's own: "
            "search for recover-lora, gptq for the others."
        ),
    ] = "",
    adapters: Annotated[
        str, typer.Option(help="Adapters and ranks instead of the recipe's: gate-up:32,kv:16, all:8, *.o_proj:4.")
    ] = "",
    corpus: Annotated[
        Path | None, typer.Option(help="Text to learn from, made by rlkit synthesize; sampled unless given.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=16, help="How many texts to sample from the model.")] = 384,
    length: Annotated[int, typer.Option(min=8, help="Tokens in each of them.")] = 128,
    steps: Annotated[int, typer.Option(min=0, help="Distillation steps; 0 leaves distillation out.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts a batch is cut into, to save memory.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations, to save memory.")] = False,
    divergence: Annotated[str, typer.Option(help="What is minimized: forward or reverse KL.")] = "forward",
    temperature: Annotated[float, typer.Option(help="Of both distributions while training.")] = 1.0,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after this many checks on held-out rows without a gain; 0: never.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Sampling and training repeat with the same seed.")] = 0,
    degraded: Annotated[
        Path | None, typer.Option(help="Recover this damaged float model instead of quantizing; needs --teacher.")
    ] = None,
    teacher: Annotated[str, typer.Option(help="The sound model that --degraded came from.")] = "",
    merge: Annotated[bool, typer.Option("--merge", help="With --degraded: fold the adapter into the weights.")] = False,
    text: Text = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Quantize a model and recover its accuracy on text that the model writes itself; the result is a checkpoint.

    The same call continues where an interrupted one stopped. `accelerate launch` runs it on several processes.

    Example: rlkit recover smollm2-135m -o ./checkpoint --recipe w4w2-gateup
    """

    def settings() -> Any:
        from rlkit.recover import distill, placement, recovery, synthesize

        return recovery.Settings(
            method=method,
            quantizer=quantizer,
            adapters=placement.parse(adapters) if adapters else (),
            sampling=synthesize.Sampling(sequences=sequences, length=length, seed=seed),
            distillation=distill.Distillation(
                steps=steps,
                batch=batch,
                accumulate=accumulate,
                checkpointing=checkpointing,
                direction=divergence,
                temperature=temperature,
                check_every=10 if patience else 0,
                patience=patience,
                seed=seed,
            ),
        )

    common: dict[str, Any] = {"text": text, "corpus": corpus, "force": force, "dry_run": dry_run, "json": json}
    if degraded or teacher or merge:
        if model:
            raise ValueError(f"{model} and --degraded are two models to recover; leave one of them out")
        damage.repair_command(degraded, teacher, out, settings, merge=merge, **common)
        return
    if not model:
        raise ValueError("name a model to recover, or --degraded DIR with --teacher MODEL")
    atomic.refuse_existing(out, force=force)
    chosen = None if recipe == "auto" else recipes.load(recipe)
    if chosen is not None and (budget is not None or max_bytes is not None):
        raise ValueError("--budget and --max-bytes choose the recipe themselves; add --recipe auto, or leave them out")
    wanted = chosen or partial(_budget, budget, max_bytes)
    if _quantized(model, out, wanted, settings, **common):
        ship.made(out, json, next_step=f"rlkit export {out} -o BUNDLE")


Wanted = recipes.Recipe | Callable[[source.ModelShape], allocate.Budget]


def _quantized(  # noqa: PLR0913, the options of `recover` that quantizing has a use for
    model: str,
    out: Path,
    wanted: Wanted,
    settings: Callable[[], Any],
    *,
    text: str | None,
    corpus: Path | None,
    force: bool,
    dry_run: bool,
    json: bool,
) -> bool:
    """Quantize and recover, and tell; whether this process has made the checkpoint."""
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        if found.kind not in (source.SourceKind.HF, source.SourceKind.GGUF):
            raise ValueError(f"{model} is a {found.kind} already; name the model it was made of")
        shape = source.read_shape(found)
        recipe = wanted if isinstance(wanted, recipes.Recipe) else wanted(shape)
        if dry_run:
            _show_recovery(recipe, shape, out, json)
            return False
        from rlkit.recover import recovery, team

        against = heldout.find(found, text).against if text else None
        here, chosen = team.assemble(), settings()
        told = tell if here.main else silent
        recovery.recover(
            found, recipe, out, settings=chosen, against=against, corpus=corpus, team=here, force=force, tell=told
        )
    if here.main and not json:
        facts = source.read_json(out / "recovery.json")
        if "auto" in facts:
            _show_auto(facts["auto"], (out / "recipe.toml").read_text(encoding="utf-8"))
        damage.show_stages(facts)
    return here.main


def _show_auto(auto: dict[str, Any], toml: str) -> None:
    """What an automatic recipe decided, unit by unit, and the recipe itself."""
    keys = ("unit", "bits", "group", "adapter_rank", "nbytes", "forecast_kl")
    found = [[row[key] for key in keys] for row in auto["rows"]]
    rows = [(*plain, console.nbytes_text(nbytes), f"{forecast:.4f}") for *plain, nbytes, forecast in found]
    console.table(("unit", "bits", "group", "rank", "bytes", "KL forecast"), rows)
    console.emit(toml)


def _budget(bits_per_weight: float | None, max_bytes: int | None, shape: source.ModelShape) -> allocate.Budget:
    """What --recipe auto may spend; bytes are those of the tensors in the bundle that the recipe would lead to."""
    return allocate.Budget(bits_per_weight, max_bytes, lambda recipe: plan.plan_recipe(shape, recipe).nbytes)


def _show_recovery(wanted: recipes.Recipe | allocate.Budget, shape: source.ModelShape, out: Path, json: bool) -> None:
    """What --dry-run shows: the plan of a recipe; a budget's is known only after measuring."""
    if isinstance(wanted, recipes.Recipe):
        ship.show_plan(plan.plan_recipe(shape, wanted), out, json)
    elif json:
        console.emit_json({"schema_version": 1, "path": str(out), "plan": None, "budget": wanted.name})
    else:
        console.emit(f"the recipe auto-{wanted.name} is found by measuring the model, which --dry-run does not do")
