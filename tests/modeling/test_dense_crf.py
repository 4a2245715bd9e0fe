"""The CRF cleans masks along colours; without its package the error says what to do."""

import sys

import numpy as np
import pytest
import torch

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling import DenseCRF


def crf_settings(backend="pydensecrf"):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.MODEL.PSEUDO_MASK.CRF.BACKEND = backend
    return cfg.MODEL.PSEUDO_MASK.CRF


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pip install pydensecrf2"):
        DenseCRF.from_config(crf_settings())


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="BACKEND is 'cuda'; allowed: 'pydensecrf'"):
        DenseCRF.from_config(crf_settings("cuda"))


@pytest.fixture
def crf():
    pytest.importorskip("pydensecrf.densecrf", reason="needs the optional package pydensecrf2")
    return DenseCRF.from_config(crf_settings())


def two_colours(side=28):
    """Left half red, right half blue, as a (1, 3, side, side) RGB image."""
    image = torch.zeros(1, 3, side, side)
    image[:, 0, :, : side // 2] = 255
    image[:, 2, :, side // 2 :] = 255
    return image


def test_defaults_are_the_documented_ones(crf):
    assert crf == DenseCRF(5, 3.0, 3.0, 80.0, 13.0, 10.0)


def test_a_noisy_mask_snaps_to_the_colours(crf):
    truth = torch.zeros(1, 28, 28)
    truth[:, :, :14] = 1
    noise = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
    probs = torch.where(noise < 0.25, 1 - truth, truth) * 0.6 + 0.2
    assert ((probs >= 0.5) != truth.bool()).float().mean() > 0.2
    refined = crf(probs, two_colours())
    assert ((refined >= 0.5) != truth.bool()).float().mean() < 0.01


def test_output_is_probabilities_of_the_same_shape_without_gradient(crf):
    probs = torch.rand(3, 28, 28, requires_grad=True)
    refined = crf(probs, torch.rand(3, 3, 28, 28) * 255)
    assert refined.shape == probs.shape and refined.dtype == probs.dtype
    assert not refined.requires_grad
    assert (0 <= refined).all() and (refined <= 1).all()


def test_no_roi(crf):
    assert crf(torch.zeros(0, 28, 28), torch.zeros(0, 3, 28, 28)).shape == (0, 28, 28)


def test_agrees_with_exact_mean_field_where_the_position_kernel_decides(crf):
    """One iteration without colours, against the equations of methods written out densely."""
    side = 12
    crf = DenseCRF(1, gaussian_sxy=2.0, gaussian_compat=3.0, bilateral_compat=0.0)
    probs = torch.rand(1, side, side, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    y, x = np.mgrid[:side, :side]
    points = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    kernel = np.exp(-squared / (2 * 2.0**2))
    rows = kernel.sum(1)
    kernel = kernel / np.sqrt(rows[:, None] * rows[None])
    q = np.stack([1 - probs[0].numpy().ravel(), probs[0].numpy().ravel()])
    logits = np.log(q) + 3.0 * q @ kernel
    expected = 1 / (1 + np.exp(logits[0] - logits[1]))
    refined = crf(probs, torch.zeros(1, 3, side, side))[0].numpy().ravel()
    # The package filters on a permutohedral lattice, which only approximates the kernel.
    assert np.abs(refined - expected).mean() < 0.05
    assert np.corrcoef(refined, expected)[0, 1] > 0.95
