"""Result files of a tiny model with random weights, against Detectron2's own evaluation loop."""

import json
from pathlib import Path

import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask import GTBoxInference
from teacher_student_mask.analysis.model_outputs import run_model
from train_net import Trainer

# Not the size of the images, so that boxes and masks must be scaled back.
RESIZED = ["INPUT.MIN_SIZE_TEST", 96]


@pytest.fixture
def save(tiny_cfg, tiny_coco, tmp_path):
    """Save a model for the tiny dataset; returns the paths of config and weights."""

    def _save(opts=TEACHER_STUDENT, dataset=tiny_coco):
        return save_model(tiny_cfg(opts=[*opts, *RESIZED], dataset=dataset), tmp_path / "model")

    return _save


def read(path):
    return json.loads(Path(path).read_text())


def bytes_of_eval_only(cfg, weights, output_dir):
    """coco_instances_results.json as "train_net.py --eval-only" gets it from Detectron2."""
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model).load(weights, checkpointables=[])
    model = GTBoxInference(model) if cfg.TEST.GT_BOXES else model
    (name,) = cfg.DATASETS.TEST
    # Not all objects of the dataset have a mask: AP of boxes alone. The file has the masks anyway.
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(output_dir))
    inference_on_dataset(model, Trainer.build_test_loader(cfg, name), evaluator)
    return (output_dir / "coco_instances_results.json").read_bytes()


@pytest.mark.parametrize("roi_heads", ["TeacherStudentROIHeads", "PartiallySupervisedROIHeads"])
def test_files_are_those_of_eval_only(save, tiny_cfg, tiny_coco, tmp_path, roi_heads):
    opts = ["MODEL.ROI_HEADS.NAME", roi_heads]
    config, weights = save(opts)
    results = run_model(config, weights, str(tmp_path / "out"))
    heads = ["student", "teacher"] if roi_heads == "TeacherStudentROIHeads" else ["student"]
    assert list(results.results) == list(results.gt_box_results) == heads
    seen = set()
    for paths, gt_boxes in ((results.results, False), (results.gt_box_results, True)):
        for head, path in paths.items():
            changes = [*opts, *RESIZED, "TEST.MASK_HEAD", head, "TEST.GT_BOXES", gt_boxes]
            cfg = tiny_cfg(opts=changes, dataset=tiny_coco)
            expected = bytes_of_eval_only(cfg, weights, tmp_path / f"{head}{gt_boxes}")
            assert Path(path).read_bytes() == expected
            seen.add(expected)
    # Otherwise the comparison could not tell one head or protocol from the other.
    assert len(seen) == 2 * len(heads) and b"[]" not in seen


def test_classes_of_the_dataset_are_found_by_name(save, tiny_coco, make_tiny_coco, tmp_path):
    config, weights = save()

    def run(ids, name):
        def change(data):
            data["categories"] = [
                {**x, "id": ids[x["id"]]} for x in data["categories"] if x["id"] in ids
            ]
            objects = [x for x in data["annotations"] if x["category_id"] in ids]
            data["annotations"] = [{**x, "category_id": ids[x["category_id"]]} for x in objects]

        opts = ["DATASETS.TEST", (make_tiny_coco(change).name,)]
        return run_model(config, weights, tmp_path / name, opts=opts)

    first = run_model(config, weights, tmp_path / "first")
    for ids, seen in (({3: 17, 17: 90, 90: 3}, ["ant", "ship"]), ({17: 1, 90: 2}, ["ship"])):
        found = run(ids, f"{len(ids)}")
        assert found.seen_classes == seen
        for before, after in (
            (first.results["student"], found.results["student"]),
            (first.gt_box_results["teacher"], found.gt_box_results["teacher"]),
        ):
            expected = [x for x in read(before) if x["category_id"] in ids]
            assert read(after) == [{**x, "category_id": ids[x["category_id"]]} for x in expected]
