"""The act of recovery: source model -> a method's steps on a workbench -> checkpoint folder.

    synthesize         sequences sampled from the model itself, with what it thought of them (or a corpus made before)
    layers             moments, codes and corrections, layer by layer
    round-to-nearest   the floor, measured and thrown away
    compensated        the quantizer's codes (the stage is named after the quantizer where it is another one)
    corrected          with low-rank corrections, alternated with the codes
    distilled          adapters, scales and norms trained towards the original's distributions

After each stage from the floor on the caller's measure is asked for the divergence to the original model. Long work
lies in a folder beside the output until the checkpoint is complete, so that the same call continues after a kill.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.recover import methods, placement, quantizers, record
from rlkit.recover.allocate import Budget
from rlkit.recover.architectures import check_recoverable
from rlkit.recover.atomic import fresh_folder, need_space, refuse_existing, write_json
from rlkit.recover.candidates import Search, plan_units
from rlkit.recover.checkpoint import SCHEMA_VERSION, write_checkpoint
from rlkit.recover.corpus import Corpus
from rlkit.recover.distill import Distillation
from rlkit.recover.memory import peak_nbytes
from rlkit.recover.model import (
    FLOAT32_PARAMETERS,
    check_weights,
    drop_matrices,
    fast_dtype,
    linears,
    load_model,
    logits_fn,
)
from rlkit.recover.placement import Placement
from rlkit.recover.progress import Tell, silent
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.sensitivity import Auto, auto_recipe
from rlkit.recover.sensitivity import Work as SearchWork
from rlkit.recover.source import Source, read_shape
from rlkit.recover.stages import Measure, Stages, corpus_measure
from rlkit.recover.sweep import HEAD, Rows
from rlkit.recover.synthesize import Sampling, synthesize
from rlkit.recover.team import Team
from rlkit.recover.workbench import Amounts, Text, Workbench

Against = Callable[[Any, Callable[[str], list[int]]], Measure]  # the original's LogitsFn and tokenizer -> Measure
HELD_OUT_ROWS = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """How to recover. An empty method, quantizer or placement leaves it to the recipe, then to the default."""

    method: str = ""
    quantizer: str = ""
    adapters: tuple[Placement, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    amounts: Amounts = field(default_factory=Amounts)
    distillation: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        if self.sampling.sequences <= HELD_OUT_ROWS:
            raise ValueError(
                f"sequences = {self.sampling.sequences} leaves none to learn from; use more than {HELD_OUT_ROWS}, "
                "which are held out"
            )

    def under(self, recipe: Recipe) -> Settings:
        """These settings with every gap filled, the recipe's wishes first."""
        method = methods.find(self.method or recipe.method or "full")
        quantizer = quantizers.find(self.quantizer or recipe.quantizer or method.quantizer)
        return replace(self, method=method.name, quantizer=quantizer.name)


def recover(  # noqa: PLR0913, a job and where its parts lie
    source: Source,
    recipe: Recipe | Budget,
    out: Path,
    *,
    settings: Settings | None = None,
    against: Against | None = None,
    corpus: Path | None = None,
    team: Team | None = None,
    force: bool = False,
    tell: Tell = silent,
) -> Path:
    """Make the checkpoint folder `out` and return it; a Budget instead of a recipe has the recipe found first.

    `against` is called once with the original's LogitsFn and its tokenizer, and returns what measures every stage;
    without it the divergence is taken on rows of the corpus that nothing else uses. `corpus` is a folder that
    synthesize or score made; without one, text is sampled for this call alone.

    Raises ValueError for a source, recipe or corpus that cannot be used, FileExistsError if `out` exists and not
    `force`.
    """
    settings, team = settings or Settings(), team or Team()
    refuse_existing(out, force=force)
    work = out.with_name(f".{out.name}.work")
    check_recoverable(read_shape(source).architecture)
    model, tokenizer = load_model(source)
    check_weights(model, _quantized(model, recipe, settings))
    need_space(out, 4 * sum(parameter.numel() for parameter in model.parameters()))  # the checkpoint and the work on it
    began, stamp = time.perf_counter(), record.stamp(source)
    if corpus is None:
        corpus = work / record.key(stamp, asdict(settings.sampling))
        sample(model, tokenizer, settings.sampling, corpus, team, tell)
    text = open_text(corpus, tokenizer)
    seconds, found = time.perf_counter() - began, None
    if not isinstance(recipe, Recipe):
        found = _search(model, text, settings, recipe, work / record.key(stamp, text.corpus.facts), team, tell)
        recipe = found.recipe
    settings = settings.under(recipe)
    place = work / record.key(stamp, recipe.to_toml(), settings_json(settings), text.corpus.facts, against is not None)
    stages = Stages(_measure(model, tokenizer, text, against, team), place / "stages.json")
    if team.main and not stages.finished("synthesize"):
        stages.note("synthesize", seconds)
    schemes, ranks = _parts(model, recipe, settings)
    bench = Workbench(
        model=model,
        schemes=schemes,
        ranks=ranks,
        quantizer=quantizers.find(settings.quantizer),
        text=text,
        amounts=settings.amounts,
        distillation=fitting(settings.distillation, model),
        work=place,
        stages=stages,
        team=team,
        tell=tell,
    )
    methods.find(settings.method).run(bench)
    if team.main:
        said = record.facts(bench, settings_json(settings), on_text=against is not None)
        facts = {"source": record.source_facts(source, model), **said}
        if found is not None:
            facts["auto"] = {"rows": found.rows, "figures": found.figures}
        outcome = bench.outcome()
        drop_matrices(model)  # what is written is read from what was kept
        with fresh_folder(out, force=force) as folder:
            write_checkpoint(folder, outcome, model, tokenizer, recipe, facts)
            facts = {"schema_version": SCHEMA_VERSION, **facts, "peak_nbytes": peak_nbytes()}
            write_json(folder / "recovery.json", facts)  # once more, as writing takes memory too
    team.wait()  # the others must not read what is removed now
    if team.main:
        shutil.rmtree(work, ignore_errors=True)
    return out


