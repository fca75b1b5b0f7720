"""Repair on tiny models: every kind of damage gets better, whatever form the result takes, also after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from rlkit.recover.corrupt import CORRUPTIONS, Damage, corrupt
from rlkit.recover.distill import Distillation
from rlkit.recover.mend import row_scales
from rlkit.recover.model import load_model
from rlkit.recover.placement import parse
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.recovery import Settings
from rlkit.recover.repair import load_repaired, repair
from rlkit.recover.source import Source, SourceKind, resolve
from rlkit.recover.synthesize import Sampling, synthesize
from rlkit.recover.workbench import Amounts

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (4, 24))
SAMPLING = Sampling(sequences=32, length=32, batch=32)
QUICK = Settings(
    adapters=parse("all:16"),
    sampling=SAMPLING,
    amounts=Amounts(statistics_rows=16, output_rows=8),
    distillation=Distillation(steps=6, batch=8, warmup=1, save_every=2),
)
UP = "model.layers.1.mlp.up_proj"


def divergence(sound: Any, other: Any) -> float:
    """The mean KL divergence of `other` from `sound` on fixed random ids, over the whole vocabulary."""
    p, q = (torch.log_softmax(torch.from_numpy(tiny.logits(model, IDS)).double(), -1) for model in (sound, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@dataclass(frozen=True)
class Sound:
    """A teacher with a corpus of its own."""

    source: Source
    corpus: Path

    def damaged(self, folder: Path, damage: Damage | None = None) -> Source:
        return resolve(corrupt(self.source, damage or Damage("noise"), folder))


@pytest.fixture(scope="module", params=[4, 2], ids=["MHA", "GQA"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make_sound(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make_sound(tmp_path_factory.mktemp("models"), 2)


def make_sound(root: Path, kv_heads: int) -> Sound:
    source = resolve(tiny.llama(root / "teacher", num_key_value_heads=kv_heads, initializer_range=0.1))
    return Sound(source, synthesize(*load_model(source), SAMPLING, root / "corpus").folder)


def run(sound: Sound, degraded: Source, out: Path, **options: Any) -> dict[str, Any]:
    options = {"settings": QUICK, "corpus": sound.corpus, **options}
    assert repair(sound.source, degraded, out, **options) == out
    facts: dict[str, Any] = json.loads((out / "recovery.json").read_text())
    return facts


def measured(facts: dict[str, Any]) -> dict[str, float]:
    return {row["stage"]: row["divergence"]["kl_mean"] for row in facts["stages"] if row["divergence"]}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_damage_gets_better(sound: Sound, kind: str, tmp_path: Path) -> None:
    degraded = sound.damaged(tmp_path / "damaged", Damage(kind))
    facts = run(sound, degraded, tmp_path / "out", merge=True)
    kl = measured(facts)
    assert list(kl) == ["degraded", "corrected", "distilled"]
    assert kl["corrected"] < 0.7 * kl["degraded"]
    assert kl["distilled"] <= kl["corrected"]
    teacher = load_model(sound.source)[0]
    before, after = (divergence(teacher, load_model(source)[0]) for source in (degraded, resolve(tmp_path / "out")))
    assert after < 0.95 * before
    assert facts["degraded"]["corruption"]["kind"] == kind
    assert facts["degraded"]["different"] == 14 and facts["degraded"]["out_of_reach"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 the old way
def test_an_adapter_gives_the_same_logits_in_peft(sound: Sound, tmp_path: Path) -> None:
    degraded = sound.damaged(tmp_path / "damaged")
    facts = run(sound, degraded, tmp_path / "out", settings=replace(QUICK, adapters=parse("kv:4,gate-up:16,all:8")))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "recovery.json"}
    assert facts["merged"] is False
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors")) < 300_000, "no weights are copied"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    own = load_repaired(tmp_path / "out", degraded)[0]
    np.testing.assert_allclose(tiny.logits(peft, IDS), tiny.logits(own, IDS), rtol=1e-4, atol=1e-4)
    teacher = load_model(sound.source)[0]
    assert divergence(teacher, own) < 0.9 * divergence(teacher, load_model(degraded)[0])
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "damaged").resolve())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_whole_and_as_good_as_it_says(gqa: Sound, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = load_model(gqa.source)
    model.to(dtype).save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    degraded = resolve(corrupt(resolve(tmp_path / "stored"), Damage("zero"), tmp_path / "damaged"))
    asked: list[np.ndarray] = []

    def against(original: Callable[[Any], Any], encode: Callable[[str], list[int]]) -> Callable[[Any], dict[str, Any]]:
        asked.append(original(IDS))
        assert encode("the cat")
        return lambda logits: {"kl_mean": float(np.abs(logits(IDS) - asked[0]).mean()), "top1_agreement": 0.0}

    facts = run(gqa, degraded, tmp_path / "out", merge=True, against=against)
    found = resolve(tmp_path / "out")
    assert found.kind is SourceKind.HF
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    again = float(np.abs(tiny.logits(load_model(found)[0], IDS) - asked[0]).mean())
    assert again == pytest.approx(measured(facts)["distilled"], rel=1e-5)
    assert facts["merged"] is True and facts["measured_on"] == "held-out text" and len(asked) == 1
    assert facts["source"]["reference"] == gqa.source.reference
    before = load_file(tmp_path / "damaged" / "model.safetensors")
    kept = {name for name in before if torch.equal(before[name], stored[name])}
    assert (
        kept <= {name for name in before if "norm" in name or "embed" in name} and "model.embed_tokens.weight" in kept
    )


def test_norms_are_trained_only_where_they_are_merged(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    run(gqa, degraded, tmp_path / "merged", merge=True)
    run(gqa, degraded, tmp_path / "lora", merge=True, settings=replace(QUICK, method="recover-lora"))
    before = load_file(tmp_path / "damaged" / "model.safetensors")
    for name, trained in (("merged", True), ("lora", False)):
        after = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(before["model.norm.weight"], after["model.norm.weight"]) is not trained


def test_the_published_method_trains_from_nothing(gqa: Sound, tmp_path: Path) -> None:
    settings = replace(QUICK, method="recover-lora", distillation=replace(QUICK.distillation, steps=20))
    kl = measured(run(gqa, gqa.damaged(tmp_path / "damaged"), tmp_path / "out", settings=settings))
    assert list(kl) == ["degraded", "distilled"]
    assert kl["distilled"] < kl["degraded"]


def test_the_closed_form_alone_needs_no_steps(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged", Damage("swap"))
    facts = run(gqa, degraded, tmp_path / "out", settings=replace(QUICK, method="corrected", adapters=parse("all:64")))
    assert list(measured(facts)) == ["degraded", "corrected"]
    teacher = load_model(gqa.source)[0]
    assert divergence(teacher, load_repaired(tmp_path / "out", degraded)[0]) < 1e-4, "swapped rows are of low rank"
    row = facts["layers"][1]["modules"]["mlp.up_proj"]
    assert row["rank"] == 64 and row["kl_forecast"][1] < 0.01 * row["kl_forecast"][0]
    assert [layer["layer"] for layer in facts["layers"]] == ["model.layers.0", "model.layers.1"]


def test_rows_that_shrank_are_scaled_back_where_they_can_be(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged", Damage("truncate"))
    settings = replace(QUICK, method="corrected", adapters=parse("all:4"))
    facts = {
        merge: run(gqa, degraded, tmp_path / f"{merge}", merge=merge, settings=settings) for merge in (True, False)
    }
    rows = {merge: [row for layer in facts[merge]["layers"] for row in layer["modules"].values()] for merge in facts}
    assert [all(row["rescaled"] for row in rows[merge]) for merge in (True, False)] == [True, False]
    assert measured(facts[True])["corrected"] < 0.8 * measured(facts[False])["corrected"]


def test_scales_of_rows() -> None:
    rng = torch.Generator().manual_seed(0)
    sound, half = torch.randn(6, 40, generator=rng), torch.tensor([0.5, 1.0, 2.0, 0.1, 1.0, 0.0])
    x = torch.randn(100, 40, generator=rng)
    found = sound * half[:, None]
    torch.testing.assert_close(row_scales(sound, found, x.T @ x), torch.tensor([2.0, 1.0, 0.5, 10.0, 1.0, 1.0]))


def test_training_does_not_spoil_what_is_right_already(gqa: Sound, tmp_path: Path) -> None:
    settings = replace(QUICK, adapters=parse("all:64"), distillation=replace(QUICK.distillation, adapter_lr=0.05))
    kl = measured(run(gqa, gqa.damaged(tmp_path / "damaged", Damage("swap")), tmp_path / "out", settings=settings))
    assert kl["distilled"] <= kl["corrected"] * 1.001 < 1e-3


def test_only_damaged_matrices_get_adapters(gqa: Sound, tmp_path: Path) -> None:
    damage = Damage("noise", match=("*.layers.1.mlp.*", "*.layers.0.self_attn.v_proj"))
    degraded = gqa.damaged(tmp_path / "damaged", damage)
    facts = run(gqa, degraded, tmp_path / "out", settings=replace(QUICK, adapters=parse("gate-up:300,kv:8")))
    adapters = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {
        name.split(".lora_A")[0].split("base_model.model.")[1]: len(a) for name, a in adapters.items() if "_A" in name
    }
    mlp = "model.layers.1.mlp"
    assert ranks == {f"{mlp}.gate_proj": 128, f"{mlp}.up_proj": 128, "model.layers.0.self_attn.v_proj": 8}
    assert facts["degraded"]["out_of_reach"] == [f"{mlp}.down_proj"]


def test_layers_of_zeros_are_repaired_and_named(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged", Damage("zero", 1.0, match=(UP,)))
    facts = run(gqa, degraded, tmp_path / "out", merge=True, settings=replace(QUICK, adapters=parse("all:64")))
    assert facts["degraded"]["all_zero"] == [UP]
    kl = measured(facts)
    assert kl["distilled"] < 0.8 * kl["degraded"]


def stopping_at(stage: str, done: int) -> Tell:
    def tell(event: Progress) -> None:
        if event.stage == stage and event.done >= done:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(("stage", "done"), [("synthesize", 1), ("layers", 1), ("distill", 3), ("write", 4)])
def test_an_interrupted_repair_goes_on_to_the_same_end(gqa: Sound, stage: str, done: int, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    options: dict[str, Any] = {"merge": True, "corpus": None if stage == "synthesize" else gqa.corpus}
    whole = run(gqa, degraded, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(gqa, degraded, tmp_path / "out", tell=stopping_at(stage, done), **options)
    assert not (tmp_path / "out").exists()
    told: list[Progress] = []
    again = run(gqa, degraded, tmp_path / "out", tell=told.append, **options)
    seen = {event.stage for event in told}
    if stage in ("distill", "write"):
        assert "layers" not in seen and "output moments" not in seen
        first = next((event.done for event in told if event.stage == "distill"), None)
        assert first == (None if stage == "write" else 3)
    assert measured(again) == pytest.approx(measured(whole), rel=1e-6)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out", "whole"]


def test_a_layer_file_cut_off_is_made_again(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    with pytest.raises(KeyboardInterrupt):
        run(gqa, degraded, tmp_path / "out", tell=stopping_at("layers", 2))
    file = next((tmp_path / ".out.work").rglob("model.layers.1.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    facts = run(gqa, degraded, tmp_path / "out")
    assert measured(facts)["corrected"] < 0.7 * measured(facts)["degraded"]
    assert len(facts["layers"]) == 2


def test_existing_folders_and_the_models_are_safe(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="--force"):
        run(gqa, degraded, tmp_path / "out")
    with pytest.raises(ValueError, match="is one of the models themselves"):
        run(gqa, degraded, tmp_path / "damaged", force=True)
    run(gqa, degraded, tmp_path / "out", force=True, settings=replace(QUICK, method="corrected"))
    with pytest.raises(ValueError, match=r"is an adapter alone, for .*damaged; recover that one with --merge"):
        resolve(tmp_path / "out")


def test_an_adapter_for_another_base_is_refused(gqa: Sound, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    run(gqa, degraded, tmp_path / "out", settings=replace(QUICK, method="corrected"))
    other = gqa.damaged(tmp_path / "other", Damage("prune"))
    with pytest.raises(ValueError, match=r"was made for .*damaged, and .*other has other weights; name the model"):
        load_repaired(tmp_path / "out", other)
    wide = resolve(tiny.llama(tmp_path / "wide", intermediate_size=384))
    with pytest.raises(ValueError, match=r"is for another model: .*mlp\.\w+_proj is .* there, and here .*; name"):
        load_repaired(tmp_path / "out", wide)
    with pytest.raises(ValueError, match="holds no adapter; it is merged already"):
        load_repaired(tmp_path / "damaged", degraded)


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    value = change(tensors.pop(name))
    save_file(tensors | ({} if value is None else {name: value}), folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def spoil(folder: Path, case: str) -> None:
    def poison(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = float("inf")
        return weight

    if case == "infinite":
        change_tensor(folder, f"{UP}.weight", poison)
    elif case == "missing":
        change_tensor(folder, f"{UP}.weight", lambda _weight: None)
    elif case == "cut":
        change_tensor(folder, f"{UP}.weight", lambda weight: weight[:8].clone())
    elif case == "zero norm":
        change_tensor(folder, "model.norm.weight", torch.zeros_like)
    elif case == "base of rope":
        change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    elif case == "no tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif case == "tokenizer":
        made = tiny.tokenizer()
        made.add_tokens(["another"])
        made.save_pretrained(folder)


REFUSED = {
    "infinite": rf"NaN or infinity, which no adapter can undo, in {UP}\.weight; copy them from the teacher",
    "missing": rf"lacks {UP}\.weight; copy them from the teacher",
    "cut": rf"has another shape of {UP}\.weight; name the model it came from",
    "zero norm": r"nothing but zeros, where no adapter reaches, in model\.norm\.weight",
    "base of rope": r"rope_parameters is .*500000.* where the teacher has .*; put it right in config\.json first",
    "no tokenizer": "has no readable tokenizer or config",
    "tokenizer": "has another tokenizer than the teacher, so their outputs cannot be compared; copy",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_adapter_can_undo_is_one_line(gqa: Sound, case: str, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged")
    spoil(tmp_path / "damaged", case)
    with pytest.raises(ValueError, match=REFUSED[case]) as raised:
        run(gqa, degraded, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_models_that_are_not_one_anothers_are_refused(gqa: Sound, tmp_path: Path) -> None:
    wide = resolve(tiny.llama(tmp_path / "wide", intermediate_size=384, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"is no damaged .*: layers 3 instead of 2, ffn 384 instead of 256; name"):
        run(gqa, wide, tmp_path / "out")
    shutil.copytree(gqa.source.path, tmp_path / "same")
    with pytest.raises(ValueError, match="holds the teacher's own weights, so there is nothing to recover"):
        run(gqa, resolve(tmp_path / "same"), tmp_path / "out")
    packed = resolve(tiny.checkpoint(gqa.source.path, tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="is a checkpoint folder, which is quantized already"):
        run(gqa, packed, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "scales"}, "method 'scales' is not for float models; use one of recover-lora, corrected, full"),
        ({"quantizer": "gptq"}, "quantizer 'gptq' has nothing to do in a float model"),
        ({"method": "recover-lora", "distillation": Distillation(steps=0)}, "recover-lora with steps = 0 does nothing"),
        ({"adapters": parse("kv:8")}, r"adapters on kv:8 reach none of the damaged tensors, such as .*up_proj; place"),
        ({"adapters": parse("*.experts:8")}, "match no linear that can take an adapter"),
    ],
)
def test_settings_that_do_nothing_are_refused(gqa: Sound, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    degraded = gqa.damaged(tmp_path / "damaged", Damage("noise", match=("*.up_proj",)))
    with pytest.raises(ValueError, match=said):
        run(gqa, degraded, tmp_path / "out", settings=replace(QUICK, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_corpus_of_another_tokenizer_is_refused(gqa: Sound, tmp_path: Path) -> None:
    shutil.copytree(gqa.corpus, tmp_path / "corpus")
    facts = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps(facts | {"tokenizer": "other"}))
    with pytest.raises(ValueError, match="another tokenizer"):
        run(gqa, gqa.damaged(tmp_path / "damaged"), tmp_path / "out", corpus=tmp_path / "corpus")
