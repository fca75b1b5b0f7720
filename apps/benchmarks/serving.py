"""What the server costs beside a bare session, and whether it stays up under load.

    python -m rlkit.apps.benchmarks.serving -o ./bench-serving --bundle ./bundle          overhead, first byte
    python -m rlkit.apps.benchmarks.serving -o ./bench-serving --suites load --seconds 300

overhead   the same requests in turns to `rlkit serve` (a stream over HTTP) and to a session in a process of its own:
           tokens/s from the second token on, and from the request to the last token
first      the first byte of the stream's first token, less what the server says the prompt took up to that token
load       clients that ask a tiny model without pause, in streams and whole, a tenth of them hanging up in the middle;
           answers by status, the server's memory second by second, and what still ran when all had gone

Prompts are random ids, new every time, so no cache of prefixes answers; stop tokens are biased away on both sides.
"""

from __future__ import annotations

import contextlib
import http.client
import json as jsonlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import typer

from rlkit.apps import console
from rlkit.profiles.machine import measure_machine
from rlkit.recover.atomic import write_json
from rlkit.recover.source import ModelShape, read_json
from rlkit.runtime import hugepages

OVERHEAD_BAR, FIRST_BAR, MEMORY_BAR = 0.03, 0.020, 0.03  # share of tokens/s, seconds, share of memory
SUITES = ("overhead", "load")
TINY = ModelShape("LlamaForCausalLM", 2, 64, 128, 4, 2, 16, 512, True, 2048, False)
HANG_UP, WHOLE = 0.1, 0.3  # of the requests under load
WARM_SECONDS = 20.0  # of load before memory counts
EXIT_SECONDS = 10.0


