"""Reading unseen objects: what is kept, where it lies, and that true masks stay apart."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from teacher_student_mask.analysis.trained_model import find_test_dataset
from teacher_student_mask.analysis.unseen_objects import UnseenObjectReader

CAT, SHIP = 17, 90
# Twice the size of most images.
TWICE = ["INPUT.MIN_SIZE_TEST", 128]


@pytest.fixture
def make_reader(tiny_cfg, make_tiny_coco):
    def make(opts=(), change=None):
        cfg = tiny_cfg(opts=opts, dataset=make_tiny_coco(change))
        return UnseenObjectReader(cfg, find_test_dataset(cfg))

    return make


def read(reader):
    """{image id: objects}; the reader's images are 2, 5, 7, 30."""
    return {image["image_id"]: reader.read(image) for image in reader.images}


def annotation_of(data, annotation_id):
    return next(x for x in data["annotations"] if x["id"] == annotation_id)


def test_only_unseen_objects_are_read(make_reader):
    objects = read(make_reader())
    assert list(objects) == [2, 5, 7, 30]
    assert objects[5] is None and objects[30] is None
    assert [len(objects[i].rois) for i in (2, 7)] == [2, 1]
    assert objects[7].rois.gt_classes.tolist() == [1]


def test_boxes_are_in_the_frame_of_the_resized_image(make_reader):
    objects = read(make_reader(TWICE))[7]
    assert objects.inputs["image"].shape == (3, 128, 128)
    assert objects.rois.image_size == objects.truth.image_size == (128, 128)
    rois, truth = objects.rois, objects.truth
    for boxes in (rois.proposal_boxes, rois.gt_boxes, truth.proposal_boxes):
        assert boxes.tensor.tolist() == [[60.0, 40.0, 112.0, 108.0]]  # bbox [30, 20, 26, 34]


def test_overlaps_are_those_of_the_objects(make_reader):
    def change(data):
        # The first cat of image 2 lies in [6, 36] x [8, 48]; 15 of its 30 columns are covered.
        rectangle = [[21.0, 0.0, 70.0, 0.0, 70.0, 64.0, 21.0, 64.0]]
        annotation_of(data, 110).update(segmentation=rectangle, bbox=[21, 0, 49, 64])
        annotation_of(data, 109)["segmentation"] = [[6.0, 8.0, 21.0, 8.0, 21.0, 48.0, 6.0, 48.0]]

    assert read(make_reader(change=change))[2].overlaps == [0.5, 0.0]


def test_overlaps_stay_with_their_objects_when_one_is_left_out(make_reader):
    def change(data):
        # Outside the image, 80 pixels wide; its mask covers half of the other cat's box.
        covering = [[21.0, 0.0, 70.0, 0.0, 70.0, 32.0, 21.0, 32.0]]
        annotation_of(data, 109).update(segmentation=covering, bbox=[90, 0, 5, 5])
        annotation_of(data, 110)["bbox"] = [21, 0, 49, 64]

    objects = read(make_reader(change=change))[2]
    assert objects.rois.gt_boxes.tensor.tolist() == [[21, 0, 70, 64]]
    assert objects.overlaps == [0.5]


@pytest.mark.parametrize("opts", [[], TWICE])
def test_exclusion_masks_are_the_seen_masks_of_the_image(make_reader, tiny_coco, opts):
    exclusion = read(make_reader(opts))[7].rois.gt_exclusion_masks
    assert len(exclusion) == 1
    # The seen masks of mixed.png: of 8 objects three have one; not the crowd, not the cat.
    rles = [x.get("segmentation") for x in tiny_coco.data["annotations"][:3]]
    rles = [mask_util.frPyObjects(x, 64, 64) if not is_compressed(x) else x for x in rles]
    rles = [mask_util.merge(x) if isinstance(x, list) else x for x in rles]
    expected = mask_util.decode(mask_util.merge(rles)).astype(bool)
    if opts:
        expected = expected.repeat(2, axis=0).repeat(2, axis=1)
    # Rasterised in another way along the edges.
    assert (exclusion.tensor.numpy() != expected).mean() < 0.02
    assert expected.mean() > 0.08


def is_compressed(segmentation):
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)


