"""From annotation files to training batches."""

from .dataset_mapper import TeacherStudentDatasetMapper
from .datasets import load_partial_coco_json, register_partial_coco

__all__ = ["TeacherStudentDatasetMapper", "load_partial_coco_json", "register_partial_coco"]
