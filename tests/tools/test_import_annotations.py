"""From the annotations of other tools to training examples: which boxes, and which masks."""

import base64
import io
import json
import re
import shlex
import shutil
import struct
import subprocess
import zlib
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
        (
            "train: images/train\nnames: [a, b, a]",
            "data.yaml: the class names are not all different: 'a' is there 2 times",
        ),
        ("train: images/train\nnames: [a, yes]", "'names' has 'True' for class 1; allowed: a name"),
        ("train: images/train\nnames: [a, null]", "'names' has 'None' for class 1; allowed: a na"),
        ("train: images/train\nnames: [a, ' ']", "'names' has ' ' for class 1; allowed: a name"),
        ("train: images/train\nnc: 3\nnames: [a, b]", "'nc' is 3, but 'names' has 2 classes"),
        (f"train: images/{'a' * 300}\nnames: [a]", "(File name too long: |'train' names ).*aaa"),
        ("train: images/none\nnames: [a]", "'train' names .*none, which is no folder and no txt"),
        ("train: labels\nnames: [a]", "a folder without images"),
        ("path: nowhere\ntrain: images\nnames: [a]", "'path' is 'nowhere', but there is no such"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]", "the labels are keypoints"),
        ("train: list.txt\nnames: [a]", "none of the 1 images of 'train' has a txt"),
        ("- 1", "must have keys and values"),
        ("a: [", r"data.yaml: cannot be read as yaml: [^\n]*line 1, column 5[^\n]*\.\n$"),
        ("a: 2024-13-45", "data.yaml: cannot be read as yaml: month must be in"),
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
        (
            4,
            {"points": [[-64, -48], [-62, -47]]},
            r"of 3x2 pixels at \(-64, -48\) is empty, or not",
        ),
        (4, {"points": [[1e300, 30], [1e300, 31]]}, r"at \(1e\+300, 30\) is empty, or not"),
        (0, {"points": [[10**400, 2], [3, 4], [5, 6]]}, r"shape 0 \(hen\): 'points' is \[\[1000"),
        (1, {"label": None}, "shape 1: 'label' is 'None'; allowed: the name of a class"),
        (1, {"label": ""}, "shape 1: 'label' is ''; allowed: the name of a class"),
        (1, {"group_id": [1]}, r"shape 1 \(hen\): 'group_id' is \[1\]; allowed: a number, a text"),
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
    data["images"][0]["coco_url"] = "http://[1/train2017/1.jpg"
    path.write_text(json.dumps(data))
    assert run("lvis", path)[0] == 1
    assert "image 1: 'coco_url' is 'http://[1/train2017/1.jpg'" in capsys.readouterr().out


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
    printed = capsys.readouterr().out
    # Not that of the output, which does not exist: the ids are those of the input.
    assert f"error: {path}: annotation 1: 'bbox' is [1, 2]" in printed
    assert str(output) not in printed and "Not written: 1 kinds of errors" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["yolo", "none.yaml", "--output", "TMP/a.json"], "none.yaml: no such file"),
        (["voc", "none", "--output", "TMP/a.json"], "none: no such folder"),
        (["coco", "FIX/voc", "--output", "TMP/a.json"], "invalid choice: 'coco'"),
        (["voc", "FIX/voc", "--images", "none", "--output", "TMP/a.json"], "--images none: no suc"),
        (["voc", "FIX/voc", "--output", "TMP/none/a.json"], "a folder that exists"),
        (["voc", "FIX/voc", "--output", "TMP/there.json"], "exists; --force replaces it"),
        (["voc", "FIX/voc", "--images", "", "--output", "TMP/a.json"], "--images : no such folder"),
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


