"""Lab colours against published values and scikit-image; crops against loops over cells."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes

from teacher_student_mask.modeling.lab_color import crop_lab, rgb_to_lab


def lab_of(*colors, dtype=torch.float32):
    """Lab of a list of RGB colours, one row each."""
    image = torch.tensor(colors, dtype=dtype).T.reshape(1, 3, 1, -1)
    return rgb_to_lab(image)[0, :, 0].T


@pytest.mark.parametrize(
    "rgb, lab",
    [
        # As in published tables for sRGB under D65, which round to 2 digits.
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        # Dark grey, linear on both curves: 116 * 7.787 * (5 / 255 / 12.92) = 1.371.
        ((5, 5, 5), (1.371, 0, 0)),
        # ((119 / 255 + 0.055) / 1.055) ** 2.4 = 0.1845; 116 * 0.1845 ** (1 / 3) - 16 = 50.03.
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_known_colors(rgb, lab):
    np.testing.assert_allclose(lab_of(rgb)[0], lab, atol=0.011)


def test_every_image_and_pixel_is_converted_by_itself():
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 255
    lab = rgb_to_lab(pixels)
    assert lab.shape == pixels.shape
    for n, y, x in [(0, 0, 0), (0, 3, 1), (1, 2, 4)]:
        torch.testing.assert_close(lab[n, :, y, x], lab_of(pixels[n, :, y, x].tolist())[0])


def test_scikit_image_agrees():
    color = pytest.importorskip("skimage.color", reason="needs scikit-image")
    rng = np.random.default_rng(0)
    # Dark colours too, for the linear pieces, and all corners of the cube.
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), axis=-1).reshape(-1, 3)
    rgb = np.concatenate([rng.uniform(0, 255, (500, 3)), rng.uniform(0, 25, (200, 3)), corners])
    expected = color.rgb2lab(rgb[None] / 255, illuminant="D65", observer="2")[0]
    np.testing.assert_allclose(lab_of(*rgb.tolist()), expected, atol=1e-3)
    np.testing.assert_allclose(lab_of(*rgb.tolist(), dtype=torch.float64), expected, atol=1e-6)


def test_values_beyond_the_range_count_as_its_ends():
    expected = lab_of([0, 255, 255])
    assert torch.equal(lab_of([-3.0, 255.001, 300.0]), expected)


def test_result_has_no_gradient_and_half_precision_becomes_single():
    pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
    assert not rgb_to_lab(pixels).requires_grad
    assert rgb_to_lab(torch.ones(1, 3, 2, 2, dtype=torch.float16)).dtype == torch.float32


def test_autocast_changes_nothing():
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    expected = rgb_to_lab(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rgb_to_lab(pixels), expected)


RED, BLUE = (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)


def two_images():
    """A red one, and one that is red in the left half and blue in the right one; 32 x 64."""
    pixels = torch.tensor(RED).reshape(1, 3, 1, 1).repeat(2, 1, 32, 64)
    pixels[1, :, :, 32:] = torch.tensor(BLUE).reshape(3, 1, 1)
    return pixels


def crop(pixels, boxes, sizes=((32, 64), (32, 64)), side=4, **kwargs):
    boxes = [Boxes(torch.tensor(b, dtype=torch.float32).reshape(-1, 4)) for b in boxes]
    return crop_lab(pixels, list(sizes), boxes, side, **kwargs)


def test_crops_are_the_colors_under_the_cells():
    # Each cell is 8 pixels wide: the second ROI has two red columns and two blue ones.
    lab, valid = crop(two_images(), [[[4, 4, 20, 20]], [[16, 0, 48, 32]]], bottom_rows=0)
    red, blue = lab_of(RED, BLUE)
    assert lab.shape == (2, 3, 4, 4) and valid.shape == (2, 4, 4)
    assert valid.dtype == torch.bool and valid.all()
    torch.testing.assert_close(lab[0], red[:, None, None].expand(3, 4, 4))
    # Cells next to the edge sample up to their border, where ROIAlign interpolates.
    torch.testing.assert_close(lab[1, :, :, 0], red[:, None].expand(3, 4))
    torch.testing.assert_close(lab[1, :, :, 3], blue[:, None].expand(3, 4))


def test_blocks_of_pixels_are_averaged_as_rgb():
    # Two black columns, two red ones: their mean is a dark red, not the mean of both in Lab.
    pixels = two_images()
    pixels[:, :, :, ::4] = pixels[:, :, :, 1::4] = 0
    lab, _ = crop(pixels, [[[0, 0, 16, 16]], []])
    expected = lab_of((127.5, 0.0, 0.0))[0]
    torch.testing.assert_close(lab[0], expected[:, None, None].expand(3, 4, 4))


def test_interpolation_is_in_lab():
    # Halfway between the centres of the last red and the first blue block.
    lab, _ = crop(two_images(), [[], [[31, 8, 33, 10]]], side=1)
    red, blue = lab_of(RED, BLUE)
    torch.testing.assert_close(lab[0, :, 0, 0], (red + blue) / 2)


def test_a_large_cell_is_averaged_in_lab():
    # One cell over two thirds of red and a third of blue; its centre is red.
    lab, _ = crop(two_images(), [[], [[0, 0, 48, 32]]], side=1)
    red, blue = lab_of(RED, BLUE)
    torch.testing.assert_close(lab[0, :, 0, 0], (2 * red + blue) / 3)


def test_sides_that_are_no_multiple_of_the_stride():
    pixels = two_images()[:, :, :30, :61]
    lab, valid = crop(pixels, [[[52, 20, 61, 30]], []], [(30, 61)] * 2, bottom_rows=0)
    expected = lab_of(RED)[0]
    assert valid.all()
    torch.testing.assert_close(lab[0], expected[:, None, None].expand(3, 4, 4))
    # The last column makes a block of its own, with its centre at 62; that before has it at 58.
    pixels[:, :, :, 60] = torch.tensor(BLUE).reshape(3, 1)
    lab, _ = crop(pixels, [[[60, 20, 61, 30]], []], [(30, 61)] * 2, side=1)
    red, blue = lab_of(RED, BLUE)
    torch.testing.assert_close(lab[0, :, 0, 0], red + (60.5 - 58) / 4 * (blue - red))


def valid_by_hand(box, height, width, side):
    x0, y0, x1, y1 = box
    valid = np.zeros((side, side), dtype=bool)
    for i in range(side):
        for j in range(side):
            x = x0 + (j + 0.5) * (x1 - x0) / side
            y = y0 + (i + 0.5) * (y1 - y0) / side
            valid[i, j] = 0 <= x < width and 0 <= y < height
    return valid


@pytest.mark.parametrize(
    "box", [[3, 2, 40, 28], [-2, -2, 12, 12], [-9, -7, 11, 9], [30, 10, 61, 35], [70, 3, 90, 9]]
)
def test_cells_outside_the_image_and_in_its_bottom_rows_are_not_valid(box):
    # The second image is padded from 24 x 50 pixels, and 5 rows are taken from its bottom.
    lab, valid = crop(two_images(), [[], [box]], [(32, 64), (24, 50)], side=7, bottom_rows=5)
    np.testing.assert_array_equal(valid[0], valid_by_hand(box, 24 - 5, 50, 7))
    assert lab.isfinite().all()


def test_bottom_rows_are_counted_in_the_original_image():
    # Resized from 16 to 32 rows and from 64 to 32: 3 original rows are 6 and 1.5 rows.
    boxes = [[[0, 0, 32, 32]], [[0, 0, 32, 32]]]
    _, valid = crop(two_images(), boxes, side=32, bottom_rows=3, original_heights=[16, 64])
    assert valid.all(dim=2).sum(dim=1).tolist() == [26, 30]
    assert torch.equal(valid.all(dim=2), valid.any(dim=2))
    _, valid = crop(two_images(), boxes, side=32, bottom_rows=3)
    assert valid.all(dim=2).sum(dim=1).tolist() == [29, 29]


def test_ten_bottom_rows_are_the_default():
    _, valid = crop(two_images(), [[[0, 0, 32, 32]], []], side=32)
    assert valid[0, :, 0].tolist() == [True] * 22 + [False] * 10


def test_a_batch_without_rois_gives_empty_crops():
    lab, valid = crop(two_images(), [[], []])
    assert lab.shape == (0, 3, 4, 4) and valid.shape == (0, 4, 4) and valid.dtype == torch.bool


def test_crops_have_no_gradient_and_leave_the_pixels_alone():
    pixels = two_images().requires_grad_()
    before = pixels.detach().clone()
    lab, _ = crop(pixels, [[[0, 0, 16, 16]], []])
    assert not lab.requires_grad
    assert torch.equal(pixels, before)


def test_every_image_needs_its_boxes():
    with pytest.raises(ValueError, match="zip"):
        crop(two_images(), [[[0, 0, 16, 16]]])
