"""Models for `rlkit eval`: a checkpoint and its bundle with the adapter say the same; replies, names and identities."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import benchmarks
import tiny
from rlkit.apps import cli, evalmodels
from rlkit.apps.evalmodels import NO_ROOM, NO_TEMPLATE, Candidate, Ways, candidates
from rlkit.export.build import export_bundle
from rlkit.profiles.evaluation import Store, TaskResult, evaluate
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.tasks import Task
from rlkit.recover import model

QUESTIONS = ("the capital of France is", "two bits are", "a small model", "what is the weather")
ITEMS = [Item(str(n), text, (" Paris", " enough", " the cat"), n % 3, answer="4") for n, text in enumerate(QUESTIONS)]
SCORED = benchmarks.task(ITEMS)


def asked(items: list[Item], most: int = 10) -> Task:
    """The items as messages."""
    task = benchmarks.task(items, "asked", Rule.NUMBER)
    return replace(task, spec=replace(task.spec, most=most))


@dataclass(frozen=True)
class World:
    checkpoint: Path
    bundle: Path
    adapter: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("evalmodels")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf", initializer_range=0.1), root / "checkpoint", tiny.W4W2)
    bundle = export_bundle(checkpoint, root / "bundle", accuracy_level=0, adapters="files")
    (file,) = bundle.glob("adapters/*.onnx_adapter")
    return World(checkpoint, bundle, file.name.removesuffix(".onnx_adapter"))


def run(candidate: Candidate, store: Store, *tasks: Task) -> list[TaskResult]:
    with candidate.subject() as subject:
        return evaluate(tasks, subject, store)


def test_a_checkpoint_is_its_bundle_with_the_adapter(world: World, tmp_path: Path) -> None:
    store, references = Store(tmp_path), [str(world.checkpoint), (str(world.bundle), world.adapter), str(world.bundle)]
    models = candidates(references, Ways(threads=1))
    assert [one.name for one in models] == ["checkpoint", f"bundle + {world.adapter}", "bundle"]
    assert len({one.identity for one in models}) == 3 and models[1].facts["adapter"] == world.adapter
    talk, scores, replies = asked(ITEMS), [], []
    for one in models:
        scored, replied = run(one, store, SCORED, talk)
        assert replied.left_out == {} and len(replied.column) == 4 and scored.left_out == {}
        with one.subject() as subject:
            scores.append([store.read(subject, SCORED)[item.id].logprobs for item in ITEMS])
            replies.append([store.said(subject, talk)[item.id] for item in ITEMS])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)
    assert np.abs(np.array(scores[0]) - scores[2]).max() > 0.01
    assert replies[0] == replies[1] != replies[2]


def test_replies_that_were_cut_are_told_from_those_that_ended(world: World, tmp_path: Path) -> None:
    (one,) = candidates([str(world.checkpoint)], Ways(threads=1))
    (result,) = run(one, Store(tmp_path), asked(ITEMS, most=1))
    assert result.unfinished == 4  # one token each
    assert run(one, Store(tmp_path), asked(ITEMS, most=1))[0].reused == 4


def test_what_leaves_no_room_is_not_asked(world: World, tmp_path: Path) -> None:
    (one,) = candidates([(str(world.bundle), world.adapter)], Ways(threads=1))
    (result,) = run(one, Store(tmp_path), asked([replace(ITEMS[0], context="the mat " * 200), ITEMS[1]]))
    assert result.left_out == {NO_ROOM: 1} and result.scores[0] is None and result.scores[1] is not None


@pytest.mark.parametrize("form", ["checkpoint", "bundle"])
def test_a_model_without_a_template_is_not_asked(world: World, tmp_path: Path, form: str) -> None:
    bare = shutil.copytree(getattr(world, form), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    (before,) = candidates([str(getattr(world, form))], Ways(threads=1))
    (one,) = candidates([str(bare)], Ways(threads=1))
    assert one.identity == before.identity and one.manner != before.manner
    (result,) = run(one, Store(tmp_path / "kept"), asked(ITEMS))
    assert result.left_out == {NO_TEMPLATE: 4} and result.interval().value is None


def test_the_command_takes_an_adapter(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.jsonl"
    choices = [benchmarks.choice(n, text, [" Paris", " enough"], 0) for n, text in enumerate(QUESTIONS)]
    own.write_bytes(benchmarks.lines([line for item in choices for line in item], zipped=False))
    bundle = str(world.bundle)
    arguments = [bundle, "--adapter", world.adapter, "--against", bundle, "--tasks", str(own), "--min-tokens", "200"]
    assert cli.run(["eval", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["models"]] == ["bundle", f"bundle + {world.adapter}"]
    assert found["full"] == "bundle" and found["models"][1]["divergence"]["kl_mean"] > 1e-4
    assert cli.run(["eval", str(world.checkpoint), "--adapter", "x", "--tasks", str(own)]) == 2
    assert "is no bundle, and adapter 'x' is for bundles" in capsys.readouterr().err
    assert cli.run(["eval", bundle, "--adapter", "x", "--tasks", str(own)]) == 2
    assert f"has no adapter 'x'; use {world.adapter}" in " ".join(capsys.readouterr().err.split())


def test_what_a_torch_model_computes_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evalmodels.FLOAT32_PARAMETERS == model.FLOAT32_PARAMETERS
    full, checkpoint = candidates([str(world.checkpoint.parent / "hf"), str(world.checkpoint)], Ways())
    assert full.facts["dtype"] == "float32"
    before = full.identity
    monkeypatch.setattr(evalmodels, "FLOAT32_PARAMETERS", 1000)
    assert full.facts["dtype"] == "as stored" and full.identity != before
    assert checkpoint.facts["dtype"] == "float32"
    assert replace(full, ways=Ways(dtype="float32")).identity == before
