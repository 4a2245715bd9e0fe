"""Which classes are seen, when the training data have to say."""

import pytest
from bad_data import forget_masks
from detectron2.data import DatasetCatalog

from teacher_student_mask import TeacherStudentDatasetMapper, resolve_seen_classes
from teacher_student_mask.class_splits import AUTO
from teacher_student_mask.data import resolve_auto_settings


@pytest.fixture
def auto_cfg(tiny_cfg, tiny_coco):
    def make(min_masks, *opts, dataset=tiny_coco):
        cfg = tiny_cfg(dataset=dataset)
        cfg.DATASETS.SEEN_CLASSES = AUTO
        cfg.DATASETS.MIN_MASKS_PER_CLASS = min_masks
        cfg.merge_from_list(list(opts))
        return cfg

    return make


def test_no_class_with_enough_masks_is_an_error_with_the_counts(auto_cfg):
    for resolve in (resolve_auto_settings, TeacherStudentDatasetMapper):
        with pytest.raises(ValueError, match="MIN_MASKS_PER_CLASS 4 masks.* ant 3, cat 3, ship 2"):
            resolve(auto_cfg(4))


def test_a_settled_config_has_names_and_the_number_of_classes(auto_cfg):
    cfg = auto_cfg(3, "TEST.SEEN_CLASSES", AUTO, "MODEL.ROI_HEADS.NUM_CLASSES", 0)
    cfg.freeze()
    settled = resolve_auto_settings(cfg)
    assert settled.is_frozen() and settled.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert settled.DATASETS.SEEN_CLASSES == settled.TEST.SEEN_CLASSES == ', ["ant", "cat"]'
    assert cfg.DATASETS.SEEN_CLASSES == AUTO and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    assert resolve_auto_settings(settled) is settled
    only_number = resolve_auto_settings(cfg, needs_seen_classes=False)
    assert only_number.DATASETS.SEEN_CLASSES == AUTO
    assert only_number.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_masks_of_all_training_sets_count(auto_cfg, make_tiny_coco):
    first, second = make_tiny_coco(), make_tiny_coco(forget_masks(17))
    cfg = auto_cfg(4, "DATASETS.TRAIN", (first.name, second.name))
    assert (
        resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES == ', ["ant", "ship"]'
    )  # 6, 3 and 4 masks


def test_what_counts(auto_cfg, make_tiny_coco):
    """Neither crowds, nor masks of models, nor, where the config says so, rectangles."""
    square = {"bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "iscrowd": 0}

    def change(data):
        for x in data["annotations"]:
            x.update(square)
            if x["category_id"] == 17:
                x["mask_source"] = "model"
            elif x["category_id"] == 90:
                x["segmentation"] = [[1, 1, 9, 1, 9, 9]]

    cfg = auto_cfg(1, dataset=make_tiny_coco(change))
    assert resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES == ', ["ant", "ship"]'
    cfg.INPUT.RECTANGLE_AS_BOX_ONLY = True
    assert resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES == ', ["ship"]'


def test_the_mapper_follows_the_training_data(auto_cfg):
    cfg = auto_cfg(3)
    assert TeacherStudentDatasetMapper(cfg, True).seen_classes == {0, 1}
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
        with pytest.raises(ValueError, match=r"'auto'.* \('gone',\), but: .*config.yaml in the O"):
            resolve_auto_settings(cfg)
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        resolve_auto_settings(auto_cfg(1, "DATASETS.TRAIN", ()))


@pytest.mark.parametrize(
    "names",
    [["cat"], ["1", "2.5"], ["all"], [AUTO], ["x.json"], ["cat, big", "dog"], ['a "b", c', "é"]],
)
def test_names_survive_a_config(names, auto_cfg, make_tiny_coco, tmp_path):
    """A name such as "1" would be read as a number, "all" as every class, "a, b" as two."""

    def rename(data):
        categories = sorted(data["categories"], key=lambda x: x["id"])
        for x, name in zip(categories, [*names, "another", "third"]):
            x["name"] = name
        for x in data["annotations"]:
            if x["category_id"] not in [c["id"] for c in categories[: len(names)]]:
                x["segmentation"] = None

    resolved = resolve_auto_settings(auto_cfg(1, dataset=make_tiny_coco(rename)))
    path = tmp_path / "config.yaml"
    path.write_text(resolved.dump())
    again = auto_cfg(1)
    again.merge_from_file(str(path))
    classes = [*names, "another"]
    assert resolve_seen_classes(again.DATASETS.SEEN_CLASSES, classes) == list(range(len(names)))
