"""The named splits against the id lists of the field's code, and every way to name seen classes."""

import json

import pytest
from detectron2.data import MetadataCatalog

from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES, resolve_seen_classes

# Contiguous id, COCO id and name as in the lists of OPMask, ContrastMask and seg_every_thing.
# fmt: off
VOC_TABLE = [
    (0, 1, "person"), (1, 2, "bicycle"), (2, 3, "car"), (3, 4, "motorcycle"), (4, 5, "airplane"),
    (5, 6, "bus"), (6, 7, "train"), (8, 9, "boat"), (14, 16, "bird"), (15, 17, "cat"),
    (16, 18, "dog"), (17, 19, "horse"), (18, 20, "sheep"), (19, 21, "cow"), (39, 44, "bottle"),
    (56, 62, "chair"), (57, 63, "couch"), (58, 64, "potted plant"), (60, 67, "dining table"),
    (62, 72, "tv"),
]
NONVOC_TABLE = [
    (7, 8, "truck"), (9, 10, "traffic light"), (10, 11, "fire hydrant"), (11, 13, "stop sign"),
    (12, 14, "parking meter"), (13, 15, "bench"), (20, 22, "elephant"), (21, 23, "bear"),
    (22, 24, "zebra"), (23, 25, "giraffe"), (24, 27, "backpack"), (25, 28, "umbrella"),
    (26, 31, "handbag"), (27, 32, "tie"), (28, 33, "suitcase"), (29, 34, "frisbee"),
    (30, 35, "skis"), (31, 36, "snowboard"), (32, 37, "sports ball"), (33, 38, "kite"),
    (34, 39, "baseball bat"), (35, 40, "baseball glove"), (36, 41, "skateboard"),
    (37, 42, "surfboard"), (38, 43, "tennis racket"), (40, 46, "wine glass"), (41, 47, "cup"),
    (42, 48, "fork"), (43, 49, "knife"), (44, 50, "spoon"), (45, 51, "bowl"), (46, 52, "banana"),
    (47, 53, "apple"), (48, 54, "sandwich"), (49, 55, "orange"), (50, 56, "broccoli"),
    (51, 57, "carrot"), (52, 58, "hot dog"), (53, 59, "pizza"), (54, 60, "donut"), (55, 61, "cake"),
    (59, 65, "bed"), (61, 70, "toilet"), (63, 73, "laptop"), (64, 74, "mouse"), (65, 75, "remote"),
    (66, 76, "keyboard"), (67, 77, "cell phone"), (68, 78, "microwave"), (69, 79, "oven"),
    (70, 80, "toaster"), (71, 81, "sink"), (72, 82, "refrigerator"), (73, 84, "book"),
    (74, 85, "clock"), (75, 86, "vase"), (76, 87, "scissors"), (77, 88, "teddy bear"),
    (78, 89, "hair drier"), (79, 90, "toothbrush"),
]
# fmt: on
TABLES = [("voc", VOC_TABLE), ("nonvoc", NONVOC_TABLE)]


@pytest.fixture(scope="module")
def coco_metadata():
    return MetadataCatalog.get("coco_2017_val")


def test_the_splits_are_disjoint_and_make_up_coco(coco_metadata):
    assert len(VOC_CLASSES) == 20 and len(NONVOC_CLASSES) == 60
    assert not set(VOC_CLASSES) & set(NONVOC_CLASSES)
    assert set(VOC_CLASSES) | set(NONVOC_CLASSES) == set(coco_metadata.thing_classes)


@pytest.mark.parametrize("spec, table", TABLES)
def test_named_splits_give_the_ids_of_the_table(spec, table, coco_metadata):
    thing_classes = coco_metadata.thing_classes
    contiguous_ids = resolve_seen_classes(spec, thing_classes)
    assert contiguous_ids == [contiguous_id for contiguous_id, _, _ in table]
    assert [thing_classes[i] for i in contiguous_ids] == [name for _, _, name in table]


@pytest.mark.parametrize("spec, table", TABLES)
def test_table_agrees_with_the_ids_of_detectron2(spec, table, coco_metadata):
    contiguous_ids = coco_metadata.thing_dataset_id_to_contiguous_id
    assert {coco_id: i for i, coco_id, _ in table}.items() <= contiguous_ids.items()


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
