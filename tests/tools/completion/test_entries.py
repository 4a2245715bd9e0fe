"""Which jsons tools/complete_masks.py refuses, and what it says; the package's checks agree."""

import json

import pytest

from completion.entries import HUMAN_MASK, MADE_MEMBERS, TARGET
from completion.index import index_annotations
from completion.results import _changes
from teacher_student_mask.checks import check_annotations

TRIANGLE = [[2.0, 2.0, 12.0, 2.0, 2.0, 12.0]]
SEGMENTATION = (
    "a list of polygons [[x, y, x, y, x, y, ...], ...], an RLE with 'size' and 'counts', "
)
SEGMENTATION += "or null for an object without a mask"


def make():
    """One object with a mask (number 1, id "é"), one without (number 2, id 8)."""
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [
            {"id": "é", "image_id": 7, "category_id": 3, "bbox": [2, 2, 10, 10]}
            | {"segmentation": TRIANGLE},
            {"id": 8, "image_id": 7, "category_id": 3, "bbox": [2, 2, 10, 10]},
        ],
        "categories": [{"id": 3, "name": "ant"}, {"id": 5, "name": "bee"}],
    }


def write(tmp_path, data):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def set_member(key, row, **members):
    def change(data):
        data[key][row].update(members)

    return change


def set_image(**members):
    return set_member("images", 0, **members)


def set_human(**members):
    return set_member("annotations", 0, **members)


def set_target(**members):
    return set_member("annotations", 1, **members)


IMAGE, HUMAN = "image number 1 (id 7): ", "annotation number 1 (id 'é'): "
OBJECT = "annotation number 2 (id 8): "
FOUR_NUMBERS = "allowed: four finite numbers [x, y, width, height]."
PIXELS = "allowed: a whole number of pixels from 1 to 536870911."
FAR = "allowed: pixels, at most 100000 outside the image."


@pytest.mark.parametrize(
    "change, sentence",
    [
        # Of the layout.
        (lambda x: x.pop("annotations"), "'annotations' is missing; allowed: a list of dicts."),
        (lambda x: x.update(annotations=None), "'annotations' is None; allowed: a list of dicts."),
        (lambda x: x.update(images={"a": 1}), "'images' is {'a': 1}; allowed: a list of dicts."),
        (lambda x: x.pop("categories"), "'categories' is missing; allowed: a list of dicts."),
        (lambda x: x["images"].append("é"), "image number 2 is 'é'; allowed: a dict."),
        (lambda x: x["annotations"].append(None), "annotation number 3 is None; allowed: a dict."),
        # A string that looks like a number is shown as a string.
        (set_image(id="7"), "image number 1 (id '7'): 'id' is '7'; allowed: a whole number."),
        (set_target(category_id="3"), OBJECT + "'category_id' is '3'; allowed: a whole number."),
        (set_target(image_id="é"), OBJECT + "'image_id' is 'é'; allowed: a whole number."),
        (set_image(width="30"), IMAGE + "'width' is '30'; " + PIXELS),
        (set_image(height=0), IMAGE + "'height' is 0; " + PIXELS),
        (set_image(height=2**29), IMAGE + "'height' is 536870912; " + PIXELS),
        (
            set_image(height=2**15, width=2**15),
            IMAGE + "'height x width' is 32768 x 32768; allowed: fewer than 536870912 pixels.",
        ),
        (set_image(file_name=""), IMAGE + "'file_name' is ''; allowed: a path below --image-root."),
        (
            lambda x: x["images"].append(dict(x["images"][0])),
            "image number 2 (id 7): 'id' is 7; allowed: an id that no other has.",
        ),
        (
            set_member("categories", 1, name="ant"),
            "category number 2 (id 5): 'name' is 'ant'; allowed: a name that no other has.",
        ),
        (
            set_member("categories", 1, name="\u00a0"),
            "category number 2 (id 5): 'name' is '\\xa0'; allowed: the name of the class.",
        ),
        # Whether an object has a mask, or is to be given one.
        (set_human(iscrowd="0"), HUMAN + "'iscrowd' is '0'; allowed: 0 or 1."),
        (set_target(iscrowd="0"), OBJECT + "'iscrowd' is '0'; allowed: 0 or 1."),
        (set_target(iscrowd=None), OBJECT + "'iscrowd' is None; allowed: 0 or 1."),
        (set_target(iscrowd=2), OBJECT + "'iscrowd' is 2; allowed: 0 or 1."),
        (
            set_human(mask_source="SAM"),
            HUMAN + "'mask_source' is 'SAM'; allowed: 'human' (as without the key), or 'model' for "
            "a mask that a model made.",
        ),
        *(
            (
                set_human(segmentation=x),
                HUMAN + f"'segmentation' is {x!r}; allowed: {SEGMENTATION}.",
            )
            for x in (
                {"size": [20, 30]},
                {"counts": [], "size": [20, 30]},
                {"counts": "", "size": [20, 30]},
                {"counts": 600, "size": [20, 30]},
                {"counts": [10, 590]},
                [1, 2, 3, 4, 5, 6],
                "x",
                False,
                {},
            )
        ),
        # What the model needs.
        (set_target(bbox=None), OBJECT + "'bbox' is None; " + FOUR_NUMBERS),
        (set_target(bbox=[1, 2, 3]), OBJECT + "'bbox' is [1, 2, 3]; " + FOUR_NUMBERS),
        (set_target(bbox=[1, 2, "3", 4]), OBJECT + "'bbox' is [1, 2, '3', 4]; " + FOUR_NUMBERS),
        (set_target(bbox=[1, 2, float("nan"), 3]), OBJECT + "'bbox' is [1, 2, nan, 3]; "),
        (set_target(bbox=[10**400, 1, 2, 3]), OBJECT + "'bbox' is [1000000000"),
        (
            set_target(bbox=[9, 2, -5, 3]),
            OBJECT
            + "'bbox' is [9, 2, -5, 3]; allowed: [x, y, width, height] with width and height "
            "not negative.",
        ),
        (
            set_target(bbox=[1e308, 1, 1e308, 3]),
            OBJECT + "'bbox' is [1e+308, 1, 1e+308, 3]; " + FAR,
        ),
        (set_target(bbox=[1, 1, 2, 100020]), OBJECT + "'bbox' is [1, 1, 2, 100020]; " + FAR),
        (set_target(bbox=[-100001, 1, 2, 3]), OBJECT + "'bbox' is [-100001, 1, 2, 3]; " + FAR),
        (
            set_target(image_id=9),
            OBJECT + "'image_id' is 9; allowed: the id of one of the images.",
        ),
        (
            set_target(category_id=9),
            OBJECT + "'category_id' is 9; allowed: the id of one of the categories, 3, 5.",
        ),
    ],
)
def test_what_is_refused_is_said_and_is_an_error_of_the_checks_too(tmp_path, change, sentence):
    """
    Bugs: "0" was a crowd, and its object got no mask without a word; an RLE without runs was
    overwritten; 10**400 raised OverflowError; '90' was shown as 90.
    """
    data = make()
    change(data)
    path = write(tmp_path, data)
    with pytest.raises(ValueError) as error:
        index_annotations(path)
    text = str(error.value)
    assert text.startswith(f"{path}: {sentence}") and text.endswith(".")
    assert "\n" not in text and text.count("; allowed: ") == 1
    assert check_annotations(path).errors


