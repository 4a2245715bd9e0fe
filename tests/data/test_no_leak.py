"""Whatever the json says of the masks of unseen classes, training sees the same tensors."""

import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import PolygonMasks

from teacher_student_mask import TeacherStudentDatasetMapper
from teacher_student_mask.cli.main import main

UNSEEN_CATEGORY = 17
FORMATS = pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])


def random_polygons(rng, image):
    sides = [image["width"], image["height"]]
    return [(rng.random((rng.integers(3, 9), 2)) * sides).ravel().tolist() for _ in range(2)]


def random_rle(rng, image):
    num_pixels = image["height"] * image["width"]
    cuts = np.sort(rng.choice(num_pixels, 6, replace=False))
    counts = np.diff(np.concatenate([[0], cuts, [num_pixels]])).tolist()
    return {"size": [image["height"], image["width"]], "counts": counts}


# How the json describes an unseen object instead; REMOVED: by no segmentation at all.
REMOVED = object()
REPLACEMENTS = {
    "removed": lambda rng, image: REMOVED,
    "null": lambda rng, image: None,
    "empty": lambda rng, image: [],
    "polygons": random_polygons,
    "rle": random_rle,
    "nothing set": lambda rng, image: {
        "size": [image["height"], image["width"]],
        "counts": [image["height"] * image["width"]],
    },
    "too short": lambda rng, image: [[1.0, 2.0, 3.0]],
    "wrong size": lambda rng, image: {"size": [3, 5], "counts": [7, 8]},
}


def replace_segmentations(replacement, category_ids=(UNSEEN_CATEGORY,)):
    """Return a change for ``make_tiny_coco``."""
    rng = np.random.default_rng(0)

    def change(data):
        images = {image["id"]: image for image in data["images"]}
        for annotation in data["annotations"]:
            if annotation["category_id"] in category_ids and not annotation["iscrowd"]:
                new = replacement(rng, images[annotation["image_id"]])
                annotation.pop("segmentation", None)
                if new is not REMOVED:
                    annotation["segmentation"] = new

    return change


def training_examples(cfg, dataset, num_epochs=4, seed=0):
    """All that training sees of the dataset's images, augmented under a fixed seed."""
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = (dataset.name,)
    mapper = TeacherStudentDatasetMapper(cfg, is_train=True)
    np.random.seed(seed)
    images = DatasetCatalog.get(dataset.name)
    return [mapper(copy.deepcopy(image)) for _ in range(num_epochs) for image in images]


def is_same(a, b):
    """Whether two values of an example are of one type and bit for bit equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, PolygonMasks):
        pairs = list(zip(a.polygons, b.polygons))
        return len(a) == len(b) and all(
            len(p) == len(q) and all(np.array_equal(x, y) for x, y in zip(p, q)) for p, q in pairs
        )
    if len(a) != len(b):
        return False
    if not isinstance(a, torch.Tensor):
        a, b = a.tensor, b.tensor  # Boxes, BitMasks, ImageMask
    return a.dtype == b.dtype and torch.equal(a, b)


def differences(examples, others):
    """Names of the image and instance fields in which the examples differ anywhere."""
    found = set()
    assert len(examples) == len(others) > 0
    for example, other in zip(examples, others):
        fields = {"image": example["image"], **example["instances"].get_fields()}
        other_fields = {"image": other["image"], **other["instances"].get_fields()}
        assert fields.keys() == other_fields.keys() and example.keys() == other.keys()
        found |= {name for name in fields if not is_same(fields[name], other_fields[name])}
    return found


@pytest.fixture
def augmented_cfg(tiny_cfg, tiny_coco):
    def make(mask_format):
        opts = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.6]]
        opts += ["INPUT.MIN_SIZE_TRAIN", (48, 64, 80), "INPUT.MASK_FORMAT", mask_format]
        return tiny_cfg(opts=opts, dataset=tiny_coco)

    return make


@FORMATS
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_unseen_segmentations_change_no_training_tensor(
    augmented_cfg, tiny_coco, make_tiny_coco, mask_format, kind
):
    cfg = augmented_cfg(mask_format)
    changed = make_tiny_coco(replace_segmentations(REPLACEMENTS[kind]))
    assert changed.data != tiny_coco.data
    examples = training_examples(cfg, tiny_coco)
    assert differences(examples, training_examples(cfg, changed)) == set()


@FORMATS
def test_a_json_stripped_of_them_changes_no_training_tensor(
    augmented_cfg, make_tiny_coco, tmp_path, mask_format
):
    def add_crowd(data):
        crowd = {"size": [64, 64], "counts": [100, 300, 3696]}
        row = {"id": 200, "image_id": 7, "category_id": UNSEEN_CATEGORY, "iscrowd": 1}
        data["annotations"].append(row | {"bbox": [0, 2, 30, 20], "segmentation": crowd})

    dataset, out = make_tiny_coco(add_crowd), tmp_path / "stripped.json"
    seen = ["--seen-classes", dataset.seen_classes]
    assert main(["edit", "strip", dataset.json_file, str(out), *seen]) == 0
    changed = make_tiny_coco(lambda data: data.update(json.loads(out.read_text())))
    cfg = augmented_cfg(mask_format)
    examples = training_examples(cfg, dataset)
    assert differences(examples, training_examples(cfg, changed)) == set()


def test_seen_segmentations_do_show(augmented_cfg, tiny_coco, make_tiny_coco):
    # Otherwise the tests above compare nothing.
    cfg = augmented_cfg("polygon")
    examples = training_examples(cfg, tiny_coco)
    changed = make_tiny_coco(replace_segmentations(random_polygons, category_ids=(3, 90)))
    found = differences(examples, training_examples(cfg, changed))
    assert {"gt_masks", "gt_boxes", "gt_has_mask", "gt_exclusion_masks"} <= found
    assert "image" in differences(examples, training_examples(cfg, tiny_coco, seed=1))


@FORMATS
@pytest.mark.parametrize("kind", ["removed", "polygons", "rle"])
def test_human_masks_are_forgotten_beside_those_of_models(
    augmented_cfg, make_tiny_coco, mask_format, kind
):
    def mark(data):
        (row,) = [x for x in data["annotations"] if x["id"] == 109]  # of two cats in an image
        row["mask_source"] = "model"
        return row

    def scramble(data):
        segmentation = mark(data)["segmentation"]
        replace_segmentations(REPLACEMENTS[kind])(data)
        mark(data)["segmentation"] = segmentation

    dataset, changed = make_tiny_coco(mark), make_tiny_coco(scramble)
    assert dataset.data != changed.data
    cfg = augmented_cfg(mask_format)
    examples = training_examples(cfg, dataset, num_epochs=2)
    assert any(x["instances"].gt_has_model_mask.any() for x in examples)
    assert differences(examples, training_examples(cfg, changed, num_epochs=2)) == set()
