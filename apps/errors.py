"""The one place where an exception becomes a line to read and an exit code: what happened, why, what to do."""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum

EXTRAS = {
    "torch": "recover",
    "transformers": "recover",
    "peft": "recover",
    "accelerate": "recover",
    "gguf": "recover",
    "huggingface_hub": "recover",
    "onnx": "export",
    "onnx_ir": "export",
    "lm_eval": "eval",
    "tokenizers": "eval",
    "skimage": "depth",
    "cv2": "depth",
    "PIL": "depth",
    "ray": "ray",
}
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class ExitCode(IntEnum):
    """What the shell gets."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    INTERRUPTED = 130


def explain(error: BaseException) -> tuple[str, ExitCode] | None:
    """The line and the exit code of an expected error; None for one that should not happen."""
    if _is_interrupt(error):
        return "interrupted; finished steps are kept, nothing is half-written", ExitCode.INTERRUPTED
    if isinstance(error, ImportError):
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            return None
        return (
            f'this needs {error.name}, which is not installed; run: pip install "rlkit-edge[{extra}]"',
            ExitCode.FAILED,
        )
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or choose a smaller model or batch", ExitCode.FAILED
    if isinstance(error, OSError | ValueError):
        return _one_line(error), ExitCode.BAD_INPUT if isinstance(error, BAD_INPUT) else ExitCode.FAILED
    return None


def report(error: BaseException) -> ExitCode:
    """Print an error for a person, on standard error, and return its exit code."""
    explained = explain(error)
    if explained is None or os.environ.get("RLKIT_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    if explained is None:
        name = type(error).__name__
        print(f"error: unexpected {name}: {error}; this is a fault of rlkit, please report it", file=sys.stderr)
        return ExitCode.FAILED
    message, code = explained
    print(message if code is ExitCode.INTERRUPTED else f"error: {message}", file=sys.stderr)
    return code


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root: a library interrupted while it is imported says ImportError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: OSError | ValueError) -> str:
    """Our own messages as they are; the system's as "path: reason"."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__
