"""Peak memory of a program's tensors, on a GPU by its allocator, on a CPU by counting storages."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(program: Callable[[], object], device: str) -> int:
    """
    Bytes that a program's tensors took at the worst moment, above what there was before.

    Args:
        program: what to call; run once before, so that nothing is counted that stays.
        device: "cuda": of the caching allocator, with the workspaces of libraries. "cpu": of all
            storages that operators returned, forward and backward, each once and as long as it
            lived; without what an operator allocates and frees by itself.
    """
    program()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        program()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with CountStorages() as count:
        program()
    return count.peak


class CountStorages(TorchDispatchMode):
    """
    Count the bytes of the storages that come to be while the mode is on.

    Attributes:
        live: bytes now.
        peak: the most so far.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(x) for x in self._storages(args)} | {id(x) for x in self._storages(kwargs)}
        result = function(*args, **(kwargs or {}))
        for storage in self._storages(result):
            # A view, or what was written in place, is the input's storage.
            if id(storage) not in self._known and id(storage) not in given:
                self._add(storage)
        return result

    @staticmethod
    def _storages(tree) -> list[torch.UntypedStorage]:
        return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        # A storage keeps its Python object, and with it the reference, as long as it lives.
        self._known[key] = weakref.ref(storage, functools.partial(self._remove, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _) -> None:
        del self._known[key]
        self.live -= size
