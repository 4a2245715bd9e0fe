"""Why PSEUDO_MASK.WARMUP_ITERS exists: "interact" from the first iteration can die out."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from roi_heads_factory import CHANNELS, SIZE, STRIDE, make_heads

from teacher_student_mask import ImageMask
from teacher_student_mask.modeling.pseudo_masks import PseudoMaskGenerator

NUM_ITERS = 300


def make_batch(generator):
    """
    Two objects an image, class 0 with a mask and class 1 without, a sparse quarter of the box each.

    The features show the foreground weakly in one channel among noise, so a head first learns how
    rare foreground is, p < 0.5 everywhere, and only then where it is.
    """
    side = SIZE // STRIDE
    features = torch.randn(2, CHANNELS, side, side, generator=generator) * 0.3
    rois = []
    for image in range(2):
        masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
        boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [32.0, 32.0, 64.0, 64.0]])
        for k, (x0, y0, _, _) in enumerate(boxes.long().tolist()):
            dx, dy = torch.randint(0, 5, (2,), generator=generator).tolist()
            masks[k, y0 + 4 * dy : y0 + 4 * dy + 16, x0 + 4 * dx : x0 + 4 * dx + 16] = True
        features[image, 0] += 0.7 * masks.any(dim=0)[::STRIDE, ::STRIDE]
        x = Instances((SIZE, SIZE))
        x.proposal_boxes = x.gt_boxes = Boxes(boxes)
        x.gt_classes = torch.tensor([0, 1])
        x.gt_has_mask = torch.tensor([True, False])
        x.gt_masks = BitMasks(masks)
        x.gt_exclusion_masks = ImageMask(masks[0], 2)
        rois.append(x)
    return {"p2": features}, rois


def train(warmup_iters):
    """IoU of the pseudo masks with the hidden truth over the last iterations."""
    heads = make_heads(method="interact", warmup_iters=warmup_iters).train()
    for head in (heads.teacher_mask_head, heads.mask_head):
        torch.nn.init.normal_(head.predictor.weight, std=0.001)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    pseudo_masks = []
    heads.pseudo_masks = _Recorder(heads.pseudo_masks, pseudo_masks)
    ious = []
    for iteration in range(NUM_ITERS):
        features, rois = make_batch(generator)
        with EventStorage(iteration):
            losses = heads.compute_mask_losses(features, rois, rois)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if iteration >= NUM_ITERS - 20:
            truth = torch.cat([x.gt_masks[~x.gt_has_mask].tensor for x in rois])
            truth = torch.stack([truth[0, 32:, 32:], truth[1, 32:, 32:]]).float()
            truth = torch.nn.functional.interpolate(truth[:, None], size=28)[:, 0] > 0.5
            pseudo = pseudo_masks[-1] > 0.5
            ious.append(((pseudo & truth).sum() / (pseudo | truth).sum()).item())
    return sum(ious) / len(ious)


class _Recorder:
    needs_images = False

    def __init__(self, generator: PseudoMaskGenerator, log: list):
        self.generator, self.log = generator, log

    def __getattr__(self, name: str):
        return getattr(self.generator, name)

    def __call__(self, *args):
        self.log.append(self.generator(*args))
        return self.log[-1]


@pytest.mark.slow
@pytest.mark.parametrize("warmup_iters, survives", [(0, False), (225, True)])
def test_pseudo_masks_collapse_without_the_gate_and_not_with_it(warmup_iters, survives):
    iou = train(warmup_iters)
    assert (iou > 0.6) if survives else (iou < 0.05), iou
