"""The commands that fetch and look: `assets`, `pull`, `inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.recover import assets as store
from rlkit.recover import contents, hub, source

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def assets(json: Json = False) -> None:
    """List the named models and texts, and which are downloaded.

    Example: rlkit assets
    """
    rows = [_facts(asset) for asset in store.registry().values()]
    if json:
        console.emit_json({"schema_version": 1, "assets": rows})
        return
    columns = ("name", "kind", "download", "kept", "license", "about")
    cells = [
        (
            row["name"],
            row["kind"],
            console.nbytes_text(row["nbytes"]),
            "yes" if row["path"] else "no",
            row["license"],
            row["about"],
        )
        for row in rows
    ]
    console.table(columns, cells)
    console.say("fetch one with: rlkit pull NAME")


def _facts(asset: store.Asset) -> dict[str, Any]:
    kept = store.cached(asset)
    facts = {"name": asset.name, "kind": str(asset.kind), "about": asset.about, "license": asset.license}
    return facts | {"origin": asset.origin, "nbytes": asset.nbytes, "path": str(kept) if kept else None}


def pull(
    name: Annotated[str, typer.Argument(help="An asset's name, or a hub id such as Qwen/Qwen3-0.6B.")],
    force: Annotated[bool, typer.Option("--force", help="Download again what is kept already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be downloaded, and stop.")] = False,
    json: Json = False,
) -> None:
    """Download a named model or text, or a model of the hub, into the cache folder ($RLKIT_CACHE).

    Example: rlkit pull smollm2-135m
    """
    asset = store.registry().get(name)
    if asset is None and not hub.is_hub_id(name):
        store.find(name)
    kept = store.cached(asset) if asset else hub.cached(name)
    if kept is not None and not force:
        _pulled(name, str(kept), 0, json)
        return
    nbytes = asset.nbytes if asset else hub.nbytes(name)
    if not json:
        console.say(f"{name}: {console.nbytes_text(nbytes)} to download")
    if dry_run:
        _pulled(name, None, nbytes, json)
        return
    with console.progress(quiet=json) as tell:
        path = store.fetch(asset, tell, force=force) if asset else hub.fetch(name, tell, force=force)
    _pulled(name, str(path), nbytes, json)


def _pulled(name: str, path: str | None, nbytes: int, json: bool) -> None:
    if json:
        console.emit_json({"schema_version": 1, "name": name, "path": path, "nbytes": nbytes})
    elif path is not None:
        console.emit(path)


def inspect(
    model: Annotated[str, typer.Argument(help="A model: asset name, hub id, folder or .gguf file.")],
    json: Json = False,
) -> None:
    """Say what a model is: its kind, shape, and bits and bytes by kind of tensor.

    Example: rlkit inspect smollm2-135m
    """
    facts = contents.describe(source.resolve(model))
    if json:
        console.emit_json(facts)
        return
    console.emit(f"{facts['reference']}: {facts['kind']} at {facts['path']}")
    shape = facts["shape"]
    if shape is None:
        console.emit(facts["note"])
    else:
        sizes = "  ".join(f"{name} {shape[name]}" for name in ("layers", "hidden", "ffn", "vocab", "max_context"))
        heads = f"heads {shape['heads']}/{shape['kv_heads']} of {shape['head_dim']}"
        tied = "tied embedding" if shape["tied"] else "separate lm_head"
        console.emit(f"{shape['architecture']}  {sizes}  {heads}  {tied}  {facts['parameters'] / 1e6:.1f} M parameters")
    if facts["recipe"]:
        measured, found = facts["divergence"] or {}, ""
        if "kl_mean" in measured:
            whose = (measured.get("reference") or {}).get("kind", "original")
            found = f", KL to the {whose} {measured['kl_mean']:.4f} nats/token"
        console.emit(f"recipe {facts['recipe']}{found}")
    _print_tensors(facts)


def _print_tensors(facts: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        bits = "/".join(str(bits) for bits in row["bits"])
        per_weight = f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] else "-"
        return row["kind"], bits or "-", per_weight, f"{row['weights'] / 1e6:.2f}", console.nbytes_text(row["nbytes"])

    rows = [cells(row) for row in facts["tensors"]]
    total = sum(row["nbytes"] for row in facts["tensors"])
    rows.append(("all tensors", "-", "-", "-", console.nbytes_text(total)))
    rows.append(("all files", "-", "-", "-", console.nbytes_text(facts["files_nbytes"])))
    console.table(("tensors", "bits", "bits/weight", "M weights", "bytes"), rows)
