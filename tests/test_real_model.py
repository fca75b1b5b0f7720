"""The demo on the real model, end to end: the bars that the project holds itself to. Downloads 180 MB once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlkit.apps import demo, heldout
from rlkit.apps.results import bundle_of, checkpoint_of
from rlkit.export.build import export_bundle
from rlkit.profiles import report
from rlkit.profiles.divergence import compare, live
from rlkit.recover.checkpoint import load_checkpoint
from rlkit.recover.model import logits_fn
from rlkit.runtime.session import open_bundle

pytestmark = pytest.mark.slow


def rlkit(*words: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, on every core: the tests beside it mostly wait for a browser."""
    command = [sys.executable, "-m", "rlkit.apps.cli", *words]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "rlkit-demo"
    done = rlkit("demo", "-o", str(folder), seconds=2400)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return folder


def stages(out: Path) -> dict[str, Any]:
    found = report.read_report(out / "report.json")
    return {stage.name: stage.divergence for stage in found.stages}


def test_each_stage_of_recovery_reaches_its_bar(out: Path) -> None:
    kl = {name: divergence.kl_mean for name, divergence in stages(out).items() if divergence}
    assert kl["round-to-nearest"] > 2.0
    assert kl["compensated"] <= 1.2
    assert kl["corrected"] <= 0.70
    assert kl["distilled"] < kl["corrected"]
    assert abs(kl["exported"] - kl["distilled"]) < 0.02


def test_divergence_is_measured_on_enough_real_text(out: Path) -> None:
    assert all(divergence.tokens >= 4000 for divergence in stages(out).values() if divergence)


def test_exported_bundles_agree_with_their_checkpoints(out: Path) -> None:
    for bundle in report.read_report(out / "report.json").bundles:
        assert bundle.agreement is not None
        assert bundle.agreement.kl_mean <= 0.02, bundle.name
        assert bundle.agreement.top1_agreement >= 0.93, bundle.name


def test_without_int8_activations_file_and_checkpoint_are_one(out: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(out, demo.RECIPES[-1])
    bundle = export_bundle(checkpoint, tmp_path / "exact", accuracy_level=0)
    model, _tokenizer = load_checkpoint(checkpoint)
    batches = heldout.HeldOut(Path("unused"), out / "held-out", "unused").batches()
    found = compare(live(logits_fn(model), batches), open_bundle(bundle).logits, batches)
    assert found.kl_mean <= 1e-4
    assert found.top1_agreement >= 0.999


def test_a_second_call_reuses_every_step(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != demo.MARK}
    again = rlkit("demo", "-o", str(out), "--json", seconds=120)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["schema_version"] == report.SCHEMA_VERSION
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_next_step_it_names_is_there(out: Path) -> None:
    again = rlkit("demo", "-o", str(out), seconds=120)
    assert again.returncode == 0, again.stderr
    named = again.stderr.rpartition("next: rlkit chat ")[2].strip()
    assert (Path(named) / "genai_config.json").is_file()


def test_the_bundle_answers_in_stock_genai(out: Path) -> None:
    script = """
import sys
import onnxruntime_genai as og
assert not any(name.startswith("rlkit") for name in sys.modules)
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
prompt = tokenizer.apply_chat_template('[{"role": "user", "content": "Say hello."}]', add_generation_prompt=True)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))
count = 0
while not generator.is_done() and count < 16:
    generator.generate_next_token()
    count += 1
print(tokenizer.decode(generator.get_sequence(0)))
"""
    command = [sys.executable, "-I", "-c", script, str(bundle_of(out, demo.RECIPES[-1]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20
