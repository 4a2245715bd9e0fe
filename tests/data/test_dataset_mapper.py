"""The mapper on hand-written annotations: one image of 12 x 16 pixels, one class per object."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks, polygons_to_bitmask
from PIL import Image

from teacher_student_mask import ImageMask, TeacherStudentDatasetMapper

HEIGHT, WIDTH = 12, 16
SEEN, UNSEEN = range(10), range(10, 20)  # classes; each object of an image has its own
FORMATS = pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])


@pytest.fixture
def make_image(tmp_path):
    """Return a function from annotations to the dataset dict of an image."""
    rng = np.random.default_rng(0)

    def make(annotations, height=HEIGHT, width=WIDTH):
        path = tmp_path / f"{height}x{width}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        return {
            "file_name": str(path),
            "image_id": 42,
            "height": height,
            "width": width,
            "annotations": annotations,
        }

    return make


def make_mapper(augmentations=(), mask_format="polygon", **options):
    return TeacherStudentDatasetMapper(
        is_train=True,
        seen_classes=SEEN,
        augmentations=list(augmentations),
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
        **options,
    )


def annotation(category_id, box, iscrowd=0, **fields):
    """``box`` is XYXY; the segmentation is among the fields, if there is one."""
    x0, y0, x1, y1 = box
    bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
    fields.update(bbox=bbox, bbox_mode=BoxMode.XYWH_ABS, iscrowd=iscrowd, category_id=category_id)
    return fields


def mask_of(*rectangles, height=HEIGHT, width=WIDTH):
    """Bool array in which the XYXY rectangles are set."""
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = True
    return mask


def to_rle(mask, compressed=True):
    if compressed:
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]]).astype(int)
    starts = np.nonzero(np.diff(pixels))[0]
    counts = [int(v) for v in np.diff(np.concatenate([[0], starts]))]
    return {"size": list(mask.shape), "counts": counts}


def to_bits(masks, instances):
    """Masks of either kind as a bool array (N, H, W)."""
    if isinstance(masks, BitMasks):
        return masks.tensor.numpy()
    bits = [polygons_to_bitmask(p, *instances.image_size) for p in masks.polygons]
    return np.stack(bits) if bits else np.zeros((0, *instances.image_size), dtype=bool)


@FORMATS
@pytest.mark.parametrize("is_on", [False, True])
def test_rectangles_are_boxes_only_where_the_config_says_so(make_image, mask_format, is_on):
    box = (2, 2, 8, 6)
    rectangle, triangle = [[2, 2, 8, 2, 8, 6, 2, 6]], [[2, 2, 8, 2, 8, 6]]
    image = make_image(
        [
            annotation(0, box, segmentation=rectangle),
            annotation(1, box, segmentation=triangle),
            annotation(2, box, segmentation=[[2.4, 2, 8, 2, 8, 6, 2.4, 6]]),  # a rounded box
            annotation(3, box, segmentation=[[4, 2, 8, 2, 8, 6, 4, 6]]),  # not its box
            annotation(4, box, segmentation=to_rle(mask_of(box))),  # somebody drew pixels
            annotation(5, box, segmentation=rectangle, mask_source="model"),
            annotation(6, box),
            annotation(10, box, segmentation=rectangle),  # unseen: without a mask anyhow
        ]
    )
    before = copy.deepcopy(image)
    mapper = make_mapper(mask_format=mask_format, rectangle_as_box_only=is_on)
    instances = mapper(image)["instances"]
    assert image == before
    expected = [not is_on, True, not is_on, True, True, False, False, False]
    assert instances.gt_has_mask.tolist() == expected
    assert instances.gt_has_model_mask.tolist() == [i == 5 for i in range(8)]


# An L of 4 x 4 pixels, another beside it, an RLE with a hole.
L_POLYGON = [1, 1, 5, 1, 5, 3, 3, 3, 3, 5, 1, 5]
L_MASK = mask_of((1, 1, 5, 3), (1, 3, 3, 5))
COMPRESSED_MASK = mask_of((6, 1, 11, 6)) & ~mask_of((8, 3, 9, 4))
UNCOMPRESSED_MASK = mask_of((9, 4, 12, 5), (11, 5, 13, 8))


def mixed_annotations():
    """Every kind side by side, with what must come out: (mask, box, has mask), None = dropped."""
    boxes = {3: (0, 6, 4, 9), 4: (4, 6, 7, 9), 5: (0, 9, 3, 12), 6: (2, 2, 9, 9)}
    boxes.update({7: (4, 9, 8, 12), 12: (8, 8, 14, 12), 13: (2, 0, 12, 10), 14: (12, 0, 16, 5)})
    annotations = [
        annotation(0, (1, 1, 5, 5), segmentation=[L_POLYGON]),
        annotation(1, (6, 1, 11, 6), segmentation=to_rle(COMPRESSED_MASK)),
        annotation(2, (9, 4, 13, 8), segmentation=to_rle(UNCOMPRESSED_MASK, compressed=False)),
        annotation(3, boxes[3]),
        annotation(4, boxes[4], segmentation=[]),
        annotation(5, boxes[5], segmentation=None),
        annotation(6, boxes[6], iscrowd=1, segmentation=to_rle(mask_of((0, 0, 16, 12)), False)),
        annotation(7, boxes[7], segmentation=to_rle(mask_of())),
        annotation(12, boxes[12], segmentation=[[8, 8, 14, 8, 14, 12]]),
        annotation(13, boxes[13], segmentation=to_rle(mask_of((2, 0, 12, 3), (9, 3, 12, 10)))),
        annotation(14, boxes[14]),
    ]
    expected = {
        0: (L_MASK, (1, 1, 5, 5), True),
        1: (COMPRESSED_MASK, (6, 1, 11, 6), True),
        2: (UNCOMPRESSED_MASK, (9, 4, 13, 8), True),
    }
    expected.update({i: (mask_of(box), box, False) for i, box in boxes.items() if i != 6})
    return annotations, expected


def check_mixed(instances, expected, move):
    classes = instances.gt_classes.tolist()
    assert sorted(classes) == sorted(expected)
    bits = to_bits(instances.gt_masks, instances)
    for i, class_id in enumerate(classes):
        mask, _, has_mask = expected[class_id]
        assert instances.gt_has_mask[i].item() == has_mask
        np.testing.assert_array_equal(bits[i], move(mask), f"mask of class {class_id}")
    union = L_MASK | COMPRESSED_MASK | UNCOMPRESSED_MASK
    np.testing.assert_array_equal(instances.gt_exclusion_masks.tensor.numpy(), move(union))
    assert len(instances.gt_exclusion_masks) == len(instances.gt_has_mask) == len(classes)


@FORMATS
@pytest.mark.parametrize("first", (0, 2, 3, 7, 8))
@pytest.mark.parametrize("is_flipped", [False, True])
def test_all_kinds_of_segmentation_in_one_image(make_image, mask_format, first, is_flipped):
    # Whichever comes first: Detectron2 looks at the first annotation to decide about all masks.
    annotations, expected = mixed_annotations()
    image = make_image(annotations[first:] + annotations[:first])
    flips = [T.RandomFlip(prob=1.0)] if is_flipped else []
    instances = make_mapper(flips, mask_format)(image)["instances"]
    check_mixed(instances, expected, np.fliplr if is_flipped else np.asarray)
    for class_id, box in zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()):
        x0, y0, x1, y1 = expected[class_id][1]
        assert box == ([WIDTH - x1, y0, WIDTH - x0, y1] if is_flipped else [x0, y0, x1, y1])
    assert isinstance(instances.gt_masks, BitMasks)  # there are RLEs
    assert isinstance(instances.gt_exclusion_masks, ImageMask)
    assert instances.gt_has_mask.dtype == torch.bool


def polygon_annotations():
    return [
        annotation(0, (1, 1, 5, 5), segmentation=[L_POLYGON]),
        annotation(
            1, (6, 2, 14, 9), segmentation=[[6, 2, 14, 2, 14, 4, 6, 4], [8, 6, 12, 6, 8, 9]]
        ),
        annotation(10, (3, 3, 12, 11), segmentation=[[3, 3, 12, 3, 12, 11]]),
        annotation(11, (0.5, 6.25, 3.75, 11.5)),
    ]


@FORMATS
def test_the_mask_of_an_unseen_object_is_the_rectangle_of_its_box(make_image, mask_format):
    instances = make_mapper(mask_format=mask_format)(make_image(polygon_annotations()))["instances"]
    masks = instances.gt_masks
    assert isinstance(masks, PolygonMasks if mask_format == "polygon" else BitMasks)
    assert instances.gt_has_mask.tolist() == [True, True, False, False]
    assert instances.gt_boxes.tensor[2:].tolist() == [[3, 3, 12, 11], [0.5, 6.25, 3.75, 11.5]]
    if mask_format == "polygon":
        assert torch.equal(masks[2:].get_bounding_boxes().tensor, instances.gt_boxes.tensor[2:])
        assert masks.area()[2:].tolist() == instances.gt_boxes.area()[2:].tolist()
    np.testing.assert_array_equal(to_bits(masks, instances)[2], mask_of((3, 3, 12, 11)))


@FORMATS
@pytest.mark.parametrize("crowd", [[], [annotation(0, (0, 0, 9, 9), 1, segmentation=[L_POLYGON])]])
def test_image_without_an_object_has_all_fields(make_image, mask_format, crowd):
    augmentations = [T.RandomFlip(prob=1.0), T.CropTransform(2, 2, 8, 6)]
    mapper = make_mapper(augmentations, mask_format, recompute_boxes=True)
    instances = mapper(make_image(crowd))["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_has_mask.shape == (0,) and instances.gt_has_mask.dtype == torch.bool
    assert len(instances.gt_masks) == len(instances.gt_exclusion_masks) == 0
    assert not instances.gt_exclusion_masks.tensor.any()


@FORMATS
def test_crop_tightens_boxes_with_a_mask_and_clips_the_others(make_image, mask_format):
    # The window holds x 3-11, y 2-10.
    crop = T.CropTransform(3, 2, 8, 8)
    annotations = [
        annotation(0, (1, 1, 5, 5), segmentation=[L_POLYGON]),  # x 3-5, y 2-3 is left
        annotation(1, (0, 4, 6, 12), segmentation=[[0, 4, 2, 4, 2, 11, 6, 11, 6, 12, 0, 12]]),
        annotation(2, (5, 4, 9, 8), segmentation=[[5, 4, 9, 4, 9, 8, 5, 8]]),
        annotation(3, (12, 3, 15, 9), segmentation=[[12, 3, 15, 3, 15, 9]]),
        annotation(4, (0, 0, 5, 5)),
        annotation(10, (1, 1, 5, 5), segmentation=[L_POLYGON]),
        annotation(11, (10, 9, 16, 12), segmentation=[[13, 11, 16, 11, 16, 12]]),
        annotation(12, (12, 3, 15, 9), segmentation=[[12, 3, 15, 3, 15, 9]]),
    ]
    mapper = make_mapper([crop], mask_format, recompute_boxes=True)
    instances = mapper(make_image(annotations))["instances"]
    boxes = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()))
    assert boxes == {
        0: [0, 0, 2, 1],  # tight: below it the L is left of the window
        # 1: its box meets the window, its mask does not. 3 and 12: outside.
        2: [2, 2, 6, 6],
        4: [0, 0, 2, 3],  # clipped, like the next two, whatever their masks are
        10: [0, 0, 2, 3],
        11: [7, 7, 8, 8],
    }
    assert instances.gt_has_mask.tolist() == [True, True, False, False, False]
    np.testing.assert_array_equal(
        instances.gt_exclusion_masks.tensor, mask_of((0, 0, 2, 1), (2, 2, 6, 6), height=8, width=8)
    )


@FORMATS
def test_an_unseen_box_without_a_pixel_stays(make_image, mask_format):
    # Its rectangle has no pixel in a bitmask.
    image = make_image([annotation(10, (4.1, 4.1, 4.3, 4.4)), annotation(11, (6, 6, 6, 9))])
    instances = make_mapper(mask_format=mask_format)(image)["instances"]
    assert instances.gt_classes.tolist() == [10]  # the other one has no width


def test_without_masks_it_is_detectron2s_mapper(make_image):
    mapper = make_mapper()
    mapper.use_instance_mask = False
    instances = mapper(make_image(polygon_annotations()))["instances"]
    assert sorted(instances.get_fields()) == ["gt_boxes", "gt_classes"] and len(instances) == 4


def test_train_datasets_with_different_classes_are_refused(tiny_cfg, make_tiny_coco):
    def rename(data):
        data["categories"][1]["name"] = "bee"

    first, same, other = make_tiny_coco(), make_tiny_coco(), make_tiny_coco(rename)
    cfg = tiny_cfg(dataset=first)
    cfg.DATASETS.TRAIN = (first.name, same.name)
    assert TeacherStudentDatasetMapper(cfg, is_train=True).seen_classes == {0, 2}
    cfg.DATASETS.TRAIN = (first.name, same.name, other.name)
    with pytest.raises(ValueError, match=f"'{first.name}' and '{other.name}' differ"):
        TeacherStudentDatasetMapper(cfg, is_train=True)


def test_at_test_time_gt_boxes_are_scaled_with_the_image(tiny_cfg, tiny_coco):
    cfg = tiny_cfg(dataset=tiny_coco, opts=["TEST.GT_BOXES", True, "INPUT.MIN_SIZE_TEST", 96])
    mapper = TeacherStudentDatasetMapper(cfg, is_train=False)
    images = {x["image_id"]: x for x in DatasetCatalog.get(tiny_coco.name)}
    before = copy.deepcopy(images)

    unseen = mapper(images[2])["instances"]  # 64 x 80 becomes 96 x 120
    assert unseen.image_size == (96, 120)
    assert unseen.gt_boxes.tensor.tolist() == [[9, 12, 54, 72], [45, 15, 105, 81]]
    assert unseen.gt_classes.tolist() == [1, 1]
    # Without the crowd.
    assert mapper(images[7])["instances"].gt_classes.tolist() == [0, 2, 0, 2, 0, 2, 1]
    empty = mapper(images[5])["instances"]
    assert empty.gt_boxes.tensor.shape == (0, 4) and empty.gt_classes.dtype == torch.int64
    assert images == before


EMPTY_MASKS = {
    "outside": [[20.0, 4, 30, 4, 30, 10]],
    "without area": [[4.0, 4, 6, 6, 8, 8]],
    "empty RLE": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
}


@FORMATS
@pytest.mark.parametrize("name", EMPTY_MASKS)
def test_a_mask_that_covers_nothing_is_none(make_image, mask_format, name):
    """It was an empty mask, from which the heads learn that all is background."""
    image = make_image([annotation(SEEN[0], (2, 2, 10, 10), segmentation=EMPTY_MASKS[name])])
    instances = make_mapper(mask_format=mask_format)(image)["instances"]
    assert len(instances) == 1 and not instances.gt_has_mask.any()
    assert not instances.gt_exclusion_masks.tensor.any()


@FORMATS
def test_pixels_of_a_dropped_object_exclude_nothing(make_image, mask_format):
    """UnseenMaskGuard would not know whose they are."""
    triangle = [[5.0, 4, 11, 4, 11, 9]]
    image = make_image(
        [
            annotation(SEEN[0], (100, 100, 5, 5), segmentation=triangle),  # a wrong box
            annotation(UNSEEN[0], (4, 3, 8, 7)),
        ]
    )
    instances = make_mapper(mask_format=mask_format)(image)["instances"]
    assert instances.gt_classes.tolist() == [UNSEEN[0]]
    assert not instances.gt_exclusion_masks.tensor.any()


@FORMATS
def test_an_object_whose_mask_leaves_the_image_is_dropped(make_image, mask_format):
    """Rotation leaves polygons where they are: outside."""
    corner = [[0.0, 0, 2, 0, 0, 2]]
    box = (0, 0, 16, 12)
    image = make_image(
        [
            annotation(SEEN[0], box, segmentation=corner),
            annotation(SEEN[1], box, segmentation=[[5.0, 4, 11, 4, 11, 9]]),
            annotation(UNSEEN[0], box),
        ]
    )
    rotation = T.RandomRotation([45, 45], expand=False)
    instances = make_mapper([rotation], mask_format)(image)["instances"]
    assert instances.gt_has_mask.tolist() == [True, False]
    assert instances.gt_classes.tolist() == [SEEN[1], UNSEEN[0]]


def test_whole_numbers_of_polygons_are_scaled_to_fractions(make_image):
    # Detectron2's transforms write into the array that they are given: whole numbers stay whole.
    image = make_image([annotation(0, (1, 1, 5, 5), segmentation=[L_POLYGON])])
    instances = make_mapper([T.Resize((18, 24))])(image)["instances"]
    ((polygon,),) = instances.gt_masks.polygons
    assert polygon.tolist() == [1.5 * x for x in L_POLYGON]
