"""llama.cpp behind the protocol of profiles/worker.py, to be run by the Python of an environment that has it.

    PEER_PYTHON llamacpp_worker.py MODEL.gguf THREADS ROOM

Nothing of rlkit is imported. The token after a step is the likeliest, as in greedy generation; batches of a prompt are
512 tokens, the peer's default.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # in the peer's environment alone
import numpy as np

BATCH = 512


class Peer:
    """An open model with one cache for `room` tokens."""

    def __init__(self, model: str, threads: int, room: int) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot open {model}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = room, BATCH, BATCH
        context.n_threads = context.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise ValueError(f"llama.cpp has no memory for a context of {room} tokens")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._fill: list[int] = []

    def generate(self, fill: list[int], prompt: list[int], new_tokens: int) -> Iterator[float]:
        """Seconds of each new token, the first from the start of the prompt; `fill` stays from call to call."""
        memory = llama_cpp.llama_get_memory(self._context)
        if fill != self._fill:
            llama_cpp.llama_memory_clear(memory, True)
            self._read(fill)
            self._fill = fill
        llama_cpp.llama_memory_seq_rm(memory, 0, len(fill), -1)
        began = time.perf_counter()
        self._read(prompt)
        for index in range(new_tokens):
            token = self._likeliest()
            now = time.perf_counter()
            yield now - began
            began = time.perf_counter()
            if index + 1 < new_tokens:
                self._read([token])

    def _read(self, ids: list[int]) -> None:
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(part)))
            if code:
                raise ValueError(f"llama.cpp cannot read {len(part)} tokens (code {code})")

    def _likeliest(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(
            np.argmax(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab,)))
        )


def main(model: str, threads: str, room: str) -> None:
    """Answer requests until there are no more."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the library prints; only answers may reach the pipe

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    try:
        peer = Peer(model, int(threads), int(room))
        say({"ready": True, "threads": int(threads), "provider": "llama.cpp"})
        for line in sys.stdin:
            asked = json.loads(line)
            if "prompt" in asked:
                say({"seconds": list(peer.generate(asked["fill"], asked["prompt"], asked["new_tokens"]))})
            else:
                say({"peak_nbytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    except ValueError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    main(*sys.argv[1:])
