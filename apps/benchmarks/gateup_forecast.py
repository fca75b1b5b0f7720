"""What two bits for gate and up projections are worth while decoding: W4/W2-GateUp against uniform W4.

    python -m rlkit.apps.benchmarks.gateup_forecast -o ./bench-gateup
    python -m rlkit.apps.benchmarks.gateup_forecast -o ./bench-gateup --measure --shapes qwen3-0.6b,qwen3-4b

The question is that of arXiv 2606.04238, whose roofline analysis of three families (4B to 20B) on two platforms gives
+7.5 to +23.3 % tokens/s, depending on model and context. Which families, platforms and contexts is not known; here they
are Qwen3-4B, Llama-3.1-8B and gpt-oss-20b on the iGPUs of an HX 370 and a Max+ 395, contexts of 128 to 32768 tokens.

    bytes      bytes per token of W4 / those of the mixture - 1: weights and cache, the same on every device
    roofline   the same of forecast times, operator by operator

Each model twice: lm_head (and a tied embedding) packed like the rest, and left in 16 bits. Codes in groups of 128 with
a scale and a zero point of 16 bits: 4.25 and 2.25 bits a weight. Cache and activations in 16 bits, batch 1. `recipes`
is what this package exports for WebGPU: groups of 32 and 64, and branches of rank 32 beside gate and up.

--measure decodes with bundles of random weights of these shapes on this CPU, both in turns: the gain that is left of it
there. What does not fit into memory or has no stand-in is named with the reason; a second run measures what is missing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from rlkit.apps import console
from rlkit.profiles.account import Model
from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.device import find
from rlkit.profiles.forecast import Workload, forecast_model
from rlkit.profiles.operators import format_named, packed, weigh
from rlkit.profiles.places import HALF, Place, of_unit
from rlkit.profiles.standard import MODELS
from rlkit.profiles.storage import Format, Storage
from rlkit.recover import recipe as recipes
from rlkit.recover.atomic import need_space, write_json
from rlkit.recover.progress import Tell
from rlkit.recover.source import ModelShape, read_json

SCHEMA_VERSION = 1
CONTEXTS = (128, 512, 2048, 4096, 8192, 16384, 32768)
PLATFORMS = ("hx370:igpu", "max395:igpu")
BAND = (7.5, 23.3)  # % of the paper's abstract
GATE_UP = ("*.gate_proj", "*.up_proj")
W4, W2, FLOAT = packed(4, 128, 16, 16), packed(2, 128, 16, 16), format_named("fp16")
SHARE = 0.7  # of free memory that two bundles side by side may take; the runtime packs some weights anew
_DENSE = {"hidden_act": "silu", "num_key_value_heads": 8, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {  # as the models' publishers give them
    "qwen3-4b": {
        **_DENSE,
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "llama-3.1-8b": {
        **_DENSE,
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "gpt-oss-20b": {
        **_DENSE,
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "head_dim": 64,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
}
STAND_INS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "llama-3.1-8b")


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much the mixture decodes faster than W4 after `context` tokens, in %."""

    model: str
    stored: str
    place: str
    context: int
    bytes_percent: float
    roofline_percent: float

    @property
    def in_band(self) -> bool:
        """Whether the bytes' gain lies in the paper's range."""
        return BAND[0] <= self.bytes_percent <= BAND[1]


def formats(head: Format, gate_up: Format) -> tuple[tuple[str, Format], ...]:
    """How matrices are stored: lm_head and the embedding, gate and up, all others in 4 bits."""
    tables = tuple((name, head) for name in ("lm_head", "model.embed_tokens"))
    return (*tables, *((pattern, gate_up) for pattern in GATE_UP), ("*", W4))


def gains(
    model: Architecture, name: str, place: Place, head: Format, contexts: Sequence[int] = CONTEXTS
) -> Iterator[Gain]:
    """The mixture against W4 with the same lm_head, at 4.25 and 2.25 bits a weight."""

    def stored(gate_up: Format) -> Model:
        storage: Storage = replace(HALF, formats=formats(head, gate_up))
        return Model(model, None, replace(place, storage=storage))

    said = f"lm_head {head.bits_per_weight:g} bits"
    yield from _compared(name, said, place.name, stored(W4), stored(W2), contexts)


