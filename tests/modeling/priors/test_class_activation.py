"""Class activation maps against Eq. (8) and (9) of the paper and numbers written out by hand."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling.feature_map_box_head import PooledFastRCNNOutputLayers
from teacher_student_mask.modeling.priors import (
    ROI_MASK_PRIOR_REGISTRY,
    KeptBoxFeatures,
    ROIContext,
    build_mask_prior,
)
from teacher_student_mask.modeling.priors.class_activation import (
    ClassActivationPrior,
    cam_of,
    class_activation_maps,
    normalize_per_roi,
)


def instances_of(classes, field="gt_classes"):
    """One Instances for each list of classes."""
    return [
        Instances((64, 64), **{field: torch.tensor(labels, dtype=torch.int64)})
        for labels in classes
    ]


def random_kept(num_rows, channels=6, num_classes=3, side=7, seed=0):
    torch.manual_seed(seed)
    maps = torch.randn(num_rows, channels, side, side).requires_grad_()
    return KeptBoxFeatures(maps=maps, classifier=nn.Linear(channels, num_classes + 1))


def kept_by_hand():
    """Two ROIs with maps of two channels and 2x2 cells; classes 0, 1 and background."""
    classifier = nn.Linear(2, 3)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 10.0], [-1.0, 2.0], [50.0, 50.0]]))
        classifier.bias.copy_(torch.tensor([100.0, 200.0, 300.0]))
    maps = torch.tensor(
        [[[[1.0, 2], [3, 4]], [[0, 1], [0, 1]]], [[[1, 1], [2, 2]], [[4, 3], [2, 1]]]]
    )
    return KeptBoxFeatures(maps=maps.requires_grad_(), classifier=classifier)


def test_map_by_hand():
    kept = kept_by_hand()
    weight, bias = kept.classifier.weight, kept.classifier.bias
    # Class 0: x + 10 y. Class 1: -x + 2 y.
    cams = class_activation_maps(kept.maps, weight, torch.tensor([0, 1]))
    assert cams.tolist() == [[[[1, 12], [3, 14]]], [[[7, 5], [2, 0]]]]
    cams = class_activation_maps(kept.maps, weight, torch.tensor([1, 0]), bias)
    assert cams.tolist() == [[[[199, 200], [197, 198]]], [[[141, 131], [122, 112]]]]


def test_mean_of_the_map_is_the_classifiers_logit():
    torch.manual_seed(0)
    predictor = PooledFastRCNNOutputLayers(
        ShapeSpec(channels=32), box2box_transform=Box2BoxTransform((1, 1, 1, 1)), num_classes=5
    )
    nn.init.normal_(predictor.cls_score.weight, std=0.3)
    nn.init.normal_(predictor.cls_score.bias)
    scores, _, maps = predictor(torch.randn(9, 32, 7, 7))
    layer = predictor.cls_score
    for label in range(6):
        classes = torch.full((9,), label)
        cams = class_activation_maps(maps, layer.weight, classes, layer.bias)
        assert cams.shape == (9, 1, 7, 7)
        assert torch.allclose(cams.mean(dim=(1, 2, 3)), scores[:, label], atol=1e-5)


def test_normalisation_by_hand():
    cam = torch.tensor([[[[1.0, 12], [3, 14]]], [[[-7, -5], [-2, -3]]]])
    expected = [[[[0, 11 / 13], [2 / 13, 1]]], [[[0, 2 / 5], [1, 4 / 5]]]]
    assert torch.allclose(normalize_per_roi(cam), torch.tensor(expected), atol=1e-4)
    # The range 13 becomes 26, the range 5 becomes 18.
    expected = [[[[0, 11 / 26], [2 / 26, 13 / 26]]], [[[0, 2 / 18], [5 / 18, 4 / 18]]]]
    assert torch.allclose(normalize_per_roi(cam, eps=13), torch.tensor(expected))


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_a_constant_map_becomes_zeros_with_a_finite_gradient(value):
    cam = torch.full((2, 1, 7, 7), value, requires_grad=True)
    normalized = normalize_per_roi(cam)
    assert not normalized.any()
    normalized.pow(2).sum().backward()
    assert torch.isfinite(cam.grad).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.5, 50))
def test_normalisation_forgets_shift_and_scale(seed, shift, scale):
    # Hence the classifier's bias has no effect on the prior.
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    normalized = normalize_per_roi(cam)
    assert normalized.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert (normalized.amax(dim=(1, 2, 3)) < 1).all() and (normalized.amax() > 0.999)
    assert torch.allclose(normalize_per_roi(cam * scale + shift), normalized, atol=1e-3)


def test_gradients_of_map_and_normalisation():
    torch.manual_seed(0)
    maps = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([3, 0, 3])
    assert torch.autograd.gradcheck(
        lambda m, w: normalize_per_roi(class_activation_maps(m, w, classes)), (maps, weight)
    )


def test_prior_by_hand():
    mask_features = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    before = mask_features.clone()
    kept = kept_by_hand()
    out, losses = ClassActivationPrior()(
        mask_features, ROIContext(instances_of([[0], [1]]), [], kept)
    )
    assert losses == {} and torch.equal(mask_features, before)
    # Bilinear from 2 to 4 cells, cell centres aligned: [a, b] -> a, 3a/4 + b/4, a/4 + 3b/4, b.
    resize = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    small = np.array([[[0, 11], [2, 13]], [[7, 5], [2, 0]]]) / [[[13]], [[7]]]
    added = (out - mask_features).detach().numpy()
    for roi in range(2):
        expected = resize @ small[roi] @ resize.T
        for channel in range(3):
            assert np.allclose(added[roi, channel], expected, atol=2e-4)


def test_class_is_the_objects_in_training_and_the_predicted_one_at_inference():
    kept = random_kept(4)
    features = torch.zeros(4, 2, 7, 7)

    def expected(classes):
        weight = kept.classifier.weight
        cam = torch.stack(
            [(m * weight[c, :, None, None]).sum(0) for m, c in zip(kept.maps, classes)]
        )
        low, high = cam.flatten(1).min(1).values, cam.flatten(1).max(1).values
        return (cam - low[:, None, None]) / (high - low)[:, None, None]

    for field in ("gt_classes", "pred_classes"):
        # Three images of different numbers of ROIs.
        instances = instances_of([[2, 0, 1], [], [2]], field)
        out, _ = ClassActivationPrior()(features, ROIContext(instances, [], kept))
        assert torch.allclose(out, expected([2, 0, 1, 2])[:, None].expand(-1, 2, -1, -1), atol=1e-3)
        assert torch.equal(cam_of(instances, kept), out[:, :1])
    # Detections beside their matched objects, as an analysis may have them.
    detections = instances_of([[1, 1, 0], [], [0]], "pred_classes")
    for x in detections:
        x.gt_classes = torch.full((len(x),), 2)
    cam = cam_of(detections, kept)
    assert torch.allclose(cam[:, 0], expected([1, 1, 0, 0]), atol=1e-3)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradient_reaches_maps_and_mask_features_but_not_the_classifier(stop_gradient):
    kept = random_kept(3)
    features = torch.randn(3, 4, 14, 14, requires_grad=True)
    prior = ClassActivationPrior(stop_gradient=stop_gradient)
    assert not list(prior.parameters())
    out, _ = prior(features, ROIContext(instances_of([[0, 2], [1]]), [], kept))
    assert out.shape == features.shape
    weights = torch.randn(3, 4, 14, 14)
    (out * weights).sum().backward()
    assert torch.equal(features.grad, weights)
    assert kept.classifier.weight.grad is None and kept.classifier.bias.grad is None
    if stop_gradient:
        assert kept.maps.grad is None
    else:
        assert (kept.maps.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_maps_that_are_constant_add_nothing():
    kept = random_kept(2)
    with torch.no_grad():
        kept.maps.copy_(torch.tensor([0.0, 0.3])[:, None, None, None].expand_as(kept.maps))
    features = torch.randn(2, 4, 14, 14)
    out, _ = ClassActivationPrior()(features, ROIContext(instances_of([[0, 1]]), [], kept))
    assert torch.allclose(out, features, atol=1e-2)
    out.square().sum().backward()
    assert torch.isfinite(kept.maps.grad).all()


@pytest.mark.parametrize("num_images", [1, 2])
def test_no_roi(num_images):
    kept = random_kept(0)
    features = torch.zeros(0, 4, 14, 14, requires_grad=True)
    out, losses = ClassActivationPrior()(
        features, ROIContext(instances_of([[]] * num_images), [], kept)
    )
    assert out.shape == (0, 4, 14, 14) and losses == {}
    out.sum().backward()
    assert features.grad.shape == features.shape and kept.maps.grad.shape == kept.maps.shape


def test_half_precision_keeps_the_type_of_the_mask_features():
    kept = random_kept(2)
    instances = instances_of([[0, 1]])
    features = torch.zeros(2, 4, 14, 14)
    expected, _ = ClassActivationPrior()(features, ROIContext(instances, [], kept))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = ClassActivationPrior()(features.bfloat16(), ROIContext(instances, [], kept))
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected, atol=0.03)
    # Half-precision mask features with float32 maps, and the reverse, outside autocast.
    out, _ = ClassActivationPrior()(features.bfloat16(), ROIContext(instances, [], kept))
    assert out.dtype == torch.bfloat16
    half = KeptBoxFeatures(maps=kept.maps.bfloat16(), classifier=kept.classifier)
    out, _ = ClassActivationPrior()(features, ROIContext(instances, [], half))
    assert out.dtype == torch.float32
    assert torch.allclose(out, expected, atol=0.03)


def test_missing_or_wrong_box_features_are_named():
    features, prior = torch.zeros(2, 4, 14, 14), ClassActivationPrior()
    with pytest.raises(ValueError, match='ROI_BOX_HEAD.NAME to "FeatureMapBoxHead"'):
        prior(features, ROIContext(instances_of([[0, 1]]), []))
    # One map must not spread over two ROIs.
    with pytest.raises(ValueError, match="1 box features for 2 ROIs"):
        prior(features, ROIContext(instances_of([[0, 1]]), [], random_kept(1)))


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_prior_is_built_by_its_name(stop_gradient):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.MODEL.ROI_MASK_PRIOR.NAME = "ClassActivationPrior"
    cfg.MODEL.ROI_MASK_PRIOR.STOP_GRADIENT = stop_gradient
    prior = build_mask_prior(cfg, ShapeSpec(channels=256, height=14, width=14), {})
    assert isinstance(prior, ROI_MASK_PRIOR_REGISTRY.get("ClassActivationPrior"))
    assert prior.needs_box_features is True and prior.stop_gradient is stop_gradient
