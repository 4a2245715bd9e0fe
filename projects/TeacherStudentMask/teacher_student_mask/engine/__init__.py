"""Running a training: the trainer, its hooks, and the main function of train_net.py."""

from .hooks import FiniteLoss, PseudoMaskWatch, SeedEveryIteration, UnseenMaskGuard
from .trainer import Trainer, main, open_atomically, setup

__all__ = [
    "FiniteLoss",
    "PseudoMaskWatch",
    "SeedEveryIteration",
    "Trainer",
    "UnseenMaskGuard",
    "main",
    "open_atomically",
    "setup",
]
