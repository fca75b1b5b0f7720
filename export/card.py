"""The model card of a bundle: README.md, made from the manifest alone, so that both always say the same.

It begins with the front matter that the hub reads (YAML; every value is written as a JSON string, which YAML takes as
it is). What is not known is left out or said, never guessed; a folder of this machine is named without its path.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath, PureWindowsPath
from typing import Any

from rlkit.recover import assets
from rlkit.recover.hub import is_hub_id

FIGURES = (  # of manifest["divergence"]: key, what it is called, how it is written
    ("kl_mean", "KL divergence, nats per token", "{:.4f}"),
    ("kl_stderr", "its standard error", "{:.4f}"),
    ("kl_p99", "99th percentile of KL", "{:.4f}"),
    ("top1_agreement", "same most likely token", "{:.1%}"),
    ("perplexity_original", "perplexity of the reference", "{:.2f}"),
    ("perplexity_other", "perplexity of this file", "{:.2f}"),
)
REFERENCES = {  # manifest["divergence"]["reference"]["kind"]
    "original": "the full-precision original {name}",
    "checkpoint": "the quantized checkpoint {name} it was made from, **not** the full-precision original",
}
LICENSE = r"[a-z0-9][a-z0-9.+-]*"  # the form of the hub's identifiers
STOCK = """\
import json
import onnxruntime_genai as og

folder = "."  # this folder
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
question = "What is the capital of France?"
{prompt}
params = og.GeneratorParams(model)
params.set_search_options(max_length=256)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)"""
CHAT_PROMPT = """\
messages = json.dumps([{"role": "user", "content": question}])
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"""


def card(manifest: dict[str, Any]) -> str:
    """The model card of a manifest, in markdown with front matter."""
    sections = (
        _front_matter(manifest),
        _about(manifest),
        _tensors(manifest),
        _divergence(manifest.get("divergence")),
        _running(manifest),
        _adapters(manifest),
        _caches(manifest),
        _converted(manifest),
        _limits(manifest),
        _provenance(manifest),
    )
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"


def bits_by_kind(tensors: list[dict[str, Any]]) -> dict[str, tuple[str, int]]:
    """Kind -> (its widths, such as "2" or "8, 32"; its bytes)."""
    widths: dict[str, set[int]] = {}
    nbytes: dict[str, int] = {}
    for tensor in tensors:
        widths.setdefault(tensor["kind"], set()).add(tensor["bits"])
        nbytes[tensor["kind"]] = nbytes.get(tensor["kind"], 0) + tensor["nbytes"]
    return {kind: (", ".join(str(bits) for bits in sorted(widths[kind])), nbytes[kind]) for kind in widths}


def source_reference(manifest: dict[str, Any]) -> str:
    """How the source was named when the bundle was made: an asset, a hub id, or a path."""
    source = manifest.get("source")
    return str(source.get("reference", "a model") if isinstance(source, dict) else source or "a model")


def source_name(manifest: dict[str, Any]) -> str:
    """The same without the folders of somebody's machine."""
    reference = source_reference(manifest)
    if is_hub_id(reference) and not _is_local(manifest):
        return reference
    return _last(reference)


def base_model(manifest: dict[str, Any]) -> str | None:
    """The hub id of the model that this one was made from: as stated, else the source's name if it is such an id."""
    stated = manifest.get("base_model")
    if isinstance(stated, str) and is_hub_id(stated):
        return stated
    name = source_name(manifest)
    return name if is_hub_id(name) else None


def license_of(manifest: dict[str, Any]) -> str | None:
    """The license of the weights, as the hub spells it: as stated, else that of the asset it was made from."""
    stated = manifest.get("license")
    asset = assets.registry().get(source_reference(manifest))
    found = str(stated or (asset.license if asset else "")).lower()
    return found if re.fullmatch(LICENSE, found) else None


def _is_local(manifest: dict[str, Any]) -> bool:
    """A folder a/b looks like a hub id; what came from the hub was recorded as a folder named owner--name."""
    source = manifest.get("source")
    file = source.get("file") if isinstance(source, dict) else None
    return file is not None and file != source_reference(manifest).replace("/", "--")


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePath(path)).name or "a model"


