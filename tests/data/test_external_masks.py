"""Masks that a model made, through loader and mapper: apart from human ones, moved like them."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, polygons_to_bitmask

from teacher_student_mask import TeacherStudentDatasetMapper
from tests.data import test_dataset_mapper
from tests.data.test_dataset_mapper import (
    FORMATS,
    HEIGHT,
    WIDTH,
    annotation,
    make_mapper,
    to_bits,
    to_rle,
)
from tests.data.test_no_leak import is_same

make_image = test_dataset_mapper.make_image  # the fixture

SEEN, UNSEEN = 0, 10
KINDS = pytest.mark.parametrize("kind", ["polygon", "rle"])
# On pixel corners, so that all ways of drawing agree.
L_SHAPE = [2, 2, 8, 2, 8, 5, 5, 5, 5, 9, 2, 9]
BAR = [9, 3, 15, 3, 15, 6, 9, 6]


def draw(polygon):
    return polygons_to_bitmask([np.array(polygon, dtype=float)], HEIGHT, WIDTH)


def segmentation(polygon, kind):
    return [list(map(float, polygon))] if kind == "polygon" else to_rle(draw(polygon))


@pytest.fixture
def map_image(make_image):
    """Return ``map_(annotations, *args)``: the instances of an image; args of make_mapper."""

    def map_(annotations, *args, **options):
        image = make_image(annotations)
        before = copy.deepcopy(image)
        instances = make_mapper(*args, **options)(image)["instances"]
        assert image == before
        return instances

    return map_


def one_of_each(kind="polygon", human="polygon"):
    bar, shape = segmentation(BAR, kind), segmentation(L_SHAPE, kind)
    human_bar = segmentation(BAR, human)
    return [
        annotation(SEEN, (9, 3, 15, 6), segmentation=human_bar, mask_source="human"),
        annotation(SEEN, (2, 2, 8, 9), segmentation=shape, mask_source="model"),
        annotation(UNSEEN, (2, 2, 8, 9), segmentation=shape, mask_source="model"),
        annotation(UNSEEN, (9, 3, 15, 6), segmentation=bar),
        annotation(SEEN, (1, 1, 5, 5), segmentation=None, mask_source="model"),
    ]


@KINDS
@FORMATS
def test_a_models_mask_is_beside_the_human_ones(map_image, kind, mask_format):
    instances = map_image(one_of_each(kind), mask_format=mask_format)
    assert instances.gt_has_mask.tolist() == [True, False, False, False, False]
    assert instances.gt_has_model_mask.tolist() == [False, True, True, False, False]
    bits = to_bits(instances.gt_masks, instances)
    for row, polygon in enumerate((BAR, L_SHAPE, L_SHAPE, BAR, [1, 1, 5, 1, 5, 5, 1, 5])):
        np.testing.assert_array_equal(bits[row], draw(polygon))
    # No pixel of it is in what others read.
    np.testing.assert_array_equal(instances.gt_exclusion_masks.tensor.numpy(), draw(BAR))
    assert isinstance(instances.gt_masks, BitMasks) == ("rle" == kind or mask_format == "bitmask")


@KINDS
@FORMATS
def test_all_other_rows_are_the_same_without_it(map_image, kind, mask_format):
    augmentations = [
        T.CropTransform(3, 1, 11, 9),
        T.HFlipTransform(11),
        T.RotationTransform(9, 11, 8),
    ]
    # An RLE of a model makes bitmasks of the human polygons of its image, too.
    with_masks = one_of_each(kind, kind)
    without = [
        {**x, "segmentation": None} if x.get("mask_source") == "model" else x for x in with_masks
    ]
    options = {"mask_format": mask_format, "recompute_boxes": True}
    results = [map_image(x, augmentations, **options) for x in (with_masks, without)]
    is_model = results[0].gt_has_model_mask
    assert is_model.any() and not results[1].gt_has_model_mask.any()
    assert_same_fields(*(x[~is_model] for x in results))
    # Its object keeps its own box: recompute_boxes tightens boxes to human masks alone.
    assert torch.equal(*(x.gt_boxes.tensor for x in results))
    # And "ignore" is a json without it.
    ignoring = map_image(with_masks, augmentations, use_external_masks=False, **options)
    assert_same_fields(ignoring, results[1])


def assert_same_fields(first, second):
    first, second = first.get_fields(), second.get_fields()
    assert first.keys() == second.keys()
    assert [name for name, x in first.items() if not is_same(x, second[name])] == []


@KINDS
def test_where_a_crop_leaves_nothing_of_it_the_object_stays_with_its_box(map_image, kind):
    # The L has no pixel in this part of its box; a human mask would take the object with it.
    crop = [T.CropTransform(5, 5, 5, 5)]
    objects = one_of_each(kind)[1:3]
    instances = map_image(objects, crop, recompute_boxes=True)
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 3, 4]] * 2
    assert not instances.gt_has_model_mask.any()
    human = [{**objects[0], "mask_source": "human"}]
    assert len(map_image(human, crop)) == 0


def mark(*category_ids):
    def change(data):
        for x in data["annotations"]:
            if x["category_id"] in category_ids:
                x["mask_source"] = "model"

    return change


IGNORE = ["MODEL.PSEUDO_MASK.EXTERNAL", "ignore"]


@pytest.mark.parametrize(
    "opts, is_used",
    [
        ([], True),
        (["MODEL.PSEUDO_MASK.EXTERNAL", "mean"], True),
        (IGNORE, False),
        ([*IGNORE, "MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS", True], True),
    ],
)
def test_the_config_says_whether_they_are_used(tiny_cfg, make_tiny_coco, opts, is_used):
    dataset = make_tiny_coco(mark(17))
    mapper = TeacherStudentDatasetMapper(tiny_cfg(opts=opts, dataset=dataset), True)
    examples = [mapper(x)["instances"] for x in DatasetCatalog.get(dataset.name)]
    num_masks = sum(int(x.gt_has_model_mask.sum()) for x in examples)
    assert num_masks == (3 if is_used else 0)
    assert all(x.gt_has_mask[x.gt_classes == 1].sum() == 0 for x in examples)
