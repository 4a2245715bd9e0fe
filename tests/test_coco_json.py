"""Counts and limits of the checks of COCO jsons; tests/bad_data.py has what is an error."""

import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask import InputError
from teacher_student_mask.coco_json import (
    check_coco,
    is_from_model,
    read_coco,
    read_json,
    write_json,
)
from teacher_student_mask.coco_json.report import RULES

HEIGHT, WIDTH = 12, 16


def coco(*annotations, **image):
    """A json with one image and the classes ant (seen) and cat; annotations are numbered."""
    defaults = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 6, 4]}
    rows = [{"id": i, **defaults, **x} for i, x in enumerate(annotations, start=1)]
    images = [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH} | image]
    categories = [{"id": 2, "name": "cat"}, {"id": 1, "name": "ant"}]
    return {"images": images, "annotations": rows, "categories": categories}


def check(data, **options):
    return check_coco("a.json", data=data, **options)


def fields_of(report):
    return {(x.severity, RULES[x.rule].field): x.count for x in report.findings}


TRIANGLE = [2, 2, 8, 2, 8, 6]


def rle(mask):
    found = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def test_objects_are_counted_for_each_class():
    report = check(
        coco(
            {"segmentation": [TRIANGLE]},
            {"segmentation": [[2, 2, 8, 2, 8, 6, 2, 6]]},
            {"segmentation": None},
            {"segmentation": []},
            {},
            {"segmentation": [[1, 2, 3, 4]]},
            {"segmentation": [TRIANGLE], "bbox": [2, 2, 0, 4]},
            {"segmentation": [TRIANGLE], "bbox": [20, 2, 3, 4]},
            {"segmentation": [TRIANGLE], "iscrowd": 1},
            {"segmentation": rle(np.zeros((HEIGHT, WIDTH))), "category_id": 2},
            {"segmentation": rle(np.ones((HEIGHT, WIDTH))), "category_id": 2},
        ),
        seen_classes="ant",
    )
    ant, cat = report.classes
    assert (ant.name, ant.category_id, ant.is_seen) == ("ant", 1, True)
    assert (ant.masks, ant.boxes_only, ant.crowd, ant.rectangles) == (4, 4, 1, 1)
    assert (cat.name, cat.category_id, cat.is_seen) == ("cat", 2, False)
    assert (cat.masks, cat.boxes_only, cat.crowd, cat.rectangles) == (1, 1, 0, 0)


def test_auto_is_the_classes_with_enough_human_masks():
    full, empty = rle(np.ones((HEIGHT, WIDTH))), rle(np.zeros((HEIGHT, WIDTH)))
    data = coco(
        {"segmentation": [TRIANGLE]},
        {"segmentation": full},
        {"segmentation": [TRIANGLE], "category_id": 2},
        {"segmentation": empty, "category_id": 2},  # these three do not count
        {"segmentation": full, "category_id": 2, "iscrowd": 1},
        {"segmentation": full, "category_id": 2, "mask_source": "model"},
        {"segmentation": full, "category_id": 7},  # no such class: an error of its own
    )

    def seen_with(number):
        report = check(data, seen_classes="auto", min_masks_per_class=number)
        return [x.name for x in report.classes if x.is_seen], report

    assert seen_with(1)[0] == ["ant", "cat"] and seen_with(2)[0] == ["ant"]
    seen, report = seen_with(3)
    assert seen == []
    (finding,) = [x for x in report.errors if x.rule == "seen classes"]
    assert "but no class has DATASETS.MIN_MASKS_PER_CLASS 3 masks" in str(finding)
    assert "ant 2, cat 1" in str(finding)


@pytest.mark.parametrize(
    "polygons, is_rectangle",
    [
        ([[2, 2, 8, 2, 8, 6, 2, 6]], True),
        ([[2, 6, 2, 2, 8, 2, 8, 6, 2, 6]], True),  # closed, other direction and start
        ([[2, 2, 5, 2, 8, 2, 8, 6, 2, 6]], True),  # a point on an edge
        ([[2.4, 2, 8, 2, 8, 6, 2.4, 6]], True),  # the box was rounded
        ([TRIANGLE], False),
        ([[2, 2, 8, 2, 8, 6, 2, 5]], False),
        ([[4, 2, 8, 2, 8, 6, 4, 6]], False),  # not the box
        ([[2, 2, 8, 2, 8, 6, 2, 6], TRIANGLE], False),
    ],
)
def test_rectangles_are_polygons_equal_to_their_box(polygons, is_rectangle):
    report = check(coco({"segmentation": polygons}))
    assert report.classes[0].rectangles == is_rectangle
    assert fields_of(report) == ({("warning", "name"): 1} if is_rectangle else {})


