"""Every kind of damage does what its amount says, the same for the same seed, and leaves the rest of a folder alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from rlkit.recover.corrupt import CORRUPTIONS, Damage, corrupt, relative_error
from rlkit.recover.model import load_model
from rlkit.recover.progress import Progress
from rlkit.recover.source import SourceKind, resolve

UP = "model.layers.1.mlp.up_proj"


def matrix(n: int = 256, k: int = 192, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def damaged(kind: str, amount: float | None = None, weight: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    return Damage(kind, amount, seed=seed).apply(UP, matrix() if weight is None else weight)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_a_function_of_seed_kind_and_module(kind: str) -> None:
    weight = matrix()
    first = damaged(kind, weight=weight)
    assert torch.equal(weight, matrix()), "the given matrix is left alone"
    assert torch.equal(damaged(kind), first)
    assert first.shape == weight.shape and first.dtype == weight.dtype and torch.isfinite(first).all()
    assert 0.02 < relative_error(weight, first) < 1
    drawn = kind in ("noise", "zero", "swap")
    assert torch.equal(damaged(kind, seed=1), first) is not drawn
    assert torch.equal(Damage(kind).apply("model.layers.0.mlp.up_proj", weight), first) is not drawn


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_stored_type_stays(kind: str, dtype: torch.dtype) -> None:
    found = damaged(kind, weight=matrix().to(dtype))
    assert found.dtype == dtype
    assert relative_error(matrix(), found) > 0.02


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (33, 70)])
def test_odd_and_tiny_matrices_are_no_trouble(kind: str, size: tuple[int, int]) -> None:
    found = damaged(kind, weight=matrix(*size))
    assert found.shape == size and torch.isfinite(found).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_matrix_of_zeros_stays_one(kind: str) -> None:
    zeros = torch.zeros(64, 32)
    assert torch.equal(damaged(kind, weight=zeros), zeros)
    assert relative_error(zeros, zeros) == 0.0


@pytest.mark.parametrize("amount", [0.05, 0.5, 2.0])
def test_noise_has_the_size_asked_for(amount: float) -> None:
    assert relative_error(matrix(), damaged("noise", amount)) == pytest.approx(amount, rel=0.02)


def test_dtype_is_a_float8_round_trip_without_its_scale() -> None:
    weight = torch.tensor([[1.0, 1.0625, 600.0, 0.002, 0.0004]])
    assert damaged("dtype", 0, weight).tolist() == [[1.0, 1.0, 448.0, 2**-9, 0.0]]
    assert damaged("dtype", 2, weight)[0, 2:].tolist() == [576.0, 0.0, 0.0]  # 600 fits now, the small ones vanish
    errors = [relative_error(matrix(), damaged("dtype", amount)) for amount in (0, 2, 4, 6, 16)]
    assert errors == sorted(errors) and errors[0] < 0.05 and errors[-1] == 1.0


@pytest.mark.parametrize(("amount", "blocks"), [(1e-3, 1), (0.25, 3), (1.0, 12)])
def test_zeros_come_in_whole_blocks(amount: float, blocks: int) -> None:
    lost = (damaged("zero", amount) == 0).reshape(4, 64, 3, 64).permute(0, 2, 1, 3).reshape(12, -1)
    assert (lost.all(1) == lost.any(1)).all()
    assert int(lost.all(1).sum()) == blocks


@pytest.mark.parametrize(("amount", "moved"), [(1e-3, 2), (0.25, 4), (1.0, 16)])
def test_swapped_rows_are_all_still_there(amount: float, moved: int) -> None:
    weight, found = matrix(n=16 * 16 + 5), damaged("swap", amount, matrix(n=16 * 16 + 5))
    assert torch.equal(weight.sort(0).values, found.sort(0).values)
    before, after = weight[:256].reshape(16, -1), found[:256].reshape(16, -1)
    places = [int((before == row).all(1).nonzero()) for row in after]
    assert sum(place != i for i, place in enumerate(places)) == moved
    assert [places[place] for place in places] == list(range(16)), "in pairs"
    assert torch.equal(found[256:], weight[256:])


def test_truncation_keeps_the_leading_bits() -> None:
    weight = torch.tensor([[1.875, -1.875, 3.25, 0.15625]])
    assert damaged("truncate", 1, weight).tolist() == [[1.5, -1.5, 3.0, 0.125]]
    assert damaged("truncate", 0, weight).tolist() == [[1.0, -1.0, 2.0, 0.125]]
    assert torch.equal(damaged("truncate", 22, matrix().bfloat16()), matrix().bfloat16())


@pytest.mark.parametrize("amount", [0.1, 0.5, 1.0])
def test_pruning_takes_the_smallest(amount: float) -> None:
    weight, found = matrix(), damaged("prune", amount)
    gone = found == 0
    assert int(gone.sum()) == round(amount * weight.numel())
    assert torch.equal(found[~gone], weight[~gone])
    if amount < 1:
        assert weight[gone].abs().max() <= weight[~gone].abs().min()
    assert int((damaged("prune", 0.5, torch.ones(8, 8)) == 0).sum()) == 32, "ties too"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "rust"}, "kind 'rust' is no damage known here; use one of noise, dtype, zero"),
        ({"kind": "noise", "amount": 0.0}, "amount = 0 of noise must be in 1e-06..10: it is the noise as a fraction"),
        ({"kind": "noise", "amount": float("nan")}, "amount = nan of noise"),
        ({"kind": "zero", "amount": 1.5}, "amount = 1.5 of zero must be in 1e-06..1: it is the share"),
        ({"kind": "swap", "amount": -0.1}, "amount = -0.1 of swap"),
        ({"kind": "truncate", "amount": 2.5}, r"must be a whole number of 0\.\.22: it is the number of mantissa bits"),
        ({"kind": "truncate", "amount": 23}, "amount = 23 of truncate"),
        ({"kind": "dtype", "amount": float("inf")}, "amount = inf of dtype"),
        ({"kind": "noise", "match": ()}, "an empty pattern matches no module"),
        ({"kind": "noise", "match": ("*_proj", "")}, "an empty pattern matches no module"),
    ],
)
def test_senseless_damage_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        Damage(**changes)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.llama(root / "tied")
    tiny.llama(root / "untied", tied=False)
    tiny.checkpoint(root / "tied", root / "checkpoint")
    return root


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_folder_is_the_source_but_for_the_damage(models: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    damage = Damage("noise", 0.3, ("*.up_proj", "model.layers.0.self_attn.*"), seed=7)
    assert corrupt(resolve(models / "tied"), damage, tmp_path / "out", tell=told.append) == tmp_path / "out"
    before, after = stored(models / "tied"), stored(tmp_path / "out")
    hit = {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    hit |= {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{name}.weight" for name in hit}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models / "tied" / name).read_bytes()
    facts = json.loads((tmp_path / "out" / "corruption.json").read_text())
    assert facts["damage"] == {"kind": "noise", "amount": 0.3, "match": list(damage.match), "seed": 7}
    assert facts["matrices"].keys() == hit and facts["earlier"] is None
    row = facts["matrices"][UP]
    assert row["shape"] == [256, 128]
    assert row["relative_error"] == pytest.approx(relative_error(before[f"{UP}.weight"], after[f"{UP}.weight"]))
    assert (told[-1].done, told[-1].total) == (len(before), len(before))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_result_is_a_model_that_others_load(models: Path, name: str, tmp_path: Path) -> None:
    corrupt(resolve(models / name), Damage("zero"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny.tokenizer())
    found = resolve(tmp_path / "out")
    assert found.kind is SourceKind.HF
    ids = np.arange(12)[None]
    np.testing.assert_array_equal(tiny.logits(load_model(found)[0], ids), tiny.logits(model, ids))
    assert not np.allclose(tiny.logits(model, ids), tiny.logits(load_model(resolve(models / name))[0], ids), atol=1e-3)


@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "*embed*"])
@pytest.mark.parametrize("copies", [1, 2])
def test_tied_embeddings_stay_tied(models: Path, pattern: str, copies: int, tmp_path: Path) -> None:
    shutil.copytree(models / "tied", tmp_path / "tied")
    tensors = stored(tmp_path / "tied")
    if copies == 2:  # some writers store both
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    corrupt(resolve(tmp_path / "tied"), Damage("noise", match=(pattern,)), tmp_path / "out")
    after = stored(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert not torch.equal(after["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert copies == 1 or torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])
    model = load_model(resolve(tmp_path / "out"))[0]
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    facts = json.loads((tmp_path / "out" / "corruption.json").read_text())
    assert list(facts["matrices"]) == ["model.embed_tokens"]


def test_untied_heads_are_damaged_alone(models: Path, tmp_path: Path) -> None:
    corrupt(resolve(models / "untied"), Damage("prune", match=("lm_head",)), tmp_path / "out")
    before, after = stored(models / "untied"), stored(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}


def test_the_damage_does_not_depend_on_the_cut_into_files(models: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "tied", dtype=torch.bfloat16)
    for size, name in (("1GB", "whole"), ("300KB", "cut")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        corrupt(resolve(tmp_path / name), Damage("swap"), tmp_path / f"{name}-damaged")
    assert len(list((tmp_path / "cut-damaged").glob("*.safetensors"))) > 2
    assert (tmp_path / "cut-damaged" / "model.safetensors.index.json").is_file()
    whole, cut = stored(tmp_path / "whole-damaged"), stored(tmp_path / "cut-damaged")
    assert {tensor.dtype for tensor in cut.values()} == {torch.bfloat16}
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut-damaged")


def test_damage_upon_damage_is_remembered(models: Path, tmp_path: Path) -> None:
    corrupt(resolve(models / "tied"), Damage("noise"), tmp_path / "once")
    corrupt(resolve(tmp_path / "once"), Damage("prune"), tmp_path / "twice")
    facts = json.loads((tmp_path / "twice" / "corruption.json").read_text())
    assert (facts["damage"]["kind"], facts["earlier"]["damage"]["kind"]) == ("prune", "noise")


def test_existing_folders_are_replaced_only_by_force(models: Path, tmp_path: Path) -> None:
    source, out = resolve(models / "tied"), tmp_path / "out"
    corrupt(source, Damage("noise"), out)
    with pytest.raises(FileExistsError, match="--force"):
        corrupt(source, Damage("zero"), out)
    corrupt(source, Damage("zero"), out, force=True)
    assert json.loads((out / "corruption.json").read_text())["damage"]["kind"] == "zero"
    with pytest.raises(ValueError, match="is the model itself"):
        corrupt(resolve(out), Damage("zero"), out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(event: Progress) -> None:
    if event.done == 5:
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        corrupt(resolve(models / "tied"), Damage("noise"), tmp_path / "out", tell=interrupted)
    assert list(tmp_path.iterdir()) == []


def spoiled(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), folder / "model.safetensors")


BAD = {
    "no such matrix": (
        Damage("noise", match=("*.experts",)),
        r"'\*\.experts' matches no matrix of .*; there are q_proj",
    ),
    "NaN": (Damage("noise"), "up_proj holds NaN or infinity already; name a sound model"),
    "gone": (Damage("noise"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight; fetch"),
    "other size": (Damage("noise"), r"up_proj is \(3, 3\) where the config says \(256, 128\)"),
    "no weights": (Damage("noise"), r"lacks model\.safetensors, where its weights should be"),
    "cut off": (Damage("noise"), "is truncated"),
    "fp8": (Damage("noise"), r"is quantized already \(fp8\); name a full-precision model"),
    "escape": (Damage("noise"), "which is outside the folder"),
    "no effect": (Damage("truncate", 22), "truncate with amount 22 changes nothing in this model's number format"),
}


def spoil(folder: Path, case: str) -> None:
    if case in ("NaN", "gone", "other size"):
        values = {"NaN": torch.full((256, 128), float("nan")), "gone": None, "other size": torch.ones(3, 3)}
        spoiled(folder, f"{UP}.weight", values[case])
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "cut off":
        os.truncate(folder / "model.safetensors", 100_000)
    elif case == "fp8":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    elif case == "escape":
        index = {"weight_map": {"lm_head.weight": "../tied/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "no effect":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize("case", BAD)
def test_unusable_models_are_refused_in_one_line(models: Path, case: str, tmp_path: Path) -> None:
    damage, said = BAD[case]
    shutil.copytree(models / "tied", tmp_path / "model")
    spoil(tmp_path / "model", case)
    with pytest.raises(ValueError, match=said) as raised:
        corrupt(resolve(tmp_path / "model"), damage, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint folder, which is quantized already"):
        corrupt(resolve(models / "checkpoint"), Damage("noise"), tmp_path / "out")
