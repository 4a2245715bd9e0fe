"""Which ROIs, maps and gradients ContrastMask's prior gets in the ROI heads."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    CHANNELS,
    HALF_EMPTY,
    MIXED,
    NO_OBJECT,
    NONE_SEEN,
    NONE_UNSEEN,
    NUM_CLASSES,
    STRIDE,
    make_features,
    make_heads,
    make_images,
    plain_proposals,
    targets_of,
)
from torch import nn
from torch.nn import functional as F

from teacher_student_mask import PartiallySupervisedROIHeads, TeacherStudentROIHeads
from teacher_student_mask.modeling.feature_map_box_head import (
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    TwoBranchBoxHead,
)
from teacher_student_mask.modeling.priors import ContrastivePrior, KeptBoxFeatures
from teacher_student_mask.modeling.priors.class_activation import normalize_per_roi, raw_cam_of
from teacher_student_mask.modeling.priors.contrast_sets import sets_of_cams, sets_of_masks
from teacher_student_mask.modeling.priors.contrastive_loss import contrastive_loss

FINE = 12


def make_contrast_heads(
    heads_class=PartiallySupervisedROIHeads, box_head=TwoBranchBoxHead, **kwargs
):
    """Small ROI heads with ContrastMask's prior; all pixels are keys: its loss is not random."""
    num_channels = 1 if heads_class is PartiallySupervisedROIHeads else NUM_CLASSES
    heads = make_heads(heads_class, num_channels=num_channels, **kwargs)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=4)
    heads.box_head = box_head(shape, conv_widths=[8, 5])
    transform = Box2BoxTransform((10, 10, 5, 5))
    heads.box_predictor = PooledFastRCNNOutputLayers(
        heads.box_head.output_shape, box2box_transform=transform, num_classes=NUM_CLASSES
    )
    # Opinions, and a head whose output depends on its ROI.
    nn.init.normal_(heads.box_predictor.cls_score.weight)
    pooler = ROIPooler(FINE, (1 / STRIDE,), 0, "ROIAlignV2")
    heads.mask_prior = ContrastivePrior(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        pooler=pooler,
        num_conv=2,
        conv_dim=5,
        key_share=1.0,
    )
    return heads.train()


def heads_step(heads, batch=MIXED):
    """Losses of a step with sampling, the sampled proposals, and the prior's context."""
    contexts = []
    hook = heads.mask_prior.register_forward_pre_hook(lambda m, args: contexts.append(args[1]))
    n = len(batch)
    torch.manual_seed(4)
    with EventStorage():
        inputs = make_images(n), make_features(n), plain_proposals(n), targets_of(batch)
        proposals, losses = heads(*inputs)
    hook.remove()
    (context,) = contexts
    return losses, proposals, context