def recipe_gains(model: Architecture, name: str, place: Place, contexts: Sequence[int] = CONTEXTS) -> Iterator[Gain]:
    """The package's own recipes as they are exported for the place, branches included."""
    base, mixed = (Model(model, recipes.load(each), place) for each in ("w4", "w4w2-gateup"))
    yield from _compared(name, "recipes", place.name, base, mixed, contexts)


def _compared(name: str, stored: str, place: str, base: Model, mixed: Model, contexts: Sequence[int]) -> Iterator[Gain]:
    for context in contexts:
        pair = [forecast_model(model, Workload(context, 1)) for model in (base, mixed)]
        bounds, times = ([getattr(made, kind).tpot_seconds for made in pair] for kind in ("baseline", "roofline"))
        yield Gain(name, stored, place, context, *(100 * (a / b - 1) for a, b in (bounds, times)))


def every_gain() -> Iterator[Gain]:
    """All models on all platforms."""
    for place in (of_unit(*find(platform)) for platform in PLATFORMS):
        for name, config in CONFIGS.items():
            model = of_config(config, name)
            for head in (W4, FLOAT):
                yield from gains(model, name, place, head)
            yield from recipe_gains(model, name, place)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results and bundles.")] = Path("bench-gateup"),
    measure: Annotated[bool, typer.Option("--measure", help="Measure the gain on this CPU, too.")] = False,
    shapes: Annotated[str, typer.Option(help="Shapes to measure, with commas between.")] = "qwen3-4b,llama-3.1-8b",
    depths: Annotated[str, typer.Option(help="Tokens before the measured ones, with commas.")] = "128,2048",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are decoded and timed.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each bundle.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Forecast what 2-bit gate and up projections are worth, and measure it on this CPU if asked."""
    asked, at = tuple(dict.fromkeys(shapes.split(","))), _numbers(depths)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "band_percent": list(BAND),
        "gains": [asdict(g) for g in every_gain()],
    }
    path = out / "gateup.json"
    found["measured"] = _kept(path)
    write_json(path, found)
    if measure:
        with console.progress(quiet=json) as tell:
            for name in asked:
                missing = [depth for depth in at if not _is_done(found["measured"], name, depth)]
                if missing:
                    found["measured"] += measured(name, out, missing, new_tokens, repeats, tell)
                    write_json(path, found)
    if json:
        console.emit_json(found)
    else:
        show(found)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--depths {text!r} are no numbers; write them as in 128,2048") from error
    if min(found) < 1:
        raise typer.BadParameter(f"--depths {text!r}: each must be at least 1")
    return found


def _kept(path: Path) -> list[dict[str, Any]]:
    """What an earlier run measured; ValueError if its file is of another version."""
    if not path.is_file():
        return []
    table = read_json(path)
    if table.get("schema_version") != SCHEMA_VERSION:
        why = f"schema_version {table.get('schema_version')!r}, this rlkit reads {SCHEMA_VERSION}"
        raise ValueError(f"{path} has {why}; choose another folder with -o")
    return [row for row in table.get("measured", []) if "time_ratio" in row]


def _is_done(rows: Sequence[dict[str, Any]], name: str, depth: int) -> bool:
    return any(row["model"] == name and row.get("depth") == depth for row in rows)


def measured(
    name: str, out: Path, depths: Sequence[int], new_tokens: int, repeats: int, tell: Tell
) -> list[dict[str, Any]]:
    """Rows of one shape: the gain at each depth, or why there is none."""
    why = obstacle(name, max(depths) + new_tokens + 1)
    if why:
        return [{"model": name, "skipped": why}]
    from rlkit.profiles import bench, worker

    folders = [random_bundle(name, recipe, out) for recipe in ("w4", "w4w2")]
    tests = bench.standard((0,), new_tokens, depths)
    found = worker.measure_bundles(folders, bench.Plan(tests, repeats), tell=tell)
    return [
        {
            "model": name,
            "depth": ratio.test.depth,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "threads": found[0].threads,
            "time_ratio": ratio.time,
            "gain_percent": 100 * (1 / ratio.time - 1),
        }
        for ratio in bench.ratios(found)
    ]


def obstacle(name: str, tokens: int, free_nbytes: int | None = None) -> str:
    """Why a shape cannot be measured here; empty if it can."""
    if name not in STAND_INS:
        return f"no stand-in of {name!r} can be written; there are {', '.join(STAND_INS)}"
    model = _architecture(name)
    if tokens > model.max_context:
        return f"{tokens} tokens exceed its context of {model.max_context}"
    free = psutil.virtual_memory().available if free_nbytes is None else free_nbytes
    both = sum(weigh(model, _stand_in_recipe(kind), Storage()).stored_nbytes for kind in ("w4", "w4w2"))
    if both > SHARE * free:
        return f"both bundles take {both / 1e9:.1f} GB together, and {free / 1e9:.1f} GB are free"
    return ""


def _shape(name: str) -> ModelShape:
    return MODELS[name]


def _architecture(name: str) -> Architecture:
    """Of a stand-in, without what writes it: the sizes that Qwen3's smaller models differ in."""
    if name in CONFIGS:
        return of_config(CONFIGS[name], name)
    layers, hidden, ffn = {"qwen3-0.6b": (28, 1024, 3072), "qwen3-1.7b": (28, 2048, 6144)}[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 16}
    return of_config({**CONFIGS["qwen3-4b"], **sizes}, name)