def _front_matter(manifest: dict[str, Any]) -> Iterator[str]:
    yield "---"
    if (found := license_of(manifest)) is not None:
        yield f"license: {json.dumps(found)}"
    if (base := base_model(manifest)) is not None:
        yield f"base_model: {json.dumps(base)}"
        yield "base_model_relation: quantized"
    yield "library_name: onnxruntime-genai"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    widths = sorted({int(tensor["bits"]) for tensor in manifest["tensors"] if tensor["bits"] < 16})
    for tag in ("onnx", "quantized", "rlkit", *(f"{bits}-bit" for bits in widths)):
        yield f"- {tag}"
    yield "---"


def _about(manifest: dict[str, Any]) -> Iterator[str]:
    shape, asked = manifest["shape"], manifest.get("recipe") or {}
    yield f"# {source_name(manifest)}, quantized for {manifest['target']}"
    yield ""
    sizes = f"{shape['layers']} layers, hidden {shape['hidden']}, vocabulary {shape['vocab']}"
    described = f"{asked.get('name', 'not recorded')}: {_line(asked.get('description', ''))}".rstrip(": ")
    yield f"{shape['architecture']}, {sizes}, as ONNX for onnxruntime-genai. Recipe {described}."


def _tensors(manifest: dict[str, Any]) -> Iterator[str]:
    yield "## What it holds"
    yield ""
    yield "| tensors | bits | MB |"
    yield "|---|---|---|"
    for kind, (bits, nbytes) in bits_by_kind(manifest["tensors"]).items():
        yield f"| {kind} | {bits} | {nbytes / 1e6:.2f} |"
    yield f"| all | | {manifest['nbytes'] / 1e6:.2f} |"
    yield ""
    level = manifest["accuracy_level"]
    how = "activations are quantized to int8 inside each product" if level == 4 else "activations stay float"
    yield f"Made for {manifest['target']}, accuracy_level {level} ({how})."
    if manifest.get("logits") == "last":
        yield "`model.onnx` computes the last token's logits; `logits.onnx`, on the same data, computes all of them."


def _divergence(divergence: dict[str, Any] | None) -> Iterator[str]:
    yield "## Accuracy of this very file"
    yield ""
    if divergence is None:
        yield "Not measured on this file."
        return
    if "skipped" in divergence:
        yield f"Not measured on this file: {_line(divergence['skipped'])}."
        return
    if "kl_mean" not in divergence:  # a measure of somebody's own
        yield from (f"- {_line(key)}: {_line(value)}" for key, value in divergence.items() if _is_plain(value))
        return
    yield from _against(divergence)
    yield "| figure | value |"
    yield "|---|---|"
    for key, label, form in FIGURES:
        if key in divergence:
            yield f"| {label} | {form.format(divergence[key])} |"
    to_checkpoint = divergence.get("to_checkpoint") or {}
    if "kl_mean" in to_checkpoint:
        yield f"| KL divergence from its quantized checkpoint | {to_checkpoint['kl_mean']:.4f} |"
    if "skipped" in to_checkpoint:
        yield ""
        yield f"Not compared with its checkpoint: {_line(to_checkpoint['skipped'])}."


def _against(divergence: dict[str, Any]) -> Iterator[str]:
    """What it was compared with, on what."""
    reference = divergence.get("reference") or {"kind": "original", "name": ""}
    whose = REFERENCES.get(reference["kind"], "{name}").format(name=_line(reference.get("name", ""))).strip()
    text = f" on {divergence['tokens']} tokens of {divergence['text']}" if "text" in divergence else ""
    yield f"Compared with {whose}{text}."
    if reference.get("why"):
        yield f"Reason: {_line(reference['why'])}."
    yield ""


