"""The command `kv-calibrate`: KV caches that a bundle offers, and quantized ones added, with scales from its own keys.

What is added are graphs of some hundred kilobytes over the data that is there; no weight is written again. Windows of
the text alternate: on one half scales are chosen, on the other the bundle is compared with itself under a float cache.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rlkit.apps import console, heldout
from rlkit.apps.publish import CARD, MANIFEST, read_manifest
from rlkit.export import kvscales
from rlkit.export.card import card
from rlkit.export.kvscales import METHODS, PER, SCHEMES, Attention, Choices, LayerScales, Sample, Scheme
from rlkit.profiles import divergence, text
from rlkit.recover.atomic import sha256, write_json, write_text
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.runtime import kv as kvs
from rlkit.runtime.kvsample import collect, generated
from rlkit.runtime.plain import Plain
from rlkit.runtime.session import open_bundle, read_bundle, threads_here

GENERATED = "generated"  # as a text: what the model writes itself
WINDOW = 512  # ids; more and the logits of one window take too much memory
FEWEST = 64  # tokens that scales can be chosen on
MEASURED = 4096  # tokens at most that the cost is measured on


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which caches, how their scales are chosen, on how many tokens of what text, and whether the cost is measured."""

    schemes: tuple[Scheme, ...]
    choices: Choices = field(default_factory=Choices)
    text: str = heldout.BUILTIN
    tokens: int = 2048
    measure: bool = True
    allow_slow: bool = False

    def __post_init__(self) -> None:
        if self.tokens < FEWEST:
            raise ValueError(f"{self.tokens} tokens are too few to choose scales on; use at least {FEWEST}")
        if self.text != GENERATED:
            heldout.find_text(self.text)


