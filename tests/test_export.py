"""A checkpoint becomes a bundle that computes the same, lints clean, and runs in the stock runtime."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

import tiny
from rlkit.export import lint, plan, skeleton
from rlkit.export.build import export_bundle
from rlkit.recover import recipe
from rlkit.recover.progress import Progress

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 40))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return tiny.checkpoint(source, source.parent / "ckpt", tiny.W4W2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_bundle(checkpoint, checkpoint.parent / "bundle")


def logits(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    """Logits by a plain session, nothing of ours in between."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    file = "logits.onnx" if (folder / "logits.onnx").is_file() else "model.onnx"
    session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    past = np.zeros((len(ids), config["num_key_value_heads"], 0, config["head_size"]), np.float32)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds = {value.name: known.get(value.name, past) for value in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])


CASES = {
    "w4 tied": (tiny.W4, {"tied": True}, None),
    "w4 untied": (tiny.W4, {"tied": False}, None),
    "w8 tied": (tiny.W8, {"tied": True}, None),
    "w4w2 tied": (tiny.W4W2, {"tied": True}, None),
    "w4w2 untied": (tiny.W4W2, {"tied": False}, None),
    "odd rank": (tiny.W4W2, {"tied": True}, 12),
    "odd groups": (tiny.W4W2, {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1}, None),
    "float lm_head": (recipe.parse('[[rule]]\nmatch = "lm_head"\nbits = 16\n[[rule]]\nbits = 4\n'), {}, None),
    "float lm_head untied": (
        recipe.parse('[[rule]]\nmatch = "lm_head"\nbits = 16\n[[rule]]\nbits = 4\n'),
        {"tied": False},
        None,
    ),
    "adapters everywhere": (recipe.parse("[[rule]]\nbits = 4\ngroup = 64\nadapter_rank = 32\n"), {}, None),
    "mixed attention": (recipe.parse('[[rule]]\nmatch = "*.v_proj"\nbits = 8\n[[rule]]\nbits = 4\n'), {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_export_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    asked, changes, rank = CASES[name]
    folder = tiny.checkpoint(tiny.llama(tmp_path / "hf", **changes), tmp_path / "ckpt", asked, adapter_rank=rank)
    expected = tiny.logits(tiny.dequantized(folder), IDS)
    exact = logits(export_bundle(folder, tmp_path / "exact", accuracy_level=0))
    assert np.abs(exact - expected).max() <= 1e-4 * np.abs(expected).max()
    fast = export_bundle(folder, tmp_path / "fast")
    assert lint.lint_file(fast / "model.onnx") == []
    assert np.abs(logits(fast) - expected).max() <= 0.1 * np.abs(expected).max()
    planned, stored = plan.plan_checkpoint(folder), json.loads((fast / "rlkit.json").read_text())
    assert stored["nbytes"] == planned.nbytes


def test_stock_runtime_generates(bundle: Path) -> None:
    model = og.Model(str(bundle))
    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode("the cat sat on")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 12, min_length=len(prompt) + 12)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    sequence = np.asarray(generator.get_sequence(0), np.int64)
    assert len(sequence) == len(prompt) + 12
    scores = logits(bundle, sequence[None])[0]
    scores[:, 2] = -np.inf  # min_length forbids the end of turn
    assert scores.argmax(axis=1)[len(prompt) - 1 : -1].tolist() == sequence[len(prompt) :].tolist()


def test_embedding_is_shared_and_adapters_are_in_the_graph(bundle: Path) -> None:
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    gathers = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert [name for name in gathers[0].input if name.startswith("lm_head.")]
    assert "model.embed_tokens.weight" not in {value.name for value in graph.initializer}
    branches = [node.name for node in graph.node if "lora_" in node.name]
    assert sum(name.endswith("lora_A/MatMulNBits") for name in branches) == 4  # gate and up of two layers
    nodes = {node.name: node for node in graph.node}
    level = {attribute.name: attribute.i for attribute in nodes["/lm_head/MatMulNBits"].attribute}
    assert level["accuracy_level"] == 4


def test_manifest_states_the_files(bundle: Path, checkpoint: Path) -> None:
    manifest = json.loads((bundle / "rlkit.json").read_text())
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == expected
    assert set(manifest["sha256"]) == {file.name for file in bundle.iterdir()} - {"rlkit.json"}
    assert manifest["recipe"]["name"] == "w4w2-gateup"
    assert manifest["shape"]["hidden"] == 128
    assert manifest["provenance"] == json.loads((checkpoint / "recovery.json").read_text())
    assert manifest["divergence"] is None
    gate = next(t for t in manifest["tensors"] if t["name"] == "model.layers.0.mlp.gate_proj")
    assert (gate["kind"], gate["bits"], gate["group"], gate["weights"]) == ("gate_up", 2, 64, 256 * 128)
    data = (bundle / "model.onnx.data").stat().st_size
    assert 0 <= manifest["nbytes"] - data <= 4096  # the smallest tensors lie in model.onnx
    assert {t["kind"] for t in manifest["tensors"]} >= {"lm_head", "attention", "gate_up", "down", "norm", "adapter"}


def test_config_is_ready_to_run(checkpoint: Path, tmp_path: Path) -> None:
    template = checkpoint / "chat_template.jinja"
    assert "<|im_end|>" in template.read_text()
    folder = tmp_path / "other-eos"
    tiny.checkpoint(tiny.llama(tmp_path / "hf", eos_token_id=0), folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((export_bundle(folder, tmp_path / "b", threads=3) / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [0, 2]  # the config's, and the one that ends a turn
    options = config["model"]["decoder"]["session_options"]
    assert options["intra_op_num_threads"] == 3
    assert options["provider_options"] == []
    assert config["search"]["past_present_share_buffer"] is True
    manifest = json.loads((tmp_path / "b" / "rlkit.json").read_text())
    assert manifest["threads"] == {"value": 3, "chosen_by": "user"}


def test_measure_sees_the_finished_folder(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def measure(folder: Path) -> dict[str, float]:
        seen.append({file.name for file in folder.iterdir()})
        return {"kl_nats_per_token": 0.25, "tokens": 4096}

    out = export_bundle(checkpoint, tmp_path / "b", measure=measure)
    assert seen == [{file.name for file in out.iterdir()}]
    manifest = json.loads((out / "rlkit.json").read_text())
    assert manifest["divergence"] == {"kl_nats_per_token": 0.25, "tokens": 4096}
    card = (out / "README.md").read_text()
    assert "kl_nats_per_token: 0.25" in card
    assert hashlib.sha256(card.encode()).hexdigest() == manifest["sha256"]["README.md"]


def test_progress_is_told_and_nothing_is_printed(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Progress] = []
    handlers = list(logging.getLogger().handlers)
    export_bundle(checkpoint, tmp_path / "b", tell=events.append)
    assert [event.stage for event in events if event.done == event.total] == ["graph", "write", "lint", "bundle"]
    assert [event.done for event in events if event.stage == "graph"] == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


def test_only_the_builders_thread_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, heard = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", shown)

    def listen(line: str) -> None:
        heard.append(line)
        print("listener")

    with skeleton._quiet(listen):
        print("builder")
        other = threading.Thread(target=print, args=("bar",))
        other.start()
        other.join()
    assert "builder" in heard
    assert "builder" not in shown.getvalue()
    assert {"listener", "bar"} <= set(shown.getvalue().split())


def test_nothing_is_left_after_a_failure(checkpoint: Path, tmp_path: Path) -> None:
    def measure(_folder: Path) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, tmp_path / "b", measure=measure)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_one_line(checkpoint: Path, bundle: Path, source: Path, tmp_path: Path) -> None:
    cases = [
        (tmp_path / "absent", {}, FileNotFoundError, "no folder or file"),
        (bundle, {}, ValueError, "exported bundle already"),
        (checkpoint, {"target": "tpu"}, ValueError, "target 'tpu' does not exist; use cpu, igpu, npu"),
        (checkpoint, {"logits": "some"}, ValueError, "logits = 'some' is not offered"),
        (checkpoint, {"adapters": "merged"}, ValueError, "2-bit codes, which a merged adapter would be lost in"),
        (checkpoint, {"threads": 0}, ValueError, "threads = 0"),
    ]
    for folder, options, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            export_bundle(folder, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileExistsError, match="--force"):
        export_bundle(checkpoint, bundle)
    with pytest.raises(ValueError, match="no bundle, so it is not replaced"):
        export_bundle(checkpoint, checkpoint, force=True)
    with pytest.raises(ValueError, match="is a file"):
        export_bundle(checkpoint, checkpoint / "config.json", force=True)


def test_a_checkpoint_without_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer") as caught:
        export_bundle(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_recovery_record_is_named(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt")
    (folder / "recovery.json").write_text("{")
    with pytest.raises(ValueError, match=r"recovery\.json is not valid JSON"):
        export_bundle(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_force_replaces(checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(checkpoint, tmp_path / "b", accuracy_level=0)
    export_bundle(checkpoint, out, force=True)
    assert json.loads((out / "rlkit.json").read_text())["accuracy_level"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