def turn(path, orientation):
    """Save the picture at `path` again, as it is stored, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        picture.copy().save(path, exif=exif)


def move_exif_behind_the_pixels(path):
    """Of a PNG: the chunk before IEND, where the standard allows it, too."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    chunk, rest = content[start:end], content[:start] + content[end:]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_yolo_fractions_are_of_the_image_as_exif_turns_it(orientation, run, examples, inputs):
    (inputs / "yolo/labels/train/street.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    turn(inputs / "yolo/images/train/street.png", orientation)
    code, output = run("yolo", inputs / "yolo/data.yaml")
    # The file is stored as 80x60. The mapper, which turns it, compares its size with the json.
    found = examples(output, inputs / "yolo/images/train")["street.png"]
    width, height = (60, 80) if orientation > 4 else (80, 60)
    assert code == 0 and found.image_size == (height, width)
    box = [width / 4, 0, 3 * width / 4, height / 2]
    assert rows(found, output) == [("person", box, False)]


def test_exif_behind_the_pixels_of_a_png_counts_too(run, examples, inputs, capsys):
    path = inputs / "yolo/images/train/street.png"
    turn(path, 6)
    move_exif_behind_the_pixels(path)
    code, output = run("yolo", inputs / "yolo/data.yaml")
    assert code == 0
    assert examples(output, path.parent)["street.png"].image_size == (80, 60)
    assert "note: 1 images are turned as their EXIF orientation says" in capsys.readouterr().out


def declare_in_labelme(inputs, width, height):
    fields = {"imageWidth": width, "imageHeight": height, "imagePath": "yard.png"}
    edit_labelme(inputs, lambda x: x.update(fields, shapes=x["shapes"][:1]))
    return ["labelme", inputs / "labelme"], inputs / "labelme/yard.png"


def declare_in_voc(inputs, width, height):
    path = inputs / "voc/Annotations/2008_000001.xml"
    size = f"<size><width>{width}</width><height>{height}</height></size>".replace("None", "")
    text, count = re.subn("<size>.*</size>", size, path.read_text(), flags=re.DOTALL)
    assert count == 1
    path.write_text(text)
    root = inputs / "voc/JPEGImages"
    return ["voc", path.parent, "--images", root], root / "2008_000001.png"


def declare_in_cvat(inputs, width, height):
    path = inputs / "cvat/annotations/instances_default.json"
    data = json.loads(path.read_text())
    data["images"][0].update(width=width, height=height)
    data["annotations"] = [x for x in data["annotations"] if x["segmentation"] == []]
    path.write_text(json.dumps(data))
    root = inputs / "cvat/images/default"
    return ["cvat", path, "--images", root], root / "frame_000000.png"


DECLARE = {
    declare_in_labelme: ((64, 48), "yard.json: the size in 'imageWidth' and 'imageHeight' is"),
    declare_in_voc: ((50, 40), "2008_000001.xml: the size in <size> is"),
    declare_in_cvat: (
        (20, 10),
        "instances_default.json: image 1: the size in 'width' and 'height' is",
    ),
}


@pytest.mark.parametrize("declare", DECLARE)
def test_a_size_that_is_not_that_of_the_image_is_an_error(declare, run, inputs, capsys):
    (width, height), message = DECLARE[declare]
    arguments, image = declare(inputs, 10 * width, 10 * height)
    code, output = run(*arguments)
    printed = capsys.readouterr().out
    assert code == 1 and not output.exists()
    found = f"{message} {10 * width} x {10 * height}, but its image {image} has {width} x {height}"
    assert found in printed and "import with the image that was labelled" in printed
    # One side alone.
    assert run(*declare(inputs, width, height + 1)[0])[0] == 1
    assert f"{message} {width} x {height + 1}, but" in capsys.readouterr().out
    assert run(*declare(inputs, "wide", height)[0])[0] == 1
    assert f"{message} wide x {height}; allowed: whole numbers" in capsys.readouterr().out
    assert run(*declare(inputs, width, height)[0])[0] == 0


@pytest.mark.parametrize("declare", [declare_in_labelme, declare_in_voc])
@pytest.mark.parametrize("unknown", [0, None])
def test_a_size_that_is_not_known_is_not_compared(declare, unknown, run, inputs):
    (width, _), _ = DECLARE[declare]
    assert run(*declare(inputs, unknown, unknown)[0])[0] == 0
    assert run(*declare(inputs, width, unknown)[0])[0] == 0
    assert run(*declare(inputs, width + 1, unknown)[0])[0] == 1


@pytest.mark.parametrize("declare", DECLARE)
def test_the_size_tells_whether_labels_are_of_the_turned_image(declare, run, inputs, capsys):
    (width, height), message = DECLARE[declare]
    arguments, image = declare(inputs, width, height)
    turn(image, 8)
    assert run(*arguments)[0] == 1
    printed = capsys.readouterr().out
    assert f"{message} {width} x {height}, but its image {image} has {height} x {width}" in printed
    assert "as its EXIF orientation 8 turns it" in printed and "exiftool -Orientation=" in printed
    code, output = run(*declare(inputs, height, width)[0])
    (entry,) = json.loads(output.read_text())["images"]
    assert code == 0 and (entry["width"], entry["height"]) == (height, width)
    assert "note: 1 images are turned as their EXIF orientation says" in capsys.readouterr().out


def test_points_are_cut_at_the_border_of_the_turned_image(run, inputs):
    points = [[1, 1], [40, 1], [40, 60]]  # inside 48x64, not inside 64x48
    arguments, image = declare_in_labelme(inputs, 48, 64)
    turn(image, 6)
    edit_labelme(inputs, lambda x: x.update(shapes=[{"label": "hen", "points": points}]))
    code, output = run(*arguments)
    (hen,) = json.loads(output.read_text())["annotations"]
    assert code == 0 and hen["segmentation"] == [[1, 1, 40, 1, 40, 60]]


def test_images_of_more_than_8_bits_are_refused(run, inputs, capsys):
    path = inputs / "yolo/images/train/street.png"
    Image.fromarray(np.full((60, 80), 4000, dtype=np.uint16)).save(path)
    assert run("yolo", inputs / "yolo/data.yaml")[0] == 1
    expected = f"data.yaml: its image {path} is in PIL's mode 'I"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["yolo", "data.yaml"],
        ["labelme", ".", "--classes", "classes.txt"],
        ["voc", "Annotations", "--images", "JPEGImages", "--classes", "classes.txt"],
        ["cvat", "annotations/instances_default.json"],
        ["lvis", "lvis_v1_train.json"],
    ],
)
def test_a_byte_order_mark_changes_nothing(arguments, run, inputs, monkeypatch):
    monkeypatch.chdir(inputs / arguments[0])
    Path("data.yaml").write_text("train: list.txt\nnames: [person, dog]\n")
    Path("list.txt").write_text("./images/train/street.png\nimages/train/empty.png\n")
    Path("classes.txt").write_text("horse\ndog\nhen\ncart\n")
    code, output = run(*arguments)
    expected = output.read_text()
    assert code == 0
    texts = [x for x in Path().rglob("*") if x.suffix in (".txt", ".yaml", ".json", ".xml")]
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run(*arguments)[0] == 0 and output.read_text() == expected


