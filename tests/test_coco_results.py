"""Ground truth and results made ready for pycocotools: what is completed, and what is refused."""

import contextlib
import io
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from teacher_student_mask import InputError
from teacher_student_mask.coco_json import load_ground_truth, load_results, prepare_ground_truth

NAN, INF = math.nan, math.inf


def make_data():
    """Two images; ids 11 to 14 are polygons, compressed and uncompressed RLE, and a crowd."""
    rows = [
        # Columns 1 to 3 of rows 2 to 4, and columns 5, 6 of row 0.
        (11, 7, 3, [[1, 2, 4, 2, 4, 5, 1, 5], [5, 0, 7, 0, 7, 1, 5, 1]], [1, 0, 6, 5], 10.5, 0),
        # Runs 6, 2, 12 in columns of 5: rows 1 and 2 of column 1.
        (12, 2, 17, {"size": [5, 4], "counts": "62<"}, [1, 1, 1, 2], 2, 0),
        (13, 2, 3, {"size": [5, 4], "counts": [0, 5, 15]}, [0, 0, 1, 5], 5, 0),
        (14, 7, 17, {"size": [6, 8], "counts": [6, 12, 30]}, [1, 0, 2, 6], 12, 1),
    ]
    fields = ("id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd")
    return {
        "info": {"year": 2020},
        "images": [
            {"id": 7, "height": 6, "width": 8, "file_name": "a.jpg"},
            {"id": 2, "height": 5, "width": 4, "file_name": "b.jpg"},
        ],
        "categories": [{"id": 3, "name": "ant"}, {"id": 17, "name": "cat"}],
        "annotations": [dict(zip(fields, row)) for row in rows],
    }


def make_entries():
    """As results: the objects of the ground truth that are not crowds, in another order."""
    fields = ("image_id", "category_id", "segmentation", "bbox")
    rows = [make_data()["annotations"][i] for i in (1, 0, 2)]
    return [{x: row[x] for x in fields} | {"score": s} for row, s in zip(rows, (0.5, 1, 0))]


@pytest.fixture
def load(tmp_path):
    """Return ``load(change, warnings)``: the ground truth, ``change(data)`` edits its json."""

    def load_changed(change=None, warnings=None, **options):
        data = make_data()
        if change is not None:
            change(data)
        path = tmp_path / "gt.json"
        path.write_text(json.dumps(data))
        return load_ground_truth(path, warnings=warnings, **options)

    return load_changed


@pytest.fixture
def results(load, tmp_path):
    """Return ``results(change, warnings)``: the results; ``change`` edits or replaces entries."""

    def load_changed(change=None, warnings=None):
        entries = make_entries()
        if change is not None:
            returned = change(entries)
            entries = entries if returned is None else returned
        path = tmp_path / "results.json"
        path.write_text(json.dumps(entries))
        return load_results(path, load(), warnings)

    return load_changed


def masks_of_make_data():
    masks = {x: np.zeros((6, 8), dtype=np.uint8) for x in (11, 14)}
    masks.update({x: np.zeros((5, 4), dtype=np.uint8) for x in (12, 13)})
    masks[11][2:5, 1:4] = masks[11][0, 5:7] = 1
    masks[12][1:3, 1] = 1
    masks[13][:, 0] = 1
    masks[14][:, 1:3] = 1
    return masks


def test_all_kinds_of_masks_and_all_fields_are_read(load, tmp_path, capsys):
    findings = []
    coco = load(warnings=findings)
    assert findings == [] and capsys.readouterr().out == ""
    for i, mask in masks_of_make_data().items():
        assert (coco.annToMask(coco.anns[i]) == mask).all()
    assert coco.dataset["info"] == {"year": 2020}
    assert coco.imgs == {x["id"]: x for x in make_data()["images"]}
    assert coco.cats == {x["id"]: x for x in make_data()["categories"]}
    assert [x["iscrowd"] for x in coco.anns.values()] == [0, 0, 0, 1]
    assert coco.annotation_file == str(tmp_path / "gt.json")


def test_real_coco_as_pycocotools_reads_it(coco_root, capsys):
    path = f"{coco_root}/annotations/instances_val2017.json"
    expected, coco = COCO(path), load_ground_truth(path)
    assert len(coco.anns) == len(expected.anns) > 100
    for i, annotation in expected.anns.items():
        assert coco.annToRLE(coco.anns[i]) == expected.annToRLE(annotation), i
    assert coco.imgs == expected.imgs and coco.cats == expected.cats


def test_what_is_odd_is_completed(load):
    def change(data):
        data["annotations"][0]["segmentation"].extend([[1, 1, 2, 2], []])
        del data["annotations"][2]["iscrowd"]

    coco = load(change)
    assert coco.anns[11]["segmentation"] == make_data()["annotations"][0]["segmentation"]
    assert coco.anns[13]["iscrowd"] == 0


def test_a_ground_truth_needs_annotations_and_masks(load):
    with pytest.raises(InputError, match="'annotations' is None|'annotations' is missing"):
        load(lambda data: data.pop("annotations"))

    def forget(data):
        for row in data["annotations"]:
            row["segmentation"] = None

    with pytest.raises(InputError, match="no annotation has a mask"):
        load(forget)
    assert len(load(forget, reads_masks=False).anns) == 4


