"""Recovery of a float model that something other than quantization has damaged (Recover-LoRA, 2510.08600).

    synthesize   sequences sampled from the sound model, the teacher, with what it thought of them
    layers       the teacher's moments, layer by layer, and the best low-rank correction of W_teacher - W_degraded
    degraded     the damaged model, measured: from here on it is the one in memory
    corrected    with those corrections
    distilled    adapters (and norms, if everything is merged) trained towards the teacher's distributions

Only matrices that differ from the teacher's get adapters. The outcome is the damaged model with everything folded into
its weights, in its own number format, or an adapter in PEFT's format, to be put beside it. The damaged model's tensors
are read one at a time; of whole models, only one is in memory.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlkit.recover import adapter, differences, placement, record, recovery
from rlkit.recover.architectures import check_recoverable
from rlkit.recover.atomic import fresh_folder, need_space, refuse_existing, write_json
from rlkit.recover.checkpoint import SCHEMA_VERSION
from rlkit.recover.corrupt import FILE as CORRUPTION
from rlkit.recover.mend import Bench
from rlkit.recover.model import linears, load_model, logits_fn
from rlkit.recover.placement import Placement
from rlkit.recover.progress import Tell, silent
from rlkit.recover.recovery import Against, Settings
from rlkit.recover.source import Source, SourceKind, read_json, read_shape
from rlkit.recover.stages import Stages, corpus_measure
from rlkit.recover.team import Team
from rlkit.recover.weights import Weights, identity, need_float, rewrite

METHODS = ("recover-lora", "corrected", "full")
PLACEMENT: tuple[Placement, ...] = placement.parse("all:32")


def repair(  # noqa: PLR0913, a job and where its parts lie
    teacher: Source,
    degraded: Source,
    out: Path,
    *,
    settings: Settings | None = None,
    merge: bool = False,
    against: Against | None = None,
    corpus: Path | None = None,
    team: Team | None = None,
    force: bool = False,
    tell: Tell = silent,
) -> Path:
    """Recover `degraded` towards `teacher`; make the folder `out` and return it.

    With `merge`, `out` is a Hugging Face folder like `degraded`; without, it holds `adapter/` for peft. Either way
    recovery.json says what was done. `against` and `corpus` are as in `recovery.recover`; an interrupted run continues.

    Raises ValueError for models that are not one another's, for damage no adapter can undo, and for settings that only
    quantization has; FileExistsError if `out` exists and not `force`.
    """
    settings, team = checked(settings or Settings()), team or Team()
    check_folders(teacher, degraded, out, force=force)
    check_recoverable(read_shape(teacher).architecture)
    model, tokenizer = load_model(teacher)
    differences.need_same_use(model, tokenizer, degraded)
    weights = Weights(degraded)
    sound = Weights(teacher) if teacher.kind is SourceKind.HF else model.state_dict()
    found = differences.find(sound, degraded, weights)
    ranks = chosen_ranks(model, found, settings)
    need_space(out, 4 * sum(parameter.numel() for parameter in model.parameters()))
    work, stamp = out.with_name(f".{out.name}.work"), record.stamp(teacher)
    began = time.perf_counter()
    if corpus is None:
        corpus = work / f"corpus-{record.key(stamp, asdict(settings.sampling))}"
        recovery.sample(model, tokenizer, settings.sampling, corpus, team, tell)
    text = recovery.open_text(corpus, tokenizer)
    seconds = time.perf_counter() - began
    asked = recovery.settings_json(settings), merge, against is not None
    place = work / record.key(stamp, record.stamp(degraded), text.corpus.facts, *asked)
    measure = against(logits_fn(model), tokenizer.encode) if against and team.main else None
    stages = Stages(measure or corpus_measure(text.corpus, text.held_out), place / "stages.json")
    if team.main and not stages.finished("synthesize"):
        stages.note("synthesize", seconds)
    bench = Bench(model, weights, ranks, text, settings, merge, place, stages, team, tell)
    low_ranks = bench.run()
    if team.main:
        said = record.facts(bench, recovery.settings_json(settings), on_text=against is not None)
        facts = {"source": record.source_facts(teacher, model), **_facts(bench, degraded, found), **said}
        with fresh_folder(out, force=force) as folder:
            if merge:
                rewrite(degraded, folder, bench.folded(low_ranks), tell)
            else:
                base = degraded.path if degraded.kind is SourceKind.HF else degraded.file
                adapter.save_adapters(folder / "adapter", low_ranks, str(base.resolve()))
            write_json(folder / "recovery.json", {"schema_version": SCHEMA_VERSION, **facts})
    team.wait()
    if team.main:
        shutil.rmtree(work, ignore_errors=True)
    return out


def checked(settings: Settings) -> Settings:
    """The settings with every gap filled; ValueError for what only quantization has."""
    method = settings.method or "full"
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not for float models; use one of {', '.join(METHODS)}")
    if settings.quantizer:
        raise ValueError(f"quantizer {settings.quantizer!r} has nothing to do in a float model; leave it out")
    if method == "recover-lora" and not settings.distillation.steps:
        raise ValueError("recover-lora with steps = 0 does nothing; use more steps, or the method corrected")
    return replace(settings, method=method, adapters=settings.adapters or PLACEMENT)


def check_folders(teacher: Source, degraded: Source, out: Path, *, force: bool) -> None:
    """All that can be said before a weight is read: kinds, shapes, and that neither model would be replaced."""
    refuse_existing(out, force=force)
    for source in (teacher, degraded):
        need_float(source)
        if out.exists() and out.resolve() == source.path.resolve():
            raise ValueError(f"{out} is one of the models themselves, which would be lost; choose another -o")
    differences.need_same_shape(teacher, degraded)


def chosen_ranks(model: Any, found: differences.Differences, settings: Settings) -> dict[str, int]:
    """The adapter's rank for every damaged matrix that the placements cover, at most what the matrix can have.

    Raises ValueError if they cover none.
    """
    modules = linears(model)
    ranks = placement.ranks(modules, settings.adapters)
    chosen = {name: min(rank, *modules[name].weight.shape) for name, rank in ranks.items() if name in found.linears}
    if not chosen:
        damaged = ", ".join([*found.linears, *found.others][:3])
        text = placement.to_text(settings.adapters)
        raise ValueError(f"adapters on {text} reach none of the damaged tensors, such as {damaged}; place them there")
    return chosen


def load_repaired(folder: Path, degraded: Source) -> tuple[Any, Any]:
    """The float32 model that an unmerged `folder` and the damaged model it was made for are together; its tokenizer.

    Raises ValueError if the folder holds no adapter, or one for another model.
    """
    low_ranks = adapter.load_adapters(folder / "adapter")
    if not low_ranks:
        raise ValueError(f"{folder} holds no adapter; it is merged already, or not made by `rlkit recover --degraded`")
    base = read_json(folder / "recovery.json").get("degraded") or {}
    model, tokenizer = load_model(degraded)
    modules = linears(model)
    for name, low_rank in low_ranks.items():
        size = (low_rank.b.shape[0], low_rank.a.shape[1])
        if name not in modules or tuple(modules[name].weight.shape) != size:
            found = tuple(modules[name].weight.shape) if name in modules else "no such matrix"
            what = f"{folder / 'adapter'} is for another model: {name} is {size} there, and here {found}"
            raise ValueError(f"{what}; name {base.get('reference', 'the one it was made for')}")
    if base.get("identity") != identity(degraded):
        what = f"{folder / 'adapter'} was made for {base.get('reference')}, and {degraded.reference} has other weights"
        raise ValueError(f"{what}; name the model it was made for, or recover this one")
    with torch.no_grad():
        for name, low_rank in low_ranks.items():
            modules[name].weight += low_rank.product()
    return model, tokenizer


def _facts(bench: Bench, degraded: Source, found: differences.Differences) -> dict[str, Any]:
    """What recovery.json says of the damage and of what was made."""
    corruption = degraded.path / CORRUPTION
    return {
        "degraded": {
            "reference": degraded.reference,
            "kind": str(degraded.kind),
            "identity": identity(degraded),
            "corruption": read_json(corruption).get("damage") if corruption.is_file() else None,
            "different": len(found.linears) + len(found.others),
            "out_of_reach": [*found.others, *(name for name in found.linears if name not in bench.ranks)],
            "all_zero": list(found.zeros),
        },
        "merged": bench.merge,
    }