@pytest.mark.parametrize(
    "declared, written, name",
    [
        ("ISO-8859-1", "latin-1", "cät"),
        ("windows-1252", "cp1252", "cät €"),
        ("gb2312", "gb2312", "猫"),
        ("UTF-16", "utf-16", "猫"),
        ("utf-16", "utf-8", "猫"),  # as .NET may write it
        ("utf-8", "utf-8", "猫"),
        ("utf-8", "utf-8-sig", "猫"),
    ],
)
def test_xmls_are_read_in_the_encoding_that_they_declare(declared, written, name, run, inputs):
    path = inputs / "voc/Annotations/2008_000001.xml"
    text = path.read_text().replace("<name>dog</name>", f"<name>{name}</name>")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{text}'
    path.write_bytes(text.encode(written))
    code, output = run("voc", path.parent, "--images", inputs / "voc/JPEGImages")
    names = {x["name"] for x in json.loads(output.read_text())["categories"]}
    assert code == 0 and names == {name, "horse"}


@pytest.mark.parametrize(
    "declared, message",
    [("utf-8", "'utf-8' codec can't decode"), ("none-8", "unknown encoding: none-8")],
)
def test_an_xml_in_another_encoding_is_named_once(declared, message, run, inputs, capsys):
    path = inputs / "voc/Annotations/2008_000001.xml"
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + path.read_text()
    path.write_bytes(text.replace("<name>dog", "<name>cät").encode("latin-1"))
    assert run("voc", path.parent, "--images", inputs / "voc/JPEGImages")[0] == 1
    printed = capsys.readouterr().out
    assert f"error: {path}: no xml that can be read: {message}" in printed
    assert printed.count(str(path)) == 1 and ".." not in printed


@pytest.mark.parametrize("is_there", [True, False])
def test_a_labelme_shape_without_a_type_is_a_polygon(is_there, run, inputs):
    shape = {"label": "hen", "points": [[1, 1], [9, 1], [9, 5]]}
    shape |= {"shape_type": None} if is_there else {}
    edit_labelme(inputs, lambda x: x.update(shapes=[shape]))
    code, output = run("labelme", inputs / "labelme")
    (hen,) = json.loads(output.read_text())["annotations"]
    assert code == 0 and hen["segmentation"] == [[1, 1, 9, 1, 9, 5]]


def test_notes_say_why_no_object_is_left(run, inputs, capsys):
    edit_labelme(inputs, lambda x: x.update(shapes=x["shapes"][-1:]))  # the circle
    code, output = run("labelme", inputs / "labelme")
    assert code == 1 and not output.exists()
    assert capsys.readouterr().out == (
        "note: 1 shapes of the kind 'circle' were left out\n"
        f"error: {inputs / 'labelme'}: there is no object to import; allowed: at least one.\n"
    )


