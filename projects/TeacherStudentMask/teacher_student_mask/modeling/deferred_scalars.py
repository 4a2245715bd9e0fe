"""Scalars for the event storage that do not make training wait for the GPU at every step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from detectron2.utils.events import get_event_storage

__all__ = ["DeferredScalars"]


class DeferredScalars:
    """
    Collects scalars on the device and hands them over together, before Detectron2's writers run.

    ``put_scalar`` needs a number, so the CPU would wait for the GPU to finish all that it has
    been given. Of a GPU's scalars the storage gets the mean over the period; of the CPU's, which
    cost nothing to read, every value.
    """

    def __init__(self, period: int = 20, defer: bool | None = None):
        """
        Args:
            period: iterations between two transfers; Detectron2's writers write every 20.
            defer: None = where a scalar is on a GPU.

        Raises:
            ValueError: a period below 1.
        """
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}.")
        self.period = period
        self.defer = defer
        self._pending: dict[str, list[torch.Tensor]] = defaultdict(list)

    def put(self, scalars: Mapping[str, torch.Tensor]) -> None:
        """
        Log scalars of this iteration.

        Args:
            scalars: {name: tensor of one element}; NaN means that there is nothing to log.
        """
        for name, value in scalars.items():
            if self.defer is False or (self.defer is None and value.device.type == "cpu"):
                _put_number(name, value.item())
            else:
                self._pending[name].append(value.detach().float())
        if self._pending and (get_event_storage().iter + 1) % self.period == 0:
            self._transfer()

    def _transfer(self) -> None:
        means = torch.stack([torch.stack(x).nanmean() for x in self._pending.values()])
        for name, number in zip(self._pending, means.tolist()):
            _put_number(name, number)
        self._pending.clear()


def _put_number(name: str, number: float) -> None:
    if not math.isnan(number):
        get_event_storage().put_scalar(name, number)
