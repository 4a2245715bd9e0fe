"""From the annotations of other tools to training examples: which boxes, and which masks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import import_annotations
from teacher_student_mask import TeacherStudentDatasetMapper, add_teacher_student_mask_config
from teacher_student_mask.data import register_json_datasets

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def inputs(tmp_path):
    """A copy of the fixtures that a test may change."""
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    return tmp_path / "fixtures"


@pytest.fixture
def run(tmp_path):
    """Return ``run(*arguments)``: the exit code and the path of the json."""

    def run_one(*arguments):
        output = tmp_path / "out.json"
        arguments = [*map(str, arguments), "--output", str(output), "--force"]
        return import_annotations.main(arguments), output

    return run_one


@pytest.fixture
def examples():
    """Return ``examples(json, image_root)``: {file name: what the training mapper makes of it}."""
    names = []

    def map_all(json_file, image_root):
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        cfg.DATASETS.TRAIN = (str(json_file),)
        cfg.DATASETS.TEST = ()
        cfg.DATASETS.TRAIN_IMAGE_ROOT = str(image_root)
        cfg.DATASETS.SEEN_CLASSES, cfg.MODEL.MASK_ON = "all", True
        register_json_datasets(cfg)
        names.append(str(json_file))
        mapper = TeacherStudentDatasetMapper(cfg, True, augmentations=[])
        images = DatasetCatalog.get(str(json_file))
        return {Path(x["file_name"]).name: mapper(x)["instances"] for x in images}

    yield map_all
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def rows(instances, json_file):
    """(class name, box, has a mask) of each object, in the order of the file."""
    names = MetadataCatalog.get(str(json_file)).thing_classes
    classes = [names[i] for i in instances.gt_classes]
    boxes = [[round(v, 3) for v in x] for x in instances.gt_boxes.tensor.tolist()]
    return list(zip(classes, boxes, instances.gt_has_mask.tolist()))


def test_yolo_keeps_boxes_and_outlines_apart(run, examples, capsys):
    code, output = run("yolo", FIXTURES / "yolo/data.yaml")
    assert code == 0
    found = examples(output, FIXTURES / "yolo/images/train")
    # By hand, of an image of 80x60: the center of the first box is (20, 30), its size 20x30.
    assert rows(found["street.png"], output) == [
        ("person", [10, 15, 30, 45], False),
        ("dog", [40, 30, 60, 45], True),
        ("dog", [60, 48, 80, 60], False),  # 84x60 in the txt: cut
    ]
    (polygon,) = found["street.png"].gt_masks.polygons[1]
    np.testing.assert_allclose(polygon, [40, 30, 60, 30, 56, 45, 40, 45])
    assert len(found["empty.png"]) == 0
    printed = capsys.readouterr().out
    assert "1 images have no txt" in printed and "1 boxes or outlines reached out" in printed
    coco = json.loads(output.read_text())
    assert coco["categories"] == [{"id": 0, "name": "person"}, {"id": 1, "name": "dog"}]
    assert "segmentation" not in coco["annotations"][0]
    assert coco["annotations"][0]["area"] == 600


@pytest.mark.parametrize(
    "yaml",
    [
        "train: images/train\nnames: [person, dog]",
        "train: [images/train]\nnames: {0: person, 1: dog}",
        "train: ../images/train\nnames: [person, dog]",
        "path: .\ntrain: list.txt\nnames: [person, dog]",
    ],
)
def test_yolo_names_and_splits_in_all_their_forms(yaml, run, inputs):
    (inputs / "yolo/data.yaml").write_text(yaml)
    (inputs / "yolo/list.txt").write_text("./images/train/street.png\nimages/train/empty.png\n")
    code, output = run("yolo", inputs / "yolo/data.yaml")
    coco = json.loads(output.read_text())
    assert code == 0 and len(coco["images"]) == 2 and len(coco["annotations"]) == 3


def test_yolo_coordinates_may_be_off_by_rounding_alone(run, inputs):
    labels = inputs / "yolo/labels/train/street.txt"
    labels.write_text("0 0.5 0.5 1.000001 1\n1 -0.000001 0 1.000001 0 1 1\n")
    code, output = run("yolo", inputs / "yolo/data.yaml")
    first, second = json.loads(output.read_text())["annotations"]
    assert code == 0 and first["bbox"] == second["bbox"] == [0, 0, 80, 60]
    assert second["segmentation"] == [[0, 0, 80, 0, 80, 60]]


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.5 0.5", "3 numbers behind the class; allowed: 4 of a box"),
        ("0 0.5 0.5 0.5 0.5 0.9", "5 numbers behind the class.*A confidence at the end"),
        ("2 0.5 0.5 0.5 0.5", "the class is 2; allowed: 0 to 1"),
        ("0.5 0.5 0.5 0.5 0.5", "the class is 0.5; allowed: 0 to 1"),
        ("-1 0.5 0.5 0.5 0.5", "the class is -1; allowed: 0 to 1"),
        ("0 0.5 0.5 0.5 1.2", r"has a coordinate outside \[0, 1\]"),
        ("0 40 30 20 30", r"has a coordinate outside \[0, 1\]"),
        ("0 0.5 0.5 nan 0.5", r"has a coordinate outside \[0, 1\]"),
        ("dog 0.5 0.5 0.5 0.5", "are not all numbers"),
    ],
)
def test_broken_lines_of_yolo_are_named(line, message, run, inputs, capsys):
    labels = inputs / "yolo/labels/train/street.txt"
    labels.write_text(f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    code, output = run("yolo", inputs / "yolo/data.yaml")
    assert code == 1 and not output.exists()
    assert re.search(rf"error: {labels}, line 3: .*{message}", capsys.readouterr().out)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("names: [a]", "there is no 'train'; it has: names"),
        ("train: images/train\nnames: a", "'names' is a; allowed: a list"),
        ("train: images/train\nnames: {a: 0}", "'names' is {'a': 0}"),
        ("train: images/train\nnames: [a, a]", r"\['a', 'a'\] are not all different"),
        ("train: images/none\nnames: [a]", "'train' names .*none, which is no folder and no txt"),
        ("train: labels\nnames: [a]", "a folder without images"),
        ("path: nowhere\ntrain: images\nnames: [a]", "'path' is 'nowhere', but there is no such"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]", "the labels are keypoints"),
        ("train: list.txt\nnames: [a]", "none of the 1 images of 'train' has a txt"),
        ("- 1", "must have keys and values"),
        ("a: [", "cannot be read as yaml"),
    ],
)
def test_a_broken_yaml_is_named(yaml, message, run, inputs, capsys):
    path = inputs / "yolo/data.yaml"
    path.write_text(yaml)
    (inputs / "yolo/list.txt").write_text("images/train/empty.png\n")
    assert run("yolo", path)[0] == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().out)


def test_images_that_are_missing_or_broken_are_named(run, inputs, capsys):
    (inputs / "yolo/list.txt").write_text("images/train/street.png\nimages/train/gone.png\n")
    (inputs / "yolo/data.yaml").write_text("train: list.txt\nnames: [person, dog]")
    assert run("yolo", inputs / "yolo/data.yaml")[0] == 1
    assert re.search("data.yaml: its image .*gone.png does not exist", capsys.readouterr().out)
    (inputs / "labelme/yard.png").write_text("no picture")
    assert run("labelme", inputs / "labelme")[0] == 1
    assert re.search("yard.json: its image .*yard.png cannot be read", capsys.readouterr().out)
    (inputs / "voc/JPEGImages/2008_000001.png").unlink()
    assert run("voc", inputs / "voc/Annotations", "--images", inputs / "voc/JPEGImages")[0] == 1
    assert "its image" in capsys.readouterr().out


def test_labelme_polygons_groups_masks_and_rectangles(run, examples, capsys):
    code, output = run("labelme", FIXTURES / "labelme")
    assert code == 0
    found = examples(output, FIXTURES / "labelme")["yard.png"]
    assert rows(found, output) == [
        ("hen", [4, 4, 20, 12], True),
        ("hen", [30, 4, 50, 20], True),  # two outlines of one group
        ("cart", [10, 20, 40, 40], False),  # drawn from the right upper corner
        ("cart", [50, 30, 53, 32], True),
    ]
    masks = found.gt_masks.tensor.numpy()
    expected = np.zeros((48, 64), dtype=bool)
    expected[30:32, 50:53] = [[1, 0, 1], [1, 1, 1]]
    np.testing.assert_array_equal(masks[3], expected)
    # Halves of 10x6 and 6x16, but for the pixels on their edges.
    assert abs(masks[1].sum() - (30 + 48)) <= 10
    assert "1 shapes of the kind 'circle' were left out" in capsys.readouterr().out


def edit_labelme(inputs, change):
    path = inputs / "labelme/yard.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "shape, fields, message",
    [
        (0, {"points": [[1, 2], [3, 4]]}, r"shape 0 \(hen\): 'points' .*at least 3 pairs"),
        (0, {"points": [[1, 2], [3, "x"], [4, 5]]}, "shape 0.*of finite numbers"),
        (3, {"points": [[1, 2]]}, r"shape 3 \(cart\): .*a rectangle has 2 or 4 pairs"),
        (3, {"group_id": 1, "label": "hen"}, "'group_id' 1 are polygon, polygon, rectangle"),
        (4, {"mask": "?"}, r"shape 4 \(cart\): 'mask' is no picture in base64"),
        (4, {"points": [[62, 30], [64, 31]]}, r"of 3x2 pixels at \(62, 30\) is empty, or not"),
        (1, {"label": None}, "shape 1: it must have a 'label'"),
    ],
)
def test_broken_shapes_of_labelme_are_named(shape, fields, message, run, inputs, capsys):
    edit_labelme(inputs, lambda x: x["shapes"][shape].update(fields))
    code, output = run("labelme", inputs / "labelme")
    assert code == 1 and not output.exists()
    assert re.search(f"error: .*yard.json, {message}|yard.json.*{message}", capsys.readouterr().out)


def test_classes_from_a_file_give_the_ids(run, inputs, capsys):
    classes = inputs / "classes.txt"
    classes.write_text("hen\nfence\ncart\n")
    code, output = run("labelme", inputs / "labelme", "--classes", classes)
    categories = json.loads(output.read_text())["categories"]
    assert code == 0
    assert categories == [{"id": i + 1, "name": x} for i, x in enumerate(["hen", "fence", "cart"])]
    classes.write_text("hen\n")
    assert run("labelme", inputs / "labelme", "--classes", classes)[0] == 1
    assert "the class is 'cart'; the classes are: hen." in capsys.readouterr().out


def test_voc_counts_pixels_from_one(run, examples, capsys):
    root = FIXTURES / "voc/JPEGImages"
    code, output = run("voc", FIXTURES / "voc/Annotations", "--images", root)
    assert code == 0
    # The first box is the whole image of 50x40; parts of objects are none.
    assert rows(examples(output, root)["2008_000001.png"], output) == [
        ("horse", [0, 0, 50, 40], False),
        ("dog", [10, 5, 30, 25], False),
    ]
    assert "1 objects are marked as difficult; they are kept" in capsys.readouterr().out
    run("voc", FIXTURES / "voc/Annotations", "--images", root, "--zero-based")
    boxes = [x["bbox"] for x in json.loads(output.read_text())["annotations"]]
    assert boxes == [[1, 1, 49, 39], [11, 6, 19, 19]]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<xmax>50</xmax>", "<xmax>0</xmax>", "object 0: xmin, .*'0', '40'"),
        ("<xmax>50</xmax>", "", "object 0: xmin, .*None"),
        ("<name>dog</name>", "", "<object> has no <name>"),
        ("<filename>2008_000001.png</filename>", "", "<annotation> has no <filename>"),
        ("</annotation>\n", "", "no xml|mismatched|no element"),
        (
            "<annotation>\n\t<folder>",
            '<!DOCTYPE a [<!ENTITY b "c">]><annotation>\n\t<folder>',
            "a DOCTYPE is not allowed",
        ),
    ],
)
def test_a_broken_xml_is_named(old, new, message, run, inputs, capsys):
    path = inputs / "voc/Annotations/2008_000001.xml"
    text = path.read_text()
    assert text.count(old) == 1 or old == "</annotation>\n"
    path.write_text(text[: -len(old)] if old == "</annotation>\n" else text.replace(old, new))
    code, _ = run("voc", inputs / "voc/Annotations", "--images", inputs / "voc/JPEGImages")
    assert code == 1
    assert re.search(f"error: .*2008_000001.xml.*{message}", capsys.readouterr().out)


def test_brush_masks_of_cvat_are_no_crowds(run, examples, capsys):
    path = FIXTURES / "cvat/annotations/instances_default.json"
    code, output = run("cvat", path, "--images", FIXTURES / "cvat/images/default")
    assert code == 0
    found = examples(output, FIXTURES / "cvat/images/default")["frame_000000.png"]
    assert rows(found, output) == [
        ("cell", [8, 1, 15, 5], True),
        ("cell", [3, 2, 6, 5], True),
        ("debris", [10, 6, 18, 9], False),
    ]
    expected = np.zeros((3, 10, 20), dtype=bool)
    expected[0, 1:5, 8:12] = expected[0, 1:3, 13:15] = True
    expected[1, 2:5, 3:6] = True
    expected[1, 4, 5] = False
    np.testing.assert_array_equal(found.gt_masks.tensor.numpy()[:2], expected[:2])
    assert "1 masks drawn with the brush are no longer marked" in capsys.readouterr().out
    run("cvat", path, "--keep-crowds")
    assert json.loads(output.read_text()) == json.loads(path.read_text())


def test_label_studio_needs_no_import(examples):
    path = FIXTURES / "label_studio/result.json"
    found = examples(path, "")["3f2a1b7c-shelf.png"]
    assert rows(found, path) == [
        ("box", [4, 6, 14, 18], False),
        ("bottle", [20, 6, 30, 24], True),
    ]


def test_lvis_gets_file_names(run, examples, inputs, capsys):
    path = inputs / "lvis/lvis_v1_train.json"
    code, output = run("lvis", path, "--images", inputs / "lvis")
    assert code == 0
    assert "1 images have got a 'file_name'" in capsys.readouterr().out
    found = examples(output, inputs / "lvis")["000000000001.jpg"]
    assert rows(found, output) == [("antenna", [4, 4, 12, 9], True)]
    data = json.loads(path.read_text())
    data["images"][0]["coco_url"] = "1.jpg"
    path.write_text(json.dumps(data))
    assert run("lvis", path)[0] == 1
    assert "image 1: 'coco_url' is '1.jpg'" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["cvat", "lvis"])
@pytest.mark.parametrize("content", ["{", "[]", '{"images": [1]}'])
def test_what_is_no_coco_json_is_named(format, content, run, tmp_path, capsys):
    path = tmp_path / "in.json"
    path.write_text(content)
    assert run(format, path)[0] == 1
    assert f"error: {path}: " in capsys.readouterr().out


def test_what_training_could_not_take_is_not_written(run, inputs, capsys):
    path = inputs / "cvat/annotations/instances_default.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["bbox"] = [1, 2]
    path.write_text(json.dumps(data))
    code, output = run("cvat", path)
    assert code == 1 and not output.exists()
    assert "Not written: 1 kinds of errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["yolo", "none.yaml", "--output", "TMP/a.json"], "none.yaml: no such file"),
        (["voc", "none", "--output", "TMP/a.json"], "none: no such folder"),
        (["coco", "FIX/voc", "--output", "TMP/a.json"], "invalid choice: 'coco'"),
        (["voc", "FIX/voc", "--images", "none", "--output", "TMP/a.json"], "--images none: no suc"),
        (["voc", "FIX/voc", "--output", "TMP/none/a.json"], "a folder that exists"),
        (["voc", "FIX/voc", "--output", "TMP/there.json"], "exists; --force replaces it"),
        (
            ["yolo", "FIX/yolo/data.yaml", "--classes", "a", "--output", "TMP/a.json"],
            "--classes: yolo has its classes in INPUT",
        ),
    ],
)
def test_usage_errors(arguments, message, tmp_path, capsys):
    (tmp_path / "there.json").write_text("mine")
    places = {"TMP": str(tmp_path), "FIX": str(FIXTURES)}
    arguments = [re.sub("TMP|FIX", lambda x: places[x[0]], a) for a in arguments]
    with pytest.raises(SystemExit) as exit_info:
        import_annotations.main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "mine"


def test_the_input_is_never_replaced(inputs, capsys):
    path = inputs / "lvis/lvis_v1_train.json"
    with pytest.raises(SystemExit):
        import_annotations.main(["lvis", str(path), "--output", str(path), "--force"])
    assert "the input itself" in capsys.readouterr().err


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit):
        import_annotations.main(["--help"])
    printed = capsys.readouterr().out
    for name in ("yolo", "labelme", "voc", "cvat"):
        assert re.search(rf"import_annotations\S* {name} |pytest\S* {name} |{name} \S+ ", printed)


def test_fixtures_have_images_of_the_sizes_they_say():
    path = FIXTURES / "cvat/annotations/instances_default.json"
    (image,) = json.loads(path.read_text())["images"]
    with Image.open(FIXTURES / "cvat/images/default" / image["file_name"]) as picture:
        assert picture.size == (image["width"], image["height"])
