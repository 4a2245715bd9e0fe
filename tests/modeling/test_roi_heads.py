"""What both kinds of ROI heads learn from, and the batches that break others."""

import pytest
import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    HALF_EMPTY,
    MIXED,
    NO_OBJECT,
    NONE_SEEN,
    NONE_UNSEEN,
    WITH_MODEL_MASKS,
    add_model_masks,
    make_features,
    make_heads,
    make_images,
    make_proposals,
    mask_losses,
    plain_proposals,
    targets_of,
    whole_step,
)
from torch import nn

from teacher_student_mask import PartiallySupervisedROIHeads, TeacherStudentROIHeads
from teacher_student_mask.modeling.box_supervision import BoxSupervision
from teacher_student_mask.modeling.priors.opmask import ClassActivationPrior
from teacher_student_mask.modeling.pseudo_masks import PseudoMaskGenerator

BATCHES = {
    "mixed": MIXED,
    "none seen": NONE_SEEN,
    "none unseen": NONE_UNSEEN,
    "no object": NO_OBJECT,
    "half empty": HALF_EMPTY,
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("bitmask, on_gt_boxes", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("external", [None, "alone", "mean", "ignore"])
@pytest.mark.parametrize("iteration", [0, 10], ids=["warm-up", "after"])
def test_every_batch_gives_every_loss_and_all_parameters_a_gradient(
    batch, bitmask, on_gt_boxes, external, iteration
):
    """With ``external`` the last object of an image has a model's mask if it has no other."""
    rows = {k: [len(x[0]) - 1] for k, x in enumerate(batch) if x[2] and not x[2][-1]}
    settings = {"train_on_gt_boxes": on_gt_boxes}
    for heads in (
        make_heads(warmup_iters=10, external_masks=external or "alone", **settings),
        make_heads(PartiallySupervisedROIHeads, num_channels=1, **settings),
    ):
        targets = targets_of(batch, bitmask)
        if external is not None:
            add_model_masks(targets, rows)
        losses = whole_step(heads, targets, iteration)
        names = {"loss_cls", "loss_box_reg", "loss_mask"}
        if isinstance(heads, TeacherStudentROIHeads):
            names.add("loss_mask_teacher")
        assert set(losses) == names and all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_box_losses_use_all_objects_whether_they_have_a_mask_or_not():
    results = []
    for has_mask in (True, False):
        batch = [([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [has_mask] * 2)]
        heads = make_heads()
        torch.manual_seed(3)
        losses = whole_step(heads, targets_of(batch))
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
        losses, _ = mask_losses(heads, targets_of(batch, bitmask), features)
        pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
        with EventStorage():
            expected = mask_rcnn_loss(heads.mask_head.layers(pooled), rois)
            assert torch.equal(losses["loss_mask"], expected)
            if heads_class is TeacherStudentROIHeads:
                expected = mask_rcnn_loss(heads.teacher_mask_head.layers(pooled), rois)
                assert torch.equal(losses["loss_mask_teacher"], expected)


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
    # Of proposals there are no more than are sampled.
    assert len(train_step(make_heads(), [CROWD])[1][0]) <= 8
    # Without pseudo masks, and for the baseline, those with a mask.
    for heads in (
        make_heads(train_on_gt_boxes=True, warmup_iters=10),
        make_heads(PartiallySupervisedROIHeads, num_channels=1, train_on_gt_boxes=True),
    ):
        _, boxes = train_step(heads, batch)
        assert boxes == [[b for b, seen in zip(*image[::2]) if seen] for image in batch]


def test_box_losses_on_gt_boxes_are_of_all_objects_each_once():
    """Bug: they were of the objects with a sampled proposal, weighted by these proposals."""
    settings = {"num_channels": 1, "train_on_gt_boxes": True}
    targets, counts = targets_of([CROWD]), []
    plain = whole_step(make_heads(PartiallySupervisedROIHeads, **settings), targets)
    settings["box_supervision"] = BoxSupervision()
    heads = make_heads(PartiallySupervisedROIHeads, **settings)
    heads.mask_pooler.register_forward_hook(lambda m, args, out: counts.append(len(out)))
    losses = whole_step(heads, targets)
    assert counts == [4, 8]
    torch.testing.assert_close(losses["loss_mask"], plain["loss_mask"] * 4 / 12)


def test_the_prior_has_its_losses_once_of_the_rois_that_train_the_mask_heads():
    """Bug: with box supervision they were computed once more, and thrown away."""
    contexts = []

    class Prior(nn.Module):
        needs_class_maps = False

        def forward(self, mask_features, context):
            contexts.append(context)
            return mask_features, {}

    heads = make_heads(mask_prior=Prior(), box_supervision=BoxSupervision())
    whole_step(heads, targets_of(MIXED))
    assert [x.sampled is None for x in contexts] == [False, True]


def test_plain_mapper_targets_are_refused_with_the_remedy():
    heads = make_heads().train()
    targets = targets_of(NONE_UNSEEN)
    targets[0].remove("gt_has_mask")
    with EventStorage(), pytest.raises(ValueError, match="gt_has_mask.*TeacherStudentDataset"):
        heads(make_images(1), make_features(1), plain_proposals(1), targets)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="mask loss is 'focal'; allowed: 'bce', 'dice'"):
        make_heads(mask_loss="focal")
    with pytest.raises(ValueError, match="set MODEL.ROI_BOX_HEAD.NAME to .FeatureMapBoxHead"):
        make_heads(mask_prior=ClassActivationPrior())
    with pytest.raises(ValueError, match="TEST.MASK_HEAD is 'pupil'"):
        make_heads(test_mask_head="pupil")
    with pytest.raises(ValueError, match="EXTERNAL is 'both'; allowed: 'alone', 'mean', 'ignore'"):
        make_heads(external_masks="both")


def test_crf_sees_the_rgb_pixels_of_each_roi():
    calls = []

    def crf(probs, images):
        calls.append(images)
        return probs

    heads = make_heads(
        pseudo_masks=PseudoMaskGenerator(method="crf", crf=crf),
        pixel_mean=(10.0, 20.0, 30.0),
        pixel_std=(2.0, 2.0, 2.0),
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


@pytest.mark.parametrize("iteration, is_vis_iteration", [(4, False), (5, True)])
def test_pictures_of_unseen_rois_every_vis_period(iteration, is_vis_iteration, monkeypatch):
    heads = make_heads(vis_period=5, pixel_mean=(100.0,) * 3, pixel_std=(50.0,) * 3).train()
    with EventStorage(iteration) as storage:
        heads(make_images(2), make_features(2), plain_proposals(2), targets_of(MIXED))
    # At least the box of each of the two unseen objects is a foreground ROI.
    assert (len(storage._vis_data) >= 2) == is_vis_iteration
    with EventStorage(iteration) as of_another_rank, monkeypatch.context() as patch:
        patch.setattr("detectron2.utils.comm.get_rank", lambda: 1)  # which writes no pictures
        heads(make_images(2), make_features(2), plain_proposals(2), targets_of(MIXED))
    assert of_another_rank._vis_data == []
    for name, picture, _ in storage._vis_data:
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


def test_the_only_head_takes_masks_of_a_model_on_request_alone():
    """Then like ground truth: box losses, too, are of the objects without any mask."""

    def losses_of(targets, is_used):
        heads = make_heads(
            PartiallySupervisedROIHeads,
            num_channels=1,
            train_on_external_masks=is_used,
            box_supervision=BoxSupervision(warmup_iters=1),
        )
        return whole_step(heads, targets, iteration=5)

    human = losses_of(targets_of(WITH_MODEL_MASKS), False)
    ignored = losses_of(add_model_masks(targets_of(WITH_MODEL_MASKS)), False)
    assert ignored == human and human["loss_mask_projection"] > 0
    as_human = add_model_masks(targets_of(WITH_MODEL_MASKS))
    for x in as_human:
        x.gt_has_mask |= x.gt_has_model_mask
    used = losses_of(add_model_masks(targets_of(WITH_MODEL_MASKS)), True)
    expected = losses_of(as_human, False)
    assert used["loss_mask"] != human["loss_mask"]
    torch.testing.assert_close(used, expected)
