"""Grammars for the runtime's guidance: how a schema's JSON is spaced, and what to say of one that is none."""

from __future__ import annotations

import json

from rlkit.runtime.request import Grammar, Guidance

# Spaces where Python's json puts them and nowhere else: free to choose, small models write line breaks without end.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_text(guidance: Guidance) -> str:
    """What the runtime is given: the text, and the spacing of a JSON schema that says nothing of it (x-guidance)."""
    if guidance.kind is not Grammar.JSON_SCHEMA:
        return guidance.text
    try:
        schema = json.loads(guidance.text)
    except (ValueError, RecursionError):
        return guidance.text  # the runtime says what is wrong
    if not isinstance(schema, dict) or "x-guidance" in schema:
        return guidance.text
    return json.dumps({**schema, "x-guidance": SPACING})


def refused(guidance: Guidance, error: Exception) -> ValueError:
    """What to say of a grammar that the runtime does not take."""
    said = str(error).removeprefix("Error creating grammar: ").split("<state>")[0]  # what follows is for its authors
    why = " ".join(said.split())[:300]
    return ValueError(f"the {guidance.kind.value} cannot be followed: {why}; correct it")
