"""tools/strip_masks.py: no unseen mask is left, nothing else is lost, training is the same."""

import contextlib
import copy
import io
import json
import os
import random

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

import strip_masks as program
from coco_json import mask_removal
from teacher_student_mask import TeacherStudentDatasetMapper, register_partial_coco
from teacher_student_mask.structures import ImageMask

UNSEEN_CATEGORY = 17


def add_crowd(data):
    """A crowd of the unseen class, and values that a careless writer would change."""
    crowd = {"size": [64, 64], "counts": [100, 300, 3696]}
    row = {"id": 10**18 + 1, "image_id": 7, "category_id": UNSEEN_CATEGORY, "iscrowd": 1}
    data["annotations"].append(row | {"bbox": [0.1, 2, 30.25, 20], "segmentation": crowd})
    data["info"] = {"description": "caf\u00e9 \U0001f600", "numbers": [1, 1.0, 1e-9, None, True]}


def run(capsys, *arguments):
    code = program.main([str(x) for x in arguments])
    return code, capsys.readouterr().out


def strip(capsys, dataset, out, *arguments):
    seen = ["--seen-classes", dataset.seen_classes]
    code, output = run(capsys, dataset.json_file, out, *seen, *arguments)
    assert code == 0
    return json.loads(out.read_text()), output


def test_unseen_masks_and_areas_are_gone_and_all_else_is_as_it_was(
    make_tiny_coco, tmp_path, capsys
):
    dataset = make_tiny_coco(add_crowd)
    before = open(dataset.json_file, "rb").read()
    data, output = strip(capsys, dataset, tmp_path / "out.json")
    expected = copy.deepcopy(dataset.data)
    for row in expected["annotations"]:
        if row["category_id"] == UNSEEN_CATEGORY:
            del row["segmentation"]
            if "area" in row:
                row["area"] = row["bbox"][2] * row["bbox"][3]
    # As text: equal dicts could differ in order, or 1 be 1.0.
    assert json.dumps(data) == json.dumps(expected)
    assert data["annotations"][-1]["iscrowd"] == 1 and "area" not in data["annotations"][-1]
    assert open(dataset.json_file, "rb").read() == before
    rows = [line.split() for line in output.splitlines()]
    # Class, split, boxes, crowds, masks kept, masks removed.
    assert ["ant", "seen", "5", "1", "4", "0"] in rows
    assert ["cat", "unseen", "4", "1", "0", "4"] in rows
    assert ["ship", "seen", "4", "0", "2", "0"] in rows
    assert ["all", "13", "2", "6", "4"] in rows
    assert "4 masks removed" in output and "look whether they hold masks" not in output


def test_a_stripped_file_stays_as_it_is(make_tiny_coco, tmp_path, capsys):
    dataset = make_tiny_coco(add_crowd)
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    strip(capsys, dataset, once)
    code, output = run(capsys, once, twice, "--seen-classes", dataset.seen_classes)
    assert code == 0 and "0 masks removed" in output
    assert once.read_bytes() == twice.read_bytes()


def test_where_no_class_is_unseen_it_is_a_copy(make_tiny_coco, tmp_path, capsys):
    dataset = make_tiny_coco(add_crowd)
    out = tmp_path / "out.json"
    assert run(capsys, dataset.json_file, out, "--seen-classes", "all")[0] == 0
    assert out.read_text() == open(dataset.json_file).read()


def examples_of(cfg, name, seed):
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = (name,)
    mapper = TeacherStudentDatasetMapper(cfg, is_train=True)
    np.random.seed(seed)
    random.seed(seed)
    return [mapper(x) for _ in range(3) for x in DatasetCatalog.get(name)]


def bytes_of(value):
    """Any value of an example in a form that compares bit for bit."""
    if hasattr(value, "polygons"):
        return [[x.tobytes() for x in polygons] for polygons in value.polygons]
    if isinstance(value, ImageMask):
        return len(value), bytes_of(value.tensor)
    value = getattr(value, "tensor", value)
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_training_sees_the_same_tensors(make_tiny_coco, tiny_cfg, tmp_path, capsys, mask_format):
    dataset = make_tiny_coco(add_crowd)
    out = tmp_path / "out.json"
    strip(capsys, dataset, out)
    name = f"{dataset.name}_stripped"
    register_partial_coco(name, str(out), dataset.image_root)
    opts = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.6]]
    cfg = tiny_cfg(opts=[*opts, "INPUT.MASK_FORMAT", mask_format], dataset=dataset)
    try:
        pairs = list(zip(examples_of(cfg, dataset.name, 1), examples_of(cfg, name, 1)))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert len(pairs) == 12
    num_unseen = 0
    for a, b in pairs:
        a, b = (x | x.pop("instances").get_fields() for x in (a, b))
        num_unseen += int((a["gt_classes"] == 1).sum())
        assert {"image", "gt_boxes", "gt_masks", "gt_has_mask", "gt_exclusion_masks"} <= set(a)
        assert {k: bytes_of(x) for k, x in a.items()} == {k: bytes_of(x) for k, x in b.items()}
    assert num_unseen > 3


