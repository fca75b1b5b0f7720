"""The layers of the sweep are the model's, and their moments are what a direct computation gives."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from rlkit.recover.model import autocast, fast_dtype, linears, load_model
from rlkit.recover.progress import Progress
from rlkit.recover.source import resolve
from rlkit.recover.sweep import LARGEST_OUTPUT, LayerMoments, Rows, sweep
from rlkit.recover.synthesize import draw

LOOSE = 0.03 if fast_dtype() is torch.bfloat16 else 1e-4  # of a moment's largest entry
IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (11, 12))  # more than one batch of 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.15)))[0]


@dataclass(frozen=True)
class Found:
    """The moments of all layers by full name, and the layers."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    layers: list[LayerMoments]


def collect(
    model: Any,
    ids: np.ndarray,
    names: list[str],
    scratch: Path,
    *,
    output_rows: int = 64,
    seed: int = 0,
) -> Found:
    layers = list(sweep(model, Rows(ids, output_rows, seed), names, scratch))
    inputs = {layer.full(name): moment for layer in layers for name, moment in layer.inputs.items()}
    outputs = {layer.full(name): moment for layer in layers for name, moment in layer.outputs.items()}
    return Found(inputs, outputs, layers)


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float = LOOSE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def test_inputs_are_the_second_moments_of_what_each_linear_sees(model: Any, tmp_path: Path) -> None:
    found = collect(model, IDS, [], tmp_path)
    seen: dict[str, torch.Tensor] = {}
    modules = linears(model)
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(IDS), use_cache=False)
    for handle in handles:
        handle.remove()
    assert found.inputs.keys() == modules.keys()
    assert found.outputs == {}
    for name, x in seen.items():
        assert_near(found.inputs[name], x.T @ x / len(x))


