"""Which classes are seen, when the training data have to say."""

import ast
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st

from teacher_student_mask import TeacherStudentDatasetMapper, resolve_seen_classes
from teacher_student_mask.class_splits import AUTO
from teacher_student_mask.data import resolve_auto_settings, seen_classes
from teacher_student_mask.data.seen_classes import (
    ClassCount,
    choose_seen_classes,
    count_objects,
    training_seen_classes,
)
from teacher_student_mask.engine import UnseenMaskGuard


@pytest.fixture
def auto_cfg(tiny_cfg, tiny_coco):
    def make(min_masks, *opts, dataset=tiny_coco):
        cfg = tiny_cfg(dataset=dataset)
        cfg.DATASETS.SEEN_CLASSES = AUTO
        cfg.DATASETS.MIN_MASKS_PER_CLASS = min_masks
        cfg.merge_from_list(list(opts))
        return cfg

    return make


def counts_of(data):
    """{name: (objects, masks)} of a COCO json, without any code of the package."""
    found = {}
    for category in data["categories"]:
        objects = [
            x
            for x in data["annotations"]
            if x["category_id"] == category["id"] and not x.get("iscrowd")
        ]
        masks = [x for x in objects if x.get("segmentation") and "mask_source" not in x]
        found[category["name"]] = (len(objects), len(masks))
    return found


def test_objects_and_masks_are_counted_without_crowds_and_masks_of_models(make_tiny_coco):
    def by_model(data):
        for annotation in data["annotations"]:
            if annotation["id"] in (109, 110):
                annotation["mask_source"] = "model"

    tiny = make_tiny_coco(by_model)
    counts = count_objects(DatasetCatalog.get(tiny.name), tiny.thing_classes)
    # By hand: the json has three ants and two ships with a mask, and a crowd of ants.
    assert counts == [ClassCount("ant", 4, 3), ClassCount("cat", 3, 1), ClassCount("ship", 4, 2)]
    assert {x.name: (x.objects, x.masks) for x in counts} == counts_of(tiny.data)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 30))
def test_seen_are_those_with_enough_masks(masks, min_masks):
    counts = [ClassCount(f"class {i}", 30, n) for i, n in enumerate(masks)]
    expected = [f"class {i}" for i, n in enumerate(masks) if n >= min_masks]
    if expected:
        assert choose_seen_classes(counts, min_masks) == expected
    else:
        with pytest.raises(ValueError, match="no class has DATASETS.MIN_MASKS_PER_CLASS"):
            choose_seen_classes(counts, min_masks)


def test_the_table_has_the_classes_with_most_masks_first(log):
    choose_seen_classes([ClassCount("1e3", 9, 1), ClassCount("b", 7, 5), ClassCount("c", 8, 5)], 5)
    lines = [line.split() for line in log.text.splitlines()]
    rows = [x for x in lines if x and x[-1] in ("seen", "unseen")]
    assert rows == [["c", "8", "5", "seen"], ["b", "7", "5", "seen"], ["1e3", "9", "1", "unseen"]]
    assert "2 of 3 classes have at least DATASETS.MIN_MASKS_PER_CLASS 5 masks" in log.text


def test_no_class_with_enough_masks_is_an_error_with_the_counts(auto_cfg):
    for resolve in (resolve_auto_settings, training_seen_classes):
        with pytest.raises(ValueError, match="MIN_MASKS_PER_CLASS 4 masks.* ant 3, cat 3, ship 2"):
            resolve(auto_cfg(4))
    with pytest.raises(ValueError, match="MIN_MASKS_PER_CLASS is 0; it must be 1 or more"):
        resolve_auto_settings(auto_cfg(0))
    many = [ClassCount(f"{i}", 9, 0) for i in range(25)]
    with pytest.raises(ValueError, match=", and 5 classes with no more"):
        choose_seen_classes(many, 1)


def test_a_settled_config_has_names_and_the_number_of_classes(auto_cfg):
    cfg = auto_cfg(3, "TEST.SEEN_CLASSES", AUTO, "MODEL.ROI_HEADS.NUM_CLASSES", 0)
    cfg.freeze()
    settled = resolve_auto_settings(cfg)
    assert settled.is_frozen() and settled.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert settled.DATASETS.SEEN_CLASSES == settled.TEST.SEEN_CLASSES == "ant, cat"
    assert cfg.DATASETS.SEEN_CLASSES == AUTO and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    assert resolve_auto_settings(settled) is settled
    only_number = resolve_auto_settings(cfg, needs_seen_classes=False)
    assert only_number.DATASETS.SEEN_CLASSES == AUTO
    assert only_number.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_masks_of_all_training_sets_count(auto_cfg, make_tiny_coco):
    def forget_cats(data):
        for annotation in data["annotations"]:
            if annotation["category_id"] == 17:
                annotation["segmentation"] = None

    first, second = make_tiny_coco(), make_tiny_coco(forget_cats)
    cfg = auto_cfg(4, "DATASETS.TRAIN", (first.name, second.name))
    assert resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES == "ant, ship"  # 6, 3 and 4 masks


