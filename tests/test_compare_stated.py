"""Bundles as they state themselves: of every form of matrix, the bytes and names of the file that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import families
import tiny
from rlkit.export.build import export_bundle
from rlkit.profiles.compare import compare_step
from rlkit.profiles.opprofile import profile_bundle
from rlkit.profiles.places import of_rates
from rlkit.profiles.rates import Peaks
from rlkit.profiles.stated import read_stated, stated
from rlkit.recover.atomic import write_json
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import read_json

PLACE = of_rates(Peaks(40e9, 200e9, 1e-6))
FORMS: list[tuple[str, Recipe | None, list[int | None]]] = [
    ("gpt-oss", tiny.W4, [8, None]),
    ("llama-biased", None, [None, None]),
    ("gemma3", tiny.W8, [8, None]),
    ("phi3", tiny.W4, [None, None]),
    ("qwen3", tiny.W4, [None, None]),
]


def tables_nbytes(manifest: dict[str, Any]) -> int:
    return sum(row["nbytes"] for row in manifest["tensors"] if row["name"].startswith(("cos_cache", "sin_cache")))


@pytest.mark.parametrize(("family", "asked", "windows"), FORMS)
def test_everything_stored_is_forecast_and_everything_that_runs_too(
    family: str, asked: Recipe | None, windows: list[int | None], tmp_path: Path
) -> None:
    bundle = export_bundle(families.folder(family, tmp_path / "hf"), tmp_path / "bundle", recipe=asked)
    found, manifest = read_stated(bundle), read_json(bundle / "rlkit.json")
    assert found.weights.stored_nbytes == manifest["nbytes"] - tables_nbytes(manifest)
    assert [layer.window for layer in found.architecture.layers] == windows
    step = compare_step(found.model_at(PLACE), profile_bundle(bundle, 1, 20, threads=1, steps=1))
    alone = [row for row in step.rows if row.forecast_seconds is None or row.measured_seconds is None]
    assert [row.name for row in alone if row.name != "unexplained"] == []


def test_recovered_bundles_have_branches_and_joined_products(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tiny.llama(tmp_path / "hf"), tmp_path / "ckpt", tiny.W4W2, adapter_rank=32)
    found = read_stated(export_bundle(checkpoint, tmp_path / "bundle"))
    assert (found.name, found.recipe, found.target, found.all_logits) == ("bundle", "w4w2-gateup", "cpu", False)
    (block,) = found.weights.blocks
    forms = {matrix.name: (matrix.bits, matrix.format.group, matrix.rank) for matrix in block.matrices}
    assert forms["gate_proj"] == forms["up_proj"] == (2, 64, 32)
    assert {name: form[::2] for name, form in forms.items() if form[0] == 4} == {
        "qkv_proj": (4, 0),
        "o_proj": (4, 0),
        "down_proj": (4, 0),
    }
    assert block.count == 2 and found.weights.embedding_nbytes == 0 and found.weights.row_nbytes > 0


def test_mixed_widths_are_rows_of_their_own(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    for row in manifest["tensors"]:
        if row["name"] == "model.layers.1.mlp.down_proj":
            row |= {"bits": 8, "nbytes": 2 * row["nbytes"]}
    found = stated(manifest, "mixed", {})
    assert [block.count for block in found.weights.blocks] == [1, 1]
    widths = [matrix.bits for block in found.weights.blocks for matrix in block.matrices if matrix.name == "down_proj"]
    assert widths == [4, 8]


def _manifest(folder: Path) -> dict[str, Any]:
    bundle = export_bundle(tiny.checkpoint(tiny.llama(folder / "hf"), folder / "ckpt"), folder / "bundle")
    return read_json(bundle / "rlkit.json")


def test_half_precision_is_read_from_the_plan(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    manifest["plan"]["dtype"], manifest["target"] = "float16", "webgpu"
    found = stated(manifest, "half", {})
    assert found.storage.activation_bits == 16
    place = found.model_at(PLACE).place
    assert place.storage is found.storage and not place.options.fused_qk_norm and not place.options.fused_qkv


def test_damaged_manifests_are_one_line(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    without = [row for row in manifest["tensors"] if row["name"] != "model.layers.1.mlp.down_proj"]
    few = [
        {**row, "weights": 5} if row["name"] == "model.layers.0.self_attn.o_proj" else row
        for row in manifest["tensors"]
    ]
    headless = [row for row in manifest["tensors"] if row["name"] not in ("lm_head", "model.embed_tokens")]
    for changes, why in (
        ({"tensors": without}, "m.json: it states no tensor for model.layers.1.mlp.down_proj; export"),
        ({"tensors": few}, "m.json: it states 5 weights for self_attn.o_proj, which has 128 x 128; export"),
        ({"tensors": headless}, "m.json: it states no lm_head; export"),
        ({"tensors": [7]}, "m.json states no shape or tensors"),
        ({"shape": None}, "m.json states no shape or tensors"),
        ({"plan": {}}, "m.json states no shape or tensors"),
    ):
        with pytest.raises(ValueError, match=f"^{why}") as caught:
            stated({**manifest, **changes}, "b", {}, "m.json")
        assert "\n" not in str(caught.value) and "export the bundle again" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"has no rlkit\.json, so it is no rlkit bundle"):
        read_stated(tmp_path)
    (tmp_path / "half").mkdir()
    write_json(tmp_path / "half" / "rlkit.json", manifest)
    with pytest.raises(FileNotFoundError, match=r"genai_config\.json"):
        read_stated(tmp_path / "half")
