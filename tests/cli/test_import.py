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

from teacher_student_mask import TeacherStudentDatasetMapper, add_teacher_student_mask_config
from teacher_student_mask.cli.main import main
from teacher_student_mask.data import register_json_datasets
from teacher_student_mask.importers import import_cvat, import_labelme, import_voc, import_yolo

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def inputs(tmp_path):
    """A copy of the fixtures that a test may change."""
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    return tmp_path / "fixtures"


@pytest.fixture
def run(tmp_path, capsys):
    """Return ``run(*arguments)``: the exit status, the path of the json and what was printed."""

    def run_one(*arguments):
        output = tmp_path / "out.json"
        status = main(["import", *map(str, arguments), "--output", str(output), "--force"])
        return status, output, "".join(capsys.readouterr())

    return run_one


@pytest.fixture
def examples():
    """Return ``examples(json, image_root)``: {file name: what the training mapper makes of it}."""
    names = []

    def map_all(json_file, image_root):
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (str(json_file),), ()
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


def boxes_of(dataset):
    return [x["bbox"] for x in dataset.coco["annotations"]]


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def edit_labelme(inputs, change):
    path = inputs / "labelme/yard.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_yolo_keeps_boxes_and_outlines_apart(run, examples):
    status, output, printed = run("yolo", FIXTURES / "yolo/data.yaml")
    assert status == 0
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
    assert "1 images have no txt" in printed and "1 boxes or outlines reached out" in printed
    coco = json.loads(output.read_text())
    assert coco["categories"] == [{"id": 0, "name": "person"}, {"id": 1, "name": "dog"}]
    assert "segmentation" not in coco["annotations"][0] and coco["annotations"][0]["area"] == 600


@pytest.mark.parametrize(
    "yaml",
    [
        "train: images/train\nnames: [person, dog]",
        "train: [images/train]\nnames: {0: person, 1: dog}",
        "train: ../images/train\nnames: [person, dog]",
        "path: .\ntrain: list.txt\nnames: [person, dog]",
    ],
)
def test_yolo_names_and_splits_in_all_their_forms(yaml, inputs, monkeypatch):
    (inputs / "yolo/data.yaml").write_text(yaml)
    (inputs / "yolo/list.txt").write_text("./images/train/street.png\nimages/train/empty.png\n")
    # Off by rounding alone.
    labels = inputs / "yolo/labels/train/street.txt"
    labels.write_text("0 0.5 0.5 1.000001 1\n1 -0.000001 0 1.000001 0 1 1\n")
    monkeypatch.chdir(inputs / "yolo")
    dataset = import_yolo("data.yaml")
    assert len(dataset.coco["images"]) == 2 and boxes_of(dataset) == [[0, 0, 80, 60]] * 2
    assert dataset.coco["annotations"][1]["segmentation"] == [[0, 0, 80, 0, 80, 60]]


def test_yolo_labels_without_an_image_are_counted(inputs):
    labels, images = inputs / "yolo/labels/train", inputs / "yolo/images/train"
    for name in ("1.txt", "gone.txt", "OTHER.txt"):
        (labels / name).write_text("0 0.5 0.5 0.5 0.5\n")
    (labels / "classes.txt").write_text("person\ndog\n")
    shutil.copy(images / "street.png", images / "OTHER.PNG")
    dataset = import_yolo(inputs / "yolo/data.yaml")
    assert dataset.notes["txts with labels have no image and were left out"] == 2


def test_hidden_copies_are_skipped_and_links_are_followed_once(inputs):
    images = inputs / "yolo/images/train"
    (images / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "street.png", images / ".ipynb_checkpoints/street-checkpoint.png")
    (images / "._street.png").write_bytes(b"of macOS")
    (inputs / "elsewhere").mkdir()
    shutil.copy(images / "street.png", inputs / "elsewhere/far.png")
    (images / "linked").symlink_to(inputs / "elsewhere")
    (images / "cycle").symlink_to(images)
    dataset = import_yolo(inputs / "yolo/data.yaml")
    names = [x["file_name"] for x in dataset.coco["images"]]
    assert names == ["empty.png", "linked/far.png", "street.png"]


def test_labelme_polygons_groups_masks_and_rectangles(run, examples):
    status, output, printed = run("labelme", FIXTURES / "labelme")
    assert status == 0
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
    assert "1 shapes of the kind 'circle' were left out" in printed


