"""
What each system of the field is as a config: all that it changes of the recipe.

R-50, masks of the VOC classes; test_config.py ties the other direction and R-101 to these files.
"""

from pathlib import Path

import pytest
from test_config import REPOSITORY, flatten, load, our_keys

FOLDER = REPOSITORY / "configs/voc2nonvoc"
BASE = REPOSITORY / "configs/Base-PartiallySupervised-RCNN-FPN.yaml"
MASK_HEAD, TEACHER, PRIOR = "MODEL.ROI_MASK_HEAD", "MODEL.TEACHER_MASK_HEAD", "MODEL.ROI_MASK_PRIOR"
BOX_HEAD, PSEUDO_MASK = "MODEL.ROI_BOX_HEAD", "MODEL.PSEUDO_MASK"

AGNOSTIC = {f"{MASK_HEAD}.CLS_AGNOSTIC_MASK": True}
OURS = {"MODEL.ROI_HEADS.NAME": "TeacherStudentROIHeads"}
ON_GT_BOXES = {f"{MASK_HEAD}.TRAIN_ON_GT_BOXES": True}
BATCH_NORM = "naiveSyncBN_N"
# Its box head's widths are the defaults.
OPMASK = {
    f"{BOX_HEAD}.NAME": "FeatureMapBoxHead",
    f"{BOX_HEAD}.NORM": BATCH_NORM,
    f"{PRIOR}.NAME": "ClassActivationPrior",
    f"{MASK_HEAD}.NUM_CONV": 7,
    f"{MASK_HEAD}.NORM": BATCH_NORM,
}
SHAPEPROP = {f"{PRIOR}.NAME": "ShapePropagationPrior"}
CPMASK = {f"{PRIOR}.NAME": "CommonalityParsingPrior"}
CONTRASTMASK = {
    f"{BOX_HEAD}.NAME": "TwoBranchBoxHead",
    f"{BOX_HEAD}.CONV_WIDTHS": [256, 256, 256, 256],
    f"{PRIOR}.NAME": "ContrastivePrior",
    **ON_GT_BOXES,
}
MASK_X = {f"{MASK_HEAD}.NAME": "WeightTransferMaskHead"}
BOXINST = {"MODEL.BOX_SUPERVISION.NAME": "boxinst"}


def hourglass(depth):
    return {
        f"{MASK_HEAD}.NAME": "HourglassMaskHead",
        f"{MASK_HEAD}.HOURGLASS": depth,
        f"{MASK_HEAD}.NORM": BATCH_NORM,
        f"{MASK_HEAD}.POOLER_RESOLUTION": 32,
        **ON_GT_BOXES,
    }


def hourglass_teacher(depth):
    return {
        f"{TEACHER}.NAME": "HourglassMaskHead",
        f"{TEACHER}.HOURGLASS": depth,
        f"{TEACHER}.NORM": BATCH_NORM,
        **ON_GT_BOXES,
    }


