"""Masks from files as RLE: against pycocotools on masks, and against runs written out by hand."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.analysis import rle as rle_module
from teacher_student_mask.analysis.input_checks import InputError, InputFile
from teacher_student_mask.analysis.rle import check_rles, compress_mask
from teacher_student_mask.checks.mask_measures import MAX_PIXELS

FILE = InputFile("masks.json", None)


def check(counts, sizes):
    return check_rles(FILE, counts, sizes, "entry {}".format)


def to_text(runs):
    """Encode any run lengths, also such as no mask has, the way pycocotools encodes a mask's."""
    text = ""
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        is_last = False
        while not is_last:
            bits, number = number & 31, number >> 5
            is_last = number == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if is_last else 32))
    return text.encode()


def to_mask(runs, size):
    """The mask of shape (height, width); runs go down the columns and begin with background."""
    return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(size, order="F")


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def masks(draw):
    size = draw(sizes)
    bits = draw(st.lists(st.booleans(), min_size=size[0] * size[1], max_size=size[0] * size[1]))
    return np.array(bits, dtype=np.uint8).reshape(size)


@given(st.lists(masks(), min_size=1, max_size=8), st.sampled_from([1, 10, 2**18]))
@settings(max_examples=150, deadline=None)
def test_masks_of_pycocotools_pass_unchanged(some_masks, chunk_bytes):
    counts = [mask_util.encode(np.asfortranarray(x))["counts"] for x in some_masks]
    given_counts = list(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rle_module, "_CHUNK_BYTES", chunk_bytes)
        areas = check(counts, [list(x.shape) for x in some_masks])
    assert areas.tolist() == [int(x.sum()) for x in some_masks]
    # Not even encoded again, which would take long for the many masks of a file.
    assert all(x is y for x, y in zip(counts, given_counts))


@st.composite
def runs_of_a_size(draw):
    """A size, and runs of which most have its sum, some a wrong one or a negative run."""
    size = draw(sizes)
    num_pixels = size[0] * size[1]
    cuts = sorted(draw(st.lists(st.integers(0, num_pixels), max_size=12)))
    runs = np.diff([0, *cuts, num_pixels]).tolist()
    if draw(st.booleans()):
        i, j = draw(st.integers(0, len(runs) - 1)), draw(st.integers(0, len(runs) - 1))
        amount = draw(st.integers(-200, 200))
        runs[i] += amount
        runs[j] -= draw(st.sampled_from([amount, 0]))
    return list(size), runs


@given(st.lists(runs_of_a_size(), min_size=1, max_size=6))
@settings(max_examples=400, deadline=None)
def test_runs_are_accepted_if_they_fill_the_image_and_are_not_negative(cases):
    counts = [to_text(runs) for _, runs in cases]
    shapes = [size for size, _ in cases]
    is_good = [min(runs) >= 0 and sum(runs) == size[0] * size[1] for size, runs in cases]
    if not all(is_good):
        with pytest.raises(InputError, match=rf"masks.json: entry {is_good.index(False)}: "):
            check(counts, shapes)
        return
    areas = check(counts, shapes)
    for (size, runs), mask_counts, area in zip(cases, counts, areas):
        expected = to_mask(runs, size)
        assert area == expected.sum()
        assert mask_counts == mask_util.encode(np.asfortranarray(expected))["counts"]


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_mask_or_an_error(counts, width):
    shapes = [[3, width]] * len(counts)
    try:
        areas = check(counts, shapes)
    except InputError:
        return
    for mask_counts, area in zip(counts, areas):
        assert mask_util.decode({"size": [3, width], "counts": mask_counts}).sum() == area


