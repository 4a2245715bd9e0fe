"""Post-processing with a dense conditional random field, for ``PSEUDO_MASK.METHOD "crf"``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode

__all__ = ["DenseCRF"]

# Of the kernels of the ROIs that are computed together; one of 28 x 28 cells takes 2.5 MB.
_MAX_KERNEL_BYTES = 256e6
# A kernel value below e^-50 vanishes beside the 1 that every cell has with itself, but may be a
# denormal number, with which a CPU computes twenty times more slowly.
_MIN_EXPONENT = -50.0


@dataclass(frozen=True)
class DenseCRF:
    """
    Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun, 2011) on each ROI.

    The unary energies are U = -log(clip(probability, 1e-5, 1)) of the labels 0 and 1. The kernels

        k_g(i, j) = exp(-|xy_i - xy_j|^2 / (2 gaussian_sxy^2)),
        k_b(i, j) = exp(-|xy_i - xy_j|^2 / (2 bilateral_sxy^2)
                        - |rgb_i - rgb_j|^2 / (2 bilateral_srgb^2))

    are normalised, K(i, j) = k(i, j) / sqrt(r_i r_j), r being the sums of k's rows, i = j included.
    With Potts compatibility Q starts as softmax(-U) and becomes, ``num_iters`` times,
    softmax(-U + gaussian_compat K_g Q + bilateral_compat K_b Q).

    The backend "torch" is exact: all pairs of a ROI's cells, all ROIs together, on the device of
    the input. "pydensecrf", the reference, approximates the kernels on a permutohedral lattice; on
    the CPU, a ROI at a time. Sec. 4.2 of the paper runs it with "default parameters"; it has none,
    so these are the values of its README.

    Attributes:
        num_iters, gaussian_sxy, gaussian_compat, bilateral_sxy, bilateral_srgb, bilateral_compat:
            as above, positions in ROI cells and colours in 0-255.
        backend: "torch" or "pydensecrf".

    Raises:
        ValueError: an unknown backend.
        ImportError: the backend is "pydensecrf", which is not installed.
    """

    num_iters: int = 5
    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0
    backend: str = "torch"

    def __post_init__(self) -> None:
        if self.backend not in ("torch", "pydensecrf"):
            raise ValueError(f"CRF.BACKEND is {self.backend!r}; allowed: 'torch', 'pydensecrf'.")
        if self.backend == "pydensecrf":
            _import_pydensecrf()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseCRF:
        """The CRF of ``cfg.MODEL.PSEUDO_MASK.CRF``, whose keys are the attributes."""
        return cls(**{key.lower(): value for key, value in cfg.items()})

    @torch.no_grad()
    def __call__(self, probs: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            probs: shape (R, H, W), foreground probabilities; those after the CRF are of the same
                type, without gradient.
            rois: shape (R, 3, H, W), RGB in 0-255: the pixels of each ROI.
        """
        # Whole colour values, which is what pydensecrf takes.
        rois = rois.round().clamp(0, 255)
        if len(probs) == 0:
            return probs
        if self.backend == "pydensecrf":
            colors = rois.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
            refined = [self._call_pydensecrf(*x) for x in zip(probs.float().cpu().numpy(), colors)]
            return torch.from_numpy(np.stack(refined)).to(probs)
        # On CUDA autocast would multiply in half precision.
        with torch.autocast(probs.device.type, enabled=False):
            return self._mean_field(probs.float(), rois.float()).to(probs.dtype)

    def _call_pydensecrf(self, prob: np.ndarray, rgb: np.ndarray) -> np.ndarray:
        height, width = prob.shape
        model = _import_pydensecrf().DenseCRF2D(width, height, 2)
        unary = -np.log(np.clip(np.stack([1 - prob, prob]), 1e-5, 1.0))
        model.setUnaryEnergy(np.ascontiguousarray(unary.reshape(2, -1), dtype=np.float32))
        model.addPairwiseGaussian(sxy=self.gaussian_sxy, compat=self.gaussian_compat)
        model.addPairwiseBilateral(
            sxy=self.bilateral_sxy,
            srgb=self.bilateral_srgb,
            rgbim=np.ascontiguousarray(rgb),
            compat=self.bilateral_compat,
        )
        return np.array(model.inference(self.num_iters))[1].reshape(height, width)

    def _mean_field(self, probs: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        # Two labels need one channel: for s = Q_1 - Q_0 and h half the difference of the two
        # labels' logits, the step is h = (U_0 - U_1 + gaussian_compat K_g s + bilateral_compat
        # K_b s) / 2, s = tanh(h), and the probability of label 1 is sigmoid(2 h).
        num_rois, height, width = probs.shape
        unary = (probs.clamp(1e-5, 1).log() - (1 - probs).clamp(1e-5, 1).log()) / 2
        # The kernel of positions is a product of one over rows and one over columns.
        ys, xs = (torch.arange(n, device=probs.device).float() for n in (height, width))
        over_rows, over_columns = (
            _normalize(_gaussian(x[:, None] / self.gaussian_sxy)) for x in (ys, xs)
        )
        over_rows *= self.gaussian_compat / 2
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")) / self.bilateral_sxy
        points = torch.cat([grid.expand(num_rois, -1, -1, -1), rois / self.bilateral_srgb], dim=1)
        points = points.flatten(2).transpose(1, 2)

        chunk = max(1, int(_MAX_KERNEL_BYTES / (4 * (height * width) ** 2)))
        if probs.device.type == "cpu":
            # The kernels should stay in the caches.
            chunk = min(chunk, torch.get_num_threads())
        half_logits = []
        for unary_part, part in zip(unary.split(chunk), points.split(chunk)):
            kernels = _gaussian(part)
            norm = kernels.sum(dim=1, keepdim=True).rsqrt()
            h = unary_part
            for _ in range(self.num_iters):
                s = h.tanh()
                # Cells as rows: with the symmetric kernel on the right a CPU is faster.
                bilateral = norm * ((s.flatten(1)[:, None] * norm) @ kernels)
                h = unary_part + self.bilateral_compat / 2 * bilateral.view_as(s)
                h = h + over_rows @ s @ over_columns
            half_logits.append(h)
        return (2 * torch.cat(half_logits)).sigmoid()


def _import_pydensecrf():
    # Not at the top of the file: only one backend needs the package, and it needs a compiler.
    try:
        import pydensecrf.densecrf as crf
    except ImportError as e:
        raise ImportError('CRF.BACKEND "pydensecrf" needs: pip install pydensecrf2') from e
    return crf


def _gaussian(points: torch.Tensor) -> torch.Tensor:
    # exp(-|p_i - p_j|^2 / 2), (..., n, d) -> (..., n, n), with |a - b|^2 = |a|^2 + |b|^2 - 2 a b.
    # That cancels: centred, points are short, and lose less.
    points = points - points.mean(dim=-2, keepdim=True)
    halves = points.square().sum(dim=-1, keepdim=True) / -2
    ones = torch.ones_like(halves)
    left = torch.cat([points, halves, ones], dim=-1)
    right = torch.cat([points, ones, halves], dim=-1)
    return (left @ right.transpose(-1, -2)).clamp_(_MIN_EXPONENT, 0).exp_()


def _normalize(kernels: torch.Tensor) -> torch.Tensor:
    norm = kernels.sum(dim=-1).rsqrt()
    return kernels * norm[..., None] * norm[..., None, :]
