"""Memory reckoned from architectures: against torch's own tensors, against shapes by hand, beside what was reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import configs
from rlkit.apps import cli, kvanalytic
from rlkit.profiles.architecture import of_config
from rlkit.profiles.frontier import analytic, published
from rlkit.profiles.frontier.space import Point, Space
from rlkit.recover import kvformat
from rlkit.recover.kvcache import QuantizedCache, prefill

PARAMETERS = {  # as the makers' model cards and their safetensors files have them
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
}
CONTEXT = 384


def measured(ffn: int, chunk: int | None, attention: str, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """The peak that the count of tensors finds on a small Llama, and its configuration."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=2048, max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.zeros((1, CONTEXT), dtype=torch.long)
    peak = prefill(model, ids, QuantizedCache(kvformat.parse("k16v16"), config), chunk, watch=True).activation_nbytes
    assert peak is not None
    return peak, config.to_dict() | {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("ffn", [128, 768])  # turning is widest in one, the MLP in the other
@pytest.mark.parametrize("chunk", [None, 64])
def test_activations_are_those_that_torch_makes(ffn: int, chunk: int | None) -> None:
    peak, config = measured(ffn, chunk, "sdpa", torch.bfloat16)
    model = of_config(config)
    kind = "flash" if chunk is None else "sdpa"  # without a mask heads share their keys
    assert analytic.activations_nbytes(model, CONTEXT, chunk, kind) == pytest.approx(peak, rel=0.02)
    assert analytic.activations_nbytes(model, CONTEXT, None, "sdpa") == analytic.activations_nbytes(
        model, CONTEXT, None, "flash"
    )


def test_eager_attention_keeps_scores() -> None:
    peak, config = measured(128, None, "eager", torch.float32)  # there a softmax in float32 is no copy
    ours = analytic.activations_nbytes(of_config(config), CONTEXT, None, "eager")
    scores = CONTEXT**2 * 4
    assert ours - 2 * scores == pytest.approx(peak / 2, rel=0.02)  # 16-bit scores twice, not once and once in float32


def test_parts_by_hand() -> None:
    model = of_config(configs.LLAMA31_8B)
    assert analytic.weights_nbytes(model, "float") == 2 * model.parameters
    matrices = model.parameters - 2 * 128_256 * 4096 - model.last_norm - 32 * 2 * 4096
    rest = 2 * (model.parameters - matrices)
    assert analytic.weights_nbytes(model, "w4a16") == rest + matrices * 4 // 8 + matrices // 128 * 5 // 2
    assert analytic.weights_nbytes(model, "w4") == analytic.weights_nbytes(model, "w4:awq")
    held = analytic.cache_nbytes(model, "k4v4:g32", 10_000)
    assert held == 32 * 2 * 8 * 128 * 10_000 * 5 // 8
    latent = of_config(configs.DEEPSEEK_V3)
    assert analytic.cache_nbytes(latent, "k16v16", 1) == 61 * 128 * (192 + 128) * 2
    mixture = of_config(configs.MIXTRAL)
    assert analytic.activations_nbytes(mixture, 1000, 1000) > 2 * 1000 * 3 * 2 * 14_336


def test_points_stand_beside_their_reference() -> None:
    model = of_config(configs.LLAMA31_8B)
    space = Space(weights=("float", "w4a16"), kv=("k4v4",), chunks=(256, None), contexts=(4096, 8192))
    found = analytic.analyse("llama", model, space)
    assert [len(found.at(context)) for context in found.contexts] == [8, 8]
    for context in found.contexts:
        first, *others = found.at(context)
        assert first.point == Point("float", "k16v16", None, context) and set(first.saved.values()) == {0.0}
        assert all(one.saved["flash"] == 1 - one.nbytes() / first.nbytes() for one in others)
        assert all(one.saved["eager"] == 1 - one.nbytes("eager") / first.nbytes("eager") for one in others)
    table = analytic.table(found)
    assert len(table.rows) == 8 and all(len(row) == len(table.columns) == 5 for row in table.rows)
    lines = list(analytic.findings(found, 10_000_000_000))
    assert len(lines) == 6 and lines[-2].startswith("at 4,096 tokens 4 of 8 fit 10.0 GB, the largest w4a16 k16v16")


def test_the_published_models() -> None:
    assert {name: one.model.parameters for name, one in published.models().items()} == PARAMETERS
    for one in map(published.compare, published.models().values()):
        assert sum(one.parts.values()) == pytest.approx(one.saved["flash"])
        assert one.saved["flash"] <= one.saved["logits"] < one.saved["eager"]
        assert one.published.saved - 0.1 < one.saved["flash"] < one.published.saved  # reported, in summaries
        whole = one.reference.memory.weights_nbytes + one.reference.memory.cache_nbytes + one.implied_peak_nbytes
        assert 1 - one.point.nbytes() / whole == pytest.approx(one.published.saved)
    qwen = published.compare(published.models()["qwen2.5-7b"])
    assert qwen.reference.memory.cache_nbytes == 57_344 * 10_240
    assert [round(100 * qwen.saved[kind], 1) for kind in ("flash", "logits", "eager")] == [65.7, 68.9, 81.0]
    tables = list(published.tables((10_240, 131_072)))
    assert [len(table.rows) for table in tables] == [5, 5, 5] and "mistral-7b beyond its 32,768" in tables[-1].note


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(["kv", *map(str, words), "--analytic"])
    return code, *capsys.readouterr()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config, page = tmp_path / "config.json", tmp_path / "kv.html"
    config.write_text(json.dumps(configs.LLAMA31_8B))
    code, out, err = said(capsys, config, "--contexts", "10k..32k", "--kv", "k8v2", "--html", page, "--json")
    assert code == 0 and "page: " in err
    found = json.loads(out)
    assert found["kind"] == "kv-analytic" and {one["context"] for one in found["model"]["points"]} == {
        10_240, 20_480, 32_768,
    }  # fmt: skip
    assert {one["kv"] for one in found["model"]["points"]} == {"k16v16", "k8v2"}
    assert "<svg" in page.read_text() and "k8v2" in page.read_text()
    code, named, _err = said(capsys, "llama-3.1-8b", "--contexts", "10k", "--kv", "k8v2")
    assert code == 0 and "reported for w4a16 k8v2:g64 at 10,240 tokens: 75% saved" in named
    whole = tmp_path / "published.json"
    code, out, _err = said(capsys, "published", "-o", whole, "--html", tmp_path / "published.html")
    assert code == 0 and "What the saving consists of" in out
    assert len(json.loads(whole.read_text())["published"]["compared"]) == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["absent"], "no model 'absent'"),
        (["qwen2.5-3b", "--tasks", "needle"], "--analytic measures nothing, so it has no use for --tasks"),
        (["qwen2.5-3b", "--grid"], "no use for --grid"),
        (["qwen2.5-3b", "--workers", "2"], "no use for --workers"),
        (["qwen2.5-3b", "--weights", "w5"], "no recipe 'w5'"),
        (["qwen2.5-3b", "--kv", "k4v4:g48"], "head_dim 128 of the keys is not divisible by groups of 48"),
        (["qwen2.5-3b", "--contexts", "128k..10k"], "128k..10k runs backwards"),
        (["qwen2.5-3b", "--contexts", "9999999999k"], "is no list of numbers"),
        (["published", "--kv", "k4v4"], "published stands for given points, so it has no use for --kv"),
        (["published", "--max-bytes", "5"], "no use for --max-bytes"),
    ],
)
def test_bad_words_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *words)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1


def test_contexts_in_words() -> None:
    assert kvanalytic.contexts_of("1000,4k") == (1000, 4096)
    assert kvanalytic.contexts_of("10k..128k") == (10_240, 20_480, 40_960, 81_920, 131_072)
    assert kvanalytic.contexts_of("1k..4k, 8k..8k") == (1024, 2048, 4096, 8192)