def mark(data):
    """Of the unseen objects of an image, and of a seen one, a model made the masks."""
    add_crowd(data)
    for x in data["annotations"]:
        if x["image_id"] == 2 or x["id"] in (101, 10**18 + 1):
            x.update(mask_source="model", score=0.5)


def test_masks_of_models_go_unless_they_are_kept(make_tiny_coco, tmp_path, capsys):
    dataset = make_tiny_coco(mark)
    data, output = strip(capsys, dataset, tmp_path / "none.json")
    unseen = [x for x in data["annotations"] if x["category_id"] == UNSEEN_CATEGORY]
    assert len(unseen) == 4 and not any({"segmentation", "mask_source"} & set(x) for x in unseen)
    assert [x["mask_source"] for x in data["annotations"] if x["id"] == 101] == ["model"]
    assert "4 masks removed" in output
    assert "look whether they hold masks: score" in output
    data, output = strip(capsys, dataset, tmp_path / "kept.json", "--keep-model-masks")
    expected = copy.deepcopy(dataset.data)
    for row in expected["annotations"]:
        if row["category_id"] != UNSEEN_CATEGORY:
            continue
        # That of the human mask, which COCO's tools may have left there.
        if "area" in row:
            row["area"] = row["bbox"][2] * row["bbox"][3]
        if row["image_id"] != 2:  # a human mask, and a crowd
            del row["segmentation"]
            row.pop("mask_source", None)
    assert json.dumps(data) == json.dumps(expected)
    rows = [line.split() for line in output.splitlines()]
    assert ["cat", "unseen", "4", "1", "2", "2"] in rows
    assert "2 masks removed" in output


def test_pycocotools_reads_it(make_tiny_coco, tmp_path, capsys):
    out = tmp_path / "out.json"
    dataset = make_tiny_coco(add_crowd)
    strip(capsys, dataset, out)
    coco, original = COCO(str(out)), COCO(dataset.json_file)
    assert set(coco.anns) == set(original.anns) and set(coco.imgs) == set(original.imgs)
    assert coco.getAnnIds(iscrowd=True) == original.getAnnIds(iscrowd=True)
    # Of seen classes it still has the masks.
    (i,) = coco.getAnnIds(imgIds=[30], catIds=[3])
    assert np.array_equal(coco.annToMask(coco.anns[i]), original.annToMask(original.anns[i]))


numbers = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec=None), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(texts, values, max_size=4))
def test_any_json_is_written_as_it_was_read(data):
    text = json.dumps(data)
    stream = io.StringIO()
    mask_removal.write_json(stream, json.loads(text))
    assert stream.getvalue() == text


segmentations = st.sampled_from([None, [], [[1, 1, 9, 1, 9, 9]], {"size": [9, 9], "counts": [81]}])
rows = st.fixed_dictionaries(
    {
        "category_id": st.sampled_from([3, 17, 90]),
        "bbox": st.lists(numbers, min_size=4, max_size=4),
    },
    optional={
        "segmentation": segmentations,
        "area": numbers,
        "iscrowd": st.sampled_from([0, 1]),
        "mask_source": st.sampled_from(["human", "model"]),
    },
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(rows), st.sets(st.sampled_from([3, 17, 90])))
def test_what_is_left_does_not_depend_on_unseen_masks(annotations, unseen):
    def other(row):
        # Another mask, and the area that goes with it, where the class is unseen.
        row = copy.deepcopy(row)
        if row["category_id"] in unseen:
            row["segmentation"] = [[2, 2, 5, 2, 5, 5]]
            if "area" in row:
                row["area"] = 4.5
        return row

    first, second = copy.deepcopy(annotations), [other(x) for x in annotations]
    program.strip_masks(second, unseen)
    num_masks, num_removed = program.strip_masks(first, unseen)
    assert first == second
    for before, after in zip(annotations, first):
        assert after == before or before["category_id"] in unseen and "segmentation" not in after
    assert sum(num_masks.values()) == sum(bool(x.get("segmentation")) for x in annotations)
    assert all(num == (num_masks[k] if k in unseen else 0) for k, num in num_removed.items())


def test_fields_that_may_hold_masks_are_named(make_tiny_coco, tmp_path, capsys):
    def change(data):
        data["panoptic"] = 1
        data["images"][0]["sem_seg_file_name"] = "a.png"
        data["annotations"][7]["rle"] = "abc"
        data["annotations"][0]["of_a_seen_class"] = 1

    data, output = strip(capsys, make_tiny_coco(change), tmp_path / "out.json")
    start = "look whether they hold masks: "
    assert f"in the file, {start}panoptic\n" in output
    assert f"in images, {start}sem_seg_file_name\n" in output
    assert f"in annotations of unseen classes, {start}rle\n" in output
    assert "of_a_seen_class" not in output and data["annotations"][7]["rle"] == "abc"


