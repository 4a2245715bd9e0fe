"""Reading a ground truth: what is brought into form, what is warned of, what is refused."""

import copy
import gc
import json
import logging
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask.analysis.ground_truth import load_ground_truth
from teacher_student_mask.analysis.input_checks import InputError, InputWarning

NAN = float("nan")
INF = float("inf")


def make_data():
    """Two images; ids 11 to 14 are polygons, compressed and uncompressed RLE, and a crowd."""
    return {
        "info": {"year": 2020},
        "images": [
            {"id": 7, "height": 6, "width": 8, "file_name": "a.jpg"},
            {"id": 2, "height": 5, "width": 4, "file_name": "b.jpg"},
        ],
        "categories": [
            {"id": 3, "name": "ant"},
            {"id": 17, "name": "cat", "supercategory": "animal"},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 7,
                "category_id": 3,
                # Columns 1 to 3 of rows 2 to 4, and columns 5, 6 of row 0.
                "segmentation": [[1, 2, 4, 2, 4, 5, 1, 5], [5, 0, 7, 0, 7, 1, 5, 1]],
                "bbox": [1, 0, 6, 5],
                "area": 10.5,
                "iscrowd": 0,
            },
            {
                "id": 12,
                "image_id": 2,
                "category_id": 17,
                # Runs 6, 2, 12 in columns of 5: rows 1 and 2 of column 1.
                "segmentation": {"size": [5, 4], "counts": "62<"},
                "bbox": [1.0, 1.0, 1.0, 2.0],
                "area": 2,
                "iscrowd": 0,
            },
            {
                "id": 13,
                "image_id": 2,
                "category_id": 3,
                "segmentation": {"size": [5, 4], "counts": [0, 5, 15]},
                "bbox": [0, 0, 1, 5],
                "area": 5,
                "iscrowd": 0,
            },
            {
                "id": 14,
                "image_id": 7,
                "category_id": 17,
                "segmentation": {"size": [6, 8], "counts": [6, 12, 30]},
                "bbox": [1, 0, 2, 6],
                "area": 12,
                "iscrowd": 1,
            },
        ],
    }


@pytest.fixture
def load(tmp_path):
    """Return ``load(change, warnings)``: ``change(data)`` edits the json, or returns another."""

    def load_changed(change=None, warnings=None):
        data = make_data()
        if change is not None:
            returned = change(data)
            data = data if returned is None else returned
        path = tmp_path / "gt.json"
        path.write_text(json.dumps(data))
        return load_ground_truth(path, warnings)

    return load_changed


def change_at(*keys, **fields):
    """A change that sets fields of the dict at data[keys[0]][keys[1]]..."""

    def change(data):
        for key in keys:
            data = data[key]
        data.update(fields)

    return change


