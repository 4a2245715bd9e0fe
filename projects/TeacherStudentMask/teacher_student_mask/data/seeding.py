"""Random numbers as a function of where a training is, so that no checkpoint need hold them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["preserved_generators", "seed_generators"]


def seed_generators(
    key: tuple[int, ...], purpose: int, seed_torch: Callable[[int], object] = torch.manual_seed
) -> None:
    """
    Seed the global generators of Python, numpy and PyTorch.

    Args:
        key: numbers of 0 or more, such as (SEED, rank, iteration). Every key gives other streams,
            which neither overlap nor resemble one another.
        purpose: 0 or more; keeps users with the same key apart.
        seed_torch: takes the seed for PyTorch, a number of 63 bits.
    """
    words = np.random.SeedSequence(key, spawn_key=(purpose,)).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    seed_torch(int(words[3] >> np.uint64(1)))


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Afterwards the generators of Python, numpy and PyTorch's CPU are as they were before."""
    state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
