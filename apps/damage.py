"""Damage other than quantization: the command `corrupt`, and what `recover` calls to repair a float model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, heldout
from rlkit.recover import assets, atomic, placement, source
from rlkit.recover.progress import silent

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


def repair_command(  # noqa: PLR0913, the options of `rlkit recover` that repairing has a use for
    degraded: Path | None,
    teacher: str,
    out: Path,
    settings: Callable[[], Any],
    *,
    merge: bool = False,
    text: str | None = None,
    corpus: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """What `rlkit recover --degraded DIR --teacher MODEL` does: find both, repair, and tell.

    `settings` makes the recovery.Settings when they are needed, as that imports torch. Raises ValueError unless both
    models are named, and whatever finding and repairing them raises.
    """
    if degraded is None or not teacher:
        missing = "--degraded DIR, the damaged model" if degraded is None else "--teacher MODEL, the sound one"
        raise ValueError(f"to recover from damage, name both models: {missing}, is missing")
    atomic.refuse_existing(out, force=force)
    with console.progress(quiet=json) as tell:
        sound = source.resolve(teacher, download=teacher in assets.registry() and not dry_run, tell=tell)
        damaged = source.resolve(degraded)
        from rlkit.recover import repair, team

        chosen = repair.checked(settings())
        repair.check_folders(sound, damaged, out, force=force)
        if dry_run:
            _show_adapters(out, placement.ranks(_sizes(sound), chosen.adapters), _sizes(sound), json)
            return
        against = heldout.find(sound, text).against if text else None
        here = team.assemble()
        told = tell if here.main else silent
        options: dict[str, Any] = {
            "merge": merge,
            "against": against,
            "corpus": corpus,
            "team": here,
            "force": force,
            "tell": told,
        }
        repair.repair(sound, damaged, out, settings=chosen, **options)
    if here.main:
        _show_repair(out, degraded, json)


def _sizes(sound: source.Source) -> dict[str, tuple[int, int]]:
    return {name: (n, k) for name, n, k in source.read_shape(sound).linears()}


def _show_adapters(out: Path, ranks: dict[str, int], sizes: dict[str, tuple[int, int]], json: bool) -> None:
    """What --dry-run shows: the most adapters there can be, as matrices that are not damaged get none."""
    nbytes = {name: 4 * rank * sum(sizes[name]) for name, rank in ranks.items()}
    if json:
        console.emit_json(
            {"schema_version": 1, "path": str(out), "ranks": ranks, "adapter_nbytes": sum(nbytes.values())}
        )
        return
    kinds: dict[tuple[str, int], list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault((name.rpartition(".")[2], rank), []).append(nbytes[name])
    rows = [(*key, len(found), console.nbytes_text(sum(found))) for key, found in kinds.items()]
    console.table(("matrix", "rank", "at most", "bytes"), rows, title="adapters, where a matrix is damaged")
    console.say(f"nothing is made with --dry-run; without it: {out}")


def _show_repair(out: Path, degraded: Path, json: bool) -> None:
    facts = source.read_json(out / "recovery.json")
    if json:
        console.emit_json({"path": str(out), **facts})
        return
    show_stages(facts)
    for key, words in (
        ("all_zero", "nothing but zeros was in"),
        ("out_of_reach", "different, but without an adapter:"),
    ):
        names = facts["degraded"][key]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.say(f"{words} {', '.join(names[:3])}{more}")
    if facts["merged"]:
        console.emit(f"{out}: the recovered model, everything in its weights")
        console.say(f"next: rlkit recover {out} -o CHECKPOINT")
    else:
        console.emit(f"{out}: an adapter for {degraded}")
        console.say(
            f"next: load {degraded} with transformers, then peft.PeftModel.from_pretrained(model, '{out}/adapter')"
        )


def show_stages(recovery: dict[str, Any]) -> None:
    """The time of each stage of a recovery.json, and the divergence after those that measured one."""
    console.emit(f"divergence from the original on {recovery['measured_on']}")
    rows = []
    for row in recovery["stages"]:
        found = row["divergence"]
        figures = (f"{found['kl_mean']:.4f}", f"{100 * found['top1_agreement']:.1f}%") if found else ("-", "-")
        rows.append((row["stage"], console.duration(row["seconds"]), *figures))
    console.table(("stage", "time", "KL, nats/token", "same top-1"), rows)
