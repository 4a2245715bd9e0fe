"""What reaches which mask head: losses, gradients, targets, and the batches that break others."""

import pytest
import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    HALF_EMPTY,
    MIXED,
    NO_OBJECT,
    NONE_SEEN,
    NONE_UNSEEN,
    make_features,
    make_heads,
    make_images,
    make_proposals,
    plain_proposals,
    targets_of,
)

from teacher_student_mask import PartiallySupervisedROIHeads, TeacherStudentROIHeads
from teacher_student_mask.modeling.mask_loss import select_label_channel
from teacher_student_mask.modeling.pseudo_mask import PseudoMaskGenerator
from teacher_student_mask.modeling.roi_pixels import InputPixels

BATCHES = {
    "mixed": MIXED,
    "none seen": NONE_SEEN,
    "none unseen": NONE_UNSEEN,
    "no object": NO_OBJECT,
    "half empty": HALF_EMPTY,
}


def mask_losses(heads, batch, features=None, iteration=0, bitmask=False):
    """Losses of the mask branch on given foreground proposals, and what was logged."""
    heads.train()
    features = features or make_features(len(batch))
    with EventStorage(iteration) as storage:
        losses = heads._forward_mask(features, make_proposals(targets_of(batch, bitmask)))
        return losses, {k: v[0] for k, v in storage.latest().items()}


