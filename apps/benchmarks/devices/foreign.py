"""Another environment's runtime: its interpreter, what it has, and processes in it that run bundles."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.apps.benchmarks import webgpu_parity
from rlkit.apps.benchmarks.devices.common import Absent, Asked
from rlkit.runtime import elsewhere

SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Foreign:
    """An interpreter with a runtime that cannot be installed beside ours; `variables` are added to its environment."""

    python: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def command(self, engine: str, provider: str, bundle: Path, threads: int | None) -> list[str]:
        """The command line of a process that runs a bundle there."""
        return [str(self.python), "-I", elsewhere.__file__, engine, provider, str(threads or 0), str(bundle.absolute())]

    def facts(self) -> dict[str, Any]:
        """Versions and providers; Absent where the interpreter cannot say."""
        words = [str(self.python), "-I", elsewhere.__file__, "facts"]
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "timeout": SECONDS}
        try:
            done = subprocess.run(words, capture_output=True, check=False, env={**os.environ, **self.variables}, **how)
            found: dict[str, Any] = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise Absent(f"{self.python} does not run: {' '.join(str(error).split())}") from error
        return found

    def versions(self) -> dict[str, str]:
        """Versions of the runtimes there."""
        found: dict[str, str] = self.facts()["versions"]
        return found

    def having(self, provider: str) -> dict[str, str]:
        """Versions of the runtimes there; Absent where the provider is not among theirs."""
        found = self.facts()
        if provider not in found["providers"]:
            have = ", ".join(found["providers"]) or found.get("error") or "none"
            raise Absent(f"the onnxruntime of {self.python} has no {provider}; it has {have}")
        return dict(found["versions"])


def having(asked: Asked, runtime: str, provider: str, variables: Mapping[str, str]) -> tuple[Foreign, dict[str, str]]:
    """The given environment, else one made beside the result, and its versions; Absent where it cannot be had.

    A dry run makes none.
    """
    if asked.python is not None:
        found = Foreign(asked.python.absolute(), variables)
        return found, found.having(provider)
    folder = asked.output.with_name(f"{asked.output.stem}-env")
    if asked.dry_run and not folder.is_dir():
        return Foreign(folder, variables), {}
    try:
        found = Foreign(webgpu_parity.environment(folder, runtime).absolute(), variables)
    except webgpu_parity.Unavailable as why:
        raise Absent(f"{why}; give an interpreter that has it with --python") from why
    return found, found.having(provider)
