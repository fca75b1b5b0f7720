"""An open bundle: tokens, logits, limits, and what it says when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.export import graph, write
from rlkit.export.build import export_bundle
from rlkit.export.plan import default_threads
from rlkit.runtime.session import Sampling, Session, Token, open_bundle

TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_bundle(checkpoint, checkpoint.parent / "bundle", accuracy_level=0)


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return open_bundle(bundle)


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_text_round_trip(session: Session) -> None:
    ids = session.encode(TEXT)
    assert ids == tiny.tokenizer().encode(TEXT)
    assert session.decode(ids) == TEXT
    assert session.encode("") == []
    assert session.decode([]) == ""
    assert session.encode("<|im_end|>") == [2]


def test_greedy_tokens_are_the_likeliest(session: Session, checkpoint: Path) -> None:
    prompt = session.encode(TEXT)
    tokens = list(session.generate(prompt, 10))
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert all(token.seconds > 0 for token in tokens)
    row = np.array([prompt + ids_of(tokens)])
    expected = tiny.logits(tiny.dequantized(checkpoint), row)[0].argmax(axis=1)
    assert ids_of(tokens) == expected[len(prompt) - 1 : -1].tolist()
    assert session.decode(ids_of(tokens)).startswith("".join(token.text for token in tokens).rstrip("�"))


def test_logits_match_torch_and_ignore_padding(session: Session, checkpoint: Path) -> None:
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, (3, 20))
    expected = tiny.logits(tiny.dequantized(checkpoint), ids)
    measured = session.logits(ids)
    assert measured.shape == (3, 20, tiny.VOCAB)
    assert measured.dtype == np.float32
    assert np.abs(measured - expected).max() <= 1e-4 * np.abs(expected).max()
    padded = np.concatenate([ids, np.full((3, 5), 2)], axis=1)
    np.testing.assert_allclose(session.logits(padded)[:, :20], measured, atol=1e-5)


def test_all_logits_come_from_the_graph_that_keeps_them(checkpoint: Path, session: Session, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, (2, 9))
    last = export_bundle(checkpoint, tmp_path / "last", accuracy_level=0, logits="last")
    whole = export_bundle(checkpoint, tmp_path / "all", accuracy_level=0, logits="all")
    assert (last / "logits.onnx").is_file()
    assert not (whole / "logits.onnx").exists()
    np.testing.assert_allclose(open_bundle(last).logits(ids), open_bundle(whole).logits(ids), atol=1e-5)
    (last / "logits.onnx").unlink()
    with pytest.raises(ValueError, match=r"only the last token's logits and has no logits\.onnx; export it with all"):
        open_bundle(last).logits(ids)


@pytest.fixture(scope="module")
def for_dml(checkpoint: Path) -> Path:
    return export_bundle(checkpoint, checkpoint.parent / "dml", target="igpu", provider="dml")


def test_a_bundle_for_a_gpu_runs_on_the_cpu_too(for_dml: Path, session: Session) -> None:
    """float16 inside and out, positions as an input, another provider's options."""
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, (2, 20))
    other, expected = open_bundle(for_dml), session.logits(ids)
    measured = other.logits(ids)
    assert measured.dtype == np.float32
    assert np.abs(measured - expected).max() <= 0.02 * np.abs(expected).max()
    prompt = session.encode(TEXT)
    assert len(list(other.generate(prompt, 5, ignore_stop=True))) == 5


