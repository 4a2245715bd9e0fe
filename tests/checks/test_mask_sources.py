"""Who made a mask, in the checks of annotation files."""

import json

import pytest

from teacher_student_mask.checks import check_annotations
from teacher_student_mask.checks.evaluation_checks import check_for_evaluation
from teacher_student_mask.checks.mask_sources import has_known_source, is_from_model

TRIANGLE = [2, 2, 8, 2, 8, 6]
MASK = {"segmentation": [TRIANGLE]}
MODEL = {**MASK, "mask_source": "model"}
HUMAN = {**MASK, "mask_source": "human"}


def coco(*annotations):
    """A json with one image and the classes ant and cat; annotations are numbered."""
    defaults = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 6, 4]}
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 10, "width": 12}],
        "annotations": [{"id": i, **defaults, **x} for i, x in enumerate(annotations, start=1)],
        "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}],
    }


def check(data, **options):
    return check_annotations("a.json", data=data, **options)


def fields_of(report):
    return {(x.severity, x.field): x.count for x in report.findings}


def test_two_sources_are_known():
    assert all(map(has_known_source, (MASK, MODEL, HUMAN)))
    assert [is_from_model(x) for x in (MASK, MODEL, HUMAN)] == [False, True, False]


@pytest.mark.parametrize("source", [None, "", "sam", "Model", 1, True, ["model"], {}, float("nan")])
def test_others_are_errors_that_name_annotation_image_and_what_is_allowed(source):
    report = check(coco(MASK, {**MASK, "mask_source": source}, {**HUMAN, "mask_source": source}))
    (finding,) = report.errors
    assert finding.count == 2
    assert str(finding).startswith("a.json: annotation 2: 'mask_source' is ")
    assert "(image id 1); allowed: 'human' (as without the key), or 'model'" in str(finding)
    json.dumps(report.to_dict())


def test_human_and_model_masks_are_counted_apart():
    crowd = {**MODEL, "iscrowd": 1}
    report = check(coco(MASK, HUMAN, MODEL, MODEL, {"mask_source": "model"}, {}, crowd))
    ant, cat = report.classes
    assert (ant.masks, ant.model_masks, ant.boxes_only, ant.crowd) == (2, 2, 2, 1)
    assert ant.num_objects == 6 and cat.num_objects == cat.model_masks == 0
    header, _, row, *_ = report.class_table().splitlines()
    words = "class split objects human masks model masks boxes only crowd rectangles left out"
    assert header.split() == words.split()
    assert row.split() == ["ant", "-", "6", "2", "2", "2", "1", "0", "-"]
    # As ever where there is none.
    assert "human" not in check(coco(MASK)).class_table()


def test_a_models_rectangles_are_no_boxes_exported_as_masks():
    box = [[2, 2, 8, 2, 8, 6, 2, 6]]
    assert not check(coco({"segmentation": box, "mask_source": "model"})).warnings
    assert check(coco({"segmentation": box})).warnings


def test_a_seen_class_with_masks_of_models_alone_has_no_mask():
    other = {"category_id": 2}
    report = check(coco(MODEL, {**MASK, **other}), seen_classes="ant, cat")
    (warning,) = report.warnings
    assert "'ant', a class with 1 objects and no human mask" in str(warning)
    report = check(coco(MODEL, {**MASK, **other}), seen_classes="ant")
    (error,) = report.errors
    assert "no teacher learns from them" in str(error)


def test_a_broken_mask_of_a_model_is_an_error_in_unseen_classes_too():
    broken = {"segmentation": [[1, 2, 3, 4, 5, "6"]], "category_id": 2}
    data = coco(MASK, broken)
    assert fields_of(check(data, seen_classes="ant")) == {("warning", "segmentation"): 1}
    data = coco(MASK, {**broken, "mask_source": "model"})
    assert fields_of(check(data, seen_classes="ant")) == {("error", "segmentation"): 1}


def test_a_models_masks_are_no_ground_truth():
    areas = {"area": 12.0}
    data = coco({**MASK, **areas}, {**MODEL, **areas}, {**MODEL, **areas}, {**HUMAN, **areas})
    (error,) = check_for_evaluation("a.json", data).errors
    text = str(error)
    assert text.startswith("a.json: annotation 2: 'mask_source' is 'model'; of 4 objects 2 have a")
    assert "evaluate on human masks, or boxes alone with tasks=('bbox',)" in text
    assert "'mask_source' 'human'" in text
    assert not check_for_evaluation("a.json", data, reads_masks=False).errors
    good = coco({**MASK, **areas}, {**HUMAN, **areas})
    assert not check_for_evaluation("a.json", good).errors