def grads(loss, head):
    return torch.autograd.grad(loss, list(head.parameters()), allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("bitmask", [False, True], ids=["polygon", "bitmask"])
@pytest.mark.parametrize("iteration", [0, 10], ids=["warm-up", "after"])
def test_every_batch_gives_every_loss_with_all_parameters_attached(batch, bitmask, iteration):
    heads = make_heads(warmup_iters=10)
    losses, _ = mask_losses(heads, batch, iteration=iteration, bitmask=bitmask)
    assert set(losses) == {"loss_mask", "loss_mask_teacher"}
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        if "mask_head" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_whole_forward_with_sampling_gives_all_losses(batch):
    heads = make_heads().train()
    n = len(batch)
    with EventStorage():
        _, losses = heads(make_images(n), make_features(n), plain_proposals(n), targets_of(batch))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_mask_teacher"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_baseline_gives_its_loss_with_all_parameters_attached(batch):
    heads = make_heads(PartiallySupervisedROIHeads, num_channels=1)
    losses, _ = mask_losses(heads, batch)
    assert set(losses) == {"loss_mask"}
    losses["loss_mask"].backward()
    assert all(p.grad is not None for p in heads.mask_head.parameters())


def test_rois_without_a_mask_give_the_baseline_nothing():
    heads = make_heads(PartiallySupervisedROIHeads, num_channels=1)
    features = make_features(2)
    losses, _ = mask_losses(heads, MIXED, features)
    seen_only, _ = mask_losses(heads, [([[4, 4, 30, 30]], [0], [True]), ([], [], [])], features)
    torch.testing.assert_close(losses["loss_mask"], seen_only["loss_mask"])


def test_box_losses_use_all_objects_whether_they_have_a_mask_or_not():
    results = []
    for has_mask in (True, False):
        batch = [([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [has_mask] * 2)]
        heads = make_heads().train()
        torch.manual_seed(3)
        with EventStorage():
            _, losses = heads(
                make_images(1), make_features(1), plain_proposals(1), targets_of(batch)
            )
        results.append((losses["loss_cls"], losses["loss_box_reg"]))
    assert results[0] == results[1]


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("bitmask", [False, True], ids=["polygon", "bitmask"])
def test_losses_are_detectron2s_when_everything_is_seen(num_channels, bitmask):
    """Each head alone has Mask R-CNN's loss, both as the teacher-student pair and as baseline."""
    batch = NONE_UNSEEN
    features = make_features(1)
    rois = make_proposals(targets_of(batch, bitmask))
    for heads_class in (TeacherStudentROIHeads, PartiallySupervisedROIHeads):
        heads = make_heads(heads_class, num_channels=num_channels)
        losses, _ = mask_losses(heads, batch, features, bitmask=bitmask)
        pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
        with EventStorage():
            expected = mask_rcnn_loss(heads.mask_head.layers(pooled), rois)
            assert torch.equal(losses["loss_mask"], expected)
            if heads_class is TeacherStudentROIHeads:
                expected = mask_rcnn_loss(heads.teacher_mask_head.layers(pooled), rois)
                assert torch.equal(losses["loss_mask_teacher"], expected)


def test_rois_without_a_mask_give_the_teacher_nothing():
    """The teacher's gradient is that of a batch from which the unseen objects are removed."""
    heads = make_heads()
    features = make_features(2)
    losses, _ = mask_losses(heads, MIXED, features)
    seen_only = [([[4, 4, 30, 30]], [0], [True]), ([], [], [])]
    expected, _ = mask_losses(heads, seen_only, features)
    for got, want in zip(
        grads(sum(losses.values()), heads.teacher_mask_head),
        grads(expected["loss_mask_teacher"], heads.teacher_mask_head),
    ):
        torch.testing.assert_close(got, want)
    losses, _ = mask_losses(heads, NONE_SEEN)
    for got in grads(sum(losses.values()), heads.teacher_mask_head):
        assert not got.any()


def test_the_student_learns_the_label_channel_of_unseen_objects_and_no_other():
    heads = make_heads()
    losses, _ = mask_losses(heads, [([[8, 10, 40, 30]], [1], [False])])
    weight, bias = torch.autograd.grad(
        losses["loss_mask"],
        [heads.mask_head.predictor.weight, heads.mask_head.predictor.bias],
    )
    assert weight[1].any() and bias[1] != 0
    assert not weight[[0, 2]].any() and not bias[[0, 2]].any()


def test_pseudo_mask_losses_reach_the_features():
    heads = make_heads()
    features = make_features(1)
    losses, _ = mask_losses(heads, NONE_SEEN, features)
    losses["loss_mask"].backward()
    assert features["p2"].grad.any()


@pytest.mark.parametrize("method", ["none", "threshold", "interact", "box_fit"])
def test_student_loss_is_bce_to_gt_and_pseudo_masks(method):
    """Eq. (6), put together from the parts' own functions: one mean over all foreground ROIs."""
    heads = make_heads(method=method)
    features = make_features(2)
    losses, _ = mask_losses(heads, MIXED, features)
    rois = make_proposals(targets_of(MIXED))
    pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
    labels = torch.cat([x.gt_classes for x in rois])
    student = select_label_channel(heads.mask_head.layers(pooled), labels)
    teacher = heads.teacher_mask_head.layers(pooled)[:, 0]
    pseudo = PseudoMaskGenerator(method=method)(teacher.sigmoid(), student.sigmoid(), rois)
    gt = torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, 28).float() for x in rois])
    has_mask = torch.cat([x.gt_has_mask for x in rois])
    targets = torch.where(has_mask[:, None, None], gt, pseudo)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student, targets)
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_before_the_gate_the_student_learns_from_masks_alone():
    heads = make_heads(warmup_iters=100)
    features = make_features(2)
    early, logged = mask_losses(heads, MIXED, features, iteration=99)
    seen_only, _ = mask_losses(
        heads, [([[4, 4, 30, 30]], [0], [True]), ([], [], [])], features, iteration=99
    )
    torch.testing.assert_close(early["loss_mask"], seen_only["loss_mask"])
    assert "pseudo_mask/fg_ratio" not in logged
    late, logged = mask_losses(heads, MIXED, features, iteration=100)
    assert late["loss_mask"] != early["loss_mask"]
    assert 0 <= logged["pseudo_mask/fg_ratio"] <= 1
    assert 0 <= logged["pseudo_mask/agreement"] <= 1
    assert logged["pseudo_mask/num_rois"] == 4


def rows_of(head):
    """Numbers of ROIs of each of the next calls of a mask head, with whether gradient is on."""
    calls = []
    forward = head.layers

    def layers(features):
        calls.append((len(features), torch.is_grad_enabled()))
        return forward(features)

    # An attribute on top of the method: the head then computes all channels, too.
    head.layers = layers
    return calls


def test_no_head_runs_on_what_adds_nothing_to_its_loss():
    heads = make_heads(warmup_iters=10)
    teacher, student = rows_of(heads.teacher_mask_head), rows_of(heads.mask_head)
    # MIXED has 2 ROIs with a mask and 4 without.
    mask_losses(heads, MIXED, iteration=9)
    assert teacher == [(2, True)] and student == [(2, True)]
    teacher.clear(), student.clear()
    mask_losses(heads, MIXED, iteration=10)
    assert teacher == [(2, True), (4, False)] and student == [(6, True)]


