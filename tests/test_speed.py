"""The commands bench and forecast: what they print, what they refuse. Nothing is run and nothing measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlkit.apps import cli, speed
from rlkit.profiles.bench import Measurement, Round, summarize
from rlkit.profiles.bundle import size_of
from rlkit.recover import recipe
from shapes import SMOLLM2_135M

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
PEAKS = ("--bandwidth", "40", "--gflops", "200")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_forecast_needs_a_config_alone(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["forecast", config, *PEAKS, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["schema_version"] == 1 and made["label"] == "uncalibrated" and made["recipe"] == "w4w2-gateup"
    assert made["shape"] == SMOLLM2_135M.to_json()
    assert made["peaks"]["source"] == "given on the command line"
    assert made["baseline"]["bytes_per_s"] == pytest.approx(40e9)
    assert made["roofline"]["prompt_tokens"] == 512 and made["workload"]["all_logits"] is True


def test_forecast_prints_operators_formulas_and_assumptions(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", config, *PEAKS, "--recipe", "w4", "--context", "64", "--new-tokens", "8", "--last-logits"]
    assert cli.run(words) == 0
    text = capsys.readouterr().out
    for part in ("gate_proj", "lm_head", "attention", "roofline", "LIFE", "bytes/bandwidth", "uncalibrated", "as w4;"):
        assert part in text
    assert "of the last prompt token alone" in text


def test_a_checkpoints_own_recipe_is_taken(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(config).parent
    (folder / "recovery.json").write_text("{}")
    (folder / "recipe.toml").write_text(recipe.load("w8").to_toml())
    assert cli.run(["forecast", str(folder), *PEAKS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "w8"
    assert cli.run(["forecast", str(folder), *PEAKS, "--json", "--recipe", "w4"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "w4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "9000"), "exceed the model's context of 8192"),
        (("--context", "0"), "at least 1"),
        (("--recipe", "w5"), "no recipe 'w5'"),
        (("--bandwidth", "-1"), "must be positive"),
    ],
)
def test_absurd_forecasts_are_one_line_and_code_2(
    config: str, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["forecast", config, *PEAKS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "no rlkit bundle"),
        (("nowhere", "--prompt-tokens", "64;9"), "are no lengths"),
        (("nowhere", "--prompt-tokens", "0"), "must be positive"),
        (("nowhere", "--repeats", "0"), "at least 1 repeat"),
    ],
)
def test_absurd_benchmarks_are_one_line_and_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "forecast"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert f"Example: rlkit {command}" in capsys.readouterr().out


def test_bench_rows_are_named_and_counted_as_llama_bench_does() -> None:
    rounds = (Round(0.5, 0.02, 16), Round(1.0, 0.04, 16))
    measured = Measurement("b", (summarize(rounds, 64),), (rounds,), threads=2)
    tensor = {"kind": "gate_up", "bits": 2, "nbytes": 50_000_000}
    size = size_of({"recipe": {"name": "w4"}, "shape": SMOLLM2_135M.to_json(), "tensors": [tensor]})
    prefill, decode = speed.bench_rows(measured, size)
    assert prefill == ("b", "w4", "50.0", "2.97", "2", "pp64", "96.0 ± 45.3", "750.0", "", "")
    assert decode == ("b", "w4", "50.0", "2.97", "2", "tg16 @ d64", "37.5 ± 17.7", "30.00", "", "")
