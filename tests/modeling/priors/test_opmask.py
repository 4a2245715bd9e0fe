"""OPMask's box head and predictor beside Detectron2's, and its maps against Eq. (8) and (9)."""

import collections

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    CHANNELS,
    MIXED,
    NUM_CLASSES,
    make_features,
    make_heads,
    make_images,
    plain_proposals,
    targets_of,
)
from torch import nn

from teacher_student_mask import PartiallySupervisedROIHeads
from teacher_student_mask.modeling import TwoBranchBoxHead
from teacher_student_mask.modeling.priors import ROIContext
from teacher_student_mask.modeling.priors.opmask import (
    ClassActivationPrior,
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    normalize_per_roi,
)

ROI_SHAPE = ShapeSpec(channels=8, height=7, width=7)


def make_predictor(kind=PooledFastRCNNOutputLayers, channels=8, **kwargs):
    torch.manual_seed(1)
    kwargs.setdefault("test_score_thresh", 0.0)
    predictor = kind(
        ShapeSpec(channels=channels),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=NUM_CLASSES,
        **kwargs,
    )
    # The layers start at almost 0: with larger weights they have opinions.
    nn.init.normal_(predictor.cls_score.weight)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return predictor


@pytest.mark.parametrize("norm", ["", "GN", "naiveSyncBN_N"])
@pytest.mark.parametrize("training", [True, False])
def test_no_roi(norm, training):
    head = FeatureMapBoxHead(ROI_SHAPE, conv_widths=[32, 32], conv_norm=norm).train(training)
    predictor = make_predictor(channels=32)
    scores, deltas, maps = predictor(head(torch.zeros(0, 8, 7, 7)))
    assert scores.shape == (0, NUM_CLASSES + 1) and maps.shape == (0, 32, 7, 7)
    (scores.sum() + deltas.sum() + maps.sum()).backward()
    for name, parameter in [*head.named_parameters(), *predictor.named_parameters()]:
        # In multi-GPU training every rank must give every parameter a gradient.
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(torch.isfinite(x).all() for x in head.state_dict().values())


def test_scores_come_from_one_branch_and_deltas_from_the_other():
    predictor, maps = make_predictor(), torch.randn(2, 5, 8, 7, 7)
    scores, deltas, kept = predictor((maps[0], maps[1]))
    assert kept is not None and torch.equal(kept, maps[0])
    weight, bias = predictor.cls_score.weight, predictor.cls_score.bias
    assert torch.allclose(scores, maps[0].mean(dim=(2, 3)) @ weight.T + bias, atol=1e-5)
    weight, bias = predictor.bbox_pred.weight, predictor.bbox_pred.bias
    assert torch.allclose(deltas, maps[1].mean(dim=(2, 3)) @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize("cls_agnostic_bbox_reg", [False, True])
def test_everything_but_the_maps_is_the_parents_on_pooled_features(cls_agnostic_bbox_reg):
    kwargs = {"cls_agnostic_bbox_reg": cls_agnostic_bbox_reg, "test_nms_thresh": 0.3}
    ours, parent = make_predictor(**kwargs), make_predictor(FastRCNNOutputLayers, **kwargs)
    assert set(ours.state_dict()) == set(parent.state_dict())
    parent.load_state_dict(ours.state_dict())
    sizes = [5, 0, 6]
    maps = torch.randn(11, 8, 7, 7)
    predictions, expected = ours(maps), parent(maps.sum(dim=(2, 3)) / 49)
    assert torch.equal(predictions[2], maps)
    for got, value in zip(predictions, expected):
        assert torch.allclose(got, value, atol=1e-6)
    expected = predictions[:2]

    proposals = [x[:n] for x, n in zip(plain_proposals(3), sizes)]
    detections, kept = ours.inference(predictions, proposals)
    expected_detections, expected_kept = parent.inference(expected, proposals)
    assert [len(x) for x in detections] == [len(x) for x in expected_detections]
    assert sum(len(x) for x in detections) > 10
    for got, value in zip(detections, expected_detections):
        assert set(got.get_fields()) == {*value.get_fields(), "box_features"}
        assert torch.equal(got.pred_boxes.tensor, value.pred_boxes.tensor)
        assert torch.equal(got.scores, value.scores)
        assert torch.equal(got.pred_classes, value.pred_classes)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept))
    for x, rows, own in zip(detections, kept, maps.split(sizes)):
        assert torch.equal(x.box_features, own[rows])


Kept = collections.namedtuple("Kept", "maps classifier")


def kept_by_hand():
    """Two ROIs with maps of two channels and 2x2 cells; classes 0, 1 and background."""
    classifier = nn.Linear(2, 3)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 10.0], [-1.0, 2.0], [50.0, 50.0]]))
        classifier.bias.copy_(torch.tensor([100.0, 200.0, 300.0]))
    maps = torch.tensor(
        [[[[1.0, 2], [3, 4]], [[0, 1], [0, 1]]], [[[1, 1], [2, 2]], [[4, 3], [2, 1]]]]
    )
    return Kept(maps.requires_grad_(), classifier)


def instances_of(classes, field="gt_classes"):
    """One Instances for each list of classes."""
    return [
        Instances((64, 64), **{field: torch.tensor(labels, dtype=torch.int64)})
        for labels in classes
    ]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_a_constant_map_becomes_zeros_with_a_finite_gradient(value):
    cam = torch.full((2, 1, 7, 7), value, requires_grad=True)
    normalized = normalize_per_roi(cam)
    assert not normalized.any()
    normalized.pow(2).sum().backward()
    assert torch.isfinite(cam.grad).all()


