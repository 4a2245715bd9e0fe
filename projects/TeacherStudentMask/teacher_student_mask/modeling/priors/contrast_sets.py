"""Which pixels of a ROI ContrastMask's loss pulls together and pushes apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = ["PixelSets", "sample_pixels", "sets_of_cams", "sets_of_masks"]


@dataclass(frozen=True)
class PixelSets:
    """
    Sets of pixels of R ROIs of M x M cells, each bool of shape (R, M, M).

    Args:
        easy_positive, hard_positive: keys inside the object, far from and near its outline.
        easy_negative, hard_negative: keys outside.
        inside, outside: whose mean is the ROI's query.
    """

    easy_positive: torch.Tensor
    hard_positive: torch.Tensor
    easy_negative: torch.Tensor
    hard_negative: torch.Tensor
    inside: torch.Tensor
    outside: torch.Tensor

    @property
    def keys(self) -> tuple[torch.Tensor, ...]:
        """The four sets of keys, in the order above."""
        return self.easy_positive, self.hard_positive, self.easy_negative, self.hard_negative

    def where(self, condition: torch.Tensor, other: PixelSets) -> PixelSets:
        """These sets for the ROIs where ``condition``, bool of shape (R,), holds, else others."""
        rows = condition[:, None, None]
        return PixelSets(*(torch.where(rows, a, b) for a, b in zip(self._all, other._all)))

    def have_enough(self, min_pixels: int) -> torch.Tensor:
        """bool, shape (R,): the ROIs each of whose four sets of keys has ``min_pixels`` or more."""
        counts = torch.stack([x.flatten(1).sum(1) for x in self.keys])
        return (counts >= min_pixels).all(dim=0)

    @property
    def _all(self) -> tuple[torch.Tensor, ...]:
        return *self.keys, self.inside, self.outside


def sets_of_masks(masks: torch.Tensor) -> PixelSets:
    """
    The sets of objects with a mask.

    A pixel belongs to the edge if a central difference of the mask is not zero there, which makes
    the edge two pixels wide. Hard keys are the pixels next to the edge, diagonally, too, but not on
    it; easy positives all others of the mask, those of its edge among them; easy negatives all
    others outside but those of the edge.

    Args:
        masks: bool, shape (R, M, M).
    """
    # At the border the pixel itself stands for the neighbour that it lacks.
    above = torch.cat([masks[:, :1], masks[:, :-1]], dim=1)
    below = torch.cat([masks[:, 1:], masks[:, -1:]], dim=1)
    left = torch.cat([masks[:, :, :1], masks[:, :, :-1]], dim=2)
    right = torch.cat([masks[:, :, 1:], masks[:, :, -1:]], dim=2)
    edge = (above != below) | (left != right)
    # All pixels within a distance below 2 of the edge.
    near = F.max_pool2d(edge.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    hard = near & ~edge
    return PixelSets(
        easy_positive=masks & ~hard,
        hard_positive=masks & hard,
        easy_negative=~masks & ~near,
        hard_negative=~masks & hard,
        inside=masks,
        outside=~masks,
    )


def sets_of_cams(cams: torch.Tensor, high: float = 0.9, low: float = 0.1) -> PixelSets:
    """
    The sets of objects without a mask: where the class activation map is high, and where low.

    Args:
        cams: shape (R, M, M), in [0, 1].
        high: positives lie above.
        low: negatives lie below.
    """
    positive, negative = cams > high, cams < low
    return PixelSets(positive, positive, negative, negative, positive, negative)


def sample_pixels(pixels: torch.Tensor, share: float) -> torch.Tensor:
    """
    A random choice of each ROI's pixels, from PyTorch's generator of their device.

    Args:
        pixels: bool, shape (R, M, M).
        share: in (0, 1]; of n pixels ceil(share * n) are chosen.

    Returns:
        bool, shape (R, M, M).
    """
    members = pixels.flatten(1)
    draws = torch.rand(members.shape, device=pixels.device).masked_fill(~members, 2.0)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    counts = (members.sum(dim=1).double() * share).ceil()
    return (ranks < counts[:, None]).view_as(pixels)
