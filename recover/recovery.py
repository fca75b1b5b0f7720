"""The act of recovery, stage by stage: source model -> quantized, corrected, distilled -> checkpoint folder.

    synthesize      sequences sampled from the model itself
    statistics      second moments of inputs and output gradients, from one pass over some of them
    round-to-nearest  the floor, measured and thrown away
    compensated     codes chosen with error compensation
    corrected       low-rank corrections, alternated with compensation
    distilled       corrections and norms trained towards the original's logits

After each stage the caller's measure is asked for the divergence to the original model. Long work lies in
a folder beside the output until the checkpoint is complete, so that the same call continues after a kill.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover import adapter, layers
from rlkit.recover.atomic import fresh_folder, need_space, refuse_existing
from rlkit.recover.checkpoint import Recovered, write_checkpoint
from rlkit.recover.compensate import Compensation
from rlkit.recover.correct import LowRank
from rlkit.recover.distill import Distillation, distill
from rlkit.recover.model import fast_dtype, linears, load_model, logits_fn
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.quantize import Quantized
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.source import Source
from rlkit.recover.statistics import collect
from rlkit.recover.synthesize import Sampling, synthesize

Measure = Callable[[Any], dict[str, Any]]  # LogitsFn -> JSON object with at least "kl_mean"
Against = Callable[[Any, Callable[[str], list[int]]], Measure]  # the original's LogitsFn and tokenizer -> Measure
HELD_OUT_ROWS = 8
ATTENTION_INPUTS = (".q_proj", ".k_proj", ".v_proj")


@dataclass(frozen=True, slots=True)
class Settings:
    """How much of everything: sampled text, rows for input and output moments, alternation rounds, training steps."""

    sampling: Sampling = field(default_factory=Sampling)
    statistics_rows: int = 256
    output_rows: int = 64
    rounds: int = 4
    compensation: Compensation = field(default_factory=Compensation)
    distillation: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        if self.sampling.sequences <= HELD_OUT_ROWS:
            raise ValueError(
                f"sequences = {self.sampling.sequences} leaves none to learn from; use more than {HELD_OUT_ROWS}, "
                "which are held out"
            )
        if min(self.statistics_rows, self.output_rows) < 1 or self.rounds < 0:
            raise ValueError(
                f"statistics_rows = {self.statistics_rows} and output_rows = {self.output_rows} must be at least 1, "
                f"rounds = {self.rounds} at least 0"
            )


class _Stages:
    """The log of finished stages: name, wall seconds since the one before, divergence to the original."""

    def __init__(self, measure: Measure, since: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._measure, self._since = measure, since

    def finish(self, name: str, model: Any = None) -> None:
        """Close a stage; with a model, measure it (which counts as no stage's time)."""
        seconds = time.perf_counter() - self._since
        divergence = self._measure(logits_fn(model)) if model is not None else None
        self.rows.append({"stage": name, "seconds": round(seconds, 2), "divergence": divergence})
        gc.collect()  # models hold cycles: without this, copies that are done with stay for a while
        self._since = time.perf_counter()


def recover(  # noqa: PLR0913, a job and where its parts lie
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    settings: Settings | None = None,
    against: Against | None = None,
    samples: Path | None = None,
    force: bool = False,
    tell: Tell = silent,
) -> Path:
    """Make the checkpoint folder `out` and return it.

    `against` is called once with the original's LogitsFn and its tokenizer, and returns what measures every stage;
    without it the divergence is taken on synthetic sequences that nothing else uses. The sampled text is kept in
    `samples` for other calls, or goes with the rest of the work when this one is complete.

    Raises ValueError for a source or recipe that cannot be used, FileExistsError if `out` exists and not `force`.
    """
    settings = settings or Settings()
    refuse_existing(out, force=force)
    work = out.with_name(f".{out.name}.work")
    key = fingerprint(source, recipe, settings) + ("-text" if against else "")  # kept stages say what they measured
    model, tokenizer = load_model(source)
    schemes = resolved_schemes(model, recipe)
    need_space(out, 4 * sum(parameter.numel() for parameter in model.parameters()))  # the checkpoint and the work on it
    since = time.perf_counter()
    ids = _sample(model, tokenizer, settings.sampling, samples or work, fingerprint(source, None, settings), tell)
    seconds = time.perf_counter() - since
    train, held_out = ids[HELD_OUT_ROWS:], ids[:HELD_OUT_ROWS]
    measure = against(logits_fn(model), tokenizer.encode) if against else _synthetic_measure(model, held_out)
    stages = _Stages(measure, time.perf_counter() - seconds)
    stages.finish("synthesize")
    recovered = _recover(_Job(model, schemes, train, settings, stages, tell), work / key)
    facts = {
        "source": _source_facts(source, model),
        "settings": asdict(settings),
        "stages": stages.rows,
        "measured_on": "held-out text" if against else f"{HELD_OUT_ROWS} held-out synthetic sequences",
        "synthetic_tokens": int(ids.size),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
    with fresh_folder(out, force=force) as folder:
        write_checkpoint(folder, recovered, model, tokenizer, recipe, facts)
    shutil.rmtree(work, ignore_errors=True)
    return out


def fingerprint(source: Source, recipe: Recipe | None, settings: Settings) -> str:
    """A short key of everything that decides the result, so that kept work is only reused for the same job."""
    parts = [source.file] if source.file.is_file() else sorted(source.path.glob("*.safetensors"))
    files = [*parts, *source.path.glob("config.json")]
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    what = asdict(settings) if recipe else asdict(settings.sampling)
    text = json.dumps([stamp, recipe.to_toml() if recipe else "", what], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolved_schemes(model: Any, recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of every linear that the recipe quantizes, its group fitted to the matrix.

    Raises ValueError if q, k and v of a layer differ in bits or group, as export packs them into one matrix; or if
    lm_head is to have a correction, as the loss is taken right behind its frozen weight.
    """
    schemes = {}
    for name, module in linears(model).items():
        scheme = recipe.scheme_for(name)
        if scheme is not None:
            try:
                schemes[name] = scheme.resolve(module.in_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if not schemes:
        raise ValueError(
            f"recipe {recipe.name} matches no linear of this model; its patterns name modules like '*_proj'"
        )
    _check_schemes(schemes)
    return schemes


def _check_schemes(schemes: dict[str, Scheme]) -> None:
    if "lm_head" in schemes and schemes["lm_head"].adapter_rank:
        rank = schemes["lm_head"].adapter_rank
        raise ValueError(
            f"lm_head: adapter_rank = {rank} is not supported there; give lm_head a rule of its own with 0"
        )
    attentions = {name[: -len(".q_proj")] for name in schemes if name.endswith(ATTENTION_INPUTS)}
    for name in sorted(attentions):
        found = [schemes.get(f"{name}{part}") for part in ATTENTION_INPUTS]
        if len({(scheme.bits, scheme.group) if scheme else None for scheme in found}) > 1:
            raise ValueError(f"{name}: q_proj, k_proj and v_proj need the same bits and group; give them one rule")


def _sample(model: Any, tokenizer: Any, plan: Sampling, work: Path, key: str, tell: Tell) -> NDArray[np.int64]:
    sampler = copy.deepcopy(model).to(fast_dtype()) if fast_dtype() is not torch.float32 else model
    return synthesize(sampler, tokenizer, plan, shards=work / f"synthetic-{key}", tell=tell)


@dataclass(frozen=True, slots=True)
class _Job:
    """What every stage works on: the original, the scheme of each linear, the text to learn from, and whom to tell."""

    model: Any
    schemes: dict[str, Scheme]
    ids: NDArray[np.int64]
    settings: Settings
    stages: _Stages
    tell: Tell


def _recover(job: _Job, work: Path) -> Recovered:
    student = copy.deepcopy(job.model)
    kept = work / "corrected.safetensors"
    if kept.is_file():
        quantized, low_ranks, job.stages.rows[1:] = layers.load_state(kept, job.schemes)
        layers.install(student, {name: q.dequantize() for name, q in quantized.items()}, low_ranks)
    else:
        quantized, low_ranks = _quantize(job, student)
        layers.save_state(kept, quantized, low_ranks, job.stages.rows[1:])
    if low_ranks and job.settings.distillation.steps:
        weights = {name: quantized[name].dequantize() for name in low_ranks}
        layers.adapt(student, weights, low_ranks, fast_dtype())
        _distill(job, student, work / "distill.pt")
        low_ranks = {name: adapter.snap(_factors(student, name)) for name in low_ranks}
        layers.uninstall(student, weights, low_ranks)
        job.stages.finish("distilled", student)
    else:
        low_ranks = {name: adapter.snap(low_rank) for name, low_rank in low_ranks.items()}
    return Recovered(quantized, low_ranks, _other_tensors(student, quantized))


def _quantize(job: _Job, student: Any) -> tuple[dict[str, Quantized], dict[str, LowRank]]:
    """All that needs no gradient step; `student` wears the result, and the statistics are gone when it returns."""
    model, schemes, settings, stages, tell = job.model, job.schemes, job.settings, job.stages, job.tell
    adapted = [name for name, scheme in schemes.items() if scheme.adapter_rank]
    rows = job.ids[: settings.statistics_rows]
    statistics = collect(model, rows, adapted, output_rows=settings.output_rows, tell=tell)
    stages.finish("statistics")
    quantized = dict(layers.nearest(model, schemes, tell))
    layers.install(student, {name: q.dequantize() for name, q in quantized.items()}, {})
    stages.finish("round-to-nearest", student)
    quantized = dict(layers.compensated(model, schemes, statistics, settings.compensation, tell))
    layers.install(student, {name: q.dequantize() for name, q in quantized.items()}, {})
    stages.finish("compensated", student)
    low_ranks = {}
    if adapted:
        rounds, options = settings.rounds, settings.compensation
        for name, state, low_rank in layers.corrected(model, quantized, statistics, rounds, options, tell):
            quantized[name], low_ranks[name] = state, low_rank
        layers.install(student, {name: quantized[name].dequantize() for name in adapted}, low_ranks)
        stages.finish("corrected", student)
    return quantized, low_ranks


def _factors(student: Any, name: str) -> LowRank:
    module = student.get_submodule(name)
    assert isinstance(module, adapter.AdaptedLinear)
    return module.low_rank()


def _distill(job: _Job, student: Any, state: Path) -> None:
    plan = job.settings.distillation
    job.tell(Progress("distill", 0, plan.steps))
    for step in distill(job.model, student, job.ids, plan, state=state):
        job.tell(Progress("distill", step.index, plan.steps, f"KL {step.kl:.3f} on synthetic text"))


def _other_tensors(student: Any, quantized: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that is neither quantized nor an adapter; a float embedding in float16, the rest as it was."""
    tensors = {}
    for name, tensor in student.state_dict().items():
        module = name.rpartition(".")[0]
        tied = student.config.tie_word_embeddings and "lm_head" in quantized and module == "model.embed_tokens"
        if tied or (name.endswith(".weight") and module in quantized):
            continue
        if student.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        tensors[name] = tensor.half() if module == "model.embed_tokens" else tensor.clone()
    return tensors


def _synthetic_measure(model: Any, rows: NDArray[np.int64]) -> Measure:
    """Mean KL to `model` on held-out synthetic rows: what is said of a checkpoint when no text was given."""
    ids = torch.from_numpy(rows)
    with torch.no_grad():
        original = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)

    def measure(logits: Any) -> dict[str, Any]:
        other = torch.log_softmax(torch.from_numpy(logits(rows))[:, :-1], dim=-1)
        kl = (original.exp() * (original - other)).sum(-1)
        same = (original.argmax(-1) == other.argmax(-1)).float()
        return {"kl_mean": float(kl.mean()), "top1_agreement": float(same.mean()), "tokens": kl.numel()}

    return measure


def _source_facts(source: Source, model: Any) -> dict[str, Any]:
    return {
        "reference": source.reference,
        "kind": str(source.kind),
        "file": source.gguf_file or source.path.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reference_precision": "float32 dequantized from the GGUF's integers" if source.gguf_file else "as stored",
    }