def main(  # noqa: PLR0913, one parameter per option of the command
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("bench-serving"),
    bundle: Annotated[Path | None, typer.Option(help="A real bundle, for `overhead`.")] = None,
    suites: Annotated[str, typer.Option(help="Which parts, with commas between.")] = "overhead",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a reply.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 15,
    clients: Annotated[int, typer.Option(min=1, help="Clients of `load`.")] = 50,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long `load` lasts.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Measure the server beside a bare session, and under load."""
    asked = suites.split(",")
    if unknown := [suite for suite in asked if suite not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {' or '.join(SUITES)}")
    found: dict[str, Any] = {"schema_version": 1, "machine": measure_machine().to_json()}
    if "overhead" in asked:
        if bundle is None:
            raise typer.BadParameter("--bundle names what to serve for `overhead`")
        found["overhead"] = overhead(bundle, prompt, new_tokens, repeats)
    if "load" in asked:
        found["load"] = load(tiny_bundle(out), clients, seconds)
    write_json(out / "serving.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found)


# --- the two sides ------------------------------------------------------------------------------------------------

BARE = """
import json, sys
from pathlib import Path
from rlkit.runtime.request import Request, Sampling, Token
from rlkit.runtime.session import open_bundle
import time
session = open_bundle(Path(sys.argv[1]))
bias = {token: -100.0 for token in session.stop_ids}
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    began = time.perf_counter()
    stream = session.stream(Request(tuple(asked["prompt"]), asked["new_tokens"], Sampling(bias=bias)))
    seconds = [event.seconds for event in stream if isinstance(event, Token)]
    print(json.dumps({"seconds": seconds, "whole": time.perf_counter() - began}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply as its caller saw it: seconds to the first byte of text, of the tokens after it, and of it all.

    `prompt_seconds`: what the server says the first token took.
    """

    first: float
    later: float
    whole: float
    tokens: int
    prompt_seconds: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """From the second token on."""
        return (self.tokens - 1) / self.later


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """`rlkit serve` on a free port for the length of the block: its address and process."""
    words = [sys.executable, "-m", "rlkit.apps.cli", "serve", str(bundle), "--port", "0", "--json", *options]
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would fill
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                said.seek(0)
                raise OSError(f"rlkit serve ended: {said.read().strip().splitlines()[-1:]}")
            yield jsonlib.loads(line)["address"], psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _connection(address: str) -> http.client.HTTPConnection:
    where = urlsplit(address)
    return http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)


def over_http(address: str, body: dict[str, Any], hang_up_after: int | None = None) -> tuple[int, Reply | None]:
    """The status of a completion and, for a stream, how it came; `hang_up_after` so many chunks."""
    connection = _connection(address)
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", jsonlib.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200 or not body.get("stream"):
            response.read()
            return response.status, None
        return 200, _read_stream(response, began, hang_up_after)
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, began: float, hang_up_after: int | None) -> Reply | None:
    times: list[float] = []
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        chunk = jsonlib.loads(line[6:])
        if "error" in chunk:
            raise OSError(f"the stream ended with {chunk['error']}")
        if chunk.get("choices"):
            times.append(now)
        usage, timings = chunk.get("usage") or usage, chunk.get("timings") or timings
        if hang_up_after is not None and len(times) >= hang_up_after:
            return None
    tokens = int(usage["completion_tokens"])
    later = times[-1] - times[0]
    return Reply(times[0] - began, later, time.perf_counter() - began, tokens, timings.get("prompt_seconds"))


# --- overhead -----------------------------------------------------------------------------------------------------


def overhead(bundle: Path, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Rounds of both sides in turns, after one that does not count."""
    config = read_json(bundle / "genai_config.json")["model"]
    eos = config["eos_token_id"]
    stops = eos if isinstance(eos, list) else [eos]
    served: list[Reply] = []
    bare: list[Reply] = []
    words = [sys.executable, "-c", BARE, str(bundle)]
    alike = {**os.environ, **hugepages.variables()}  # as the server starts itself
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alike)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        jsonlib.loads(process.stdout.readline())
        with serving(bundle) as (address, _server):
            for number in range(repeats + 1):
                pairs = [_ids(2 * number + side, prompt, int(config["vocab_size"])) for side in range(2)]
                for side in (0, 1) if number % 2 else (1, 0):
                    if side:
                        body = {"prompt": pairs[1], "max_tokens": new_tokens, "temperature": 0, "stream": True}
                        body |= {"stream_options": {"include_usage": True}}
                        body |= {"logit_bias": {str(stop): -100 for stop in stops}}
                        status, reply = over_http(address, body)
                        if reply is None:
                            raise OSError(f"the server answered {status}")
                        served.append(reply)
                    else:
                        process.stdin.write(jsonlib.dumps({"prompt": pairs[0], "new_tokens": new_tokens}) + "\n")
                        process.stdin.flush()
                        said = jsonlib.loads(process.stdout.readline())
                        first, *rest = said["seconds"]
                        bare.append(Reply(first, sum(rest), said["whole"], 1 + len(rest)))
    finally:
        process.kill()
        process.communicate()
    return compared(served[1:], bare[1:])


def _ids(seed: int, count: int, vocab: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(min(256, vocab // 2), vocab) for _ in range(count)]


def compared(served: list[Reply], bare: list[Reply]) -> dict[str, Any]:
    """Medians over paired rounds of what the server adds, against the bars."""
    pairs = list(zip(served, bare, strict=True))
    if any(mine.later <= 0 for mine in served):
        raise ValueError("a reply came in one piece, so it has no speed; serve a model whose tokens are text")
    slower = statistics.median(1 - mine.tokens_per_s / alone.tokens_per_s for mine, alone in pairs)
    whole = statistics.median(mine.whole / alone.whole - 1 for mine, alone in pairs)
    waits = sorted(mine.first - mine.prompt_seconds for mine in served if mine.prompt_seconds is not None)
    if not waits:
        raise ValueError("the server says no prompt_seconds; it is of another version")
    return {
        "rounds": len(pairs),
        "tokens_per_s": statistics.median(mine.tokens_per_s for mine in served),
        "bare_tokens_per_s": statistics.median(alone.tokens_per_s for alone in bare),
        "overhead": slower,
        "whole_overhead": whole,
        "first_byte_seconds": {"p50": statistics.median(waits), "worst": waits[-1]},
        "met": slower <= OVERHEAD_BAR and statistics.median(waits) <= FIRST_BAR,
    }


# --- load ---------------------------------------------------------------------------------------------------------


def tiny_bundle(out: Path) -> Path:
    """A bundle of a tiny random model, made once."""
    folder = out / "tiny"
    if not folder.is_dir():
        from rlkit.apps.benchmarks.devices.items import plain
        from rlkit.export.build import export_bundle
        from rlkit.recover.standin import write_packed

        checkpoint = out / "tiny-checkpoint"
        if not checkpoint.is_dir():
            write_packed(TINY, plain("w8"), checkpoint)
        export_bundle(checkpoint, folder)
    return folder


@dataclass(slots=True)
class _Crowd:
    """What the clients share."""

    address: str
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        """Count something."""
        with self.lock:
            self.counts[what] += 1

    def client(self, seed: int) -> None:
        """Ask until the time is up; where told to come back, wait a little."""
        rng = random.Random(seed)
        while time.perf_counter() < self.until:
            stream = rng.random() >= WHOLE
            body = {
                "prompt": _ids(rng.randrange(2**30), rng.randrange(4, 200), TINY.vocab),
                "max_tokens": rng.randrange(4, 64),
                "temperature": rng.choice([0, 1.0]),
                "stream": stream,
                "stream_options": {"include_usage": True} if stream else None,
            }
            hang_up = rng.randrange(1, 6) if stream and rng.random() < HANG_UP else None
            try:
                status, reply = over_http(self.address, body, hang_up)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.note(f"{type(error).__name__}: {error}"[:120])
                continue
            self.note("hung up" if status == 200 and stream and reply is None else str(status))
            if status == 429:
                time.sleep(rng.uniform(0.05, 0.5))


def load(bundle: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Many clients for a while; memory, statuses, and what was left running."""
    memory: list[tuple[float, int]] = []
    with serving(bundle) as (address, process):
        crowd = _Crowd(address, time.perf_counter() + seconds)
        threads = [threading.Thread(target=crowd.client, args=(seed,)) for seed in range(clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        with console.progress(quiet=False) as tell:
            from rlkit.recover.progress import Progress

            while any(thread.is_alive() for thread in threads):
                time.sleep(1.0)
                at = time.perf_counter() - began
                memory.append((at, process.memory_info().rss))
                tell(
                    Progress(
                        "load", min(round(at), round(seconds)), round(seconds), f"{sum(crowd.counts.values())} answers"
                    )
                )
        left = _left(address)
    return judged(dict(crowd.counts), memory, left, clients, seconds)


def _left(address: str) -> int:
    """Replies that still run or wait some seconds after the last client has gone."""
    active = 0
    for _ in range(20):
        connection = _connection(address)
        connection.request("GET", "/rlkit/stats")
        table = jsonlib.loads(connection.getresponse().read())
        connection.close()
        engines = [one["engine"] for one in table["models"] if one["engine"]]
        active = sum(engine["active"] + engine["waiting"] for engine in engines)
        if not active:
            return 0
        time.sleep(0.25)
    return int(active)


def judged(
    counts: dict[str, int], memory: list[tuple[float, int]], left: int, clients: int, seconds: float
) -> dict[str, Any]:
    """Whether nothing failed, memory stayed flat after warming up, and nothing was left running."""
    allowed = {"200", "429", "hung up"}
    failures = {what: count for what, count in counts.items() if what not in allowed}
    later = [nbytes for at, nbytes in memory if at >= min(WARM_SECONDS, seconds / 3)]
    third = max(len(later) // 3, 1)
    first, last = statistics.median(later[:third]), statistics.median(later[-third:])
    growth = last / first - 1
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": counts,
        "failures": failures,
        "memory_growth": growth,
        "memory_nbytes": int(last),
        "left_running": left,
        "met": not failures and abs(growth) <= MEMORY_BAR and left == 0,
    }


def show(found: dict[str, Any]) -> None:
    """The results in sentences."""
    if part := found.get("overhead"):
        wait = part["first_byte_seconds"]
        console.emit(
            f"server {part['tokens_per_s']:.1f} tokens/s, bare session {part['bare_tokens_per_s']:.1f}: "
            f"{100 * part['overhead']:+.1f} % of the speed goes (bar {100 * OVERHEAD_BAR:.0f} %), "
            f"whole requests take {100 * part['whole_overhead']:+.1f} % longer"
        )
        console.emit(
            f"first byte {1e3 * wait['p50']:.1f} ms after the first token, {1e3 * wait['worst']:.1f} ms at worst "
            f"(bar {1e3 * FIRST_BAR:.0f} ms), {part['rounds']} rounds"
        )
    if part := found.get("load"):
        answers = ", ".join(f"{count} x {what}" for what, count in sorted(part["answers"].items()))
        console.emit(f"{part['clients']} clients for {part['seconds']:.0f} s: {answers}")
        console.emit(
            f"memory {console.nbytes_text(part['memory_nbytes'])}, {100 * part['memory_growth']:+.1f} % over the run "
            f"(bar {100 * MEMORY_BAR:.0f} %); {part['left_running']} replies left running"
        )
    met = all(part["met"] for part in (found.get("overhead"), found.get("load")) if part)
    console.emit("bars met" if met else "BARS NOT MET")


if __name__ == "__main__":
    typer.run(main)
