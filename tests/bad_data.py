"""A corpus of broken annotation files and images: what is broken, and what must come of it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
    # How the finding begins; {root} is filled in. None: there is nothing to find.
    message: str | None = None
    severity: str = "error"
    # What loader and mapper do: what they give where that differs from UNBROKEN, or words of an
    # InputError; by default, they stop at errors.
    trains: dict | str | None = None
    damage: Callable[[Path, Path], None] = lambda root, json_file: None  # of the written files
    seen_classes: str = "ant, ship"
    num_classes: int = 3

    def __post_init__(self):
        if self.trains is None:
            self.trains = "" if self.message and self.severity == "error" else {}


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


def save_as(mode):
    return lambda image, path: image.convert(mode).save(path)


def rewrite(function):
    return lambda root, json_file: json_file.write_bytes(function(json_file.read_bytes()))


def clear_annotations(data):
    data["annotations"].clear()


def replace_annotations(data):
    data["annotations"] = [5]


def add_category(data):
    data["categories"].append({"id": 3, "name": "bee"})


def use_category_0(data):
    entry("categories", 17, id=0)(data)
    for row in data["annotations"]:
        row["category_id"] = row["category_id"] if row["category_id"] != 17 else 0


def make_crowds(data):
    for row in data["annotations"]:
        row["iscrowd"] = 1


def forget_masks(*category_ids):
    def change(data):
        for row in data["annotations"]:
            if row["category_id"] in category_ids:
                row["segmentation"] = None

    return change


def export_boxes(data):
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


def repeat_image(data):
    data["images"].append(dict(data["images"][2], id=31))


def of(field, *rows):
    """Cases of a field of annotation 111: name, value, then severity (default "error"), trains."""
    cases = []
    for name, value, *rest in rows:
        change, words = annotation(111, **{field: value}), f"annotation 111: {field!r} is"
        trains = dict(zip(["severity", "trains"], rest))
        cases.append(Case(name, change, words, **trains))
    return cases


def of_image(name, save, words=None, severity="error", file_name="seen.png", **fields):
    """A case whose image 30 is written by ``save(image, path)``; fields are of its entry."""

    def damage(root, _):
        save(Image.open(root / "seen.png").copy(), root / file_name)

    change = entry("images", 30, file_name=file_name, **fields)
    return Case(name, change, words and f"image 30: {words}", severity, damage=damage)


def rle(counts, size=(80, 64)):
    return {"size": list(size), "counts": counts}


UNREADABLE = "'file_name' is '{root}/seen.jpg', which cannot be read"
FILE = "'file_name' is '{root}/seen."
# One object fewer, and one mask fewer.
NO_OBJECT, NO_MASK = ("warning", {30: (1, 1)}), ("warning", {30: (2, 1)})
NOTHING = dict.fromkeys(UNBROKEN, (0, 0))
SQUARE = [4, 10, 40, 10, 40, 50]

CASES = [
    # The file as a whole.
    Case("cut json", message="'content' is unreadable", damage=rewrite(lambda text: text[:50])),
    Case(
        "json in Latin-1",
        entry("categories", 3, name="Ameise é"),
        "'content' is unreadable",
        damage=rewrite(lambda text: text.replace(rb"\u00e9", b"\xe9")),
    ),
    Case("list of annotations", message="'content' is a list", damage=rewrite(lambda text: b"[]")),
    Case("no list of images", lambda data: data.pop("images"), "'images' is missing"),
    Case("no annotations", clear_annotations, "'annotations' is empty", trains=NOTHING),
    Case("annotation that is a number", replace_annotations, "'annotations' is [5]"),
    Case("nothing but crowds", make_crowds, "'annotations' is nothing but crowds", trains=NOTHING),
    # Entries of images.
    Case("image id twice", entry("images", 5, id=30), "image 30: 'id' is 30"),
    Case("image without id", entry("images", 5, id=...), "image number 3: 'id' is missing"),
    Case("image id as text", entry("images", 5, id="5"), "image '5': 'id' is '5'"),
    Case("negative height", entry("images", 5, height=-64), "image 5: 'height' is -64"),
    Case("width as text", entry("images", 5, width="64"), "image 5: 'width' is '64'"),
    Case(
        "image of 3.6 billion pixels",
        entry("images", 5, height=60000, width=60000),
        "image 5: 'height x width' is 60000 x 60000",
    ),
    Case("image without a file name", entry("images", 5, file_name=...), "image 5: 'file_name' is"),
    Case("missing file", entry("images", 5, file_name="gone.png"), "image 5: 'file_name' is 'gone"),
    Case("file of two images", repeat_image, "image 30: 'file_name' is", "warning", {31: (0, 0)}),
    # The files.
    of_image("cut JPEG", save_cut, UNREADABLE, file_name="seen.jpg"),
    of_image("empty file", lambda _, path: path.touch(), UNREADABLE, file_name="seen.jpg"),
    of_image(
        "text as an image", lambda _, path: path.write_text("<a>"), UNREADABLE, file_name="seen.jpg"
    ),
    Case("wrong size in the json", entry("images", 5, width=65), "image 5: 'width, height' is 65"),
    of_image("grayscale image", lambda image, path: image.convert("L").save(path)),
    of_image("image with alpha", lambda image, path: image.convert("RGBA").save(path)),
    of_image("image with palette", lambda image, path: image.convert("P").save(path)),
    of_image("CMYK image", save_as("CMYK"), FILE + "jpg' in CMYK", "warning", "seen.jpg"),
    of_image("16-bit image", save_16_bits, FILE + "png' in PIL's mode 'I;16'"),
    of_image(
        "image of floating-point numbers", save_as("F"), FILE + "tif' in PIL", "error", "seen.tif"
    ),
    of_image(
        "EXIF orientation, json of the turned image",
        save_turned,
        FILE + "jpg' with EXIF orientation 6",
        "warning",
        "seen.jpg",
    ),
    of_image(
        "EXIF orientation, json of the stored image",
        save_turned,
        "'width, height' is 80, 64, but '{root}/seen.jpg' has 64, 80, turned by EXIF",
        file_name="seen.jpg",
        width=80,
        height=64,
    ),
    # Classes.
    Case("category id twice", add_category, "category 3: 'id' is 3", num_classes=4),
    Case("category name twice", entry("categories", 17, name="ant"), "category 3: 'name' is 'ant'"),
    Case("category without a name", entry("categories", 17, name=...), "category 17: 'name' is"),
    Case("classes unknown to the model", message="'categories' is 3", num_classes=2, trains={}),
    Case("category id 0", use_category_0),
    Case("class name beyond ASCII", entry("categories", 17, name="Kätzchen 猫")),
    Case(
        "seen class that the file lacks",
        message="'seen_classes' is 'ant, shipp'; DATASETS.SEEN_CLASSES is 'ant, shipp', but the "
        "dataset has no class 'shipp' (nearest: ship)",
        seen_classes="ant, shipp",
        trains="no class 'shipp'",
    ),
    Case(
        "all classes unseen",
        message="'seen_classes' is ''",
        seen_classes="",
        trains="names no class",
    ),
    Case(
        "seen class without a mask",
        forget_masks(90),
        "category 90: 'name' is 'ship', a class with 4 objects and no",
        "warning",
        {7: (7, 2), 30: (2, 1)},
    ),
    Case(
        "no seen class with a mask",
        forget_masks(3, 90),
        "'seen_classes' is classes without any mask",
        trains={7: (7, 0), 30: (2, 0)},
    ),
    Case("boxes exported as masks", export_boxes, "category 90: 'name'", "warning", {7: (7, 5)}),
    # Annotations. Training knows no ids.
    Case("annotation id twice", annotation(111, id=112), "annotation 112: 'id'", trains={}),
    Case("annotation without id", without(111, "id"), "annotation number 10: 'id'", "warning"),
    Case("annotation id 0", annotation(111, id=0)),
    Case(
        "image with 2,000 objects", repeat_objects, "image 30: 'anno", "warning", {30: (2002,) * 2}
    ),
    *of("image_id", ("unknown image", 31)),
    *of("category_id", ("unknown category", 4)),
    *of("iscrowd", ("crowd flag null", None)),
    *of("mask_source", ("another source of a mask", "sam"), ("source that is a list", ["model"])),
    *of(
        "bbox",
        ("box with NaN", [4, math.nan, 36, 40]),
        ("endless box", [4, 10, math.inf, 40]),
        ("box of three numbers", [4, 10, 36]),
        ("box of texts", ["4", "10", "36", "40"]),
        ("negative size", [40, 50, -36, -40]),
        ("huge box", [4, 10, 1e30, 40]),
        ("box without area", [4, 10, 36, 0], *NO_OBJECT),
        ("box outside the image", [64, 10, 36, 40], *NO_OBJECT),
        ("box that reaches out", [-5, 10, 36, 40], "warning"),
    ),
    *of(
        "segmentation",
        ("polygon of 4 numbers", [[4, 10, 40, 50]], *NO_MASK),
        ("polygon of 4 numbers beside another", [SQUARE, [4, 10, 40, 50]], "warning"),
        ("polygon with half a point", [[*SQUARE, 4]]),
        ("half a point beside a polygon", [[*SQUARE, 4], SQUARE]),
        ("point pairs", [[4, 10], [40, 10], [40, 50]]),
        ("point pairs in one list", [[[4, 10], [40, 10], [40, 50]]]),
        ("edges as polygons", [[4, 10, 40, 10], [40, 10, 40, 50]]),
        ("points as dicts", [{"x": 4, "y": 10}, {"x": 40, "y": 10}, {"x": 40, "y": 50}]),
        ("one point", [[4, 10]], *NO_MASK),
        ("crossing edges", [[4, 10, 40, 50, 40, 10, 4, 50]], "warning"),
        ("crossing edges, parts of other sizes", [[4, 10, 28, 50, 28, 10, 4, 38]], "warning"),
        ("polygon with NaN", [[4, 10, 40, math.nan, 40, 50]]),
        ("polygon of texts", [["4", "10", "40", "10", "40", "50"]]),
        ("huge polygon", [[4, 10, 1e6, 10, 40, 50]]),
        ("polygon outside the image", [[70, 10, 90, 10, 90, 50]], *NO_MASK),
        ("polygon without area", [[4, 10, 4, 10, 4, 10]], *NO_MASK),
        ("polygon that is no list of lists", SQUARE),
        ("mask that is a text", "mask.png"),
        ("RLE of another size", rle([5120], (64, 80))),
        ("RLE of too few pixels", rle([5000, 100])),
        ("RLE with a negative run", rle([5000, -10, 130])),
        ("RLE that ends in the middle of a number", rle("d")),
        ("RLE without runs", {"size": [80, 64]}),
        ("RLE without a pixel", rle([80 * 64]), *NO_MASK),
    ),
    Case("keypoints in groups", annotation(111, keypoints=[[20, 20, 2], [30, 30, 1]])),
    Case("keypoints as a text", annotation(111, keypoints="20 20 2", num_keypoints=None)),
    Case("keypoints as dicts", annotation(111, keypoints=[{"x": 20}, None], num_keypoints="2")),
    Case(
        "point pairs of an unseen class",
        annotation(108, segmentation=[[4, 10], [40, 10], [40, 50]]),
        "annotation 108: 'segmentation' is",
        trains={},
    ),
    Case(
        "RLE of another size, of an unseen class",
        annotation(108, segmentation=rle([5120], (64, 80))),
        "annotation 108: 'segmentation' is",
        "warning",
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
    # Threads of gloo that outlive the interpreter abort its process.
    torch.distributed.destroy_process_group()


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