def test_the_teachers_logits_keep_the_order_of_the_rois():
    heads = make_heads()
    rois = make_proposals(targets_of(MIXED))
    has_mask = torch.cat([x.gt_has_mask for x in rois])
    assert has_mask.any() and not has_mask.all()
    features = make_features(2)
    in_parts, student, _ = heads.compute_mask_logits(features, rois, has_mask)
    at_once, same_student, _ = heads.compute_mask_logits(features, rois)
    torch.testing.assert_close(in_parts, at_once)
    assert torch.equal(student, same_student)
    weight = torch.randn(in_parts.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(heads.teacher_mask_head.parameters())
    for got, want in zip(
        torch.autograd.grad((in_parts * weight).sum(), parameters),
        torch.autograd.grad((at_once * weight * has_mask[:, None, None]).sum(), parameters),
    ):
        torch.testing.assert_close(got, want)


def test_with_batch_statistics_all_rois_are_one_batch():
    heads = make_heads(warmup_iters=10)
    heads.teacher_mask_head.mask_fcn1.norm = torch.nn.BatchNorm2d(8)
    rows = rows_of(heads.teacher_mask_head)
    for iteration in (9, 10):
        mask_losses(heads, MIXED, iteration=iteration)
    assert rows == [(6, True), (6, True)]


@pytest.mark.parametrize("limit, num_without_mask", [(0, 4), (1, 2), (3, 4)])
def test_rois_without_a_mask_can_be_capped_per_image(limit, num_without_mask):
    """MIXED has two images with two ROIs without a mask each."""
    heads = make_heads(max_rois_without_mask=limit)
    _, logged = mask_losses(heads, MIXED)
    assert logged["pseudo_mask/num_rois"] == num_without_mask
    with pytest.raises(ValueError, match="MAX_ROIS_PER_IMAGE must be 0 .all. or more, got -1"):
        make_heads(max_rois_without_mask=-1)


def test_a_56_cell_teacher_learns_at_56_and_teaches_at_28():
    heads = make_heads(teacher_deconv=2, method="threshold")
    rois = make_proposals(targets_of(NONE_UNSEEN))
    features = make_features(1)
    losses, _ = mask_losses(heads, NONE_UNSEEN, features)
    pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
    logits = heads.teacher_mask_head.layers(pooled)
    assert logits.shape[-2:] == (56, 56)
    with EventStorage():
        assert torch.equal(losses["loss_mask_teacher"], mask_rcnn_loss(logits, rois))
    losses, _ = mask_losses(heads, MIXED)
    assert losses["loss_mask"].isfinite()


def test_loss_weights_are_applied():
    heads = make_heads()
    plain, _ = mask_losses(heads, MIXED)
    heads.teacher_mask_head.loss_weight, heads.mask_head.loss_weight = 3.0, 0.5
    weighted, _ = mask_losses(heads, MIXED)
    torch.testing.assert_close(weighted["loss_mask_teacher"], 3 * plain["loss_mask_teacher"])
    torch.testing.assert_close(weighted["loss_mask"], 0.5 * plain["loss_mask"])


# More objects than the sampler of these heads, 8 foreground ROIs of an image at most, has room for.
CROWD = [
    [[4 + 14 * x, 4 + 18 * y, 14 + 14 * x, 18 + 18 * y] for x in range(4) for y in range(3)],
    [k % 3 for k in range(12)],
    [k % 3 == 0 for k in range(12)],
]


def train_step(heads, batch, bitmask=False):
    """Losses of a step with sampling, and the boxes that the mask heads' features are pooled at."""
    n, pooled_boxes = len(batch), []
    heads.train()
    hook = heads.mask_pooler.register_forward_hook(
        lambda m, args, out: pooled_boxes.append([x.tensor.tolist() for x in args[1]])
    )
    with EventStorage():
        targets = targets_of(batch, bitmask)
        _, losses = heads(make_images(n), make_features(n), plain_proposals(n), targets)
    hook.remove()
    (boxes,) = pooled_boxes
    return losses, boxes


def test_train_on_gt_boxes_uses_every_object_once_at_its_own_box():
    """Once only the objects with a sampled proposal were used: in crowds a random part of them."""
    heads = make_heads(train_on_gt_boxes=True)
    batch = [CROWD, *NO_OBJECT, *MIXED]
    _, boxes = train_step(heads, batch)
    assert boxes == [image[0] for image in batch]
    # Without pseudo masks, and for the baseline, those with a mask.
    for heads in (
        make_heads(train_on_gt_boxes=True, warmup_iters=10),
        make_heads(PartiallySupervisedROIHeads, num_channels=1, train_on_gt_boxes=True),
    ):
        _, boxes = train_step(heads, batch)
        assert boxes == [[b for b, seen in zip(*image[::2]) if seen] for image in batch]


@pytest.mark.parametrize("bitmask", [False, True], ids=["polygon", "bitmask"])
def test_loss_on_gt_boxes_is_detectron2s_on_the_targets(bitmask):
    batch = [[CROWD[0], CROWD[1], [True] * 12]]
    rois = targets_of(batch, bitmask)
    rois[0].proposal_boxes = rois[0].gt_boxes
    for heads_class in (TeacherStudentROIHeads, PartiallySupervisedROIHeads):
        heads = make_heads(heads_class, train_on_gt_boxes=True)
        losses, _ = train_step(heads, batch, bitmask)
        pooled = heads.mask_pooler([make_features(1)["p2"]], [x.proposal_boxes for x in rois])
        with EventStorage():
            expected = mask_rcnn_loss(heads.mask_head.layers(pooled), rois)
            torch.testing.assert_close(losses["loss_mask"], expected)
            if heads_class is TeacherStudentROIHeads:
                expected = mask_rcnn_loss(heads.teacher_mask_head.layers(pooled), rois)
                torch.testing.assert_close(losses["loss_mask_teacher"], expected)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("bitmask", [False, True], ids=["polygon", "bitmask"])
def test_train_on_gt_boxes_with_batches_that_lack_something(batch, bitmask):
    for heads in (
        make_heads(train_on_gt_boxes=True),
        make_heads(PartiallySupervisedROIHeads, num_channels=1, train_on_gt_boxes=True),
    ):
        losses, _ = train_step(heads, batch, bitmask)
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize("limit", [1, 3])
def test_the_cap_of_rois_without_a_mask_counts_on_gt_boxes_too(limit):
    heads = make_heads(train_on_gt_boxes=True, max_rois_without_mask=limit)
    _, (crowd, empty, single) = train_step(heads, [CROWD, *NO_OBJECT, MIXED[1]])
    with_mask = [b for b, seen in zip(*CROWD[::2]) if seen]
    assert len(crowd) == len(with_mask) + limit and all(b in crowd for b in with_mask)
    assert empty == [] and single == MIXED[1][0]


def test_without_train_on_gt_boxes_the_mask_heads_see_sampled_proposals():
    _, (boxes,) = train_step(make_heads(), [CROWD])
    assert len(boxes) <= 8


@pytest.mark.parametrize("test_mask_head", ["student", "teacher"])
def test_inference_runs_the_chosen_head_only(test_mask_head):
    heads = make_heads(test_mask_head=test_mask_head).eval()
    other = heads.teacher_mask_head if test_mask_head == "student" else heads.mask_head

    def fail(*args):
        raise AssertionError("this head must not run at inference")

    other.layers = fail
    with torch.no_grad():
        instances, _ = heads(make_images(2), make_features(2), plain_proposals(2))
    assert all(x.pred_masks.shape == (5, 1, 28, 28) for x in instances)


def test_inference_takes_the_predicted_classes_channel():
    heads = make_heads().eval()
    features = make_features(1)
    given = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[4.0, 4.0, 30.0, 30.0]] * 2)))
    given.pred_classes = torch.tensor([2, 0])
    with torch.no_grad():
        pooled = heads.mask_pooler([features["p2"]], [given.pred_boxes])
        expected = heads.mask_head.layers(pooled)[torch.arange(2), given.pred_classes].sigmoid()
        (result,) = heads.forward_with_given_boxes(features, [given])
    torch.testing.assert_close(result.pred_masks[:, 0], expected)