@pytest.mark.parametrize(
    "box, field",
    [
        ([0, 0, 16, 12], None),
        ([-1, -1, 18, 14], None),  # pixels counted from 1, or rounded
        ([-1.01, 0, 16, 12], ("warning", "bbox")),
        ([0, 0, 16, 13.01], ("warning", "bbox")),
        ([0, 0, 1e-5, 12], ("warning", "bbox")),
        ([-3, 0, 3, 12], ("warning", "bbox")),
        ([16, 0, 3, 12], ("warning", "bbox")),
        ([0, 0, 100_000, 12], ("warning", "bbox")),
        ([0, 0, 100_001, 12], ("error", "bbox")),
        ([-100_001, 0, 100_000, 12], ("error", "bbox")),
        ([0, 0, 10**400, 12], ("error", "bbox")),
        ([True, 0, 10, 12], ("error", "bbox")),
    ],
)
def test_limits_of_boxes(box, field):
    assert fields_of(check(coco({"bbox": box}))) == ({field: 1} if field else {})


def test_a_finding_counts_all_and_names_the_first():
    (finding,) = check(coco(*[{"iscrowd": 2}] * 7, {})).findings
    assert finding.count == 7 and len(finding.examples) == 5
    assert str(finding) == (
        "a.json: annotation 1: 'iscrowd' is 2; allowed: 0 or 1 (7 in all: 1, 2, 3, 4, 5, ...)."
    )


def test_masks_that_training_does_not_read_make_warnings():
    broken = {"segmentation": {"size": [3, 3], "counts": "1"}}
    data = coco(broken, broken | {"category_id": 2}, broken | {"iscrowd": 1, "category_id": 2})
    assert fields_of(check(data)) == {("error", "segmentation"): 3}
    found = rules_of(check(data, seen_classes="cat"))
    assert (found["broken RLE"], found["unread mask"]) == (1, 2)
    data["annotations"][0]["mask_source"] = "model"  # these are read for unseen classes, too
    assert rules_of(check(data, seen_classes="cat"))["broken RLE"] == 2


MASK = {"segmentation": [TRIANGLE]}
MODEL, HUMAN = MASK | {"mask_source": "model"}, MASK | {"mask_source": "human"}


def test_human_and_model_masks_are_counted_apart():
    crowd = {**MODEL, "iscrowd": 1}
    report = check(coco(MASK, HUMAN, MODEL, MODEL, {"mask_source": "model"}, {}, crowd))
    assert report.errors == [] and [is_from_model(x) for x in (MASK, MODEL)] == [False, True]
    ant, cat = report.classes
    assert (ant.masks, ant.model_masks, ant.boxes_only, ant.crowd) == (2, 2, 2, 1)
    assert ant.num_objects == 6 and cat.num_objects == cat.model_masks == 0
    header, _, row, *_ = report.class_table().splitlines()
    words = "class split objects human masks model masks boxes only crowd rectangles"
    assert header.split() == words.split()
    assert row.split() == ["ant", "-", "6", "2", "2", "2", "1", "0"]


def test_masks_of_models_teach_nothing_and_are_not_boxes_exported_as_masks():
    box = [[2, 2, 8, 2, 8, 6, 2, 6]]
    assert not check(coco({"segmentation": box, "mask_source": "model"})).findings
    data = coco(MODEL, MASK | {"category_id": 2})
    (warning,) = check(data, seen_classes="ant, cat").warnings
    assert "'ant', a class with 1 objects and no human mask" in str(warning)
    (error,) = check(data, seen_classes="ant").errors
    assert error.rule == "no seen mask"