def test_mapper_and_guard_follow_the_training_data(auto_cfg):
    cfg = auto_cfg(3)
    assert TeacherStudentDatasetMapper(cfg, True).seen_classes == {0, 1}
    assert UnseenMaskGuard(resolve_auto_settings(cfg)).seen_classes == {0, 1}
    # An object without a mask in a seen class is simply one.
    image = next(x for x in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]) if x["image_id"] == 7)
    image["annotations"] = [x for x in image["annotations"] if x["category_id"] == 0]
    instances = TeacherStudentDatasetMapper(cfg, True)(image)["instances"]
    assert instances.gt_has_mask.tolist() == [True, True, False]


def test_what_was_not_counted_says_so():
    with pytest.raises(ValueError, match="only the training annotations can answer"):
        resolve_seen_classes(AUTO, ["ant"])
    assert resolve_seen_classes(f", {AUTO}", ["ant", AUTO]) == [1]


def test_training_data_that_are_gone_are_named(auto_cfg):
    for opts in ([], ["MODEL.ROI_HEADS.NUM_CLASSES", 0]):
        cfg = auto_cfg(1, "DATASETS.TRAIN", ("gone",), *opts)
        with pytest.raises(
            ValueError, match=r"'auto'.* \('gone',\), but: .*config.yaml in the OUT"
        ):
            resolve_auto_settings(cfg)
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        resolve_auto_settings(auto_cfg(1, "DATASETS.TRAIN", ()))


@pytest.mark.parametrize(
    "names",
    [["cat"], ["1"], ["1", "2.5"], ["all"], ["voc"], [AUTO], ["x.json"], ["ant", "big cat"]]
    + [["cat, big", "dog"], [" ant"], ['a "b", c', "é"], ["[1]", "x"]],
)
def test_names_survive_a_config(names, auto_cfg, tmp_path):
    """A name such as "1" would be read as a number, "all" as every class, "a, b" as two."""
    classes = [*names, "another"]
    cfg = auto_cfg(1)
    cfg.DATASETS.SEEN_CLASSES = seen_classes._spec_of(names, classes)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    again = auto_cfg(1)
    again.merge_from_file(str(path))
    assert resolve_seen_classes(again.DATASETS.SEEN_CLASSES, classes) == list(range(len(names)))
    with pytest.raises((SyntaxError, ValueError)):
        ast.literal_eval(cfg.DATASETS.SEEN_CLASSES)


@pytest.mark.parametrize(
    "segmentation, counts",
    [
        ([[1, 1, 9, 1, 9, 9]], True),
        ([np.array([1.0, 1, 9, 1, 9, 9])], True),  # of a function that reads its own files
        ([[1, 1, 9, 1, 5, 1]], False),  # without area
        ([[30, 30, 40, 30, 40, 40]], False),  # outside the image
        ([[1, 1, 9, 9]], False),
        ({"size": [10, 10], "counts": [100]}, False),
        ({"size": [10, 10], "counts": [90, 10]}, True),
        ({"size": [10, 10], "counts": b"j200"}, False),  # runs that are not 100 pixels
        ([[1, 1, 9, 1, 9, 9], []], True),
        ([], False),
        (None, False),
    ],
)
def test_masks_that_cover_nothing_do_not_count(segmentation, counts):
    """A class of empty RLEs was seen by "auto", and then had nothing to learn from."""
    obj = {"category_id": 0, "bbox": [1, 1, 8, 8], "segmentation": segmentation}
    image = {"height": 10, "width": 10, "annotations": [obj]}
    assert count_objects([image], ["ant"]) == [ClassCount("ant", 1, int(counts))]


def test_rectangles_do_not_count_where_they_are_boxes():
    box = {"category_id": 0, "bbox": [1, 1, 8, 8], "bbox_mode": BoxMode.XYWH_ABS}
    rectangle = {**box, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    triangle = {**box, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    crowd = {**triangle, "iscrowd": 1}
    image = {"height": 10, "width": 10, "annotations": [crowd, rectangle, triangle, rectangle]}
    assert count_objects([image], ["ant"]) == [ClassCount("ant", 3, 3)]
    assert count_objects([image], ["ant"], True) == [ClassCount("ant", 3, 1)]


def test_a_file_is_read_once_for_an_answer(auto_cfg, tiny_coco, monkeypatch):
    calls = []
    get = DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: calls.append(name) or get(name))
    resolve_auto_settings(auto_cfg(3, "MODEL.ROI_HEADS.NUM_CLASSES", 0))
    assert calls == [tiny_coco.name]
    assert json.loads(json.dumps(MetadataCatalog.get(tiny_coco.name).thing_classes))
