"""The procedural dataset: the same files every time, heavy occlusion, exact modal masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from teacher_student_mask import compute_overlaps
from teacher_student_mask.data.shapes import SHAPES_CLASSES, generate_shapes

NUM_IMAGES = 60


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Folder of a dataset with 60 validation images and no other."""
    root = tmp_path_factory.mktemp("shapes")
    generate_shapes(str(root), num_train=0, num_val=NUM_IMAGES, seed=0)
    return root


@pytest.fixture(scope="module")
def coco(sample):
    return COCO(str(sample / "annotations" / "instances_val.json"))


@pytest.fixture(scope="module")
def masks(coco):
    """Annotation id -> bool mask of the image."""
    return {i: coco.annToMask(annotation).astype(bool) for i, annotation in coco.anns.items()}


def read_json(root, split):
    return json.loads((Path(root) / "annotations" / f"instances_{split}.json").read_text())


def test_an_image_does_not_depend_on_the_number_of_images(sample, tmp_path):
    generate_shapes(str(tmp_path), num_train=2, num_val=3)
    few, many = read_json(tmp_path, "val"), read_json(sample, "val")
    assert few["images"] == many["images"][:3]
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    assert many["annotations"][len(few["annotations"])]["image_id"] == 4
    for image in few["images"]:
        path = Path("val") / image["file_name"]
        assert (tmp_path / path).read_bytes() == (sample / path).read_bytes()


def test_objects_of_all_classes_overlap_heavily(coco):
    overlaps = compute_overlaps(coco)
    assert len(overlaps) > 2 * NUM_IMAGES
    assert np.mean([overlap >= 0.3 for overlap in overlaps.values()]) >= 0.4
    assert [category["name"] for category in coco.cats.values()] == list(SHAPES_CLASSES)
    assert {x["category_id"] for x in coco.anns.values()} == set(range(1, 9))


def test_boxes_are_tight_and_areas_exact(coco, masks):
    for annotation_id, mask in masks.items():
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
        annotation = coco.anns[annotation_id]
        assert annotation["bbox"] == [columns[0], rows[0], width, height]
        assert annotation["area"] == mask.sum()
        assert annotation["iscrowd"] == 0


def test_masks_of_an_image_are_disjoint_and_every_object_can_be_seen(coco, masks):
    for image_id in coco.imgs:
        of_image = [masks[i] for i in coco.getAnnIds(imgIds=image_id)]
        assert of_image and np.sum(of_image, axis=0).max() == 1
    assert min(mask.sum() for mask in masks.values()) >= 30


def test_colour_does_not_tell_the_class(sample, coco, masks):
    colours, classes = [], []
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(sample / "val" / image["file_name"])) / 255.0
        for annotation_id in coco.getAnnIds(imgIds=image_id):
            colours.append(pixels[masks[annotation_id]].mean(axis=0))
            classes.append(coco.anns[annotation_id]["category_id"])
    colours, classes = np.array(colours), np.array(classes)
    within = np.mean([colours[classes == c].var(axis=0) for c in classes], axis=0)
    # Independent colours: 1 - 7 / number of objects; a colour of its own for each class: near 0.
    assert (within / colours.var(axis=0) > 0.8).all()
    assert (colours.std(axis=0) > 0.15).all()
