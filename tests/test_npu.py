"""The NPU folder says what is known and what is not, runs on the CPU, and is finished by AMD's tool if there is one."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.export import build, lint, npu
from rlkit.export.plan import Plan, plan_recipe
from rlkit.recover import recipe
from rlkit.recover.progress import Progress
from rlkit.recover.source import ModelShape
from rlkit.runtime.session import open_bundle

QWEN3_4B = ModelShape("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 128, 151936, True, 40960, True)
OWN = ModelShape("LlamaForCausalLM", 2, 128, 256, 4, 2, 32, 512, True, 256, False)
W4 = recipe.parse('name = "w4"\n[[rule]]\nbits = 4\ngroup = 128\n')
W4W2 = recipe.parse('[[rule]]\nmatch = ["*.gate_proj", "*.up_proj"]\nbits = 2\ngroup = 64\n[[rule]]\nbits = 4\n')
CONFIG = {
    "model": {
        "context_length": 40960,
        "decoder": {"filename": "model.onnx", "session_options": {"provider_options": [], "intra_op_num_threads": 2}},
    },
    "search": {"max_length": 2048, "do_sample": False},
}


def states(told: dict[str, Any]) -> dict[str, str]:
    return {check["what"]: check["state"] for check in told["checks"]}


def planned(shape: ModelShape, wanted: recipe.Recipe = W4) -> Plan:
    return plan_recipe(shape, wanted, target="npu")


def test_it_says_what_is_met_and_what_nobody_tried() -> None:
    told = npu.npu_json(planned(QWEN3_4B), QWEN3_4B, folder="qwen3", findings=0)
    found = states(told)
    assert found.pop("runs on the NPU") == "unverified"
    assert found.pop("numbers on the NPU") == "unverified"
    assert found.pop("model_generate takes the folder") == "unverified"
    assert set(found.values()) == {"met"}
    assert told["next"] == [
        "conda activate ryzen-ai-1.8.0",
        "model_generate --input qwen3 --output qwen3-hybrid --hybrid",
    ]
    assert {part["name"] for part in told["parts"] if part["runs_llms"]} == {"STX", "STX-Halo", "KRK"}
    assert {part["name"] for part in told["parts"] if not part["runs_llms"]} == {"PHX", "HPT"}
    assert told["max_tokens"] == 40960
    json.dumps(told)


def test_shapes_of_no_listed_model_have_to_be_compiled() -> None:
    told = npu.npu_json(planned(OWN), OWN)
    assert states(told)["operator shapes that come compiled"] == "unverified"
    assert [line.split()[0] for line in told["next"]] == ["conda", "onnx_utils", "mkdir", "copy", "model_generate"]
    assert npu.published(QWEN3_4B) == ("Qwen3-4B",)


def test_what_lint_found_counts() -> None:
    what = "operators that the NPU is known to run"
    found = {count: states(npu.npu_json(planned(OWN), OWN, findings=count))[what] for count in (None, 0, 3)}
    assert found == {None: "unverified", 0: "met", 3: "unmet"}


def test_two_bits_are_said_to_gain_nothing() -> None:
    told = npu.npu_json(planned(OWN, W4W2), OWN)
    (check,) = (check for check in told["checks"] if check["what"].startswith("2-bit codes"))
    assert check["why"].startswith("4 matrices, exact; no gain")  # gate and up of two layers


@pytest.mark.parametrize(
    ("mode", "words", "max_tokens", "whole"),
    [
        ("hybrid", ["--hybrid"], 40960, "met"),
        ("full-fusion", ["--npu", "--full_fusion"], 4096, "unmet"),
        ("token-fusion", ["--npu", "--token_fusion", "--extra_options", "max_seq_len=16384"], 16384, "unmet"),
        ("basic", ["--npu", "--basic"], 40960, "met"),
        ("eager", ["--npu", "--eager"], 40960, "met"),
    ],
)
def test_each_mode_has_its_command_and_limit(mode: str, words: list[str], max_tokens: int, whole: str) -> None:
    told = npu.npu_json(planned(QWEN3_4B), QWEN3_4B, mode=mode, folder="a b")
    quoted = f'model_generate --input "a b" --output "a b-{mode}"'
    assert told["next"][-1] == " ".join([quoted, *words])
    assert (told["mode"], told["max_tokens"]) == (mode, max_tokens)
    assert states(told)["the model's whole context"] == whole


def test_other_modes_and_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="NPU mode 'turbo' does not exist; use hybrid, full-fusion"):
        npu.npu_json(planned(OWN), OWN, mode="turbo")
    with pytest.raises(ValueError, match="the plan is for cpu, not for an NPU"):
        npu.npu_json(plan_recipe(OWN, W4), OWN)


def test_the_hybrid_config_prefills_in_chunks_and_keeps_what_the_tool_wrote() -> None:
    theirs: dict[str, Any] = json.loads(json.dumps(CONFIG))
    own = {"external_data_file": "model_jit.pb.bin", "hybrid_opt_max_seq_length": "8192"}
    theirs["model"]["decoder"]["session_options"]["provider_options"] = [{"RyzenAI": own}]
    made = npu.npu_config(theirs)
    (entry,) = made["model"]["decoder"]["session_options"]["provider_options"]
    assert entry["RyzenAI"] == {**own, "hybrid_opt_chunk_context": "1"}
    assert made["search"] == {"max_length": 2048, "do_sample": False, "chunk_size": 2048}
    assert made["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 2
    assert "chunk_size" not in theirs["search"]  # what was given is left alone
    assert npu.npu_config(made) == made


def test_short_modes_cap_the_length() -> None:
    long = {**CONFIG, "search": {"max_length": 40960}}
    assert npu.npu_config(long, mode="full-fusion")["search"] == {"max_length": 4096}
    assert npu.npu_config(long, mode="token-fusion")["search"]["max_length"] == 16384
    assert npu.npu_config(long, mode="eager")["search"]["max_length"] == 40960


@pytest.mark.parametrize("config", [{}, {"model": {"decoder": {}}}, {"model": [], "search": {}}])
def test_configs_without_a_decoder_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"genai_config\.json has no decoder or search"):
        npu.npu_config(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder as far as this module cares."""
    made = tmp_path / "b"
    made.mkdir()
    (made / "genai_config.json").write_text(json.dumps(CONFIG))
    (made / "model.onnx").write_bytes(b"graph")
    (made / "tokenizer.json").write_text('{"of": "the bundle"}')
    (made / "chat_template.jinja").write_text("{{ x }}")
    (made / "rlkit.json").write_text("{}")
    npu.complete(made, planned(OWN), OWN)
    return made


