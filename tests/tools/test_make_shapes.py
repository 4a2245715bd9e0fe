"""The program that writes the demo dataset."""

import json
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest

import make_shapes
from teacher_student_mask.data.shapes import SHAPES_CLASSES, generate_shapes

SIZES = ["--num-train", "4", "--num-val", "2", "--image-size", "64"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "shapes"
    assert make_shapes.main(["--output-dir", str(folder), *SIZES]) == 0
    return folder


def load(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def share_overlapped(coco):
    """Share of objects with O >= 0.3; the boxes of the shapes lie on whole pixels."""
    overlaps = []
    for x in coco["annotations"]:
        left, top, width, height = (int(v) for v in x["bbox"])
        window = np.s_[top : top + height, left : left + width]
        others = [y for y in coco["annotations"] if y["image_id"] == x["image_id"] and y is not x]
        covered = [mask_util.decode(y["segmentation"])[window].mean() for y in others]
        overlaps.append(max(covered, default=0.0))
    return np.mean(np.array(overlaps) >= 0.3)


def test_arguments_reach_the_generator(dataset, tmp_path):
    generate_shapes(str(tmp_path), num_train=4, num_val=2, image_size=64, seed=0)
    expected = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(expected) == 4 + 2 + 2
    assert sorted(p.relative_to(dataset) for p in dataset.rglob("*") if p.is_file()) == expected
    for path in expected:
        assert (dataset / path).read_bytes() == (tmp_path / path).read_bytes()


def test_table_counts_images_objects_and_overlaps(tmp_path, capsys):
    folder = tmp_path / "shapes"
    make_shapes.main(["--output-dir", str(folder), *SIZES])
    output = capsys.readouterr()
    rows = {}
    for line in output.out.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        rows[cells[0].removesuffix(" (unseen)")] = cells[1:]
    cocos = [load(folder, split) for split in ("train", "val")]
    assert rows["images"] == ["4", "2"]
    assert rows["objects"] == [str(len(coco["annotations"])) for coco in cocos]
    assert rows["with O >= 0.3"] == [f"{100 * share_overlapped(coco):.1f} %" for coco in cocos]
    for k, name in enumerate(SHAPES_CLASSES):
        ids = [[x["category_id"] for x in coco["annotations"]] for coco in cocos]
        assert rows[name] == [str(x.count(k + 1)) for x in ids]
    assert output.out.count("(unseen)") == len(SHAPES_CLASSES) / 2
    assert f"DETECTRON2_DATASETS={tmp_path}" in output.out
    assert "6/6" in output.err


def test_flat_has_the_same_images_and_objects_in_one_folder(dataset, tmp_path, capsys):
    assert make_shapes.main(["--output-dir", str(tmp_path), "--flat", *SIZES]) == 0
    assert "DETECTRON2_DATASETS" not in capsys.readouterr().out
    assert sorted(x.name for x in tmp_path.iterdir()) == ["images", "train.json", "val.json"]
    for split in ("train", "val"):
        flat, coco = json.loads((tmp_path / f"{split}.json").read_text()), load(dataset, split)
        for a, b in zip(flat["images"], coco["images"], strict=True):
            image = tmp_path / "images" / a.pop("file_name")
            assert image.read_bytes() == (dataset / split / b.pop("file_name")).read_bytes()
        assert flat == coco
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_other_folder_names_need_a_registration(tmp_path, capsys):
    make_shapes.main(["--output-dir", str(tmp_path / "mine"), *SIZES])
    assert "register_shapes(" in capsys.readouterr().out


def test_annotations_are_replaced_only_with_force(dataset, tmp_path, capsys):
    folder = tmp_path / "shapes"
    (folder / "annotations").mkdir(parents=True)
    precious = folder / "annotations/instances_val.json"
    precious.write_text("precious")
    arguments = ["--output-dir", str(folder), *SIZES, "--seed", "1"]
    with pytest.raises(SystemExit) as error:
        make_shapes.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "instances_val.json exists already" in message and "--force" in message
    assert precious.read_text() == "precious"
    assert not (folder / "train").exists()

    assert make_shapes.main([*arguments, "--force"]) == 0
    assert len(load(folder, "val")["images"]) == 2
    assert load(folder, "val") != load(dataset, "val")


def test_empty_split(tmp_path, capsys):
    folder = str(tmp_path / "shapes")
    assert make_shapes.main(["--output-dir", folder, *SIZES, "--num-val", "0"]) == 0
    assert re.search(r"images +4 +0\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image-size", "8"], "at least 32"),
        (["--num-train", "-1"], "must not be negative"),
        (["--output-dir", "file/shapes"], "file"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        make_shapes.main([*SIZES, *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.partition("error:")[2]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as error:
        make_shapes.main(["--help"])
    assert error.value.code == 0
    assert "examples:" in capsys.readouterr().out
