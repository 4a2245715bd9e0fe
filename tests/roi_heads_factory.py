"""Very small ROI heads and inputs, built without a config, and what a prior gets of them."""

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    select_foreground_proposals,
)
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from teacher_student_mask import ImageMask, TeacherStudentROIHeads
from teacher_student_mask.modeling import MaskRCNNConvMultiUpsampleHead
from teacher_student_mask.modeling.priors import ROIContext
from teacher_student_mask.modeling.pseudo_masks import PseudoMaskGenerator

NUM_CLASSES, CHANNELS, SIZE, STRIDE = 3, 6, 64, 4


def mask_head(num_classes, num_deconv=1):
    shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
    return MaskRCNNConvMultiUpsampleHead(
        shape, num_classes=num_classes, conv_dims=[8, 8], num_deconv=num_deconv
    )


def make_heads(
    heads_class=TeacherStudentROIHeads,
    num_channels=NUM_CLASSES,
    teacher_deconv=1,
    method="interact",
    **kwargs,
):
    torch.manual_seed(0)
    box_head = FastRCNNConvFCHead(
        ShapeSpec(channels=CHANNELS, height=4, width=4), conv_dims=[], fc_dims=[16]
    )
    arguments = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 16,
        "positive_fraction": 0.5,
        "proposal_matcher": Matcher([0.5], [0, 1]),
        "box_in_features": ["p2"],
        "box_pooler": ROIPooler(4, (1 / STRIDE,), 0, "ROIAlignV2"),
        "box_head": box_head,
        "box_predictor": FastRCNNOutputLayers(
            box_head.output_shape,
            box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
            num_classes=NUM_CLASSES,
            test_score_thresh=0.0,
            test_topk_per_image=5,
        ),
        "mask_in_features": ["p2"],
        "mask_pooler": ROIPooler(14, (1 / STRIDE,), 0, "ROIAlignV2"),
        "mask_head": mask_head(num_channels),
    }
    if heads_class is not TeacherStudentROIHeads:
        return heads_class(**arguments | kwargs)
    arguments["teacher_mask_head"] = mask_head(1, teacher_deconv)
    kwargs.setdefault("pseudo_masks", PseudoMaskGenerator(method=method))
    kwargs.setdefault("warmup_iters", 0)
    heads = TeacherStudentROIHeads(**arguments, **kwargs)
    # The predictors start at almost 0: with larger weights the heads have opinions.
    for head in (heads.mask_head, heads.teacher_mask_head):
        torch.nn.init.normal_(head.predictor.weight, std=0.5)
    return heads


def make_features(num_images, seed=0):
    side = SIZE // STRIDE
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, CHANNELS, side, side, generator=generator)
    return {"p2": features.requires_grad_()}


def make_images(num_images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(num_images, 3, SIZE, SIZE, generator=generator)
    return ImageList(tensor, [(SIZE, SIZE)] * num_images)


def polygon_of(box, corner=False):
    x0, y0, x1, y1 = box
    points = [x0, y0, x1, y0, x0, y1] if corner else [x0, y0, x1, y0, x1, y1, x0, y1]
    return [np.array(points, dtype=np.float64)]


def make_targets(boxes, classes, has_mask, bitmask=False):
    """Targets of one image as the mapper makes them; masks are triangles, rectangles elsewhere."""
    targets = Instances((SIZE, SIZE))
    targets.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    targets.gt_classes = torch.tensor(classes, dtype=torch.int64)
    masks = PolygonMasks([polygon_of(b, corner=m) for b, m in zip(boxes, has_mask)])
    bits = (
        BitMasks.from_polygon_masks(masks, SIZE, SIZE)
        if boxes
        else BitMasks(torch.zeros(0, SIZE, SIZE))
    )
    targets.gt_masks = bits if bitmask else masks
    targets.gt_has_mask = torch.tensor(has_mask, dtype=torch.bool)
    union = bits.tensor[targets.gt_has_mask].any(dim=0)
    targets.gt_exclusion_masks = ImageMask(union, len(targets))
    return targets


def make_proposals(targets):
    """The foreground proposals a sampler would give: each object's box and a shifted one."""
    proposals = []
    for targets_per_image in targets:
        x = Instances((SIZE, SIZE))
        rows = torch.arange(len(targets_per_image)).repeat_interleave(2)
        boxes = targets_per_image.gt_boxes.tensor[rows].clone()
        boxes[1::2] += torch.tensor([2.0, -1.0, 1.0, 2.0])
        x.proposal_boxes = Boxes(boxes)
        x.objectness_logits = torch.zeros(len(rows))
        if len(rows) > 0:
            for name, value in targets_per_image.get_fields().items():
                x.set(name, value[rows])
        else:
            x.gt_classes = torch.zeros(0, dtype=torch.int64)
        proposals.append(x)
    return proposals


def plain_proposals(num_images, seed=0):
    """Boxes as an RPN gives them."""
    proposals = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_images):
        x = Instances((SIZE, SIZE))
        corner = torch.rand(6, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + 8 + 14 * torch.rand(6, 2, generator=generator)], 1)
        x.proposal_boxes = Boxes(boxes)
        x.objectness_logits = torch.zeros(6)
        proposals.append(x)
    return proposals


