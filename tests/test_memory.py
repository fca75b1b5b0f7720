"""Peak memory as the system counts it, and memory given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlkit.recover import memory

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
HOLES = """
import numpy as np
from rlkit.recover import memory
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
{before}
np.ones(2**21).sum()  # 16 MiB, freed at once: glibc then takes blocks up to this size from its own heap
blocks = [np.ones(2**20) for _ in range(60)]  # 8 MiB each
del blocks[:-1]
{after}
print(resident())
"""


def resident(before: str = "", after: str = "") -> int:
    code = HOLES.format(before=before, after=after)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_the_peak_grows_with_what_is_held() -> None:
    before = memory.peak_nbytes()
    held = bytearray(50_000_000)
    held[::4096] = b"1" * len(held[::4096])
    after = memory.peak_nbytes()
    assert before is not None and after is not None and after >= before
    assert after > len(held)


@LINUX
def test_freed_blocks_go_back_to_the_system() -> None:
    kept = resident()
    assert resident(after="memory.give_back()") < kept - 2**28
    assert resident(before="memory.map_large_blocks()") < kept - 2**28
