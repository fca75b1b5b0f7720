"""The process that runs one bundle and nothing else, so that its peak memory is the bundle's; and its other end.

    python -m rlkit.profiles.worker BUNDLE DEVICE THREADS        (THREADS 0: as the bundle says)

One JSON object per line: the worker says {"ready": true, "threads": n} once loaded, then answers {"prompt_ids": [...],
"new_tokens": n} with {"seconds": [...]} and {"peak": true} with {"peak_nbytes": n}; {"error": text} says what went
wrong. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles.bench import Generate, Measurement, Plan, Subject, measure
from rlkit.profiles.bundle import read_size
from rlkit.recover.memory import peak_nbytes
from rlkit.recover.progress import Tell, silent


def answer(generate: Generate, lines: Iterable[str], say: Callable[[dict[str, Any]], None], threads: int = 0) -> None:
    """Say that all is ready, then answer requests until there are no more."""
    say({"ready": True, "threads": threads})
    for line in lines:
        request = json.loads(line)
        if "prompt_ids" in request:
            say({"seconds": list(generate(request["prompt_ids"], request["new_tokens"]))})
        else:
            say({"peak_nbytes": peak_nbytes()})


class Worker:
    """The measuring end of one worker process."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.name = name
        self.threads = 0
        self._process = process
        self._errors = errors

    def wait_ready(self) -> None:
        """Return once the bundle is loaded."""
        self.threads = self._receive()["threads"]

    def generate(self, prompt_ids: list[int], new_tokens: int) -> Iterator[float]:
        """Seconds of each token of one generation; they arrive together, so that pipes cost no time in between."""
        yield from self._ask({"prompt_ids": prompt_ids, "new_tokens": new_tokens})["seconds"]

    def peak_nbytes(self) -> int | None:
        """Peak memory of the process so far."""
        peak: int | None = self._ask({"peak": True})["peak_nbytes"]
        return peak

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure("it ended") from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("it ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"])
        return reply

    def _failure(self, why: str) -> ChildProcessError:
        tail = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
        said = f" ({tail[0]})" if tail and tail[0] not in why else ""
        return ChildProcessError(f"the process measuring {self.name} failed: {why}{said}")


def command(bundle: Path, device: str = "cpu", threads: int | None = None) -> list[str]:
    """The command line of a worker."""
    return [sys.executable, "-m", "rlkit.profiles.worker", str(bundle), device, str(threads or 0)]


@contextlib.contextmanager
def start(name: str, argv: Sequence[str]) -> Iterator[Worker]:
    """Run a worker for the length of the block; it is ended however the block ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder, "stderr.txt")
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8"
            )
        try:
            worker = Worker(name, process, errors)
            worker.wait_ready()
            yield worker
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True, slots=True)
class Setting:
    """Where bundles are measured; threads of None means as each bundle says."""

    device: str = "cpu"
    threads: int | None = None


def measure_bundles(
    bundles: Sequence[Path], plan: Plan, setting: Setting | None = None, tell: Tell = silent
) -> tuple[Measurement, ...]:
    """Measure bundle folders in turn, each in a process of its own, with prompts from the vocabulary they share."""
    where = setting or Setting()
    if not bundles:
        raise ValueError("there is nothing to measure; name at least one bundle")
    sizes = [read_size(bundle) for bundle in bundles]
    for bundle, size in zip(bundles, sizes, strict=True):
        asked = max(plan.prompt_tokens) + plan.new_tokens
        if asked > size.shape.max_context:
            raise ValueError(f"{asked} tokens exceed the context of {bundle}, {size.shape.max_context}; ask for fewer")
    shared = replace(plan, vocab=min(size.shape.vocab for size in sizes))
    names = _names(bundles)
    with contextlib.ExitStack() as stack:
        subjects = []
        for name, bundle, size in zip(names, bundles, sizes, strict=True):
            worker = stack.enter_context(start(name, command(bundle, where.device, where.threads)))
            subjects.append(Subject(name, worker.generate, worker.peak_nbytes, size.nbytes_at, worker.threads))
        return measure(subjects, shared, tell)


def _names(bundles: Sequence[Path]) -> list[str]:
    """Folder names where they tell the bundles apart, else their paths."""
    names = [bundle.resolve().name for bundle in bundles]
    return names if len(set(names)) == len(names) else [str(bundle) for bundle in bundles]


def main(argv: Sequence[str]) -> None:
    """Load the bundle and answer requests on standard input."""
    from rlkit.runtime.session import open_session

    # The runtime may print; only answers may reach the pipe, so everything else goes to standard error.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    bundle, device, threads = argv
    try:
        session = open_session(Path(bundle), device=device, threads=int(threads) or None)

        def generate(prompt_ids: list[int], new_tokens: int) -> Iterator[float]:
            tokens = session.generate(prompt_ids, new_tokens, ignore_stop=True)
            return (token.seconds for token in tokens)

        answer(generate, sys.stdin, say, session.threads)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:  # said in words already
        say({"error": str(error)})
        sys.exit(1)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
