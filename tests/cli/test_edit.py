"""``tsmask edit``: the right masks go, nothing else is lost."""

import copy
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.cli.edit import hide_masks
from teacher_student_mask.cli.main import main

CAT = 17  # the unseen class
# Of the tiny COCO without crowds: masks of ant (3), cat (17), ship (90).
MASKS = {3: 3, 17: 3, 90: 2}


def run(capsys, *arguments):
    code = main(["edit", *(str(x) for x in arguments)])
    return code, capsys.readouterr()


def strip(capsys, dataset, out, *arguments):
    seen = ["--seen-classes", dataset.seen_classes]
    code, output = run(capsys, "strip", dataset.json_file, out, *seen, *arguments)
    assert code == 0
    return json.loads(out.read_text()), output.out


def hide(capsys, dataset, out, *arguments):
    code, output = run(capsys, "hide", dataset.json_file, out, *arguments)
    assert code == 0
    return json.loads(out.read_text()), output.out


def kept(annotations):
    return {x["id"] for x in annotations if x.get("segmentation") and not x.get("iscrowd")}


def use_box_area(row):
    if "area" in row:
        row["area"] = row["bbox"][2] * row["bbox"][3]


def add_crowd(data):
    """A crowd of the unseen class, and values that a careless writer would change."""
    crowd = {"size": [64, 64], "counts": [100, 300, 3696]}
    row = {"id": 10**18 + 1, "image_id": 7, "category_id": CAT, "iscrowd": 1}
    data["annotations"].append(row | {"bbox": [0.1, 2, 30.25, 20], "segmentation": crowd})
    data["info"] = {"description": "caf\u00e9 \U0001f600", "numbers": [1, 1.0, 1e-9, None, True]}


def test_unseen_masks_and_areas_are_gone_and_all_else_is_as_it_was(
    make_tiny_coco, tmp_path, capsys
):
    dataset = make_tiny_coco(add_crowd)
    before = open(dataset.json_file, "rb").read()
    data, output = strip(capsys, dataset, tmp_path / "out.json")
    expected = copy.deepcopy(dataset.data)
    for row in expected["annotations"]:
        if row["category_id"] == CAT:
            del row["segmentation"]
            use_box_area(row)
    # As text: equal dicts could differ in order, or 1 be 1.0.
    assert json.dumps(data) == json.dumps(expected)
    assert data["annotations"][-1]["iscrowd"] == 1 and "area" not in data["annotations"][-1]
    assert open(dataset.json_file, "rb").read() == before
    rows = [line.split() for line in output.splitlines()]
    # Class, split, objects, human masks, ...
    num_masks = {x[0]: x[3] for x in rows if len(x) == 8}
    assert (num_masks["ant"], num_masks["cat"]) == ("3", "0")


def test_masks_of_models_go_too(make_tiny_coco, tmp_path, capsys):
    def mark(data):
        """Of the unseen objects of an image, and of a seen one, a model made the masks."""
        add_crowd(data)
        for x in data["annotations"]:
            if x["image_id"] == 2 or x["id"] in (101, 10**18 + 1):
                x.update(mask_source="model", score=0.5)

    dataset = make_tiny_coco(mark)
    data, _ = strip(capsys, dataset, tmp_path / "none.json")
    unseen = [x for x in data["annotations"] if x["category_id"] == CAT]
    assert len(unseen) == 4 and not any(
        {"segmentation", "mask_source", "score"} & set(x) for x in unseen
    )
    assert [x["mask_source"] for x in data["annotations"] if x["id"] == 101] == ["model"]


def test_hidden_masks_leave_the_area_of_the_box_and_all_else_as_it_was(
    make_tiny_coco, tmp_path, capsys
):
    def change(data):
        data["info"] = {"numbers": [1, 1.0, None]}
        del data["annotations"][0]["area"]
        data["annotations"][1]["score"] = 0.7  # of whoever uses the json
        data["annotations"][8]["mask_source"] = "model"

    dataset = make_tiny_coco(change)
    data, _ = hide(capsys, dataset, tmp_path / "out.json", "--keep", 0)
    expected = copy.deepcopy(dataset.data)
    for i in (0, 1, 2, 7, 9, 10, 11):  # not: without a mask, crowd, a model's
        del expected["annotations"][i]["segmentation"]
        use_box_area(expected["annotations"][i])
    assert json.dumps(data) == json.dumps(expected)  # as text: 1 is not 1.0