def test_the_folder_still_runs_anywhere(folder: Path) -> None:
    plain = json.loads((folder / "genai_config.json").read_text())
    assert plain["model"]["decoder"]["session_options"]["provider_options"] == []
    assert plain["search"]["chunk_size"] == 2048
    ryzen = json.loads((folder / "genai_config.ryzenai.json").read_text())
    assert ryzen["search"]["chunk_size"] == 2048
    (entry,) = ryzen["model"]["decoder"]["session_options"]["provider_options"]
    assert entry["RyzenAI"]["hybrid_opt_chunk_context"] == "1"
    assert json.loads((folder / "npu.json").read_text())["mode"] == "hybrid"


def test_an_exported_folder_passes_lint_and_computes_on_the_cpu(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "hf")
    checkpoint = tiny.checkpoint(source, tmp_path / "ckpt", W4W2)
    made = build.export_bundle(checkpoint, tmp_path / "npu", target="npu", logits="all")
    findings = lint.lint_file(made)
    assert findings == []
    npu.complete(made, planned(OWN, W4W2), OWN, findings=len(findings))
    ids = np.arange(3, 43, dtype=np.int64)[None]
    expected = tiny.logits(tiny.dequantized(checkpoint), ids)
    session = open_bundle(made)
    assert np.abs(session.logits(ids) - expected).max() < 0.02 * np.abs(expected).max()  # float16 and its norms
    tokens = [token.id for token in session.generate(ids[0].tolist(), 4)]
    assert tokens[0] == int(expected[0, -1].argmax())


