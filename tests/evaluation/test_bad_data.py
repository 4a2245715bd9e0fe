"""
The corpus of broken annotation files as test sets.

The evaluator gives what pycocotools gives, or stops with the sentence of the checks; the analysis,
which reads ground truths itself, refuses the same files.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from bad_data import CASES, Case, annotation, complete, make, without
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask import PartiallySupervisedCOCOEvaluator
from teacher_student_mask.analysis.ground_truth import load_ground_truth
from teacher_student_mask.analysis.input_checks import InputError
from teacher_student_mask.data.datasets import classes_of
from teacher_student_mask.evaluation.ground_truth import prepare_ground_truth

# Errors in what is not read by an evaluation: image files, and the model.
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
}
# As COCO's own evaluation has it.
LEFT_OUT = {"unknown image"}
LACKS = "mask AP needs a mask on every object, of unseen classes too; evaluate on annotations that"
# Words of errors that are no sentence of the checks of training.
OTHER_SENTENCES = {
    "seen class that the file lacks": "the dataset has no class 'shipp' (nearest: ship)",
    "all classes unseen": "DATASETS.SEEN_CLASSES is '', which names no class",
    "seen class without a mask": "{json}: annotation 102: 'segmentation' is None; " + LACKS,
    "no seen class with a mask": "{json}: annotation 101: 'segmentation' is None; " + LACKS,
    "polygon of 4 numbers": "'segmentation' is [[4, 10, 40, 50]]; " + LACKS,
    "polygon with half a point": "'segmentation' is [[4, 10, 40, 10, 40, 50, ...]]; " + LACKS,
    "annotation without id": "{json}: annotation number 10: 'id' is missing",
    "RLE of another size, of an unseen class": "{json}: annotation 108: 'segmentation' is an RLE "
    "of size [64, 80], but the image has [64, 64]",
}
# Cases that are about evaluation alone.
OF_EVALUATION = [
    Case("area NaN", annotation(111, area=float("nan")), "annotation 111: 'area' is nan; allowed"),
    Case("negative area", annotation(111, area=-5), "annotation 111: 'area' is -5; allowed"),
    Case("area null", annotation(111, area=None), "annotation 111: 'area' is None; allowed"),
    Case("no area", without(111, "area"), "annotation 111: 'area' is missing; allowed"),
    Case("image id that is a list", annotation(111, image_id=[1]), "'image_id' is [1]; allowed"),
    Case("id that is a list", annotation(111, id=[1]), "annotation [1]: 'id' is [1]; allowed"),
    Case("text ids", lambda data: [x.update(id=f"x{x['id']}") for x in data["annotations"]]),
    Case("numbers as floats", lambda data: to_floats(data)),
    Case(
        "polygon of 4 numbers beside another",
        annotation(111, segmentation=[[4, 10, 40, 50], [4, 50, 16, 10, 40, 50]]),
    ),
    Case(
        "runs of length 0",
        annotation(111, segmentation={"size": [80, 64], "counts": [700, 0, 0, 9, 0, 40, 4371]}),
    ),
]


def to_floats(data):
    for rows, fields in (
        ("images", ("id", "height", "width")),
        ("annotations", ("id", "image_id", "category_id", "iscrowd")),
        ("categories", ("id",)),
    ):
        for row in data[rows]:
            row.update({field: float(row[field]) for field in fields})


ALL = CASES + OF_EVALUATION
corpus = pytest.mark.parametrize("case", [pytest.param(x, id=x.name) for x in ALL])


def expected_error(case):
    """Words of the error with which the evaluator stops, or None."""
    if case.name in OTHER_SENTENCES:
        return OTHER_SENTENCES[case.name]
    is_error = case.message is not None and case.severity == "error"
    if is_error and case.name not in NOT_READ | LEFT_OUT:
        # Up to the first number that differs.
        return case.message.partition("#")[0]
    return None


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
        return
    with pytest.raises(ValueError) as error:
        evaluate(dataset.name, case.seen_classes, predictions)
    message = str(error.value)
    assert words.replace("{json}", dataset.json_file) in message
    assert dataset.json_file in message or "DATASETS.SEEN_CLASSES" in message


def test_an_unbroken_file_is_found_completely(make_tiny_coco):
    dataset = make_tiny_coco(complete)
    results = evaluate(dataset.name, "ant, ship", find_all(dataset.data))
    assert results["segm"]["AP"] == pytest.approx(100) and results["segm"]["num_gt"] == 11


def test_boxes_alone_are_evaluated_without_a_look_at_the_masks(make_tiny_coco):
    dataset = make_tiny_coco(annotation(111, segmentation="mask.png"))
    with pytest.raises(ValueError, match="annotation 111: 'segmentation' is 'mask.png'"):
        PartiallySupervisedCOCOEvaluator(dataset.name, seen_classes="ant")
    PartiallySupervisedCOCOEvaluator(dataset.name, ("bbox",), seen_classes="ant")


def test_a_missing_file_is_named(make_tiny_coco):
    dataset = make_tiny_coco()
    Path(dataset.json_file).unlink()
    with pytest.raises(ValueError, match=f"{dataset.json_file}: 'content' is unreadable .*No such"):
        PartiallySupervisedCOCOEvaluator(dataset.name, seen_classes="ant")


# Where the analysis and the evaluator differ: without ids, or an area, it helps itself; it takes
# boxes of any size; and it does not leave out what belongs to no image.
ANALYSED_OTHERWISE = {
    "annotation without id": False,
    "id that is a list": False,
    "huge box": False,
    "area null": False,
    "no area": False,
    "unknown image": True,
}


@corpus
def test_the_analysis_refuses_the_same_files(case, make_tiny_coco):
    if "DATASETS.SEEN_CLASSES" in (expected_error(case) or "") or "shipp" in case.seen_classes:
        return  # the analysis is told the seen classes later
    dataset = make(case, make_tiny_coco, is_complete=True)
    is_error = ANALYSED_OTHERWISE.get(case.name, expected_error(case) is not None)
    if not is_error:
        load_ground_truth(dataset.json_file)
        return
    with pytest.raises(InputError, match=dataset.json_file):
        load_ground_truth(dataset.json_file)


@pytest.mark.parametrize("counts", [[700, 0, 0, 9, 0, 40, 4371], "text"])
def test_runs_of_length_0_are_joined(counts, make_tiny_coco):
    """pycocotools goes past its memory where such runs meet."""
    if isinstance(counts, str):
        runs = {"size": [80, 64], "counts": [700, 9, 0, 0, 4411]}
        counts = mask_util.frPyObjects(runs, 80, 64)["counts"].decode()
    rle = {"size": [80, 64], "counts": counts}
    dataset = make_tiny_coco(lambda data: (complete(data), annotation(111, segmentation=rle)(data)))
    coco = index(dataset.data)
    (row,) = [x for x in dataset.data["annotations"] if x["id"] == 111]
    expected = coco.annToMask(row)
    prepare_ground_truth(coco, dataset.json_file, reads_masks=True)
    assert row["segmentation"] == mask_util.encode(np.asfortranarray(expected))
    assert expected.any()