@pytest.mark.parametrize(
    "change",
    [
        set_target(iscrowd=0),
        set_target(iscrowd=False),
        set_target(iscrowd=0.0),
        set_target(mask_source="human"),
        set_target(mask_source="model"),
        set_target(segmentation=None),
        set_target(segmentation=[]),
        set_target(segmentation=[[1, 2, 3, 4]]),
        set_target(bbox=[2, 2, 0, 10]),
        set_target(bbox=[2.0, 2, 100027, 100017]),
        set_target(bbox=[-100000, 2, 10, 10]),
        set_image(width=30.0),
    ],
)
def test_what_is_taken_is_no_error_of_the_checks_and_has_the_same_masks(tmp_path, change):
    data = make()
    change(data)
    path = write(tmp_path, data)
    assert index_annotations(path).kinds.tolist() == [HUMAN_MASK, TARGET]
    report = check_annotations(path)
    assert not report.errors
    assert [(x.masks, x.boxes_only) for x in report.classes if x.name == "ant"] == [(1, 1)]


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")])
def test_images_may_stand_behind_the_objects(tmp_path, order):
    data = make()
    data = {**{key: data[key] for key in order}, "categories": data["categories"]}
    data["annotations"][1]["bbox"] = [2, 2, 100027, 10]
    index_annotations(write(tmp_path, data))
    data["annotations"][1]["bbox"] = [2, 2, 100029, 10]
    with pytest.raises(ValueError, match="at most 100000 outside the image"):
        index_annotations(write(tmp_path, data))


@pytest.mark.parametrize("name", MADE_MEMBERS)
def test_a_member_that_stands_twice_is_told_before_any_mask_is_made(tmp_path, name):
    """Bug: it was told without the name of the file, when all images were done."""
    path = write(tmp_path, make())
    value = '"model"' if name == "mask_source" else "null"
    twice = f'"id": 8, "{name}": {value}, "{name[:-1]}\\u{ord(name[-1]):04x}": {value}'
    path.write_text(path.read_text("utf-8").replace('"id": 8', twice), "utf-8")
    with pytest.raises(ValueError) as error:
        index_annotations(path)
    sentence = f"the key {name!r} stands twice; allowed: once."
    assert str(error.value) == f"{path}: annotation number 2 (id 8): {sentence}"


def test_made_members_are_those_that_are_written():
    record = {"segmentation": [], "area": 1, "score": 0.5, "agreement": 0.5, "is_fallback": True}
    assert tuple(_changes(record, {})) == MADE_MEMBERS


def test_an_input_that_is_changed_later_is_named(tmp_path):
    path = write(tmp_path, make())
    index = index_annotations(path)
    path.write_text(" " * path.stat().st_size)
    with pytest.raises(ValueError, match="in.json was changed during the run.*--restart"):
        index.read(index.image_spans[0])