def output_gradients(model: Any, names: list[str], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Autograd's own gradients (rows, T, N) of the summed -log p(label) with respect to the outputs of `names`."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs[name] = output.detach().requires_grad_() if not output.requires_grad else output
            outputs[name].retain_grad()
            return outputs[name]

        return hook

    handles = [linears(model)[name].register_forward_hook(keep(name)) for name in names]
    with autocast():
        logits = model(input_ids=torch.from_numpy(IDS), use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    gradients = {}
    for name, output in outputs.items():
        assert output.grad is not None
        gradients[name] = output.grad.float()
    return gradients


def drawn_labels(model: Any, seed: int) -> torch.Tensor:
    """The labels that `collect` draws, from the same generator, batches of 8."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for part in torch.from_numpy(IDS).split(8):
        with torch.no_grad(), autocast():
            logits = model(input_ids=part, use_cache=False).logits.float()
        batches.append(draw(torch.softmax(logits.flatten(0, 1), dim=-1), rng).view(part.shape))
    return torch.cat(batches)


def test_outputs_are_the_second_moments_of_autograds_gradients(model: Any, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    found = collect(model, IDS, names, tmp_path, seed=5)
    gradients = output_gradients(model, names, drawn_labels(model, 5))
    assert found.outputs.keys() == set(names)
    for name, gradient in gradients.items():
        n = gradient.shape[-1]
        moment = torch.zeros(n, n)
        for row in gradient:
            for token in row:
                moment += torch.outer(token, token)
        moment /= IDS.size
        assert_near(found.outputs[name], moment)


def test_outputs_approach_the_expectation_over_labels(model: Any, tmp_path: Path) -> None:
    """Many draws over one sequence against the exact mean over all labels, sum_v p(v) g_v g_v^T."""
    name, row, length = "model.layers.1.mlp.down_proj", IDS[:1, :4], 4
    n = linears(model)[name].out_features
    gradients: list[torch.Tensor] = []  # (V, T, N) of each position: row v of the batch asks for token v

    def follow(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.detach().requires_grad_()
        output.register_hook(gradients.append)
        return output

    handle = linears(model)[name].register_forward_hook(follow)
    expected = torch.zeros(n, n)
    for position in range(length):
        logits = model(input_ids=torch.from_numpy(row.repeat(tiny.VOCAB, axis=0)), use_cache=False).logits[:, position]
        log_p = torch.log_softmax(logits, dim=-1)
        (-log_p.diagonal().sum()).backward()
        p = log_p[0].detach().exp()
        expected += sum((g.T @ (p[:, None] * g) for g in gradients.pop().unbind(1)), torch.zeros(n, n)) / length
    handle.remove()
    found = collect(model, row.repeat(1000, axis=0), [name], tmp_path, output_rows=1000).outputs[name]
    assert float((found - expected).norm() / expected.norm()) < 0.15
    assert float(found.trace() / expected.trace()) == pytest.approx(1, abs=0.05)


def test_linears_with_one_input_share_one_tensor(model: Any, tmp_path: Path) -> None:
    inputs = collect(model, IDS[:2], [], tmp_path).inputs
    groups = defaultdict(set)
    for name, moment in inputs.items():
        groups[id(moment)].add(name.replace("model.layers.", ""))
    expected = [{f"{i}.self_attn.{part}_proj" for part in "qkv"} for i in (0, 1)]
    expected += [{f"{i}.mlp.{part}_proj" for part in ("gate", "up")} for i in (0, 1)]
    expected += [{f"{i}.{part}"} for i in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")] + [{"lm_head"}]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))


def test_of_large_outputs_the_diagonal_is_kept(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf", intermediate_size=LARGEST_OUTPUT + 32, num_hidden_layers=1)
    wide = load_model(resolve(folder))[0]
    name = "model.layers.0.mlp.up_proj"
    found = collect(wide, IDS, [name], tmp_path, seed=2).outputs[name]
    gradient = output_gradients(wide, [name], drawn_labels(wide, 2))[name].flatten(0, 1)
    assert found.shape == (LARGEST_OUTPUT + 32,)
    assert_near(found, gradient.square().mean(0))


@pytest.mark.parametrize("rows", [3, 8, 10, 99])
def test_output_moments_may_come_from_the_first_rows_alone(model: Any, rows: int, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj"
    found = collect(model, IDS, [name], tmp_path / "all", output_rows=rows)
    few = collect(model, IDS[:rows], [name], tmp_path / "few")
    assert_near(found.outputs[name], few.outputs[name], 2e-3)
    for key, moment in collect(model, IDS, [], tmp_path).inputs.items():
        assert_near(found.inputs[key], moment)


def test_same_seed_same_moments_and_nothing_left_behind(model: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first, again = (collect(model, IDS, [name], tmp_path / part, seed=1) for part in "ab")
    other = collect(model, IDS, [name], tmp_path / "c", seed=2)
    assert torch.equal(first.outputs[name], again.outputs[name])
    assert not torch.equal(first.outputs[name], other.outputs[name])
    assert torch.equal(first.inputs[name], other.inputs[name])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not list(tmp_path.rglob("hidden-*"))


ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (transformers.Qwen3Config, {}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_in_turn_are_the_model(architecture: str, tmp_path: Path) -> None:
    config, changes = ARCHITECTURES[architecture]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    shape = config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=tiny.VOCAB, **changes)
    other = transformers.AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    seen: list[torch.Tensor] = []
    handle = other.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad(), autocast():
        other(input_ids=torch.from_numpy(IDS), use_cache=False)
    handle.remove()
    found = collect(other, IDS, ["model.layers.1.mlp.up_proj"], tmp_path)
    assert_near(found.inputs["lm_head"], seen[0].float().T @ seen[0].float() / IDS.size)
    assert [layer.prefix for layer in found.layers] == ["model.layers.0", "model.layers.1", ""]
    assert list(found.outputs) == ["model.layers.1.mlp.up_proj"]


def test_layers_are_copies_in_float32(model: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    for layer in sweep(half, Rows(IDS), [], tmp_path):
        for name, parameter in layer.layer.named_parameters() if layer.prefix else ():
            assert parameter.dtype == torch.float32
            parameter.data.zero_()
            assert half.get_parameter(layer.full(name)).any()


def test_layers_that_are_done_are_passed_through(model: Any, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    whole = collect(model, IDS, names, tmp_path)
    told: list[Progress] = []
    rest = list(sweep(model, Rows(IDS), names, tmp_path, done={"model.layers.0"}, tell=told.append))
    assert [layer.prefix for layer in rest] == ["model.layers.1", ""]
    assert torch.equal(rest[0].inputs["mlp.up_proj"], whole.inputs[names[1]])
    assert torch.equal(rest[0].outputs["mlp.up_proj"], whole.outputs[names[1]])
    assert told == [], "the output moments of the first sweep are used again"
    again: list[Progress] = []
    list(sweep(model, Rows(IDS + 1), names, tmp_path, tell=again.append))
    assert again, "those of other rows are not"
