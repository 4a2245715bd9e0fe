"""A corpus of broken annotation files and images: what is broken, and what must come of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import default_argument_parser
from PIL import Image

import teacher_student_mask
from teacher_student_mask import register_partial_coco

# Objects and masks that training gets of the images 2, 5, 7 and 30 of the unbroken file.
UNBROKEN = {2: (2, 0), 5: (0, 0), 7: (7, 3), 30: (2, 2)}


@dataclass
class Case:
    name: str
    change: Callable[[dict], None] = lambda data: None  # of the json, before it is written
    # The finding; {root} is filled in, # stands for a number. None: there is nothing to find.
    message: str | None = None
    severity: str = "error"
    damage: Callable[[Path, Path], None] = lambda root, json_file: None  # of the written files
    seen_classes: str = "ant, ship"
    num_classes: int = 3
    # What loader and mapper do: what they give where that differs from UNBROKEN, or words of a
    # ValueError.
    trains: dict | str = field(default_factory=dict)


def annotation(annotation_id, **fields):
    """Set fields of an annotation: of seen classes 111 (ant) and 112 (ship), both with polygon, of
    the image 30; 108 to 110 are of the unseen class cat."""

    def change(data):
        (row,) = [x for x in data["annotations"] if x["id"] == annotation_id]
        row.update(fields)

    return change


def entry(key, entry_id, **fields):
    """Set fields of an image or category; the value ... takes the field out."""

    def change(data):
        (row,) = [x for x in data[key] if x["id"] == entry_id]
        row.update(fields)
        for name in [name for name, value in row.items() if value is ...]:
            del row[name]

    return change


def without(annotation_id, field):
    def change(data):
        (row,) = [x for x in data["annotations"] if x["id"] == annotation_id]
        del row[field]

    return change


def image_of_30(save, file_name="seen.png", **fields):
    """The image 30 is written by ``save(image, path)`` instead; fields are of its entry."""

    def damage(root, _):
        image = Image.open(root / "seen.png").copy()
        save(image, root / file_name)

    change = entry("images", 30, file_name=file_name, **fields)
    return {"change": change, "damage": damage}


def save_cut(image, path):
    image.save(path, quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_turned(image, path):
    """The pixels lie on their side; EXIF orientation 6 says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.ROTATE_90).save(path, exif=exif)


def save_16_bits(image, path):
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def rewrite(function):
    return lambda root, json_file: json_file.write_bytes(function(json_file.read_bytes()))


def make_crowds(data):
    for row in data["annotations"]:
        row["iscrowd"] = 1


def forget_masks(*category_ids):
    def change(data):
        for row in data["annotations"]:
            if row["category_id"] in category_ids:
                row["segmentation"] = None

    return change


