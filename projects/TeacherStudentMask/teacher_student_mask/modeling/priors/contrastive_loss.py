"""ContrastMask's loss: pixels of objects are alike, whatever their class, and unlike the rest."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .contrast_sets import PixelSets, sample_pixels
from .layers import at_least_float32

__all__ = ["contrastive_loss", "nce", "similarity"]

# Below this length a vector counts as shorter than 1, so that no gradient is larger than 1e4.
_EPS = 1e-4
# A ROI with fewer pixels in one of its four sets takes no part.
_MIN_PIXELS = 5
_EASY_TEMPERATURE, _HARD_TEMPERATURE = 0.3, 0.7


def similarity(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    cos(q, v - q) of a query q with each key v: keys are centred by the query, as in ContrastMask.

    Args:
        query: shape (D,).
        keys: shape (n, D).

    Returns:
        shape (n,), in [-1, 1].
    """
    return F.normalize(keys - query, dim=1, eps=_EPS) @ F.normalize(query, dim=0, eps=_EPS)


def nce(
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    official_denominator: bool = False,
) -> torch.Tensor:
    """
    Mean over a in ``positives`` of -log(exp(a / t) / (exp(a / t) + sum_b exp(b / t))).

    Args:
        positives: shape (n,), similarities of a query with the keys it should be like, n > 0.
        negatives: shape (m,), with those that it should not be like.
        temperature: t > 0.
        official_denominator: a slip of ContrastMask's code: exp(a) for exp(a / t) in the
            denominator, which makes losses below 0 possible.

    Returns:
        A scalar; not below 0 but for ``official_denominator``.
    """
    logits = positives / temperature
    others = torch.logsumexp(negatives / temperature, dim=0)
    own = positives if official_denominator else logits
    return (torch.logaddexp(own, others) - logits).mean()


def contrastive_loss(
    projections: torch.Tensor,
    sets: PixelSets,
    share: float = 0.3,
    official_denominator: bool = False,
) -> torch.Tensor:
    """
    ContrastMask's loss, without its weight and schedule.

    One query for the inside and one for the outside of objects, each the mean over the ROIs of
    this process that have enough pixels; all of them share both, objects of all classes, with and
    without a mask. The keys are a random share of the pixels of each ROI's sets.

    Args:
        projections: shape (R, D, M, M); R may be 0.
        sets: of the same ROIs.
        share: of the pixels of each set that are keys.
        official_denominator: see :func:`nce`.

    Returns:
        A scalar, float32 at least, with gradient through keys and queries; where no ROI has enough
        pixels 0, but attached to ``projections``.
    """
    kept = sets.have_enough(_MIN_PIXELS)
    rows = kept.nonzero()[:, 0]
    if len(rows) == 0:
        return at_least_float32(projections[:0]).sum()
    # Temperatures and differences of like vectors are not for half precision.
    with torch.autocast(projections.device.type, enabled=False):
        inside, outside = (_mean(projections[rows], x[rows]) for x in (sets.inside, sets.outside))
        keys = [sample_pixels(x, share).flatten(1) & kept[:, None] for x in sets.keys]
        used_rois, used_pixels = torch.stack(keys).any(dim=0).nonzero().unbind(1)
        vectors = at_least_float32(projections.flatten(2)[used_rois, :, used_pixels])
        easy_in, hard_in, easy_out, hard_out = (x[used_rois, used_pixels] for x in keys)
        like_inside, like_outside = (similarity(x, vectors) for x in (inside, outside))
        terms = (
            (like_inside, easy_in, easy_out, _EASY_TEMPERATURE),
            (like_inside, hard_in, hard_out, _HARD_TEMPERATURE),
            (like_outside, easy_out, easy_in, _EASY_TEMPERATURE),
            (like_outside, hard_out, hard_in, _HARD_TEMPERATURE),
        )
        losses = [nce(s[a], s[b], t, official_denominator) for s, a, b, t in terms]
        return torch.stack(losses).sum()


def _mean(projections: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    # Mean over the ROIs of the mean over each one's pixels: (R, D, M, M), (R, M, M) -> (D,).
    projections = at_least_float32(projections)
    weights = pixels.to(projections.dtype).flatten(1)
    weights = weights / weights.sum(dim=1, keepdim=True) / len(weights)
    return torch.einsum("rdp,rp->d", projections.flatten(2), weights)