@pytest.mark.parametrize("heads_class", [PartiallySupervisedROIHeads, TeacherStudentROIHeads])
@pytest.mark.parametrize("on_gt_boxes", [False, True])
def test_heads_give_the_loss_the_sampled_proposals_and_their_maps(heads_class, on_gt_boxes):
    heads = make_contrast_heads(heads_class, train_on_gt_boxes=on_gt_boxes)
    prior = heads.mask_prior
    rows = {name: [] for name in ("class_branch", "box_branch", "encoder", "projector")}
    for name, module in (
        # For own boxes the class branch alone.
        ("class_branch", heads.box_head.class_branch),
        ("box_branch", heads.box_head.box_branch),
        ("encoder", prior.encoder),
        ("projector", prior.projector),
    ):
        module.register_forward_hook(lambda m, i, out, calls=rows[name]: calls.append(len(out)))
    losses, proposals, context = heads_step(heads)
    calls = copy.deepcopy(rows)
    labels = torch.cat([x.gt_classes for x in proposals])
    foreground = [x[x.gt_classes < NUM_CLASSES] for x in proposals]
    boxes = [x.proposal_boxes for x in foreground]
    num_sampled, num_foreground = len(labels), sum(map(len, foreground))
    has_mask = torch.cat([x.gt_has_mask for x in foreground])
    assert num_sampled > num_foreground and has_mask.any() and not has_mask.all()

    # The loss, from the parts.
    features = [make_features(2)["p2"]]
    maps, _ = heads.box_head(heads.box_pooler(features, boxes))
    classifier = heads.box_predictor.cls_score
    cam = raw_cam_of(foreground, KeptBoxFeatures(maps, classifier))
    cam = normalize_per_roi(F.interpolate(cam, (FINE, FINE), mode="bilinear"))[:, 0]
    masks = [x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, FINE) for x in foreground]
    sets = sets_of_masks(torch.cat(masks)).where(has_mask, sets_of_cams(cam))
    projections = prior.projector(prior.encoder(prior.pooler(features, boxes)))
    expected = contrastive_loss(projections, sets, 1.0) * 0.1 / 4
    assert expected > 0 and losses["loss_mask_contrast"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    # The mask heads have their own ROIs, the student all objects; those are not computed twice.
    own = [x.proposal_boxes.tensor.tolist() for x in context.instances]
    is_baseline = heads_class is PartiallySupervisedROIHeads
    if on_gt_boxes:
        assert own == [[b for b, m in zip(*x[::2]) if m or not is_baseline] for x in MIXED]
        num_own = sum(map(len, own))
        assert calls["class_branch"] == [num_sampled, num_own]
        # Boxes of objects are among the sampled ones here.
        assert calls["encoder"] == [num_foreground]
    else:
        assert sum(map(len, own)) == (int(has_mask.sum()) if is_baseline else num_foreground)
        assert calls["class_branch"] == [num_sampled] and calls["encoder"] == [num_foreground]
    assert calls["projector"] == [num_foreground] and calls["box_branch"] == [num_sampled]


def test_the_cap_of_mask_rois_does_not_change_the_loss():
    losses = {}
    for limit in (0, 1):
        heads = make_contrast_heads(TeacherStudentROIHeads, max_rois_without_mask=limit)
        torch.manual_seed(5)
        losses[limit], _, context = heads_step(heads, NONE_SEEN)
        assert (sum(map(len, context.instances)) > 1) == (limit == 0)
    assert torch.equal(losses[0]["loss_mask_contrast"], losses[1]["loss_mask_contrast"])


@pytest.mark.parametrize("heads_class", [PartiallySupervisedROIHeads, TeacherStudentROIHeads])
@pytest.mark.parametrize("on_gt_boxes", [False, True])
@pytest.mark.parametrize("batch", [MIXED, NONE_SEEN, NONE_UNSEEN, NO_OBJECT, HALF_EMPTY])
def test_every_batch_gives_every_parameter_a_gradient(heads_class, on_gt_boxes, batch):
    """In multi-GPU training each of these can be the whole batch of a rank."""
    heads = make_contrast_heads(heads_class, train_on_gt_boxes=on_gt_boxes)
    losses, _, _ = heads_step(heads, batch)
    assert "loss_mask_contrast" in losses and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("heads_class", [PartiallySupervisedROIHeads, TeacherStudentROIHeads])
@pytest.mark.parametrize("on_gt_boxes", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_where_the_losses_go(heads_class, on_gt_boxes, stops):
    heads = make_contrast_heads(heads_class, train_on_gt_boxes=on_gt_boxes)
    heads.mask_prior.stop_gradient = stops
    # Predictors start at almost 0: with larger weights the gradients are not.
    nn.init.normal_(heads.mask_head.predictor.weight)
    losses, _, _ = heads_step(heads)

    def trained_by(loss):
        names, parameters = zip(*heads.named_parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        found = {n for n, x in zip(names, gradients) if x is not None and x.any()}
        return {".".join(n.split(".")[:2]) for n in found if not n.startswith("mask_head")}

    prior = {f"mask_prior.{x}" for x in ("encoder", "fuse")}
    box_head = {"box_head.shared", "box_head.class_branch"}
    assert trained_by(losses["loss_mask"]) == prior | (set() if stops else box_head)
    contrastive = {"mask_prior.encoder", "mask_prior.projector"}
    assert trained_by(losses["loss_mask_contrast"]) == contrastive
    box_branch = {"box_head.box_branch", "box_predictor.bbox_pred"}
    assert trained_by(losses["loss_box_reg"]) == box_branch | {"box_head.shared"}
    assert trained_by(losses["loss_cls"]) == box_head | {"box_predictor.cls_score"}


@pytest.mark.parametrize("box_head", [TwoBranchBoxHead, FeatureMapBoxHead])
@pytest.mark.parametrize("repool", [False, True])
def test_inference_on_detected_and_on_given_boxes(box_head, repool):
    heads = make_contrast_heads(box_head=box_head, repool_box_features=repool).eval()
    features = make_features(2)
    with torch.no_grad():
        detected, _ = heads(make_images(2), features, plain_proposals(2))
        given = [
            Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes)
            for x in detected
        ]
        given = heads.forward_with_given_boxes(features, given)
    assert sum(map(len, detected)) > 0
    for x, y in zip(detected, given):
        assert x.pred_masks.shape == (len(x), 1, 28, 28) and not x.has("box_features")
        # Given boxes have no map of the box head: it is computed there.
        assert not repool or torch.allclose(x.pred_masks, y.pred_masks, atol=1e-5)