DEPTHS = (20, 52, 100)
SYSTEMS = {
    "mask_rcnn": AGNOSTIC,
    "mask_rcnn.._gt_boxes": {**AGNOSTIC, **ON_GT_BOXES, f"{MASK_HEAD}.NORM": BATCH_NORM},
    **{f"mask_rcnn.._hourglass{x}": {**AGNOSTIC, **hourglass(x)} for x in DEPTHS},
    "oracle": {"DATASETS.SEEN_CLASSES": "all", "TEST.SEEN_CLASSES": "voc"},
    "opmask": {**AGNOSTIC, **OPMASK},
    "shapeprop": {**AGNOSTIC, **SHAPEPROP},
    "cpmask": {**AGNOSTIC, **CPMASK},
    "contrastmask": {**AGNOSTIC, **CONTRASTMASK},
    "boxinst_roi": {**AGNOSTIC, **BOXINST},
    # Predicts masks of each class; without the MLP branch of 157 million weights by default.
    "mask_x": MASK_X,
    "mask_x.._official": {**MASK_X, f"{MASK_HEAD}.MLP_BRANCH": True},
    "mask_grabcut": {
        **AGNOSTIC,
        "MODEL.META_ARCHITECTURE": "GrabCutRCNN",
        "MODEL.MASK_ON": False,
    },
    "mask_grabcut.._train": {**AGNOSTIC, f"{MASK_HEAD}.TRAIN_ON_EXTERNAL_MASKS": True},
    "mask_grabcut_teacher_student.._train": OURS,
    "teacher_student": OURS,
    **{
        f"teacher_student.._{x}": {**OURS, f"{PSEUDO_MASK}.METHOD": x}
        for x in ("none", "threshold", "crf", "box_fit")
    },
    "teacher_student.._deep_teacher": {**OURS, f"{TEACHER}.NUM_CONV": 12},
    "teacher_student.._deep_teacher_gt_boxes": {
        **OURS,
        **ON_GT_BOXES,
        f"{TEACHER}.NUM_CONV": 12,
    },
    "teacher_student.._high_res_teacher": {**OURS, f"{TEACHER}.NUM_DECONV": 2},
    **{f"teacher_student.._hourglass{x}_teacher": {**OURS, **hourglass_teacher(x)} for x in DEPTHS},
    # The teacher is the mask head of the base method.
    "opmask_teacher_student": {
        **OURS,
        **OPMASK,
        f"{TEACHER}.NUM_CONV": 7,
        f"{TEACHER}.NORM": BATCH_NORM,
    },
    "shapeprop_teacher_student": {**OURS, **SHAPEPROP},
    "cpmask_teacher_student": {**OURS, **CPMASK},
    "contrastmask_teacher_student": {**OURS, **CONTRASTMASK},
    "boxinst_roi_teacher_student": {**OURS, **BOXINST},
}


def path_of(system: str) -> Path:
    name, _, suffix = system.partition("..")
    return FOLDER / f"{name}_R_50_FPN_1x{suffix}.yaml"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_changes_of_the_recipe_what_it_is_and_nothing_else(system):
    base, cfg, expected = flatten(load(BASE)), flatten(load(path_of(system))), SYSTEMS[system]
    assert {key: cfg[key] for key in expected} == expected
    assert {key for key, value in cfg.items() if value != base[key]} <= set(expected)


def test_all_systems_are_here():
    assert {path_of(x) for x in SYSTEMS} == set(FOLDER.glob("*_R_50_*.yaml"))


def test_what_the_systems_leave_to_the_defaults():
    defaults = {
        f"{BOX_HEAD}.CONV_WIDTHS": [512, 1024, 1024, 1024],
        f"{MASK_HEAD}.MLP_BRANCH": False,
        f"{PSEUDO_MASK}.EXTERNAL": "alone",
        f"{PRIOR}.SHAPE_PROPAGATION.CONV_DIM": 256,
        f"{PRIOR}.SHAPE_PROPAGATION.NUM_CHANNELS": 24,
        f"{PRIOR}.SHAPE_PROPAGATION.NUM_STEPS": 0,
        f"{PRIOR}.SHAPE_PROPAGATION.ACTIVATION_WEIGHT": 1,
        f"{PRIOR}.SHAPE_PROPAGATION.SHAPE_WEIGHT": 1,
        f"{PRIOR}.CONTRAST.POOLER_RESOLUTION": 28,
        f"{PRIOR}.CONTRAST.NUM_CONV": 8,
        f"{PRIOR}.CONTRAST.CONV_DIM": 256,
        f"{PRIOR}.CONTRAST.NORM": BATCH_NORM,
        f"{PRIOR}.CONTRAST.LOSS_WEIGHT": 0.1,
        f"{PRIOR}.CONTRAST.KEY_SHARE": 0.3,
        f"{PRIOR}.CONTRAST.EPOCH_ITERS": 7330,
        f"{PRIOR}.CONTRAST.OFFICIAL_DENOMINATOR": False,
        "MODEL.BOX_SUPERVISION.COLOR_THRESHOLD": 0.3,
        "MODEL.BOX_SUPERVISION.DILATION": 2,
        "MODEL.BOX_SUPERVISION.WARMUP_ITERS": 10000,
        "MODEL.BOX_SUPERVISION.BOTTOM_ROWS": 10,
    }
    assert defaults.items() <= our_keys().items()
