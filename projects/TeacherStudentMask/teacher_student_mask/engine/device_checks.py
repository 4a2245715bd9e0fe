"""Devices that Detectron2's trainer cannot train on, said before anything is built."""

from __future__ import annotations

import torch
from detectron2.utils import comm

__all__ = ["check_device_of_processes", "check_mixed_precision"]


def check_mixed_precision(enabled: bool, device: str) -> None:
    """
    Say early what Detectron2 asserts in the first step, or, on a CPU beside a GPU, does not say.

    Args:
        enabled: cfg.SOLVER.AMP.ENABLED.
        device: cfg.MODEL.DEVICE.

    Raises:
        ValueError: mixed precision without a GPU for it.
    """
    if not enabled:
        return
    if torch.device(device).type != "cuda":
        reason = f"MODEL.DEVICE is {device!r}"
    elif not torch.cuda.is_available():
        reason = f"PyTorch {torch.__version__} finds no GPU here"
    else:
        return
    raise ValueError(
        "SOLVER.AMP.ENABLED True (mixed precision) trains on a CUDA GPU only, but "
        f"{reason}. Set SOLVER.AMP.ENABLED False, or MODEL.DEVICE 'cuda' where there is a GPU."
    )


def check_device_of_processes(device: str) -> None:
    """
    Say in one sentence what Detectron2's trainer fails at.

    Args:
        device: cfg.MODEL.DEVICE.

    Raises:
        ValueError: several processes that would train on the CPU.
    """
    num_processes = comm.get_world_size()
    if num_processes > 1 and torch.device(device).type == "cpu":
        raise ValueError(
            f'MODEL.DEVICE is "{device}" in {num_processes} processes (--num-gpus times '
            "--num-machines): Detectron2's DefaultTrainer gives each process of a training a GPU. "
            "Train on the CPU with --num-gpus 1, or take the MODEL.DEVICE override away."
        )
