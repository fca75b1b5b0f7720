"""What is written is what is read: by rlkit, by peft, and as plain files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from rlkit.recover import adapter, packing, recipe
from rlkit.recover.checkpoint import Recovered, load_checkpoint, quantization_config, write_checkpoint
from rlkit.recover.correct import LowRank
from rlkit.recover.model import linears, load_model, set_weights
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.source import SourceKind, read_shape, resolve

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 12))
SYMMETRIC = recipe.parse("[[rule]]\nbits = 4\nsymmetric = true\n")
PLANS = {"w4": tiny.W4, "w8": tiny.W8, "w4w2": tiny.W4W2, "symmetric": SYMMETRIC}
PLANS["float lm_head"] = recipe.parse('[[rule]]\nmatch = "lm_head"\nbits = 16\n[[rule]]\nbits = 4\nadapter_rank = 12\n')


@dataclass(frozen=True)
class Written:
    """A checkpoint folder and what was to be written into it."""

    folder: Path
    recovered: Recovered
    expected: Any  # the float model


def written(root: Path, plan: Recipe, *, tied: bool) -> Written:
    """Round-to-nearest of a tiny model as `plan` says, with random corrections on the grid."""
    model, tokenizer = load_model(resolve(tiny.llama(root / "hf", tied=tied)))
    rng = torch.Generator().manual_seed(0)
    quantized: dict[str, Quantized] = {}
    low_ranks: dict[str, LowRank] = {}
    for name, module in linears(model).items():
        scheme = plan.scheme_for(name)
        if scheme is None:
            continue
        scheme = scheme.resolve(module.in_features)
        quantized[name] = quantize_nearest(module.weight, scheme)
        if scheme.adapter_rank:
            n, k, r = module.out_features, module.in_features, scheme.adapter_rank
            factors = LowRank(0.02 * torch.randn(r, k, generator=rng), 0.5 * torch.randn(n, r, generator=rng))
            low_ranks[name] = adapter.snap(factors)
    tensors = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in quantized
        and not (tied and name in ("lm_head.weight", "model.embed_tokens.weight"))
    }
    if tied and "lm_head" not in quantized:
        tensors["model.embed_tokens.weight"] = model.state_dict()["lm_head.weight"].half()
        model.lm_head.weight.copy_(tensors["model.embed_tokens.weight"])
    nothing = torch.zeros(1, 1)
    set_weights(
        model,
        ((n, q.dequantize() + (low_ranks[n].product() if n in low_ranks else nothing)) for n, q in quantized.items()),
    )
    recovered = Recovered(quantized, low_ranks, tensors)
    (root / "ckpt").mkdir()
    write_checkpoint(root / "ckpt", recovered, model, tokenizer, plan, {"source": {"reference": "tiny"}})
    return Written(root / "ckpt", recovered, model)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("mixed"), tiny.W4W2, tied=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_round_trip_is_exact(plan: str, tied: bool, tmp_path: Path) -> None:
    made = written(tmp_path, PLANS[plan], tied=tied)
    model, tokenizer = load_checkpoint(made.folder)
    expected = made.expected.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert tokenizer.encode("the cat") == tiny.tokenizer().encode("the cat")
    np.testing.assert_array_equal(tiny.logits(model, IDS), tiny.logits(made.expected, IDS))


@pytest.mark.parametrize("plan", ["w4w2", "float lm_head"])
def test_snapped_adapters_survive_exactly(plan: str, tmp_path: Path) -> None:
    made = written(tmp_path, PLANS[plan], tied=True)
    found = adapter.load_adapters(made.folder / "adapter")
    assert found.keys() == made.recovered.low_ranks.keys() != set()
    for name, factors in made.recovered.low_ranks.items():
        assert torch.equal(found[name].a, factors.a)
        assert torch.equal(found[name].b, factors.b)
        assert torch.equal(adapter.snap(found[name]).product(), factors.product())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 the old way
def test_peft_reads_the_adapter(mixed: Written, tmp_path: Path) -> None:
    model, _tokenizer = load_checkpoint(mixed.folder)
    plain = Recovered(mixed.recovered.quantized, {}, mixed.recovered.tensors)
    write_checkpoint(tmp_path, plain, model, tiny.tokenizer(), tiny.W4W2, {"source": {"reference": "tiny"}})
    base, _tokenizer = load_checkpoint(tmp_path)
    assert not np.allclose(tiny.logits(base, IDS), tiny.logits(model, IDS), rtol=0, atol=0.05)
    theirs = PeftModel.from_pretrained(base, mixed.folder / "adapter").eval()
    np.testing.assert_allclose(tiny.logits(theirs, IDS), tiny.logits(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_files_are_what_the_format_says(tied: bool, tmp_path: Path) -> None:
    made = written(tmp_path, tiny.W4W2, tied=tied)
    tensors = load_file(made.folder / "model.safetensors")
    for name, quantized in made.recovered.quantized.items():
        n, k = quantized.codes.shape
        bits, group = quantized.scheme.bits, quantized.scheme.group
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "scales", "qzeros")]
        assert [tuple(part.shape) for part in parts] == [
            (n, k * bits // 8), (n, k // group), (n, -(-k // group * bits // 8))
        ]  # fmt: skip
        assert [part.dtype for part in parts] == [torch.uint8, torch.float32, torch.uint8]
        weight = packing.dequantize(*(part.numpy() for part in parts), bits, group, k)
        np.testing.assert_array_equal(weight, quantized.dequantize().numpy())
        assert f"{name}.weight" not in tensors
    if tied:
        table = made.recovered.quantized["lm_head"].dequantize().half()
        assert torch.equal(tensors["model.embed_tokens.weight"], table)
    assert {path.name for path in made.folder.iterdir()} == {
        "adapter", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "recipe.toml",
        "recovery.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert recipe.load(made.folder / "recipe.toml") == tiny.W4W2
    assert json.loads((made.folder / "recovery.json").read_text())["schema_version"] == 1


def test_other_rooms_know_the_folder(mixed: Written) -> None:
    source = resolve(mixed.folder)
    assert source.kind is SourceKind.CHECKPOINT
    assert read_shape(source).tied
    with pytest.raises(ValueError, match="quantized already"):
        load_model(source)


def test_overrides_name_what_differs(mixed: Written) -> None:
    config = json.loads((mixed.folder / "config.json").read_text())["quantization_config"]
    overrides = config.pop("overrides")
    assert config == {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False}
    two_bit = {f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up")}
    assert overrides == {name: {"bits": 2, "group_size": 64} for name in two_bit}


@pytest.mark.parametrize(
    ("schemes", "bits", "group", "symmetric", "overrides"),
    [
        ([Scheme(4, 32)] * 3, 4, 32, False, []),
        ([Scheme(4, 32), Scheme(2, 32), Scheme(2, 32)], 2, 32, False, [0]),
        ([Scheme(4, 32), Scheme(4, 64), Scheme(4, 64)], 4, 64, False, [0]),
        ([Scheme(4, 64, True), Scheme(4, 64, True), Scheme(8, 64, True)], 4, 64, True, [2]),
        ([Scheme(4, 64, True), Scheme(4, 64, True), Scheme(8, 64, False)], 4, 64, False, [2]),
        ([Scheme(4, 32, adapter_rank=8), Scheme(4, 32), Scheme(8, 32), Scheme(8, 32)], 4, 32, False, [2, 3]),
    ],
)
def test_quantization_config(
    schemes: list[Scheme], bits: int, group: int, symmetric: bool, overrides: list[int]
) -> None:
    assert quantization_config({str(i): scheme for i, scheme in enumerate(schemes)}) == {
        "quant_method": "olive",
        "bits": bits,
        "group_size": group,
        "symmetric": symmetric,
        "overrides": {str(i): {"bits": schemes[i].bits, "group_size": schemes[i].group} for i in overrides},
    }


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name (dots written as __); None removes."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def foreign_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    tensors = {f"{adapter.PREFIX}model.layers.9.mlp.up_proj.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


DAMAGE = {
    "truncated": (truncate, "truncated"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "damaged"),
    "not quantized": (lambda f: configure(f, quantization_config=None), "no quantization_config"),
    "another shape": (lambda f: configure(f, intermediate_size=512), "does not fit its config.json.*gate_proj"),
    "more layers": (lambda f: configure(f, num_hidden_layers=3), r"does not fit its config.json.*layers\.2"),
    "fewer layers": (lambda f: configure(f, num_hidden_layers=1), r"does not fit its config.json.*layers\.1"),
    "no norm": (lambda f: change(f, model__norm__weight=None), r"does not fit its config.json: model\.norm\.weight"),
    "no scales": (lambda f: change(f, lm_head__scales=None), r"lacks 'lm_head\.scales'"),
    "wrong scales": (lambda f: change(f, lm_head__scales=torch.ones(512, 3)), "groups of 32"),
    "foreign adapter": (foreign_adapter, r"layers\.9\.mlp\.up_proj"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(damage: str, tmp_path: Path) -> None:
    act, said = DAMAGE[damage]
    made = written(tmp_path, tiny.W4W2, tied=True)
    act(made.folder)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(made.folder)


def test_a_folder_without_weights_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.*rlkit recover"):
        load_checkpoint(tmp_path)
