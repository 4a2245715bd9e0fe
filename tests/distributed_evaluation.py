"""An evaluation in a process group, or in one process, that needs no trained model."""

from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from distributed_training import make_cfg

import train_net
from teacher_student_mask import register_partial_coco
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES

TEST_SETS = {"eight": 8, "one": 1}  # name: number of images


def evaluate(shapes_root: str, name: str, output: Path) -> tuple[dict, int]:
    """
    Evaluate as train_net.py does, with detections that depend on the image alone.

    Returns:
        The results, {} except on the main process, and how many images this process had.
    """
    output.mkdir(parents=True, exist_ok=True)
    root = Path(shapes_root) / name
    dataset = f"distributed_shapes_{name}"
    register_partial_coco(
        dataset, str(root / "annotations" / "instances_val.json"), str(root / "val")
    )
    try:
        cfg = make_cfg(["OUTPUT_DIR", str(output), "DATASETS.TEST", (dataset,)])
        cfg.DATASETS.SEEN_CLASSES = ",".join(SHAPES_SEEN_CLASSES)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 8  # those of shapes
        detector = NoisyTruth(DatasetCatalog.get(dataset))
        return dict(train_net.Trainer.test(cfg, detector)), detector.num_images
    finally:
        DatasetCatalog.remove(dataset)
        MetadataCatalog.remove(dataset)


class NoisyTruth(torch.nn.Module):
    """Detections made from the ground truth: moved, some missing, some of another class."""

    def __init__(self, dataset: list[dict]):
        super().__init__()
        self.objects = {x["image_id"]: x["annotations"] for x in dataset}
        self.num_images = 0

    def forward(self, inputs: list[dict]) -> list[dict]:
        return [{"instances": self._detect(x)} for x in inputs]

    def _detect(self, inputs: dict) -> Instances:
        self.num_images += 1
        rng = np.random.default_rng(inputs["image_id"])
        objects = [x for x in self.objects[inputs["image_id"]] if rng.random() < 0.9]
        shifts = rng.integers(-2, 3, (len(objects), 2))
        masks = [np.roll(_pixels(x), s, (0, 1)) for x, s in zip(objects, shifts)]
        detections = Instances((inputs["height"], inputs["width"]))
        detections.pred_masks = torch.as_tensor(np.array(masks), dtype=torch.bool)
        detections.pred_boxes = Boxes(
            torch.tensor([_moved(x["bbox"], s) for x, s in zip(objects, shifts)])
        )
        classes = [x["category_id"] for x in objects]
        detections.pred_classes = torch.tensor(
            [x if rng.random() < 0.8 else int(rng.integers(8)) for x in classes]
        )
        detections.scores = torch.tensor(rng.random(len(objects)))
        return detections


def _pixels(annotation: dict) -> np.ndarray:
    return mask_util.decode(annotation["segmentation"])


def _moved(box: list[float], shift: np.ndarray) -> list[float]:
    left, top, width, height = box
    dy, dx = shift.tolist()
    return [left + dx, top + dy, left + dx + width, top + dy + height]
