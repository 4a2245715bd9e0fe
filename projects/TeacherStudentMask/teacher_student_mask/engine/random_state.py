"""The random numbers of training, so that a run that goes on draws what it would have drawn."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..data.train_loader import seed_generators

__all__ = ["SeedEveryIteration"]

# For seed_generators: the data is seeded by position, under another number.
_PURPOSE = 1


class SeedEveryIteration(HookBase):
    """
    Seeds all generators before each iteration, as a function of the seed, rank and iteration.

    What training draws in an iteration, the sampled proposals above all, then depends neither on
    where the run started nor on what an evaluation in between has drawn. Belongs before all other
    hooks.
    """

    def __init__(self, seed: int):
        """
        Args:
            seed: 0 or more.

        Raises:
            ValueError: a negative seed.
        """
        if seed < 0:
            raise ValueError(f"The seed of every iteration must be 0 or more, got {seed}.")
        self.seed = seed

    def before_step(self) -> None:
        seed_generators((self.seed, comm.get_rank(), self.trainer.iter), _PURPOSE)
