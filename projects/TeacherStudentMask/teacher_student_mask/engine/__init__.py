"""What belongs to running a training: hooks of the trainer, and the files that a run leaves."""

from .atomic_files import AtomicPathManager, WriteError, open_atomically
from .class_names import read_class_names, write_class_names
from .determinism import make_deterministic
from .device_checks import check_device_of_processes, check_mixed_precision
from .finite_loss import FiniteLoss
from .output_folder import (
    check_last_checkpoint,
    check_output_dir,
    explain_write_errors,
    tidy_output_dir,
)
from .pseudo_mask_watch import PseudoMaskWatch
from .random_state import SeedEveryIteration
from .trainer import Trainer, checked_loading
from .unseen_mask_guard import UnseenMaskGuard

__all__ = [
    "AtomicPathManager",
    "FiniteLoss",
    "PseudoMaskWatch",
    "SeedEveryIteration",
    "Trainer",
    "UnseenMaskGuard",
    "WriteError",
    "check_device_of_processes",
    "check_last_checkpoint",
    "check_mixed_precision",
    "check_output_dir",
    "checked_loading",
    "explain_write_errors",
    "make_deterministic",
    "open_atomically",
    "read_class_names",
    "tidy_output_dir",
    "write_class_names",
]