def _stand_in_recipe(kind: str) -> recipes.Recipe:
    rules = [recipes.Rule(("*",), recipes.Scheme(4, 128))]
    if kind != "w4":
        rules.insert(0, recipes.Rule(GATE_UP, recipes.Scheme(2, 128)))
    return recipes.Recipe(f"{kind}-g128", tuple(rules))


def random_bundle(name: str, kind: str, out: Path) -> Path:
    """A bundle of random codes, made once; the checkpoint it is made of goes again."""
    import shutil

    bundle, checkpoint = out / f"{name}-{kind}", out / f"{name}-{kind}-checkpoint"
    if bundle.is_dir():
        return bundle
    console.say(f"making {bundle}")
    recipe = _stand_in_recipe(kind)
    need_space(out, 3 * weigh(_architecture(name), recipe, Storage()).stored_nbytes)
    if not checkpoint.is_dir():
        from rlkit.recover import standin

        standin.write_packed(_shape(name), recipe, checkpoint)
    words = ["export", str(checkpoint), "-o", str(bundle), "--no-measure", "--json"]
    done = subprocess.run([sys.executable, "-m", "rlkit.apps.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise OSError(f"exporting {checkpoint} failed: {last}")
    shutil.rmtree(checkpoint)
    return bundle


def show(found: dict[str, Any]) -> None:
    """The gains as a table per place, and what was measured."""
    made = [Gain(**row) for row in found["gains"]]
    for place in dict.fromkeys(gain.place for gain in made):
        here = [gain for gain in made if gain.place == place]
        rows = []
        for model, stored in dict.fromkeys((gain.model, gain.stored) for gain in here):
            line = [gain for gain in here if (gain.model, gain.stored) == (model, stored)]
            rows.append((model, stored, "bytes", *(f"{g.bytes_percent:.1f}{'' if g.in_band else ' *'}" for g in line)))
            rows.append(("", "", "roofline", *(f"{gain.roofline_percent:.1f}" for gain in line)))
        contexts = [f"{context:,}" for context in dict.fromkeys(gain.context for gain in here)]
        title = f"{place}: tokens/s of W4/W2-GateUp over W4, % more, by context (uncalibrated)"
        console.table(("model", "stored", "", *contexts), rows, title=title)
    low, high = found["band_percent"]
    console.emit(f"* outside the {low} to {high} % that arXiv 2606.04238 states for models of 4B to 20B")
    if found["measured"]:
        rows = [_measured_cells(row) for row in found["measured"]]
        console.table(("model", "depth", "gain, %", "threads", ""), rows, title="measured on this CPU")


def _measured_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in row:
        return (row["model"], "", "", "", row["skipped"])
    return (row["model"], f"{row['depth']:,}", f"{row['gain_percent']:+.1f}", str(row["threads"] or ""), "")


if __name__ == "__main__":
    typer.run(main)
