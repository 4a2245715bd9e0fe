"""The box heads that keep a map, and the predictor beside Detectron2's on pooled features."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads, build_box_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
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

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling.feature_map_box_head import (
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    TwoBranchBoxHead,
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


# The parent drops a row whose box or scores are not finite. "box": finite deltas, but they move the
# box by more widths than float32 can say. "height": infinite, but clamped, so the row stays.
ODDITIES = ("score", "delta", "box", "height")


def proposals_with_gt(sizes, seed=0):
    """One Instances for each entry of ``sizes``; about every other proposal is background."""
    generator = torch.Generator().manual_seed(seed)
    proposals = []
    for size in sizes:
        x = Instances((64, 64))
        corner = torch.rand(size, 2, generator=generator) * 30
        x.proposal_boxes = Boxes(torch.cat([corner, corner + 20], dim=1))
        x.gt_boxes = Boxes(x.proposal_boxes.tensor + torch.rand(size, 4, generator=generator))
        x.gt_classes = torch.randint(0, NUM_CLASSES + 1, (size,), generator=generator)
        proposals.append(x)
    return proposals


def numbered_maps(num_rows, channels=2):
    """Row i holds i everywhere."""
    return torch.arange(float(num_rows))[:, None, None, None].expand(-1, channels, 3, 3).clone()


def test_widths_and_names():
    head = FeatureMapBoxHead(ROI_SHAPE, conv_widths=[5, 16, 12])
    assert head.output_shape == ShapeSpec(channels=12)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "conv1.weight": (5, 8, 3, 3),
        "conv1.bias": (5,),
        "conv2.weight": (16, 5, 3, 3),
        "conv2.bias": (16,),
        "conv3.weight": (12, 16, 3, 3),
        "conv3.bias": (12,),
    }
    assert head(torch.randn(4, 8, 7, 7)).shape == (4, 12, 7, 7)


def test_map_by_hand():
    # One convolution that sums 3x3 cells and subtracts 5, then the ReLU; zero padding.
    head = FeatureMapBoxHead(ShapeSpec(channels=1, height=3, width=3), conv_widths=[1])
    nn.init.ones_(head.conv1.weight)
    nn.init.constant_(head.conv1.bias, -5)
    assert head(torch.ones(1, 1, 3, 3)).tolist() == [[[[0, 1, 0], [1, 4, 1], [0, 1, 0]]]]


@pytest.mark.parametrize("norm, kind", [("GN", "GroupNorm"), ("naiveSyncBN_N", "BatchNorm")])
def test_norm_stands_before_the_relu_and_replaces_the_bias(norm, kind):
    head = FeatureMapBoxHead(ROI_SHAPE, conv_widths=[32, 64], conv_norm=norm)
    assert head.conv1.bias is None and head.conv2.bias is None
    assert kind in type(head.conv2.norm).__name__
    nn.init.zeros_(head.conv2.norm.weight)
    with torch.no_grad():
        head.conv2.norm.bias.copy_(torch.linspace(-1, 1, 64))
    out = head(torch.randn(3, 8, 7, 7))
    expected = torch.linspace(-1, 1, 64).clamp(min=0)[:, None, None].expand(3, -1, 7, 7)
    assert torch.allclose(out, expected)


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


@pytest.mark.parametrize("widths", [[512, 1024, 1024, 1024], [256] * 5])
def test_head_is_built_from_the_config(widths):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FeatureMapBoxHead"
    cfg.MODEL.ROI_BOX_HEAD.CONV_WIDTHS = widths
    cfg.MODEL.ROI_BOX_HEAD.NORM = "GN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    head = build_box_head(cfg, ShapeSpec(channels=256, height=7, width=7))
    convs = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == widths
    assert [conv.in_channels for conv in convs] == [256, *widths[:-1]]
    assert sum(isinstance(layer, nn.GroupNorm) for layer in head.modules()) == len(widths)
    predictor = PooledFastRCNNOutputLayers(cfg, head.output_shape)
    assert predictor.cls_score.weight.shape == (81, widths[-1])
    assert predictor.bbox_pred.weight.shape == (320, widths[-1])


@pytest.mark.parametrize("widths", [[], [64, 0]])
def test_bad_widths_are_named(widths):
    message = rf"CONV_WIDTHS is \[{', '.join(map(str, widths))}\]; .* each at least 1"
    with pytest.raises(ValueError, match=message):
        FeatureMapBoxHead(ROI_SHAPE, conv_widths=widths)


def test_predictor_needs_a_map():
    message = r"shape \(4, 8\), expected \(R, C, h, w\): .*FeatureMapBoxHead"
    with pytest.raises(ValueError, match=message):
        make_predictor()(torch.zeros(4, 8))


def test_two_branches_by_their_layers():
    head = TwoBranchBoxHead(ROI_SHAPE, conv_widths=[5, 12])
    assert head.output_shape == ShapeSpec(channels=12)
    shapes = {k: tuple(x.shape) for k, x in head.state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "shared.conv1.weight": (5, 8, 3, 3),
        "shared.conv2.weight": (12, 5, 3, 3),
        "class_branch.conv1.weight": (12, 12, 3, 3),
        "box_branch.conv1.weight": (12, 12, 3, 3),
        "box_branch.conv2.weight": (12, 12, 3, 3),
    }
    state = head.state_dict()

    def conv(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return nn.functional.conv2d(x, weight, bias, padding=1).relu()

    for x in head.parameters():
        if x.dim() == 1:  # biases start at 0
            nn.init.normal_(x)
    x = torch.randn(4, 8, 7, 7)
    shared = conv(conv(x, "shared.conv1"), "shared.conv2")
    class_maps, box_maps = head(x)
    assert torch.allclose(class_maps, conv(shared, "class_branch.conv1"), atol=1e-5)
    expected = conv(conv(shared, "box_branch.conv1"), "box_branch.conv2")
    assert torch.allclose(box_maps, expected, atol=1e-5)
    # The map of the classes alone does not need the box branch.
    head.box_branch = None
    assert torch.equal(head.class_maps(x), class_maps)


def test_scores_come_from_one_branch_and_deltas_from_the_other():
    predictor, maps = make_predictor(), torch.randn(2, 5, 8, 7, 7)
    scores, deltas, kept = predictor((maps[0], maps[1]))
    assert kept is not None and torch.equal(kept, maps[0])
    weight, bias = predictor.cls_score.weight, predictor.cls_score.bias
    assert torch.allclose(scores, maps[0].mean(dim=(2, 3)) @ weight.T + bias, atol=1e-5)
    weight, bias = predictor.bbox_pred.weight, predictor.bbox_pred.bias
    assert torch.allclose(deltas, maps[1].mean(dim=(2, 3)) @ weight.T + bias, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(5, 8\), expected .*TwoBranchBoxHead"):
        predictor((maps[0], maps[1].mean(dim=(2, 3))))


@pytest.mark.parametrize("norm", ["", "GN", "naiveSyncBN_N"])
@pytest.mark.parametrize("training", [True, False])
def test_two_branches_without_a_roi(norm, training):
    head = TwoBranchBoxHead(ROI_SHAPE, conv_widths=[32, 32], conv_norm=norm).train(training)
    predictor = make_predictor(channels=32)
    scores, deltas, maps = predictor(head(torch.zeros(0, 8, 7, 7)))
    assert deltas.shape == (0, 4 * NUM_CLASSES) and maps.shape == (0, 32, 7, 7)
    (scores.sum() + deltas.sum() + maps.sum()).backward()
    for name, parameter in [*head.named_parameters(), *predictor.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(torch.isfinite(x).all() for x in head.state_dict().values())


def test_two_branches_are_built_from_the_config():
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    path = Path(__file__).resolve().parents[2] / "configs/coco/contrastmask.yaml"
    cfg.merge_from_file(str(path))
    cfg.MODEL.ROI_BOX_HEAD.NORM = "GN"
    head = build_box_head(cfg, ShapeSpec(channels=256, height=7, width=7))
    # ContrastMask's: four, one and two convolutions of 256 channels.
    for branch, num_convs in ((head.shared, 4), (head.class_branch, 1), (head.box_branch, 2)):
        convs = [x for x in branch.modules() if isinstance(x, nn.Conv2d)]
        assert [tuple(x.weight.shape) for x in convs] == [(256, 256, 3, 3)] * num_convs
        assert sum(isinstance(x, nn.GroupNorm) for x in branch.modules()) == num_convs
    predictor = PooledFastRCNNOutputLayers(cfg, head.output_shape)
    assert set(predictor.state_dict()) == {
        f"{layer}.{x}" for layer in ("cls_score", "bbox_pred") for x in ("weight", "bias")
    }
    assert predictor.cls_score.weight.shape == (81, 256)
    assert predictor.bbox_pred.weight.shape == (320, 256)
    with pytest.raises(ValueError, match=r"CONV_WIDTHS is \[\]; .* each at least 1"):
        TwoBranchBoxHead(ROI_SHAPE, conv_widths=[])


@pytest.mark.parametrize("cls_agnostic_bbox_reg", [False, True])
def test_everything_but_the_maps_is_the_parents_on_pooled_features(cls_agnostic_bbox_reg):
    kwargs = {"cls_agnostic_bbox_reg": cls_agnostic_bbox_reg, "test_nms_thresh": 0.3}
    ours, parent = make_predictor(**kwargs), make_predictor(FastRCNNOutputLayers, **kwargs)
    assert set(ours.state_dict()) == set(parent.state_dict())
    parent.load_state_dict(ours.state_dict())
    sizes = [5, 0, 12]
    maps = torch.randn(17, 8, 7, 7)
    predictions, expected = ours(maps), parent(maps.sum(dim=(2, 3)) / 49)
    assert torch.equal(predictions[2], maps)
    for got, value in zip(predictions, expected):
        assert torch.allclose(got, value, atol=1e-6)
    expected = predictions[:2]

    proposals = proposals_with_gt(sizes)
    with EventStorage():
        assert ours.losses(predictions, proposals) == parent.losses(expected, proposals)
    for name in ("predict_boxes", "predict_boxes_for_gt_classes", "predict_probs"):
        got = getattr(ours, name)(predictions, proposals)
        values = getattr(parent, name)(expected, proposals)
        assert len(got) == 3
        assert all(torch.equal(a, b) for a, b in zip(got, values)), name

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


def test_losses_give_each_proposal_its_map():
    proposals = proposals_with_gt([2, 0, 3])
    maps = numbered_maps(5).requires_grad_()
    predictions = (torch.zeros(5, NUM_CLASSES + 1), torch.zeros(5, 4 * NUM_CLASSES), maps)
    with EventStorage():
        make_predictor().losses(predictions, proposals)
    assert [x.box_features[:, 1, 2, 2].tolist() for x in proposals] == [[0, 1], [], [2, 3, 4]]
    # The gradient finds its way back through the choice of ROIs.
    proposals[2][torch.tensor([False, True, False])].box_features.sum().backward()
    assert maps.grad.sum(dim=(1, 2, 3)).tolist() == [0, 0, 0, 18, 0]


def check_detections_have_the_map_of_their_proposal(sizes, odd_rows):
    """
    The deltas of x are 0, so a detection's x0 and x1 tell its proposal, hence the row of its map.

    ``odd_rows`` maps a row over the batch to what is not finite in it; see ODDITIES.
    """
    num_rows = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_rows, NUM_CLASSES + 1, generator=generator)
    deltas = torch.zeros(num_rows, 4 * NUM_CLASSES)
    for row, what in odd_rows.items():
        if what == "score":
            scores[row, 1] = float("nan")
        elif what == "delta":
            deltas[row, 3] = float("nan")
        elif what == "box":
            deltas[row, 0] = 3e38
        else:
            deltas[row, 3] = float("inf")
    proposals = proposals_with_gt(sizes)
    # NMS that removes nothing: every row that is left gives one detection for each class.
    predictor = make_predictor(test_nms_thresh=1.0, test_topk_per_image=-1)
    detections, kept = predictor.inference((scores, deltas, numbered_maps(num_rows)), proposals)
    assert len(detections) == len(kept) == len(sizes)
    start = 0
    for proposals_per_image, x, rows in zip(proposals, detections, kept):
        size = len(proposals_per_image)
        left = [i for i in range(size) if odd_rows.get(start + i, "height") == "height"]
        assert sorted(rows.tolist()) == sorted(left * NUM_CLASSES)
        boxes = proposals_per_image.proposal_boxes.tensor[rows]
        assert torch.allclose(x.pred_boxes.tensor[:, ::2], boxes[:, ::2], atol=1e-4)
        assert x.box_features.shape == (len(x), 2, 3, 3)
        expected = (start + rows).float()[:, None, None, None].expand(-1, 2, 3, 3)
        assert torch.equal(x.box_features, expected)
        assert torch.equal(x[x.scores > 0.3].box_features, expected[x.scores > 0.3])
        start += size


def test_inference_gives_each_detection_the_map_of_its_proposal():
    check_detections_have_the_map_of_their_proposal([2, 0, 5, 3], {})


def test_rows_that_are_not_finite_do_not_shift_the_others():
    # The parent counts its kept rows without the dropped ones.
    odd_rows = {0: "score", 1: "height", 4: "box", 5: "delta", 9: "score"}
    check_detections_have_the_map_of_their_proposal([3, 4, 3], odd_rows)


def test_only_rows_that_are_not_finite():
    check_detections_have_the_map_of_their_proposal([2, 1], {0: "score", 1: "delta", 2: "box"})


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.dictionaries(st.integers(0, 19), st.sampled_from(ODDITIES), max_size=8),
)
def test_rows_for_any_sizes(sizes, odd_rows):
    odd_rows = {row: what for row, what in odd_rows.items() if row < sum(sizes)}
    check_detections_have_the_map_of_their_proposal(sizes, odd_rows)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_proposal(sizes):
    predictor, proposals = make_predictor(), proposals_with_gt(sizes)
    predictions = predictor(torch.zeros(0, 8, 7, 7))
    detections, kept = predictor.inference(predictions, proposals)
    assert [len(rows) for rows in kept] == sizes
    assert [x.box_features.shape for x in detections] == [(0, 8, 7, 7)] * len(sizes)
    if sizes:
        # The parent has no losses of a batch without images.
        with EventStorage():
            losses = predictor.losses(predictions, proposals)
        assert [loss.item() for loss in losses.values()] == [0, 0]
        assert [x.box_features.shape for x in proposals] == [(0, 8, 7, 7)] * len(sizes)


both_heads = pytest.mark.parametrize("box_head", [FeatureMapBoxHead, TwoBranchBoxHead])


def heads_with_kept_maps(box_head=FeatureMapBoxHead, **kwargs):
    # Ours remove the maps when the mask branch has used them.
    heads = make_heads(StandardROIHeads, **kwargs)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=4)
    heads.box_head = box_head(shape, conv_widths=[32], conv_norm="GN")
    heads.box_predictor = make_predictor(channels=32, test_topk_per_image=5)
    return heads


def maps_at(heads, features, boxes):
    return heads.box_head.class_maps(heads.box_pooler([features["p2"]], boxes))


@both_heads
def test_roi_heads_train_with_the_map_of_each_proposal(box_head):
    heads, features = heads_with_kept_maps(box_head).train(), make_features(2)
    with EventStorage():
        proposals, losses = heads(make_images(2), features, plain_proposals(2), targets_of(MIXED))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    assert len(proposals[0]) != len(proposals[1])
    expected = maps_at(heads, features, [x.proposal_boxes for x in proposals])
    got = torch.cat([x.box_features for x in proposals])
    assert torch.allclose(got, expected, atol=1e-5)
    # What a mask loss does to them trains the box head and the backbone.
    (got * torch.randn_like(got)).sum().backward()
    assert features["p2"].grad.any()
    for name, parameter in heads.box_head.named_parameters():
        # The map is that of the classes: the branch of the box has no part in it.
        has_part = not name.startswith("box_branch")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == has_part, name


def test_roi_heads_train_on_predicted_boxes():
    heads, features = heads_with_kept_maps(train_on_pred_boxes=True).train(), make_features(2)
    seen = {}

    def keep(module, inputs, predictions):
        seen["predictions"] = predictions

    heads.box_predictor.register_forward_hook(keep)
    heads.box_pooler.register_forward_pre_hook(lambda _, inputs: seen.update(boxes=inputs[1]))
    with EventStorage():
        proposals, _ = heads(make_images(2), features, plain_proposals(2), targets_of(MIXED))
    scores, deltas, maps = seen["predictions"]
    assert torch.equal(torch.cat([x.box_features for x in proposals]), maps)
    # The box of the object's class; that of the last class for background.
    labels = torch.cat([x.gt_classes for x in proposals]).clamp(max=NUM_CLASSES - 1)
    deltas = torch.stack([row[4 * c : 4 * c + 4] for row, c in zip(deltas, labels.tolist())])
    boxes = torch.cat([x.tensor for x in seen["boxes"]])
    expected = Box2BoxTransform((10, 10, 5, 5)).apply_deltas(deltas, boxes)
    got = torch.cat([x.proposal_boxes.tensor for x in proposals])
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(got, boxes, atol=0.1)


@both_heads
def test_roi_heads_detect_with_the_map_of_each_proposal(box_head):
    heads, features = heads_with_kept_maps(box_head).eval(), make_features(2)
    proposals = plain_proposals(2)
    proposals[0] = proposals[0][:4]
    with torch.no_grad():
        detections, _ = heads(make_images(2), features, proposals)
        expected = maps_at(heads, features, [x.proposal_boxes for x in proposals]).split([4, 6])
    for x, maps in zip(detections, expected):
        assert len(x) == 5 and x.has("pred_masks")
        distance = (x.box_features[:, None] - maps[None]).abs().amax(dim=(2, 3, 4))
        # Each detection has one of its own image's maps, and its score is that map's.
        assert (distance.amin(dim=1) < 1e-5).all()
        probs = heads.box_predictor.cls_score(x.box_features.mean(dim=(2, 3))).softmax(dim=1)
        assert torch.allclose(probs[torch.arange(5), x.pred_classes], x.scores, atol=1e-5)