@given(st.lists(st.text([chr(x) for x in range(48, 112)], max_size=6), max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_text_of_the_alphabet_is_a_mask_or_an_error(texts):
    counts = [x.encode() for x in texts] + [to_text([4, 5])]
    try:
        areas = check(counts, [[3, 3]] * len(counts))
    except InputError:
        return
    for mask_counts, area in zip(counts, areas):
        assert mask_util.decode({"size": [3, 3], "counts": mask_counts}).sum() == area


def test_numbers_of_one_to_six_characters():
    # 2^29 - 1 pixels: 233 x 2304167; the runs grow and shrink by powers of two.
    size = [233, 2304167]
    runs = [0, 1, 2, 16, 500, 2**13, 2**10, 2**20, 3, 2**26, 2**24, 2**28, 1]
    runs.append(MAX_PIXELS - 1 - sum(runs))
    counts = [to_text(runs), to_text([MAX_PIXELS - 1]), to_text([0, MAX_PIXELS - 1])]
    rles = [{"size": size, "counts": x} for x in counts]
    areas = check(counts, [size] * 3)
    assert areas.tolist() == mask_util.area(rles).tolist()
    assert areas.tolist() == [sum(runs[1::2]), 0, MAX_PIXELS - 1]


@pytest.mark.parametrize(
    "counts, problem",
    [
        (b"", "is empty"),
        (b"41P", "ends in the middle of a number"),
        (b"4 5", "has the byte 32 at position 1; allowed: 48 to 111 (0 to o)"),
        ("4\xe95".encode(), "has the byte 195 at position 1; allowed: 48 to 111 (0 to o)"),
        (b"4\x005", "has the byte 0 at position 1; allowed: 48 to 111 (0 to o)"),
        (b"PPPPPP0", "has a number of more than 6 characters at position 6"),
        (to_text([8, -2, 3]), "has a run of -2 pixels; allowed: 0 to 9"),
        (to_text([4, 4]), "has runs of 8 pixels in all; allowed: height x width, 9"),
        (to_text([4, 6]), "has runs of 10 pixels in all; allowed: height x width, 9"),
        # 2^32 more than allowed, as 32-bit integers would count it.
        (to_text([2**29 - 1] * 8 + [17]), "has runs of 4294967305 pixels in all"),
    ],
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_broken_rle(counts, problem, position):
    good = to_text([4, 5])
    all_counts = [good, good]
    all_counts.insert(position, counts)
    with pytest.raises(InputError) as error:
        check(all_counts, [[3, 3]] * 3)
    expected = f'masks.json: entry {position}: "segmentation": "counts" {problem}'
    assert str(error.value).startswith(expected)


def test_bytes_beyond_the_alphabet_that_would_fill_the_image():
    # pycocotools looks at six bits of a byte: t, beyond the last one allowed, reads as 4.
    for text in (b"t0", b"tP1", b"4t0", b"t"):
        for num_pixels in range(1, 2000):
            with pytest.raises(InputError, match="has the byte 116 at position"):
                check([text], [[1, num_pixels]])


def test_runs_of_length_zero_no_longer_end_the_comparison_of_two_masks():
    # pycocotools stops where both masks have a run of length 0 and forgets what follows.
    size = [4, 4]
    counts = [to_text([2, 3, 0, 4, 3, 4]), to_text([2, 3, 0, 4, 7])]
    assert check(counts, [size, size]).tolist() == [11, 7]
    first, second = ({"size": size, "counts": x} for x in counts)
    np.testing.assert_allclose(mask_util.iou([first], [second], [0]), [[7 / 11]])
    assert counts == [to_text([2, 7, 3, 4]), to_text([2, 7, 7])]


def test_a_run_of_length_zero_at_the_end_is_taken_out():
    counts = [to_text([9, 0]), to_text([0, 9, 0])]
    assert check(counts, [[3, 3]] * 2).tolist() == [0, 9]
    assert counts == [to_text([9]), to_text([0, 9])]


def test_no_masks():
    assert check([], []).shape == (0,)


def test_polygons_become_the_union_of_their_pixels():
    # Columns 1 and 2 of rows 0 to 3, and columns 4 and 5 of row 2.
    polygons = [[1, 0, 3, 0, 3, 4, 1, 4], [4, 2, 6, 2, 6, 3, 4, 3], [5, 5, 5, 5]]
    counts, num_dropped = compress_mask(polygons, [5, 7])
    expected = np.zeros((5, 7), dtype=np.uint8)
    expected[0:4, 1:3] = expected[2, 4:6] = 1
    assert (mask_util.decode({"size": [5, 7], "counts": counts}) == expected).all()
    assert num_dropped == 1


def test_both_kinds_of_rle():
    runs = [2, 3, 1, 6]
    expected = to_text(runs)
    assert compress_mask({"size": [3, 4], "counts": expected.decode()}, [3, 4]) == (expected, 0)
    assert compress_mask({"size": [3.0, 4], "counts": runs}, [3, 4]) == (expected, 0)


@pytest.mark.parametrize(
    "segmentation, problem",
    [
        (None, '"segmentation" is None; allowed: a list of polygons'),
        ("abc", "\"segmentation\" is 'abc'; allowed: a list of polygons"),
        ([1, 2, 3, 4, 5, 6], '"segmentation" is [1, 2, 3, 4, 5, 6]; allowed: a list of polygons'),
        ([], '"segmentation" is []; allowed: at least one polygon of 6 numbers'),
        ([[]], '"segmentation" is [[]]; allowed: at least one polygon of 6 numbers'),
        ([[1, 2, 3, 4]], "allowed: at least one polygon of 6 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "allowed: an even number of finite numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "allowed: an even number of finite numbers"),
        ([[1, 2, 3, 4, 5, 6, 7, 8, float("nan"), 9]], "from -100004 to 100004 (not nan)"),
        ([[1, 2, 3, 4, 5, float("-inf")]], "(not -inf)"),
        ([[1, 2, 3, 4, 5, 100005]], "(not 100005)"),
        ([[1, 2, 3, 4, 5, True]], "(not True)"),
        ({"size": [3, 4]}, '"segmentation": "counts" is None; allowed: a string, or a list'),
        ({"size": [3, 4], "counts": 5}, '"counts" is 5; allowed: a string, or a list'),
        ({"size": [3, 4], "counts": []}, '"counts" is []; allowed: a string, or a list'),
        ({"size": [3, 4], "counts": [5, -1, 8]}, "run lengths from 0 to 12"),
        ({"size": [3, 4], "counts": [5, 13]}, "run lengths from 0 to 12"),
        ({"size": [3, 4], "counts": [5, 7.0]}, "run lengths from 0 to 12"),
        ({"size": [3, 4], "counts": [5, float("nan")]}, "run lengths from 0 to 12"),
        (
            {"size": [4, 3], "counts": "57"},
            '"segmentation": "size" is [4, 3]; allowed: [height, width] of its image, [3, 4]',
        ),
        ({"size": 12, "counts": "57"}, '"size" is 12; allowed: [height, width] of its image'),
        ({"counts": "57"}, '"size" is None; allowed: [height, width] of its image, [3, 4]'),
    ],
)
def test_what_is_no_mask(segmentation, problem):
    with pytest.raises(ValueError) as error:
        compress_mask(segmentation, [3, 4])
    assert problem in str(error.value)


def test_text_that_is_not_ascii_is_an_error_and_not_a_mask():
    for text in ("5\u0667", "5\ud800"):
        counts, _ = compress_mask({"size": [3, 4], "counts": text}, [3, 4])
        with pytest.raises(InputError, match="entry 0: .* has the byte .* at position 1"):
            check([counts], [[3, 4]])
