"""The command `rlkit profile-models`, the file it writes, and costs from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import nodes
import tiny
from rlkit.apps import cli
from rlkit.export.build import export_bundle
from rlkit.profiles.scheduling import profile, profilerun, scenario, settings
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.measured import Measured, Part, parts, parts_of
from rlkit.profiles.scheduling.profile import Entry, Profile, Run, Step, percentile, summed
from rlkit.recover.progress import Progress
from rlkit.runtime import stepbench, tuned


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(tuned.OVERRIDE, tuned.OFF)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return nodes.save(path, [node], {"w": np.ones((16, 4), np.float32)}, {"x": (TensorProto.FLOAT, ["rows", 16])})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2), root / "bundle")


def frame(name: str, seconds: float, threads: tuple[int, ...] = (1, 2), nbytes: int = 1_000_000) -> Entry:
    runs = tuple(Run("cpu", one, 0.5, 10**6, (Step(0, 0, 9, seconds / one, 2 * seconds),)) for one in threads)
    return Entry(name, profile.FRAME, "file", "", "00", nbytes, runs)


def llm(name: str, recipe: str = "w4") -> Entry:
    prefill = tuple(Step(64, past, 3, 0.02 + past / 1e5, 0.03) for past in (0, 64, 128, 192))
    decode = (Step(1, 32, 9, 0.004, 0.005), Step(1, 232, 9, 0.008, 0.009))
    runs = (Run("cpu", 1, 1.0, 10**7, (*prefill, *decode)),)
    return Entry(name, profile.LANGUAGE, "bundle", "", "00", 20_000_000, runs, recipe, 512, 1000)


HERE = Profile("2026-11-22", tuned.machine_facts(), 1e10, 8 * 10**9, (frame("faces", 0.01), llm("tiny")))
ELSEWHERE = replace(HERE, machine={**HERE.machine, "cpu": "another processor"})
SCENARIO = """
schema_version = 1
title = "t"
duration_ms = 1000
[streams.s]
model = "faces"
rate = 30
[requests.r]
model = "tiny"
prompt_tokens = 200
output_tokens = 10
ttft_ms = 500
tpot_ms = 50
chunks = [64]
arrivals = { process = "poisson", interval_ms = 300 }
"""


def test_a_profile_is_read_back_as_written(tmp_path: Path) -> None:
    profile.write(tmp_path / "p.json", HERE)
    assert profile.read(tmp_path / "p.json") == HERE
    with pytest.raises(FileNotFoundError, match="rlkit profile-models"):
        profile.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "bench"}, "no profile of models"),
        ({"schema_version": 9}, "schema_version = 9, this rlkit reads 1"),
        ({"models": [{}]}, "no complete profile"),
        ({"bytes_per_s": 0}, "no positive number"),
        ({"machine": None}, "machine"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**HERE.to_json(), **change}))
    with pytest.raises(ValueError) as caught:
        profile.read(path)
    assert str(path) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_of_another_machine_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile.write(path, ELSEWHERE)
    with pytest.raises(ValueError, match=r"p\.json: machine\.cpu = 'another processor' there, .* profile of another"):
        profile.read(path)
    assert profile.read(path, here=False) == ELSEWHERE


def test_steps_are_put_together_by_size_and_depth() -> None:
    rows = [(1, 32, 2.0), (1, 33, 4.0), (1, 300, 9.0), (64, 0, 5.0), (1, 34, 6.0)]
    assert summed(rows) == (
        Step(1, 33, 3, 4.0, pytest.approx(5.8)),
        Step(1, 300, 1, 9.0, 9.0),
        Step(64, 0, 1, 5.0, 5.0),
    )
    assert percentile([1.0, 2.0], 0.5) == 1.5


def test_units_are_parts_of_the_processor() -> None:
    assert parts(["big=cpu:3", "small=cpu:1"]) == (Part("big", "cpu", 3), Part("small", "cpu", 1))
    assert parts_of(HERE) == (Part("cpu0", "cpu", 1), Part("cpu1", "cpu", 1))
    alone = replace(HERE, models=(frame("faces", 0.01, (1,)),))
    assert parts_of(alone) == (Part("cpu", "cpu", 1),)
    for wrong in (["big"], ["big=cpu:0"], [], ["a=cpu:1", "a=cpu:2"]):
        with pytest.raises(ValueError):
            parts(wrong)
    with pytest.raises(ValueError, match="holds no run"):
        parts_of(replace(HERE, models=()))


def test_costs_are_the_medians(tmp_path: Path) -> None:
    """1 MB in 10 ms is 100 MB/s of 10 GB/s; tokens between depths 32 and 232 lie on the line between them."""
    costs = Measured(HERE, parts(["one=cpu:1", "two=cpu:2"]))
    assert costs.frame("faces", "one").cost == (10_000_000, pytest.approx(0.01), None)
    assert costs.frame("faces", "two").cost.ns == 5_000_000
    found = costs.language("tiny", "one", "w4", (64,), 300)
    assert [cost.ns for cost in found.decode] == [4_640_000, 7_200_000, 8_000_000]  # behind 64, 192 and 320 tokens
    assert [cost.ns for cost in found.prefill[64]] == [20_640_000, 21_920_000, 21_920_000]
    assert (costs.context("tiny"), costs.context("faces"), costs.names()) == (512, None, ("faces", "tiny"))
    with pytest.raises(ValueError, match=r"tiny was not measured on two \(cpu:2\), but on cpu:1"):
        costs.language("tiny", "two", "w4", (64,), 300)
    with pytest.raises(ValueError, match="tiny with w8 was not measured; there is w4"):
        costs.language("tiny", "one", "w8", (64,), 300)
    with pytest.raises(ValueError, match="chunks of 32 were not measured on one, but 64"):
        costs.language("tiny", "one", "w4", (32,), 300)
    with pytest.raises(ValueError, match="tiny is a language model"):
        costs.frame("tiny", "one")


def test_a_scenario_runs_on_a_profile_and_says_what_it_lacks() -> None:
    read = scenario.parse(SCENARIO, "mine.toml")
    prepared = settings.prepare(read, Measured(HERE))
    assert prepared.base.units == ("cpu0", "cpu1") and prepared.skipped == ()
    assert len(expand(prepared.setting(1), 1)) > 30
    with pytest.raises(ValueError, match=r"mine.toml: requests.r.model = 'tiny' is not known of here; there is faces"):
        settings.prepare(read, Measured(replace(HERE, models=HERE.models[:1])))


class Answers:
    """Processes that answer at once; what was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.error = ""

    def __call__(self, module: str, job: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append((module.rpartition(".")[2], job))
        if self.error:
            return {"error": self.error}
        either = {"load_seconds": 0.1, "memory_nbytes": 5}
        if module.endswith("framebench"):
            return {**either, "seconds": [0.3, 0.1, 0.2], "work": {"flops": 1} if job["count"] else None}
        steps = {"prefill": [[64, 0, 0.5]], "decode": [[1, 64, 0.1]]}
        return {**either, **steps, "weights_nbytes": 9, "kv_nbytes": 7, "context": 256}


def test_what_a_profile_has_is_not_measured_again(model: Path) -> None:
    answers, told = Answers(), list[Progress]()
    empty = replace(HERE, models=())
    subjects = [profilerun.subject(str(model))]
    plan = profilerun.Plan((("cpu", 1), ("cpu", 2)))
    *_, first = profilerun.profile(subjects, plan, empty, ask=answers, tell=told.append)
    entry = first.entry("small")
    assert entry is not None and entry.work == {"flops": 1} and entry.sha256 and len(entry.runs) == 2
    assert entry.runs[0].steps == (Step(0, 0, 3, 0.2, pytest.approx(0.29)),)
    assert [job["threads"] for _module, job in answers.asked] == [1, 2] and told[-1].done == told[-1].total == 2
    *_, again = profilerun.profile(subjects, plan, first, ask=answers)
    assert again == first and len(answers.asked) == 2
    more = replace(plan, places=(("cpu", 1), ("cpu", 4)))
    *_, third = profilerun.profile(subjects, more, first, ask=answers)
    assert answers.asked[-1][1]["threads"] == 4 and len(answers.asked) == 3
    changed = [replace(subjects[0], shapes={"x": (3, 16)})]
    *_, other = profilerun.profile(changed, plan, third, ask=answers)
    assert len(answers.asked) == 5 and other.entry("small") != third.entry("small")  # another frame: nothing is kept
    answers.error = "no room"
    with pytest.raises(ValueError, match="small on cpu with 8 threads: no room"):
        list(profilerun.profile(subjects, profilerun.Plan((("cpu", 8),)), first, ask=answers))


def test_a_bundle_is_profiled_step_by_step(bundle: Path) -> None:
    """Real steps of a tiny bundle: every chunk and token, at its depth."""
    found = stepbench.answer(stepbench.Job(str(bundle), "cpu", 1, (32, 16), 64, 0.0))
    assert {(tokens, past) for tokens, past, _ in found.prefill} == {
        (32, 0),
        (32, 32),
        *((16, p) for p in range(0, 64, 16)),
    }
    depths = {past for tokens, past, _ in found.decode}
    assert min(depths) == stepbench.SHORT + 1 and max(depths) == 64 + stepbench.NEW_TOKENS - 1
    assert found.context == 256 and found.kv_nbytes > 0 and found.weights_nbytes > 0
    assert all(seconds > 0 for *_, seconds in (*found.prefill, *found.decode))
    with pytest.raises(ValueError, match="exceed the context of 256; ask for a shorter --prompt"):
        stepbench.answer(stepbench.Job(str(bundle), prompt_tokens=250))
    answers = Answers()
    subject = profilerun.subject(f"mine={bundle}")
    (made,) = profilerun.profile([subject], profilerun.Plan((("cpu", 1),)), replace(HERE, models=()), ask=answers)
    (entry,) = made.models
    assert (entry.name, entry.kind, entry.kv_nbytes, entry.context) == ("mine", profile.LANGUAGE, 7, 256)
    assert entry.recipe and entry.runs[0].chunks == (64,)


def run(*words: str) -> int:
    return cli.run(["profile-models", *words])


def test_the_command_measures_for_real(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    options = ("--threads", "1", "--seconds", "0.01", "-o", str(out))
    assert run(f"tiny={model}", *options, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(out.read_text()) and said["models"][0]["work"]["flops"] == 2 * 16 * 4
    assert run(f"tiny={model}", *options) == 0  # nothing left to do
    assert "tiny" in capsys.readouterr().out
    assert Measured(profile.read(out)).frame("tiny", "cpu").cost.ns > 0


def test_nothing_is_downloaded_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", str(tmp_path / "p.json")) == 2
    assert "no ONNX asset is downloaded" in capsys.readouterr().err
    assert run("nsnet2", "-o", str(tmp_path / "p.json")) == 2
    assert "nsnet2 is not downloaded (33.0 MB); run: rlkit pull nsnet2, or pass --pull" in capsys.readouterr().err
    assert run("nsnet2", "--dry-run", "--threads", "1,2") == 0
    assert capsys.readouterr().out == "nsnet2: cpu x 1, cpu x 2; 33.0 MB to download first\n"
    assert run("nsnet2", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["downloads"] == {"nsnet2": 33009130}
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["what"], "'what' is no ONNX file, bundle folder or ONNX asset; the assets are silero-vad"),
        (["none.onnx"], "no file none.onnx"),
        (["smollm2-135m"], "'smollm2-135m' is no ONNX file"),
        (["a", "--threads", "0"], "--threads '0' must be numbers"),
        (["a", "--seconds", "0"], "--seconds 0.0 is outside"),
        (["a", "--device", "abacus"], "here has no abacus"),
        (["a", "--shape", "x"], "--shape 'x' is no shape"),
        (["a", "b", "--shape", "x=1"], "--shape goes with one model, not 2"),
        (["a", "--prompt", "10"], "--prompt 10 is less than a chunk of 256"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    found = capsys.readouterr().err
    assert said in found and len(found.strip().splitlines()) == 1


def test_a_profile_of_another_machine_is_not_added_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    profile.write(path, ELSEWHERE)
    assert run(str(model), "-o", str(path), "--threads", "1") == 2
    assert "machine.cpu = 'another processor' there" in capsys.readouterr().err
    assert profile.read(path, here=False) == ELSEWHERE
