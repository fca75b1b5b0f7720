"""The process that runs one bundle and nothing else, so that its peak memory is the bundle's; and its other end.

    python -m rlkit.profiles.worker BUNDLE DEVICE THREADS [KV]   (THREADS 0: as the bundle says; KV: its own cache)

One JSON object per line: the worker says {"ready": true, "threads": n, "provider": name} once loaded, then answers
{"fill": [...], "prompt": [...], "new_tokens": n, "room": n} (a `Work`) with {"seconds": [...]} and {"peak": true} with
{"peak_nbytes": n}; {"error": text} says what went wrong. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles.bench import Generate, Measurement, Plan, Subject, Work, measure
from rlkit.profiles.bundle import read_size
from rlkit.recover.memory import peak_nbytes
from rlkit.recover.progress import Tell, silent
from rlkit.runtime import hugepages
from rlkit.runtime.tuned import environment_for


def answer(
    generate: Generate,
    lines: Iterable[str],
    say: Callable[[dict[str, Any]], None],
    threads: int = 0,
    provider: str = "cpu",
) -> None:
    """Say that all is ready, then answer requests until there are no more."""
    say({"ready": True, "threads": threads, "provider": provider})
    for line in lines:
        request = json.loads(line)
        if "prompt" in request:
            say({"seconds": list(generate(Work(**request)))})
        else:
            say({"peak_nbytes": peak_nbytes()})


class Worker:
    """The measuring end of one worker process."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.name = name
        self.threads = 0
        self.provider = ""
        self._process = process
        self._errors = errors

    def wait_ready(self) -> None:
        """Return once the bundle is loaded."""
        said = self._receive()
        self.threads, self.provider = said["threads"], said["provider"]

    def generate(self, asked: Work) -> Iterator[float]:
        """Seconds of each token of one generation; they arrive together, so that pipes cost no time in between."""
        yield from self._ask(asdict(asked))["seconds"]

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
def start(name: str, argv: Sequence[str], variables: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Run a worker for the length of the block, with `variables` added to its environment.

    It is ended however the block ends.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder, "stderr.txt")
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env={**os.environ, **(variables or {})},
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
        if plan.room > size.shape.max_context:
            why = f"{plan.room} tokens exceed the context of {bundle}, {size.shape.max_context}"
            raise ValueError(f"{why}; ask for fewer, or for less depth")
    shared = replace(plan, vocab=min(size.shape.vocab for size in sizes))
    names = _names(bundles)
    with contextlib.ExitStack() as stack:
        subjects = []
        for name, bundle, size in zip(names, bundles, sizes, strict=True):
            worker = stack.enter_context(
                start(name, command(bundle, where.device, where.threads), environment(bundle, where))
            )
            ends = worker.generate, worker.peak_nbytes, size.nbytes_at
            subjects.append(Subject(name, *ends, worker.threads, worker.provider))
        return measure(subjects, shared, tell)


def environment(bundle: Path, where: Setting) -> dict[str, str]:
    """What only works from a process's start: huge pages, and what `rlkit tune` found unless threads were asked for."""
    if where.device != "cpu":
        return {}
    return {**hugepages.variables(), **(environment_for(bundle) if where.threads is None else {})}


def _names(bundles: Sequence[Path]) -> list[str]:
    """Folder names where they tell the bundles apart, else their paths."""
    names = [bundle.resolve().name for bundle in bundles]
    return names if len(set(names)) == len(names) else [str(bundle) for bundle in bundles]


def main(argv: Sequence[str]) -> None:
    """Load the bundle and answer requests on standard input."""
    from rlkit.runtime.clocked import Clocked
    from rlkit.runtime.session import open_bundle

    # The runtime may print; only answers may reach the pipe, so everything else goes to standard error.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    bundle, device, threads, *kv = argv
    try:
        session = open_bundle(Path(bundle), device=device, threads=int(threads) or None, kv=kv[0] if kv else None)

        clocked = Clocked(session)

        def generate(asked: Work) -> Iterator[float]:
            return clocked.generate(asked.fill, asked.prompt, asked.new_tokens, asked.room)

        answer(generate, sys.stdin, say, session.threads, session.device)
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