def export_boxes_as_masks(data):
    for row in data["annotations"]:
        if row["category_id"] == 90:
            x, y, w, h = row["bbox"]
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def repeat_objects(data):
    """2,000 small triangles more in the image 30, of 64 x 80 pixels."""
    for k in range(2000):
        x, y = 2.0 * (k % 32), 2.0 * (k // 32 % 40)
        triangle = [x, y + 2, x + 1, y, x + 2, y + 2]
        shape = {"bbox": [x, y, 2, 2], "area": 2.0, "segmentation": [triangle]}
        data["annotations"].append(data["annotations"][10] | shape | {"id": 1000 + k})


def repeat_image_entry(data):
    data["images"].append(dict(data["images"][2], id=31))


LAYOUT = (
    "allowed: a COCO json in UTF-8, a dict with the lists 'images', 'annotations', 'categories'."
)
BOX = "allowed: four finite numbers [x, y, width, height]."
DROPPED = "training leaves the object out; correct it, or take it out."
MASK = (
    "allowed: a list of polygons [[x, y, x, y, x, y, ...], ...], an RLE with 'size' and 'counts', "
    "or null for an object without a mask."
)
SHORT = (
    "polygons of fewer than 3 points, or with half a point, are left out, and an object without "
    "any other has a box only."
)
EMPTY = (
    "the mask covers nothing of its image, so training takes the object as one without a mask; "
    "correct it, or give null."
)
RUNS = "allowed: run lengths that add up to the pixels of the image, height x width."
READABLE = "allowed: an image that PIL reads to its end."
SIZE = (
    "allowed: the size of the file, after it was turned as its EXIF orientation says; correct the "
    "json, boxes and masks included."
)
PIXELS = "allowed: a whole number of pixels from 1 to 536870911."
RLE_OF_30 = {"size": [80, 64], "counts": [80 * 64]}

CASES = [
    # The file as a whole.
    Case(
        "cut json",
        message="'content' is unreadable (Unterminated string starting at: line 1 column # "
        f"(char #)); {LAYOUT}",
        damage=rewrite(lambda text: text[:50]),
        trains="",
    ),
    Case(
        "json in Latin-1",
        entry("categories", 3, name="Ameise é"),
        message="'content' is unreadable ('utf-8' codec can't decode byte 0xe9 in position #: "
        f"invalid continuation byte); {LAYOUT}",
        damage=rewrite(lambda text: text.replace(rb"\u00e9", b"\xe9")),
        trains="",
    ),
    Case(
        "list of annotations",
        message=f"'content' is a list; {LAYOUT}",
        damage=rewrite(lambda text: b"[]"),
        trains="{json}: a COCO json must have a list 'images'",
    ),
    Case(
        "no list of images",
        lambda data: data.pop("images"),
        "'images' is missing; allowed: a list of dicts.",
        trains="{json}: a COCO json must have a list 'images'",
    ),
    Case(
        "no annotations",
        lambda data: data["annotations"].clear(),
        "'annotations' is empty; allowed: at least one annotation.",
        trains=dict.fromkeys(UNBROKEN, (0, 0)),
    ),
    Case(
        "annotation that is a number",
        lambda data: data.update(annotations=[5]),
        "'annotations' is [5]; allowed: a list of dicts.",
        trains="",
    ),
    Case(
        "nothing but crowds",
        make_crowds,
        "'annotations' is nothing but crowds; allowed: at least one object with 'iscrowd' 0.",
        trains=dict.fromkeys(UNBROKEN, (0, 0)),
    ),
    # Entries of images.
    Case(
        "image id twice",
        entry("images", 5, id=30),
        "image 30: 'id' is 30; allowed: an id that no other has.",
        trains="",
    ),
    Case(
        "image without id",
        entry("images", 5, id=...),
        "image number 3: 'id' is missing; allowed: a whole number.",
        trains="",
    ),
    Case(
        "image id as text",
        entry("images", 5, id="5"),
        "image '5': 'id' is '5'; allowed: a whole number.",
        trains="",
    ),
    Case(
        "negative height",
        entry("images", 5, height=-64),
        f"image 5: 'height' is -64; {PIXELS}",
        trains="",
    ),
    Case(
        "width as text",
        entry("images", 5, width="64"),
        f"image 5: 'width' is '64'; {PIXELS}",
        trains="",
    ),
    Case(
        "image of 3.6 billion pixels",
        entry("images", 5, height=60000, width=60000),
        "image 5: 'height x width' is 60000 x 60000; allowed: fewer than 536870912 pixels.",
        trains="",
    ),
    Case(
        "image without a file name",
        entry("images", 5, file_name=...),
        "image 5: 'file_name' is missing; allowed: the name of the file, relative to the folder of "
        "the images.",
        trains="",
    ),
    Case(
        "missing file",
        entry("images", 5, file_name="gone.png"),
        "image 5: 'file_name' is 'gone.png'; allowed: a file in the folder of the images, "
        "'{root}'; get it or take the image out.",
        trains="",
    ),
    Case(
        "file of two images",
        repeat_image_entry,
        "image 31: 'file_name' is 'seen.png'; other images name the same file, which counts more "
        "than once in training.",
        "warning",
        trains={31: (0, 0)},
    ),
    Case(
        "name that is no UTF-8",
        **image_of_30(lambda image, path: image.save(path), os.fsdecode(b"gr\xfcn.png")),
    ),
    # The files.
    Case(
        "cut JPEG",
        **image_of_30(save_cut, "seen.jpg"),
        message="image 30: 'file_name' is '{root}/seen.jpg', which cannot be read (image file is "
        f"truncated (# bytes not processed)); {READABLE}",
        trains="",
    ),
    Case(
        "empty file",
        **image_of_30(lambda image, path: path.write_bytes(b""), "seen.jpg"),
        message="image 30: 'file_name' is '{root}/seen.jpg', which cannot be read (cannot identify "
        f"image file '{{root}}/seen.jpg'); {READABLE}",
        trains="",
    ),
    Case(
        "text as an image",
        **image_of_30(lambda image, path: path.write_text("<html>"), "seen.jpg"),
        message="image 30: 'file_name' is '{root}/seen.jpg', which cannot be read (cannot identify "
        f"image file '{{root}}/seen.jpg'); {READABLE}",
        trains="",
    ),
    Case(
        "wrong size in the json",
        entry("images", 5, width=65),
        "image 5: 'width, height' is 65, 64, but '{root}/empty.png' has 64, 64; " + SIZE,
        trains="empty.png",
    ),
    Case("grayscale image", **image_of_30(lambda image, path: image.convert("L").save(path))),
    Case("image with alpha", **image_of_30(lambda image, path: image.convert("RGBA").save(path))),
    Case("image with palette", **image_of_30(lambda image, path: image.convert("P").save(path))),
    Case(
        "CMYK image",
        **image_of_30(lambda image, path: image.convert("CMYK").save(path), "seen.jpg"),
        message="image 30: 'file_name' is '{root}/seen.jpg' in CMYK; training converts it to RGB "
        "without a colour profile; convert it yourself if the colours matter.",
        severity="warning",
    ),
    Case(
        "16-bit image",
        **image_of_30(save_16_bits),
        message="image 30: 'file_name' is '{root}/seen.png' in PIL's mode 'I;16'; allowed: 8 bits "
        "a channel, as training would cut all values above 255; convert the image.",
        trains="",
    ),
    Case(
        "image of floating-point numbers",
        **image_of_30(lambda image, path: image.convert("F").save(path), "seen.tif"),
        message="image 30: 'file_name' is '{root}/seen.tif' in PIL's mode 'F'; allowed: 8 bits "
        "a channel, as training would cut all values above 255; convert the image.",
        trains="",
    ),
    Case(
        "EXIF orientation, json of the turned image",
        **image_of_30(save_turned, "seen.jpg"),
        message="image 30: 'file_name' is '{root}/seen.jpg' with EXIF orientation 6; training "
        "turns the image as its EXIF orientation says, so boxes and masks must fit the turned "
        "image.",
        severity="warning",
    ),
    Case(
        "EXIF orientation, json of the stored image",
        **image_of_30(save_turned, "seen.jpg", width=80, height=64),
        message="image 30: 'width, height' is 80, 64, but '{root}/seen.jpg' has 64, 80, turned by "
        "EXIF orientation 6; " + SIZE,
        trains="seen.jpg",
    ),
    # Classes.
    Case(
        "category id twice",
        lambda data: data["categories"].append({"id": 3, "name": "bee"}),
        "category 3: 'id' is 3; allowed: an id no other has (2 in all: 3, 3).",
        num_classes=4,
        trains="",
    ),
    Case(
        "category name twice",
        entry("categories", 17, name="ant"),
        "category 3: 'name' is 'ant'; allowed: names that differ, as seen classes are given by "
        "name; rename or merge them (2 in all: 3, 17).",
        trains="",
    ),
    Case(
        "category without a name",
        entry("categories", 17, name=...),
        "category 17: 'name' is missing; allowed: the name of the class.",
        trains="",
    ),
    Case(
        "classes unknown to the model",
        message="'categories' is 3 classes; the model has 2; set MODEL.ROI_HEADS.NUM_CLASSES 3.",
        num_classes=2,
    ),
    Case(
        "category id 0",
        lambda data: (
            entry("categories", 17, id=0)(data),
            [x.update(category_id=0) for x in data["annotations"] if x["category_id"] == 17],
        ),
        # It is the first class now.
    ),
    Case("class name beyond ASCII", entry("categories", 17, name="Kätzchen 猫")),
    Case(
        "seen class that the file lacks",
        message="'seen_classes' is 'ant, shipp'; DATASETS.SEEN_CLASSES is 'ant, shipp', but the "
        "dataset has no class 'shipp' (nearest: ship). Its 3 classes: ant, cat, ship.",
        seen_classes="ant, shipp",
        trains="no class 'shipp'",
    ),
    Case(
        "all classes unseen",
        message="'seen_classes' is ''; DATASETS.SEEN_CLASSES is '', which names no class. Allowed: "
        "'voc', 'nonvoc', 'all', class names separated by commas, or a path to a text or json "
        "list.",
        seen_classes="",
        trains="names no class",
    ),
    Case(
        "seen class without a mask",
        forget_masks(90),
        "category 90: 'name' is 'ship', a class with 4 objects and no mask; a seen class without a "
        "mask is trained as an unseen one; take it out of the list.",
        "warning",
        trains={7: (7, 2), 30: (2, 1)},
    ),
    Case(
        "no seen class with a mask",
        forget_masks(3, 90),
        "'seen_classes' is classes without any mask; allowed: at least one class with masks, as "
        "nothing else teaches them.",
        trains={7: (7, 0), 30: (2, 0)},
    ),
    # Ids of annotations.
    Case(
        "unknown image",
        annotation(111, image_id=31),
        "annotation 111: 'image_id' is 31; allowed: an id of 'images'.",
        trains="",
    ),
    Case(
        "unknown category",
        annotation(111, category_id=4),
        "annotation 111: 'category_id' is 4; allowed: an id of 'categories'.",
        trains="{json}: annotation 111: 'category_id' is 4",
    ),
    Case(
        "annotation id twice",
        annotation(111, id=112),
        "annotation 112: 'id' is 112; allowed: an id that no other annotation has (2 in all: 112, "
        "112).",
        # Training knows no ids; PartiallySupervisedCOCOEvaluator refuses them.
    ),
    Case(
        "annotation without id",
        without(111, "id"),
        "annotation number 10: 'id' is missing; training does without, but evaluation needs it; "
        "number the annotations.",
        "warning",
    ),
    Case("annotation id 0", annotation(111, id=0)),
    # Boxes.
    Case(
        "box with NaN",
        annotation(111, bbox=[4, math.nan, 36, 40]),
        f"annotation 111: 'bbox' is [4, nan, 36, 40]; {BOX}",
        trains="",
    ),
    Case(
        "endless box",
        annotation(111, bbox=[4, 10, math.inf, 40]),
        f"annotation 111: 'bbox' is [4, 10, inf, 40]; {BOX}",
        trains="",
    ),
    Case(
        "box of three numbers",
        annotation(111, bbox=[4, 10, 36]),
        f"annotation 111: 'bbox' is [4, 10, 36]; {BOX}",
        trains="",
    ),
    Case(
        "box of texts",
        annotation(111, bbox=["4", "10", "36", "40"]),
        f"annotation 111: 'bbox' is ['4', '10', '36', '40']; {BOX}",
        trains="",
    ),
    Case(
        "negative size",
        annotation(111, bbox=[40, 50, -36, -40]),
        "annotation 111: 'bbox' is [40, 50, -36, -40]; allowed: [x, y, width, height] with width "
        "and height not negative.",
        trains="",
    ),
    Case(
        "box without area",
        annotation(111, bbox=[4, 10, 36, 0]),
        f"annotation 111: 'bbox' is [4, 10, 36, 0]; a box without area: {DROPPED}",
        "warning",
        trains={30: (1, 1)},
    ),
    Case(
        "box outside the image",
        annotation(111, bbox=[64, 10, 36, 40]),
        f"annotation 111: 'bbox' is [64, 10, 36, 40]; a box outside its image: {DROPPED}",
        "warning",
        trains={30: (1, 1)},
    ),
    Case(
        "box that reaches out",
        annotation(111, bbox=[-5, 10, 36, 40]),
        "annotation 111: 'bbox' is [-5, 10, 36, 40]; it reaches outside the image, and training "
        "cuts it there.",
        "warning",
    ),
    Case(
        "huge box",
        annotation(111, bbox=[4, 10, 1e30, 40]),
        "annotation 111: 'bbox' is [4, 10, 1e+30, 40]; allowed: pixels, at most 100000 outside the "
        "image.",
        trains="",
    ),
    Case(
        "crowd flag null",
        annotation(111, iscrowd=None),
        "annotation 111: 'iscrowd' is None; allowed: 0 or 1.",
        trains="",
    ),
    Case(
        "image with 2,000 objects",
        repeat_objects,
        "image 30: 'annotations' is a list of 2002 objects; training takes them all, but the "
        "memory for matching them grows with their number.",
        "warning",
        trains={30: (2002, 2002)},
    ),
    # Masks.
    Case(
        "polygon of 4 numbers",
        annotation(111, segmentation=[[4, 10, 40, 50]]),
        f"annotation 111: 'segmentation' is [[4, 10, 40, 50]]; {SHORT}",
        "warning",
        trains={30: (2, 1)},
    ),
    Case(
        "polygon with half a point",
        annotation(111, segmentation=[[4, 10, 40, 10, 40, 50, 4]]),
        f"annotation 111: 'segmentation' is [[4, 10, 40, 10, 40, 50, ...]]; {SHORT}",
        "warning",
        trains={30: (2, 1)},
    ),
    Case(
        "polygon with NaN",
        annotation(111, segmentation=[[4, 10, 40, math.nan, 40, 50]]),
        "annotation 111: 'segmentation' is [[4, 10, 40, nan, 40, 50]]; allowed: polygons of finite "
        "numbers.",
        trains="",
    ),
    Case(
        "polygon of texts",
        annotation(111, segmentation=[["4", "10", "40", "10", "40", "50"]]),
        "annotation 111: 'segmentation' is [['4', '10', '40', '10', '40', '50']]; allowed: "
        "polygons of finite numbers.",
        trains="",
    ),
    Case(
        "huge polygon",
        annotation(111, segmentation=[[4, 10, 1e6, 10, 40, 50]]),
        "annotation 111: 'segmentation' is [[4, 10, 1000000.0, 10, 40, 50]]; allowed: polygons in "
        "pixels, at most 100000 outside the image.",
        trains="",
    ),
    Case(
        "polygon outside the image",
        annotation(111, segmentation=[[70, 10, 90, 10, 90, 50]]),
        f"annotation 111: 'segmentation' is [[70, 10, 90, 10, 90, 50]]; {EMPTY}",
        "warning",
        trains={30: (2, 1)},
    ),
    Case(
        "polygon without area",
        annotation(111, segmentation=[[4, 10, 4, 10, 4, 10]]),
        f"annotation 111: 'segmentation' is [[4, 10, 4, 10, 4, 10]]; {EMPTY}",
        "warning",
        trains={30: (2, 1)},
    ),
    Case(
        "polygon that is no list of lists",
        annotation(111, segmentation=[4, 10, 40, 10, 40, 50]),
        f"annotation 111: 'segmentation' is [4, 10, 40, 10, 40, 50]; {MASK}",
        trains="{json}: annotation 111: 'segmentation' must be a list of polygons",
    ),
    Case(
        "mask that is a text",
        annotation(111, segmentation="mask.png"),
        f"annotation 111: 'segmentation' is 'mask.png'; {MASK}",
        trains="seen.png (image id 30): 'segmentation' must be a list of polygons",
    ),
    Case(
        "RLE of another size",
        annotation(111, segmentation={"size": [64, 80], "counts": [5120]}),
        "annotation 111: 'segmentation' is an RLE of size [64, 80], but the image has [80, 64]; "
        "allowed: an RLE of the [height, width] of the image in 'images'.",
        trains="seen.png (image id 30): an RLE has size [64, 80], but the image is [80, 64]",
    ),
    Case(
        "RLE of another size, of an unseen class",
        annotation(108, segmentation={"size": [64, 80], "counts": [5120]}),
        "annotation 108: 'segmentation' is an RLE of size [64, 80], but the image has [64, 64]; "
        "allowed: an RLE of the [height, width] of the image in 'images'; training does not read "
        "this mask, of a crowd or an unseen class.",
        "warning",
    ),
    Case(
        "RLE of too few pixels",
        annotation(111, segmentation={"size": [80, 64], "counts": [5000, 100]}),
        "annotation 111: 'segmentation' is {'counts': [5000, 100], 'size': [80, 64]}; " + RUNS,
        trains="",
    ),
    Case(
        "RLE with a negative run",
        annotation(111, segmentation={"size": [80, 64], "counts": [5000, -10, 130]}),
        "annotation 111: 'segmentation' is {'counts': [5000, -10, 130], 'size': [80, 64]}; " + RUNS,
        trains="",
    ),
    Case(
        "RLE that ends in the middle of a number",
        annotation(111, segmentation={"size": [80, 64], "counts": "d"}),
        "annotation 111: 'segmentation' is {'counts': 'd', 'size': [80, 64]}; " + RUNS,
        trains="",
    ),
    Case(
        "RLE without runs",
        annotation(111, segmentation={"size": [80, 64]}),
        "annotation 111: 'segmentation' is {'size': [80, 64]}; " + RUNS,
        trains="seen.png (image id 30): 'segmentation' must be",
    ),
    Case(
        "RLE without a pixel",
        annotation(111, segmentation=RLE_OF_30),
        "annotation 111: 'segmentation' is {'counts': [5120], 'size': [80, 64]}; " + EMPTY,
        "warning",
        trains={30: (2, 1)},
    ),
    Case(
        "boxes exported as masks",
        export_boxes_as_masks,
        "category 90: 'name' is 'ship', a class with 4 masks, 4 of them the box itself; rectangles "
        "teach nothing about shapes; give null where only the box is known.",
        "warning",
        trains={7: (7, 5)},
    ),
]


def complete(data):
    """Give every object a mask."""
    for row in data["annotations"]:
        if not row.get("segmentation"):
            x, y, w, h = row["bbox"]
            row["segmentation"] = [[x, y + h, x + w / 2, y, x + w, y + h]]


def make(case, make_tiny_coco, is_complete=False):
    """Write and register the dataset of a case, with its images; is_complete: see complete()."""

    def change(data):
        if is_complete:
            complete(data)
        case.change(data)

    dataset = make_tiny_coco(change)
    case.damage(Path(dataset.image_root), Path(dataset.json_file))
    return dataset


def start_in_two_processes(dataset, command_line, folder):
    """Start train_net.py twice, as one training; files "0" and "1" have what ValueError said."""
    url = f"file://{folder}/meeting_point"
    torch.multiprocessing.spawn(
        _start,
        args=(dataset.name, dataset.json_file, dataset.image_root, command_line, folder, url),
        nprocs=2,
    )


def _start(rank, name, json_file, image_root, command_line, folder, url):
    import train_net

    timeout = timedelta(seconds=120)
    torch.distributed.init_process_group(
        "gloo", init_method=url, timeout=timeout, world_size=2, rank=rank
    )
    register_partial_coco(name, json_file, image_root)
    try:
        train_net.main(default_argument_parser().parse_args(command_line))
    except ValueError as error:
        Path(folder, str(rank)).write_text(str(error))
    torch.distributed.barrier()


def run_with_little_memory(name):
    """A function of fuzzed_annotations.py in a process with a limit on its memory."""
    program = Path(__file__).with_name("fuzzed_annotations.py")
    path = os.pathsep.join([str(Path(teacher_student_mask.__file__).parents[1]), *sys.path])
    result = subprocess.run(
        [sys.executable, str(program), name],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-6000:]
