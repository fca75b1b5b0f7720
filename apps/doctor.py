"""The command `doctor`: what this machine can run, what is missing, and the command that changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console
from rlkit.apps.errors import ExitCode
from rlkit.runtime.doctor import Diagnosis, examine
from rlkit.runtime.findings import Finding, Level

MARKS = {Level.OK: "ok", Level.NOTE: "-", Level.WARNING: "WARN", Level.ERROR: "FAIL"}


def doctor(
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="BUNDLE", help="Also say whether this bundle can run here.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Look at processor, memory, packages, and every execution provider and device that ONNX Runtime sees.

    Nothing is installed, downloaded or changed. Exit code 0, unless something keeps rlkit from running a model (or the
    bundle): then 1; with --strict also for warnings.

    Example: rlkit doctor --bundle ./bundle
    """
    found = examine(bundle)
    if json:
        console.emit_json(found.to_json())
    else:
        _show(found)
    if found.level is Level.ERROR or (strict and found.level is Level.WARNING):
        raise typer.Exit(ExitCode.FAILED)


def _show(found: Diagnosis) -> None:
    area = ""
    for finding in found.findings:
        if finding.area != area:
            area = finding.area
            console.emit(area)
        for line in lines(finding):
            console.emit(line)
    console.emit("devices")
    for device in found.devices:
        memory = "" if device.memory_nbytes is None else f", {console.nbytes_text(device.memory_nbytes)}"
        console.emit(f"  --device {device.name:10} {device.kind}: {device.title or device.vendor}{memory}")
    bad = [finding for finding in found.findings if finding.level in (Level.WARNING, Level.ERROR)]
    console.emit(summary(bad))


def lines(finding: Finding) -> list[str]:
    """A finding for a person: its mark, name and text, and the fix below."""
    made = [f"  {MARKS[finding.level]:4} {finding.name}: {finding.text}"]
    return made if finding.fix is None else [*made, f"       > {finding.fix}"]


def summary(bad: list[Finding]) -> str:
    """The last line."""
    errors = sum(finding.level is Level.ERROR for finding in bad)
    if errors:
        return f"{errors} of {len(bad)} findings keep rlkit from running"
    many = f"; {len(bad)} warning{'s' * (len(bad) > 1)}" if bad else ""
    return f"rlkit can run here{many}"
