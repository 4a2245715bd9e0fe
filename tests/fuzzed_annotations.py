"""
Annotation sets drawn by hypothesis, and what the mapper and the evaluator make of them.

A program: ``fuzzed_annotations.py fuzz_mapper`` raises what should not have been raised. The tests
run it in a process with a limit on its memory.
"""

import contextlib
import io
import json
import logging
import math
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from teacher_student_mask import (
    PartiallySupervisedCOCOEvaluator,
    TeacherStudentDatasetMapper,
    load_partial_coco_json,
)
from teacher_student_mask.coco_json import check_coco, classes_of

__all__ = ["fuzz_evaluator", "fuzz_mapper"]

# Beyond what the imports take. Without a limit, broken data once took 21 GB.
MEMORY = 2 * 2**30
HEIGHT, WIDTH = 12, 16
NAN, INF = math.nan, math.inf

ODD = st.sampled_from(
    [None, True, -1, 0, 1.5, 7.0, NAN, INF, -INF, 1e30, 1e308, 10**30, 10**400, "", "7", "a" * 99]
    + [[], {}, [[]], [[[]]], [None], [1], "\ud800", -(2**63), 2**64]
)


def often(usual):
    """The usual value, or now and then an odd one."""
    return st.integers(0, 24).flatmap(lambda k: ODD if k == 0 else usual)


COORDINATES = st.one_of(st.integers(-4, 20), st.floats(-4, 20), st.sampled_from([-1e5, 99_999]))
POLYGONS = st.lists(st.lists(often(COORDINATES), min_size=4, max_size=9), max_size=3)
TRIANGLES = st.just([[2, 2, 8, 2, 8, 6]])
COUNTS = st.one_of(
    st.text([chr(x) for x in range(46, 113)], max_size=6),
    st.lists(often(st.integers(0, 60)), max_size=6),
    st.integers(0, HEIGHT * WIDTH).map(lambda x: [x, HEIGHT * WIDTH - x]),
    st.integers(0, 99).map(lambda x: [50, x, 0, 0, HEIGHT * WIDTH - 50 - x]),
)
SIZES = often(st.just([HEIGHT, WIDTH]))
RLES = st.fixed_dictionaries({}, optional={"size": SIZES, "counts": COUNTS})
FULL_RLES = st.fixed_dictionaries({"size": SIZES, "counts": COUNTS})
MASKS = st.one_of(TRIANGLES, TRIANGLES, POLYGONS, FULL_RLES, RLES, st.none())
SIDES = st.one_of(st.integers(0, 12), st.floats(0, 12))
BOXES = st.tuples(COORDINATES, COORDINATES, SIDES, SIDES).map(list)
ROWS = st.fixed_dictionaries(
    {
        "image_id": often(st.sampled_from([1, 1, 1, 2])),
        "category_id": often(st.sampled_from([1, 2])),
        "bbox": often(BOXES),
        "area": often(st.floats(0, 200)),
    },
    optional={
        "segmentation": often(MASKS),
        "iscrowd": often(st.sampled_from([0, 0, 1])),
        "id": ODD,  # otherwise its number
    },
)
IMAGES = st.fixed_dictionaries(
    {
        "id": often(st.just(1)),
        "file_name": often(st.just("1.png")),
        "height": often(st.just(HEIGHT)),
        "width": often(st.just(WIDTH)),
    }
)


@st.composite
def annotation_sets(draw):
    """The content of a json, with at most a few things in it that are odd."""
    other = {"id": 2, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}
    rows = draw(st.lists(often(ROWS), max_size=4))
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict) and draw(st.integers(0, 24)):
            row["id"] = number
    names = [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}]
    data = {"images": [draw(IMAGES), other], "annotations": rows, "categories": names}
    if not draw(st.integers(0, 19)):
        key = draw(st.sampled_from(sorted(data)))
        data[key] = draw(ODD)
    if not draw(st.integers(0, 19)):
        part = draw(st.sampled_from(["id", "name"]))
        names[0][part] = draw(ODD)
    return data


