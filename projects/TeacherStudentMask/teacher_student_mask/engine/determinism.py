"""Bit-equal repetitions of a training."""

from __future__ import annotations

import os

import torch

__all__ = ["make_deterministic"]

# What cuBLAS needs for a fixed order of sums; either this or ":16:8", which is smaller and slower.
_CUBLAS_WORKSPACE = ":4096:8"


def make_deterministic(seed: int, cudnn_benchmark: bool = False) -> None:
    """
    Let PyTorch use deterministic algorithms only, in this process, from now on.

    An operation that has none raises, with PyTorch's message that names it. Call it before the
    first use of a GPU. It seeds nothing: Detectron2's ``default_setup`` does, with SEED.

    Args:
        seed: cfg.SEED, 0 or more.
        cudnn_benchmark: cfg.CUDNN_BENCHMARK.

    Raises:
        ValueError: no seed, or convolutions that are to be chosen by their speed.
    """
    if seed < 0:
        raise ValueError(
            f"DETERMINISTIC True needs SEED of 0 or more, got {seed}: without it every run draws "
            "its own."
        )
    if cudnn_benchmark:
        raise ValueError(
            "DETERMINISTIC True needs CUDNN_BENCHMARK False, got True, which chooses convolutions "
            "by their speed in this run."
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
