"""Simulated KV caches held to their bars: bytes, values, the time of attention, the runtime's own caches beside them.

    python -m rlkit.apps.benchmarks.kv_simulation -o ./bench-kv-simulation

bytes      what the tensors of caches weigh, against kvformat.nbytes
equal      what caches give back, against the quantizer written again here in plain numpy, bit for bit
attention  seconds of a decode step's attention in all layers, as ratios to 16-bit KV; schemes in turns, medians;
           float32 is what transformers keeps, which needs no conversion
chunks     a prompt into 16-bit KV in chunks, against the whole prompt: how many of the cache's numbers differ, the
           largest difference of logits, KL; in float64, which the bar is for, and in float32 (kvchunks.py says why).
           The peak of activations of a pass, counted and by the formula of `rlkit kv --analytic`
runtime    KL to the original of a bundle's int8 and int4 caches, and of their simulation under the same scales

The runtime's suite takes the model's own weights on both sides: a bundle in which nothing is rounded further and
activations are not either, and the torch model. `--bundle` names one that is there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from rlkit.apps import console, heldout
from rlkit.apps.kvcalibrate import WINDOW
from rlkit.export import kvscales
from rlkit.export.kvscales import SCHEMES, Choices, LayerScales
from rlkit.profiles import divergence, text
from rlkit.profiles.architecture import read_architecture
from rlkit.profiles.frontier.analytic import activations_nbytes
from rlkit.recover import assets, source
from rlkit.recover.atomic import write_json
from rlkit.recover.kvformat import KVFormat, nbytes, parse
from rlkit.recover.progress import Tell
from rlkit.recover.source import ModelShape
from rlkit.runtime.kvsample import collect
from rlkit.runtime.plain import Plain
from rlkit.runtime.session import open_bundle, read_bundle

NBYTES_BAR = 0.01  # of the formula
TIME_BAR = 3.0  # times 16-bit KV
KL_BAR = 0.01  # nats between both divergences
WHOLE, FLOAT32 = "k16v16", "float32"
TRIED = "k8v8,k8v4,k4v4,k4v4:g32,k4v4:smooth,k4v4:w128,k4v2,k2v2,kivi4,kivi2,k4v4:block,k4v4:tensor"
CHUNKS = (64, 256, 512)
LOGITS_BAR = 1e-9  # between logits in float64
TIMED = "k8v8,k8v4,k4v4,k4v4:smooth,k2v2,kivi2"
LONGEST = 333  # tokens whose values are compared: plain numpy takes one group at a time

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured: the model's name and shape, tokens of context and of text, rounds, threads, a folder."""

    model: str
    shape: ModelShape
    context: int
    rounds: int
    tokens: int
    prompt: int
    threads: int
    out: Path
    bundle: Path | None


def sizes(wanted: Wanted, _tell: Tell) -> dict[str, Any]:
    """Bytes of one layer's cache at the context, read in chunks of 256, against the formula's."""
    from rlkit.recover.kvtrial import kept

    shape, rows = wanted.shape, list[dict[str, Any]]()
    for name in (WHOLE, *TRIED.split(",")):
        scheme = parse(name)
        found = kept(scheme, *_random(shape, wanted.context), chunk=256).nbytes
        formula = nbytes(scheme, 1, shape.kv_heads, shape.head_dim, wanted.context)
        rows.append({"kv": name, "nbytes": found, "formula": formula, "apart": abs(found / formula - 1)})
    return {"rows": rows, "bar": NBYTES_BAR, "met": all(row["apart"] <= NBYTES_BAR for row in rows)}


def equal(wanted: Wanted, _tell: Tell) -> dict[str, Any]:
    """How many values of caches differ from plain numpy's in any bit."""
    from rlkit.recover.kvtrial import kept

    rows: list[dict[str, Any]] = []
    tokens = min(LONGEST, wanted.context)
    for name in TRIED.split(","):
        scheme, given = parse(name), _random(wanted.shape, tokens)
        found = kept(scheme, *given, chunk=tokens)
        differ = count = 0
        parts = ((scheme.keys, found.keys, scheme.smooth), (scheme.values, found.values, False))
        for (form, part, smooth), x, coded in zip(parts, given, found.coded, strict=True):
            expected = plain(x[:, :coded], form, smooth)
            differ += int((expected.view(np.uint32) != part[:, :coded].view(np.uint32)).sum())
            count += expected.size
        rows.append({"kv": name, "values": count, "differ": differ})
    return {"rows": rows, "bar": 0, "met": all(row["differ"] == 0 < row["values"] for row in rows)}


