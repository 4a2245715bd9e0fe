"""Paths of SVG have the form of the mask that they draw."""

import re

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from pages.svg_shapes import polygons_to_path, rle_to_path


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def subpaths(path):
    assert re.fullmatch(r"(M[-\d. L]+Z)*", path)
    return [
        [tuple(map(float, point.split())) for point in part.split("L")]
        for part in re.findall(r"M([^Z]*)Z", path)
    ]


def rasterize(path, shape, factor=8):
    """Pixels whose middle lies inside by the rule "evenodd", on a finer grid."""
    canvas = np.zeros([n * factor for n in shape], np.uint8)
    for points in subpaths(path):
        part = np.zeros_like(canvas)
        # Coordinates of pixels' middles; the contour itself belongs to the shape.
        fine = np.round(np.array(points) * factor - 0.5).astype(np.int32)
        cv2.fillPoly(part, [fine], 1)
        canvas ^= part
    middle = factor // 2
    return canvas[middle::factor, middle::factor].astype(bool)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(bool, (7, 9)))
def test_rle_paths_fill_exactly_the_mask(mask):
    path = rle_to_path(encode(mask))
    assert (rasterize(path, mask.shape) == mask).all()


@pytest.mark.parametrize("pixels", [(slice(2, 3), slice(1, 2)), (slice(4, 5), slice(0, 9))])
def test_single_pixels_and_lines_have_an_area(pixels):
    mask = np.zeros((7, 9), bool)
    mask[pixels] = True
    ((points),) = subpaths(rle_to_path(encode(mask)))
    x, y = np.array(points).T
    # A quarter of a pixel from each edge, but for rounding.
    assert x.max() - x.min() == pytest.approx(mask.any(0).sum() - 0.5, abs=0.11)
    assert y.max() - y.min() == pytest.approx(0.5, abs=0.11)
    rows, columns = mask.nonzero()
    assert (x.mean(), y.mean()) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))


def test_empty_mask_has_no_path():
    assert rle_to_path(encode(np.zeros((4, 5), bool))) == ""


def test_polygons_keep_their_points():
    polygons = [(0, 1.25, 10.0, 2.349, 5, 7), (20, 20, 30, 20, 25, 31.5)]
    assert polygons_to_path(polygons) == "M0 1.2L10 2.3L5 7ZM20 20L30 20L25 31.5Z"
    assert polygons_to_path([]) == ""
