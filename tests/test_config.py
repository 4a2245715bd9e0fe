"""Every yaml builds and is short; every key of ours is explained by a comment and read."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import teacher_student_mask.config
from teacher_student_mask import (
    PartiallySupervisedROIHeads,
    TeacherStudentROIHeads,
    add_teacher_student_mask_config,
)
from teacher_student_mask.data.shapes import SHAPES_CLASSES, SHAPES_SEEN_CLASSES
from teacher_student_mask.modeling import DenseCRF

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = Path(teacher_student_mask.config.__file__).parent
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
# One method on one dataset; configs/custom is a template, long for its comments.
LEAVES = [p for p in CONFIGS if not p.name.startswith("Base-") and p.parent.name != "custom"]
# Ablations, which the paper has with R-50 alone; all other methods have.
R_50_ALONE = {
    f"teacher_student_R_50_FPN_1x_{x}.yaml"
    for x in ("none", "threshold", "crf", "box_fit", "high_res_teacher", "deep_teacher")
    + ("deep_teacher_gt_boxes",)
}
# Sections of the project's README, and the configs whose results they have.
RESULTS = [("Results on COCO", ("voc2nonvoc", "nonvoc2voc")), ("Results on shapes", ("shapes",))]
# Read as a whole; see the tests that each key arrives.
NODES_READ_AS_A_WHOLE = ("MODEL.TEACHER_MASK_HEAD.", "MODEL.PSEUDO_MASK.CRF.")


def name_of(path):
    return str(path.relative_to(REPOSITORY / "configs"))


def load(path):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def flatten(cfg, prefix=""):
    """{"A.B": value} of a config tree."""
    flat = {}
    for key, value in cfg.items():
        is_tree = isinstance(value, type(cfg))
        flat.update(flatten(value, f"{prefix}{key}.") if is_tree else {prefix + key: value})
    return flat


def our_keys():
    ours = get_cfg()
    add_teacher_student_mask_config(ours)
    return {key: v for key, v in flatten(ours).items() if key not in flatten(get_cfg())}


def test_there_are_configs():
    assert len(LEAVES) >= 20


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_builds(path):
    cfg = load(path)
    # Modules and shapes without numbers in them: a tenth of a second each.
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    roi_heads = model.roi_heads
    assert isinstance(roi_heads, PartiallySupervisedROIHeads)
    if not isinstance(roi_heads, TeacherStudentROIHeads):
        assert not hasattr(roi_heads, "teacher_mask_head")
        return
    # A class-agnostic teacher beside a class-specific student.
    assert roi_heads.teacher_mask_head.predictor.out_channels == 1
    assert roi_heads.mask_head.predictor.out_channels == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    # A prior may append channels to the mask features.
    num_channels = getattr(roi_heads.mask_prior, "out_channels", cfg.MODEL.FPN.OUT_CHANNELS)
    features = torch.empty(2, num_channels, 14, 14, device="meta")
    side = 14 * 2**cfg.MODEL.TEACHER_MASK_HEAD.NUM_DECONV
    assert roi_heads.teacher_mask_head.layers(features).shape == (2, 1, side, side)


def test_one_config_builds_for_real():
    cfg = load(REPOSITORY / "configs/voc2nonvoc/teacher_student_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg)
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaves_are_short_and_build_on_a_base(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 15
    assert any(line.startswith("_BASE_:") for line in lines)


def test_there_is_a_config_for_every_method():
    methods = {load(path).MODEL.PSEUDO_MASK.METHOD for path in LEAVES}
    assert {"none", "threshold", "interact", "crf", "box_fit"} == methods


@pytest.mark.parametrize("first, second", [("voc2nonvoc", "nonvoc2voc")])
def test_the_two_directions_differ_in_the_classes_alone(first, second):
    paths = sorted((REPOSITORY / "configs" / first).glob("*.yaml"))
    names = [path.name for path in paths]
    assert names == sorted(p.name for p in (REPOSITORY / "configs" / second).glob("*.yaml"))
    swapped = {"voc": "nonvoc", "all": "all", "": ""}
    for path in paths:
        cfg, other = load(path), load(REPOSITORY / "configs" / second / path.name)
        assert "voc" in (cfg.DATASETS.SEEN_CLASSES, cfg.TEST.SEEN_CLASSES)
        for node in (cfg.DATASETS, cfg.TEST):
            node.SEEN_CLASSES = swapped[node.SEEN_CLASSES]
        assert cfg == other, path.name


@pytest.mark.parametrize("direction", ["voc2nonvoc", "nonvoc2voc"])
def test_every_method_has_both_backbones_which_differ_in_nothing_else(direction):
    folder = REPOSITORY / "configs" / direction
    names = {path.name for path in folder.glob("*.yaml")}
    small = {name for name in names if "_R_50_FPN_1x" in name}
    twins = {name: name.replace("_R_50_", "_R_101_") for name in small - R_50_ALONE}
    assert R_50_ALONE < small and names == small | set(twins.values())
    for name, twin in twins.items():
        cfg, other = load(folder / name), load(folder / twin)
        assert (cfg.MODEL.RESNETS.DEPTH, other.MODEL.RESNETS.DEPTH) == (50, 101), twin
        assert "R-50" in cfg.MODEL.WEIGHTS and "R-101" in other.MODEL.WEIGHTS, twin
        other.MODEL.RESNETS.DEPTH, other.MODEL.WEIGHTS = 50, cfg.MODEL.WEIGHTS
        assert cfg == other, twin


def test_a_reconstruction_is_called_one():
    """Nobody should take CPMask, of which no code exists, for the published method."""
    paths = [path for path in LEAVES if path.name.startswith("cpmask")]
    assert len(paths) == 10
    for path in paths:
        assert "reconstruction" in path.read_text().split("_BASE_:")[0], name_of(path)


def expand_braces(text):
    """As a shell does: "a{b,c}" is ["ab", "ac"]."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    before, after = text[: match.start()], text[match.end() :]
    return [x for y in match[1].split(",") for x in expand_braces(before + y + after)]


