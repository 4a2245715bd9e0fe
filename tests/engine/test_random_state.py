"""The random numbers of an iteration do not depend on what was drawn before it."""

import random

import numpy as np
import pytest
import torch
from detectron2.engine.train_loop import TrainerBase

from teacher_student_mask.data.train_loader import preserved_generators, seed_generators
from teacher_student_mask.engine import SeedEveryIteration


def draw():
    return random.random(), np.random.random(), torch.rand(()).item()


class Trainer(TrainerBase):
    """Draws numbers in every step, and as many more as ``extra`` says."""

    def __init__(self, seed, extra=0):
        super().__init__()
        self.extra = extra
        self.drawn = []
        self.register_hooks([SeedEveryIteration(seed)])

    def run_step(self):
        self.drawn.append(draw())
        for _ in range(self.extra):
            draw()


def test_an_iteration_draws_the_same_wherever_training_starts():
    whole, resumed = Trainer(3), Trainer(3, extra=2)
    whole.train(0, 6)
    resumed.train(4, 6)
    assert resumed.drawn == whole.drawn[4:]
    assert len(set(sum(whole.drawn, ()))) == 18  # all different


def test_seeds_and_ranks_differ(monkeypatch):
    drawn = []
    for seed, rank in [(3, 0), (4, 0), (3, 1)]:
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        trainer = Trainer(seed)
        trainer.train(0, 3)
        drawn += trainer.drawn
    assert len(set(drawn)) == 9


def test_data_and_training_share_no_numbers():
    seed_generators((1, 0, 5), 0)
    first = draw()
    seed_generators((1, 0, 5), 1)
    assert not set(first) & set(draw())


def test_negative_seed():
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        SeedEveryIteration(-1)


def test_generators_are_preserved_when_the_block_raises():
    seed_generators((1,), 0)
    expected = draw()
    seed_generators((1,), 0)
    with pytest.raises(KeyError), preserved_generators():
        draw()
        raise KeyError
    assert draw() == expected