def test_types_are_checked_when_a_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    data = coco({"segmentation": "any", "of_nobody": [1]}) | {"more": {"x": 1.5}}
    write_json(path, data)
    assert read_coco(path) == data
    data["annotations"][0]["bbox"] = [1, 2, 3]
    write_json(path, data)
    with pytest.raises(InputError, match=r"a.json: annotation 1: 'bbox' is \[1, 2, 3\]; allowed"):
        read_coco(path)
    for content, words in (("[", "cannot be read"), ("[]", "is a list")):
        path.write_text(content)
        with pytest.raises(InputError, match=f"a.json: .*{words}"):
            read_coco(path)
    with pytest.raises(InputError, match="none.json: cannot be read: .*No such file"):
        read_json(tmp_path / "none.json")


def test_half_a_surrogate_pair_harms_only_what_is_read():
    data = coco({"\ud800": 1, "note": "\ud800"})
    assert check(data).findings == []
    data["annotations"][0]["mask_source"] = "\ud800"
    (error,) = check(data).errors
    assert error.rule == "annotation.mask_source" and "\\ud800" in str(error)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0)), max_size=6))
def test_masks_of_pycocotools_are_read_with_their_areas(shapes):
    for height, width, seed in shapes:
        mask = np.random.default_rng(seed).random((height, width)) < 0.3
        data = coco({"segmentation": rle(mask), "bbox": [0, 0, width, height]}, {})
        data["images"][0].update(height=height, width=width)
        report = check(data)
        assert report.errors == []
        assert report.classes[0].masks == bool(mask.any())


def runs_of(counts):
    """The run lengths that a string stands for, read one character after the other; None: none."""
    runs, number, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if shift > 30:
            return None
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return runs if runs and not shift else None


COUNTS = st.text(st.characters(min_codepoint=46, max_codepoint=112), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.one_of(COUNTS, COUNTS.map(lambda x: x + "0")))
def test_broken_strings_are_found(counts):
    runs = runs_of(counts)
    is_mask = bool(runs) and min(runs) >= 0 and 0 < sum(runs) <= 100_000
    width = sum(runs) if is_mask else 5
    mask = {"size": [1, width], "counts": counts}
    report = check(coco({"segmentation": mask}, height=1, width=width))
    assert (report.errors == []) == is_mask


def rules_of(report):
    return {x.rule: x.count for x in report.findings}


@pytest.mark.parametrize("seen_classes", [None, "all", "ant", "cat"])
def test_the_root_that_some_exports_add_is_told(seen_classes):
    data = coco({}, {"category_id": 2, "bbox": [1, 1, 4, 4]})
    data["categories"].append({"id": 0, "name": "animals", "supercategory": "none"})
    for row in data["categories"][:2]:
        row["supercategory"] = "animals"
    assert rules_of(check(data, seen_classes=seen_classes))["root category"] == 1
    data["annotations"][0]["category_id"] = 0  # it has an object, so it is one of the classes
    assert "root category" not in rules_of(check(data, seen_classes=seen_classes))
    # Its own supercategory, as Label Studio and Datumaro may write it.
    data = coco({}) | {
        "categories": [{"id": i, "name": "a" * i, "supercategory": "a" * i} for i in (1, 2)]
    }
    assert "root category" not in rules_of(check(data, seen_classes="all"))


# Outlines of two objects, of an image of 96 x 72 pixels, and their boxes.
OUTLINES = [[10, 10, 50, 12, 44, 40, 14, 44], [60, 20, 88, 60, 56, 60]]
BOXES = [[10, 10, 40, 34], [56, 20, 32, 40]]


def two_objects(boxes, has_masks=(True, True), **fields):
    masks = [[x] if known else None for x, known in zip(OUTLINES, has_masks)]
    rows = [{"bbox": x, "segmentation": mask, **fields} for x, mask in zip(boxes, masks)]
    return coco(*rows, height=72, width=96)


CORNERS = [[x, y, x + w, y + h] for x, y, w, h in BOXES]


