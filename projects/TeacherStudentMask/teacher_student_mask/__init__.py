"""
TeacherStudentMask: instance segmentation where only some objects have a mask, on Detectron2.

Public names are loaded when they are first used, so that ``tsmask --help`` need not wait for
PyTorch. The first use also registers the ROI heads, mask heads and demo dataset with Detectron2.
"""

import importlib
import os

__version__ = "0.1.0"

# PyTorch's threads wait for one another in a busy loop, which starves them where other programs use
# the cores, too: docs/BENCHMARKS.md. libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Public name -> module that defines it, and the name it has there if that is another.
_MODULES = {
    "GTBoxInference": "modeling",
    "ImageMask": "structures",
    "InputError": "errors",
    "NONVOC_CLASSES": "class_splits",
    "PartiallySupervisedCOCOEvaluator": "evaluation",
    "PartiallySupervisedROIHeads": "modeling",
    "TeacherStudentDatasetMapper": "data",
    "TeacherStudentROIHeads": "modeling",
    "VOC_CLASSES": "class_splits",
    "add_teacher_student_mask_config": "config",
    "complete": "completion",
    "compute_overlaps": "evaluation",
    "evaluate": "judgement",
    "export": "exporters:export_student",
    "generate_pseudo_masks": "modeling",
    "load": "trained_model:load_model",
    "load_partial_coco_json": "data",
    "register_partial_coco": "data",
    "register_shapes": "data",
    "resolve_seen_classes": "class_splits",
    "train": "training",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Importing them registers the heads, and the demo dataset.
    from . import data, modeling  # noqa: F401

    module, _, own_name = _MODULES[name].partition(":")
    value = getattr(importlib.import_module(f".{module}", __name__), own_name or name)
    globals()[name] = value
    return value
