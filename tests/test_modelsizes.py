"""The table of model sizes: published counts, sources everywhere, faults with file and key."""

from __future__ import annotations

import pytest

from rlkit.profiles.scheduling import modelsizes
from rlkit.recover import assets

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-4b": 4_022_468_096,
}
ONE = '[models.one]\nsource = "a paper"\ngflop = 1\nparams_m = 2\nactivations_m = 3\n'


def test_language_models_have_their_published_sizes() -> None:
    found = {name: one.architecture for name, one in modelsizes.built_in().models.items() if one.architecture}
    assert {name: each.parameters for name, each in found.items()} == PUBLISHED


def test_every_number_has_a_source_and_every_asset_is_one() -> None:
    table = modelsizes.built_in()
    assert set(table.units) == {"cpu", "igpu", "npu", "gpu"}
    assert all("assumed" in one.source for one in table.units.values())  # they are ours, and say so
    for one in table.models.values():
        assert one.source and one.about and (one.architecture or one.flops > 0)
        assert not one.asset or assets.find(one.asset).kind is assets.AssetKind.ONNX
        assert one.basis.endswith("(unverified)") == one.unverified
    shipped = {one.asset for one in table.models.values() if one.asset}
    assert shipped == {one.name for one in assets.registry().values() if one.kind is assets.AssetKind.ONNX}


def test_what_a_unit_cannot_run_has_a_reason() -> None:
    table = modelsizes.built_in().models
    assert table["plane-rcnn"].units == ("cpu", "igpu", "gpu") and "sizes" in table["plane-rcnn"].why
    assert all(one.why for one in table.values() if len(one.units) < 4)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gflop = 1", "gflop = 0", "models.one.gflop = 0 is zero"),
        ("gflop = 1\n", "", "models.one.gflop is missing"),
        ('source = "a paper"\n', "", "models.one.source is missing"),
        ("params_m = 2", "params_m = 2\nsize = 3", "models.one.size is an unknown key"),
        ("params_m = 2", 'params_m = 2\nunits = ["tpu"]', "models.one.units = 'tpu' is no unit"),
        ("params_m = 2", 'params_m = 2\nunits = ["cpu"]', "models.one.why is missing"),
        ("params_m = 2", "params_m = 2\ninputs = { x = [0] }", "models.one.inputs"),
        ("params_m = 2", "params_m = 2\nconfig = { hidden_size = 8 }", "models.one.config"),
    ],
)
def test_a_fault_names_file_and_key(old: str, new: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^sizes\.toml") as caught:
        modelsizes.parse(ONE.replace(old, new), "sizes.toml")
    assert said in str(caught.value)
