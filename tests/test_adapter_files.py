"""Adapters kept as files: the graph computes as before without one, and what PEFT computes with one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from rlkit.export import adapters, graph, write
from rlkit.export.adapters import LowRank, Slot
from rlkit.export.build import export_bundle
from rlkit.recover import recipe
from rlkit.runtime.session import Session, Token, open_bundle

# peft asks transformers 5 the old way
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 30))
PROMPT = [int(token) for token in IDS[0, :6]]
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
# name -> (rank, alpha, target modules, further options of PEFT)
KINDS = {
    "qv": (8, 16, ["q_proj", "v_proj"], {}),
    "every.linear": (4, 8, [*ATTENTION, *MLP], {}),
    "mlp-rs": (12, 12, MLP, {"use_rslora": True}),
    "mixed_ranks": (4, 8, ["v_proj", "down_proj"], {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 18}}),
}
FLOAT_HEAD = '[[rule]]\nmatch = "lm_head"\nbits = 16\n[[rule]]\nmatch = "*.o_proj"\nbits = 16\n[[rule]]\nbits = 4\n'


def peft_folder(source: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """A random adapter of the float model `source`, large enough to change its mind, in PEFT's own format."""
    rank, alpha, targets, options = KINDS[kind]
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **options)
    get_peft_model(tiny.LlamaForCausalLM.from_pretrained(source), config).save_pretrained(folder)
    return folder


def adapted(checkpoint: Path, folder: Path) -> torch.nn.Module:
    """The model of a checkpoint under a PEFT adapter, by PEFT itself."""
    return PeftModel.from_pretrained(tiny.dequantized(checkpoint), folder).eval()


def whole_graph(bundle: Path) -> ir.Model:
    """The graph that computes the logits of every token."""
    apart = bundle / "logits.onnx"
    return graph.load(apart if apart.exists() else bundle / "model.onnx")


def with_inputs(bundle: Path, out: Path, folders: dict[str, Path]) -> Path:
    """A copy of a bundle whose graph takes these adapters and computes all logits, the files in place."""
    shutil.copytree(bundle, out, ignore=shutil.ignore_patterns("*.onnx", "*.onnx.data"))
    model = whole_graph(bundle)
    found = {name: adapters.read_peft(folder) for name, folder in folders.items()}
    slots = adapters.add_inputs(model, adapters.wanted_modules(found))
    write.write(model, out / "model.onnx")
    for name, low_ranks in found.items():
        adapters.write_adapter(out, name, low_ranks, slots)
    return out


@dataclass(frozen=True, slots=True)
class World:
    """A tiny model, its checkpoint and bundle, adapters of it, and the bundle with all of them."""

    source: Path
    checkpoint: Path
    plain: Path
    folders: dict[str, Path]
    bundle: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("adapters")
    source = tiny.llama(root / "hf")
    checkpoint = tiny.checkpoint(source, root / "ckpt")
    plain = export_bundle(checkpoint, root / "plain", accuracy_level=0)
    folders = {kind: peft_folder(source, root / kind, kind, seed) for seed, kind in enumerate(KINDS)}
    return World(source, checkpoint, plain, folders, with_inputs(plain, root / "bundle", folders))


@pytest.fixture(scope="module")
def session(world: World) -> Session:
    return open_bundle(world.bundle)


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def greedy(session: Session, adapter: str | None, count: int = 8) -> list[int]:
    return ids_of(list(session.generate(PROMPT, count, ignore_stop=True, adapter=adapter)))