STAND_IN = """
import json, os, sys
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
source, out = Path(words["--input"]), Path(words["--output"])
print("reading", source)
if os.environ.get("FAILS"):
    print("the shape (128, 256) has no operator", file=sys.stderr)
    sys.exit(3)
Path("cache").mkdir()
out.mkdir()
if not os.environ.get("LAZY"):
    config = json.loads((source / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    options["provider_options"] = [{"RyzenAI": {"external_data_file": "made.pb.bin"}}]
    (out / "genai_config.json").write_text(json.dumps(config))
    (out / "model.onnx").write_bytes(b"made of " + (source / "model.onnx").read_bytes())
    (out / "made.pb.bin").write_text(" ".join(sys.argv[1:]))
    (out / "tokenizer.json").write_text('{"of": "the tool"}')
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called model_generate on PATH."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "stand_in.py").write_text(STAND_IN)
    if os.name == "nt":
        script = place / "model_generate.cmd"
        script.write_text(f'@"{sys.executable}" "{place / "stand_in.py"}" %*\n')
    else:
        script = place / "model_generate"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{place / "stand_in.py"}" "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    return script


@pytest.mark.usefixtures("tool")
def test_the_tool_makes_the_folder_beside(folder: Path) -> None:
    heard: list[Progress] = []
    made = npu.finish(folder, tell=heard.append)
    assert made == folder.with_name("b-hybrid")
    assert {file.name for file in made.iterdir()} == {
        "chat_template.jinja",
        "genai_config.json",
        "made.pb.bin",
        "model.onnx",
        "npu.json",
        "tokenizer.json",
    }
    assert (made / "model.onnx").read_bytes() == b"made of graph"
    assert json.loads((made / "tokenizer.json").read_text()) == {"of": "the tool"}
    options = json.loads((made / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    (entry,) = options["provider_options"]
    assert entry["RyzenAI"]["external_data_file"] == "made.pb.bin"
    assert entry["RyzenAI"]["hybrid_opt_chunk_context"] == "1"
    notes = json.loads((made / "npu.json").read_text())
    assert (notes["next"], notes["finished_by"][-1]) == ([], "--hybrid")
    assert heard[0].note.startswith("reading ")
    with pytest.raises(FileExistsError, match="exists already"):
        npu.finish(folder)
    assert npu.finish(folder, force=True) == made


@pytest.mark.usefixtures("tool")
def test_another_mode_and_place_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    made = npu.finish(folder, mode="full-fusion", out=tmp_path / "there")
    assert (made / "made.pb.bin").read_text().endswith("--npu --full_fusion")
    assert json.loads((made / "npu.json").read_text())["mode"] == "full-fusion"


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ("FAILS", r"failed with exit code 3: the shape \(128, 256\) has no operator; see https"),
        ("LAZY", "ended well but left no model"),
    ],
)
def test_a_tool_that_fails_leaves_nothing(
    switch: str, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ValueError, match=says) as raised:
        npu.finish(folder)
    assert "\n" not in str(raised.value)
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith((".", "b-"))] == []


@pytest.mark.usefixtures("tool")
def test_an_interruption_ends_the_tool_and_leaves_nothing(folder: Path) -> None:
    def stop(_event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npu.finish(folder, tell=stop)
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith((".", "b-"))] == []


def test_without_the_tool_the_install_page_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"not on PATH; install Ryzen AI 1\.8\.0 on Windows \(https://ryzenai"):
        npu.finish(folder)
    assert not folder.with_name("b-hybrid").exists()


def test_folders_that_are_no_npu_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no NPU bundle, as it has no npu\.json"):
        npu.finish(tmp_path)