annotation_lists = st.lists(
    st.fixed_dictionaries(
        {
            "category_id": st.integers(1, 3),
            "iscrowd": st.sampled_from([0, 0, 0, 1]),
            # Two points are not a polygon.
            "segmentation": st.sampled_from([None, [], [[1, 2, 3, 4, 5, 6]], {"counts": [1]}]),
            "bbox": st.just([1.5, 2, 3, 4]),
            "area": st.just(5.0),
        }
    ),
    max_size=60,
)
shares = st.fractions(0, 1, max_denominator=100)


@settings(max_examples=40, deadline=None)
@given(annotation_lists, shares, shares, st.integers(0, 4), st.integers(0, 9), st.randoms())
def test_a_smaller_share_is_part_of_a_larger_one(rows, first, second, at_least, seed, random):
    rows = [{"id": 10 * i + 3, **row} for i, row in enumerate(rows)]
    crowds = [x for x in rows if x["iscrowd"]]
    found = {}
    for share in (min(first, second), max(first, second)):
        hidden = copy.deepcopy(rows)
        random.shuffle(hidden)  # the choice does not depend on the order of the file
        hide_masks(hidden, share, at_least, seed)
        ids = kept(hidden)
        for k in (1, 2, 3):
            of_class = kept(x for x in rows if x["category_id"] == k)
            # Rounded by hand: twice the share of the number, plus one, halved.
            number = (2 * len(of_class) * share + 1) // 2
            number = min(len(of_class), max(number, at_least))
            assert len(ids & of_class) == number
        by_id = {x["id"]: x for x in hidden}
        assert all(by_id[x["id"]] == x for x in crowds)
        assert all(by_id[x["id"]] == x for x in rows if x["id"] in ids)
        assert all(by_id[i]["area"] == 12 for i in kept(rows) - ids)
        found[share] = ids
    assert found[min(found)] <= found[max(found)]


SEEN = ["--seen-classes", "ant"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["strip", "none.json", "OUT", *SEEN], "none.json: cannot be read"),
        (["strip", "JSON", "none/out.json", *SEEN], "cannot be written"),
        (["strip", "JSON", "OLDER", *SEEN], "exists; --force replaces it"),
        (["strip", "JSON", "LINK", *SEEN, "--force"], "the input itself"),
        (["strip", "JSON", "OUT", "--seen-classes", "ants"], "no class 'ants' (nearest: "),
        (["strip", "BROKEN", "OUT", *SEEN], "cannot be read"),
        (["hide", "JSON", "JSON", "--keep", "1", "--force"], "the input itself"),
        (["hide", "JSON", "OUT", "--keep", "1.5"], "must be a number from 0 to 1, got 1.5"),
        (["hide", "JSON", "OUT", "--keep", "nan"], "from 0 to 1"),
    ],
)
def test_wrong_arguments_are_a_sentence(tiny_coco, tmp_path, capsys, arguments, words):
    names = {"OUT": "out.json", "OLDER": "older.json", "LINK": "link.json", "BROKEN": "broken.json"}
    paths = {key: tmp_path / name for key, name in names.items()}
    paths |= {"JSON": tiny_coco.json_file}
    paths["OLDER"].write_text("older")
    paths["BROKEN"].write_text("{")
    os.link(tiny_coco.json_file, paths["LINK"])
    try:
        code = main(["edit", *(str(paths.get(x, x)) for x in arguments)])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert code in (1, 2) and words in output.err + output.out
    assert not paths["OUT"].exists() and paths["OLDER"].read_text() == "older"
    assert json.loads(open(tiny_coco.json_file).read()) == tiny_coco.data


def test_errors_in_the_input_end_with_1_and_no_file(make_tiny_coco, tmp_path, capsys):
    def change(data):
        data["annotations"][8]["segmentation"] = {"size": [3, 3], "counts": [1]}

    dataset, out = make_tiny_coco(change), tmp_path / "none.json"
    code, output = run(capsys, "strip", dataset.json_file, out, "--seen-classes", "all")
    assert code == 1 and not out.exists() and "annotation 109: 'segmentation' is" in output.out