def test_without_an_adapter_nothing_changes(world: World, session: Session) -> None:
    plain = open_bundle(world.plain)
    np.testing.assert_allclose(session.logits(IDS), plain.logits(IDS), rtol=0, atol=1e-5)
    assert greedy(session, None) == greedy(plain, None)
    assert plain.adapters == ()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind: str, world: World, session: Session) -> None:
    expected = tiny.logits(adapted(world.checkpoint, world.folders[kind]), IDS)
    assert np.abs(expected - session.logits(IDS)).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(session.logits(IDS, kind), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_those_of_peft(kind: str, world: World, session: Session) -> None:
    tokens = greedy(session, kind)
    row = np.array([PROMPT + tokens])
    scores = tiny.logits(adapted(world.checkpoint, world.folders[kind]), row)[0]
    scores[:, session.stop_ids] = -np.inf  # as ignore_stop does
    assert tokens == scores.argmax(axis=1)[len(PROMPT) - 1 : -1].tolist()
    assert tokens != greedy(session, None)


def test_adapters_are_switched_between_and_within_requests(session: Session) -> None:
    assert session.adapters == tuple(sorted(KINDS))
    alone = {name: greedy(session, name) for name in (None, *KINDS)}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)
    assert [greedy(session, name) for name in reversed(alone)] == list(reversed(alone.values()))
    running = {name: session.generate(PROMPT, 8, ignore_stop=True, adapter=name) for name in alone}
    together: dict[str | None, list[int]] = {name: [] for name in alone}
    for _ in range(8):
        for name, tokens in running.items():
            together[name].append(next(tokens).id)
    assert together == alone
    with_one = session.logits(IDS, "qv")
    session.logits(IDS)
    np.testing.assert_array_equal(session.logits(IDS, "qv"), with_one)


def test_unloading_waits_for_the_reply(world: World) -> None:
    session = open_bundle(world.bundle)
    expected = greedy(session, "qv"), session.logits(IDS, "qv")
    reply = session.generate(PROMPT, 8, adapter="qv")
    next(reply)
    with pytest.raises(ValueError, match=r"qv cannot be unloaded .*in use.*; end its reply"):
        session.unload_adapter("qv")
    reply.close()
    session.unload_adapter("qv")
    session.unload_adapter("qv")  # not loaded: nothing to do
    assert greedy(session, "qv") == expected[0]
    np.testing.assert_array_equal(session.logits(IDS, "qv"), expected[1])
    waiting = session.generate(PROMPT, 8, ignore_stop=True, adapter="qv")
    session.unload_adapter("qv")  # asked for, not begun
    assert ids_of(list(waiting)) == expected[0]


def test_the_stock_runtime_runs_the_bundle(world: World, session: Session) -> None:
    model = og.Model(str(world.bundle))
    files = og.Adapters(model)
    files.load(str(world.bundle / "adapters" / "qv.onnx_adapter"), "any name")
    for name, active in ((None, None), ("qv", "any name"), (None, None)):
        params = og.GeneratorParams(model)
        length = len(PROMPT) + 8
        params.set_search_options(max_length=length, min_length=length)
        generator = og.Generator(model, params)
        if active:
            generator.set_active_adapter(files, active)
        generator.append_tokens(np.array([PROMPT], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist()[len(PROMPT) :] == greedy(session, name)


def test_slots_are_read_back_from_the_file(world: World) -> None:
    slots = {slot.node: slot for slot in adapters.read_slots(graph.load(world.bundle / "model.onnx"))}
    attention = "model.layers.1.self_attn"
    parts = {f"{attention}.{name}": n for name, n in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64))}
    assert slots[f"{attention}.qkv_proj"] == Slot(f"{attention}.qkv_proj", 128, parts, "float32")
    assert slots["model.layers.0.mlp.down_proj"].inputs[0] == "model.layers.0.mlp.down_proj.lora_A.weight"
    modules = [module for slot in slots.values() for module in slot.parts]
    assert sorted(modules) == sorted(adapters.read_peft(world.folders["every.linear"]))
    assert adapters.read_slots(graph.load(world.plain / "model.onnx")) == []