def _running(manifest: dict[str, Any]) -> Iterator[str]:
    chat = "chat_template.jinja" in (manifest.get("sha256") or {})
    yield "## Run it"
    yield ""
    yield "With rlkit, in this folder:"
    yield ""
    yield '    rlkit run . "What is the capital of France?"'
    yield ""
    yield "With stock onnxruntime-genai, without rlkit:"
    yield ""
    yield "```python"
    yield from STOCK.replace("{prompt}", CHAT_PROMPT if chat else "prompt = question").splitlines()
    yield "```"
    if not chat:
        yield ""
        yield "It has no chat template, so it completes text."


def _adapters(manifest: dict[str, Any]) -> Iterator[str]:
    """Low-rank adapters: kept as files that are switched at run time, or part of the graph."""
    found = manifest.get("adapters") or {}
    nbytes = sum(tensor["nbytes"] for tensor in manifest["tensors"] if tensor["kind"] == "adapter")
    if not found and not nbytes:
        return
    yield "## Adapters"
    yield ""
    if nbytes:
        yield f"- in the graph: {nbytes / 1e6:.2f} MB, read for every token"
    for name, about in found.items():
        yield f"- `{name}`: {_facts(about)}"


def _caches(manifest: dict[str, Any]) -> Iterator[str]:
    """Quantized KV caches that the bundle offers beside its float one."""
    found = manifest.get("kv_cache") or {}
    if not found:
        return
    yield "## KV caches"
    yield ""
    yield "Other graphs over the same data keep keys and values as integers: `rlkit run . --kv int8`, or with stock"
    yield "onnxruntime-genai this file as `model.decoder.filename`."
    yield ""
    yield "| cache | file | bytes per token | of the float cache | KL to the float cache |"
    yield "|---|---|---|---|---|"
    for name, facts in found.items():
        nbytes, cost = facts["nbytes_per_token"], facts.get("divergence")
        share, kl = nbytes / facts["float_nbytes_per_token"], f"{cost['kl_mean']:.4f}" if cost else "not measured"
        yield f"| {_line(name)} | `{_line(facts['files'][-1])}` | {nbytes} | {share:.1%} | {kl} |"


def _converted(manifest: dict[str, Any]) -> Iterator[str]:
    """What happened to the tensors of a file with grids of its own, such as GGUF: one row for all that fared alike."""
    rows = Counter((row["type"], row["became"], row["why"]) for row in manifest.get("report") or ())
    if not rows:
        return
    yield "## What became of the source's tensors"
    yield ""
    yield "| stored as | became | tensors | why |"
    yield "|---|---|---|---|"
    for (stored, became, why), count in rows.items():
        yield f"| {_line(stored)} | {_line(became)} | {count} | {_line(why)} |"


def _limits(manifest: dict[str, Any]) -> Iterator[str]:
    """What was not verified, as the plan and the divergence say."""
    notes = [_line(note) for note in (manifest.get("plan") or {}).get("notes") or ()]
    if not manifest.get("divergence") or "skipped" in manifest["divergence"]:
        notes.append("how far this file is from its original was not measured")
    if license_of(manifest) is None:
        notes.append("the license of the weights was not recorded; that of the original model holds")
    if notes:
        yield "## Limits, and what was not verified"
        yield ""
        yield from (f"- {note}" for note in notes)


def _provenance(manifest: dict[str, Any]) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    yield f"From {source_name(manifest)}, {manifest['created']}."
    settings = (manifest.get("provenance") or {}).get("settings") or {}
    if settings.get("method"):
        yield f"Recovered by the method `{_line(settings['method'])}`."
    yield "Made with " + ", ".join(f"{name} {found}" for name, found in manifest["versions"].items() if found) + "."
    yield "`rlkit.json` lists every tensor, the SHA-256 of every file, and all that is recorded."


def _facts(about: Any) -> str:
    """A value of the manifest as plain words."""
    if isinstance(about, dict):
        return ", ".join(f"{key} {_line(value)}" for key, value in about.items())
    return _line(about)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _line(value: Any) -> str:
    """Text on one line, without the marks that would end a cell or begin a tag."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").rstrip(".")
