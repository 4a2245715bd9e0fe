"""
The corpus of broken annotation files as test sets.

The evaluator gives what pycocotools gives, or stops with the sentence of the checks.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from bad_data import CASES, Case, annotation, complete, make, rle, without
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask import InputError, PartiallySupervisedCOCOEvaluator
from teacher_student_mask.coco_json import classes_of, load_ground_truth

# Errors in what is not read by an evaluation: image files, and the model; and what COCO's own
# evaluation leaves out.
NOT_READ = {
    "no annotations",
    "nothing but crowds",
    "image without a file name",
    "missing file",
    "cut JPEG",
    "empty file",
    "text as an image",
    "wrong size in the json",
    "16-bit image",
    "image of floating-point numbers",
    "EXIF orientation, json of the stored image",
    "classes unknown to the model",
    "unknown image",
}
LACKS = "mask AP needs a mask on every object"
# Words of errors that are not those of training.
OTHER_WORDS = {
    "seen class that the file lacks": "the dataset has no class 'shipp' (nearest: ship)",
    "all classes unseen": "DATASETS.SEEN_CLASSES is '', which names no class",
    "seen class without a mask": LACKS,
    "no seen class with a mask": LACKS,
    "polygon of 4 numbers": LACKS,
    "one point": LACKS,
    "annotation without id": "annotation number 10: 'id' is missing",
    "RLE of another size, of an unseen class": "annotation 108: 'segmentation' is",
}


def to_floats(data):
    for rows, fields in (
        ("images", ("id", "height", "width")),
        ("annotations", ("id", "image_id", "category_id", "iscrowd")),
        ("categories", ("id",)),
    ):
        for row in data[rows]:
            row.update({field: float(row[field]) for field in fields})


OF_EVALUATION = [
    Case("area NaN", annotation(111, area=float("nan")), "annotation 111: 'area' is nan; allowed"),
    Case("endless area", annotation(111, area=float("inf")), "annotation 111: 'area' is inf"),
    Case("negative area", annotation(111, area=-5), "annotation 111: 'area' is -5; allowed"),
    Case("area null", annotation(111, area=None), "annotation 111: 'area' is None; allowed"),
    Case("no area", without(111, "area"), "annotation 111: 'area' is missing; allowed"),
    Case("image id that is a list", annotation(111, image_id=[1]), "'image_id' is [1]; allowed"),
    Case("id that is a list", annotation(111, id=[1]), "annotation [1]: 'id' is [1]; allowed"),
    Case("text ids", lambda data: [x.update(id=f"x{x['id']}") for x in data["annotations"]]),
    Case("numbers as floats", to_floats),
    Case(
        "polygon of 4 numbers beside another",
        annotation(111, segmentation=[[4, 10, 40, 50], [4, 50, 16, 10, 40, 50]]),
    ),
    # pycocotools goes past its memory where such runs meet.
    Case("runs of length 0", annotation(111, segmentation=rle([700, 0, 0, 9, 0, 40, 4371]))),
]
ALL = CASES + OF_EVALUATION
corpus = pytest.mark.parametrize("case", [pytest.param(x, id=x.name) for x in ALL])


def expected_error(case):
    """Words of the error with which the evaluator stops, or None."""
    if case.name in OTHER_WORDS:
        return OTHER_WORDS[case.name]
    is_error = case.message is not None and case.severity == "error"
    return case.message if is_error and case.name not in NOT_READ else None


def index(data):
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def find_all(data):
    """{image id: Instances}: the objects of an unbroken file as predictions."""
    coco = index(data)
    classes = sorted(coco.cats)
    found = {}
    for image in data["images"]:
        size = (image["height"], image["width"])
        rows = [x for x in coco.imgToAnns[image["id"]] if not x["iscrowd"]]
        xywh = torch.tensor([x["bbox"] for x in rows]).reshape(-1, 4)
        masks = [coco.annToMask(x) for x in rows]
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        instances.pred_classes = torch.tensor([classes.index(x["category_id"]) for x in rows])
        instances.scores = torch.tensor([1 - x["id"] / 1000 for x in rows])
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, *size), dtype=torch.bool)
        found[image["id"]] = instances
    return found


def evaluate(name, seen_classes, predictions):
    evaluator = PartiallySupervisedCOCOEvaluator(
        name, seen_classes=seen_classes, distributed=False, use_fast_impl=False
    )
    # What a loader would have set.
    json_file = MetadataCatalog.get(name).json_file
    MetadataCatalog.get(name).set(**classes_of(json.loads(Path(json_file).read_text())))
    evaluator.reset()
    for image_id, instances in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def average_precision(json_file, predictions):
    """Of masks, by pycocotools; nan where nothing counts."""
    data = json.loads(Path(json_file).read_text())
    for number, row in enumerate(data["annotations"], start=1):
        row.update(id=number, iscrowd=int(row.get("iscrowd", 0)))
    # pycocotools takes only whole numbers for sizes, and four numbers for a box.
    for image in data["images"]:
        image.update(height=int(image["height"]), width=int(image["width"]))
    for row in data["annotations"]:
        if isinstance(row["segmentation"], list):
            row["segmentation"] = [x for x in row["segmentation"] if len(x) > 4]
    coco = index(data)
    results = []
    category_ids = sorted(coco.cats)
    for image_id, instances in predictions.items():
        for k in range(len(instances)):
            mask = np.asfortranarray(instances.pred_masks[k].numpy().astype(np.uint8))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[instances.pred_classes[k]],
                    "score": float(instances.scores[k]),
                    "segmentation": mask_util.encode(mask),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(coco, coco.loadRes(results), "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]
    precision = precision[precision > -1]
    return 100 * precision.mean() if precision.size else float("nan")


@corpus
def test_the_evaluator_gives_what_pycocotools_gives_or_a_sentence(case, make_tiny_coco):
    predictions = find_all(make_tiny_coco(complete).data)
    dataset = make(case, make_tiny_coco, is_complete=True)
    words = expected_error(case)
    if words is None:
        results = evaluate(dataset.name, case.seen_classes, predictions)
        expected = average_precision(dataset.json_file, predictions)
        assert results["segm"]["AP"] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        load_ground_truth(dataset.json_file)  # what the analysis reads
        return
    with pytest.raises(ValueError) as error:
        evaluate(dataset.name, case.seen_classes, predictions)
    message = str(error.value)
    assert words in message
    if "SEEN_CLASSES" not in words and "shipp" not in words:
        assert message.startswith(dataset.json_file)
        with pytest.raises(InputError, match=dataset.json_file):
            load_ground_truth(dataset.json_file)


def test_an_unbroken_file_is_found_completely(make_tiny_coco):
    dataset = make_tiny_coco(complete)
    results = evaluate(dataset.name, "ant, ship", find_all(dataset.data))
    assert results["segm"]["AP"] == pytest.approx(100) and results["segm"]["num_gt"] == 11


def test_boxes_alone_are_evaluated_without_a_look_at_the_masks(make_tiny_coco):
    dataset = make_tiny_coco(annotation(111, segmentation="mask.png"))
    with pytest.raises(ValueError, match="annotation 111: 'segmentation' is 'mask.png'"):
        PartiallySupervisedCOCOEvaluator(dataset.name, seen_classes="ant")
    PartiallySupervisedCOCOEvaluator(dataset.name, ("bbox",), seen_classes="ant")
