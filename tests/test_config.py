"""Every line of configs/README.md resolves to its recorded values and builds; keys are read."""

import json
import re
import shlex
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

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
PACKAGE = Path(teacher_student_mask.config.__file__).parent
# What the systems were before their files were composed: the bases' changes of Detectron2's
# defaults and of each other, and what each system changes of its base.
RECORDED = json.loads((REPOSITORY / "tests/recorded_configs.json").read_text())
R_101 = {
    "MODEL.RESNETS.DEPTH": 101,
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
}
# Read as a whole; see the tests that each key arrives.
PRIORS = ("SHAPE_PROPAGATION.", "COMMONALITY_PARSING.", "CONTRAST.")
NODES_READ_AS_A_WHOLE = ("MODEL.TEACHER_MASK_HEAD.", "MODEL.PSEUDO_MASK.CRF.")
NODES_READ_AS_A_WHOLE += ("MODEL.BOX_SUPERVISION.", *(f"MODEL.ROI_MASK_PRIOR.{x}" for x in PRIORS))


def load(path, *opts):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(CONFIGS / path))
    cfg.merge_from_list(list(opts))
    return cfg


def flatten(cfg, prefix=""):
    """{"A.B": value} of a config tree, tuples as lists."""
    flat = {}
    for key, value in cfg.items():
        is_tree = isinstance(value, type(cfg))
        flat.update(flatten(value, f"{prefix}{key}.") if is_tree else {prefix + key: value})
    return {key: list(x) if isinstance(x, tuple) else x for key, x in flat.items()}


def our_keys():
    ours = get_cfg()
    add_teacher_student_mask_config(ours)
    return {key: v for key, v in flatten(ours).items() if key not in flatten(get_cfg())}


def lines_of_readme():
    """{"coco/mask_rcnn": what follows --config-file} of both tables."""
    rows = re.findall(
        r"^\| (\w+) \|[^|]*\| `configs/(.*?)` \|$", (CONFIGS / "README.md").read_text(), re.M
    )
    return {f"{command.split('/')[0]}/{name}": shlex.split(command) for name, command in rows}


LINES = lines_of_readme()


def test_every_config_has_a_line_and_every_recorded_system_too():
    folders = ("coco", "shapes", "car_parts")
    on_disk = {f"{folder}/{x.name}" for folder in folders for x in CONFIGS.glob(f"{folder}/*.yaml")}
    assert {command[0] for command in LINES.values()} == on_disk
    recorded = {f"{x}/{name}" for x in ("coco", "shapes") for name in RECORDED[x]}
    assert {x for x in LINES if not x.startswith("car_parts/")} == recorded


@pytest.mark.parametrize("name, base", [("Base-COCO", None), ("Base-Shapes", "Base-COCO")])
def test_the_bases_are_the_recorded_ones(name, base):
    cfg = flatten(load(f"{name}.yaml"))
    assert RECORDED[name].items() <= cfg.items()
    if base:
        assert cfg == {**flatten(load(f"{base}.yaml")), **RECORDED[name]}


@pytest.mark.parametrize("system", [x for x in LINES if not x.startswith("car_parts/")])
def test_a_line_resolves_to_its_recorded_values_and_builds(system):
    dataset, _, name = system.partition("/")
    cfg = load(*LINES[system])
    base = flatten(load({"coco": "Base-COCO.yaml", "shapes": "Base-Shapes.yaml"}[dataset]))
    assert flatten(cfg) == {**base, **RECORDED[dataset][name]}
    builds(cfg)


@pytest.mark.parametrize("system", [x for x in LINES if x.startswith("car_parts/")])
def test_lines_of_car_parts_differ_in_the_method_alone(system):
    pytest.importorskip("timm", reason="needs the extra timm")
    cfg = load(*LINES[system], "MODEL.ROI_HEADS.NUM_CLASSES", "19", "MODEL.TIMM.WEIGHTS", "")
    builds(cfg)
    base = flatten(load("Base-CarParts.yaml"))
    # Nine of the 18 parts; left and right are classes of their own.
    assert base["DATASETS.SEEN_CLASSES"].count(",") == 8
    assert base["INPUT.RANDOM_FLIP"] == "none"
    changed = {key for key, value in flatten(cfg).items() if value != base[key]}
    allowed = ("MODEL.", "DATASETS.SEEN_CLASSES", "TEST.SEEN_CLASSES")
    assert all(key.startswith(allowed) for key in changed)


@pytest.mark.parametrize("config", ["coco/mask_rcnn.yaml", "coco/boxinst.yaml"])
def test_what_has_no_teacher_is_not_tested_by_it(config):
    with pytest.raises(ValueError, match="TEST.MASK_HEAD is 'teacher'; allowed: 'student'"):
        builds(load(config, "TEST.MASK_HEAD", "teacher"))