@pytest.mark.parametrize("section, folders", RESULTS)
def test_every_config_has_a_row_in_the_results(section, folders):
    text = (REPOSITORY / "projects/TeacherStudentMask/README.md").read_text()
    tables = re.search(rf"^## {section}\n(.*?)(^## |\Z)", text, re.M | re.S)[1]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    named = {x for row in rows for code in re.findall("`(.*?)`", row) for x in expand_braces(code)}
    stems = {path.stem for path in LEAVES if path.parent.name in folders}
    assert len(stems) > 20 and stems - named == set()


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_the_oracle_sees_all_and_the_others_do_not(path):
    cfg = load(path)
    is_oracle = path.name.startswith("oracle")
    assert (cfg.DATASETS.SEEN_CLASSES == "all") == is_oracle
    assert (cfg.TEST.SEEN_CLASSES != "") == is_oracle


def test_the_recipe_of_the_paper():
    cfg = load(REPOSITORY / "configs/Base-PartiallySupervised-RCNN-FPN.yaml")
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.SOLVER.BASE_LR == 0.02
    assert cfg.SOLVER.MAX_ITER == 87960 and cfg.SOLVER.STEPS == (58640, 80630)
    assert cfg.SOLVER.WARMUP_ITERS == 500 and cfg.SOLVER.WARMUP_FACTOR == 1e-3
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 8
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 512
    assert cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.5 and cfg.TEST.DETECTIONS_PER_IMAGE == 150


def test_shapes_configs_know_the_classes_of_shapes():
    for path in sorted((REPOSITORY / "configs/shapes").glob("*.yaml")):
        cfg = load(path)
        seen = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
        assert sorted(seen.split(", ")) == sorted(SHAPES_SEEN_CLASSES), path.name
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(SHAPES_CLASSES)


