"""tools/hide_masks.py: the right number of masks goes, class by class, and nothing else changes."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hide_masks as program
from coco_json import mask_removal

# Of the tiny COCO without crowds: masks of ant (3), cat (17), ship (90).
MASKS = {3: 3, 17: 3, 90: 2}


def run(capsys, *arguments):
    code = program.main([str(x) for x in arguments])
    return code, capsys.readouterr().out


def hide(capsys, dataset, out, *arguments):
    code, output = run(capsys, dataset.json_file, out, *arguments)
    assert code == 0, output
    return json.loads(out.read_text()), output


def kept(annotations):
    return {x["id"] for x in annotations if x.get("segmentation") and not x.get("iscrowd")}


def test_what_loses_its_mask_has_the_area_of_its_box_and_all_else_is_as_it_was(
    make_tiny_coco, tmp_path, capsys
):
    def change(data):
        data["info"] = {"numbers": [1, 1.0, None]}
        del data["annotations"][0]["area"]
        data["annotations"][8]["mask_source"] = "model"

    dataset = make_tiny_coco(change)
    before = open(dataset.json_file, "rb").read()
    data, output = hide(capsys, dataset, tmp_path / "out.json", "--keep", 0)
    expected = copy.deepcopy(dataset.data)
    for i in (0, 1, 2, 7, 9, 10, 11):  # not: without a mask, crowd, a model's
        del expected["annotations"][i]["segmentation"]
        if i > 0:
            width, height = expected["annotations"][i]["bbox"][2:]
            expected["annotations"][i]["area"] = width * height
    assert json.dumps(data) == json.dumps(expected)  # as text: 1 is not 1.0
    assert open(dataset.json_file, "rb").read() == before
    assert "no mask is left of: ant, cat, ship" in output and "7 masks removed, 0 kept" in output


def test_objects_without_ids_lose_their_masks_too(make_tiny_coco, tmp_path, capsys):
    """Training does without ids of annotations, and so does this; it ended in a KeyError."""

    def change(data):
        for annotation in data["annotations"]:
            del annotation["id"]

    dataset = make_tiny_coco(change)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    first, second = (hide(capsys, dataset, out, "--keep", 0.4, "--seed", 5)[0] for out in files)
    assert first == second
    num_kept = sum(
        bool(x.get("segmentation")) and not x.get("iscrowd") for x in first["annotations"]
    )
    assert num_kept == 3  # 0.4 of 3, 3 and 2 masks: one of each class


def test_what_is_no_mask_is_not_counted(make_tiny_coco, tmp_path, capsys):
    """Two points are no polygon, for the checks and for training; they were counted as a mask."""

    def change(data):
        data["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]

    _, output = hide(capsys, make_tiny_coco(change), tmp_path / "out.json", "--keep", 0)
    assert "7 masks removed, 0 kept" in output


def test_the_table_counts(tiny_coco, tmp_path, capsys):
    data, output = hide(capsys, tiny_coco, tmp_path / "out.json", "--keep", 0.4, "--seed", 5)
    rows = [line.split() for line in output.splitlines()]
    # Class, boxes, crowds, masks before, kept, removed: 0.4 of 3 is 1.2, of 2 is 0.8.
    assert ["ant", "5", "1", "3", "1", "2", "33.3", "%"] in rows
    assert ["cat", "3", "0", "3", "1", "2", "33.3", "%"] in rows
    assert ["ship", "4", "0", "2", "1", "1", "50.0", "%"] in rows
    assert ["all", "12", "1", "8", "3", "5", "37.5", "%"] in rows
    assert "5 masks removed, 3 kept" in output and len(kept(data["annotations"])) == 3


@pytest.mark.parametrize(
    "share, at_least, numbers",
    [
        ("1", 0, (3, 3, 2)),
        ("0.5", 0, (2, 2, 1)),  # halves up
        ("1/3", 0, (1, 1, 1)),
        ("0", 2, (2, 2, 2)),
        ("0", 9, (3, 3, 2)),
        ("1", 1, (3, 3, 2)),
    ],
)
def test_numbers_of_masks(tiny_coco, tmp_path, capsys, share, at_least, numbers):
    options = ["--keep", share, "--min-per-class", at_least]
    data, _ = hide(capsys, tiny_coco, tmp_path / "out.json", *options)
    ids = kept(data["annotations"])
    by_class = {x["id"]: x["category_id"] for x in data["annotations"]}
    counts = [sum(by_class[i] == k for i in ids) for k in MASKS]
    assert counts == list(numbers)


def test_other_classes_keep_all(tiny_coco, tmp_path, capsys):
    options = ["--keep", 0, "--classes", "ant, ship"]
    data, output = hide(capsys, tiny_coco, tmp_path / "out.json", *options)
    assert {x["category_id"] for x in data["annotations"] if x["id"] in kept([x])} == {17}
    assert "no mask is left of: ant, ship;" in output


annotation_lists = st.lists(
    st.fixed_dictionaries(
        {
            "category_id": st.integers(1, 3),
            "iscrowd": st.sampled_from([0, 0, 0, 1]),
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
        before, after = program.hide_masks(hidden, {1, 2}, share, at_least, seed)
        ids = kept(hidden)
        for k in (1, 2, 3):
            of_class = kept(x for x in rows if x["category_id"] == k)
            # Rounded by hand: twice the share of the number, plus one, halved.
            number = (2 * len(of_class) * share + 1) // 2 if k != 3 else len(of_class)
            number = min(len(of_class), max(number, at_least))
            assert len(ids & of_class) == after[k] == number and before[k] == len(of_class)
        by_id = {x["id"]: x for x in hidden}
        assert all(by_id[x["id"]] == x for x in crowds)
        assert all(by_id[x["id"]] == x for x in rows if x["id"] in ids)
        assert all(by_id[i]["area"] == 12 for i in kept(rows) - ids)
        found[share] = ids
    assert found[min(found)] <= found[max(found)]


def test_seeds_choose_other_masks_and_one_seed_the_same(tmp_path):
    rows = [
        {"id": i, "category_id": i % 2, "bbox": [0, 0, 1, 1], "segmentation": [[0] * 6]}
        for i in range(200)
    ]
    chosen = []
    for seed in (0, 0, 1):
        hidden = copy.deepcopy(rows)
        program.hide_masks(hidden, {0, 1}, program.share("0.25"), 0, seed)
        chosen.append(kept(hidden))
    assert chosen[0] == chosen[1] and len(chosen[0]) == len(chosen[2]) == 50
    # Half of the masks of the second choice would be in the first by chance: 12.5 of 50.
    assert 3 < len(chosen[0] & chosen[2]) < 25


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["JSON", "OUT"], "--keep"),
        (["JSON", "OUT", "--keep", "1.5"], "must be a number from 0 to 1, got '1.5'"),
        (["JSON", "OUT", "--keep", "-0.1"], "from 0 to 1"),
        (["JSON", "OUT", "--keep", "nan"], "from 0 to 1"),
        (["JSON", "OUT", "--keep", "1/0"], "from 0 to 1"),
        (["JSON", "OUT", "--keep", "1", "--min-per-class", "-1"], "must be 0 or more, got -1"),
        (["JSON", "JSON", "--keep", "1", "--force"], "the input itself"),
        (["none.json", "OUT", "--keep", "1"], "none.json: no such file"),
    ],
)
def test_wrong_command_lines_end_with_2(tiny_coco, tmp_path, capsys, arguments, words):
    paths = {"JSON": tiny_coco.json_file, "OUT": tmp_path / "out.json"}
    with pytest.raises(SystemExit) as error:
        run(capsys, *[paths.get(x, x) for x in arguments])
    assert error.value.code == 2 and not (tmp_path / "out.json").exists()
    assert words in capsys.readouterr().err


def test_unknown_classes_and_broken_files_end_with_1(tiny_coco, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--keep", "0.5", "--classes", "ants"]
    code, output = run(capsys, tiny_coco.json_file, out, *options)
    assert code == 1 and "no class 'ants' (nearest: " in output
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    code, output = run(capsys, broken, out, "--keep", "0.5")
    assert code == 1 and f"error: {broken}: unreadable" in output and not out.exists()


def test_a_full_disk_is_a_sentence(tiny_coco, tmp_path, capsys, monkeypatch):
    def full(path):
        raise mask_removal.WriteError(28, f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(mask_removal, "open_atomically", full)
    code, output = run(capsys, tiny_coco.json_file, tmp_path / "out.json", "--keep", "0.5")
    assert code == 1 and "error: " in output and "No space left" in output


def test_help_gives_examples(capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["--help"])
    output = capsys.readouterr().out
    assert error.value.code == 0
    assert all(x in output for x in ("examples:", "exit code:", "area", "crowds", "--keep 0.1"))