@pytest.mark.parametrize("field", ["gt_classes", "pred_classes"])
def test_prior_by_hand(field):
    """The class is the object's in training, and the predicted one at inference."""
    mask_features = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    before = mask_features.clone()
    kept = kept_by_hand()
    # Class 0: x + 10 y. Class 1: -x + 2 y. The second of the three images has no ROI.
    context = ROIContext(instances_of([[0], [], [1]], field), [], *kept)
    out, losses = ClassActivationPrior()(mask_features, context)
    assert losses == {} and torch.equal(mask_features, before)
    # Bilinear from 2 to 4 cells, cell centres aligned: [a, b] -> a, 3a/4 + b/4, a/4 + 3b/4, b.
    resize = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    small = np.array([[[0, 11], [2, 13]], [[7, 5], [2, 0]]]) / [[[13]], [[7]]]
    added = (out - mask_features).detach().numpy()
    for roi in range(2):
        expected = resize @ small[roi] @ resize.T
        for channel in range(3):
            assert np.allclose(added[roi, channel], expected, atol=2e-4)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradient_reaches_maps_and_mask_features_but_not_the_classifier(stop_gradient):
    kept = Kept(torch.randn(3, 6, 7, 7).requires_grad_(), nn.Linear(6, 4))
    features = torch.randn(3, 4, 14, 14, requires_grad=True)
    prior = ClassActivationPrior(stop_gradient=stop_gradient)
    assert not list(prior.parameters())
    out, _ = prior(features, ROIContext(instances_of([[0, 2], [1]]), [], *kept))
    assert out.shape == features.shape
    weights = torch.randn(3, 4, 14, 14)
    (out * weights).sum().backward()
    assert torch.equal(features.grad, weights)
    assert kept.classifier.weight.grad is None and kept.classifier.bias.grad is None
    if stop_gradient:
        assert kept.maps.grad is None
    else:
        assert (kept.maps.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def heads_with_maps(box_head, heads_class=PartiallySupervisedROIHeads, **kwargs):
    heads = make_heads(heads_class, num_channels=1, mask_prior=None, **kwargs)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=4)
    heads.box_head = box_head(shape, conv_widths=[32], conv_norm="GN")
    heads.box_predictor = make_predictor(channels=32, test_topk_per_image=5)
    heads.mask_prior = ClassActivationPrior()
    return heads


def maps_at(heads, features, boxes):
    return heads.box_predictor(heads.box_head(heads.box_pooler([features["p2"]], boxes)))[-1]


both_heads = pytest.mark.parametrize("box_head", [FeatureMapBoxHead, TwoBranchBoxHead])


@both_heads
@pytest.mark.parametrize("on_gt_boxes", [False, True])
def test_roi_heads_train_with_the_map_of_each_roi(box_head, on_gt_boxes):
    heads = heads_with_maps(box_head, train_on_gt_boxes=on_gt_boxes).train()
    features, contexts = make_features(2), []
    heads.mask_prior.register_forward_hook(lambda m, args, out: contexts.append(args[1]))
    with EventStorage():
        _, losses = heads(make_images(2), features, plain_proposals(2), targets_of(MIXED))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    (context,) = contexts
    boxes = [x.proposal_boxes for x in context.instances]
    assert torch.allclose(context.class_maps, maps_at(heads, features, boxes), atol=1e-5)
    assert context.classifier is heads.box_predictor.cls_score
    # All sampled proposals keep theirs.
    kept = torch.cat([x.box_features for x in context.sampled])
    expected = maps_at(heads, features, [x.proposal_boxes for x in context.sampled])
    assert torch.allclose(kept, expected, atol=1e-5)
    losses["loss_mask"].backward()
    for name, parameter in heads.box_head.named_parameters():
        # The map is that of the classes: the branch of the box has no part in it.
        has_part = not name.startswith("box_branch")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == has_part, name
    assert heads.box_predictor.cls_score.weight.grad is None


@both_heads
@pytest.mark.parametrize("repool", [False, True])
def test_roi_heads_predict_with_the_map_of_each_detection(box_head, repool):
    heads = heads_with_maps(box_head, repool_box_features=repool).eval()
    features, contexts = make_features(2), []
    heads.mask_prior.register_forward_hook(lambda m, args, out: contexts.append(args[1]))
    proposals = plain_proposals(2)
    proposals[0] = proposals[0][:4]
    with torch.no_grad():
        detections, _ = heads(make_images(2), features, proposals)
        at_proposals = maps_at(heads, features, [x.proposal_boxes for x in proposals]).split([4, 6])
        at_detections = maps_at(heads, features, [x.pred_boxes for x in detections]).split([5, 5])
    for k, (x, maps) in enumerate(zip(detections, contexts[0].class_maps.split([5, 5]))):
        assert len(x) == 5 and x.has("pred_masks") and not x.has("box_features")
        if repool:
            assert torch.allclose(maps, at_detections[k], atol=1e-5)
            continue
        distance = (maps[:, None] - at_proposals[k][None]).abs().amax(dim=(2, 3, 4))
        # Each detection has one of its own image's maps, and its score is that map's.
        assert (distance.amin(dim=1) < 1e-5).all()
        probs = heads.box_predictor.cls_score(maps.mean(dim=(2, 3))).softmax(dim=1)
        assert torch.allclose(probs[torch.arange(5), x.pred_classes], x.scores, atol=1e-5)