def test_labelme_reserved_labels_are_no_classes(inputs):
    hen = {"label": "hen", "points": [[1, 1], [9, 1], [9, 5]]}  # without a type: a polygon
    shapes = [hen, {**hen, "label": "__ignore__"}, {**hen, "label": "_background_"}]
    edit_labelme(inputs, lambda x: x.update(shapes=shapes))
    for names in (None, ["__ignore__", "_background_", "hen"]):
        dataset = import_labelme(inputs / "labelme", names)
        assert dataset.coco["categories"] == [{"id": 1, "name": "hen"}]
        assert dataset.coco["annotations"][0]["segmentation"] == [[1, 1, 9, 1, 9, 5]]
        assert len(dataset.coco["annotations"]) == 1
        assert dataset.notes["shapes with the label '__ignore__' were left out"] == 1


def test_labels_that_differ_by_blanks_or_case_are_told(run, inputs):
    edit_labelme(inputs, lambda x: x["shapes"][0].update(label=" Hen"))
    (inputs / "labelme/train.json").write_text('{"images": [], "annotations": []}')  # not read
    status, _, printed = run("labelme", inputs / "labelme")
    assert status == 0 and re.search("warning: .*'name' is ' Hen'; .* blanks or case", printed)


def test_classes_from_a_file_give_the_ids(run, inputs):
    classes = inputs / "classes.txt"
    for text, message in (
        ("hen\n", "the class is 'cart'; allowed: hen."),
        ("hen\ncart\nhen\n", "category"),
    ):
        classes.write_text(text)
        status, _, printed = run("labelme", inputs / "labelme", "--classes", classes)
        assert status == 1 and message in printed
    classes.write_text("hen\nfence\n\ncart\n")
    status, output, _ = run("labelme", inputs / "labelme", "--classes", classes)
    categories = json.loads(output.read_text())["categories"]
    assert categories == [{"id": i + 1, "name": x} for i, x in enumerate(["hen", "fence", "cart"])]


def test_voc_counts_pixels_from_one(run, examples):
    root = FIXTURES / "voc/JPEGImages"
    status, output, _ = run("voc", FIXTURES / "voc/Annotations", "--images", root)
    assert status == 0
    # The first box is the whole image of 50x40; parts of objects are none.
    assert rows(examples(output, root)["2008_000001.png"], output) == [
        ("horse", [0, 0, 50, 40], False),
        ("dog", [10, 5, 30, 25], False),
    ]
    dataset = import_voc(FIXTURES / "voc/Annotations", root, zero_based=True)
    assert boxes_of(dataset) == [[1, 1, 49, 39], [11, 6, 19, 19]]


@pytest.mark.parametrize(
    "polygon",
    [
        "<x1>10</x1><y1>8</y1><x2>30</x2><y2>8.5</y2><x10>20</x10><y10>25</y10>",
        "<pt><x>10</x><y>8</y></pt><pt><x>30</x><y>8.5</y></pt><pt><x>20</x><y>25</y></pt>",
    ],
)
def test_outlines_in_a_voc_xml_are_masks(polygon, inputs):
    path = inputs / "voc/Annotations/2008_000001.xml"
    edit(path, "<name>dog</name>", f"<name>dog</name><polygon>{polygon}</polygon>")
    horse, dog = import_voc(path.parent, inputs / "voc/JPEGImages").coco["annotations"]
    assert dog["segmentation"] == [[10, 8, 30, 8.5, 20, 25]] and dog["bbox"] == [10, 8, 20, 17]
    assert "segmentation" not in horse


def test_brush_masks_of_cvat_are_no_crowds(run, examples):
    path = FIXTURES / "cvat/annotations/instances_default.json"
    status, output, printed = run("cvat", path, "--images", FIXTURES / "cvat/images/default")
    assert status == 0
    found = examples(output, FIXTURES / "cvat/images/default")["frame_000000.png"]
    assert rows(found, output) == [
        ("cell", [8, 1, 15, 5], True),
        ("cell", [3, 2, 6, 5], True),
        ("debris", [10, 6, 18, 9], False),
    ]
    expected = np.zeros((2, 10, 20), dtype=bool)
    expected[0, 1:5, 8:12] = expected[0, 1:3, 13:15] = True
    expected[1, 2:5, 3:6] = True
    expected[1, 4, 5] = False
    np.testing.assert_array_equal(found.gt_masks.tensor.numpy()[:2], expected)
    assert "1 masks drawn with the brush are no longer marked" in printed


