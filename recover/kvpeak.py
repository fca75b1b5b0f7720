"""The most memory that tensors of a pass take at once, counted as torch makes and frees them.

torch has no such figure on the CPU, and a process's high-water mark does not say what was for whom. So the results of
every operation are looked at as they appear: memory that was not there before is counted until its last tensor goes.
What an operation uses inside and frees before it returns is not seen; on the CPU that is the scratch space of matrix
products and of fused attention, which is bounded by blocks, not by the context.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which memory of new tensors is counted: `nbytes` is the most that lived at once.

    Inside `aside()` what is made counts for nothing, however long it lives.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._counts = True

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A block whose tensors are not counted."""
        counts, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it gave back."""
        before = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in before:
                self._count(leaf.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        if self._counts:
            size = storage.nbytes()
            self._now += size
            self.nbytes = max(self.nbytes, self._now)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self._now -= size
