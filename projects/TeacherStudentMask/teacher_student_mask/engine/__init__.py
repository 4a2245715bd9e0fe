"""Running a training: the trainer, its hooks, and the main function of train_net.py."""

from .hooks import FiniteLoss, PseudoMaskWatch, SeedEveryIteration, UnseenMaskGuard
from .trainer import Trainer, main, setup

__all__ = [
    "FiniteLoss",
    "PseudoMaskWatch",
    "SeedEveryIteration",
    "Trainer",
    "UnseenMaskGuard",
    "main",
    "setup",
]
