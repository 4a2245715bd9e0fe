"""The whole analysis on COCO images, with results made from the ground truth: known answers."""

import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from teacher_student_mask.cli.main import main
from teacher_student_mask.evaluation import PartiallySupervisedCOCOEvaluator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def coco(coco_root):
    return COCO(os.path.join(coco_root, "annotations", "instances_val2017.json"))


def merge_with_neighbour(mask, others):
    """The object and the other one that covers most of its box."""
    y, x = np.nonzero(mask)
    box = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
    covered = [other[box].sum() for other in others]
    return mask | others[int(np.argmax(covered))] if covered and max(covered) else mask


def make_results(coco, change, path):
    """One detection per object, on its box: the truth, changed."""
    results = []
    for image_id in coco.imgs:
        objects = [x for x in coco.imgToAnns[image_id] if not x["iscrowd"]]
        masks = [coco.annToMask(x) for x in objects]
        for k, x in enumerate(objects):
            changed = masks[k]
            if changed.any():
                changed = change(masks[k], masks[:k] + masks[k + 1 :])
            rle = mask_util.encode(np.asfortranarray(changed, dtype=np.uint8))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": x["category_id"],
                    "bbox": x["bbox"],
                    "score": 0.9,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    path.write_text(json.dumps(results))
    return str(path)


@pytest.fixture(scope="module")
def summary(coco, coco_root, tmp_path_factory):
    """Run the program as a user would, and read analysis.json."""
    folder = tmp_path_factory.mktemp("analysis")
    changes = {"merged": merge_with_neighbour, "exact": lambda mask, others: mask}
    files = {
        name: make_results(coco, change, folder / f"{name}.json")
        for name, change in changes.items()
    }
    named = [f"{name}={path}" for name, path in files.items()]
    annotations = os.path.join(coco_root, "annotations", "instances_val2017.json")
    arguments = ["analyze", "--annotations", annotations, "--seen", "voc"]
    arguments += ["--output-dir", str(folder / "out")]
    arguments += ["--images", os.path.join(coco_root, "val2017"), "--results", *named]
    arguments += ["--resamples", "20", "--num-pictures", "20"]
    assert main(arguments) == 0
    assert (folder / "out" / "report.html").stat().st_size > 1e6
    result = json.loads((folder / "out" / "analysis.json").read_text())
    result["files"] = files
    return result


def test_tasks_equal_the_evaluator(coco_root, summary):
    """One definition of the subsets, in training and in the report."""
    evaluator = PartiallySupervisedCOCOEvaluator(
        "coco_2017_val", distributed=False, seen_classes="voc", tasks=("bbox", "segm")
    )
    evaluator.reset()
    evaluator._predictions = [{"instances": json.load(open(summary["files"]["merged"]))}]
    for x in evaluator._predictions[0]["instances"]:
        x["category_id"] = evaluator._metadata.thing_dataset_id_to_contiguous_id[x["category_id"]]
    expected = evaluator.evaluate()
    for task in ("segm", "segm_seen", "segm_unseen", "segm_unseen_overlap"):
        actual = summary["models"]["merged"][task]
        for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl", "num_gt"):
            assert actual[metric] == pytest.approx(expected[task][metric], abs=1e-9), (task, metric)
    assert summary["models"]["merged"]["segm_unseen_overlap"]["num_gt"] == 119
