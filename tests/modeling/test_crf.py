"""The CRF against its equations in float64, and how far its two backends agree."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from torch.nn import functional as F

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling import DenseCRF, crf


def crf_settings(**values):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    for key, value in values.items():
        cfg.MODEL.PSEUDO_MASK.CRF[key] = value
    return cfg.MODEL.PSEUDO_MASK.CRF


def smooth(seed, num_rois, side):
    """Probabilities and colours with some structure, as crops of photographs have."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.randn(num_rois, 1, 4, 4, generator=rng) * 2
    probs = F.interpolate(small, size=(side, side), mode="bilinear").sigmoid()[:, 0]
    colors = torch.rand(num_rois, 3, 5, 5, generator=rng) * 255
    rois = F.interpolate(colors, size=(side, side), mode="bilinear")
    return probs, rois + 4 * torch.randn(rois.shape, generator=rng)


@pytest.mark.parametrize("side", [8, 14, 28])
def test_backends_agree_on_small_crops(side):
    pytest.importorskip("pydensecrf.densecrf", reason="needs the optional package pydensecrf2")
    probs, rois = smooth(5, 20, side)
    exact = DenseCRF(backend="torch")(probs, rois)
    lattice = DenseCRF(backend="pydensecrf")(probs, rois)
    # Both are far from what they started from, and near one another: measured 0.015 to 0.030
    # between them, and 0.970 to 0.986 of the labels.
    assert (exact - probs).abs().mean() > 0.1
    assert (exact - lattice).abs().mean() < 0.04
    assert ((exact >= 0.5) == (lattice >= 0.5)).float().mean() > 0.96


def reference(
    prob, rgb, iters=5, gaussian=(3.0, 3.0), bilateral_sxy=80.0, bilateral=(13.0, 10.0), floor=1e-5
):
    """One ROI, (H, W) and (3, H, W); ``gaussian`` and ``bilateral`` are (width, weight)."""
    prob, rgb = np.asarray(prob, float), np.asarray(rgb, float)
    height, width = prob.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    n = len(cells)
    position, color = np.zeros((n, n)), np.zeros((n, n))
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            position[i, j] = (x - u) ** 2 + (y - v) ** 2
            color[i, j] = sum((rgb[c, y, x] - rgb[c, v, u]) ** 2 for c in range(3))
    kernels = [
        (gaussian[1], np.exp(-position / (2 * gaussian[0] ** 2))),
        (
            bilateral[1],
            np.exp(-position / (2 * bilateral_sxy**2) - color / (2 * bilateral[0] ** 2)),
        ),
    ]
    labels = np.stack([1 - prob.ravel(), prob.ravel()])
    unary = -np.log(np.clip(labels, floor, 1))

    def softmax(logits):
        e = np.exp(logits - logits.max(axis=0))
        return e / e.sum(axis=0)

    q = softmax(-unary)
    for _ in range(iters):
        logits = -unary
        for weight, kernel in kernels:
            rows = kernel.sum(axis=1)
            logits = logits + weight * q @ (kernel / np.sqrt(np.outer(rows, rows)))
        q = softmax(logits)
    return q[1].reshape(height, width)


def draw(seed, num_rois, height, width):
    """Probabilities, and smooth colours with whole values from 0 to 255."""
    rng = np.random.default_rng(seed)
    probs = torch.tensor(rng.uniform(0, 1, (num_rois, height, width)), dtype=torch.float32)
    ends = rng.integers(0, 256, (2, num_rois, 3, 1, 1))
    steps = np.linspace(0, 1, height * width).reshape(height, width)
    colors = ends[0] * steps + ends[1] * (1 - steps) + rng.normal(0, 10, (num_rois, 3, 1, width))
    return probs, torch.tensor(colors.round().clip(0, 255), dtype=torch.float32)


def assert_close(actual, expected, atol=2e-4):
    # Iterations multiply the rounding of float32, and CPUs round differently: up to 1e-5 on an
    # Intel Xeon, 5e-5 on an AMD EPYC. A weight or width that is wrong by 3 % makes 3e-4 to 8e-4.
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("height, width", [(6, 7), (8, 8), (9, 4), (1, 5), (1, 1)])
@pytest.mark.parametrize("iters", [0, 1, 5])
def test_equations(height, width, iters):
    probs, rois = draw(0, 3, height, width)
    refined = DenseCRF(num_iters=iters)(probs, rois)
    expected = [reference(p, rgb, iters) for p, rgb in zip(probs, rois)]
    assert refined.shape == probs.shape and refined.dtype == torch.float32
    assert_close(refined, expected)
    if iters == 5 and height > 1:
        # Neither of the kernels does nothing here.
        assert (
            np.abs(reference(probs[0], rois[0], 5, gaussian=(3.0, 0.0)) - expected[0]).max() > 0.01
        )
        assert np.abs(reference(probs[0], rois[0], 5, bilateral=(13, 0)) - expected[0]).max() > 0.01


def test_every_setting_reaches_its_place():
    probs, rois = draw(1, 2, 6, 7)
    keys = dict(NUM_ITERS=3, GAUSSIAN_SXY=1.3, GAUSSIAN_COMPAT=0.7, BILATERAL_SXY=2.1)
    keys |= dict(BILATERAL_SRGB=31.0, BILATERAL_COMPAT=1.9, BACKEND="torch")
    dense_crf = DenseCRF.from_config(crf_settings(**keys))
    refined = dense_crf(probs, rois)
    # Colours count in whole values, as an image has them.
    assert torch.equal(
        dense_crf(probs, rois.clamp(1, 254) + 0.3), dense_crf(probs, rois.clamp(1, 254))
    )
    expected = [reference(p, rgb, 3, (1.3, 0.7), 2.1, (31.0, 1.9)) for p, rgb in zip(probs, rois)]
    assert_close(refined, expected)


def test_probabilities_of_exactly_zero_and_one():
    _, rois = draw(4, 3, 6, 7)
    probs = torch.zeros(3, 6, 7)
    probs[1] = 1
    probs[2, :, :3] = 1
    refined = DenseCRF()(probs, rois)
    assert refined.isfinite().all()
    assert_close(refined, [reference(p, rgb) for p, rgb in zip(probs, rois)])
    assert refined[0].max() < 1e-5 and refined[1].min() > 1 - 1e-5
    # Eq. of the unary: clipped at 1e-5.
    np.testing.assert_allclose(DenseCRF(num_iters=0)(probs, rois)[0], 1e-5, rtol=1e-3)


def test_float32_under_autocast():
    probs, rois = draw(9, 2, 8, 8)
    expected = DenseCRF()(probs, rois)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (probs @ probs).dtype == torch.bfloat16
        assert torch.equal(DenseCRF()(probs, rois), expected)


def test_chunks_change_nothing_and_no_roi_is_none(monkeypatch):
    probs, rois = draw(7, 11, 8, 8)
    single = torch.cat([DenseCRF()(p[None], rgb[None]) for p, rgb in zip(probs, rois)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    # A kernel of 8 x 8 cells is 64^2 numbers of 4 bytes.
    for max_bytes in (0, 3 * 4 * 64**2, 1e9):
        monkeypatch.setattr(crf, "_MAX_KERNEL_BYTES", max_bytes)
        assert_close(DenseCRF()(probs, rois), single, 1e-6)
    assert DenseCRF()(probs[:0], rois[:0]).shape == (0, 8, 8)
