"""The command forecast: what it prints and writes, what it refuses. Nothing is run and nothing measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import configs
from rlkit.apps import cli
from rlkit.apps import forecast as command
from rlkit.profiles import device as devices
from rlkit.profiles import efficiency, here
from rlkit.profiles.account import LOOP
from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.hardware import Device, Efficiency, Memory, Unit, Value
from rlkit.profiles.machine import Machine
from rlkit.profiles.sweeps import Sweep
from rlkit.recover import recipe
from test_efficiency import PEAKS as PEAKS_OF_TABLE
from test_efficiency import TABLE

PEAKS = ("--bandwidth", "40", "--gflops", "200")
IGPU = ("--device", "hx370:igpu")
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of this machine is seen, and what a sweep writes lands in a folder of the test's."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def config(tmp_path: Path) -> str:
    return _written(tmp_path / "model" / "config.json", configs.SMOLLM2_135M)


def _written(path: Path, config: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))
    return str(path)


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.run(["forecast", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_needs_a_config_alone(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, config, *PEAKS)
    assert made["schema_version"] == 1 and made["label"] == "uncalibrated" and made["recipe"] == "w4w2-gateup"
    assert Architecture.from_json(made["architecture"]) == of_config(configs.SMOLLM2_135M)
    assert "given on the command line" in made["assumptions"][0]
    assert made["baseline"]["bytes_per_s"] == pytest.approx(40e9)
    assert made["roofline"]["prompt_tokens"] == 512 and made["workload"]["all_logits"] is False
    assert made["reference"] == config and set(made["formulas"]) == {"roofline", "life", "baseline"}


def test_a_config_of_any_name_and_any_family_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, _written(tmp_path / "gpt-oss.json", configs.GPT_OSS_20B), *IGPU, "--recipe", "w4")
    assert made["model"] == "GptOssForCausalLM" and made["decode"]["place"] == "hx370:igpu"
    assert "experts.gate_up_proj" not in {row["name"] for row in made["decode"]["operators"]}
    assert {"attention", "attention in a window of 128", "router"} <= {
        row["name"] for row in made["decode"]["operators"]
    }


def test_it_prints_operators_formulas_and_assumptions(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", config, *IGPU, "--recipe", "w4", "--context", "64", "--new-tokens", "8", "--chunk", "16"]
    assert cli.run(words) == 0
    text = capsys.readouterr().out
    for part in ("gate_proj", "lm_head", "attention", "roofline", "LIFE", "bytes/bandwidth", "as w4;", "chunks of 16"):
        assert part in text
    for part in ("uncalibrated, roofline: ", "tokens/s at depth 64", "expected: first token in", "memory: weights 0.0"):
        assert part in text
    assert "energy: " in text and "design power" in text and "fp16-wmma" in text and "2026-11" in text


def test_every_option_reaches_the_forecast(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--context", "100", "--new-tokens", "20", "--chunk", "64", "--kv", "int8", "--adapters", "16")
    more = ("--batch", "3", "--eager", "--recipe", "w8", "--prefill-device", "hx370:npu")
    made = _json(capsys, config, *IGPU, *words, *more)
    assert made["workload"] == {"prompt_tokens": 100, "new_tokens": 20, "all_logits": False, "chunk": 64, "batch": 3}
    assert made["decode"]["storage"]["kv"]["bits"] == 8 and made["decode"]["options"]["attention"] == "eager"
    assert made["prefill"]["place"] == "hx370:npu" and made["recipe"] == "w8"
    names = {row["name"] for row in made["decode"]["operators"]}
    assert {"adapters", "attention: scores"} <= names and "gate_up_proj" not in names


def test_a_model_may_stay_in_floats(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    floats, packed = (_json(capsys, config, *IGPU, "--recipe", name) for name in ("none", "w4"))
    assert floats["recipe"] == "none" and floats["memory"]["weights_nbytes"] == 2 * 134_515_008
    assert packed["memory"]["weights_nbytes"] < 0.35 * floats["memory"]["weights_nbytes"]


def test_a_checkpoints_own_recipe_is_taken(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(config).parent
    (folder / "recovery.json").write_text("{}")
    (folder / "recipe.toml").write_text(recipe.load("w8").to_toml())
    assert _json(capsys, str(folder), *PEAKS)["recipe"] == "w8"
    assert _json(capsys, str(folder), *PEAKS, "--recipe", "w4")["recipe"] == "w4"


def _measured(speed: float) -> Machine:
    return Machine("Some CPU", "Linux", 2, 2, 2**34, speed, 0.5, 100e9, 0.2, "2026-11-22")


def test_without_a_device_this_machine_is_measured(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure_machine", lambda: _measured(30e9))
    assert cli.run(["forecast", config]) == 0
    said = capsys.readouterr()
    assert "this machine:cpu, uncalibrated" in said.out and "Some CPU, measured 2026-11-22" in said.out
    assert "was busy meanwhile" in said.err
    made = _json(capsys, config, "--gflops", "500")
    assert made["decode"]["roofs"] == {"fp32": 500e9} and made["decode"]["bytes_per_s"] == 30e9


def test_without_a_device_the_calibrated_entry_is_taken(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def value(number: float, unit: str) -> Value:
        return Value(number, unit, "rlkit calibrate", "2026-11-22", "measured")

    shares = {"linear": Efficiency(0.5, 0.8)}
    peaks = {"fp32": value(200e9, "FLOP/s")}
    cpu = Unit("cpu", peaks=peaks, dispatch=value(3e-6, "s"), efficiency=shares)
    here = Device("here", "This machine", {"cpu": cpu}, (Memory("DDR", value(40e9, "B/s")),), calibrated=True)
    devices.save(here, devices.here_path())
    made = _json(capsys, config)
    assert made["label"] == "calibrated" and made["decode"]["place"] == "here:cpu"


def test_the_table_of_the_calibration_is_used(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def value(number: float, unit: str) -> Value:
        return Value(number, unit, "rlkit calibrate", "2026-11-22", "measured")

    peaks = {"fp32": value(PEAKS_OF_TABLE.flops_per_s, "FLOP/s")}
    memory = Memory("DDR", value(PEAKS_OF_TABLE.bytes_per_s, "B/s"))
    devices.save(Device("here", "This machine", {"cpu": Unit("cpu", peaks=peaks)}, (memory,)), devices.here_path())
    efficiency.save(TABLE, here.table_path(devices.here_path()))
    made = _json(capsys, config, "--recipe", "w4")
    assert made["label"] == "calibrated" and made["decode"]["operators"][-1]["name"] == LOOP
    assert _json(capsys, config, *IGPU)["label"] == "uncalibrated"
    here.table_path(devices.here_path()).write_text('{"schema_version": 99}')
    assert cli.run(["forecast", config]) == 2
    assert "schema_version 99" in capsys.readouterr().err


def test_a_users_own_device(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.toml"
    own.write_text('schema_version = 1\n[mine]\nlike = "hx370"\ntitle = "Mine"\naliases = []\n')
    made = _json(capsys, config, "--device", "mine:igpu", "--file", str(own))
    assert made["decode"]["place"] == "mine:igpu"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_a_chart_of_the_roofline(suffix: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("charts", f"roofline{suffix}")
    _json(capsys, config, *IGPU, "--plot", str(path), "-o", "made.json")
    data = path.read_bytes()
    assert data.startswith(PNG) if suffix == ".png" else b"</svg>" in data
    assert json.loads(Path("made.json").read_text())["schema_version"] == 1
    if suffix == ".html":
        assert b"<td>lm_head</td>" in data and b"http" not in data.replace(b"arxiv", b"")


@pytest.mark.parametrize(
    ("axes", "count"),
    [("contexts", 6), ("chunks", 6), ("recipes", 3), ("contexts,recipes", 18), ("chunks,recipes", 18)],
)
def test_a_sweep_writes_json_and_a_chart(
    axes: str, count: int, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["forecast", config, *IGPU, "--sweep", axes]) == 0
    text = capsys.readouterr().out
    stem = f"forecast-{axes.replace(',', '-')}"
    found = Sweep.from_json(json.loads(Path(f"{stem}.json").read_text()))
    assert len(found.points) == count and found.axes == tuple(axes.split(","))
    assert Path(f"{stem}.png").read_bytes().startswith(PNG)
    assert "tokens/s" in text and "hx370:igpu, uncalibrated" in text


def test_a_sweep_as_json_alone_writes_nothing(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, config, *IGPU, "--sweep", "contexts")
    assert list(Path().iterdir()) == [] and made["columns"]["context"] == [128, 256, 512, 1024, 2048, 4096]
    _json(capsys, config, *IGPU, "--sweep", "contexts", "-o", "s.json", "--plot", "s.svg")
    assert sorted(path.name for path in Path().iterdir()) == ["s.json", "s.svg"]
    assert json.loads(Path("s.json").read_text()) == made


def test_a_sweep_over_recipes_adds_the_one_asked_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, config, *IGPU, "--sweep", "recipes", "--recipe", "none")
    assert made["columns"]["recipe"] == [*recipe.NAMED, "none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PEAKS, "--context", "9000"), "exceed the model's context of 8192"),
        ((*PEAKS, "--context", "0"), "0 prompt tokens"),
        ((*PEAKS, "--new-tokens", "-3"), "-3 new tokens"),
        ((*PEAKS, "--chunk", "0"), "0 tokens a chunk"),
        ((*PEAKS, "--batch", "99999999999"), "at most 1,000,000,000"),
        ((*PEAKS, "--recipe", "w5"), "no recipe 'w5'"),
        ((*PEAKS, "--kv", "fp8"), "use fp32, fp16, int8, int4"),
        ((*PEAKS, "--adapters", "-1"), "outside 0..1024"),
        (("--bandwidth", "-1", "--gflops", "200"), "must be positive"),
        ((*PEAKS, "--device", "hx370"), "give one or the other"),
        (("--device", "hx371"), "did you mean hx370"),
        (("--device", "hx370:tpu"), "has no unit 'tpu'"),
        (("--device", "hx370", "--file", "nowhere.toml"), "no file nowhere.toml"),
        ((*IGPU, "--prefill-device", "max395:npu"), "not one device"),
        (("--prefill-device", "hx370:npu"), "--prefill-device needs --device"),
        (("--device", "lunar-lake@1GB:npu", "--recipe", "none", "--batch", "99"), "does not fit"),
        ((*PEAKS, "--sweep", "models"), "no sweep over 'models'"),
        ((*PEAKS, "--sweep", "contexts", "--new-tokens", "9000"), "exceed the model's context"),
        ((*PEAKS, "--plot", "chart.gif"), "end it with .png, .svg, .html"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    config: str, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["forecast", config, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 9, "num_key_value_heads": 2}, "do not share"),
        ({"hidden_size": -576}, "hidden_size"),
        ({"architectures": ["NobodyForCausalLM"]}, "NobodyForCausalLM is not known"),
    ],
)
def test_damaged_configs_are_one_line_and_code_2(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _written(tmp_path / "bad.json", {**configs.SMOLLM2_135M, **change})
    assert cli.run(["forecast", path, *PEAKS]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_calibration_of_another_version_is_one_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    devices.here_path().parent.mkdir(parents=True)
    devices.here_path().write_text("schema_version = 99\n")
    assert cli.run(["forecast", config]) == 2
    error = capsys.readouterr().err
    assert "rlkit calibrate" in error and error.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["forecast", "--help"]) == 0
    assert "Example: rlkit forecast" in capsys.readouterr().out


def test_it_imports_neither_torch_nor_a_runtime_nor_matplotlib(config: str) -> None:
    program = f"""
import sys
from rlkit.apps import cli
assert cli.run(["forecast", {config!r}, "--device", "hx370", "--json"]) == 0
found = {{"torch", "onnx", "onnxruntime", "matplotlib", "requests", "huggingface_hub"}} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
