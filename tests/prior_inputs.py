"""What the ROI heads give to a mask prior in training, of the images of roi_heads_factory."""

import torch
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances
from roi_heads_factory import NUM_CLASSES, make_features, make_proposals, targets_of

from teacher_student_mask.modeling.priors import ROIContext


def make_context(batch, num_background=1):
    """A context whose ``sampled`` has background boxes before the foreground ROIs of each image."""
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
    features = make_features(len(batch))["p2"]
    return ROIContext(instances, [features], None, sampled)


def rows_of(context):
    """Number of ROIs of the mask heads."""
    return sum(len(x) for x in context.instances)