@pytest.mark.parametrize(
    "boxes, has_masks, expected",
    [
        (BOXES, (1, 1), {}),
        ([[10.6, 9.5, 39, 35], BOXES[1]], (1, 1), {}),  # rounded, or counted from 1
        ([[5, 5, 55, 45], BOXES[1]], (1, 1), {}),  # parts of the object are hidden
        ([[0, 0, 12, 9]] * 2, (1, 1), {"box beside its mask": 2, "object twice": 0}),
        ([[30, 27, 40, 34], BOXES[1]], (1, 1), {"box beside its mask": 1}),
        ([[10, 10, 15, 34], BOXES[1]], (1, 1), {"box beside its mask": 1}),
        ([[0, 0, 96, 72], BOXES[1]], (1, 1), {"box beside its mask": 1}),
        (CORNERS, (1, 1), {"XYXY box": 2}),
        (CORNERS, (1, 0), {"XYXY box": 2}),
        (CORNERS, (0, 1), {"XYXY box": 2}),
        (CORNERS, (0, 0), {"box reaches out": 1}),  # one alone may be a slip
        ([CORNERS[1]] * 2, (0, 0), {"XYXY box": 2, "object twice": 1}),
        ([CORNERS[0], BOXES[1]], (1, 1), {"XYXY box": 1}),
        ([[0.1, 0.14, 0.42, 0.47], [0.58, 0.28, 0.33, 0.56]], (0, 0), {"small box": 2}),
        ([[0.1, 0.14, 0.42, 0.47], [0, 0, 1, 1]], (0, 1), {"small box": 2}),
        ([[3, 4, 0.5, 0.5], BOXES[1]], (0, 1), {"small box": 1}),
        ([[3, 4, 0.5, 20], BOXES[1]], (0, 1), {}),
    ],
)
def test_boxes_are_compared_with_masks_and_images(boxes, has_masks, expected):
    data = two_objects(boxes, has_masks)
    data["annotations"][1]["category_id"] = 1 if expected.get("object twice") else 2
    expected = {rule: count for rule, count in expected.items() if count}
    assert rules_of(check(data)) == expected
    for row in data["annotations"]:
        row.update(area=1.0, iscrowd=0)
    found = rules_of(check(data, use="evaluation", reads_masks=False))
    assert found == {k: v for k, v in expected.items() if k != "box reaches out"}


def test_objects_that_are_there_twice():
    data = coco({}, {"category_id": 2}, {"image_id": 2}, {"bbox": [2, 2, 6.2, 4]}, {"iscrowd": 1})
    data["images"].append({"id": 2, "file_name": "2.png", "height": HEIGHT, "width": WIDTH})
    assert rules_of(check(data)) == {}
    data["annotations"] += [dict(x, id=i + 10) for i, x in enumerate(data["annotations"][:3])]
    data["annotations"][-1]["bbox"] = [2.01, 2, 6, 3.99]
    (finding,) = check(data).findings
    assert (finding.rule, finding.count) == ("object twice", 3)
    assert [name for name, _ in finding.examples] == ["10", "11", "12"]


@pytest.mark.parametrize(
    "attributes, is_told",
    [({"rotation": 90.0}, True), ({"rotation": 0.0}, False), ({"rotation": 360}, False)]
    + [({"rotation": "90"}, False), ({"occluded": True}, False), (None, False), ([], False)],
)
def test_boxes_before_they_were_turned(attributes, is_told):
    data = two_objects(BOXES, (False, True), attributes=attributes)
    # The second has a mask of its own.
    assert rules_of(check(data)) == ({"rotated box": 1} if is_told else {})


@pytest.mark.parametrize("num_crowds, is_told", [(1, False), (2, True), (4, True)])
def test_objects_in_parts_that_are_marked_as_crowds(num_crowds, is_told):
    rows = [{"bbox": [i, 2, 6, 4], "iscrowd": int(i < num_crowds)} for i in range(4)]
    report = check(coco(*rows, {"category_id": 2}))
    assert rules_of(report) == ({"many crowds": 1} if is_told else {})


def test_real_annotations_raise_no_false_alarm(coco_root):
    val = f"{coco_root}/annotations/instances_val2017.json"
    report = check_coco(val, image_root=f"{coco_root}/val2017", seen_classes="voc", num_classes=80)
    assert report.findings == []
    assert sum(x.masks + x.crowd for x in report.classes) == report.num_annotations
    paths = [f"{coco_root}/annotations/instances_train2017.json"]
    paths += [f"{os.path.dirname(coco_root)}/car_parts/{x}.json" for x in ("train", "test")]
    fixtures = Path(__file__).with_name("fixtures")
    paths += [fixtures / "label_studio/result.json", *fixtures.glob("cvat/annotations/*.json")]
    for path in filter(os.path.exists, paths):
        report = check_coco(path)
        # Label Studio's example has a rectangle as its only mask.
        found = [x for x in report.findings if x.rule != "mostly rectangles"]
        assert sum(x.count for x in found) <= report.num_annotations / 1000