def test_unseen_masks_reach_the_truth_alone(make_reader):
    # A bug here would make pseudo masks look better than training's.
    def scramble(data):
        for annotation in data["annotations"]:
            if annotation["category_id"] == CAT:
                x, y, w, h = annotation["bbox"]
                annotation["segmentation"] = [[x, y, x + w / 2, y, x + w / 2, y + h, x, y + h]]

    before, after = read(make_reader()), read(make_reader(change=scramble))
    for image_id in (2, 7):
        a, b = before[image_id], after[image_id]
        assert a.inputs.keys() == b.inputs.keys() == {"image", "file_name"}
        assert torch.equal(a.inputs["image"], b.inputs["image"])
        assert set(a.rois.get_fields()) == {
            "gt_boxes",
            "gt_classes",
            "proposal_boxes",
            "gt_exclusion_masks",
        }
        assert a.rois.gt_boxes.tensor.tolist() == b.rois.gt_boxes.tensor.tolist()
        assert torch.equal(a.rois.gt_exclusion_masks.tensor, b.rois.gt_exclusion_masks.tensor)
        crops = [x.truth.gt_masks.crop_and_resize(a.rois.gt_boxes.tensor, 14) for x in (a, b)]
        assert not torch.equal(*crops)


@pytest.mark.parametrize("kind", ["polygon", "compressed", "uncompressed", "bitmask"])
def test_truth_of_any_form_is_the_mask_in_the_box(make_reader, kind):
    left_half = np.zeros((64, 64), dtype=np.uint8, order="F")
    left_half[20:54, 30:43] = 1  # of bbox [30, 20, 26, 34]

    def change(data):
        annotation = annotation_of(data, 108)
        if kind in ("polygon", "bitmask"):
            annotation["segmentation"] = [[30.0, 20.0, 43.0, 20.0, 43.0, 54.0, 30.0, 54.0]]
        elif kind == "compressed":
            rle = mask_util.encode(left_half)
            annotation["segmentation"] = {"size": [64, 64], "counts": rle["counts"].decode()}
        else:
            counts = [30 * 64 + 20] + 12 * [34, 30] + [34, 10 + 21 * 64]
            annotation["segmentation"] = {"size": [64, 64], "counts": counts}

    opts = [*TWICE, "INPUT.MASK_FORMAT", "bitmask" if kind == "bitmask" else "polygon"]
    truth = read(make_reader(opts, change))[7].truth
    crop = truth.gt_masks.crop_and_resize(truth.proposal_boxes.tensor, 4)
    assert crop.int().tolist() == [[[1, 1, 0, 0]] * 4]


def test_objects_that_cannot_be_measured_are_counted(make_reader, log):
    nothing = {"size": [64, 80], "counts": [64 * 80]}

    def change(data):
        annotation_of(data, 108)["bbox"] = [64.0, 10.0, 5.0, 5.0]  # outside its image
        annotation_of(data, 109)["segmentation"] = nothing
        annotation_of(data, 110)["segmentation"] = None

    reader = make_reader(change=change)
    log.clear()
    assert set(read(reader).values()) == {None}
    reader.log_left_out()
    assert "of the unseen objects 2 have no true mask and 1 a box without area" in log.text


def test_nothing_is_said_when_all_are_measured(make_reader, log):
    reader = make_reader()
    log.clear()
    read(reader)
    reader.log_left_out()
    assert not log.records


def test_crowds_are_not_objects(make_reader):
    def change(data):
        annotation_of(data, 109)["iscrowd"] = 1

    assert len(read(make_reader(change=change))[2].rois) == 1


def test_no_unseen_class_is_said(make_reader, log):
    reader = make_reader(["DATASETS.SEEN_CLASSES", "all"])
    assert set(read(reader).values()) == {None}
    assert "'all' are all classes: there is no unseen object" in log.text


def test_augmentation_of_training_is_off(make_reader):
    opts = ["INPUT.CROP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (40,), "INPUT.RANDOM_FLIP"]
    torch.manual_seed(0)
    objects = [read(make_reader([*opts, flip]))[7] for flip in ("horizontal", "vertical", "none")]
    images = [x.inputs["image"] for x in objects]
    assert images[0].shape == (3, 64, 64)
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
    assert objects[0].rois.gt_boxes.tensor.tolist() == [[30.0, 20.0, 56.0, 54.0]]


def test_annotation_ids_must_be_unique(make_reader):
    def change(data):
        data["annotations"][1]["id"] = data["annotations"][0]["id"]

    with pytest.raises(ValueError, match="json: 12 annotations have only 11 different ids"):
        make_reader(change=change)


def test_classes_in_another_order_are_refused(tiny_cfg, tiny_coco):
    cfg = tiny_cfg(dataset=tiny_coco)
    dataset = find_test_dataset(cfg)
    data = json.loads(json.dumps(tiny_coco.data))
    data["categories"][0]["id"] = 1
    for annotation in data["annotations"]:
        annotation["category_id"] = {SHIP: 1}.get(
            annotation["category_id"], annotation["category_id"]
        )
    with open(tiny_coco.json_file, "w", encoding="utf-8") as f:
        json.dump(data, f)
    with pytest.raises(ValueError, match="not in the order of their category ids"):
        UnseenObjectReader(cfg, dataset)