def test_turned_boxes_of_cvat_become_the_boxes_around_them(run, inputs):
    path = inputs / "cvat/annotations/instances_default.json"
    data = json.loads(path.read_text())
    (box,) = [x for x in data["annotations"] if x["segmentation"] == []]
    box.update(bbox=[4, 4, 8, 2], attributes={"rotation": 90.0})  # about (8, 5), of 20x10
    data["annotations"][0]["attributes"] = []
    path.write_text(json.dumps(data))
    status, output, printed = run("cvat", path)
    assert status == 0 and "turned" in printed and "warning" not in printed
    assert json.loads(output.read_text())["annotations"][2]["bbox"] == [7, 1, 2, 8]
    box["attributes"]["rotation"] = 45  # half a diagonal: 5 / sqrt(2)
    path.write_text(json.dumps(data))
    half = 5 / 2**0.5
    expected = [8 - half, 5 - half, 2 * half, 2 * half]
    assert boxes_of(import_cvat(path))[2] == pytest.approx(expected, abs=1e-5)


CVAT_XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
  <label><name>cell</name></label><label><name>debris</name></label>
</labels></task></meta>
<image id="7" name="sub/a.png" width="20" height="10">
  <box label="debris" xtl="2" ytl="1" xbr="6" ybr="3" occluded="0"/>
  <box label="debris" xtl="4" ytl="4" xbr="12" ybr="6" rotation="90.0"/>
  <polygon label="cell" points="1.00,1.00;5.00,1.00;5.00,4.00" group_id="3"/>
  <polygon label="cell" points="8,1;12,1;12,4" group_id="3"/>
  <mask label="cell" rle="0, 3, 1, 2" left="14" top="6" width="3" height="2"/>
  <polyline label="cell" points="1,1;2,2"/>
