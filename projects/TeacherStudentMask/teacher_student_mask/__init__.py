"""
TeacherStudentMask: instance segmentation where only some objects have a mask, on Detectron2.

Importing the package registers its ROI heads and mask heads with Detectron2.
"""

import os

from .class_splits import NONVOC_CLASSES, VOC_CLASSES, resolve_seen_classes
from .config import add_teacher_student_mask_config
from .data import TeacherStudentDatasetMapper, load_partial_coco_json, register_partial_coco
from .data.shapes import register_shapes
from .evaluation import PartiallySupervisedCOCOEvaluator, compute_overlaps
from .modeling import (
    GTBoxInference,
    PartiallySupervisedROIHeads,
    TeacherStudentROIHeads,
    generate_pseudo_masks,
)
from .structures import ImageMask

# Like Detectron2's own datasets: known by name, read when they are used.
register_shapes(os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes"))

__version__ = "0.1.0"

__all__ = [
    "GTBoxInference",
    "ImageMask",
    "NONVOC_CLASSES",
    "PartiallySupervisedCOCOEvaluator",
    "PartiallySupervisedROIHeads",
    "TeacherStudentDatasetMapper",
    "TeacherStudentROIHeads",
    "VOC_CLASSES",
    "add_teacher_student_mask_config",
    "compute_overlaps",
    "generate_pseudo_masks",
    "load_partial_coco_json",
    "register_partial_coco",
    "register_shapes",
    "resolve_seen_classes",
]
