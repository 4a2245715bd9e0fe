"""Masks that a model made, through loader and mapper: apart from human ones, moved like them."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks, polygons_to_bitmask
from PIL import Image

from teacher_student_mask import TeacherStudentDatasetMapper

HEIGHT, WIDTH = 12, 16
SEEN, UNSEEN = 0, 1
FORMATS = pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
KINDS = pytest.mark.parametrize("kind", ["polygon", "rle"])
# On pixel corners, so that all ways of drawing agree.
L_SHAPE = [2, 2, 8, 2, 8, 5, 5, 5, 5, 9, 2, 9]
BAR = [9, 3, 15, 3, 15, 6, 9, 6]


def draw(polygon, height=HEIGHT, width=WIDTH):
    return polygons_to_bitmask([np.array(polygon, dtype=float)], height, width)


def segmentation(polygon, kind):
    if kind == "polygon":
        return [list(map(float, polygon))]
    rle = mask_util.encode(np.asfortranarray(draw(polygon), dtype=np.uint8))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def annotation(category_id, box, mask=None, **fields):
    x0, y0, x1, y1 = map(float, box)
    fields.update(bbox=[x0, y0, x1 - x0, y1 - y0], bbox_mode=BoxMode.XYWH_ABS, iscrowd=0)
    return {**fields, "category_id": category_id, "segmentation": mask}


@pytest.fixture
def map_image(tmp_path):
    """Return ``map_(annotations, augmentations, **options)``: the instances of an image."""
    path = tmp_path / "x.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)

    def map_(annotations, augmentations=(), mask_format="polygon", **options):
        mapper = TeacherStudentDatasetMapper(
            is_train=True,
            seen_classes=[SEEN],
            augmentations=list(augmentations),
            image_format="BGR",
            use_instance_mask=True,
            instance_mask_format=mask_format,
            **options,
        )
        image = {"file_name": str(path), "image_id": 3, "height": HEIGHT, "width": WIDTH}
        given = {**image, "annotations": annotations}
        before = copy.deepcopy(given)
        instances = mapper(given)["instances"]
        assert given == before
        return instances

    return map_


def bits_of(instances):
    """``gt_masks`` as bool arrays."""
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor.numpy()


def one_of_each(kind="polygon", human="polygon"):
    return [
        annotation(SEEN, (9, 3, 15, 6), segmentation(BAR, human), mask_source="human"),
        annotation(SEEN, (2, 2, 8, 9), segmentation(L_SHAPE, kind), mask_source="model"),
        annotation(UNSEEN, (2, 2, 8, 9), segmentation(L_SHAPE, kind), mask_source="model"),
        annotation(UNSEEN, (9, 3, 15, 6), segmentation(BAR, kind)),
        annotation(SEEN, (1, 1, 5, 5), None, mask_source="model"),
    ]


@KINDS
@FORMATS
def test_a_models_mask_is_beside_the_human_ones(map_image, kind, mask_format):
    instances = map_image(one_of_each(kind), mask_format=mask_format)
    assert instances.gt_has_mask.tolist() == [True, False, False, False, False]
    assert instances.gt_has_model_mask.tolist() == [False, True, True, False, False]
    bits = bits_of(instances)
    for row, polygon in enumerate((BAR, L_SHAPE, L_SHAPE, BAR, [1, 1, 5, 1, 5, 5, 1, 5])):
        np.testing.assert_array_equal(bits[row], draw(polygon))
    # No pixel of it is in what others read.
    np.testing.assert_array_equal(instances.gt_exclusion_masks.tensor.numpy(), draw(BAR))
    assert isinstance(instances.gt_masks, BitMasks) == ("rle" == kind or mask_format == "bitmask")


@FORMATS
@pytest.mark.parametrize("kind", ["polygon", "rle"])
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
    first, second = (x[~is_model].get_fields() for x in results)
    assert first.keys() == second.keys()
    assert_same_fields(first, second)
    boxes = [x.gt_boxes.tensor for x in results]
    assert torch.equal(*boxes)
    # And "ignore" is a json without it.
    ignoring = map_image(with_masks, augmentations, use_external_masks=False, **options)
    assert_same_fields(ignoring.get_fields(), results[1].get_fields())


def assert_same_fields(first, second):
    for name, a in first.items():
        b = second[name]
        assert type(a) is type(b), name
        if isinstance(a, PolygonMasks):
            for x, y in zip(a.polygons, b.polygons, strict=True):
                for p, q in zip(x, y, strict=True):
                    np.testing.assert_array_equal(p, q)
        else:
            a, b = (x if isinstance(x, torch.Tensor) else x.tensor for x in (a, b))
            assert torch.equal(a, b), name


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


@KINDS
def test_its_object_keeps_its_own_box_after_a_crop(map_image, kind):
    # Boxes are human; recompute_boxes tightens them to human masks alone.
    crop = [T.CropTransform(0, 5, 8, 7)]
    model, human = (
        map_image([{**one_of_each(kind)[1], "mask_source": x}], crop, recompute_boxes=True)
        for x in ("model", "human")
    )
    assert model.gt_boxes.tensor.tolist() == [[2, 0, 8, 4]]
    assert human.gt_boxes.tensor.tolist() == [[2, 0, 5, 4]]


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