</image>
<image id="8" name="b.png" width="20" height="10"/>
</annotations>"""


def test_cvat_for_images(run, tmp_path):
    path = tmp_path / "annotations.xml"
    path.write_text(CVAT_XML)
    status, output, printed = run("cvat", path)
    assert status == 0 and "1 shapes of the kind 'polyline' were left out" in printed
    coco = json.loads(output.read_text())
    assert [x["file_name"] for x in coco["images"]] == ["sub/a.png", "b.png"]
    assert coco["categories"] == [{"id": 1, "name": "cell"}, {"id": 2, "name": "debris"}]
    found = [(x["category_id"], x["bbox"], "segmentation" in x) for x in coco["annotations"]]
    assert found == [
        (2, [2, 1, 4, 2], False),
        (2, [7, 1, 2, 8], False),
        (1, [1, 1, 11, 3], True),
        (1, [14, 6, 3, 2], True),
    ]
    assert len(coco["annotations"][2]["segmentation"]) == 2  # an object behind another
    assert coco["annotations"][3]["area"] == 5


def test_label_studio_needs_no_import(examples):
    path = FIXTURES / "label_studio/result.json"
    assert rows(examples(path, "")["3f2a1b7c-shelf.png"], path) == [
        ("box", [4, 6, 14, 18], False),
        ("bottle", [20, 6, 30, 24], True),
    ]


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.5 0.5 0.9", "2 0.5 0.5 0.5 0.5", "0 0.5 0.5 0.5 1.2", "0 0.5 nan 0.5 0.5"]
)
def test_broken_lines_of_yolo_are_named(line, run, inputs):
    labels = inputs / "yolo/labels/train/street.txt"
    labels.write_text(f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    status, output, printed = run("yolo", inputs / "yolo/data.yaml")
    assert status == 1 and not output.exists()
    assert f"error: {labels}, line 3: it is {line!r}; allowed: a number of 'names'" in printed


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("train: images/train\nnames: [a, yes]", r"got `bool` - at `\$.names\[1\]`"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]", "the labels are keypoints"),
        ("train: list.txt\nnames: [a]", "none of the 1 images of 'train' has its txt"),
        ("train: far\nnames: [a]", r"'train' names \S*/far, which does not exist"),
        ("a: [", r"data.yaml: [^\n]*line 1, column 5[^\n]*\.\n$"),
    ],
)
def test_a_broken_yaml_is_named(yaml, message, run, inputs):
    path = inputs / "yolo/data.yaml"
    path.write_text(yaml)
    (inputs / "yolo/list.txt").write_text("images/train/empty.png\n")
    status, _, printed = run("yolo", path)
    assert status == 1 and re.search(f"error: .*{message}", printed)


@pytest.mark.parametrize(
    "tool, old, new, message",
    [
        ("voc", "<xmax>50</xmax>", "<xmax>0</xmax>", "object 0: <bndbox> is .*'0', '40'"),
        ("voc", "<width>", "<width>w", "the size is .*'w.*allowed: numbers of pixels"),
        ("voc", "<name>dog</name>", "", "object 1: the class is ''; allowed: horse"),
        ("voc", "<truncated>0", "<polygon>1 2</polygon><truncated>0", "object 1: the outline is"),
        ("cvat", '<image id="8"', '<track id="0"/><image id="8"', "tracks of a video; export the"),
        ("cvat", "0, 3, 1, 2", "0, 3, 1", "object 4: the mask is 14, 6, 3, 2, 0,  3,  1; allowed"),
        ("cvat", 'left="14"', 'left="18"', r"mask, 3x2 pixels at \(18, 6\) of 20x10, is empty or"),
    ],
)
def test_a_broken_xml_is_named(tool, old, new, message, run, inputs):
    path = inputs / "voc/Annotations/2008_000001.xml"
    arguments = [path.parent, "--images", inputs / "voc/JPEGImages"]
    if tool == "cvat":
        path = inputs / "annotations.xml"
        path.write_text(CVAT_XML)
        arguments = [path]
    edit(path, old, new)
    status, output, printed = run(tool, *arguments)
    assert status == 1 and not output.exists()
    assert re.search(f"error: {path}.*{message}", printed)


@pytest.mark.parametrize("orientation", [3, 6])
def test_yolo_fractions_are_of_the_image_as_exif_turns_it(orientation, run, examples, inputs):
    path = inputs / "yolo/images/train/street.png"
    (inputs / "yolo/labels/train/street.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        picture.copy().save(path, exif=exif)
    status, output, printed = run("yolo", inputs / "yolo/data.yaml")
    # The file is stored as 80x60. The mapper, which turns it, compares its size with the json.
    found = examples(output, path.parent)["street.png"]
    width, height = (60, 80) if orientation > 4 else (80, 60)
    assert status == 0 and found.image_size == (height, width)
    assert rows(found, output) == [("person", [width / 4, 0, 3 * width / 4, height / 2], False)]
    assert "warning: " in printed


def test_a_size_that_is_not_that_of_the_image_is_an_error(run, inputs):
    image = inputs / "labelme/yard.png"
    edit_labelme(inputs, lambda x: x["shapes"].pop())
    for width, height, message in (
        (640, 480, f"is 640, 480, but '{image}' has 64, 48"),
        (64, 48, None),
        (0, None, None),  # not known
    ):
        edit_labelme(inputs, lambda x: x.update(imageWidth=width, imageHeight=height))
        status, output, printed = run("labelme", inputs / "labelme")
        assert status == (1 if message else 0) and (not message or message in printed)
        assert output.exists() == (not message)
        output.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["yolo", "none.yaml", "--output", "TMP/a.json"], "none.yaml: cannot be read"),
        (["voc", "none", "--output", "TMP/a.json"], "none: there is no .xml in it"),
        (["voc", "FIX/voc", "--output", "TMP/there.json"], "exists; --force replaces it"),
        (["cvat", "TMP/there.json", "--output", "TMP/there.json", "--force"], "the input itself"),
    ],
)
def test_paths_that_cannot_be_right(arguments, message, tmp_path, capsys):
    (tmp_path / "there.json").write_text("mine")
    places = {"TMP": str(tmp_path), "FIX": str(FIXTURES)}
    arguments = [re.sub("TMP|FIX", lambda x: places[x[0]], a) for a in arguments]
    assert main(["import", *arguments]) == 1 and message in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "mine"