def plain(x: Floats, form: KVFormat, smooth: bool = False) -> Floats:
    """What rounding leaves of keys or values (H, T, D) that come at once: the paper's lines, one group at a time."""
    out: Floats = np.empty_like(x)
    mean = (
        x.astype(np.float64).mean(1, keepdims=True).astype(np.float16).astype(np.float32)
        if smooth
        else np.zeros(1, np.float32)
    )
    x = x - mean
    heads, tokens, width = x.shape
    step = {"token": (1, 1, form.group), "channel": (1, form.group, 1), "block": (1, form.group, width)}
    h, t, d = step.get(form.granularity, x.shape)
    for box in np.ndindex(heads // h, tokens // t, width // d):
        at = tuple(slice(start * size, (start + 1) * size) for start, size in zip(box, (h, t, d), strict=True))
        out[at] = _rounded(x[at], form)
    return out + mean


def _rounded(group: Floats, form: KVFormat) -> Floats:
    levels = np.float32(2**form.bits - 1)
    low, high = group.min(), group.max()
    finest = np.float32(max(abs(low), abs(high)) / np.float32(2048))  # so far float16 counts zero points
    scale = np.float32(np.float16(max((high - low) / levels, finest)))
    if form.minimum:
        zero = np.float32(np.float16(low))
        return np.asarray(np.clip(np.rint((group - zero) / scale), 0, levels) * scale + zero, np.float32)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(group / scale + zero), 0, levels) - zero) * scale, np.float32)


