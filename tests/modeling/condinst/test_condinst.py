"""CondInst, BoxInst and the pair: what the official code does not have, and the whole programs."""

import json
import re

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from roi_heads_factory import SIZE, WITH_MODEL_MASKS, add_model_masks, targets_of
from test_base_methods import BOXINST, CONDINST, CONDINST_PAIR, build

from teacher_student_mask import InputError
from teacher_student_mask.engine.trainer import main as train
from teacher_student_mask.exporters import export_student
from teacher_student_mask.modeling.box_supervision import (
    BoxSupervision,
    color_similarity,
    pairwise_sums,
    projection_loss,
    rgb_to_lab,
)
from teacher_student_mask.modeling.condinst import condinst
from teacher_student_mask.modeling.condinst import fcos as fcos_module
from teacher_student_mask.modeling.condinst.masks import Controller, features_at
from teacher_student_mask.modeling.condinst.planes import box_losses, make_student_planes
from teacher_student_mask.modeling.condinst.targets import Grid, assign_objects, make_plane_targets
from teacher_student_mask.modeling.inference import predict_masks_on_boxes
from teacher_student_mask.modeling.mask_targets import dice_loss
from teacher_student_mask.modeling.pseudo_masks import PseudoMaskGenerator
from teacher_student_mask.trained_model import TrainedModel, load_model

