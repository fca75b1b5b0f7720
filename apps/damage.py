"""Damage other than quantization: the command `corrupt`, and what `recover` calls to repair a float model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.recover import assets, atomic, source

KINDS = ("noise", "dtype", "zero", "swap", "truncate", "prune")  # of recover/corrupt.py, which needs torch


def corrupt(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A full-precision model: asset name, hub id, folder or .gguf file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make; it is complete or absent.")],
    kind: Annotated[str, typer.Option(help=f"What to do to the weights: {', '.join(KINDS)}.")] = "noise",
    amount: Annotated[
        float | None,
        typer.Option(
            help="How much; each kind has a usual one. noise: fraction of the weights' root mean square. zero, swap, "
            "prune: share of blocks, rows, weights. truncate: mantissa bits kept. dtype: powers of two lost in float8."
        ),
    ] = None,
    match: Annotated[
        list[str] | None, typer.Option(help='Which matrices, as a pattern of module names; repeatable. ["*_proj"]')
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed does the same damage.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be damaged, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Damage a model's weights on purpose; the result is a Hugging Face folder to try recovery on.

    Example: rlkit corrupt smollm2-135m -o ./damaged --kind noise --amount 0.2
    """
    atomic.refuse_existing(out, force=force)
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        from rlkit.recover import corrupt as damages

        damage = damages.Damage(kind, amount, tuple(match or ("*_proj",)), seed)
        sizes = damage.matrices(found)
        if not dry_run:
            damages.corrupt(found, damage, out, force=force, tell=tell)
    if dry_run:
        _show_matrices(out, f"{kind} {damage.strength:g}", sizes, json)
        return
    facts = source.read_json(out / damages.FILE)
    if json:
        console.emit_json({"path": str(out), **facts})
        return
    _show_damage(facts)
    console.emit(f"{out}: {model} with {kind} {damage.strength:g} in {len(sizes)} matrices")
    console.say(f"next: rlkit recover --degraded {out} --teacher {model} -o RECOVERED")


def _show_matrices(out: Path, what: str, sizes: dict[str, tuple[int, int]], json: bool) -> None:
    if json:
        rows = [{"module": name, "shape": list(size)} for name, size in sizes.items()]
        console.emit_json({"schema_version": 1, "path": str(out), "matrices": rows})
        return
    kinds: dict[tuple[str, str], int] = {}
    for name, (n, k) in sizes.items():
        key = (name.rpartition(".")[2], f"{n} x {k}")
        kinds[key] = kinds.get(key, 0) + 1
    console.table(("matrix", "size", "how many"), [(*key, count) for key, count in kinds.items()], title=what)
    console.say(f"nothing is made with --dry-run; without it: {out}")


def _show_damage(facts: dict[str, Any]) -> None:
    errors: dict[str, list[float]] = {}
    for name, row in facts["matrices"].items():
        errors.setdefault(name.rpartition(".")[2], []).append(row["relative_error"])
    rows = [(name, len(found), f"{sum(found) / len(found):.4f}", f"{max(found):.4f}") for name, found in errors.items()]
    console.table(("matrix", "how many", "mean relative error", "largest"), rows)
