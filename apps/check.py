"""The command `lint`: would every node of an ONNX model run fast where it shall run?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlkit.apps import console
from rlkit.apps.errors import ExitCode
from rlkit.export import targets

if TYPE_CHECKING:
    from rlkit.export.lint import Finding, Linted


def lint(
    model: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE|FILE", help="A bundle folder, or anybody's .onnx file.", show_default=False),
    ],
    target: Annotated[
        str, typer.Option(help=f"Where it shall run: {', '.join(targets.DEVICES)}; a bundle's own unless told.")
    ] = "",
    provider: Annotated[str, typer.Option(help="With --target igpu: webgpu or dml.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
) -> None:
    """Find the nodes that would run slowly, or not at all, without the runtime saying so; exit code 1 if there are any.

    Weights are not read, so it takes seconds whatever the size.

    Example: rlkit lint ./bundle --target igpu --provider dml
    """
    from rlkit.export.lint import lint_path

    where = targets.target_named(target or "igpu", provider or None) if target or provider else None
    linted = lint_path(model, where)
    if json:
        console.emit_json({"schema_version": 1, "path": str(model), **linted.to_json()})
    else:
        _show(linted)
    if linted.findings:
        raise typer.Exit(ExitCode.FAILED)


def _show(linted: Linted) -> None:
    kinds: dict[tuple[str, ...], list[Finding]] = {}
    for finding in linted.findings:
        kinds.setdefault((finding.severity, finding.op, finding.reason, finding.fix), []).append(finding)
    for (severity, op, reason, fix), found in kinds.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        console.emit(f"{severity}: {found[0].node}{more} ({op})")
        console.emit(f"    {reason}")
        console.emit(f"    fix: {fix}")
    for note in linted.notes:
        console.say(f"note: {note}")
    checked = f"{linted.nodes} nodes of {', '.join(linted.files)} checked for {linted.target.name}"
    console.emit(f"{checked}: {len(linted.findings) or 'no'} finding{'s' * (len(linted.findings) != 1)}")
