"""Reading a result file: what is brought into form, what is warned of, what is refused."""

import contextlib
import copy
import gc
import io
import json
import logging
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from teacher_student_mask.analysis.ground_truth import load_ground_truth
from teacher_student_mask.analysis.input_checks import InputError, InputWarning
from teacher_student_mask.analysis.result_files import load_results

NAN = float("nan")
INF = float("inf")


def make_coco(images=((139, 5, 4), (7, 6, 8)), category_ids=(3, 17, 90)):
    """A ground truth without annotations; images are (id, height, width)."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": h, "width": w} for i, h, w in images],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": [],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    coco.annotation_file = "folder/gt.json"
    return coco


def make_entries():
    """A compressed RLE, polygons, an uncompressed RLE."""
    return [
        {
            "image_id": 139,
            "category_id": 17,
            # Runs 6, 2, 12 in columns of 5: rows 1 and 2 of column 1.
            "segmentation": {"size": [5, 4], "counts": "62<"},
            "score": 0.5,
            "bbox": [1.25, 1, 1, 2],
        },
        {
            "image_id": 7,
            "category_id": 3,
            # Columns 1 to 3 of rows 2 to 4, and columns 5, 6 of row 0.
            "segmentation": [[1, 2, 4, 2, 4, 5, 1, 5], [5, 0, 7, 0, 7, 1, 5, 1]],
            "score": 1,
            "bbox": [1, 0, 6, 5],
        },
        {
            "image_id": 139,
            "category_id": 17,
            "segmentation": {"size": [5, 4], "counts": [0, 5, 15]},
            "score": 0,
            "bbox": [0, 0, 1, 5],
        },
    ]


@pytest.fixture
def load(tmp_path):
    """Return ``load(change, warnings, coco)``: ``change(entries)`` edits the json or returns it."""

    def load_changed(change=None, warnings=None, coco=None):
        entries = make_entries()
        if change is not None:
            returned = change(entries)
            entries = entries if returned is None else returned
        path = tmp_path / "results.json"
        path.write_text(json.dumps(entries))
        return load_results(path, coco or make_coco(), warnings)

    return load_changed


def change_at(index, **fields):
    return lambda entries: entries[index].update(fields)


def remove_at(index, field):
    return lambda entries: entries[index].pop(field) and None


def test_all_kinds_of_masks(load):
    warnings = []
    results = load(warnings=warnings)
    assert warnings == []
    masks = [np.zeros(size, dtype=np.uint8) for size in [(5, 4), (6, 8), (5, 4)]]
    masks[0][1:3, 1] = 1
    masks[1][2:5, 1:4] = masks[1][0, 5:7] = 1
    masks[2][:, 0] = 1
    rles = [mask_util.encode(np.asfortranarray(mask)) for mask in masks]
    boxes = [[1.25, 1.0, 1.0, 2.0], [1.0, 0.0, 6.0, 5.0], [0.0, 0.0, 1.0, 5.0]]
    assert results == [
        {
            "image_id": image_id,
            "category_id": category_id,
            "score": score,
            "bbox": box,
            "segmentation": rle,
            "area": area,
        }
        for image_id, category_id, score, box, rle, area in zip(
            (139, 7, 139), (17, 3, 17), (0.5, 1.0, 0.0), boxes, rles, (2.0, 11.0, 5.0)
        )
    ]
    for entry in results:
        kinds = (int, int, float, list, dict, float)
        assert tuple(type(x) for x in entry.values()) == kinds
        assert type(entry["segmentation"]["counts"]) is bytes
        assert {type(x) for x in entry["bbox"]} == {float}


def test_real_coco_read_back_as_results(coco_root, tmp_path):
    """Its polygons and uncompressed RLEs, and half of the masks compressed, as detections."""
    path = f"{coco_root}/annotations/instances_val2017.json"
    coco = load_ground_truth(path)
    with open(path) as file:
        annotations = json.load(file)["annotations"]
    rng = np.random.default_rng(0)
    entries, expected = [], []
    for i in rng.permutation(len(annotations)):
        annotation = annotations[i]
        rle = coco.anns[annotation["id"]]["segmentation"]
        entry = {x: annotation[x] for x in ("image_id", "category_id", "bbox", "segmentation")}
        entry["score"] = rng.random()
        if i % 2:
            entry["segmentation"] = dict(rle, counts=rle["counts"].decode("ascii"))
        entries.append(entry)
        expected.append(dict(entry, segmentation=rle, area=float(mask_util.area(rle))))
    (tmp_path / "results.json").write_text(json.dumps(entries))
    warnings = []
    assert load_results(tmp_path / "results.json", coco, warnings) == expected
    assert warnings == []
    assert len(expected) > 100


def test_ground_truth_stays_as_it_is(load):
    coco = make_coco()
    dataset = copy.deepcopy(coco.dataset)
    assert [x["image_id"] for x in load(lambda entries: entries[:1], coco=coco)] == [139]
    assert coco.dataset == dataset


def test_entries_share_nothing(load):
    results = load(lambda entries: [entries[0], entries[0]])
    expected = copy.deepcopy(results[1])
    results[0]["segmentation"]["size"][0] = results[0]["bbox"][0] = 99
    assert results[1] == expected


def test_whole_numbers_written_as_floats(load):
    warnings = []
    results = load(change_at(0, image_id=139.0, category_id=17.0), warnings)
    assert results == load()
    assert {type(results[0][x]) for x in ("image_id", "category_id")} == {int}
    assert warnings == []


def test_image_ids_as_text(load):
    def change(entries):
        entries[0]["image_id"] = "000000000139"
        entries[2]["image_id"] = "139"

    warnings = []
    assert load(change, warnings) == load()
    (warning,) = warnings
    assert warning.message == '"image_id" is text, read as the number: 2 (entries 0, 2)'


def test_entries_without_box_get_that_of_the_mask(load):
    def change(entries):
        del entries[0]["bbox"]
        entries[1]["bbox"] = None

    warnings = []
    results = load(change, warnings)
    assert [x["bbox"] for x in results] == [[1, 1, 1, 2], [1, 0, 6, 5], [0, 0, 1, 5]]
    assert {type(x) for x in results[0]["bbox"]} == {float}
    (warning,) = warnings
    assert warning.message == 'no "bbox", the mask\'s own box is taken: 2 (entries 0, 1)'


def test_empty_mask_has_a_box_without_area(load):
    def change(entries):
        for entry, counts in zip(entries[::2], ([20], [20, 0])):
            del entry["bbox"]
            entry["segmentation"]["counts"] = counts

    results = load(change)
    assert [x["bbox"] for x in results[::2]] == [[0, 0, 0, 0]] * 2
    assert [x["area"] for x in results[::2]] == [0, 0]


def repeat(*changes):
    """A change that appends copies of entry 0 with other fields."""
    return lambda entries: entries.extend(dict(entries[0], **x) for x in changes)


# Each: a change, the words of the warning, its count.
WARNINGS = {
    "no entries": (lambda entries: [], "no detections", 1),
    "box outside": (
        change_at(0, bbox=[-1.5, 0, 2, 2]),
        "boxes that reach more than 1 pixel outside their image: 1 (entry 0)",
        1,
    ),
    "box far outside": (
        change_at(1, bbox=[7, 0, 1e308, 2]),
        "boxes that reach more than 1 pixel outside their image: 1 (entry 1)",
        1,
    ),
    "score": (
        lambda entries: entries[0].update(score=1.5) or entries[2].update(score=-0.1),
        "scores outside [0, 1]: 2 (entries 0, 2)",
        2,
    ),
    "empty mask": (
        change_at(0, segmentation={"size": [5, 4], "counts": [20]}),
        "masks without any pixel: 1 (entry 0)",
        1,
    ),
    "short polygon": (
        lambda entries: entries[1]["segmentation"].extend([[1, 1, 2, 2], []]),
        "polygons of fewer than three points (left out): 2",
        2,
    ),
    "equal entries": (
        # The box is that of the mask; another score, class, mask or image is another detection.
        repeat(
            {},
            {"bbox": [0, 0, 1, 1]},
            {"score": 0.25},
            {"category_id": 3},
            {"segmentation": {"size": [5, 4], "counts": [20 - 1, 1]}},
            {"image_id": 7, "segmentation": {"size": [6, 8], "counts": [6, 2, 40]}},
        ),
        "entries equal to an earlier one in image, category, score and mask: 2",
        2,
    ),
    "two equal entries": (repeat({}), "entries equal to an earlier one in image, category", 1),
    "equal ids": (
        lambda entries: [x.update(id=5) for x in entries] and None,
        '"id" of an earlier entry (ids of results are not used): 2',
        2,
    ),
    "equal ids as text": (
        lambda entries: [x.update(id="a") for x in entries[1:]] and None,
        '"id" of an earlier entry',
        1,
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(load, tmp_path, caplog, name):
    change, words, count = WARNINGS[name]
    warnings = []
    entries = make_entries()
    returned = change(entries)
    results = load(change, warnings)
    assert len(results) == len(entries if returned is None else returned)
    path = str(tmp_path / "results.json")
    assert len(warnings) == 1
    assert warnings[0] == InputWarning(path, warnings[0].message, count)
    assert warnings[0].message.startswith(words)
    records = [(x.levelno, x.getMessage()) for x in caplog.records]
    assert records == [(logging.WARNING, f"{path}: {warnings[0].message}")]


def test_only_the_first_entries_are_named(load):
    def change(entries):
        return [dict(entries[0], score=2 + i) for i in range(8)]

    warnings = []
    load(change, warnings)
    assert warnings[0].message.endswith(": 8 (entries 0, 1, 2, 3, 4, ...)")


def test_other_ids_of_entries_are_not_compared(load):
    def change(entries):
        for entry, value in zip(entries, (None, [1], [1])):
            entry["id"] = value

    warnings = []
    load(change, warnings)
    assert warnings == []


# Each: a change, and words of the error in the order in which they come.
ERRORS = {
    "dict": (lambda x: {"a": 1}, ["is a dict with the keys 'a'; allowed: a list of detections"]),
    "dict of results": (
        lambda x: {"annotations": x},
        ["is a dict with the keys 'annotations'; al"],
    ),
    "ground truth": (
        lambda x: {"images": [], "annotations": []},
        ["keys 'images', 'annotations'; this looks like a ground-truth file; allowed: a list"],
    ),
    "text": (lambda x: "abc", ["is a str; allowed: a list of detections"]),
    "entry no dict": (lambda x: x + [[1]], ["entry 3: is [1]; allowed: a dict"]),
    "no image id": (remove_at(1, "image_id"), ['entry 1: "image_id" is missing']),
    "image id null": (
        change_at(1, image_id=None),
        ['entry 1: "image_id" is None; allowed: a whole'],
    ),
    "image id list": (change_at(1, image_id=[7]), ['entry 1: "image_id" is [7]; allowed: a whole']),
    "image id nan": (change_at(1, image_id=NAN), ['entry 1: "image_id" is nan; allowed: a whole']),
    "image id 7.5": (change_at(1, image_id=7.5), ['entry 1: "image_id" is 7.5; allowed: a whole']),
    "image id True": (change_at(1, image_id=True), ['entry 1: "image_id" is True; allowed']),
    "image id as text": (
        change_at(1, image_id="08"),
        ['1 of 3 entries have an unknown "image_id": 8 (entry 1); allowed: the ids of the 2'],
    ),
    "image id as long text": (
        change_at(1, image_id="7" * 5000),
        ['entry 1: "image_id" is \'777', "; allowed: a whole number"],
    ),
    "image id no digits": (
        change_at(1, image_id="7.0"),
        ["entry 1: \"image_id\" is '7.0'; allowed"],
    ),
    "image id Arabic": (change_at(1, image_id="\u0667"), ['entry 1: "image_id" is ', "; allowed"]),
    "unknown image": (
        lambda x: [dict(x[0], image_id=i) for i in (1, 139, 2)],
        [
            '2 of 3 entries have an unknown "image_id": 1 (entry 0), 2 (entry 2); allowed: ',
            "the ids of the 2 images of folder/gt.json",
        ],
    ),
    "unknown images": (
        lambda x: [dict(x[0], image_id=i) for i in range(50)],
        ['49 of 50 entries have an unknown "image_id": 0 (entry 0), ', "4 (entry 4), ...; allowed"],
    ),
    "no category": (remove_at(1, "category_id"), ['entry 1: "category_id" is missing']),
    "category text": (change_at(1, category_id="3"), ["entry 1: \"category_id\" is '3'; allowed"]),
    "unknown category": (
        change_at(1, category_id=91),
        [
            '1 of 3 entries have an unknown "category_id": 91 (entry 1); allowed: the 3 category '
            "ids of folder/gt.json, 3 to 90",
        ],
    ),
    "no score": (remove_at(1, "score"), ['entry 1: "score" is missing']),
    "score nan": (change_at(1, score=NAN), ['entry 1: "score" is nan; allowed: a finite number']),
    "score inf": (change_at(1, score=-INF), ['entry 1: "score" is -inf; allowed: a finite number']),
    "score text": (change_at(1, score="0.5"), ["entry 1: \"score\" is '0.5'; allowed: a finite"]),
    "score null": (change_at(1, score=None), ['entry 1: "score" is None; allowed']),
    "score True": (change_at(1, score=True), ['entry 1: "score" is True; allowed']),
    "score list": (change_at(1, score=[0.5]), ['entry 1: "score" is [0.5]; allowed']),
    "score long": (
        change_at(1, score=10**400),
        ['entry 1: "score" is 1000', "; allowed: a finite"],
    ),
    "no mask": (remove_at(1, "segmentation"), ['entry 1: "segmentation" is missing']),
    "mask null": (
        change_at(1, segmentation=None),
        ['entry 1: "segmentation" is None; allowed: a list of polygons'],
    ),
    "no polygon": (
        change_at(1, segmentation=[]),
        ['entry 1: "segmentation" is []; allowed: at least one polygon'],
    ),
    "polygon nan": (
        change_at(1, segmentation=[[1, 2, 3, NAN, 5, 6]]),
        ['entry 1: "segmentation" is [1, 2, 3, nan, 5, 6]; allowed', "(not nan)"],
    ),
    "rle of another size": (
        change_at(2, segmentation={"size": [4, 5], "counts": [0, 5, 15]}),
        [
            'entry 2: "segmentation": "size" is [4, 5]; allowed: ',
            "[height, width] of its image, [5, 4]",
        ],
    ),
    "rle cut": (
        change_at(0, segmentation={"size": [5, 4], "counts": "62P"}),
        ['entry 0: "segmentation": "counts" ends in the middle of a number'],
    ),
    "rle of bytes as text": (
        change_at(0, segmentation={"size": [5, 4], "counts": "b'62<'"}),
        ['entry 0: "segmentation": "counts" has the byte 39 at position 1; allowed: 48 to 111'],
    ),
    "rle too short": (
        change_at(2, segmentation={"size": [5, 4], "counts": [0, 5, 14]}),
        ['entry 2: "segmentation": "counts" has runs of 19 pixels in all; allowed', "20"],
    ),
    "box of 3": (
        change_at(1, bbox=[1, 2, 3]),
        ['entry 1: "bbox" is [1, 2, 3]; allowed: four finite numbers [x, y, width, height]'],
    ),
    "box empty": (change_at(1, bbox=[]), ['entry 1: "bbox" is []; allowed: four']),
    "box nan": (change_at(1, bbox=[1, 2, 3, NAN]), ['entry 1: "bbox" is [1, 2, 3, nan]; allowed']),
    "box text": (change_at(1, bbox="1234"), ["entry 1: \"bbox\" is '1234'; allowed"]),
    "box width": (
        change_at(1, bbox=[1, 2, -3, 4]),
        ['entry 1: "bbox" is [1, 2, -3, 4]; allowed', "width and height not negative"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(load, tmp_path, name):
    change, words = ERRORS[name]
    with pytest.raises(InputError) as error:
        load(change)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "results.json") + ": ")
    position = 0
    for word in words:
        assert word in message[position:], message
        position = message.index(word, position) + len(word)


@pytest.mark.parametrize(
    "category_ids, hint",
    [
        ((0, 1, 79), "All ids lie in 0..79"),
        ((1, 12, 80), "All ids lie in 1..80"),
        ((0, 80), None),
        ((12, 90), None),
        ((-1, 2), None),
    ],
)
def test_class_numbers_in_place_of_category_ids(load, category_ids, hint):
    # COCO's ids go from 1 to 90 and leave out ten, 12 among them.
    left_out = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    coco = make_coco(category_ids=[i for i in range(1, 91) if i not in left_out])
    with pytest.raises(InputError) as error:
        load(lambda x: [dict(x[0], category_id=i) for i in category_ids], coco=coco)
    message = str(error.value)
    assert "allowed: the 80 category ids of folder/gt.json, 1 to 90" in message
    if hint is None:
        assert "All ids lie" not in message
    else:
        assert f"{hint}: the file seems to hold consecutive class numbers" in message


def test_ground_truth_that_was_not_read_by_load_ground_truth(load):
    coco = make_coco()
    del coco.annotation_file
    with pytest.raises(InputError, match="the ids of the 2 images of the ground truth"):
        load(change_at(0, image_id=1), coco=coco)


def test_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="missing.json: cannot be read: No such file"):
        load_results(tmp_path / "missing.json", make_coco())


def test_file_that_is_no_json(tmp_path):
    (tmp_path / "a.json").write_text('[{"image_id": 1,')
    with pytest.raises(InputError, match="a.json: is not a json file: .*line 1 column"):
        load_results(tmp_path / "a.json", make_coco())


def test_garbage_collection_goes_on(load):
    load()
    assert gc.isenabled()
    with pytest.raises(InputError):
        load(remove_at(0, "score"))
    assert gc.isenabled()
    gc.disable()
    try:
        load()
        assert not gc.isenabled()
    finally:
        gc.enable()


ODD_VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 3, 7, 139, 1.5, 7.0, NAN, INF, -INF, 1e308, 10**30, 10**400]
    + ["", "7", "000000000139", "62<", "6P", "\ud800", [], {}, [[]], [None], [1, 2, 3, 4]]
    + [[[1, 2, 3, 4, 5, 6]], [[0, 0, 9e4, 0, 0, 9]], [[1, 2, 3, NAN, 5, 6]], [[0] * 7], ["a"] * 6]
    + [{"size": [5, 4]}, {"size": [5, 4], "counts": "62<"}, {"size": [5, 4], "counts": [20]}]
    + [{"size": [5, 4], "counts": [0, 5, 0, 5, 10]}, {"size": None, "counts": "62<"}]
)
RLE_TEXTS = st.text([chr(x) for x in range(40, 120)], max_size=5)


@st.composite
def mutated_entries(draw):
    """Entries of which up to three values, anywhere in them, are replaced, removed or repeated."""
    data = make_entries()
    for _ in range(draw(st.integers(1, 3))):
        parent, key, value = None, None, data
        while isinstance(value, (dict, list)) and value:
            # Now and then a whole entry, box or mask.
            if parent is not None and draw(st.integers(0, 3)) == 0:
                break
            keys = sorted(value) if isinstance(value, dict) else range(len(value))
            parent, key = value, draw(st.sampled_from(list(keys)))
            value = parent[key]
        action = draw(st.sampled_from(["set", "set", "set", "text", "delete", "repeat"]))
        if parent is None:  # no entry is left
            break
        if action == "set":
            parent[key] = copy.deepcopy(draw(ODD_VALUES))
        elif action == "text":
            parent[key] = draw(RLE_TEXTS)
        elif action == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(value))
    return data


@given(mutated_entries())
@settings(max_examples=400, deadline=None)
def test_any_result_file_is_read_or_refused(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "mutated_results.json"
    path.write_text(json.dumps(entries))
    coco = make_coco()
    warnings = []
    try:
        results = load_results(path, coco, warnings)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert all(x.count >= 1 for x in warnings)
    assert len(results) == len(entries)
    for entry in results:
        image = coco.imgs[entry["image_id"]]
        assert entry["category_id"] in coco.cats
        assert all(math.isfinite(x) for x in [*entry["bbox"], entry["score"]])
        rle = entry["segmentation"]
        assert rle["size"] == [image["height"], image["width"]]
        # A broken RLE would not come back from here.
        assert mask_util.iou([rle], [rle], [0])[0, 0] == (1 if entry["area"] else 0)
        assert mask_util.decode(rle).sum() == entry["area"]
