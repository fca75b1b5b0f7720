from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.recover import contents, source
from test_source import write_gguf


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("hf") / "model")


def described(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    facts = contents.describe(source.resolve(path))
    json.dumps(facts, allow_nan=False)
    return facts, {row["kind"]: row for row in facts["tensors"]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("token_embd.weight", "embedding"),
        ("lm_head", "lm_head"),
        ("output.weight", "lm_head"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("blk.0.attn_output.weight", "attention"),
        ("blk.0.attn_norm.weight", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.1.mlp.up_proj", "gate_up"),
        ("blk.0.ffn_gate.weight", "gate_up"),
        ("blk.0.ffn_norm.weight", "norm"),
        ("output_norm.weight", "norm"),
        ("model.layers.1.mlp.down_proj", "down"),
        ("blk.3.ffn_down.weight", "down"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "adapter"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert contents.kind_of(name) == kind


def test_a_float_model(hf: Path) -> None:
    facts, rows = described(hf)
    assert facts["kind"] == "hf" and facts["recipe"] is None
    assert sum(row["weights"] for row in rows.values()) == facts["parameters"]
    assert rows["gate_up"] == {
        "kind": "gate_up",
        "bits": [32],
        "weights": 2 * 2 * 256 * 128,
        "nbytes": 4 * 2 * 2 * 256 * 128,
        "bits_per_weight": 32.0,
    }
    assert [kind for kind in contents.KINDS if kind in rows] == list(rows)


def test_a_checkpoint_counts_codes_scales_and_zero_points(hf: Path, tmp_path: Path) -> None:
    facts, rows = described(tiny.checkpoint(hf, tmp_path / "checkpoint", tiny.W4W2))
    assert (facts["kind"], facts["recipe"]) == ("checkpoint", "w4w2-gateup")
    assert rows["gate_up"]["bits"] == [2] and rows["down"]["bits"] == rows["attention"]["bits"] == [4]
    assert rows["gate_up"]["weights"] == 2 * 2 * 256 * 128
    # per 64 weights: 16 bytes of codes, 4 of scale; zero points 2 bits each in whole bytes per row of 2 groups
    assert rows["gate_up"]["nbytes"] == 2 * 2 * 256 * (128 // 4 + 2 * 4 + 1)
    assert rows["lm_head"]["weights"] == 512 * 128 and rows["lm_head"]["bits"] == [4]
    assert rows["embedding"]["bits"] == [16]  # the float table kept for other readers
    assert rows["adapter"]["weights"] == 2 * 2 * 32 * (128 + 256)


def test_a_gguf(tmp_path: Path) -> None:
    facts, rows = described(write_gguf(tmp_path / "model.gguf"))
    assert facts["files_nbytes"] == (tmp_path / "model.gguf").stat().st_size
    assert rows["embedding"]["bits"] == [4] and rows["embedding"]["bits_per_weight"] == 4.5
    assert rows["attention"]["bits"] == [16] and rows["norm"]["bits"] == [32]


def test_a_bundle_says_what_rlkit_wrote(hf: Path, tmp_path: Path) -> None:
    shape = source.read_shape(source.resolve(hf))
    up = {"name": "model.layers.0.mlp.up_proj", "kind": "gate_up", "bits": 2, "weights": 256 * 128, "nbytes": 9216}
    adapter = {"name": "model.layers.0.mlp.up_proj.lora_A", "kind": "adapter", "bits": 8, "weights": 90, "nbytes": 100}
    new = {"name": "x", "kind": "of a later version", "bits": 16, "weights": 10, "nbytes": 20}
    manifest = {"shape": shape.to_json(), "tensors": [up, adapter, new]}
    (tmp_path / "rlkit.json").write_text(json.dumps(manifest))
    (tmp_path / "genai_config.json").write_text("{}")
    _facts, rows = described(tmp_path)
    assert rows["gate_up"]["weights"] == 256 * 128 and rows["gate_up"]["bits_per_weight"] == 2.25
    assert rows["adapter"]["nbytes"] == 100 and rows["adapter"]["bits"] == [8]
    assert rows["other"]["nbytes"] == 20


def test_a_bundle_of_others_is_described_as_far_as_known(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(bytes(1000))
    facts, rows = described(tmp_path)
    assert facts["files_nbytes"] == 1002
    assert facts["shape"] is None and "rlkit export" in facts["note"] and rows == {}


def test_damaged_weights_are_named(hf: Path, tmp_path: Path) -> None:
    whole = (hf / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for keep in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"model\.safetensors is (damaged|truncated).*again"):
            contents.read_safetensors_header(path)
    path.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(ValueError, match="damaged"):
        contents.read_safetensors_header(path)


def test_pickled_weights_are_not_read(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "config.json").write_text((hf / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        described(tmp_path)
