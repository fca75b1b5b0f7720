"""Recipes: which tensor gets how many bits. TOML in, TOML out; the first rule that matches a module wins.

    schema_version = 1
    name = "w4w2-gateup"
    method = "full"                        # how accuracy is recovered, unless told otherwise; may be left out
    quantizer = "gptq"                     # how codes are chosen, unless told otherwise; may be left out
    [[rule]]
    match = ["*.gate_proj", "*.up_proj"]   # shell patterns over module names
    bits = 2
    group = 64                             # weights that share a scale, along the input dimension
    symmetric = false                      # false: integer zero point per group
    adapter_rank = 32                      # low-rank correction kept beside the quantized weight; 0 = none

A module that no rule matches, or whose rule says bits = 16, stays as it is; with a rank of its own it is trained too
and the result folded into its weight.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SCHEMA_VERSION = 1
BITS = (2, 4, 8, 16)
GROUPS = (32, 64, 128)
NAMED = ("w4", "w4w2-gateup", "w8")
METHODS = ("none", "recover-lora", "scales", "corrected", "full")  # what they are: methods.py
QUANTIZERS = ("nearest", "search", "hqq", "gptq", "gptq-act-order", "awq")  # what they are: quantizers.py


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix (N, K) is stored: code width, weights per scale along K, zero point or not."""

    bits: int
    group: int
    symmetric: bool = False
    adapter_rank: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits = {self.bits} is not offered; use one of {BITS}")
        if self.group not in GROUPS:
            raise ValueError(f"group = {self.group} has no fast 2-bit kernel; use one of {GROUPS}")
        if not 0 <= self.adapter_rank <= 1024:
            raise ValueError(f"adapter_rank = {self.adapter_rank} is outside 0..1024")

    def resolve(self, k: int) -> Scheme:
        """This scheme for a matrix with input size `k`: the largest group of 32/64/128, at most ours, dividing k."""
        for group in sorted(GROUPS, reverse=True):
            if group <= self.group and k % group == 0:
                return Scheme(self.bits, group, self.symmetric, self.adapter_rank)
        raise ValueError(f"input size {k} is not a multiple of 32, so no group of {GROUPS} fits; leave it at bits = 16")

    def nbytes(self, n: int, k: int, scale_bytes: int = 4) -> int:
        """Stored bytes of an (n, k) matrix: packed codes, one scale per group, packed zero points; no adapter."""
        if self.bits == 16:
            return 2 * n * k
        groups = -(-k // self.group)
        return n * (-(-k * self.bits // 8) + scale_bytes * groups + -(-groups * self.bits // 8))


@dataclass(frozen=True, slots=True)
class Rule:
    """Patterns of module names and the scheme they get."""

    match: tuple[str, ...]
    scheme: Scheme

    def matches(self, module: str) -> bool:
        """Whether one of the patterns covers `module` (case matters)."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.match)


@dataclass(frozen=True, slots=True)
class Recipe:
    """An ordered list of rules with a name; an empty method or quantizer leaves the choice to the caller."""

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    method: str = ""
    quantizer: str = ""

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of the first matching rule; None if none matches or it says 16 bits."""
        for rule in self.rules:
            if rule.matches(module):
                return None if rule.scheme.bits == 16 else rule.scheme
        return None

    def rank_for(self, module: str) -> int:
        """The adapter rank of the first matching rule; 0 if none matches."""
        return next((rule.scheme.adapter_rank for rule in self.rules if rule.matches(module)), 0)

    def to_toml(self) -> str:
        """This recipe as TOML that `parse` reads back to an equal value."""
        lines = [f"schema_version = {SCHEMA_VERSION}", f"name = {_quoted(self.name)}"]
        lines.append(f"description = {_quoted(self.description)}")
        chosen = {"method": self.method, "quantizer": self.quantizer}
        lines += [f"{key} = {_quoted(value)}" for key, value in chosen.items() if value]
        for rule in self.rules:
            scheme = rule.scheme
            patterns = ", ".join(_quoted(pattern) for pattern in rule.match)
            lines += ["", "[[rule]]", f"match = [{patterns}]", f"bits = {scheme.bits}", f"group = {scheme.group}"]
            lines += [f"symmetric = {str(scheme.symmetric).lower()}", f"adapter_rank = {scheme.adapter_rank}"]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The same content as plain JSON values, for manifests."""
        return tomllib.loads(self.to_toml())


def load(name_or_path: str | Path) -> Recipe:
    """Read a named recipe of the package or a TOML file.

    Raises ValueError naming the file, the line and the remedy if it is not a valid recipe; FileNotFoundError if there
    is neither a named recipe nor a file.
    """
    name = str(name_or_path)
    path = Path(__file__).with_name(f"recipe-{name}.toml") if name in NAMED else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {name!r}: named ones are {', '.join(NAMED)}; or give a TOML file's path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no recipe; start from `rlkit recover --help`") from error
    return parse(text, where=name if name in NAMED else str(path))


def parse(text: str, *, where: str = "recipe") -> Recipe:
    """Parse recipe TOML; errors name `where` and the line at fault."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not valid TOML: {error}") from error
    reader = _Reader(text, where)
    reader.known(table, {"schema_version", "name", "description", "method", "quantizer", "rule"}, section=0)
    if table.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        reader.fail("schema_version", 0, f"this rlkit reads version {SCHEMA_VERSION}")
    rules = table.get("rule", [])
    if not (isinstance(rules, list) and rules and all(isinstance(rule, dict) for rule in rules)):
        reader.fail("rule", 0, "a recipe needs at least one [[rule]]")
    words = {"name": Path(where).stem, "description": "", "method": "", "quantizer": ""}
    words = {key: table.get(key, default) for key, default in words.items()}
    for key, value in words.items():
        if not isinstance(value, str):
            reader.fail(key, 0, f"{key} is a string, not {value!r}")
    for key, known in {"method": METHODS, "quantizer": QUANTIZERS}.items():
        if words[key] and words[key] not in known:
            reader.fail(key, 0, f"{key} {words[key]!r} is not known; there are {', '.join(known)}")
    return Recipe(rules=tuple(_rule(reader, rule, i + 1) for i, rule in enumerate(rules)), **words)


_TYPES: dict[str, type] = {"bits": int, "group": int, "symmetric": bool, "adapter_rank": int}


def _rule(reader: _Reader, table: dict[str, Any], section: int) -> Rule:
    reader.known(table, {"match", *_TYPES}, section=section)
    match = table.get("match", "*")
    patterns = [match] if isinstance(match, str) else match
    if not (isinstance(patterns, list) and patterns and all(isinstance(p, str) and p for p in patterns)):
        reader.fail("match", section, 'match is a pattern like "*.gate_proj" or a list of them')
    if "bits" not in table:
        reader.fail("[[rule]]", section, f"each rule needs bits = one of {BITS}")
    for key, kind in _TYPES.items():
        if key in table and type(table[key]) is not kind:
            reader.fail(key, section, f"{key} must be {kind.__name__}, not {table[key]!r}")
    fields = {"group": 32, **{key: table[key] for key in _TYPES if key in table}}
    try:
        return Rule(tuple(patterns), Scheme(**fields))
    except ValueError as error:
        reader.fail(str(error).split(" ", 1)[0], section, str(error))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Finds the line of a key, since the TOML parser keeps no positions: section 0 is the head, i the i-th [[rule]]."""

    text: str
    where: str

    def line(self, key: str, section: int) -> int:
        current, heading = 0, 1
        for number, line in enumerate(self.text.split("\n"), start=1):
            if re.match(r"\s*\[\[\s*rule\s*\]\]", line):
                current += 1
                heading = number if current == section else heading
            elif current == section and re.match(rf"\s*\[?\[?\s*[\"']?{re.escape(key)}[\"']?\s*(=|\.|\])", line):
                return number
        return heading

    def known(self, table: dict[str, Any], keys: set[str], *, section: int) -> None:
        for key in table:
            if key not in keys:
                self.fail(key, section, f"unknown key {key!r}; known here: {', '.join(sorted(keys))}")

    def fail(self, key: str, section: int, why: str) -> NoReturn:
        raise ValueError(f"{self.where}, line {self.line(key, section)}: {why}")


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are TOML's, but for DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
