"""From annotation files to training batches."""

import os

from .dataset_mapper import TeacherStudentDatasetMapper
from .datasets import (
    check_datasets,
    dataset_classes,
    load_partial_coco_json,
    register_json_datasets,
    register_partial_coco,
    resolve_auto_settings,
)
from .shapes import generate_shapes, register_shapes
from .train_loader import build_train_loader

__all__ = [
    "TeacherStudentDatasetMapper",
    "build_train_loader",
    "check_datasets",
    "dataset_classes",
    "generate_shapes",
    "load_partial_coco_json",
    "register_json_datasets",
    "register_partial_coco",
    "register_shapes",
    "resolve_auto_settings",
]

# As Detectron2's own datasets, "shapes_train" and "shapes_val" are known by name from now on, and
# read when they are used.
register_shapes(os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes"))