def test_an_adapter_can_come_later(world: World, tmp_path: Path) -> None:
    bundle = shutil.copytree(world.bundle, tmp_path / "b")
    session = open_bundle(bundle)
    late = peft_folder(world.source, tmp_path / "late", "qv", seed=77)
    slots = adapters.read_slots(graph.load(bundle / "model.onnx"))
    written = adapters.write_adapter(bundle, "late", adapters.read_peft(late), slots)
    file = bundle / written.file
    assert (written.modules, written.rank) == (4, 8)
    assert 0 <= file.stat().st_size - written.nbytes < 2048
    json.dumps(written.to_json())
    assert "late" in session.adapters
    expected = tiny.logits(adapted(world.checkpoint, late), IDS)
    np.testing.assert_allclose(session.logits(IDS, "late"), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("only", ["q_proj", "k_proj", "v_proj"])
def test_one_module_of_a_packed_node_is_enough(only: str, world: World, tmp_path: Path) -> None:
    sizes = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64)}
    module = f"model.layers.0.self_attn.{only}"
    (slot,) = adapters.add_inputs(whole_graph(world.plain), {module: sizes[only]})
    assert [n for n in slot.parts.values()] == [128, 64, 64]


def test_gate_and_up_in_one_node(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(24, 64)).astype(np.float32), rng.normal(size=(3, 24)).astype(np.float32)
    model = one_linear("/model/layers.0/mlp/gate_up_proj/MatMul", weight)
    mlp = "model.layers.0.mlp"
    slots = adapters.add_inputs(model, {f"{mlp}.up_proj": (24, 32)})
    low_ranks = {
        f"{mlp}.{name}": LowRank(
            rng.normal(size=(r, 24)).astype(np.float32), rng.normal(size=(32, r)).astype(np.float32)
        )
        for name, r in (("up_proj", 2), ("gate_proj", 3))
    }
    written = adapters.write_adapter(tmp_path, "both", low_ranks, slots)
    ir.save(model, tmp_path / "model.onnx")
    change = np.concatenate(
        [low_ranks[f"{mlp}.{name}"].b @ low_ranks[f"{mlp}.{name}"].a for name in ("gate_proj", "up_proj")]
    )
    np.testing.assert_allclose(run(tmp_path, x), x @ weight, atol=1e-5)
    np.testing.assert_allclose(run(tmp_path, x, written.file), x @ (weight + change.T), rtol=1e-4, atol=1e-4)


def one_linear(name: str, weight: np.ndarray) -> ir.Model:
    """A model that is one float MatMul, x -> logits."""
    tensor = ir.tensor(weight, name="weight")
    kind = ir.TensorType(tensor.dtype)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["rows", weight.shape[0]]))
    constant = ir.Value(name="weight", type=kind, shape=ir.Shape(weight.shape), const_value=tensor)
    y = ir.Value(name="logits", type=kind, shape=ir.Shape(["rows", weight.shape[1]]))
    node = ir.node("MatMul", [x, constant], outputs=[y], name=name)
    made = ir.Graph([x], [y], nodes=[node], initializers=[constant], opset_imports={"": 22})
    return ir.Model(made, ir_version=10)


def run(folder: Path, x: np.ndarray, file: str | None = None) -> np.ndarray:
    options, how = ort.SessionOptions(), ort.RunOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    if file:
        adapter = ort.LoraAdapter()
        adapter.Load(str(folder / file))
        how.add_active_adapter(adapter)
    return np.asarray(session.run(["logits"], {"x": x}, how)[0])


def test_float_linears_and_a_head_take_adapters(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "hf", tied=False)
    checkpoint = tiny.checkpoint(source, tmp_path / "ckpt", recipe.parse(FLOAT_HEAD))
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "lm_head"], init_lora_weights=False)
    folder = tmp_path / "peft"
    made = get_peft_model(tiny.LlamaForCausalLM.from_pretrained(source), config)
    made.save_pretrained(folder, save_embedding_layers=False)
    plain = export_bundle(checkpoint, tmp_path / "plain", accuracy_level=0)
    session = open_bundle(with_inputs(plain, tmp_path / "b", {"head": folder}))
    np.testing.assert_allclose(session.logits(IDS), open_bundle(plain).logits(IDS), rtol=0, atol=1e-5)
    expected = tiny.logits(adapted(checkpoint, folder), IDS)
    np.testing.assert_allclose(session.logits(IDS, "head"), expected, rtol=0, atol=1e-3)