def test_defaults_are_those_of_the_design():
    defaults = {
        "DATASETS.SEEN_CLASSES": "voc",
        "MODEL.ROI_MASK_HEAD.TRAIN_ON_GT_BOXES": False,
        "MODEL.TEACHER_MASK_HEAD.NUM_CONV": 4,
        "MODEL.TEACHER_MASK_HEAD.NUM_DECONV": 1,
        "MODEL.TEACHER_MASK_HEAD.CONV_DIM": 256,
        "MODEL.TEACHER_MASK_HEAD.NORM": "",
        "MODEL.TEACHER_MASK_HEAD.LOSS_WEIGHT": 1.0,
        "MODEL.PSEUDO_MASK.METHOD": "interact",
        "MODEL.PSEUDO_MASK.THRESHOLD": 0.5,
        "MODEL.PSEUDO_MASK.CLIP_TO_BOX": True,
        "MODEL.PSEUDO_MASK.EXCLUDE_SEEN": True,
        "MODEL.PSEUDO_MASK.WARMUP_ITERS": 1000,
        "MODEL.PSEUDO_MASK.CRF.NUM_ITERS": 5,
        "TEST.MASK_HEAD": "student",
        "TEST.GT_BOXES": False,
        "TEST.OVERLAP_THRESHOLD": 0.3,
        "TEST.OVERLAP_BINS": [i / 10 for i in range(11)],
    }
    assert defaults.items() <= our_keys().items()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.PSEUDO_MASK.METHOD", "interakt", "interakt"),
        ("TEST.MASK_HEAD", "pupil", "TEST.MASK_HEAD is 'pupil'; allowed: 'student', 'teacher'"),
        ("MODEL.MASK_ON", False, "TeacherStudentROIHeads needs MODEL.MASK_ON True"),
    ],
)
def test_a_value_that_is_not_allowed_is_an_error_when_the_model_is_built(
    tiny_cfg, key, value, message
):
    cfg = tiny_cfg(opts=["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads", key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_every_key_is_explained_by_a_comment():
    # A comment stands above a key or above the block of keys that it begins.
    is_explained, last = False, ""
    for line in inspect.getsource(add_teacher_student_mask_config).splitlines():
        line = line.strip()
        if line.startswith("#"):
            is_explained = True
        elif not line:
            is_explained = False
        elif line.startswith("cfg."):
            last = line
            assert is_explained, f"no comment above: {line}"
    assert last


def test_every_key_is_read_somewhere():
    sources = [p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "config.py"]
    code = "\n".join([*sources, (REPOSITORY / "train_net.py").read_text()])
    unread = set()
    for key in our_keys():
        node, leaf = f"cfg.{key}".split(".")[-2:]
        # As cfg.LEAF, as cfg.A.NODE.LEAF, or as settings.LEAF after settings = cfg.A.NODE.
        is_read = re.search(rf"\b{node}\.{leaf}\b", code) or (
            re.search(rf"= cfg\.[A-Z_.]*{node}$", code, re.MULTILINE)
            and re.search(rf"\bsettings\.{leaf}\b", code)
        )
        if not is_read and not key.startswith(NODES_READ_AS_A_WHOLE):
            unread.add(key)
    assert not unread


def test_every_key_of_the_teacher_reaches_it_and_not_the_student(tiny_cfg):
    values = {
        "NAME": "MaskRCNNConvMultiUpsampleHead",
        "NUM_CONV": 3,
        "NUM_DECONV": 2,
        "CONV_DIM": 6,
        "NORM": "BN",
        "LOSS_WEIGHT": 0.25,
    }
    keys = {key.split(".")[-1] for key in our_keys() if "TEACHER_MASK_HEAD" in key}
    # The depth of another head, see test_hourglass_mask_head.py.
    assert keys == {*values, "HOURGLASS"}
    opts = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads"]
    for key, value in values.items():
        opts += [f"MODEL.TEACHER_MASK_HEAD.{key}", value]
    roi_heads = build_model(tiny_cfg(opts=opts)).roi_heads
    teacher, student = roi_heads.teacher_mask_head, roi_heads.mask_head
    names = [name for name, _ in teacher.named_children()]
    assert [name for name in names if name.startswith("mask_fcn")] == [
        "mask_fcn1",
        "mask_fcn2",
        "mask_fcn3",
    ]
    assert teacher.mask_fcn1.out_channels == 6
    assert isinstance(teacher.mask_fcn1.norm, torch.nn.Module)
    assert teacher.loss_weight == 0.25
    assert teacher.layers(torch.zeros(1, 16, 14, 14)).shape == (1, 1, 56, 56)
    assert student.mask_fcn4.out_channels == 8 and student.mask_fcn1.norm is None
    assert student.loss_weight == 1.0
    assert student.layers(torch.zeros(1, 16, 14, 14)).shape == (1, 3, 28, 28)


def test_every_key_of_the_crf_is_a_setting_of_it():
    keys = {key.split(".")[-1].lower() for key in our_keys() if ".CRF." in key}
    # How much memory it takes changes no result.
    assert keys == {field.name for field in dataclasses.fields(DenseCRF)} - {"memory_mb"}


def test_the_crf_is_optional(monkeypatch):
    for name in ("pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    cfg = load(REPOSITORY / "configs/voc2nonvoc/teacher_student_R_50_FPN_1x_crf.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        build_model(cfg)
        cfg.MODEL.PSEUDO_MASK.CRF.BACKEND = "pydensecrf"
        with pytest.raises(ImportError, match="pip install pydensecrf2"):
            build_model(cfg)
