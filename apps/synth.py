"""The command that makes text: `synthesize` (model -> corpus of sampled or given text with the model's distributions).

torch is imported only when there is work to do or a plan of it to show.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles import text
from rlkit.recover import assets, atomic, corpus, source
from rlkit.recover.progress import Progress, Tell


def synthesize(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A model: asset name, hub id, Hugging Face folder or .gguf file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make; it is complete or absent.")],
    sequences: Annotated[int, typer.Option(min=1, help="How many rows of text.")] = 384,
    length: Annotated[int, typer.Option(min=8, help="Tokens in each of them.")] = 128,
    temperature: Annotated[float, typer.Option(help="Below 1: likelier text; above 1: more varied text.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample only among that many likeliest tokens; 0: all.")] = 0,
    kept: Annotated[
        int, typer.Option(min=0, help="Log-probabilities to keep per position, which training learns from; 0: none.")
    ] = 64,
    chat_share: Annotated[float, typer.Option(help="Share of rows that start as a chat, for instruct models.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    data: Annotated[
        Path | None, typer.Option("--data", help="Take the rows from this .txt, .jsonl or .jsonl.gz instead.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be made, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Let a model write the text that recovery learns from, and keep its next-token probabilities with it.

    Loops and duplicates are filtered and replaced. The same call continues where an interrupted one stopped.

    Example: rlkit synthesize smollm2-135m -o ./corpus --sequences 384 --length 128
    """
    atomic.refuse_existing(out, force=force)
    from rlkit.recover.synthesize import Sampling

    sampling = Sampling(
        sequences=sequences,
        length=length,
        temperature=temperature,
        top_k=top_k,
        chat_share=chat_share,
        seed=seed,
        kept=kept,
    )
    documents = text.read_documents(data) if data else None
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        if found.kind not in (source.SourceKind.HF, source.SourceKind.GGUF):
            raise ValueError(f"{model} is a {found.kind}; name the full-precision model, which writes the text")
        if dry_run:
            _show_plan(out, corpus.Shape(sequences, length, kept, source.read_shape(found).vocab), json)
            return
        speed = _Speed(tell)
        made = _make(found, sampling, documents, out, force, speed.tell)
    _show(made, speed.tokens_per_s, json, next_step=f"rlkit recover {model} --corpus {out} -o CHECKPOINT")


def _make(
    found: source.Source, sampling: Any, documents: list[str] | None, out: Path, force: bool, tell: Tell
) -> corpus.Corpus:
    from rlkit.recover.model import fast_dtype, load_model
    from rlkit.recover.synthesize import score, synthesize

    model, tokenizer = load_model(found)
    model = model.to(fast_dtype())
    if documents is None:
        return synthesize(model, tokenizer, sampling, out, force=force, tell=tell)
    return score(
        model,
        tokenizer,
        documents,
        out,
        length=sampling.length,
        sequences=sampling.sequences,
        kept=sampling.kept,
        seed=sampling.seed,
        force=force,
        tell=tell,
    )


class _Speed:
    """Hears the progress, whose units are tokens, on its way to the bars: tokens per second of this run alone."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._first: tuple[float, int] | None = None
        self.tokens_per_s: float | None = None  # unknown while nothing was sampled

    def tell(self, event: Progress) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = now, event.done
        since, before = self._first
        if event.done > before and now > since:
            self.tokens_per_s = (event.done - before) / (now - since)
        self._tell(event)


def _show_plan(out: Path, shape: corpus.Shape, json: bool) -> None:
    tokens = shape.rows * shape.length
    if json:
        plan = {"sequences": shape.rows, "length": shape.length, "tokens": tokens, "nbytes": shape.nbytes}
        console.emit_json({"schema_version": 1, "path": str(out), "plan": plan})
        return
    console.emit(
        f"{shape.rows} rows of {shape.length} tokens, {tokens} tokens, with {shape.top_k} log-probabilities each: "
        f"{console.nbytes_text(shape.nbytes)}"
    )
    console.say(f"nothing is made with --dry-run; without it: {out}")


def _show(made: corpus.Corpus, tokens_per_s: float | None, json: bool, *, next_step: str) -> None:
    if json:
        speed = None if tokens_per_s is None else round(tokens_per_s, 1)
        console.emit_json({**made.facts, "path": str(made.folder), "tokens_per_s": speed})
        return
    nbytes = sum(shard["nbytes"] for shard in made.facts["shards"])
    parts = [f"{len(made.ids)} rows of {made.ids.shape[1]} tokens"]
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:.0f} tokens/s")
    if made.facts["origin"] == "sampled":
        counts = made.facts["counts"]
        parts.append(f"{counts['duplicates']} duplicates and {counts['loops']} loops replaced")
    console.emit(f"{made.folder}: {', '.join([*parts, console.nbytes_text(nbytes)])}")
    console.say(f"next: {next_step}")