def test_adapters_in_the_graph_and_in_files_add_up(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "hf")
    checkpoint = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)  # gate and up have branches
    plain = export_bundle(checkpoint, tmp_path / "plain", accuracy_level=0)
    folder = peft_folder(source, tmp_path / "peft", "every.linear")
    session = open_bundle(with_inputs(plain, tmp_path / "b", {"more": folder}))
    expected = tiny.logits(adapted(checkpoint, folder), IDS)
    np.testing.assert_allclose(session.logits(IDS, "more"), expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(session.logits(IDS), open_bundle(plain).logits(IDS), rtol=0, atol=1e-5)


def half(model: ir.Model) -> ir.Model:
    """The same graph in float16, inputs and outputs too."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in [*values, *(output for node in model.graph for output in node.outputs)]:
        if value.dtype is ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None and value.const_value.dtype is ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    return model


def test_float16_graphs(world: World, tmp_path: Path) -> None:
    plain = shutil.copytree(world.plain, tmp_path / "half", ignore=shutil.ignore_patterns("*.onnx", "*.onnx.data"))
    write.write(half(whole_graph(world.plain)), plain / "model.onnx")
    session = open_bundle(with_inputs(plain, tmp_path / "b", {"all": world.folders["every.linear"]}))
    assert {slot.dtype for slot in adapters.read_slots(graph.load(tmp_path / "b" / "model.onnx"))} == {"float16"}
    base, found = session.logits(IDS), session.logits(IDS, "all")
    assert base.dtype == found.dtype == np.float32
    # the runtime rounds to float16 in other places once a node is between two others
    np.testing.assert_allclose(base, open_bundle(plain).logits(IDS), rtol=0, atol=0.005)
    for measured, model in (
        (base, tiny.dequantized(world.checkpoint)),
        (found, adapted(world.checkpoint, world.folders["every.linear"])),
    ):
        expected = tiny.logits(model, IDS)
        np.testing.assert_allclose(measured, expected, rtol=0, atol=0.01 * np.abs(expected).max())
    assert greedy(session, "all") != greedy(session, None)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_peft_files_of_other_types(kind: torch.dtype, world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.folders["qv"], tmp_path / "peft")
    file = folder / "adapter_model.safetensors"
    stored = {name: tensor.to(kind) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    name = "model.layers.0.self_attn.q_proj"
    found = adapters.read_peft(folder)[name]
    a, b = (stored[f"base_model.model.{name}.lora_{letter}.weight"].float().numpy() for letter in "AB")
    np.testing.assert_array_equal(found.a, a)
    np.testing.assert_array_equal(found.b, 2 * b)  # alpha / r = 16 / 8


def test_peft_folders_that_are_no_plain_adapter(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.folders["qv"], tmp_path / "peft")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is of type I32"):
        adapters.read_peft(folder)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        adapters.read_peft(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        adapters.read_peft(folder)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "a\\b",
        "/abs",
        "a b",
        "naïve",
        ".hidden",
        "-x",
        "none",
        "None",
        "con",
        "LPT1.x",
        "x" * 65,
        "a\n",
    ],
)
def test_names_are_plain(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"adapter name {name!r} ")) as caught:
        adapters.write_adapter(tmp_path, name, {}, [])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_names_are_taken_once(world: World, tmp_path: Path) -> None:
    slots = adapters.read_slots(graph.load(world.bundle / "model.onnx"))
    low_ranks = adapters.read_peft(world.folders["qv"])
    written = tmp_path / adapters.write_adapter(tmp_path, "French", low_ranks, slots).file
    first = written.read_bytes()
    with pytest.raises(FileExistsError, match="has an adapter 'French'; choose another name"):
        adapters.write_adapter(tmp_path, "French", low_ranks, slots)
    with pytest.raises(FileExistsError, match="has an adapter 'French'"):
        adapters.write_adapter(tmp_path, "french", low_ranks, slots, force=True)
    doubled = {module: LowRank(low_rank.a, 2 * low_rank.b) for module, low_rank in low_ranks.items()}
    adapters.write_adapter(tmp_path, "French", doubled, slots, force=True)
    assert written.read_bytes() != first
    assert [file.name for file in written.parent.iterdir()] == ["French.onnx_adapter"]


def low_rank(rank: int = 2, k: int = 256, n: int = 128, value: float = 1.0) -> LowRank:
    return LowRank(np.full((rank, k), value, np.float32), np.full((n, rank), value, np.float32))


DOWN = "model.layers.0.mlp.down_proj"
WRONG = {
    "no module": ({}, "float32", "changes no module"),
    "another module": (
        {"model.layers.9.mlp.down_proj": low_rank()},
        "float32",
        r"layers\.9\.mlp\.down_proj, which takes no",
    ),
    "another width": (
        {DOWN: low_rank(k=512)},
        "float32",
        r"cannot take A \(2, 512\) and B \(128, 2\); it is of another",
    ),
    "another height": ({DOWN: low_rank(n=64)}, "float32", "of another base"),
    "no rank": ({DOWN: low_rank(rank=0)}, "float32", "of another base"),
    "not a number": ({DOWN: low_rank(value=float("nan"))}, "float32", "values that are no float32 numbers"),
    "too large": ({DOWN: low_rank(value=1e5)}, "float16", "values that are no float16 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_of_another_base_writes_nothing(case: str, tmp_path: Path) -> None:
    low_ranks, dtype, says = WRONG[case]
    with pytest.raises(ValueError, match=says) as caught:
        adapters.write_adapter(tmp_path, "x", low_ranks, [Slot(DOWN, 256, {DOWN: 128}, dtype)])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_graphs_refuse_what_they_have_no_place_for(world: World) -> None:
    model = whole_graph(world.plain)
    before = [node.name for node in model.graph]
    q, v = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))
    for modules, says in (
        ({DOWN: (256, 128), "model.layers.7.mlp.down_proj": (256, 128)}, r"no linear node for model\.layers\.7"),
        ({DOWN: (128, 256)}, r"down_proj as \(K, N\) = \(128, 256\), the graph .*\(256, 128\)"),
        ({q: (128, 127)}, "an adapter of this very model"),
        ({q: (128, 128), v: (128, 32)}, "an adapter of this very model"),
    ):
        with pytest.raises(ValueError, match=says):
            adapters.add_inputs(model, modules)
    assert [node.name for node in model.graph] == before
    adapters.add_inputs(model, {q: (128, 128)})
    with pytest.raises(ValueError, match="takes adapters already"):
        adapters.add_inputs(model, {v: (128, 64)})


def test_adapters_of_two_models_are_told_apart(world: World, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", intermediate_size=384)
    folders = {"here": world.folders["every.linear"], "there": peft_folder(other, tmp_path / "peft", "mlp-rs")}
    with pytest.raises(ValueError, match=r"adapter there has .* \(384, 128\), another adapter as \(256, 128\), so"):
        adapters.wanted_modules({name: adapters.read_peft(folder) for name, folder in folders.items()})


def test_files_of_other_models_and_damaged_ones_are_named(world: World, tmp_path: Path) -> None:
    bundle = shutil.copytree(world.bundle, tmp_path / "b")
    files, other = bundle / "adapters", "model.layers.5.mlp.up_proj"
    slots = [Slot(other, 128, {other: 256}, "float32")]
    adapters.write_adapter(bundle, "stranger", {other: low_rank(k=128, n=256)}, slots)
    whole = (files / "qv.onnx_adapter").read_bytes()
    (files / "cut.onnx_adapter").write_bytes(whole[: len(whole) // 2])
    session = open_bundle(bundle)
    for use in (lambda name: session.logits(IDS, name), lambda name: next(session.generate(PROMPT, 2, adapter=name))):
        for name, says in (
            ("stranger", "adapter stranger does not fit .* it is of another model"),
            ("cut", r"cut\.onnx_adapter cannot be opened: .* it is damaged"),
        ):
            with pytest.raises(ValueError, match=says) as caught:
                use(name)
            assert "\n" not in str(caught.value)
    assert greedy(session, "qv") == greedy(open_bundle(world.bundle), "qv")