def fitting(plan: Distillation, model: Any) -> Distillation:
    """Large models recompute their activations: those of a batch would take more memory than the model."""
    large = sum(parameter.numel() for parameter in model.parameters()) > FLOAT32_PARAMETERS
    return replace(plan, checkpointing=True) if large else plan


def _quantized(model: Any, recipe: Recipe | Budget, settings: Settings) -> Collection[str]:
    """The linears that will be quantized; ValueError for what cannot be done, told before any work."""
    if isinstance(recipe, Recipe):
        return _parts(model, recipe, settings)[0]
    units = plan_units(model, _candidates(settings))
    recipe.allowance(units)
    return [name for unit in units for name in unit.modules]


def _parts(model: Any, recipe: Recipe, settings: Settings) -> tuple[dict[str, Scheme], dict[str, int]]:
    """Schemes and ranks by module name."""
    return resolved_schemes(model, recipe), resolved_ranks(model, recipe, settings.under(recipe))


def _candidates(settings: Settings) -> Search:
    """What an automatic recipe may choose from."""
    adapters = methods.find(settings.method or "full").adapters
    return Search() if adapters else Search().without_adapters()


def _search(model: Any, text: Text, settings: Settings, budget: Budget, folder: Path, team: Team, tell: Tell) -> Auto:
    """The best recipe within a budget, measured on rows of the corpus; every process finds the same."""
    ids, amounts = text.corpus.ids, settings.amounts
    rows = Rows(ids[text.train[: amounts.statistics_rows]], amounts.output_rows)
    find = partial(auto_recipe, model, SearchWork(rows, ids[text.held_out], folder), budget, _candidates(settings))
    if team.main:
        found = find(tell=tell)
    team.wait()
    return found if team.main else find()  # from the folder, which takes seconds


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return asdict(settings) | {"adapters": placement.to_text(settings.adapters)}


def resolved_schemes(model: Any, recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of every linear that the recipe quantizes, its group fitted to the matrix, without its rank.

    Raises ValueError if no group fits, or if the recipe matches no linear.
    """
    schemes = {}
    for name, module in linears(model).items():
        scheme = recipe.scheme_for(name)
        if scheme is not None:
            try:
                schemes[name] = replace(scheme.resolve(module.in_features), adapter_rank=0)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if not schemes:
        raise ValueError(
            f"recipe {recipe.name} matches no linear of this model; its patterns name modules like '*_proj'"
        )
    return schemes


def resolved_ranks(model: Any, recipe: Recipe, settings: Settings) -> dict[str, int]:
    """The adapter rank of every linear that gets one: by the settings' placements, else by the recipe's rules.

    Raises ValueError if lm_head is to have one, as the loss is taken right behind its frozen weight.
    """
    if not methods.find(settings.method).adapters:
        return {}
    names = list(linears(model))
    if settings.adapters:
        return placement.ranks(names, settings.adapters)
    ranks = {name: rank for name in names if (rank := recipe.rank_for(name))}
    if HEAD in ranks:
        raise ValueError(
            f"{HEAD}: adapter_rank = {ranks[HEAD]} is not supported there; give {HEAD} a rule of its own with 0"
        )
    return ranks


def sample(model: Any, tokenizer: Any, sampling: Sampling, folder: Path, team: Team, tell: Tell) -> None:
    """A corpus of the model's own text, unless the folder holds it already."""
    if team.main and not folder.exists():
        fast = fast_dtype()
        sampler = model if model.dtype == fast else copy.deepcopy(model).to(fast)
        synthesize(sampler, tokenizer, sampling, folder, tell=tell)
    team.wait()


def open_text(folder: Path, tokenizer: Any) -> Text:
    """The corpus in `folder`, and which of its rows are for what."""
    corpus = Corpus.open(folder)
    corpus.check_tokenizer(tokenizer)
    rows = np.arange(len(corpus.ids))
    if len(rows) <= HELD_OUT_ROWS:
        raise ValueError(f"{folder} has {len(rows)} rows; more than {HELD_OUT_ROWS} are needed, which are held out")
    return Text(corpus, rows[HELD_OUT_ROWS:], rows[:HELD_OUT_ROWS])


def _measure(model: Any, tokenizer: Any, text: Text, against: Against | None, team: Team) -> Measure:
    if against is None or not team.main:
        return corpus_measure(text.corpus, text.held_out)
    return against(logits_fn(model), tokenizer.encode)