def test_inference_without_detections():
    heads = make_heads().eval()
    empty = Instances((64, 64), pred_boxes=Boxes(torch.zeros(0, 4)))
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    (result,) = heads.forward_with_given_boxes(make_features(1), [empty])
    assert result.pred_masks.shape == (0, 1, 28, 28)


def test_plain_mapper_targets_are_refused_with_the_remedy():
    heads = make_heads().train()
    for missing in ("gt_masks", "gt_has_mask"):
        targets = targets_of(NONE_UNSEEN)
        targets[0].remove(missing)
        with EventStorage(), pytest.raises(ValueError, match=f"{missing}.*TeacherStudentDataset"):
            heads(make_images(1), make_features(1), plain_proposals(1), targets)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="TEST.MASK_HEAD is 'pupil'"):
        make_heads(test_mask_head="pupil")
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'YUV-BT.601'"):
        InputPixels(image_format="YUV-BT.601")


def test_crf_sees_the_rgb_pixels_of_each_roi():
    calls = []

    def crf(probs, images):
        calls.append(images)
        return probs

    heads = make_heads(
        pseudo_masks=PseudoMaskGenerator(method="crf", crf=crf),
        pixels=InputPixels((10.0, 20.0, 30.0), (2.0, 2.0, 2.0), "BGR"),
    ).train()
    images = make_images(1)
    images.tensor[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]  # B, G, R as the model sees it
    with EventStorage():
        heads(images, make_features(1), plain_proposals(1), targets_of(NONE_SEEN))
    (pixels,) = calls
    assert pixels.shape[1:] == (3, 28, 28)
    # R = 3 * 2 + 30, G = 2 * 2 + 20, B = 1 * 2 + 10; the boxes lie well inside the image.
    for channel, value in enumerate((36.0, 24.0, 12.0)):
        assert pixels[:, channel].allclose(torch.tensor(value))


