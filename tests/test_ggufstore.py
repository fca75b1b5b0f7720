"""GGUF files written here, by hand and by the gguf package, and read for export: codes, scales, names."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from ggufs import MODELS, Types, always, by_hand, mixed, opened, random_model, with_blocks, with_tensor, write
from rlkit.export.ggufstore import GgufStore
from rlkit.recover.model import quiet_transformers


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama") / "model.gguf", random_model())


def whole(store: GgufStore, module: str) -> np.ndarray:
    """The weight that a packed matrix and its offsets stand for."""
    weight, offsets = store.matrix(module).dequantize(), store.offsets(module)
    return weight if offsets is None else weight + np.repeat(offsets, store.matrix(module).group, axis=1)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_agrees_with_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    head_dim = 128 if architecture == "qwen3" else 32  # transformers knows no other of Qwen3's
    made = random_model(architecture, tied=tied, head_dim=head_dim)
    path = write(tmp_path / "model.gguf", made, architecture=architecture)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    store = opened(path, carry_offsets=True)
    for name, expected in model.state_dict().items():
        np.testing.assert_array_equal(store.tensor(name), expected.numpy(), name)
    for module in store.inventory.packed:
        np.testing.assert_allclose(whole(store, module), store.tensor(f"{module}.weight"), rtol=0, atol=1e-8)
    names = {*store.inventory.floats, *(f"{module}.weight" for module in store.inventory.packed)}
    assert names | {"lm_head.weight"} == set(model.state_dict())


@pytest.mark.parametrize("architecture", MODELS)
def test_a_float_file_gives_back_the_model_it_was_made_of(tmp_path: Path, architecture: str) -> None:
    model = random_model(architecture)
    store = opened(write(tmp_path / "model.gguf", model, always(Kind.F32), architecture=architecture))
    assert not store.inventory.packed
    for name, expected in model.named_parameters():
        np.testing.assert_array_equal(store.tensor(name), expected.detach().numpy(), name)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
@pytest.mark.parametrize(("hidden", "ffn"), [(32, 64), (96, 32), (128, 288)])
def test_codes_and_scales_are_the_file_s_bit_for_bit(tmp_path: Path, kind: Kind, hidden: int, ffn: int) -> None:
    raw, numbers, scales = by_hand(kind, hidden, ffn)
    store = with_blocks(tmp_path / "model.gguf", raw, kind, hidden=hidden, ffn=ffn)
    module = "model.layers.1.mlp.down_proj"
    (packed,) = store.inventory.packed.values()
    bits = 8 if kind == Kind.Q8_0 else 4
    assert (packed.module, packed.n, packed.k, packed.bits, packed.group) == (module, hidden, ffn, bits, 32)
    matrix = store.matrix(module)
    assert (matrix.bits, matrix.group, matrix.is_symmetric()) == (bits, 32, True)
    np.testing.assert_array_equal(matrix.scales, scales)
    np.testing.assert_array_equal(matrix.dequantize(), numbers * np.repeat(scales, 32, axis=1))
    np.testing.assert_array_equal(matrix.dequantize(), store.tensor(f"{module}.weight"))
    assert store.offsets(module) is None
    assert f"{module}.weight" not in store.inventory.floats


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_packed_rows_of_the_gguf_package_s_quantizer(tmp_path: Path, kind: Kind, module: str) -> None:
    model = random_model()
    store = opened(write(tmp_path / "model.gguf", model, always(kind)))
    name = f"model.layers.0.{module}"
    weight = model.get_submodule(name).weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    np.testing.assert_array_equal(store.matrix(name).dequantize(), expected)


def test_offsets_say_what_integers_cannot(tmp_path: Path) -> None:
    model = random_model()
    store = opened(write(tmp_path / "model.gguf", model, always(Kind.Q4_1)), carry_offsets=True)
    module = "model.layers.1.mlp.up_proj"
    assert store.offset_modules == {name for name, _n, _k in store.inventory.shape.linears() if name != "lm_head"}
    matrix, offsets = store.matrix(module), store.offsets(module)
    assert offsets is not None
    assert (offsets.dtype, offsets.shape) == (np.float32, matrix.scales.shape)
    inputs = np.random.default_rng(0).normal(size=(5, matrix.k)).astype(np.float32)
    sums = inputs.reshape(5, matrix.groups, matrix.group).sum(-1)
    branch = inputs @ matrix.dequantize().T + sums @ offsets.T
    np.testing.assert_allclose(branch, inputs @ store.tensor(f"{module}.weight").T, atol=1e-5)
    assert np.abs(sums @ offsets.T).max() > 1e-3  # the branch is no formality


def test_without_offsets_such_matrices_are_rounded_again_at_least_error(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_model(), always(Kind.Q4_1))
    store, exact = opened(path), opened(path, carry_offsets=True)
    module = "model.layers.0.self_attn.q_proj"
    assert not store.offset_modules
    assert store.offsets(module) is None
    assert store.inventory.packed[module].zero_points
    target = exact.tensor(f"{module}.weight")
    error = np.square(store.matrix(module).dequantize() - target).sum()
    nearest = exact.matrix(module)  # the same codes with the nearest integer zero point
    integer = np.rint(-exact.offsets(module) / nearest.scales) * nearest.scales  # type: ignore[operator]
    same_codes = np.square(nearest.dequantize() - np.repeat(integer, 32, axis=1) - target).sum()
    assert 0 < error < same_codes
    assert error < 0.01 * np.square(target).sum()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q4_1, Kind.F16])
def test_a_tied_embedding_is_shared_where_its_type_maps(tmp_path: Path, kind: Kind) -> None:
    types: Types = lambda name: kind if name == "token_embd.weight" else mixed(name)  # noqa: E731
    store = opened(write(tmp_path / "model.gguf", random_model(), types))
    table = store.tensor("model.embed_tokens.weight")
    assert store.inventory.floats["model.embed_tokens.weight"] == table.shape == (512, 128)
    assert store.inventory.shares_embedding == (kind in (Kind.Q4_0, Kind.Q8_0))
    assert store.inventory.weight_name("lm_head") == "model.embed_tokens.weight"
    if store.inventory.shares_embedding:
        np.testing.assert_array_equal(store.matrix("lm_head").dequantize(), table)
    else:
        assert "lm_head" in store.inventory.float_linears()


def test_an_untied_head_is_packed_by_itself(tmp_path: Path) -> None:
    types: Types = lambda name: Kind.Q4_1 if name == "output.weight" else mixed(name)  # noqa: E731
    store = opened(write(tmp_path / "model.gguf", random_model(tied=False), types), carry_offsets=True)
    assert not store.inventory.shares_embedding
    assert "lm_head" in store.offset_modules
    assert "lm_head.weight" not in store.inventory.floats
    assert not np.array_equal(store.tensor("lm_head.weight"), store.tensor("model.embed_tokens.weight"))


RAW_TYPES = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", 
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "Q5_0", "Q5_1",
]  # fmt: skip


@pytest.mark.parametrize("kind", RAW_TYPES)
def test_other_types_are_dequantized_to_floats(tmp_path: Path, kind: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 0x30, (32, 256 // block * nbytes), dtype=np.uint8)  # halves of such bytes are finite
    store = with_blocks(tmp_path / "model.gguf", raw, Kind[kind], hidden=32, ffn=256)
    name = "model.layers.1.mlp.down_proj.weight"
    assert store.inventory.floats[name] == (32, 256)
    assert not store.inventory.packed
    found = store.tensor(name)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, Kind[kind]))
    assert found.dtype == np.float32
    (row,) = [row for row in store.report if row["tensor"] == name]
    assert (row["type"], row["became"]) == (kind, "float")
    assert kind in row["why"]


def test_the_report_has_a_row_for_every_tensor(llama_file: Path) -> None:
    store = opened(llama_file, carry_offsets=True)
    rows = {row["tensor"]: row for row in store.report}
    assert len(rows) == len(store.report) == len(gguf.GGUFReader(llama_file).tensors)
    assert all(set(row) == {"tensor", "type", "became", "why"} and all(row.values()) for row in store.report)
    assert json.loads(json.dumps(store.report)) == store.report
    head, values = rows["model.embed_tokens.weight"], rows["model.layers.0.self_attn.v_proj.weight"]
    assert (head["type"], head["became"]) == ("Q8_0", "8 bits, group 32")
    assert (values["type"], values["became"]) == ("Q4_1", "4 bits, group 32, and a branch of offsets")
    rounded = {row["tensor"]: row for row in opened(llama_file).report}
    assert "rounded again" in rounded["model.layers.0.self_attn.v_proj.weight"]["why"]


def test_tensors_do_not_keep_the_file_open(llama_file: Path) -> None:
    store = opened(llama_file)
    for array in (store.tensor("model.norm.weight"), store.matrix("model.layers.0.self_attn.k_proj").qweight):
        while array is not None:
            assert not isinstance(array, np.memmap)
            array = array.base  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("blk.0.attn_q.bias", 128, r"no use for 'blk.0.attn_q.bias'"),
        ("../../etc/passwd", 4, r"no use for '../../etc/passwd'"),
        ("x\ny" + 100 * "z", 4, r"no use for 'x\\nyzzz"),
        ("blk.0.ffn_gate_exps.weight", 4, "another kind of model"),
        ("output_norm.weight", 0, r"lacks output_norm.weight"),
        ("output_norm.weight", 64, r"output_norm.weight is \(64,\), but its metadata ask for \(128,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, size: int, words: str) -> None:
    if len(name) > 64:  # as long as the gguf package writes
        name = name[:60]
    path = with_tensor(tmp_path / "model.gguf", name, np.ones(size, np.float32))
    with pytest.raises(ValueError, match=words) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    model = random_model()
    path = write(tmp_path / "model.gguf", model)
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
    with pytest.raises(ValueError, match="architecture gemma is not supported: rlkit knows llama, qwen2, qwen3"):
        opened(path)


@pytest.mark.parametrize("keep", [3, 30, 2000, 20_000, 0.5, -1])
def test_a_truncated_file_is_refused(llama_file: Path, tmp_path: Path, keep: float) -> None:
    content = llama_file.read_bytes()
    size = round(keep * len(content)) if isinstance(keep, float) else keep
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match="GGUF"):
        opened(path)


def test_a_file_that_shrinks_while_it_is_read(llama_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(llama_file.read_bytes())
    store = opened(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="has changed or cannot be read"):
        store.tensor("model.norm.weight")


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    raw, _, _ = by_hand(Kind.Q4_0, 32, 64)
    raw[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    store = with_blocks(tmp_path / "model.gguf", raw, Kind.Q4_0, hidden=32, ffn=64)
    with pytest.raises(ValueError, match=r"down_proj.weight has scales that are NaN or infinite"):
        store.matrix("model.layers.1.mlp.down_proj")


def test_names_that_are_not_there_are_refused(llama_file: Path) -> None:
    store = opened(llama_file)
    with pytest.raises(ValueError, match=r"holds no model\.nothing"):
        store.tensor("model.nothing")
    with pytest.raises(ValueError, match=r"holds no packed model\.layers\.0\.mlp\.up_proj"):
        store.matrix("model.layers.0.mlp.up_proj")
