"""The command forecast: what it prints, what it refuses. Nothing is run and nothing measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlkit.apps import cli
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
    for part in (
        "gate_up_proj",
        "lm_head",
        "attention",
        "roofline",
        "LIFE",
        "bytes/bandwidth",
        "uncalibrated",
        "as w4;",
    ):
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


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["forecast", "--help"]) == 0
    assert "Example: rlkit forecast" in capsys.readouterr().out