def test_inputs_that_cannot_be_made_are_named(for_dml: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(for_dml, tmp_path / "b")
    name = "logits.onnx" if (folder / "logits.onnx").exists() else "model.onnx"
    model = graph.load(folder / name)
    next(value for value in model.graph.inputs if value.name == "position_ids").name = "token_type_ids"
    write.write_graph(model, folder / name)
    with pytest.raises(ValueError, match=r"asks for token_type_ids tensor\(int64\), which rlkit cannot make"):
        open_bundle(folder).logits(np.ones((1, 3), np.int64))


def test_seeds_repeat(session: Session) -> None:
    prompt = session.encode(TEXT)
    runs = [ids_of(list(session.generate(prompt, 12, temperature=1.0, seed=seed))) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert ids_of(list(session.generate(prompt, 5, temperature=1.0, top_k=1))) == ids_of(
        list(session.generate(prompt, 5))
    )


def test_stops(session: Session) -> None:
    prompt = session.encode(TEXT)
    free = ids_of(list(session.generate(prompt, 20, ignore_stop=True)))
    assert len(free) == 20
    stop = free[5]
    cut = ids_of(list(session.generate(prompt, 20, stop_ids=[stop])))
    assert cut == free[: free.index(stop)]
    assert session.stop_ids == (2,)


def test_closing_cancels_and_the_session_goes_on(session: Session) -> None:
    prompt = session.encode(TEXT)
    tokens = session.generate(prompt, 100)
    first = list(islice(tokens, 3))
    tokens.close()
    assert list(tokens) == []
    assert ids_of(list(session.generate(prompt, 3))) == ids_of(first)


def test_the_context_is_the_limit(session: Session) -> None:
    limit = session.context_length
    assert limit == 256
    nearly = [5] * (limit - 4)
    assert len(list(session.generate(nearly, 100, ignore_stop=True))) == 4
    with pytest.raises(ValueError, match="the prompt has 256 tokens, but the context holds 256"):
        session.generate([5] * limit, 1)
    with pytest.raises(ValueError, match="rows of 257 tokens exceed the context of 256"):
        session.logits(np.zeros((1, limit + 1), np.int64))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": -5}, "seed = -5"),
    ],
)
def test_bad_sampling_is_named(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**options)  # type: ignore[arg-type]


def test_bad_prompts_are_named(session: Session) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        session.generate([], 5)
    with pytest.raises(ValueError, match=r"outside 0\.\.511"):
        session.generate([tiny.VOCAB], 5)
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        session.generate([5], 0)
    with pytest.raises(ValueError, match="matrix"):
        session.logits(np.zeros(3, np.int64))


def test_facts(session: Session) -> None:
    facts = session.facts()
    assert facts["target"] == "cpu"
    assert facts["context_length"] == 256
    assert "tensors" not in facts
    json.dumps(facts)


def test_threads_follow_this_machine_unless_chosen(bundle: Path, tmp_path: Path) -> None:
    assert open_bundle(bundle).threads == default_threads()
    assert open_bundle(bundle, threads=1).threads == 1
    chosen = shutil.copytree(bundle, tmp_path / "b")
    manifest = json.loads((chosen / "rlkit.json").read_text())
    manifest["threads"] = {"value": 1, "chosen_by": "user"}
    (chosen / "rlkit.json").write_text(json.dumps(manifest))
    config = json.loads((chosen / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    (chosen / "genai_config.json").write_text(json.dumps(config))
    assert open_bundle(chosen).threads == 1


def test_a_bundle_of_others_runs_without_manifest(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    (folder / "rlkit.json").unlink()
    assert len(list(open_bundle(folder).generate([5, 6], 4, ignore_stop=True))) == 4


def test_wrong_folders_are_named(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a checkpoint"):
        open_bundle(checkpoint)
    with pytest.raises(ValueError, match="no bundle"):
        open_bundle(tmp_path)
    with pytest.raises(ValueError, match="a bundle made for cpu does not run on npu; export it again"):
        open_bundle(bundle, device="npu")
    with pytest.raises(ValueError, match="device 'abacus' does not exist; use auto, cpu"):
        open_bundle(bundle, device="abacus")
    with pytest.raises(ValueError, match="threads = 0"):
        open_bundle(bundle, threads=0)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json", "rlkit.json"])
def test_damaged_files_are_named_in_one_line(
    name: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged") as caught:
        open_bundle(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_missing_files_are_named(name: str, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        open_bundle(folder)


def test_newer_manifests_and_incomplete_configs_are_refused(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    (folder / "rlkit.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="newer than this rlkit's"):
        open_bundle(folder)
    (folder / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="lacks 'decoder'"):
        open_bundle(folder)


def test_session_imports_without_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "import rlkit.runtime.session, rlkit.runtime.chat\n"
        "sys.exit('onnxruntime' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bundle_runs_without_torch(bundle: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "from rlkit.runtime.session import open_bundle\n"
        "session = open_bundle(pathlib.Path(sys.argv[1]))\n"
        "assert len(list(session.generate([5, 6], 3, ignore_stop=True))) == 3\n"
        "import numpy\n"
        "assert session.logits(numpy.array([[5, 6]])).shape == (1, 2, 512)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True)