def attention(wanted: Wanted, _tell: Tell) -> dict[str, Any]:
    """How many times longer a decode step's attention takes over packed KV than over 16-bit KV."""
    from rlkit.recover.kvtrial import Shape, attention_rounds

    shape = wanted.shape
    names = (WHOLE, FLOAT32, *TIMED.split(","))
    schemes = [None if name == FLOAT32 else parse(name) for name in names]
    sized = Shape(shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    rounds = list(attention_rounds(schemes, sized, wanted.context, wanted.rounds))
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        ratio = statistics.median(seconds[number] / seconds[0] for seconds in rounds)
        rows.append({"kv": name, "seconds": statistics.median(seconds[number] for seconds in rounds), "ratio": ratio})
    facts: dict[str, Any] = {"context": wanted.context, "layers": shape.layers, "rounds": wanted.rounds}
    return {**facts, "rows": rows, "bar": TIME_BAR, "met": all(row["ratio"] <= TIME_BAR for row in rows)}


def chunks(wanted: Wanted, _tell: Tell) -> dict[str, Any]:
    """What reading a prompt in chunks changes, and what it saves."""
    from rlkit.recover.kvchunks import apart
    from rlkit.recover.kvfootprint import footprint
    from rlkit.recover.model import load_model

    found = source.resolve(wanted.model)
    model, _tokenizer = load_model(found)
    shape, tokens = read_architecture(found), wanted.prompt
    ids = np.random.default_rng(0).integers(3, wanted.shape.vocab, tokens).tolist()
    sizes = [size for size in CHUNKS if size < tokens]
    peaks = [footprint(model.float(), parse(WHOLE), ids, size).activations_nbytes for size in (*sizes, None)]
    narrow = list(apart(model, ids, sizes, exact=False))
    wide = list(apart(model.double(), ids, sizes, exact=True))
    rows: list[dict[str, Any]] = []
    for size, peak, *pair in zip((*sizes, tokens), peaks, (*wide, None), (*narrow, None), strict=True):
        row: dict[str, Any] = {"chunk": size, "numbers": wide[0].numbers}
        for name, one in zip(("f64", "f32"), pair, strict=True):
            facts = (one.differ, one.logits, one.kl) if one else (0, 0.0, 0.0)
            row |= dict(zip((f"{name}_{key}" for key in ("differ", "logits", "kl")), facts, strict=True))
        rows.append({**row, "peak": peak, "formula": activations_nbytes(shape, tokens, size, "sdpa")})
    met = all(one.logits <= LOGITS_BAR and one.differ == 0 for one in wide)
    return {"tokens": tokens, "rows": rows, "bar": LOGITS_BAR, "met": met}


def beside_runtime(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """KL to the original of the runtime's caches and of simulated ones, with one set of scales for both."""
    from rlkit.recover.kvcache import kv_logits
    from rlkit.recover.model import load_model, logits_fn

    found = source.resolve(wanted.model)
    bundle = wanted.bundle or _bundle(found, wanted.out / "bundle", tell)
    config, _manifest = read_bundle(bundle)
    decoder = config["model"]["decoder"]
    rows = _text(bundle, wanted.tokens)
    batches = text.batches(rows[1::2], max_ids=WINDOW)
    scales = _calibrated(bundle, decoder, rows[::2], wanted.threads, tell)
    model, _tokenizer = load_model(found)
    spec = divergence.CacheSpec(wanted.out / "original", f"{wanted.model} {wanted.tokens} {_name(bundle)}")
    original = divergence.cached(spec, logits_fn(model), batches, tell)
    out: list[dict[str, Any]] = []
    for name, layers in scales.items():
        given = [(layer.keys, layer.values) for layer in layers.values()]
        ours = divergence.compare(original, kv_logits(model, parse(name), scales=given), batches, tell)
        theirs = divergence.compare(original, Plain(bundle, decoder, wanted.threads, name).logits, batches, tell)
        facts: dict[str, Any] = {"kv": name, "simulated": ours.to_json(), "runtime": theirs.to_json()}
        out.append({**facts, "apart": abs(ours.kl_mean - theirs.kl_mean)})
    whole = divergence.compare(original, Plain(bundle, decoder, wanted.threads).logits, batches, tell)
    facts = {"bundle": _name(bundle), "float": whole.to_json(), "tokens": sum(map(len, rows[1::2]))}
    return {**facts, "rows": out, "bar": KL_BAR, "met": all(row["apart"] <= KL_BAR for row in out)}


def _bundle(found: source.Source, folder: Path, tell: Tell) -> Path:
    """The model as a bundle that rounds nothing further, neither weights nor activations."""
    from rlkit.export.build import export_bundle

    if not folder.is_dir():
        export_bundle(found, folder, tell=tell, accuracy_level=0, allow_slow=True)
    return folder


def _calibrated(
    bundle: Path, decoder: dict[str, Any], rows: list[list[int]], threads: int, tell: Tell
) -> dict[str, dict[str, LayerScales]]:
    """Scales per channel of both caches by attention, in the order of layers; the bundle's graphs get the same."""
    from rlkit.export import graph, kvcache

    size = int(decoder["head_size"])
    attentions = kvcache.attentions(graph.load(bundle / decoder["filename"]), bundle, size)
    samples = collect(bundle, decoder, attentions, rows, threads=threads, tell=tell)
    found = {}
    for name, scheme in SCHEMES.items():
        found[name] = {
            each.node: kvscales.calibrate(each, samples[each.node], scheme, Choices(context=WINDOW))
            for each in attentions
        }
        kvcache.add_graphs(bundle, decoder, scheme, found[name], allow_slow=True)
    return found


def _text(bundle: Path, tokens: int) -> list[list[int]]:
    """Windows of the built-in text: every other one is calibrated on, `tokens` and more of the rest are measured on."""
    session = open_bundle(bundle)
    width, rows = min(WINDOW, session.context_length), list[list[int]]()
    for document in text.read_documents(heldout.find_text(heldout.BUILTIN)):
        ids = session.encode(document)
        rows += [ids[start : start + width] for start in range(0, len(ids) - 1, width)]
        if sum(map(len, rows[1::2])) >= tokens:
            break
    return rows


def _random(shape: ModelShape, tokens: int) -> tuple[Floats, Floats]:
    """Keys (H, T, D) whose channels lie apart, and values; in 16 bit."""
    rng = np.random.default_rng(0)
    size = (shape.kv_heads, tokens, shape.head_dim)
    offset = 4 * rng.standard_normal((shape.kv_heads, 1, shape.head_dim))
    keys, values = rng.standard_normal(size) + offset, rng.standard_normal(size)
    return keys.astype(np.float16).astype(np.float32), values.astype(np.float16).astype(np.float32)


def _name(bundle: Path) -> str:
    return bundle.resolve().name


SUITES: dict[str, Callable[[Wanted, Tell], dict[str, Any]]] = {
    "bytes": sizes,
    "equal": equal,
    "attention": attention,
    "chunks": chunks,
    "runtime": beside_runtime,
}


def main(  # noqa: PLR0913, one parameter per option of the command
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of bundle and results.")] = Path(
        "bench-kv-simulated"
    ),
    suites: Annotated[str, typer.Option(help="With commas between.")] = ",".join(SUITES),
    model: Annotated[str, typer.Option(help="A model reference, as for export.")] = "smollm2-135m",
    bundle: Annotated[Path | None, typer.Option(help="A bundle of the model; left out, one is made.")] = None,
    context: Annotated[int, typer.Option(min=256, help="Tokens for bytes and attention.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of attention that count.")] = 15,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens whose divergence is measured.")] = 2048,
    prompt: Annotated[int, typer.Option(min=128, help="Tokens of the prompt that is read in chunks.")] = 1024,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Hold simulated KV caches to their bars; the exit code is 1 if one is missed."""
    names = suites.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {', '.join(SUITES)}")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"schema_version": 1, "model": model}
    with console.progress(quiet=json) as tell:
        shape = source.read_shape(source.resolve(model, download=model in assets.registry(), tell=tell))
        wanted = Wanted(model, shape, context, rounds, tokens, prompt, threads, out, bundle)
        for name in names:
            found[name] = SUITES[name](wanted, tell)
    write_json(out / "kv_simulation.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found, names)
    if not all(found[name]["met"] for name in names):
        raise typer.Exit(1)


def show(found: dict[str, Any], names: list[str]) -> None:
    """Every suite as a table, and whether its bar is met."""
    for name in names:
        rows = [_flat(row) for row in found[name]["rows"]]
        console.table(tuple(rows[0]), [tuple(row.values()) for row in rows], title=f"{found['model']}: {name}")
        console.emit(f"bar {found[name]['bar']:g}: {'met' if found[name]['met'] else 'NOT MET'}")


def _flat(row: dict[str, Any]) -> dict[str, object]:
    """A row's cells; of a divergence its mean."""
    return {
        key: f"{value['kl_mean']:.5f}"
        if isinstance(value, dict)
        else f"{value:.5g}"
        if isinstance(value, float)
        else value
        for key, value in row.items()
    }


if __name__ == "__main__":
    typer.run(main)