def test_a_mask_of_labelme_too_large_to_open_is_named(run, inputs, capsys):
    def chunk(kind, data):
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(picture))
    mask = base64.b64encode(picture).decode("ascii")
    edit_labelme(inputs, lambda x: x["shapes"][4].update(mask=mask))
    assert run("labelme", inputs / "labelme")[0] == 1
    assert "shape 4 (cart): 'mask' is no picture in base64: Image size" in capsys.readouterr().out


def test_yolo_labels_without_an_image_are_counted(run, inputs, capsys):
    labels, images = inputs / "yolo/labels/train", inputs / "yolo/images/train"
    (labels / "old").mkdir()
    (labels / "old/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (labels / "gone.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (labels / "classes.txt").write_text("person\ndog\n")
    assert run("yolo", inputs / "yolo/data.yaml")[0] == 0
    note = f"note: 2 txts with labels have no image and were left out, such as {labels}/gone.txt\n"
    assert note in capsys.readouterr().out
    # The image of another split is there, so its labels have one.
    shutil.copy(images / "street.png", images / "OTHER.PNG")
    (labels / "OTHER.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (inputs / "yolo/list.txt").write_text("images/train/street.png\n")
    (inputs / "yolo/data.yaml").write_text("train: list.txt\nnames: [person, dog]")
    code, output = run("yolo", inputs / "yolo/data.yaml")
    assert code == 0 and len(json.loads(output.read_text())["images"]) == 1
    assert note in capsys.readouterr().out


def test_yolo_takes_half_a_class_for_none_of_them(run, inputs, capsys):
    (inputs / "yolo/data.yaml").write_text("train: images/train\nnames: {-1: person, 1: dog}")
    (inputs / "yolo/labels/train/street.txt").write_text("0.5 0.5 0.5 0.5 0.5\n")
    assert run("yolo", inputs / "yolo/data.yaml")[0] == 1
    assert "line 1: the class is 0.5; allowed: -1, 1" in capsys.readouterr().out


def test_a_class_that_is_listed_twice_is_named(run, inputs, capsys):
    classes = inputs / "classes.txt"
    classes.write_text("hen\ncart\nhen\n")
    assert run("labelme", inputs / "labelme", "--classes", classes)[0] == 1
    expected = f"error: {classes}: the class names are not all different: 'hen' is there 2 times."
    assert expected in capsys.readouterr().out


INPUTS = {
    "yolo": "yolo/data.yaml",
    "labelme": "labelme",
    "voc": "voc/Annotations",
    "cvat": "cvat/annotations/instances_default.json",
    "lvis": "lvis/lvis_v1_train.json",
}


@pytest.mark.parametrize("format", INPUTS)
@pytest.mark.parametrize(
    "option, formats",
    [
        (["--split", "val"], ["yolo"]),
        (["--images", str(FIXTURES)], ["voc", "cvat", "lvis"]),
        (["--classes", "a.txt"], ["labelme", "voc"]),
        (["--zero-based"], ["voc"]),
        (["--keep-crowds"], ["cvat"]),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(format, option, formats, tmp_path, capsys):
    path, output = FIXTURES / INPUTS[format], tmp_path / "out.json"
    arguments = [format, str(path), "--output", str(output), *option]
    if format in formats:
        import_annotations.parse_args(arguments)
        return
    with pytest.raises(SystemExit) as exit_info:
        import_annotations.main(arguments)
    expected = f"{' '.join(option)}: not for {format}; it is for: {', '.join(formats)}."
    assert exit_info.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "two words", "it's", "$HOME `a` \\b!", 'say "a"', "é"])
def test_the_last_line_can_be_pasted(name, inputs, tmp_path, capsys):
    folder = tmp_path / name
    shutil.copytree(inputs / "labelme", folder)
    arguments = ["labelme", str(folder), "--output", str(folder / "out.json")]
    edit_labelme(inputs, lambda x: x.update(imagePath="yard.png"))
    shutil.copy(inputs / "labelme/yard.json", folder)
    assert import_annotations.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True)
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_list(shell.stdout.splitlines())
    assert shlex.split(line) == shell.stdout.splitlines()
    assert cfg.DATASETS.TRAIN == (str(folder / "out.json"),)
    assert cfg.DATASETS.TRAIN_IMAGE_ROOT == str(folder)