def kv_calibrate(  # noqa: PLR0913, one parameter per option of the command
    bundle: Annotated[Path, typer.Argument(help="A bundle folder for the CPU, made by rlkit export.")],
    add: Annotated[str | None, typer.Option(help=f"Caches to add, with commas between: {', '.join(SCHEMES)}.")] = None,
    source: Annotated[
        str, typer.Option("--text", help=f"What keys and values are taken from: as for export, or {GENERATED}.")
    ] = heldout.BUILTIN,
    tokens: Annotated[int, typer.Option(help="How many tokens of it.")] = 2048,
    ranges: Annotated[str, typer.Option(help=f"How a scale is chosen: {', '.join(METHODS)}.")] = Choices().ranges,
    keys: Annotated[str, typer.Option(help=f"A scale for each {' or '.join(PER)} of keys.")] = Choices().keys,
    values: Annotated[str, typer.Option(help="The same for values.")] = Choices().values,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the scales must hold for; the model's whole context unless told.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws documents and positions.")] = 0,
    measure: Annotated[bool, typer.Option(help="Compare with the float cache on the text's other half.")] = True,
    allow_slow: Annotated[bool, typer.Option("--allow-slow", help="Add what `rlkit lint` finds fault with.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Add quantized KV caches to a bundle, or without --add list what it offers and what each costs.

    Example: rlkit kv-calibrate ./bundle --add int8,int4
    """
    manifest = read_manifest(bundle)
    if add is not None:
        choices = Choices(ranges, keys, values, seed, context)
        wanted = Wanted(kvscales.schemes_named(add), choices, source, tokens, measure, allow_slow)
        with console.progress(quiet=json) as tell:
            manifest = add_caches(bundle, wanted, tell)
    show(bundle, manifest, json)


def add_caches(bundle: Path, wanted: Wanted, tell: Tell = silent) -> dict[str, Any]:
    """Add caches to a bundle for the CPU, replacing those of an earlier calibration; its manifest as it is now.

    Graphs are complete or absent and the manifest is written last, so an interrupted run is simply run again. Raises
    FileNotFoundError or ValueError, one line with the remedy.
    """
    from rlkit.export import graph, kvcache

    manifest = read_manifest(bundle)
    config, _manifest = read_bundle(bundle)
    decoder, threads = config["model"]["decoder"], threads_here(config, manifest)
    head_size = int(decoder["head_size"])
    kvscales.refuse(manifest["target"], head_size, wanted.schemes)
    attentions = kvcache.attentions(graph.load(bundle / decoder["filename"]), bundle, head_size)
    rows = _rows(bundle, wanted)
    samples = collect(bundle, decoder, attentions, rows[::2], threads=threads, tell=tell)
    facts: dict[str, dict[str, Any]] = {}
    for scheme in wanted.schemes:
        scales = dict(_scales(attentions, samples, scheme, wanted.choices, tell))
        files = kvcache.add_graphs(bundle, decoder, scheme, scales, allow_slow=wanted.allow_slow)
        facts[scheme.name] = {
            **_sizes(bundle, config, scheme, files),
            "calibration": _calibration(wanted, rows[::2], list(scales.values())),
        }
    del samples
    if wanted.measure:
        for name, cost in _costs(bundle, decoder, [row for row in rows[1::2] if len(row) > 1], list(facts), tell):
            facts[name]["divergence"] = cost
    return _stated(bundle, manifest, facts)


def _rows(bundle: Path, wanted: Wanted) -> list[list[int]]:
    """Windows of ids: every other one is calibrated on, the rest is measured on."""
    session = open_bundle(bundle)
    if wanted.text == GENERATED:
        return generated(session, 2 * wanted.tokens, wanted.choices.seed)
    documents = text.read_documents(heldout.find_text(wanted.text))
    random.Random(wanted.choices.seed).shuffle(documents)
    rows: list[list[int]] = []
    width = min(WINDOW, session.context_length)
    for document in documents:
        ids = session.encode(document)
        rows += [ids[start : start + width] for start in range(0, len(ids), width)]
        if sum(map(len, rows[::2])) >= wanted.tokens and sum(map(len, rows[1::2])) >= wanted.tokens:
            break
    if sum(map(len, rows[::2])) < FEWEST:
        why = f"{wanted.text} gives {sum(map(len, rows))} tokens, too few to choose scales on"
        raise ValueError(f"{why}; name a longer text, or --text {GENERATED}")
    return rows


def _scales(
    attentions: Sequence[Attention], samples: dict[str, Sample], scheme: Scheme, choices: Choices, tell: Tell
) -> Iterator[tuple[str, LayerScales]]:
    for number, attention in enumerate(attentions):
        tell(Progress(f"kv {scheme.name}", number, len(attentions)))
        yield attention.node, kvscales.calibrate(attention, samples[attention.node], scheme, choices)
    tell(Progress(f"kv {scheme.name}", len(attentions), len(attentions)))


def _sizes(bundle: Path, config: dict[str, Any], scheme: Scheme, files: list[str]) -> dict[str, Any]:
    _file, whole = kvs.graph_of(bundle, config, kvs.FLOAT)
    _file, cache = kvs.graph_of(bundle, config, scheme.name)
    sizes = {"nbytes_per_token": cache.nbytes_per_token, "float_nbytes_per_token": whole.nbytes_per_token}
    return {"files": files, "bits": scheme.bits, **sizes}


def _calibration(wanted: Wanted, rows: list[list[int]], scales: list[LayerScales]) -> dict[str, Any]:
    errors = {part: float(np.mean([getattr(layer, part) for layer in scales])) for part in ("key_error", "value_error")}
    return {"text": Path(wanted.text).name, "tokens": sum(map(len, rows)), **asdict(wanted.choices), **errors}


def _costs(
    bundle: Path, decoder: dict[str, Any], rows: list[list[int]], names: list[str], tell: Tell
) -> Iterator[tuple[str, dict[str, Any]]]:
    """How far each cache's predictions are from the float cache's; one graph is in memory at a time."""
    threads = threads_here({"model": {"decoder": decoder}}, {})
    batches = text.batches(rows, max_ids=WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        spec = divergence.CacheSpec(Path(folder), "float")
        kept = divergence.cached(spec, Plain(bundle, decoder, threads).logits, batches, tell)
        for name in names:
            found = divergence.compare(kept, Plain(bundle, decoder, threads, name).logits, batches, tell)
            yield name, found.to_json()


def _stated(bundle: Path, manifest: dict[str, Any], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest, with the card made of it."""
    caches = {**(manifest.get("kv_cache") or {}), **facts}
    files = [file for name in facts for file in facts[name]["files"]]
    hashes = {**manifest["sha256"], **{file: sha256(bundle / file) for file in files}}
    now = {**manifest, "kv_cache": {name: caches[name] for name in SCHEMES if name in caches}, "sha256": hashes}
    write_text(bundle / CARD, card(now))
    now["sha256"] = {**hashes, CARD: sha256(bundle / CARD)}
    write_json(bundle / MANIFEST, now)
    return now


def show(bundle: Path, manifest: dict[str, Any], json: bool) -> None:
    """What caches a bundle offers, what they take and what they cost."""
    config, _manifest = read_bundle(bundle)
    there = {name: manifest.get("kv_cache", {}).get(name, {}) for name in kvs.offered(bundle, config)}
    sizes = {name: kvs.graph_of(bundle, config, name)[1].nbytes_per_token for name in there}
    if json:
        caches = {name: {**facts, "nbytes_per_token": sizes[name]} for name, facts in there.items()}
        console.emit_json({"schema_version": 1, "path": str(bundle), "kv_cache": caches})
        return
    columns = ("cache", "bytes per token", "of float", "KL to float", "same likeliest token")
    console.table(columns, [_line(name, sizes, facts) for name, facts in there.items()], title=str(bundle))
    if len(there) == 1:
        console.say(f"next: rlkit kv-calibrate {bundle} --add {','.join(SCHEMES)}")


def _line(name: str, sizes: dict[str, int], facts: dict[str, Any]) -> tuple[str, ...]:
    share = f"{sizes[name] / sizes[kvs.FLOAT]:.1%}"
    cost = facts.get("divergence")
    figures = (f"{cost['kl_mean']:.4f}", f"{cost['top1_agreement']:.1%}") if cost else ("-", "-")
    return (name, str(sizes[name]), share, *figures)