def builds(cfg):
    cfg.MODEL.DEVICE = "meta"  # modules and shapes without numbers in them: a tenth of a second
    with torch.device("meta"):
        roi_heads = build_model(cfg).roi_heads
    if cfg.MODEL.META_ARCHITECTURE.endswith("CondInst"):
        is_pair = cfg.MODEL.META_ARCHITECTURE == "TeacherStudentCondInst"
        assert hasattr(roi_heads, "teacher_mask_head") == is_pair
        return
    assert isinstance(roi_heads, PartiallySupervisedROIHeads)
    if not isinstance(roi_heads, TeacherStudentROIHeads):
        assert not hasattr(roi_heads, "teacher_mask_head")
        return
    # A class-agnostic teacher beside a class-specific student.
    assert roi_heads.teacher_mask_head.predictor.out_channels == 1
    if not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
        assert roi_heads.mask_head.predictor.out_channels == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    # A prior may append channels to the mask features.
    num_channels = getattr(roi_heads.mask_prior, "out_channels", cfg.MODEL.FPN.OUT_CHANNELS)
    features = torch.empty(2, num_channels, 14, 14, device="meta")
    side = 14 * 2**cfg.MODEL.TEACHER_MASK_HEAD.NUM_DECONV
    assert roi_heads.teacher_mask_head.layers(features).shape == (2, 1, side, side)


@pytest.mark.parametrize("system", [x for x in LINES if x.startswith("coco/")])
def test_direction_and_depth_are_the_overrides_that_the_readme_names(system):
    text = (CONFIGS / "README.md").read_text()
    is_tested_apart = load(*LINES[system]).TEST.SEEN_CLASSES != ""
    key = "TEST.SEEN_CLASSES" if is_tested_apart else "DATASETS.SEEN_CLASSES"
    direction = re.search(rf"`({key} nonvoc)`", text)[1].split()
    depth = re.search(r"`(MODEL.RESNETS.DEPTH 101 .*?)`", text)[1].split()
    r_50 = flatten(load(*LINES[system]))
    assert r_50[key] == "voc"
    for opts, changes in [
        (direction, {key: "nonvoc"}),
        (depth, R_101),
        (direction + depth, {key: "nonvoc", **R_101}),
    ]:
        assert flatten(load(*LINES[system], *opts)) == {**r_50, **changes}


@pytest.mark.parametrize("path", sorted((CONFIGS / "custom").glob("*.yaml")), ids=lambda x: x.name)
def test_configs_for_own_data_build(path):
    if path.name == "photos_cpu.yaml":
        pytest.importorskip("timm", reason="needs the extra timm")
    builds(load(path, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.TIMM.WEIGHTS", ""))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.PSEUDO_MASK.METHOD", "interakt", "interakt"),
        ("MODEL.MASK_ON", False, "TeacherStudentROIHeads needs MODEL.MASK_ON True"),
    ],
)
def test_a_value_that_is_not_allowed_is_an_error_when_the_model_is_built(
    tiny_cfg, key, value, message
):
    cfg = tiny_cfg(opts=["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads", key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


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
    # The depth of another head, see test_hourglass.py.
    assert keys == {*values, "HOURGLASS"}
    opts = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads"]
    for key, value in values.items():
        opts += [f"MODEL.TEACHER_MASK_HEAD.{key}", value]
    roi_heads = build_model(tiny_cfg(opts=opts)).roi_heads
    teacher, student = roi_heads.teacher_mask_head, roi_heads.mask_head
    assert sum(name.startswith("mask_fcn") for name, _ in teacher.named_children()) == 3
    assert teacher.mask_fcn1.out_channels == 6
    assert isinstance(teacher.mask_fcn1.norm, torch.nn.Module)
    assert teacher.loss_weight == 0.25
    assert teacher.layers(torch.zeros(1, 16, 14, 14)).shape == (1, 1, 56, 56)
    assert student.mask_fcn4.out_channels == 8 and student.mask_fcn1.norm is None
    assert student.loss_weight == 1.0
    assert student.layers(torch.zeros(1, 16, 14, 14)).shape == (1, 3, 28, 28)


def test_the_crf_is_optional(monkeypatch):
    for name in ("pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    cfg = load("coco/teacher_student.yaml", "MODEL.PSEUDO_MASK.METHOD", "crf")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        build_model(cfg)
        cfg.MODEL.PSEUDO_MASK.CRF.BACKEND = "pydensecrf"
        with pytest.raises(ImportError, match="pip install pydensecrf2"):
            build_model(cfg)
