"""How much memory recovery needs: the peak of a whole run against the size of the model in bfloat16.

    python -m rlkit.apps.benchmarks.memory -o ./bench-memory

The model has Qwen3-0.6B's shape and random weights, so that nothing has to be downloaded but a tokenizer. Each method
runs in a process of its own, whose high-water mark is what counts; every layer's mark is in the checkpoint's log.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.recover import source
from rlkit.recover.atomic import write_json

ALLOWANCE = 2 * 2**30  # bytes above the bfloat16 model that a run may take


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the model and results.")] = Path("bench-memory"),
    methods: Annotated[str, typer.Option(help="Which methods, with commas between.")] = "full",
    recipe: Annotated[str, typer.Option(help="The recipe.")] = "w4w2-gateup",
    sequences: Annotated[int, typer.Option(help="Texts of 128 tokens to sample.")] = 32,
    steps: Annotated[int, typer.Option(help="Distillation steps.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Recover a random model of Qwen3-0.6B's shape and print the peak memory."""
    from rlkit.recover.model import load_model
    from rlkit.recover.standin import QWEN3_06B, write_random

    folder = out / "model"
    if not folder.is_dir():
        _model, tokenizer = load_model(source.resolve("smollm2-135m", download=True))
        write_random(QWEN3_06B, tokenizer, folder)
    rows = [_measured(method, recipe, folder, out, sequences, steps) for method in methods.split(",")]
    found = {"schema_version": 1, "model_nbytes": 2 * QWEN3_06B.parameters, "allowance_nbytes": ALLOWANCE, "runs": rows}
    write_json(out / "memory.json", found)
    if json:
        console.emit_json(found)
        return
    limit = 2 * QWEN3_06B.parameters + ALLOWANCE
    cells = [(row["method"], *(console.nbytes_text(row[key]) for key in ("layers", "peak"))) for row in rows]
    console.table(("method", "after the last layer", "peak"), cells, title=f"limit {console.nbytes_text(limit)}")


def _measured(method: str, recipe: str, folder: Path, out: Path, sequences: int, steps: int) -> dict[str, Any]:
    made = out / f"checkpoint-{method}"
    words = ["recover", str(folder), "-o", str(made), "--method", method, "--recipe", recipe, "--force"]
    words += ["--sequences", str(sequences), "--length", "128", "--steps", str(steps)]
    subprocess.run([sys.executable, "-m", "rlkit.apps.cli", *words], check=True, stdout=subprocess.DEVNULL)
    facts = source.read_json(made / "recovery.json")
    return {"method": method, "layers": facts["layers"][-1]["peak_nbytes"], "peak": facts["peak_nbytes"]}


if __name__ == "__main__":
    typer.run(main)