def test_errors_in_the_input_end_with_1_and_no_file(make_tiny_coco, tmp_path, capsys):
    def change(data):
        data["annotations"][10]["bbox"][2] = -1

    out = tmp_path / "out.json"
    dataset = make_tiny_coco(change)
    code, output = run(capsys, dataset.json_file, out, "--seen-classes", "ant")
    assert code == 1 and not out.exists()
    assert "error: " in output and "annotation 111: 'bbox' is" in output
    dataset = make_tiny_coco()
    code, output = run(capsys, dataset.json_file, out, "--seen-classes", "ants")
    assert code == 1 and "no class 'ants' (nearest: " in output and not out.exists()
    broken = tmp_path / "broken.json"
    for content in (b"{", b"[]", b"\xff", b"[" * 10**5):
        broken.write_bytes(content)
        code, output = run(capsys, broken, out, "--seen-classes", "ant")
        assert code == 1 and f"error: {broken}: " in output and not out.exists()


def test_a_broken_unseen_mask_is_no_error(make_tiny_coco, tmp_path, capsys):
    def change(data):
        data["annotations"][8]["segmentation"] = {"size": [3, 3], "counts": [1]}

    data, output = strip(capsys, make_tiny_coco(change), tmp_path / "out.json")
    assert "warning: " in output and "segmentation" not in data["annotations"][8]


def test_an_interrupted_writing_leaves_the_older_file(tiny_coco, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("older")

    def interrupt(f, data):
        f.write("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(mask_removal, "write_json", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        run(capsys, tiny_coco.json_file, out, "--seen-classes", "ant", "--force")
    assert out.read_text() == "older" and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_a_sentence(tiny_coco, tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        raise mask_removal.WriteError(28, f"{path} could not be written (No space left on device)")
        yield

    monkeypatch.setattr(mask_removal, "open_atomically", full)
    out = tmp_path / "out.json"
    code, output = run(capsys, tiny_coco.json_file, out, "--seen-classes", "ant")
    assert code == 1 and f"error: {out} could not be written (No space left" in output


def test_an_output_that_exists_is_replaced_on_request_alone(tiny_coco, tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text("older")
    arguments = [tiny_coco.json_file, out, "--seen-classes", "ant"]
    with pytest.raises(SystemExit) as error:
        run(capsys, *arguments)
    assert error.value.code == 2 and out.read_text() == "older"
    assert f"{out}: exists; --force replaces it" in capsys.readouterr().err
    assert run(capsys, *arguments, "--force")[0] == 0
    assert len(json.loads(out.read_text())["annotations"]) == 12


@pytest.mark.parametrize("kind", ["path", "symlink", "hard link"])
def test_the_input_is_never_replaced(tiny_coco, tmp_path, capsys, kind):
    out = tmp_path / "link.json"
    if kind == "path":
        out = tmp_path / "." / "x" / ".." / os.path.basename(tiny_coco.json_file)
        (tmp_path / "x").mkdir()
    else:
        (os.symlink if kind == "symlink" else os.link)(tiny_coco.json_file, out)
    with pytest.raises(SystemExit) as error:
        run(capsys, tiny_coco.json_file, out, "--seen-classes", "ant", "--force")
    assert error.value.code == 2
    assert "the input itself" in capsys.readouterr().err
    assert json.loads(open(tiny_coco.json_file).read()) == tiny_coco.data


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.json", "OUT", "--seen-classes", "ant"], "none.json: no such file"),
        (["JSON", "OUT"], "--seen-classes"),
        (["JSON", "none/out.json", "--seen-classes", "ant"], "there is no folder none"),
        (["JSON", "FOLDER", "--seen-classes", "ant", "--force"], "a folder; name a file"),
    ],
)
def test_wrong_command_lines_end_with_2(tiny_coco, tmp_path, capsys, arguments, words):
    paths = {"JSON": tiny_coco.json_file, "OUT": tmp_path / "out.json", "FOLDER": tmp_path}
    with pytest.raises(SystemExit) as error:
        run(capsys, *[paths.get(x, x) for x in arguments])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_help_says_what_becomes_of_area_and_crowds(capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["--help"])
    output = capsys.readouterr().out
    assert error.value.code == 0
    assert all(x in output for x in ("examples:", "exit code:", "area", "iscrowd", "seen_40.json"))


def test_real_coco_keeps_all_boxes_and_the_seen_masks(coco_root, tmp_path, capsys):
    source = os.path.join(coco_root, "annotations", "instances_val2017.json")
    out = tmp_path / "out.json"
    code, output = run(capsys, source, out, "--seen-classes", "voc")
    assert code == 0 and "look whether" not in output
    with open(source) as f:
        before = json.load(f)
    after = json.loads(out.read_text())
    num_removed = 0
    for a, b in zip(before["annotations"], after["annotations"], strict=True):
        if "segmentation" in b:
            assert a == b
        else:
            num_removed += 1
            assert {k: a[k] for k in b if k != "area"} == {
                k: x for k, x in b.items() if k != "area"
            }
    assert 0 < num_removed < len(before["annotations"])
    assert f"{num_removed} masks removed" in output
    assert {k: x for k, x in before.items() if k != "annotations"} == {
        k: x for k, x in after.items() if k != "annotations"
    }