def fuzz(check, max_examples):
    """Call ``check(json_file, data)`` on many sets; the same ones at every run."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(annotation_sets())
    def run(data):
        json_file.write_text(json.dumps(data))
        check(str(json_file), data)

    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "a.json"
        Image.new("RGB", (WIDTH, HEIGHT)).save(Path(folder) / "1.png")
        run()


def fuzz_mapper():
    """Both loaders, then the mapper with and without augmentation."""
    counts = {"mapped": 0, "refused": 0}
    crop = [T.RandomCrop("relative_range", (0.3, 0.3)), T.RandomFlip()]
    mappers = [
        TeacherStudentDatasetMapper(
            is_train=True,
            seen_classes=[0],
            augmentations=augmentations,
            image_format="BGR",
            use_instance_mask=True,
            instance_mask_format=mask_format,
            recompute_boxes=augmentations is crop,
        )
        for augmentations, mask_format in (
            ([], "polygon"),
            (crop, "polygon"),
            ([*crop, T.RandomRotation([-40, 40])], "polygon"),
            ([*crop, T.RandomRotation([-40, 40])], "bitmask"),
        )
    ]

    def check(json_file, data):
        folder = str(Path(json_file).parent)
        report = check_coco(json_file, image_root=folder, seen_classes="ant")
        try:
            examples = [
                mapper(image)
                for image in load_partial_coco_json(json_file, folder)
                for mapper in mappers
            ]
        except ValueError as error:
            counts["refused"] += 1
            assert str(error).startswith((json_file, folder)), error
            # What is refused was found before.
            assert report.errors, error
            return
        counts["mapped"] += 1
        for example in examples:
            check_example(example["instances"])

    fuzz(check, 200)
    assert min(counts.values()) > 30, counts


def check_example(instances):
    boxes, height_width = instances.gt_boxes.tensor, instances.image_size
    assert torch.isfinite(boxes).all() and instances.gt_boxes.nonempty().all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([*height_width[::-1]] * 2) + 1e-3).all()
    assert len(instances.gt_masks) == len(instances.gt_has_mask) == len(instances)
    # No mask of an unseen class, and none that covers nothing.
    assert not instances.gt_has_mask[instances.gt_classes == 1].any()
    masks = instances.gt_masks[instances.gt_has_mask]
    assert masks.nonempty().all()


def fuzz_evaluator():
    """With the classes of the file, as its loader would have set them."""
    counts = {"evaluated": 0, "refused": 0}
    name = "fuzzed_annotations"

    def check(json_file, data):
        register_coco_instances(name, {}, json_file, str(Path(json_file).parent))
        try:
            results = evaluate(name, data)
        except ValueError as error:
            counts["refused"] += 1
            assert str(error).startswith(json_file), error
            return
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        counts["evaluated"] += 1
        for task, numbers in results.items():
            for metric, value in numbers.items():
                is_percent = math.isnan(value) or 0 <= value <= 100
                assert metric == "num_gt" or is_percent, (task, metric, value)

    fuzz(check, 200)
    assert min(counts.values()) > 30, counts


def evaluate(name, data):
    evaluator = PartiallySupervisedCOCOEvaluator(
        name, seen_classes=[0], distributed=False, overlap_bin_edges=[0, 0.5, 1]
    )
    MetadataCatalog.get(name).set(**classes_of(data))
    evaluator.reset()
    for image in data["images"]:
        size = (int(image["height"]), int(image["width"]))
        if max(size) > 100:  # an image that is no problem, but takes long
            continue
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.tensor([[2.0, 2, 8, 6], [0, 0, 9, 9]]))
        instances.pred_classes = torch.tensor([0, 1])
        instances.scores = torch.tensor([0.9, 0.8])
        masks = torch.zeros(2, *size, dtype=torch.bool)
        masks[0, 2:6, 2:8] = masks[1, :9, :9] = True
        instances.pred_masks = masks
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    np.seterr(all="ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    {"fuzz_mapper": fuzz_mapper, "fuzz_evaluator": fuzz_evaluator}[sys.argv[1]]()
