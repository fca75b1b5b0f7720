"""A .safetensors file written tensor by tensor: what is large never lies in memory as a whole.

The format: the length of the header (8 bytes, little-endian), the header as JSON (type, shape, first and last byte of
every tensor), the bytes in order. Readers need no order; here wide types come first, so that all are aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.atomic import need_space
from rlkit.recover.contents import DTYPE_BITS


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name, its type as the format calls it ("F32"), its shape, and its bytes in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_tensors(path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> None:
    """Write the file; OSError if there is no space, ValueError if an entry's bytes are not what its shape needs."""
    ordered = sorted(entries, key=lambda entry: -DTYPE_BITS[entry.dtype])  # stable
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    need_space(path.parent, end)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in ordered:
            written = sum(file.write(chunk) for chunk in entry.chunks())
            if written != entry.nbytes:
                raise ValueError(
                    f"{entry.name} has {written} bytes, but {entry.shape} {entry.dtype} needs {entry.nbytes}"
                )
