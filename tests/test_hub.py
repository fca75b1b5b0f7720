"""The hub's own client against a stand-in server: what is fetched, what is not, what an error says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkit.recover import hub, source
from rlkit.recover.progress import Progress
from standin import COMMIT, Hub, serving

NAME = "somebody/small-model"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = tmp_path / "served"
    (model / "onnx").mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "model.safetensors").write_bytes(bytes(3000))
    (model / "tokenizer.json").write_text("{}")
    for unwanted in ("pytorch_model.bin", "modeling_small.py", "onnx/config.json", "consolidated.safetensors"):
        (model / unwanted).write_text("not wanted")
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serving(Hub({NAME: model})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def test_only_weights_config_and_tokenizer_are_fetched(server: Hub) -> None:
    events: list[Progress] = []
    folder = hub.fetch(NAME, events.append)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert found == ["config.json", "model.safetensors", "origin.json", "tokenizer.json"]
    assert json.loads((folder / "origin.json").read_text())["commit"] == COMMIT
    assert events[-1].done == events[-1].total == hub.nbytes(NAME)


def test_a_kept_model_needs_no_network(server: Hub) -> None:
    folder = hub.fetch(NAME)
    server.requests.clear()
    assert hub.fetch(NAME) == hub.cached(NAME) == folder
    assert server.requests == []


def test_nothing_is_fetched_that_the_user_did_not_pull(server: Hub) -> None:
    with pytest.raises(ValueError, match=f"rlkit pull {NAME}"):
        source.resolve(NAME)
    assert server.requests == []
    found = source.resolve(NAME, download=True)
    assert found.kind == "hf" and found.reference == NAME
    server.requests.clear()
    assert source.resolve(NAME) == found
    assert server.requests == []


def test_an_interrupted_download_is_not_taken_for_a_model_and_continues(server: Hub) -> None:
    server.broken.add("model.safetensors")
    with pytest.raises(OSError):
        hub.fetch(NAME)
    assert hub.cached(NAME) is None
    server.broken.clear()
    folder = hub.fetch(NAME)
    assert server.sent["tokenizer.json"] == 2  # two bytes, sent once: complete files are not asked for again
    assert (folder / "model.safetensors").read_bytes() == bytes(3000)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("somebody/unknown", "check the name, or set HF_TOKEN"), ("somebody/gated", "accept its terms")],
)
def test_refusals_name_the_remedy(server: Hub, name: str, remedy: str) -> None:
    server.gated.add("somebody/gated")
    with pytest.raises(OSError, match=remedy):
        hub.fetch(name)
    assert hub.cached(name) is None


def test_no_connection(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="check the connection and run it again"):
        hub.fetch(NAME)


def test_a_repository_without_config_is_no_model(server: Hub) -> None:
    (server.models[NAME] / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hub.fetch(NAME)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("Qwen/Qwen3-4B", True), ("a/b", True), ("a/b/c", False), ("./a", False), ("../a", False), ("a", False)],
)
def test_hub_ids(text: str, is_one: bool) -> None:
    assert hub.is_hub_id(text) == is_one