class RecordingStorage(EventStorage):
    """An event storage that keeps its pictures where a test can see them."""

    def __init__(self, iteration):
        super().__init__(iteration)
        self.pictures = {}

    def put_image(self, img_name, img_tensor):
        self.pictures[img_name] = img_tensor


@pytest.mark.parametrize("iteration, is_vis_iteration", [(4, False), (5, True)])
def test_pictures_of_unseen_rois_every_vis_period(iteration, is_vis_iteration):
    heads = make_heads(vis_period=5, pixels=InputPixels((100.0,) * 3, (50.0,) * 3)).train()
    with RecordingStorage(iteration) as storage:
        heads(make_images(2), make_features(2), plain_proposals(2), targets_of(MIXED))
    # At least the box of each of the two unseen objects is a foreground ROI.
    assert (len(storage.pictures) >= 2) == is_vis_iteration
    for name, picture in storage.pictures.items():
        assert "image | teacher | student | target" in name
        assert picture.shape == (3, 112, 4 * 112)
        assert 0 <= picture.min() and picture.max() <= 1
        target = picture[0, :, 3 * 112 :]
        assert ((target == 0) | (target == 1)).all()


def test_stock_mask_rcnn_weights_load_into_the_student():
    stock = make_heads(StandardROIHeads).state_dict()
    heads = make_heads()
    result = heads.load_state_dict(stock, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("teacher_mask_head.") for key in result.missing_keys)
    assert torch.equal(heads.mask_head.predictor.weight, stock["mask_head.predictor.weight"])


def test_scrambled_unseen_masks_change_no_loss_and_no_gradient():
    """Bit for bit, even if an unseen object's mask did get as far as the ROI heads."""
    results = []
    for scrambled in (False, True):
        heads = make_heads().train()
        features = make_features(2)
        targets = targets_of(MIXED, bitmask=True)
        if scrambled:
            for x in targets:
                unseen = x.gt_masks.tensor[~x.gt_has_mask]
                noise = torch.rand(unseen.shape, generator=torch.Generator().manual_seed(1)) < 0.5
                x.gt_masks.tensor[~x.gt_has_mask] = noise
        torch.manual_seed(0)
        with EventStorage():
            _, losses = heads(make_images(2), features, plain_proposals(2), targets)
        sum(losses.values()).backward()
        gradients = [p.grad for p in heads.parameters()] + [features["p2"].grad]
        results.append((losses, gradients))
    (losses, gradients), (scrambled_losses, scrambled_gradients) = results
    assert all(torch.equal(losses[k], scrambled_losses[k]) for k in losses)
    assert all(torch.equal(a, b) for a, b in zip(gradients, scrambled_gradients))
