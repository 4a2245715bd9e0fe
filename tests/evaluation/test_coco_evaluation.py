"""The evaluator against pycocotools, which runs on its own on each subset."""

import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask.evaluation import (
    PartiallySupervisedCOCOEvaluator,
    compute_overlaps,
    results_table,
)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SIZE = 200
# Neither contiguous nor in order in the json; sorted ids are classes 0 to 3.
CATEGORIES = [
    {"id": 90, "name": "ship"},
    {"id": 3, "name": "ant"},
    {"id": 41, "name": "dog"},
    {"id": 17, "name": "cat"},
]
CLASS_NAMES = ["ant", "cat", "dog", "ship"]
CATEGORY_IDS = [3, 17, 41, 90]

# Of Detectron2's matching; without compiled code both are the official one.
both_implementations = pytest.mark.parametrize("fast", [False, True], ids=["official", "compiled"])


@pytest.fixture
def register(tmp_path):
    """Write a COCO json, register it, and unregister it after the test."""
    names = []

    def _register(images, annotations, categories=CATEGORIES):
        name = f"evaluation_test_{next(_register.counter)}"
        path = tmp_path / f"{name}.json"
        data = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps({"info": {}, **data}))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        names.append(name)
        DatasetCatalog.get(name)
        return name

    _register.counter = itertools.count()
    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def ellipse(x, y, w, h):
    """Bool mask (SIZE, SIZE) of the ellipse in a box."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def to_rle(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def annotation(annotation_id, box, category_id=3, image_id=1, mask=None, **fields):
    mask = ellipse(*box) if mask is None else mask
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(v) for v in box],
        "area": float(mask.sum()),
        "iscrowd": 0,
        "segmentation": to_rle(mask),
        **fields,
    }


def make_images(num_images=1):
    return [
        {"id": 10 * i + 1, "height": SIZE, "width": SIZE, "file_name": f"{i}.jpg"}
        for i in range(num_images)
    ]


def make_dataset(seed, num_images=10):
    """Objects of all sizes and classes that overlap, some of them crowds."""
    rng = np.random.default_rng(seed)
    images, annotations = make_images(num_images), []
    for image in images:
        for _ in range(rng.integers(3, 9)):
            side = rng.choice([20, 60, 150])
            w, h = rng.uniform(0.7, 1.3, 2) * side
            x, y = rng.uniform(0, 1, 2) * (SIZE - np.array([w, h]).clip(max=SIZE))
            fields = {"iscrowd": int(rng.random() < 0.1), "image_id": image["id"]}
            category_id = int(rng.choice(CATEGORY_IDS))
            annotations.append(
                annotation(len(annotations) + 1, (x, y, w, h), category_id, **fields)
            )
    return images, annotations


def make_predictions(images, annotations, seed):
    """{image id: Instances}: moved objects, some of them twice or misclassified, and noise."""
    rng = np.random.default_rng(seed)
    outputs = {}
    for image in images:
        boxes = [x["bbox"] for x in annotations if x["image_id"] == image["id"]]
        classes = [
            CATEGORY_IDS.index(x["category_id"])
            for x in annotations
            if x["image_id"] == image["id"]
        ]
        boxes += boxes[::2] + [[20, 30, 40, 50], [100, 90, 15, 20]]
        classes += classes[::2] + [0, 3]
        boxes = np.array(boxes) + rng.normal(0, 2, (len(boxes), 4))
        boxes[:, 2:] = boxes[:, 2:].clip(min=4)
        classes = [int(rng.integers(4)) if rng.random() < 0.1 else c for c in classes]
        # Two digits: some scores are equal, whose order must not differ between the runs.
        outputs[image["id"]] = make_instances(boxes, classes, rng.random(len(boxes)).round(2))
    return outputs


@functools.lru_cache(maxsize=None)
def make_problem(seed=0):
    """Images, annotations and predictions, which the tests must not change."""
    images, annotations = make_dataset(seed)
    return images, annotations, make_predictions(images, annotations, seed + 1)


def make_instances(boxes, classes, scores, masks=None):
    """boxes: XYWH."""
    masks = [ellipse(*box) for box in boxes] if masks is None else masks
    instances = Instances((SIZE, SIZE))
    boxes = torch.as_tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    instances.scores = torch.as_tensor(np.asarray(scores), dtype=torch.float32)
    instances.pred_masks = torch.as_tensor(np.asarray(masks)).reshape(-1, SIZE, SIZE) > 0
    return instances


def evaluate(name, outputs, seen_classes, **kwargs):
    evaluator = PartiallySupervisedCOCOEvaluator(
        name, distributed=False, seen_classes=seen_classes, **kwargs
    )
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def to_coco(images, annotations):
    coco, data = COCO(), {"images": images, "annotations": annotations, "categories": CATEGORIES}
    coco.dataset = copy.deepcopy(data)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def run_pycocotools(images, annotations, outputs, category_ids=None, iou="segm"):
    """The six AP of a COCOeval of its own."""
    detections = []
    for image_id, x in outputs.items():
        for k, (x0, y0, x1, y1) in enumerate(x.pred_boxes.tensor.tolist()):
            mask = {"segmentation": to_rle(x.pred_masks[k].numpy())}
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[x.pred_classes[k]],
                    "score": x.scores[k].item(),
                    **(mask if iou == "segm" else {"bbox": [x0, y0, x1 - x0, y1 - y0]}),
                }
            )
    coco = to_coco(images, annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(coco, coco.loadRes(detections), iou)
        coco_eval.params.catIds = category_ids or coco_eval.params.catIds
        for step in (coco_eval.evaluate, coco_eval.accumulate, coco_eval.summarize):
            step()
    return {metric: 100 * x if x > -1 else math.nan for metric, x in zip(METRICS, coco_eval.stats)}


def ignore_by_area(annotations, keep):
    """
    The ground truth in which pycocotools itself ignores all but the annotations `keep`: their area
    lies outside every range that it evaluates. The IoU does not use it.
    """
    return [x if keep(x) else {**x, "area": 1e11} for x in annotations]


def assert_equal_metrics(actual, expected, tolerance=1e-6):
    for metric in METRICS:
        assert actual[metric] == pytest.approx(expected[metric], abs=tolerance, nan_ok=True), metric


@both_implementations
@pytest.mark.parametrize("seed, seen", [(0, "ant, dog"), (1, "cat"), (2, "ant, cat, ship")])
def test_every_subset_equals_a_run_of_pycocotools(register, fast, seed, seen):
    images, annotations, outputs = make_problem(seed)
    results = evaluate(register(images, annotations), outputs, seen, use_fast_impl=fast)
    seen_ids = [CATEGORY_IDS[CLASS_NAMES.index(x.strip())] for x in seen.split(",")]
    unseen_ids = [x for x in CATEGORY_IDS if x not in seen_ids]
    overlaps = compute_overlaps(to_coco(images, annotations))

    for task, ids in (("segm", CATEGORY_IDS), ("segm_seen", seen_ids), ("segm_unseen", unseen_ids)):
        expected = run_pycocotools(images, annotations, outputs, ids)
        assert_equal_metrics(results[task], expected)
        num_gt = sum(not x["iscrowd"] and x["category_id"] in ids for x in annotations)
        assert results[task]["num_gt"] == num_gt

    assert_equal_metrics(results["bbox"], run_pycocotools(images, annotations, outputs, iou="bbox"))
    assert results["bbox"]["num_gt"] == results["segm"]["num_gt"]

    def is_kept(x):
        return x["iscrowd"] or overlaps[x["id"]] >= 0.3

    expected = run_pycocotools(images, ignore_by_area(annotations, is_kept), outputs, unseen_ids)
    assert_equal_metrics(results["segm_unseen_overlap"], expected)
    num_gt = sum(
        not x["iscrowd"] and is_kept(x) and x["category_id"] in unseen_ids for x in annotations
    )
    assert 0 < results["segm_unseen_overlap"]["num_gt"] == num_gt < results["segm_unseen"]["num_gt"]
    # The comparison says something only if the subsets differ and none is trivial.
    assert len({round(results[t]["AP"], 3) for t in results}) == 5
    assert all(5 < results[task]["AP"] < 95 for task in results)


# One image with one class. "under" is covered by "over" to 50 %, "alone" by nothing.
UNDER, OVER, ALONE = (0, 0, 40, 40), (0, 20, 90, 90), (120, 120, 60, 60)


def square(x, y, w, h):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def detect(*boxes):
    """Detections of class ant with falling scores."""
    scores = [0.9 - 0.001 * k for k in range(len(boxes))]
    masks = [square(*box) for box in boxes]
    return {1: make_instances(boxes, [0] * len(boxes), scores, masks)}


@pytest.mark.parametrize(
    "threshold, num_gt", [(0.29, 1), (0.3, 1), (np.nextafter(0.3, 1), 0), (0.0, 2), (1.0, 0)]
)
def test_overlap_threshold_is_inclusive(register, threshold, num_gt):
    box, cover = (0, 0, 10, 10), (0, 0, 10, 3)
    annotations = [
        annotation(1, box, 3, mask=square(*box)),
        annotation(2, cover, 17, mask=square(*cover)),
        annotation(3, ALONE, 3, mask=square(*ALONE)),
    ]
    name = register(make_images(), annotations)
    results = evaluate(name, detect(box), "cat, dog, ship", overlap_threshold=threshold)
    assert results["segm_unseen_overlap"]["num_gt"] == num_gt
    assert math.isnan(results["segm_unseen_overlap"]["AP"]) == (num_gt == 0)


def test_no_masks_at_all_evaluates_boxes_only(register, caplog):
    annotations = [annotation(k + 1, box) for k, box in enumerate((UNDER, OVER, ALONE))]
    for x, segmentation in zip(annotations, (None, [], [[]])):
        x["segmentation"] = segmentation
    name = register(make_images(), annotations)
    with caplog.at_level(logging.WARNING, logger="teacher_student_mask"):
        results = evaluate(name, detect(UNDER, ALONE, OVER), [0])
    assert "has no masks" in caplog.text
    assert results.keys() == {"bbox"}
    assert results["bbox"]["AP"] == pytest.approx(100, abs=1e-6)
    assert results["bbox"]["num_gt"] == 3
    assert evaluate(name, {1: make_instances([], [], [])}, [0]).keys() == {"bbox"}


def test_more_objects_of_a_class_than_ap_counts_are_told_once(register, caplog):
    boxes = (UNDER, OVER, ALONE)
    rows = [annotation(k, box, 3, mask=square(*box)) for k, box in enumerate(boxes, start=1)]
    name = register(make_images(), rows)
    PartiallySupervisedCOCOEvaluator(name, seen_classes=[0], max_dets_per_image=3)
    assert "AP counts" not in caplog.text
    PartiallySupervisedCOCOEvaluator(name, seen_classes=[0], max_dets_per_image=2)
    (message,) = [x for x in caplog.messages if "AP counts" in x]
    assert message.startswith("AP counts 2 detections of a class in an image") and "3 of" in message
    assert "A TEST.DETECTIONS_PER_IMAGE above 150 raises both limits" in message


@pytest.mark.parametrize("tasks", [None, ("bbox", "segm")])
def test_no_predictions_give_nan_and_object_counts(register, tasks):
    # Of class ant, unseen, are UNDER and ALONE, of cat OVER.
    objects = zip((1, 2, 3), (UNDER, OVER, ALONE), (3, 17, 3))
    annotations = [annotation(i, box, category, mask=square(*box)) for i, box, category in objects]
    results = evaluate(
        register(make_images(), annotations), {1: make_instances([], [], [])}, [1], tasks=tasks
    )
    assert list(results) == ["bbox", "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap"]
    assert [x["num_gt"] for x in results.values()] == [3, 3, 1, 2, 1]
    for task in results.values():
        assert task.keys() == {*METRICS, "num_gt"}
        assert all(math.isnan(task[metric]) for metric in METRICS)


def test_tables_have_unseen_classes_in_bold():
    results = {
        task: {**{m: ap + k for k, m in enumerate(METRICS)}, "AP-cat": 99.0, "num_gt": 7}
        for task, ap in (("segm_unseen", 1.234), ("segm", 40.0))
    }
    table = results_table(results)
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["task", *METRICS, "num_gt"]
    assert lines[2] == ["segm", "40.00", "41.00", "42.00", "43.00", "44.00", "45.00", "7"]
    assert lines[3][:2] == ["**segm_unseen**", "**1.23**"]
    assert results_table({"a": results, "b": {}}) == f"a:\n{table}\n\nb:\nno results"