GRID = Grid.of([(16, 16), (8, 8), (4, 4)], [4, 8, 16], "cpu")
MIXED = [
    ([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [True, False]),
    ([[8, 10, 40, 30]], [1], [False]),
]


def planes_of(batch, stride=2, valid=(64, 64), **kwargs):
    targets = add_model_masks(targets_of(batch, **kwargs), {})
    return make_plane_targets(targets, (SIZE, SIZE), stride, [valid] * len(batch))


def pixels_of(num_images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_images, 3, SIZE, SIZE, generator=generator) * 255


@pytest.mark.parametrize("bitmask", [False, True])
def test_planes_sample_masks_that_may_be_read_and_no_other(bitmask):
    planes = planes_of([*MIXED, ([], [], [])], bitmask=bitmask)
    targets, *_ = targets_of(MIXED, bitmask=True)
    assert torch.equal(planes.masks[0], targets.gt_masks.tensor[0, 1::2, 1::2])
    assert not planes.masks[1:].any() and planes.images.tolist() == [0, 0, 1]
    assert torch.equal(planes.exclusion_masks[0], planes.masks[0])
    assert not planes.exclusion_masks[1:].any() and len(planes.exclusion_masks) == 3
    # Pixels 4 to 29 and 20 to 55, of which the odd ones are sampled.
    assert planes.box_masks[0].nonzero().aminmax(dim=0).max.tolist() == [14, 14]
    assert planes.box_masks[1].sum((0, 1)) == 15 * 18
    # The centroid of the upper left half of a square, and the centres of boxes.
    assert planes.centres[0].tolist() == pytest.approx([4 + 26 / 3] * 2, abs=0.2)
    assert planes.centres[1:].tolist() == [[35, 38], [24, 20]]


def test_pairs_in_the_surroundings_of_the_box_are_those_of_the_whole_image():
    planes = planes_of([*MIXED, ([[40, 2, 63, 64]], [0], [False])], valid=(60, 62))
    pixels, objects = 100 + pixels_of(3) / 16, torch.tensor([1, 2, 1, 3, 1])
    logits = torch.randn(5, 32, 32, dtype=torch.float64)
    supervision = BoxSupervision(color_threshold=0.001)
    found = box_losses(logits, objects, planes, pixels, 2, supervision, 5000)
    lab = rgb_to_lab(torch.nn.functional.avg_pool2d(pixels, 2))
    similarity = color_similarity(lab, planes.valid, 2)[planes.images[objects]]
    assert 0.1 < (similarity >= 0.001).float().mean() < 0.9
    boxes = planes.box_masks[objects]
    total, count = pairwise_sums(logits, similarity, boxes, 0.001, 2)
    whole = total / count / 2  # half of the warm-up
    assert found["loss_mask_pairwise"].item() == pytest.approx(whole.item(), rel=1e-12)
    assert found["loss_mask_projection"] == projection_loss(logits, boxes)


def test_a_controller_at_some_locations_is_the_convolution_there():
    torch.manual_seed(0)
    towers = [torch.randn(2, 6, *x) for x in GRID.shapes]
    controller = Controller(6)
    weight = controller.shared.weight.unflatten(1, (6, 3, 3))
    dense = [torch.conv2d(x, weight, controller.shared.bias, padding=1) for x in towers]
    dense = torch.cat([x.flatten(2) for x in dense], dim=2)
    images = torch.tensor([1, 0, 0, 1, 1, 0])
    locations = torch.tensor([335, 0, 255, 256, 17, 320])  # of all levels, corners among them
    found = controller(features_at(towers, GRID, images, locations), images)
    torch.testing.assert_close(found, dense[images, :, locations])


@pytest.mark.parametrize("all_layers, num", [(False, 9), (True, 233)])
def test_only_weights_of_the_objects_classes_learn(all_layers, num):
    controller = Controller(6, num_classes=5, all_layers=all_layers)
    assert controller.by_class.shape == (5, num, 54)
    parameters = controller(torch.randn(3, 54), torch.tensor([4, 1, 4]))
    assert parameters.shape == (3, 233)
    parameters.square().sum().backward()
    learns = controller.by_class.grad.flatten(1).any(1)
    assert learns.tolist() == [False, True, False, False, True]


def test_given_boxes_have_the_nearest_location_of_their_level():
    fcos = fcos_module.FCOS(
        in_channels=4,
        in_features="abc",
        strides=GRID.strides,
        num_classes=2,
        sizes=(8, 16),
        norm="",
    )
    boxes = [[10, 20, 25, 30], [10, 20, 27, 30], [0, 0, 64, 60], [62, 62, 64, 64], [60, 0, 99, 9]]
    found = fcos.locate(GRID, torch.tensor(boxes).float())
    assert GRID.levels[found].tolist() == [0, 1, 2, 0, 2]
    points = [[18, 26], [20, 28], [40, 24], [62, 62], [56, 8]]
    assert GRID.points[found].tolist() == points


def test_the_full_box_loses_to_the_truth():
    """Their projections are the same, but the full box cuts through pairs of one colour."""
    planes = planes_of([([[10, 10, 50, 50]], [0], [False])])
    y, x = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    disk = (x - 30) ** 2 + (y - 30) ** 2 <= 20**2
    pixels = torch.where(disk, 200.0, 40.0).expand(1, 3, -1, -1)
    supervision = BoxSupervision(warmup_iters=0)
    own = (torch.tensor([0]), planes, pixels, 2, supervision, 0)
    truth, full = (
        box_losses(8 * (2 * x[None].float() - 1), *own)
        for x in (disk[1::2, 1::2], planes.box_masks[0])
    )
    assert max(x["loss_mask_projection"] for x in (truth, full)) < 1e-3
    assert sum(truth.values()) < sum(full.values()) / 2


def test_the_head_and_the_pyramid_begin_as_in_the_official_code(tiny_cfg):
    opts = ["MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", *CONDINST]
    opts += ["MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]]
    opts += ["MODEL.FCOS.SIZES", [16, 32, 64, 128], "MODEL.CONDINST.IN_FEATURES", ["p3", "p4"]]
    model = build(tiny_cfg(opts=[*opts, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]))
    head = model.roi_heads.box_predictor
    assert head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    weights = [head.cls_logits.weight, head.bbox_pred.weight, head.ctrness.weight]
    assert torch.cat([x.flatten() for x in weights]).std().item() == pytest.approx(0.01, rel=0.1)
    features = model.backbone(pixels_of(1))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    p6 = model.backbone.top_block.p6(features["p5"])
    assert torch.equal(features["p6"], p6)
    assert torch.equal(features["p7"], model.backbone.top_block.p7(p6.relu()))


def test_divisors_are_means_over_ranks(monkeypatch):
    """Another rank has as many positive locations, and three times the centreness."""
    names = {"in_features": "abc", "strides": GRID.strides, "sizes": (8, 16), "norm": ""}
    fcos = fcos_module.FCOS(in_channels=4, num_classes=2, **names)
    output = fcos({k: torch.randn(1, 4, *x) for k, x in zip("abc", GRID.shapes)})
    boxes = torch.tensor([[4.0, 4, 30, 30]])
    objects = assign_objects(GRID, boxes, torch.tensor([[17.0, 17]]), (8, 16), 1.5)[None]
    alone = fcos.losses(output, objects, boxes, torch.tensor([1]))
    factors = iter([2.0, 4.0])
    monkeypatch.setattr(fcos_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(fcos_module.dist, "all_reduce", lambda x: x.mul_(next(factors)))
    both = fcos.losses(output, objects, boxes, torch.tensor([1]))
    for name, factor in (("cls", 1), ("loc", 2), ("ctr", 1)):
        found, expected = both[f"loss_fcos_{name}"], alone[f"loss_fcos_{name}"] / factor
        assert found.item() == pytest.approx(expected.item()) and found > 0


def make_student(method="threshold", external="alone", has_pseudo_masks=True, **kwargs):
    """Both heads on locations of the objects of WITH_MODEL_MASKS; also these and the planes."""
    targets = add_model_masks(targets_of(WITH_MODEL_MASKS))
    planes = make_plane_targets(targets, (SIZE, SIZE), 2, [(64, 64)] * 2)
    objects = torch.tensor([0, 1, 2, 2, 3, 4])
    teacher, student = torch.randn(2, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    generator = PseudoMaskGenerator(method=method, **kwargs)
    settings = {"external": external, "has_pseudo_masks": has_pseudo_masks, "stride": 2}
    found, has_target, scalars = make_student_planes(
        teacher, student, objects, planes, generator, pixels=pixels_of(2), **settings
    )
    return found, has_target, scalars, teacher, student, planes, objects


def test_targets_of_the_student():
    found, has_target, scalars, teacher, student, planes, objects = make_student("interact")
    assert has_target.all()
    assert torch.equal(found[0], planes.masks[0].float())  # a human's
    allowed = planes.box_masks[objects] & ~planes.exclusion_masks[planes.images[objects]]
    for row in (1, 5):  # a model's: objects 1 and 4
        assert torch.equal(found[row].bool(), planes.masks[objects[row]] & allowed[row])
    mean = (teacher.sigmoid() + student.sigmoid()) / 2
    for row in (2, 3, 4):
        assert torch.equal(found[row].bool(), (mean[row] >= 0.5) & allowed[row])
    inside = planes.box_masks[objects[2:5]]
    ratio = (found[2:5].sum((1, 2)) / inside.sum((1, 2))).mean()
    assert scalars["pseudo_mask/fg_ratio"] == ratio
    assert scalars["pseudo_mask/num_rois"] == 3

    assert scalars["external_mask/num_rois"] == 2  # objects 1 and 4
    model_masks = found[[1, 5]].sum((1, 2)) / planes.box_masks[objects[[1, 5]]].sum((1, 2))
    assert scalars["external_mask/fg_ratio"] == model_masks.mean()

    found, has_target, *_ = make_student(has_pseudo_masks=False)
    assert has_target.tolist() == [True, True, False, False, False, True]
    assert not found[2:5].any()
    found, _, _, teacher, *_ = make_student(external="mean", clip_to_box=False, exclude_seen=False)
    mean = (teacher.sigmoid()[1] + planes.masks[1].float()) / 2
    assert torch.equal(found[1], (mean >= 0.5).float())


def test_the_crf_runs_once_per_object():
    calls = []

    def crf(probs, colours):
        calls.append((tuple(probs.shape), tuple(colours.shape)))
        return probs

    found, _, _, teacher, _, planes, _ = make_student("crf", external="ignore", crf=crf)
    # Objects 1 to 4; no side has more than 56 cells.
    sides = [tuple(x.nonzero().amax(0) - x.nonzero().amin(0) + 1) for x in planes.box_masks[1:]]
    sides = [(int(h), int(w)) for h, w in sides]
    assert calls == [((1, h, w), (1, 3, h, w)) for h, w in sides]
    mean = teacher[2:4].sigmoid().mean(0)
    expected = (mean >= 0.5) & planes.box_masks[2] & ~planes.exclusion_masks[0]
    assert torch.equal(found[2].bool(), expected) and torch.equal(found[2], found[3])


@pytest.fixture
def step_of(tiny_cfg):
    """Return ``step(opts, batch)``: model and losses of a step at iteration 10,000."""

    def step(opts, batch):
        model = build(tiny_cfg(opts=opts)).train()
        inputs = [
            {"image": x, "instances": y}
            for x, y in zip(pixels_of(len(batch)), add_model_masks(targets_of(batch), {}))
        ]
        with EventStorage(10000) as step.storage:
            return model, model(inputs)

    return step


@pytest.mark.parametrize("period", [5000, 7000])
def test_pictures_of_objects_without_a_mask(step_of, period):
    step_of([*CONDINST_PAIR, *BOXINST, "VIS_PERIOD", period], MIXED)
    pictures = [x for _, x, _ in step_of.storage._vis_data]
    assert len(pictures) == (2 if period == 5000 else 0)
    for k, picture in enumerate(pictures):
        assert picture.shape == (3, SIZE // 2, 4 * SIZE // 2) and 0 <= picture.min() <= 1
        image = torch.nn.functional.avg_pool2d(pixels_of(2)[k], 2) / 255
        assert torch.allclose(picture[:, :, : SIZE // 2], image.flip(0), atol=1e-5)


def test_dice_and_projection_have_one_divisor(step_of, monkeypatch):
    seen = {}
    original = condinst.CondInstHeads._losses_of

    def spy(self, name, logits, objects, is_supervised, targets, pixels):
        seen.update(logits=logits.detach(), objects=objects, targets=targets)
        return original(self, name, logits, objects, is_supervised, targets, pixels)

    monkeypatch.setattr(condinst.CondInstHeads, "_losses_of", spy)
    _, losses = step_of([*CONDINST, *BOXINST], MIXED)
    objects, targets = seen["objects"], seen["targets"]
    assert objects.unique().tolist() == [0, 1, 2]
    probs, own = seen["logits"].sigmoid(), targets.has_mask[objects]
    dice = dice_loss(probs[own], targets.masks[objects[own]]).sum() / len(objects)
    boxes = targets.box_masks[objects[~own]]
    shadows = sum(dice_loss(probs[~own].amax(d), boxes.any(d)) for d in (1, 2))
    assert losses["loss_mask"].item() == pytest.approx(dice.item())
    expected = shadows.sum() / len(objects)
    assert losses["loss_mask_projection"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["CondInst", "TeacherStudentCondInst"])
@pytest.mark.parametrize("batch", ["no object", "no mask", "masks", "half empty"])
def test_every_parameter_has_a_gradient_whatever_the_batch(step_of, kind, batch):
    images = {
        "no object": [([], [], [])] * 2,
        "no mask": [MIXED[1]] * 2,
        "masks": [([[4, 4, 30, 30]], [0], [True])] * 2,
        "half empty": [([], [], []), MIXED[0]],
    }
    opts = [*CONDINST, *BOXINST, "MODEL.META_ARCHITECTURE", kind, "MODEL.CONDINST.NORM", "BN"]
    opts += ["VIS_PERIOD", 5000]  # bug: the pictures of a batch without a location raised
    model, losses = step_of(opts, images[batch])
    assert all(x.isfinite() for x in losses.values())
    if batch == "no object":
        assert all(x == 0 for name, x in losses.items() if name != "loss_fcos_cls")
    sum(losses.values()).backward()
    for name, x in model.roi_heads.named_parameters():
        assert x.grad is not None and x.grad.isfinite().all(), name


@pytest.mark.parametrize("stride", [2, 4])
def test_masks_over_boxes_lie_where_those_of_the_image_do(tiny_cfg, monkeypatch, stride):
    """Planes of x and y: a crop of them holds the coordinates of its own cells."""
    model = build(tiny_cfg(opts=[*CONDINST, "MODEL.CONDINST.STRIDE", stride])).eval()
    pixels = torch.arange(SIZE // stride) * stride + stride // 2 + 0.5
    planes = torch.stack([pixels.expand(len(pixels), -1), pixels.expand(len(pixels), -1).T])
    monkeypatch.setattr(model.roi_heads, "_predict", lambda *_: (planes / SIZE).logit())
    box = torch.tensor([8.0, 12, 40, 52])
    found = Instances((SIZE, SIZE), pred_boxes=Boxes(box.repeat(2, 1)))
    found.pred_classes = torch.tensor([0, 0])
    (found,) = model.inference([{"image": pixels_of(1)[0]}], [found], do_postprocess=False)
    cells = (torch.arange(56) + 0.5) / 56
    x, y = (found.pred_masks[:, 0] * SIZE).unbind()
    torch.testing.assert_close(x, (8 + 32 * cells).expand(56, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(y, (12 + 40 * cells).expand(56, -1).T, atol=1e-3, rtol=0)


def test_detected_boxes_are_cut_at_the_image_before_their_masks(tiny_cfg, monkeypatch):
    model = build(tiny_cfg(opts=CONDINST)).eval()
    far = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.tensor([[-9.0, 5, 30, 99]])))
    far.locations, far.pred_classes = torch.tensor([0]), torch.tensor([0])
    far.scores = torch.ones(1)
    monkeypatch.setattr(model.roi_heads.box_predictor, "detect", lambda *_: [far])
    (found,) = model.inference([{"image": pixels_of(1)[0]}], do_postprocess=False)
    assert found.pred_boxes.tensor.tolist() == [[0, 5, 30, SIZE]]


def test_both_heads_on_given_boxes(tiny_cfg):
    model = build(tiny_cfg(opts=CONDINST_PAIR)).eval()
    inputs = {"image": pixels_of(1)[0], "height": 32, "width": 32}
    boxes = torch.tensor([[4.0, 4, 30, 30], [20, 20, 50, 56]])
    probs = predict_masks_on_boxes(model, inputs, boxes, torch.tensor([0, 2]))
    assert list(probs) == ["student", "teacher"]
    assert probs["student"].shape == (2, 56, 56)
    assert not torch.equal(probs["student"], probs["teacher"])
    assert model.roi_heads.test_mask_head == "student"
    # A class of its own has masks of its own; the teacher does not look at it.
    others = predict_masks_on_boxes(model, inputs, boxes, torch.tensor([1, 2]))
    assert [torch.equal(probs[x][1], others[x][1]) for x in probs] == [True, True]
    assert [torch.equal(probs[x][0], others[x][0]) for x in probs] == [False, True]


def give_every_object_a_mask(data):
    for x in data["annotations"]:
        if not x.get("segmentation"):
            left, top, width, height = x["bbox"]
            x["segmentation"] = [[left, top, left + width, top, left, top + height]]


def test_a_training_and_what_follows(tiny_cfg, make_tiny_coco, tmp_path):
    """Train, evaluate student and teacher, predict and export; the student needs no teacher."""
    dataset = make_tiny_coco(give_every_object_a_mask)
    opts = [*CONDINST_PAIR, *BOXINST, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0, "SEED", 0]
    cfg = tiny_cfg(opts=[*opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01], dataset=dataset)
    (tmp_path / "config.yaml").write_text(cfg.dump())

    def run(*changes, eval_only=False):
        arguments = ["--eval-only"] if eval_only else []
        arguments += ["--config-file", str(tmp_path / "config.yaml"), *map(str, changes)]
        return train(default_argument_parser().parse_args(arguments))

    run()
    output = tmp_path / "output"
    metrics = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    logged = {k: x for line in metrics for k, x in line.items()}
    assert logged["leak/num_unseen_masks"] == 0
    assert {"loss_mask", "loss_mask_teacher", "loss_fcos_cls"} <= logged.keys()
    trained = load_model(output)
    assert trained.heads == ("student", "teacher")
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    masks = trained.masks_for(image, [[4, 4, 30, 30]], ["cat"])
    assert masks.pred_masks.shape == (1, 64, 80) and masks.scores.tolist() == [1.0]

    weights = output / "model_final.pth"
    state = torch.load(weights, weights_only=True)["model"]
    student = {k: x for k, x in state.items() if not k.startswith("roi_heads.teacher_mask_head.")}
    assert len(student) == len(state) - 2
    torch.save({"model": student}, weights)
    for head in ("student", "teacher"):
        changes = ["MODEL.WEIGHTS", weights, "TEST.MASK_HEAD", head, "TEST.GT_BOXES", True]
        if head == "student":
            assert run(*changes, eval_only=True)["bbox"]["AP"] == 100
        else:
            with pytest.raises(InputError, match="lacks 2 parameters.*teacher_mask_head"):
                run(*changes, eval_only=True)
    cfg = trained.cfg.clone()
    cfg.MODEL.WEIGHTS = str(weights)
    trained = load_model(output, heads=["student"])
    expected, found = trained.predict(image), DefaultPredictor(cfg)(image)["instances"]
    assert torch.equal(found.pred_masks, expected.pred_masks)
    with pytest.raises(InputError, match="'TeacherStudentCondInst', which a plain Mask R-CNN"):
        export_student(trained, tmp_path / "plain")


def test_a_graph_finds_the_same_in_other_sizes(tiny_cfg, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    cfg = tiny_cfg(opts=[*CONDINST_PAIR, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.07])
    model = build(cfg).eval()
    trained = TrainedModel(cfg, model, ["a", "b", "c"], [1, 2, 3], ("student", "teacher"))
    reports = export_student(trained, tmp_path / "graphs", ["torchscript", "onnx"])
    assert all(re.match("[1-9].* 0 without", x) for x in reports.values()), reports
