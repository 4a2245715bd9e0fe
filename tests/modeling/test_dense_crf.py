"""The CRF cleans masks along colours; which backend does it, and how far the two agree."""

import dataclasses
import json
import os
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image
from torch.nn import functional as F

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling import DenseCRF
from teacher_student_mask.modeling.mean_field import mean_field


def crf_settings(**values):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    for key, value in values.items():
        cfg.MODEL.PSEUDO_MASK.CRF[key] = value
    return cfg.MODEL.PSEUDO_MASK.CRF


@pytest.fixture
def without_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)


@pytest.fixture
def with_package():
    pytest.importorskip("pydensecrf.densecrf", reason="needs the optional package pydensecrf2")


@pytest.fixture(params=["torch", "pydensecrf"])
def crf(request):
    if request.param == "pydensecrf":
        request.getfixturevalue("with_package")
    return DenseCRF.from_config(crf_settings(BACKEND=request.param))


def two_colours(side=28):
    """Left half red, right half blue, as a (1, 3, side, side) RGB image."""
    image = torch.zeros(1, 3, side, side)
    image[:, 0, :, : side // 2] = 255
    image[:, 2, :, side // 2 :] = 255
    return image


def smooth(seed, num_rois, side):
    """Probabilities and colours with some structure, as crops of photographs have."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.randn(num_rois, 1, 4, 4, generator=rng) * 2
    probs = F.interpolate(small, size=(side, side), mode="bilinear").sigmoid()[:, 0]
    colors = torch.rand(num_rois, 3, 5, 5, generator=rng) * 255
    rois = F.interpolate(colors, size=(side, side), mode="bilinear")
    return probs, rois + 4 * torch.randn(rois.shape, generator=rng)


def test_without_the_package_the_error_says_how_to_get_it(without_package):
    with pytest.raises(
        ImportError, match='"pydensecrf" needs the package: pip install pydensecrf2'
    ):
        DenseCRF.from_config(crf_settings(BACKEND="pydensecrf"))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("side", [28, 40])
def test_other_backends_do_without_the_package(without_package, backend, side):
    probs, rois = smooth(0, 2, side)
    rois = rois.clamp(0, 255).round()
    refined = DenseCRF.from_config(crf_settings(BACKEND=backend))(probs, rois)
    assert torch.equal(refined, mean_field(probs, rois))


def test_auto_takes_the_lattice_for_large_grids_only(with_package):
    for side, backend in [(32, "torch"), (33, "pydensecrf")]:
        probs, rois = smooth(1, 1, side)
        refined = DenseCRF(backend="auto")(probs, rois)
        other = {"torch": "pydensecrf", "pydensecrf": "torch"}[backend]
        assert torch.equal(refined, DenseCRF(backend=backend)(probs, rois))
        assert not torch.equal(refined, DenseCRF(backend=other)(probs, rois))


def test_unknown_backend_is_named():
    message = "BACKEND is 'cuda'; allowed: 'auto', 'torch', 'pydensecrf'"
    with pytest.raises(ValueError, match=message):
        DenseCRF.from_config(crf_settings(BACKEND="cuda"))


@pytest.mark.parametrize("name", ["GAUSSIAN_SXY", "BILATERAL_SXY", "BILATERAL_SRGB"])
@pytest.mark.parametrize("value", [0.0, -3.0, float("nan")])
def test_widths_are_positive(name, value):
    with pytest.raises(ValueError, match=f"CRF.{name} is {value}; it must be above 0"):
        DenseCRF.from_config(crf_settings(BACKEND="torch", **{name: value}))


def test_defaults_are_the_documented_ones():
    assert DenseCRF() == DenseCRF(5, 3.0, 3.0, 80.0, 13.0, 10.0, "auto", 256)
    settings = crf_settings(BACKEND="auto")
    assert DenseCRF.from_config(settings) == DenseCRF()


def test_every_key_arrives():
    values = dict(
        NUM_ITERS=2,
        GAUSSIAN_SXY=1.5,
        GAUSSIAN_COMPAT=2.5,
        BILATERAL_SXY=4.5,
        BILATERAL_SRGB=5.5,
        BILATERAL_COMPAT=6.5,
        BACKEND="torch",
    )
    crf = DenseCRF.from_config(crf_settings(**values))
    assert dataclasses.astuple(crf) == (*values.values(), 256)
    probs, rois = smooth(2, 2, 14)
    arguments = {key.lower(): value for key, value in values.items() if key != "BACKEND"}
    expected = mean_field(probs, rois.round().clamp(0, 255), **arguments)
    assert torch.equal(crf(probs, rois), expected)


def test_memory_budget_is_passed_on(monkeypatch):
    budgets = []

    def watch(probs, rois, memory_mb, **kwargs):
        budgets.append(memory_mb)
        return probs

    monkeypatch.setattr("teacher_student_mask.modeling.dense_crf.mean_field", watch)
    DenseCRF(backend="torch", memory_mb=0.5)(*smooth(2, 5, 14))
    assert budgets == [0.5]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_type_of_the_probabilities(crf, dtype):
    probs, rois = (x.to(dtype) for x in smooth(3, 2, 14))
    refined = crf(probs, rois)
    assert refined.dtype == dtype
    torch.testing.assert_close(refined, crf(probs.float(), rois.float()).to(dtype))


def test_colors_are_rounded_to_the_values_of_an_image(crf):
    probs, rois = smooth(4, 2, 14)
    rois = rois.round()
    rois[:, :, 0, 0], rois[:, :, 1, 1] = 0, 255
    rois = rois.clamp(0, 255)
    shifted = rois + 0.3
    shifted[:, :, 0, 0], shifted[:, :, 1, 1] = -20, 300
    assert torch.equal(crf(probs, shifted), crf(probs, rois))


def test_no_roi(crf):
    assert crf(torch.zeros(0, 28, 28), torch.zeros(0, 3, 28, 28)).shape == (0, 28, 28)


def test_shapes_that_do_not_belong_together(crf):
    with pytest.raises(ValueError, match=r"\(2, 3, 28, 28\), got \(1, 3, 28, 28\)"):
        crf(torch.rand(2, 28, 28), torch.rand(1, 3, 28, 28))


def test_agrees_with_exact_mean_field_where_the_position_kernel_decides(crf):
    """One iteration without colours, against the equations of methods written out densely."""
    side = 12
    crf = DenseCRF(1, 2.0, 3.0, bilateral_compat=0.0, backend=crf.backend)
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
    # pydensecrf filters on a permutohedral lattice, which only approximates the kernel.
    assert np.abs(refined - expected).mean() < (0.05 if crf.backend == "pydensecrf" else 1e-6)
    assert np.corrcoef(refined, expected)[0, 1] > 0.95


@pytest.mark.parametrize("side", [8, 14, 28])
def test_backends_agree_on_small_crops(with_package, side):
    probs, rois = smooth(5, 20, side)
    exact = DenseCRF(backend="torch")(probs, rois)
    lattice = DenseCRF(backend="pydensecrf")(probs, rois)
    # Both are far from what they started from, and near one another: measured 0.015 to 0.030
    # between them, and 0.970 to 0.986 of the labels.
    assert (exact - probs).abs().mean() > 0.1
    assert (exact - lattice).abs().mean() < 0.04
    assert ((exact >= 0.5) == (lattice >= 0.5)).float().mean() > 0.96


def coco_crops(root, num_objects, side=28):
    """Objects of COCO, cut out by Pillow: distorted true masks and colours."""
    with open(os.path.join(root, "annotations", "instances_val2017.json")) as f:
        data = json.load(f)
    images = {x["id"]: x for x in data["images"]}
    objects = [
        x
        for x in data["annotations"]
        if not x["iscrowd"] and min(x["bbox"][2:]) >= side and isinstance(x["segmentation"], list)
    ]
    masks, rois = [], []
    for x in objects[:num_objects]:
        image = images[x["image_id"]]
        size = image["height"], image["width"]
        rle = mask_util.merge(mask_util.frPyObjects(x["segmentation"], *size))
        left, top, width, height = x["bbox"]
        box = (left, top, left + width, top + height)
        options = dict(size=(side, side), resample=Image.Resampling.BOX, box=box)
        mask = Image.fromarray(255 * mask_util.decode(rle)).resize(**options)
        with Image.open(os.path.join(root, "val2017", image["file_name"])) as pixels:
            rois.append(np.asarray(pixels.convert("RGB").resize(**options)).transpose(2, 0, 1))
        masks.append(np.asarray(mask) / 255)
    masks = torch.tensor(np.stack(masks), dtype=torch.float32)[:, None]
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(len(masks), 1, 7, 7, generator=rng)
    noise = F.interpolate(noise, size=(side, side), mode="bilinear")
    blurred = F.avg_pool2d(masks, 5, stride=1, padding=2, count_include_pad=False)
    probs = (8 * (blurred - 0.5) + 1.5 * noise).sigmoid()
    return probs[:, 0], torch.tensor(np.stack(rois), dtype=torch.float32)


def test_backends_agree_on_coco(with_package, coco_root):
    probs, rois = coco_crops(coco_root, 60)
    exact = DenseCRF(backend="torch")(probs, rois)
    lattice = DenseCRF(backend="pydensecrf")(probs, rois)
    same = ((exact >= 0.5) == (lattice >= 0.5)).float().mean(dim=(1, 2))
    changed = ((exact >= 0.5) != (probs >= 0.5)).float().mean()
    assert len(probs) == 60 and changed > 0.03
    # Measured: 0.993 of the labels, 0.971 in the worst crop, and 0.007.
    assert same.mean() > 0.985 and same.min() > 0.94
    assert (exact - lattice).abs().mean() < 0.015
