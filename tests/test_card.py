"""The model card: what the hub reads, the figures of the file that ships, a snippet that runs, nothing private."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.export.card import base_model, bits_by_kind, card, license_of, source_name

DIVERGENCE = {
    "kl_mean": 0.4521,
    "kl_stderr": 0.01,
    "kl_median": 0.2,
    "kl_p99": 2.5,
    "top1_agreement": 0.625,
    "perplexity_original": 43.6,
    "perplexity_other": 58.5,
    "tokens": 4063,
    "text": "builtin",
    "reference": {"kind": "original", "name": "smollm2-135m"},
}


def manifest(**changes: Any) -> dict[str, Any]:
    tensors = [
        {"name": "a.gate_proj", "kind": "gate_up", "bits": 2, "nbytes": 1_000_000},
        {"name": "a.up_proj", "kind": "gate_up", "bits": 2, "nbytes": 500_000},
        {"name": "a.lora", "kind": "adapter", "bits": 8, "nbytes": 250_000},
        {"name": "lm_head", "kind": "lm_head", "bits": 4, "nbytes": 2_000_000},
        {"name": "norm", "kind": "norm", "bits": 32, "nbytes": 4_000},
    ]
    plain = {
        "schema_version": 1,
        "created": "2026-11-22",
        "source": {"reference": "smollm2-135m", "kind": "gguf", "file": "SmolLM2.gguf"},
        "recipe": {"name": "w4w2-gateup", "description": "two bits\nfor some"},
        "shape": {"architecture": "LlamaForCausalLM", "layers": 2, "hidden": 128, "vocab": 512},
        "target": "cpu",
        "accuracy_level": 4,
        "tensors": tensors,
        "nbytes": sum(tensor["nbytes"] for tensor in tensors),
        "versions": {"onnxruntime": "1.31.1", "torch": None},
        "divergence": DIVERGENCE,
        "provenance": {"settings": {"method": "full"}},
    }
    return {**plain, **changes}


def front_matter(text: str) -> dict[str, Any]:
    """The block between the dashes; its values are plain words or JSON."""
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block
    found: dict[str, Any] = {}
    for line in block[1].splitlines():
        if line.startswith("- "):
            found.setdefault("tags", []).append(line[2:])
        elif not line.endswith(":"):
            name, _colon, value = line.partition(": ")
            found[name] = json.loads(value) if value.startswith('"') else value
    return found


def test_the_hub_reads_license_base_model_and_tags() -> None:
    source = {"reference": "Qwen/Qwen3-4B", "kind": "hf", "file": "Qwen--Qwen3-4B"}
    found = front_matter(card(manifest(source=source, license="Apache-2.0")))
    assert found == {
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-4B",
        "base_model_relation": "quantized",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "quantized", "rlkit", "2-bit", "4-bit", "8-bit"],
    }


def test_an_asset_has_its_license_and_no_invented_base_model() -> None:
    found = front_matter(card(manifest()))
    assert found["license"] == "apache-2.0" and "base_model" not in found
    stated = manifest(base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert front_matter(card(stated))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("bad", ["mit\ntags: x", "see the README", '"', ""])
def test_what_is_no_license_identifier_stays_out(bad: str) -> None:
    assert license_of(manifest(source="folder", license=bad)) is None
    assert "license" not in front_matter(card(manifest(source="folder", license=bad)))


@pytest.mark.parametrize(
    ("source", "name", "base"),
    [
        ({"reference": "/home/ann/secret/model", "kind": "hf", "file": "model"}, "model", None),
        ({"reference": r"C:\Users\Ann\model.gguf", "kind": "gguf", "file": "model.gguf"}, "model.gguf", None),
        ({"reference": "models/tiny", "kind": "hf", "file": "tiny"}, "tiny", None),
        ({"reference": "Qwen/Qwen3-4B", "kind": "hf", "file": "Qwen--Qwen3-4B"}, "Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("checkpoint", "checkpoint", None),
        ({"reference": "/"}, "a model", None),
        (None, "a model", None),
    ],
)
def test_a_folder_is_named_without_its_path(source: Any, name: str, base: str | None) -> None:
    made = manifest(source=source)
    assert source_name(made) == name and base_model(made) == base
    assert not re.search("secret|Users|home|models/", card(made))


def test_bytes_by_kind_and_figures_of_the_file() -> None:
    text = card(manifest())
    assert "| gate_up | 2 | 1.50 |" in text and "| all | | 3.75 |" in text
    assert bits_by_kind(manifest()["tensors"])["gate_up"] == ("2", 1_500_000)
    assert "the full-precision original smollm2-135m on 4063 tokens of builtin" in text
    assert "| KL divergence, nats per token | 0.4521 |" in text and "| same most likely token | 62.5% |" in text
    assert "two bits for some" in text and "by the method `full`" in text
    assert "0.25 MB, read for every token" in text


def test_a_checkpoint_as_reference_is_not_called_the_original() -> None:
    reference = {"kind": "checkpoint", "name": "ckpt", "why": "the original is not downloaded"}
    text = card(manifest(divergence={**DIVERGENCE, "reference": reference, "to_checkpoint": {"skipped": "no room"}}))
    assert "**not** the full-precision original" in text and "Reason: the original is not downloaded." in text
    assert "Not compared with its checkpoint: no room." in text


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        (None, "Not measured on this file."),
        ({"skipped": "the original needs 16 GB"}, "Not measured on this file: the original needs 16 GB."),
    ],
)
def test_what_was_not_measured_is_said_twice(divergence: Any, words: str) -> None:
    text = card(manifest(divergence=divergence))
    assert words in text and "how far this file is from its original was not measured" in text


def test_notes_of_the_target_and_adapter_files_are_listed() -> None:
    text = card(manifest(plan={"notes": ["not run on an NPU"]}, adapters={"fr": {"rank": 8, "nbytes": 100}}))
    assert "- not run on an NPU" in text and "- `fr`: rank 8, nbytes 100" in text


def test_kv_caches_are_listed_with_what_they_save_and_cost() -> None:
    assert "KV caches" not in card(manifest())
    sizes = {"nbytes_per_token": 128, "float_nbytes_per_token": 1024}
    caches = {
        "int8": sizes | {"files": ["logits.kv-int8.onnx", "model.kv-int8.onnx"], "divergence": {"kl_mean": 0.0123}},
        "int4": sizes | {"files": ["model.kv-int4.onnx"]},
    }
    text = card(manifest(kv_cache=caches))
    assert "| int8 | `model.kv-int8.onnx` | 128 | 12.5% | 0.0123 |" in text
    assert "| int4 | `model.kv-int4.onnx` | 128 | 12.5% | not measured |" in text


def test_tensors_that_fared_alike_share_a_row() -> None:
    same = {"type": "Q4_0", "became": "4 bits, group 32", "why": "same codes"}
    rows = [{"tensor": "a", **same}, {"tensor": "b", **same}, {"tensor": "n", "type": "F32", "became": "float"}]
    rows[2]["why"] = "not quantized in the file"
    text = card(manifest(report=rows))
    assert "| Q4_0 | 4 bits, group 32 | 2 | same codes |" in text and "| F32 | float | 1 |" in text
    assert "What became of" not in card(manifest(report=[]))


def test_words_of_others_cannot_break_the_page() -> None:
    text = card(manifest(recipe={"name": "x", "description": "a | b <script>\n# heading"}))
    assert "<script>" not in text and "\n# heading" not in text and "a \\| b" in text


@pytest.mark.parametrize("chat", [True, False])
def test_the_snippet_runs_in_the_bundle(tmp_path: Path, chat: bool) -> None:
    folder = tiny.checkpoint(tiny.llama(tmp_path / "hf"), tmp_path / "ckpt")
    if not chat:
        (folder / "chat_template.jinja").unlink()
    out = export_bundle(folder, tmp_path / "bundle")
    text = (out / "README.md").read_text()
    program = text.partition("```python\n")[2].partition("\n```")[0]
    assert ("apply_chat_template" in program) == chat
    done = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
