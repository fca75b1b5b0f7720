"""Recovery from end to end on a tiny model: stages, resumption, and what the checkpoint says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from rlkit.recover import packing, recipe
from rlkit.recover.allocate import Budget
from rlkit.recover.checkpoint import load_checkpoint
from rlkit.recover.distill import Distillation
from rlkit.recover.model import load_model, logits_fn
from rlkit.recover.placement import Placement
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.recipe import Recipe
from rlkit.recover.recovery import HELD_OUT_ROWS, Settings, recover, resolved_ranks, resolved_schemes
from rlkit.recover.source import Source, resolve
from rlkit.recover.synthesize import Sampling, synthesize
from rlkit.recover.workbench import Amounts

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (4, 24))
QUICK = Settings(
    sampling=Sampling(sequences=28, length=24, batch=14),
    amounts=Amounts(statistics_rows=16, output_rows=9, rounds=1),
    distillation=Distillation(steps=12, batch=8, warmup=1, scale_lr=2e-3, norm_lr=1e-4),  # the text is short
)
STAGES = ["synthesize", "layers", "round-to-nearest", "compensated", "corrected", "distilled"]


def against(original: Callable[[Any], Any], _encode: Any) -> Callable[[Any], dict[str, Any]]:
    """A measure on fixed ids: the mean KL divergence, in numpy."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    own = log_softmax(original(IDS))
    return lambda other: {"kl_mean": float((np.exp(own) * (own - log_softmax(other(IDS)))).sum(-1).mean())}


@dataclass(frozen=True)
class Run:
    """A finished recovery."""

    source: Source
    out: Path
    told: list[Progress]
    facts: dict[str, Any]

    def told_stages(self) -> list[str]:
        return list(dict.fromkeys(event.stage for event in self.told))


def run(source: Source, out: Path, plan: Recipe = tiny.W4W2, **options: Any) -> Run:
    told: list[Progress] = []
    options = {"settings": QUICK, "against": against, "tell": told.append, **options}
    assert recover(source, plan, out, **options) == out
    return Run(source, out, told, json.loads((out / "recovery.json").read_text()))


def stopping_at(stage: str, done: int) -> Tell:
    def tell(event: Progress) -> None:
        if event.stage == stage and event.done >= done:
            raise KeyboardInterrupt

    return tell


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1))


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(source, tmp_path_factory.mktemp("made") / "ckpt")


def test_stages_come_in_order_and_each_helps(made: Run) -> None:
    rows = made.facts["stages"]
    assert [row["stage"] for row in rows] == STAGES
    assert [row["divergence"] for row in rows[:2]] == [None, None]
    kl = [row["divergence"]["kl_mean"] for row in rows[2:]]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 0.8 * kl[0]
    assert all(row["seconds"] >= 0 for row in rows)


def test_the_checkpoint_is_as_good_as_it_says(made: Run) -> None:
    measure = against(logits_fn(load_model(made.source)[0]), None)
    measured = measure(logits_fn(load_checkpoint(made.out)[0]))["kl_mean"]
    assert measured == pytest.approx(made.facts["stages"][-1]["divergence"]["kl_mean"], rel=1e-5)


def test_nothing_else_is_left(made: Run) -> None:
    assert list(made.out.parent.iterdir()) == [made.out]
    assert not list(made.out.glob(".*"))


def test_facts_are_complete(made: Run) -> None:
    facts = made.facts
    assert facts["schema_version"] == 1
    assert facts["source"]["reference"] == str(made.source.reference)
    assert facts["source"]["parameters"] == sum(p.numel() for p in load_model(made.source)[0].parameters())
    assert facts["settings"]["distillation"]["steps"] == 12
    assert facts["settings"]["sampling"]["seed"] == 0
    assert facts["synthetic_tokens"] == 28 * 24
    assert facts["measured_on"] == "held-out text"
    assert recipe.load(made.out / "recipe.toml") == tiny.W4W2