MIXED = [
    ([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [True, False]),
    ([[8, 10, 40, 30]], [1], [False]),
]
NONE_SEEN = [([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [False, False])]
NONE_UNSEEN = [([[4, 4, 30, 30], [20, 20, 50, 56]], [0, 2], [True, True])]
NO_OBJECT = [([], [], [])]
HALF_EMPTY = [([], [], []), ([[8, 10, 40, 30]], [1], [False])]


def targets_of(batch, bitmask=False):
    return [make_targets(*image, bitmask=bitmask) for image in batch]


# Of two images: a human mask, a model's, none; none, a model's.
WITH_MODEL_MASKS = [
    ([[4, 4, 30, 30], [20, 20, 50, 56], [6, 30, 34, 60]], [0, 2, 1], [True, False, False]),
    ([[8, 10, 40, 30], [30, 8, 60, 44]], [1, 0], [False, False]),
]


def triangle(box):
    """The upper left half of a box."""
    return polygon_of(box, corner=True)


def add_model_masks(targets, rows_of_images=None, shape=triangle):
    """Give objects of images, by default of WITH_MODEL_MASKS, a model's mask as the mapper does."""
    rows_of_images = {0: [1], 1: [1]} if rows_of_images is None else rows_of_images
    for number, x in enumerate(targets):
        rows = rows_of_images.get(number, [])
        x.gt_has_model_mask = torch.zeros(len(x), dtype=torch.bool)
        x.gt_has_model_mask[rows] = True
        for row in rows:
            polygons = shape(x.gt_boxes.tensor[row].tolist())
            if isinstance(x.gt_masks, PolygonMasks):
                x.gt_masks.polygons[row] = polygons
            else:
                masks = PolygonMasks([polygons])
                x.gt_masks.tensor[row] = BitMasks.from_polygon_masks(masks, SIZE, SIZE).tensor[0]
    return targets


def mask_losses(heads, targets, features=None, iteration=0):
    """Losses of the mask branch on the foreground proposals of targets, and what was logged."""
    heads.train()
    features = features or make_features(len(targets))
    proposals = make_proposals(targets)
    torch.manual_seed(0)
    with EventStorage(iteration) as storage:
        pixels = make_images(len(targets)).tensor
        losses = heads.compute_mask_losses(features, proposals, proposals, pixels)
        return losses, {k: v[0] for k, v in storage.latest().items()}


def whole_step(heads, targets, iteration=0, features=None):
    """Losses of a whole step, with sampling."""
    n = len(targets)
    with EventStorage(iteration):
        features = features or make_features(n)
        return heads.train()(make_images(n), features, plain_proposals(n), targets)[1]


def make_context(batch, num_background=1):
    """A prior's context; ``sampled`` has background before the foreground ROIs of each image."""
    sampled = []
    for rois in make_proposals(targets_of(batch)):
        # As Detectron2's sampler: background carries the other fields of any object.
        rows = torch.cat([torch.arange(len(rois))[:num_background], torch.arange(len(rois))])
        mixed = rois[rows]
        background = len(mixed) - len(rois) if len(rois) else num_background
        if not len(rois):
            mixed = Instances(rois.image_size)
            mixed.proposal_boxes = Boxes(torch.zeros(background, 4))
            mixed.gt_classes = torch.zeros(background, dtype=torch.int64)
        boxes = torch.tensor([[40.0, 2, 62, 20]]).expand(background, 4)
        mixed.proposal_boxes.tensor[:background] = boxes
        mixed.gt_classes[:background] = NUM_CLASSES
        sampled.append(mixed)
    instances, _ = select_foreground_proposals(sampled, NUM_CLASSES)
    return ROIContext(instances, [make_features(len(batch))["p2"]], sampled=sampled)


def mask_features_of(context, side):
    """Random pooled mask features of a context's ROIs, (R, CHANNELS, side, side)."""
    torch.manual_seed(1)
    num_rois = sum(len(x) for x in context.instances)
    return torch.randn(num_rois, CHANNELS, side, side, requires_grad=True)
