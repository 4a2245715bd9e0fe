"""The named splits against the id lists of the field's code, and every way to name seen classes."""

import json

import pytest
from detectron2.data import MetadataCatalog

from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES, resolve_seen_classes

# Contiguous ids and names as in the lists of OPMask, ContrastMask and seg_every_thing.
# fmt: off
VOC = {
    0: "person", 1: "bicycle", 2: "car", 3: "motorcycle", 4: "airplane", 5: "bus", 6: "train",
    8: "boat", 14: "bird", 15: "cat", 16: "dog", 17: "horse", 18: "sheep", 19: "cow", 39: "bottle",
    56: "chair", 57: "couch", 58: "potted plant", 60: "dining table", 62: "tv",
}
# fmt: on


@pytest.fixture(scope="module")
def coco_metadata():
    return MetadataCatalog.get("coco_2017_val")


def test_the_splits_are_disjoint_and_make_up_coco(coco_metadata):
    assert len(VOC_CLASSES) == 20 and len(NONVOC_CLASSES) == 60
    assert not set(VOC_CLASSES) & set(NONVOC_CLASSES)
    assert set(VOC_CLASSES) | set(NONVOC_CLASSES) == set(coco_metadata.thing_classes)


def test_named_splits_give_the_ids_of_the_field(coco_metadata):
    thing_classes = coco_metadata.thing_classes
    assert resolve_seen_classes("voc", thing_classes) == list(VOC)
    assert [thing_classes[i] for i in VOC] == list(VOC.values())
    others = [i for i in range(80) if i not in VOC]
    assert resolve_seen_classes("nonvoc", thing_classes) == others


def test_named_split_of_some_of_cocos_classes():
    assert resolve_seen_classes("voc", ["zebra", "tv", "cup", "cat"]) == [1, 3]
    assert resolve_seen_classes("nonvoc", ["zebra", "tv", "cup", "cat"]) == [0, 2]


@pytest.mark.parametrize("spec", ["nut, washer", "washer,nut", " nut ,washer, ", "nut,washer,nut"])
def test_names_with_commas_come_back_sorted_and_once(spec):
    assert resolve_seen_classes(spec, ["washer", "bolt", "nut"]) == [0, 2]


@pytest.mark.parametrize(
    "file_name, content",
    [
        ("seen.json", json.dumps(["nut", "washer, large", "nut"])),
        ("seen.txt", "# masks of these\nnut\n\n  washer, large  # twice\nnut\n"),
        ("seen", "washer, large\nnut\n"),
    ],
)
def test_files(tmp_path, file_name, content):
    path = tmp_path / file_name
    path.write_text(content)
    assert resolve_seen_classes(str(path), ["washer, large", "bolt", "nut"]) == [0, 2]


@pytest.mark.parametrize(
    "name, nearest",
    [("dinning table", "dining table"), ("PERSON", "person"), ("motorcyle", "motorcycle")],
)
def test_unknown_name_is_an_error_with_the_nearest_names(name, nearest, coco_metadata):
    with pytest.raises(ValueError, match=f"no class '{name}' .*nearest: .*{nearest}"):
        resolve_seen_classes(f"cat, {name}", coco_metadata.thing_classes)


@pytest.mark.parametrize("spec", ["", " ", ",", " , ,"])
def test_no_name_is_an_error(spec):
    with pytest.raises(ValueError, match="names no class"):
        resolve_seen_classes(spec, ["bolt", "nut"])


@pytest.mark.parametrize("spec", ["nothing/here.txt", "nothing/here.json"])
def test_missing_file_is_an_error(spec):
    with pytest.raises(ValueError, match="file that does not exist: 'nothing/here"):
        resolve_seen_classes(spec, ["bolt", "nut"])


@pytest.mark.parametrize("content", ["[nut", '{"nut": 1}', "[1, 2]"])
def test_json_of_another_form_is_an_error(tmp_path, content):
    path = tmp_path / "seen.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a json list of class names"):
        resolve_seen_classes(str(path), ["bolt", "nut"])


@pytest.mark.parametrize("spec", ["voc", "nonvoc"])
def test_named_split_of_another_dataset_is_an_error(spec):
    with pytest.raises(ValueError, match=r"split of COCO's 80 classes.*\['bolt', 'nut'\]"):
        resolve_seen_classes(spec, ["cat", "bolt", "nut", "zebra"])