def test_bits_are_the_recipes(made: Run) -> None:
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, 32)
    two_bit = {f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up")}
    assert config["overrides"] == {name: {"bits": 2, "group_size": 64} for name in two_bit}
    stored = load_file(made.out / "model.safetensors")
    assert stored["model.layers.0.mlp.gate_proj.qweight"].shape == (256, 128 * 2 // 8)
    assert stored["lm_head.qweight"].shape == (tiny.VOCAB, 128 * 4 // 8)
    scales = [tensor for name, tensor in stored.items() if name.endswith(".scales")]
    assert all((tensor.astype(np.float16) == tensor).all() for tensor in scales)
    adapters = load_file(made.out / "adapter" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in adapters} == two_bit


@pytest.mark.parametrize("steps", [0, 1])
def test_adapters_lie_on_the_exporters_grid(source: Source, steps: int, tmp_path: Path) -> None:
    found = run(source, tmp_path / "ckpt", settings=replace(QUICK, distillation=Distillation(steps=steps, batch=2)))
    for name, tensor in load_file(found.out / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(packing.snap8(tensor).dequantized, tensor, err_msg=name)


def test_progress_is_told_for_every_stage(made: Run) -> None:
    assert made.told_stages() == ["synthesize", "output moments", "layers", "distill"]
    last = {event.stage: event for event in made.told}
    assert all(event.done == event.total for event in last.values())


def test_the_same_call_gives_the_same_checkpoint(made: Run, tmp_path: Path) -> None:
    assert_same(run(made.source, tmp_path / "again"), made)


def assert_same(found: Run, expected: Run) -> None:
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        tensors = load_file(found.out / name)
        for key, tensor in load_file(expected.out / name).items():
            np.testing.assert_array_equal(tensors[key], tensor, err_msg=key)
    divergences = [[row["divergence"] for row in run.facts["stages"]] for run in (found, expected)]
    assert divergences[0] == divergences[1]


@pytest.mark.parametrize(
    ("stage", "done", "again"),
    [
        ("synthesize", 30, "synthesize"),
        ("output moments", 2, "output moments"),
        ("layers", 1, "layers"),
        ("layers", 3, "distill"),
        ("distill", 1, "distill"),
        ("distill", 11, "distill"),
    ],
)
def test_an_interrupted_run_leaves_no_output_and_continues(
    made: Run, stage: str, done: int, again: str, tmp_path: Path
) -> None:
    out = tmp_path / "ckpt"
    with pytest.raises(KeyboardInterrupt):
        run(made.source, out, tell=stopping_at(stage, done))
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt.work"]
    resumed = run(made.source, out)
    assert resumed.told_stages()[0] == again
    if done == 11:
        assert [event.done for event in resumed.told] == [11, 12]
    if (stage, done) == ("layers", 1):
        assert [event.done for event in resumed.told if event.stage == "layers"] == [2, 3]
    assert [row["stage"] for row in resumed.facts["stages"]] == STAGES
    assert_same(resumed, made)
    assert list(tmp_path.iterdir()) == [out]


CHANGES = {
    "steps": replace(QUICK, distillation=Distillation(steps=1, batch=8)),
    "method": replace(QUICK, method="scales"),
    "quantizer": replace(QUICK, quantizer="search"),
    "placement": replace(QUICK, adapters=(Placement(("*.k_proj",), 4),)),
    "recipe": QUICK,
    "sampling": replace(QUICK, sampling=Sampling(sequences=20, length=24, seed=1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_work_is_not_used_for_another_job(source: Source, change: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "ckpt", tell=stopping_at("distill", 1))
    plan = tiny.W4 if change == "recipe" else tiny.W4W2
    other = run(source, tmp_path / "ckpt", plan, settings=CHANGES[change])
    assert (other.told_stages()[0] == "synthesize") is (change == "sampling")
    assert "layers" in other.told_stages()


def test_a_corpus_made_before_is_used(source: Source, tmp_path: Path) -> None:
    corpus = synthesize(*load_model(source), QUICK.sampling, tmp_path / "corpus")
    found = run(source, tmp_path / "ckpt", tiny.W4, corpus=tmp_path / "corpus")
    assert found.told_stages()[0] == "layers"
    assert found.facts["corpus"] == corpus.facts
    assert (tmp_path / "corpus").is_dir()


def test_a_corpus_of_another_tokenizer_is_refused(source: Source, tmp_path: Path) -> None:
    model, tokenizer = load_model(source)
    tokenizer.add_tokens(["another"])
    synthesize(model, tokenizer, QUICK.sampling, tmp_path / "corpus")
    with pytest.raises(ValueError, match="tokenizer"):
        run(source, tmp_path / "ckpt", corpus=tmp_path / "corpus")
    assert not (tmp_path / "ckpt").exists()


def test_a_corpus_needs_more_rows_than_are_held_out(source: Source, tmp_path: Path) -> None:
    synthesize(*load_model(source), Sampling(sequences=8, length=24), tmp_path / "corpus")
    with pytest.raises(ValueError, match="8 rows; more than 8"):
        run(source, tmp_path / "ckpt", corpus=tmp_path / "corpus")


def test_an_existing_folder_is_replaced_only_by_force(made: Run, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine").touch()
    with pytest.raises(FileExistsError, match="--force"):
        run(made.source, tmp_path / "ckpt")
    with pytest.raises(KeyboardInterrupt):
        run(made.source, tmp_path / "ckpt", force=True, tell=stopping_at("distill", 11))
    assert (tmp_path / "ckpt" / "mine").exists()
    assert_same(run(made.source, tmp_path / "ckpt", force=True), made)
    assert not (tmp_path / "ckpt" / "mine").exists()


def test_without_text_synthetic_sequences_are_held_out(source: Source, tmp_path: Path) -> None:
    found = run(source, tmp_path / "ckpt", against=None)
    assert found.facts["measured_on"].startswith(f"{HELD_OUT_ROWS} held-out rows of the corpus")
    divergence = found.facts["stages"][-1]["divergence"]
    assert 0 < divergence["kl_mean"] < found.facts["stages"][2]["divergence"]["kl_mean"]
    assert divergence["tokens"] == HELD_OUT_ROWS * 24
    assert 0 < divergence["top1_agreement"] <= 1


def test_against_is_asked_once(source: Source, tmp_path: Path) -> None:
    asked: list[Any] = []

    def remember(original: Any, encode: Any) -> Any:
        asked.append((original(IDS).shape, encode("the cat")))
        return against(original, encode)

    run(source, tmp_path / "ckpt", tiny.W4, against=remember)
    assert asked == [((4, 24, tiny.VOCAB), tiny.tokenizer().encode("the cat"))]


def test_without_adapters_scales_and_norms_are_distilled(source: Source, tmp_path: Path) -> None:
    found = run(source, tmp_path / "ckpt", tiny.W4)
    assert [row["stage"] for row in found.facts["stages"]] == [*STAGES[:4], "distilled"]
    assert not (found.out / "adapter").exists()


def test_distillation_may_be_left_out(source: Source, tmp_path: Path) -> None:
    found = run(source, tmp_path / "ckpt", settings=replace(QUICK, distillation=Distillation(steps=0)))
    assert [row["stage"] for row in found.facts["stages"]] == STAGES[:5]
    assert (found.out / "adapter").exists()


@pytest.mark.parametrize("architecture", ["untied", "odd sizes", "adapters everywhere", "q, k and v apart"])
def test_other_models_and_recipes(architecture: str, tmp_path: Path) -> None:
    everywhere = '[[rule]]\nmatch = "lm_head"\nbits = 4\n[[rule]]\nbits = 2\ngroup = 128\nadapter_rank = 16\n'
    apart = '[[rule]]\nmatch = "*.q_proj"\nbits = 16\n[[rule]]\nmatch = "*.v_proj"\nbits = 8\n'
    changes, plan = {
        "untied": ({"tied": False}, tiny.W4W2),
        "odd sizes": ({"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1}, tiny.W4W2),
        "adapters everywhere": ({}, recipe.parse(everywhere)),
        "q, k and v apart": ({}, recipe.parse(apart + everywhere)),
    }[architecture]
    other = resolve(tiny.llama(tmp_path / "hf", initializer_range=0.1, **changes))
    found = run(other, tmp_path / "ckpt", plan)
    measured = against(logits_fn(load_model(other)[0]), None)(logits_fn(load_checkpoint(found.out)[0]))["kl_mean"]
    assert measured == pytest.approx(found.facts["stages"][-1]["divergence"]["kl_mean"], rel=1e-3)
    assert measured < found.facts["stages"][2]["divergence"]["kl_mean"]


def rules(*parts: tuple[str, str]) -> Recipe:
    return recipe.parse("".join(f'[[rule]]\nmatch = "{match}"\n{rest}\n' for match, rest in parts))


REFUSED = {
    "corrected lm_head": (rules(("*", "bits = 4\nadapter_rank = 8")), "lm_head: adapter_rank = 8"),
    "nothing": (rules(("*.experts", "bits = 4")), "matches no linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_recipes_are_refused_before_any_work(source: Source, case: str, tmp_path: Path) -> None:
    plan, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        run(source, tmp_path / "ckpt", plan)
    assert list(tmp_path.iterdir()) == []


def test_sizes_without_a_group_are_refused(tmp_path: Path) -> None:
    odd = resolve(tiny.llama(tmp_path / "hf", hidden_size=144, num_attention_heads=4, intermediate_size=240))
    with pytest.raises(ValueError, match=r"q_proj: input size 144 is not a multiple of 32.*bits = 16"):
        run(odd, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_groups_are_fitted_to_each_matrix(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf", hidden_size=160, num_attention_heads=5, num_key_value_heads=1)
    schemes = resolved_schemes(load_model(resolve(folder))[0], tiny.W4W2)
    assert schemes["model.layers.0.mlp.gate_proj"].group == 32  # 64 does not divide 160
    assert "model.embed_tokens" not in schemes


def test_ranks_come_from_the_placement_else_from_the_recipe(source: Source) -> None:
    model = load_model(source)[0]
    full = Settings().under(tiny.W4W2)
    gate_up = {f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up")}
    assert resolved_ranks(model, tiny.W4W2, full) == dict.fromkeys(gate_up, 32)
    placed = replace(full, adapters=(Placement(("*.v_proj",), 4),))
    assert resolved_ranks(model, tiny.W4W2, placed) == {f"model.layers.{i}.self_attn.v_proj": 4 for i in (0, 1)}
    assert resolved_ranks(model, tiny.W4W2, replace(full, method="scales")) == {}


@pytest.mark.parametrize(("spoil", "said"), [("nan", "holds NaN"), ("zero", "holds nothing but zeros.*--degraded")])
def test_damaged_layers_are_named_before_any_work(spoil: str, said: str, tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf")
    stored = load_file(folder / "model.safetensors")
    weight = stored["model.layers.1.mlp.up_proj.weight"]
    weight[...] = 0 if spoil == "zero" else weight
    weight[3, 5] = np.nan if spoil == "nan" else 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj {said}"):
        run(resolve(folder), tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_matrix_of_zeros_may_stay_float_but_not_be_quantized(tmp_path: Path) -> None:
    folder, name = tiny.llama(tmp_path / "hf"), "model.layers.0.self_attn.o_proj"
    stored = load_file(folder / "model.safetensors")
    stored[f"{name}.weight"][...] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve(folder)
    found = run(source, tmp_path / "ckpt", rules(("*.gate_proj", "bits = 4")))
    assert not load_file(found.out / "model.safetensors")[f"{name}.weight"].any()
    for wanted in (rules(("*.o_proj", "bits = 4")), Budget(bits_per_weight=8.0)):
        with pytest.raises(ValueError, match=f"^{name} holds nothing but zeros"):
            recover(source, wanted, tmp_path / "other", settings=QUICK)


def test_a_checkpoint_cannot_be_recovered_again(made: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantized already"):
        run(resolve(made.out), tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statistics_rows": 0}, "statistics_rows = 0"),
        ({"output_rows": 0}, "output_rows = 0"),
        ({"rounds": -1}, "rounds = -1"),
    ],
)
def test_bad_amounts_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Amounts(**changes)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="sequences = 8 leaves none"):
        Settings(sampling=Sampling(sequences=8))
    with pytest.raises(ValueError, match="no method 'best'; there are none, recover-lora, scales, corrected, full"):
        Settings(method="best").under(tiny.W4)
    with pytest.raises(ValueError, match="gptq"):
        Settings(quantizer="best").under(tiny.W4)


@pytest.mark.filterwarnings("ignore")  # the builder's own
def test_the_stock_builder_accepts_the_folder(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from onnxruntime_genai.models import builder

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = (str(made.out), str(made.out), str(tmp_path / "built"), "int4", "cpu", str(tmp_path / "cache"))
    options = builder.parse_extra_options(*arguments, ["hf_token=false"])
    builder.create_model(*arguments, **options)
    assert (tmp_path / "built" / "model.onnx").is_file()
    assert (tmp_path / "built" / "genai_config.json").is_file()
