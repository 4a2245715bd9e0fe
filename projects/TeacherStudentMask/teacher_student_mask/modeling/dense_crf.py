"""Post-processing with a dense conditional random field, for ``PSEUDO_MASK.METHOD "crf"``."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from detectron2.config import CfgNode

from .mean_field import mean_field

__all__ = ["CRF_BACKENDS", "DenseCRF"]

CRF_BACKENDS = ("auto", "torch", "pydensecrf")

# "auto" on a CPU: the time of the exact kernels grows with the square of the cells, that of
# pydensecrf's lattice with the cells. The usual 28 x 28 are 784 cells, 56 x 56 are 3136.
_MAX_EXACT_CELLS = 1024


@dataclasses.dataclass(frozen=True)
class DenseCRF:
    """
    Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun, 2011) on each ROI.

    Two labels; the unary is -log of the clipped probability, the pairwise terms are a Gaussian
    over positions and a bilateral one over positions and colours, both Potts, with symmetric
    normalisation. "CRF" in Sec. 4.2 of the paper, which runs it with "default parameters"; the
    package pydensecrf has none, so these are the values of its README.

    The backends:

    * ``"torch"``: :func:`mean_field`, exact, all ROIs together, on the device of the input.
    * ``"pydensecrf"``: the reference implementation, which approximates the kernels on a
      permutohedral lattice. On the CPU, a ROI at a time: it holds Python's global lock while it
      computes, so threads would wait for one another.
    * ``"auto"``: "torch" on GPUs, and on CPUs up to 32 x 32 cells, about where the lattice
      becomes the faster one; above, "pydensecrf" if it is installed, else "torch".

    Attributes:
        num_iters: mean-field iterations.
        gaussian_sxy, gaussian_compat: width in ROI cells, and weight, of the position term.
        bilateral_sxy, bilateral_srgb, bilateral_compat: widths in ROI cells and in 0-255 colour
            values, and weight, of the colour term.
        backend: one of :data:`CRF_BACKENDS`.
        memory_mb: limit, in megabytes, to what the kernels of "torch" take at a time.

    Raises:
        ValueError: an unknown backend, a width that is not positive.
    """

    num_iters: int = 5
    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0
    backend: str = "auto"
    memory_mb: float = 256

    def __post_init__(self) -> None:
        if self.backend not in CRF_BACKENDS:
            raise ValueError(
                f"MODEL.PSEUDO_MASK.CRF.BACKEND is {self.backend!r}; allowed: "
                f"{', '.join(map(repr, CRF_BACKENDS))}."
            )
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"MODEL.PSEUDO_MASK.CRF.{name.upper()} is {getattr(self, name)!r}; it must be "
                    "above 0."
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseCRF:
        """
        Args:
            cfg: ``cfg.MODEL.PSEUDO_MASK.CRF``.

        Raises:
            ValueError: an unknown ``BACKEND``, a width that is not positive.
            ImportError: ``BACKEND`` is "pydensecrf", which is not installed.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "memory_mb"]
        crf = cls(**{name: cfg[name.upper()] for name in names})
        if crf.backend == "pydensecrf":
            _import_pydensecrf()
        return crf

    def __call__(self, probs: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Args:
            probs: shape (R, M, M), foreground probabilities.
            rois: shape (R, 3, M, M), RGB in 0-255: what each ROI looks like. Rounded to whole
                colour values, which is what pydensecrf takes.

        Returns:
            shape (R, M, M): foreground probabilities after the CRF, in the type and on the device
            of ``probs``, without gradient.

        Raises:
            ValueError: the two shapes do not belong together.
            ImportError: the backend is "pydensecrf", which is not installed.
        """
        num_rois, height, width = probs.shape
        if rois.shape != (num_rois, 3, height, width):
            raise ValueError(
                f"Probabilities of shape {tuple(probs.shape)} need colours of shape "
                f"{(num_rois, 3, height, width)}, got {tuple(rois.shape)}."
            )
        probs, rois = probs.detach(), rois.detach().round().clamp(0, 255)
        if self._is_exact(probs.device, height * width):
            names = [field.name for field in dataclasses.fields(self) if field.name != "backend"]
            return mean_field(probs, rois, **{name: getattr(self, name) for name in names}).to(
                probs.dtype
            )
        refined = [
            self._refine(prob, rgb)
            for prob, rgb in zip(
                probs.float().cpu().numpy(),
                rois.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy(),
            )
        ]
        return torch.from_numpy(np.stack(refined)).to(probs) if refined else probs

    def _is_exact(self, device: torch.device, num_cells: int) -> bool:
        """Whether this input is for "torch"."""
        if self.backend != "auto":
            return self.backend == "torch"
        if device.type != "cpu" or num_cells <= _MAX_EXACT_CELLS:
            return True
        try:
            _import_pydensecrf()
        except ImportError:
            return True
        return False

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
    # Not at the top of the file: only one backend needs the package, and it needs a compiler.
    try:
        import pydensecrf.densecrf as crf
    except ImportError as e:
        raise ImportError(
            'MODEL.PSEUDO_MASK.CRF.BACKEND "pydensecrf" needs the package: pip install pydensecrf2 '
            '(compiles, so it needs a C++ compiler). "auto" and "torch" do without.'
        ) from e
    return crf
