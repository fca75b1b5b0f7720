"""What a damaged model differs in from the sound one: refused where no adapter can help, named where one can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from rlkit.recover.corpus import tokenizer_fingerprint
from rlkit.recover.model import quiet_transformers
from rlkit.recover.source import Source, SourceKind, read_shape
from rlkit.recover.weights import Weights

COMPUTING = ("rms_norm_eps", "hidden_act", "rope_parameters")  # of a config: what changes logits at the same shape
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Differences:
    """Linears whose matrices differ, the other tensors that do, and matrices that hold nothing but zeros."""

    linears: tuple[str, ...]
    others: tuple[str, ...]
    zeros: tuple[str, ...]


def need_same_shape(teacher: Source, degraded: Source) -> None:
    """Raise ValueError unless the two models have the same sizes; no weight is read."""
    sound, damaged = read_shape(teacher), read_shape(degraded)
    names = [field.name for field in fields(sound) if field.name != "max_context"]
    wrong = [name for name in names if getattr(sound, name) != getattr(damaged, name)]
    if wrong:
        pairs = ", ".join(
            f"{name} {getattr(damaged, name)} instead of {getattr(sound, name)}" for name in wrong[:SHOWN]
        )
        raise ValueError(
            f"{degraded.reference} is no damaged {teacher.reference}: {pairs}; name the model it came from"
        )


def need_same_use(model: Any, tokenizer: Any, degraded: Source) -> None:
    """Raise ValueError unless `degraded` reads text and computes as the sound model does."""
    from transformers import AutoConfig, AutoTokenizer

    extra: dict[str, Any] = {"gguf_file": degraded.gguf_file} if degraded.kind is SourceKind.GGUF else {}
    extra |= {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers():
        try:
            other = AutoTokenizer.from_pretrained(degraded.path, **extra)
            config = AutoConfig.from_pretrained(degraded.path, **extra)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{degraded.reference} has no readable tokenizer or config: {first}; copy them") from error
    if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
        why = f"{degraded.reference} has another tokenizer than the teacher, so their outputs cannot be compared"
        raise ValueError(f"{why}; copy the teacher's tokenizer files, or name the model it came from")
    for name in COMPUTING:
        found, sound = getattr(config, name, None), getattr(model.config, name, None)
        if found != sound:
            what = f"{degraded.reference}: {name} is {found} where the teacher has {sound}"
            raise ValueError(f"{what}; put it right in config.json first, as no adapter can")


def find(sound: Weights | Mapping[str, torch.Tensor], degraded: Source, weights: Weights) -> Differences:
    """Compare every tensor of `weights`, those of `degraded`, with the `sound` model's, one at a time.

    Raises ValueError, naming the tensors, if one is missing, of another shape, not finite, or nothing but zeros where
    no adapter reaches; and if nothing differs.
    """
    where = degraded.reference
    _refuse([name for name in sound if name not in weights], f"{where} lacks", "copy them from the teacher")
    unlike: dict[str, list[str]] = {"shape": [], "finite": [], "zero": [], "matrix": [], "other": []}
    for name in sound:
        kind = _compare(name, sound[name], weights[name])
        if kind is not None:
            unlike[kind].append(name)
    _refuse(unlike["shape"], f"{where} has another shape of", "name the model it came from")
    remedy = "copy them from the teacher, or set their bad values to zero"
    _refuse(unlike["finite"], f"{where}: NaN or infinity, which no adapter can undo, in", remedy)
    zeros = [name for name in unlike["zero"] if name.endswith("_proj.weight")]
    out_of_reach = [name for name in unlike["zero"] if name not in zeros]
    _refuse(out_of_reach, f"{where}: nothing but zeros, where no adapter reaches, in", "copy them from the teacher")
    changed = [name.removesuffix(".weight") for name in sound if name in unlike["matrix"] or name in zeros]
    if not changed and not unlike["other"]:
        raise ValueError(f"{where} holds the teacher's own weights, so there is nothing to recover")
    return Differences(tuple(changed), tuple(unlike["other"]), tuple(name.removesuffix(".weight") for name in zeros))


def _compare(name: str, sound: torch.Tensor, found: torch.Tensor) -> str | None:
    """What is to be said of a tensor beside the teacher's; None if it is the same."""
    if found.shape != sound.shape:
        return "shape"
    if not bool(torch.isfinite(found).all()):
        return "finite"
    if torch.equal(found.float(), sound.to(found.dtype).float()):
        return None
    if not bool(found.any()):
        return "zero"
    return "matrix" if name.endswith("_proj.weight") else "other"


def _refuse(names: Iterable[str], what: str, remedy: str) -> None:
    found = list(names)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"{what} {', '.join(found[:SHOWN])}{more}; {remedy}")