def remove_at(*keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def test_all_kinds_of_masks(load):
    warnings = []
    coco = load(warnings=warnings)
    assert warnings == []
    masks = {x: np.zeros((6, 8), dtype=np.uint8) for x in (11, 14)}
    masks.update({x: np.zeros((5, 4), dtype=np.uint8) for x in (12, 13)})
    masks[11][2:5, 1:4] = masks[11][0, 5:7] = 1
    masks[12][1:3, 1] = 1
    masks[13][:, 0] = 1
    masks[14][:, 1:3] = 1
    assert list(coco.anns) == [11, 12, 13, 14]
    for i, mask in masks.items():
        rle = coco.anns[i]["segmentation"]
        assert rle == mask_util.encode(np.asfortranarray(mask))
        assert type(rle["counts"]) is bytes
        assert (coco.annToMask(coco.anns[i]) == mask).all()


def test_other_fields_stay(load):
    coco = load()
    assert coco.dataset["info"] == {"year": 2020}
    assert coco.imgs == {x["id"]: x for x in make_data()["images"]}
    assert coco.cats == {x["id"]: x for x in make_data()["categories"]}
    assert [x["id"] for x in coco.imgToAnns[2]] == [12, 13]
    assert coco.catToImgs == {3: [7, 2], 17: [2, 7]}
    assert [x["iscrowd"] for x in coco.anns.values()] == [0, 0, 0, 1]
    assert [x["area"] for x in coco.anns.values()] == [10.5, 2, 5, 12]
    assert coco.anns[11]["bbox"] == [1.0, 0.0, 6.0, 5.0]
    assert {type(x) for x in coco.anns[11]["bbox"]} == {float}


def test_path_is_kept_for_messages_about_result_files(load, tmp_path):
    assert load().annotation_file == str(tmp_path / "gt.json")


def test_nothing_is_printed(load, capsys):
    load()
    assert capsys.readouterr().out == ""


def test_whole_numbers_written_as_floats(load):
    def change(data):
        data["images"][0].update(id=7.0, height=6.0)
        data["categories"][0]["id"] = 3.0
        data["annotations"][0].update(id=11.0, image_id=7.0, category_id=3.0, iscrowd=0.0)

    coco = load(change)
    assert coco.dataset["images"][0] == make_data()["images"][0]
    fields = ("id", "image_id", "category_id", "iscrowd")
    values = [coco.dataset["images"][0][x] for x in ("id", "height")]
    values += [coco.dataset["categories"][0]["id"]]
    values += [coco.dataset["annotations"][0][x] for x in fields]
    assert values == [7, 6, 3, 11, 7, 3, 0]
    assert {type(x) for x in values} == {int}


def test_real_coco_as_pycocotools_reads_it(coco_root, capsys):
    path = f"{coco_root}/annotations/instances_val2017.json"
    expected = COCO(path)
    warnings = []
    coco = load_ground_truth(path, warnings)
    assert warnings == []
    assert len(coco.anns) == len(expected.anns) > 100
    for i, annotation in expected.anns.items():
        assert coco.anns[i]["segmentation"] == expected.annToRLE(annotation), i
        for field in ("image_id", "category_id", "area", "iscrowd"):
            assert coco.anns[i][field] == annotation[field], i
        np.testing.assert_array_equal(coco.anns[i]["bbox"], annotation["bbox"])
    assert coco.imgs == expected.imgs
    assert coco.cats == expected.cats


# Each: a change, the words of the warning, its count.
WARNINGS = {
    "no area": (
        remove_at("annotations", 1, "area"),
        'no "area", the mask\'s is taken: 1 (ids 12',
        1,
    ),
    "null area": (change_at("annotations", 0, area=None), 'no "area", the mask\'s is taken', 1),
    "short polygon": (
        lambda data: data["annotations"][0]["segmentation"].extend([[1, 1, 2, 2], []]),
        "polygons of fewer than three points (left out): 2",
        2,
    ),
    "empty mask": (
        change_at("annotations", 1, segmentation={"size": [5, 4], "counts": [20]}),
        "masks without any pixel: 1 (ids 12)",
        1,
    ),
    "box without area": (
        change_at("annotations", 1, bbox=[1, 1, 0, 2]),
        "boxes without area: 1 (ids 12)",
        1,
    ),
    "box outside": (
        lambda data: [x.update(bbox=[-1.5, 0, 2, 2]) for x in data["annotations"][1:3]] and None,
        "boxes that reach more than 1 pixel outside their image: 2 (ids 12, 13)",
        2,
    ),
    "no annotations": (lambda data: data["annotations"].clear(), "no annotations: there is", 1),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(load, tmp_path, caplog, name):
    change, words, count = WARNINGS[name]
    warnings = []
    load(change, warnings)
    assert len(warnings) == 1
    path = str(tmp_path / "gt.json")
    assert warnings[0] == InputWarning(path, warnings[0].message, count)
    assert warnings[0].message.startswith(words)
    records = [(x.levelno, x.getMessage()) for x in caplog.records]
    assert records == [(logging.WARNING, f"{path}: {warnings[0].message}")]


@pytest.mark.parametrize(
    "box, is_outside",
    [
        ([-1, -1, 6, 7], False),  # the image has 4 x 5 pixels
        ([-1.01, 0, 1, 1], True),
        ([0, -1.01, 1, 1], True),
        ([3, 0, 2.01, 1], True),
        ([0, 3, 1, 3.01], True),
        ([4, 0, 1, 6], False),
        ([0, 0, 1e308, 1], True),
        ([1e308, 0, 1e308, 1], True),
    ],
)
def test_boxes_may_reach_one_pixel_outside(load, box, is_outside):
    warnings = []
    load(change_at("annotations", 1, bbox=box), warnings)
    assert len(warnings) == is_outside


def test_missing_area_is_that_of_the_mask(load):
    def change(data):
        for annotation in data["annotations"]:
            del annotation["area"]

    warnings = []
    coco = load(change, warnings)
    areas = [x["area"] for x in coco.anns.values()]
    assert areas == [11, 2, 5, 12]
    assert {type(x) for x in areas} == {float}
    assert [x.count for x in warnings] == [4]


def test_missing_iscrowd_is_0(load):
    warnings = []
    coco = load(remove_at("annotations", 3, "iscrowd"), warnings)
    assert coco.anns[14]["iscrowd"] == 0
    assert warnings == []


def test_short_polygons_add_nothing(load):
    change = WARNINGS["short polygon"][0]
    assert load(change).anns[11]["segmentation"] == load().anns[11]["segmentation"]


@pytest.mark.parametrize("bad", [0, -3, None, "a", 1.5, True, [1], 2**63])
def test_ids_that_cocoeval_cannot_use_are_renumbered(load, bad):
    warnings = []
    coco = load(change_at("annotations", 1, id=bad), warnings)
    assert list(coco.anns) == [1, 2, 3, 4]
    assert [coco.anns[i]["id"] for i in coco.anns] == [1, 2, 3, 4]
    assert coco.anns[2]["bbox"] == [1, 1, 1, 2]
    assert [x["id"] for x in coco.imgToAnns[2]] == [2, 3]
    (warning,) = warnings
    assert warning.count == 1
    assert "all annotations of the file are renumbered from 1: 1 (ids " in warning.message


def test_messages_can_be_written_as_utf8(load):
    warnings = []
    load(change_at("annotations", 1, id="\ud800"), warnings)
    assert "(ids '\\ud800')" in warnings[0].message
    with pytest.raises(InputError, match=r"\(id '.ud800'\)"):
        load(change_at("annotations", 1, id="\ud800", area="\ud800"))


def test_missing_ids_are_renumbered(load):
    def change(data):
        for annotation in data["annotations"]:
            del annotation["id"]

    warnings = []
    assert list(load(change, warnings).anns) == [1, 2, 3, 4]
    assert [x.count for x in warnings] == [4]


def test_object_with_id_0_can_be_found(load):
    # With id 0, COCOeval would count the detection that matches it as a false one.
    coco = load(change_at("annotations", 0, id=0))
    results = [
        {
            "image_id": x["image_id"],
            "category_id": x["category_id"],
            "segmentation": x["segmentation"],
            "score": 0.9,
        }
        for x in coco.anns.values()
        if not x["iscrowd"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    np.testing.assert_allclose(precision[precision > -1], 1, rtol=1e-12)


def rotated_polygon(data):
    # An image of 5 x 4 pixels whose mask was made for 4 x 5.
    data["annotations"][1]["segmentation"] = {"size": [4, 5], "counts": "62<"}


# Each: a change, and words of the error in the order in which they come.
ERRORS = {
    "list": (lambda data: [1], ["is a list; allowed: a COCO ground truth"]),
    "empty list": (lambda data: [], ["is a list; allowed: a COCO ground truth"]),
    "result file": (
        lambda data: [{"score": 1}],
        ["is a list: this is a result file; allowed: a C"],
    ),
    "text": (lambda data: "abc", ["is a str; allowed: a COCO ground truth"]),
    "no images": (remove_at("images"), ['"images" is missing; allowed: a COCO ground truth']),
    "no annotations": (remove_at("annotations"), ['"annotations" is missing']),
    "no categories": (remove_at("categories"), ['"categories" is missing']),
    "empty images": (change_at(images=[]), ['"images" is empty; allowed: at least one']),
    "empty categories": (change_at(categories=[]), ['"categories" is empty']),
    "images no list": (change_at(images={"id": 1}), ["\"images\" is {'id': 1}; allowed: a list"]),
    "image no dict": (change_at(images=[7]), ["image 0: is 7; allowed: a dict"]),
    "category no dict": (change_at(categories=[7]), ["category 0: is 7; allowed: a dict"]),
    "annotation no dict": (change_at(annotations=[7]), ["annotation 0: is 7; allowed: a dict"]),
    "image without id": (remove_at("images", 1, "id"), ['image 1: "id" is missing']),
    "image id": (
        change_at("images", 1, id="2"),
        ["image 1: \"id\" is '2'; allowed: a whole number"],
    ),
    "image id True": (change_at("images", 1, id=True), ['image 1: "id" is True']),
    "image id long": (change_at("images", 1, id=2**63), [f'image 1: "id" is {2**63}; allowed: a']),
    "image without width": (
        remove_at("images", 1, "width"),
        ['image 1 (id 2): "width" is missing'],
    ),
    "image height 0": (
        change_at("images", 1, height=0),
        ['image 1 (id 2): "height" is 0; allowed: a whole number of pixels, at least 1'],
    ),
    "image height text": (
        change_at("images", 1, height="5"),
        ["(id 2): \"height\" is '5'; allowed"],
    ),
    "image width 4.5": (change_at("images", 1, width=4.5), ['(id 2): "width" is 4.5; allowed']),
    "image width nan": (change_at("images", 1, width=NAN), ['(id 2): "width" is nan; allowed']),
    "image width inf": (change_at("images", 1, width=INF), ['(id 2): "width" is inf; allowed']),
    "image too large": (
        change_at("images", 1, width=2**15, height=2**14),
        ["image 1 (id 2): has 16384 x 32768 pixels; allowed: fewer than 536870912"],
    ),
    "image ids equal": (
        change_at("images", 1, id=7),
        ['image 1: "id" is 7; allowed: ids that differ'],
    ),
    "category without id": (remove_at("categories", 1, "id"), ['category 1: "id" is missing']),
    "category ids equal": (
        change_at("categories", 1, id=3),
        ['category 1: "id" is 3; allowed: ids that differ'],
    ),
    "category without name": (
        remove_at("categories", 1, "name"),
        ['category 1: "name" is missing'],
    ),
    "category name empty": (change_at("categories", 1, name=" "), ["category 1: \"name\" is ' '"]),
    "category name": (
        change_at("categories", 1, name=5),
        ['category 1: "name" is 5; allowed: the'],
    ),
    "category names equal": (
        change_at("categories", 1, name="ant"),
        ["category 1: \"name\" is 'ant'; allowed: names that differ"],
    ),
    "no image id": (remove_at("annotations", 2, "image_id"), ['(id 13): "image_id" is missing']),
    "unknown image": (
        change_at("annotations", 2, image_id=99),
        ['annotation 2 (id 13): "image_id" is 99; allowed: an id of "images"'],
    ),
    "image id list": (change_at("annotations", 2, image_id=[2]), ['"image_id" is [2]; allowed']),
    "unknown category": (
        change_at("annotations", 2, category_id=4),
        ['annotation 2 (id 13): "category_id" is 4; allowed: an id of "categories"'],
    ),
    "no box": (remove_at("annotations", 2, "bbox"), ['annotation 2 (id 13): "bbox" is missing']),
    "box null": (
        change_at("annotations", 2, bbox=None),
        ['(id 13): "bbox" is None; allowed: four'],
    ),
    "box of 3": (
        change_at("annotations", 2, bbox=[1, 2, 3]),
        ['annotation 2 (id 13): "bbox" is [1, 2, 3]; allowed: four finite numbers'],
    ),
    "box nan": (change_at("annotations", 2, bbox=[1, NAN, 3, 4]), ['"bbox" is [1, nan, 3, 4];']),
    "box inf": (change_at("annotations", 2, bbox=[1, 2, INF, 4]), ['"bbox" is [1, 2, inf, 4];']),
    "box long": (
        change_at("annotations", 2, bbox=[10**400, 2, 3, 4]),
        ['(id 13): "bbox" is [1000'],
    ),
    "box text": (change_at("annotations", 2, bbox=["1", 2, 3, 4]), ["\"bbox\" is ['1', 2, 3, 4];"]),
    "box width": (
        change_at("annotations", 2, bbox=[1, 2, -3, 4]),
        ['"bbox" is [1, 2, -3, 4];', "width and height not negative"],
    ),
    "box height": (change_at("annotations", 2, bbox=[1, 2, 3, -4]), ['"bbox" is [1, 2, 3, -4];']),
    "area negative": (
        change_at("annotations", 2, area=-1),
        ['annotation 2 (id 13): "area" is -1; allowed: a finite number of pixels, not negative'],
    ),
    "area nan": (change_at("annotations", 2, area=NAN), ['(id 13): "area" is nan; allowed']),
    "area text": (change_at("annotations", 2, area="5"), ["(id 13): \"area\" is '5'; allowed"]),
    "iscrowd": (
        change_at("annotations", 2, iscrowd=2),
        ['annotation 2 (id 13): "iscrowd" is 2; allowed: 0 or 1'],
    ),
    "iscrowd null": (change_at("annotations", 2, iscrowd=None), ['"iscrowd" is None; allowed']),
    "ids equal": (
        change_at("annotations", 2, id=11),
        ['annotation 2 (id 11): "id" is 11; allowed: another id than annotation 0 (id 11) has'],
    ),
    "ids equal as text": (
        lambda data: [x.update(id="a") for x in data["annotations"]] and None,
        [
            "annotation 1 (id 'a'): \"id\" is 'a'; allowed: another id than ",
            "annotation 0 (id 'a') has",
        ],
    ),
    "mask text": (
        change_at("annotations", 2, segmentation="x"),
        ["annotation 2 (id 13): \"segmentation\" is 'x'; allowed: a list of polygons"],
    ),
    "polygon nan": (
        change_at("annotations", 2, segmentation=[[1, 2, 3, NAN, 5, 6]]),
        ['annotation 2 (id 13): "segmentation" is [1, 2, 3, nan, 5, 6]; allowed', "(not nan)"],
    ),
    "flat polygon": (
        change_at("annotations", 2, segmentation=[1, 2, 3, 4, 5, 6]),
        ['annotation 2 (id 13): "segmentation" is [1, 2, 3, 4, 5, 6]; allowed: a list of polygons'],
    ),
    "rle size": (
        rotated_polygon,
        ['annotation 1 (id 12): "segmentation": "size" is [4, 5]; allowed', "[5, 4]"],
    ),
    "rle cut": (
        change_at("annotations", 1, segmentation={"size": [5, 4], "counts": "6P"}),
        ['annotation 1 (id 12): "segmentation": "counts" ends in the middle of a number'],
    ),
    "rle sum": (
        change_at("annotations", 2, segmentation={"size": [5, 4], "counts": [5, 5]}),
        ['annotation 2 (id 13): "segmentation": "counts" has runs of 10 pixels in all', "20"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(load, tmp_path, name):
    change, words = ERRORS[name]
    with pytest.raises(InputError) as error:
        load(change)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "gt.json") + ": ")
    position = 0
    for word in words:
        assert word in message[position:], message
        position = message.index(word, position) + len(word)


@pytest.mark.parametrize("empty", [None, [], {}, [[]], [[1, 2, 3, 4]], {"size": [5, 4]}])
def test_objects_without_a_mask_are_named(load, empty):
    def change(data):
        data["annotations"][1]["segmentation"] = empty
        del data["annotations"][2]["segmentation"]

    with pytest.raises(InputError) as error:
        load(change)
    assert (
        "2 of 4 objects have no mask: annotation 1 (id 12), annotation 2 (id 13); allowed: "
        in str(error.value)
    )
    assert "mask AP needs a mask on every object" in str(error.value)


def test_many_objects_without_a_mask_are_counted(load):
    def change(data):
        annotation = data["annotations"][0]
        annotation["segmentation"] = []
        data["annotations"] = [dict(annotation, id=i) for i in range(1, 21)]

    with pytest.raises(InputError) as error:
        load(change)
    assert "20 of 20 objects have no mask: " in str(error.value)
    assert "annotation 9 (id 10), ...; allowed" in str(error.value)


def test_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="missing.json: cannot be read: No such file"):
        load_ground_truth(tmp_path / "missing.json")


def test_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_ground_truth(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_file_that_is_no_json(tmp_path, content):
    path = tmp_path / "gt.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="gt.json: is not a json file: "):
        load_ground_truth(path)


def test_garbage_collection_goes_on(load):
    assert gc.isenabled()
    load()
    assert gc.isenabled()
    with pytest.raises(InputError):
        load(remove_at("images"))
    assert gc.isenabled()


# Values that a field of the wrong kind, or a broken export, may have.
ODD_VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 2, 7, 1.5, 7.0, NAN, INF, -INF, 1e308, 10**30, 10**400]
    + ["", "7", "62<", "6P", "\ud800", [], {}, [[]], [None], [1, 2, 3, 4], ["a"] * 6]
    + [[[1, 2, 3, 4, 5, 6]], [[0, 0, 9e4, 0, 0, 9]], [[1, 2, 3, NAN, 5, 6]], [[0] * 7]]
    + [{"size": [5, 4]}, {"size": [5, 4], "counts": "62<"}, {"size": [5, 4], "counts": [20]}]
    + [{"size": [5, 4], "counts": [0, 5, 0, 5, 10]}, {"size": None, "counts": b"62<".decode()}]
)
RLE_TEXTS = st.text([chr(x) for x in range(40, 120)], max_size=5)


@st.composite
def mutated(draw, data):
    """`data` with up to three values replaced, removed or repeated, anywhere in it."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        parent, key, value = None, None, data
        while isinstance(value, (dict, list)) and value:
            # The deeper, the more likely to stop: lists of numbers are not all of it.
            if parent is not None and draw(st.integers(0, 3)) == 0:
                break
            keys = sorted(value) if isinstance(value, dict) else range(len(value))
            parent, key = value, draw(st.sampled_from(list(keys)))
            value = parent[key]
        action = draw(st.sampled_from(["set", "set", "set", "text", "delete", "repeat"]))
        if action == "set":
            parent[key] = copy.deepcopy(draw(ODD_VALUES))
        elif action == "text":
            parent[key] = draw(RLE_TEXTS)
        elif action == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(value))
    return data


@given(mutated(make_data()))
@settings(max_examples=300, deadline=None)
def test_any_ground_truth_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated_gt.json"
    path.write_text(json.dumps(data))
    warnings = []
    try:
        coco = load_ground_truth(path, warnings)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert all(x.count >= 1 for x in warnings)
    assert len(coco.anns) == len(data["annotations"])
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        assert annotation["category_id"] in coco.cats
        assert annotation["segmentation"]["size"] == [image["height"], image["width"]]
        assert all(math.isfinite(x) for x in [*annotation["bbox"], annotation["area"]])
        assert annotation["iscrowd"] in (0, 1)
        assert annotation["id"] > 0
        # A broken RLE would not come back from here.
        rle = annotation["segmentation"]
        area = int(mask_util.area(rle))
        assert mask_util.iou([rle], [rle], [0])[0, 0] == (1 if area else 0)
        if image["height"] * image["width"] < 10**6:
            assert mask_util.decode(rle).sum() == area
