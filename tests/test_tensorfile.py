"""Safetensors written tensor by tensor, read back by the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rlkit.recover.tensorfile import Entry, write_tensors

ARRAYS = {
    "codes": np.arange(21, dtype=np.uint8).reshape(3, 7),
    "scales": np.linspace(0, 1, 5, dtype=np.float32),
    "table": np.ones((2, 3), np.float16),
    "empty": np.zeros((0, 4), np.float32),
}
NAMES = {"uint8": "U8", "float32": "F32", "float16": "F16"}


def pieces(array: np.ndarray) -> Callable[[], Iterator[bytes]]:
    return lambda: iter([array[:1].tobytes(), array[1:].tobytes()])


def entries() -> list[Entry]:
    return [Entry(name, NAMES[str(a.dtype)], a.shape, pieces(a)) for name, a in ARRAYS.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", entries(), {"format": "pt"})
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a has 3 bytes, but \(4,\) U8 needs 4"):
        write_tensors(tmp_path / "t.safetensors", [Entry("a", "U8", (4,), lambda: iter([b"abc"]))])