@pytest.mark.parametrize("bad", [0, -3, "a", 2.0])
def test_ids_that_cocoeval_cannot_use_are_renumbered(load, bad):
    coco = load(lambda data: data["annotations"][1].update(id=bad))
    assert list(coco.anns) == [x["id"] for x in coco.anns.values()] == [1, 2, 3, 4]
    assert [x["id"] for x in coco.imgToAnns[2]] == [2, 3]


@pytest.mark.parametrize("counts", [[6, 0, 0, 2, 0, 2, 10], "text"])
def test_runs_of_length_0_are_joined(counts):
    """pycocotools goes past its memory where such runs meet."""
    if isinstance(counts, str):
        runs = {"size": [5, 4], "counts": [6, 2, 0, 0, 12]}
        counts = mask_util.frPyObjects(runs, 5, 4)["counts"].decode()
    coco = COCO()
    coco.dataset = make_data()
    row = coco.dataset["annotations"][1]
    row["segmentation"] = {"size": [5, 4], "counts": counts}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    expected = coco.annToMask(row)
    prepare_ground_truth(coco, "gt.json", reads_masks=True)
    assert row["segmentation"] == mask_util.encode(np.asfortranarray(expected))
    assert expected.any()


def test_all_kinds_of_masks_of_results(results):
    warnings = []
    found = results(warnings=warnings)
    assert warnings == []
    masks = masks_of_make_data()
    for entry, expected, i, area in zip(found, make_entries(), (12, 11, 13), (2, 11, 5)):
        rle = mask_util.encode(np.asfortranarray(masks[i]))
        assert entry == expected | {"segmentation": rle, "area": area}
        kinds = (int, int, float, list, dict, float)
        assert tuple(type(x) for x in entry.values()) == kinds
        assert type(entry["segmentation"]["counts"]) is bytes
        assert {type(x) for x in entry["bbox"]} == {float}


def test_ids_may_be_floats_or_the_names_of_files(results):
    changed = results(lambda entries: entries[0].update(image_id="000000000002", category_id=17.0))
    assert changed == results()
    assert {type(changed[0][x]) for x in ("image_id", "category_id")} == {int}


def test_entries_without_box_get_that_of_the_mask(results):
    def change(entries):
        del entries[0]["bbox"]
        entries[1]["bbox"] = None
        entries[2].update(bbox=None, segmentation={"size": [5, 4], "counts": [20]})

    assert [x["bbox"] for x in results(change)] == [[1, 1, 1, 2], [1, 0, 6, 5], [0, 0, 0, 0]]


def test_warnings_about_results(results, caplog):
    def repeat(entries):
        # The box is that of the mask; another score, class or mask is another detection.
        entries.extend(entries[0] | x for x in ({}, {"bbox": [0, 0, 1, 1]}, {"score": 0.25}))

    for change, expected in ((lambda x: [], ("no entries", 1)), (repeat, ("entry twice", 2))):
        warnings = []
        results(change, warnings)
        assert [(x.rule, x.count) for x in warnings] == [expected]
    assert [x.levelname for x in caplog.records] == ["WARNING"] * 2


# Fields of entry 1 that are refused.
REFUSED = [
    *({"image_id": x} for x in (None, [7], NAN, 7.5, True, "08", "7.0", "\u0667", 99)),
    *({"category_id": x} for x in (None, "3", 91, True)),
    *({"score": x} for x in (NAN, -INF, "0.5", None, True, [0.5], 10**400)),
    *({"segmentation": x} for x in (None, [], "a", [[1, 2]], [[1, 2, 3, NAN, 5, 6]])),
    *({"segmentation": [x]} for x in ([1, 2, 3, 4, 5, "6"], [1, 2, 3, 4, 5, 1e6])),
    {"segmentation": {"size": [8, 6], "counts": [48]}},
    *({"segmentation": {"size": [6, 8], "counts": x}} for x in ("62P", "b'62<'", [0, 5, 14], [])),
    *({"bbox": x} for x in ([1, 2, 3], [], [1, 2, 3, NAN], "1234", [1, 2, -3, 4])),
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_refused_values_are_named(results, tmp_path, fields):
    (field,) = fields
    with pytest.raises(InputError) as error:
        results(lambda entries: entries[1].update(fields))
    start = f"{tmp_path / 'results.json'}: entry number 1: {field!r} is "
    assert str(error.value).startswith(start) and "; allowed: " in str(error.value)
    if field != "bbox":
        with pytest.raises(InputError, match=f"entry number 1: '{field}' is missing"):
            results(lambda entries: entries[1].pop(field) and None)


def test_other_files_are_not_results(results, tmp_path, load):
    for content, words in (({"images": []}, "is a dict"), ("abc", "is a str"), ([1], "list")):
        with pytest.raises(InputError, match=words):
            results(lambda entries, content=content: content)
    with pytest.raises(InputError, match="missing.json: cannot be read: .*No such file"):
        load_results(tmp_path / "missing.json", load())
