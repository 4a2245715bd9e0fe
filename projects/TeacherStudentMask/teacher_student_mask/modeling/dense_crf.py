"""Post-processing with a dense conditional random field, for ``PSEUDO_MASK.METHOD "crf"``."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from detectron2.config import CfgNode

__all__ = ["DenseCRF"]


@dataclasses.dataclass(frozen=True)
class DenseCRF:
    """
    Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun, 2011), a ROI at a time.

    Two labels; the unary is -log of the clipped probability, the pairwise terms are a Gaussian
    over positions and a bilateral one over positions and colours, both Potts, with symmetric
    normalisation. "CRF" in Sec. 4.2 of the paper, which runs it with "default parameters"; the
    package has none, so these are the values of its README.

    Attributes:
        num_iters: mean-field iterations.
        gaussian_sxy, gaussian_compat: width in ROI cells, and weight, of the position term.
        bilateral_sxy, bilateral_srgb, bilateral_compat: widths in ROI cells and in 0-255 colour
            values, and weight, of the colour term.
    """

    num_iters: int = 5
    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseCRF:
        """
        Args:
            cfg: ``cfg.MODEL.PSEUDO_MASK.CRF``.

        Raises:
            ValueError: an unknown ``BACKEND``.
            ImportError: pydensecrf is not installed.
        """
        if cfg.BACKEND != "pydensecrf":
            raise ValueError(
                f"MODEL.PSEUDO_MASK.CRF.BACKEND is {cfg.BACKEND!r}; allowed: 'pydensecrf'."
            )
        _import_pydensecrf()
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: cfg[name.upper()] for name in names})

    def __call__(self, probs: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            probs: shape (R, M, M), foreground probabilities.
            rois: shape (R, 3, M, M), RGB in 0-255: what each ROI looks like.

        Returns:
            shape (R, M, M): foreground probabilities after the CRF, without gradient.
        """
        refined = [
            self._refine(p, rgb)
            for p, rgb in zip(
                probs.detach().float().cpu().numpy(),
                rois.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8).cpu().numpy(),
            )
        ]
        if not refined:
            return probs.detach()
        return torch.from_numpy(np.stack(refined)).to(probs)

    def _refine(self, prob: np.ndarray, rgb: np.ndarray) -> np.ndarray:
        crf = _import_pydensecrf()
        height, width = prob.shape
        model = crf.DenseCRF2D(width, height, 2)
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


def _import_pydensecrf():
    # Not at the top of the file: the package needs a compiler and only "crf" needs the package.
    try:
        import pydensecrf.densecrf as crf
    except ImportError as e:
        raise ImportError(
            'MODEL.PSEUDO_MASK.METHOD "crf" needs pydensecrf: pip install pydensecrf2 '
            "(compiles, so it needs a C++ compiler). The other methods do not."
        ) from e
    return crf
