"""CondInst (Tian et al., ECCV 2020), with box supervision BoxInst, and the paper's pair on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    build_backbone,
    detector_postprocess,
)
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from ..box_supervision import BoxSupervision
from ..mask_targets import (
    MASK_LOSSES,
    check_choice,
    check_targets,
    mask_accuracy,
    put_scalars,
    to_rgb,
)
from ..pair import TeacherStudentPair
from .fcos import FCOS
from .masks import Controller, MaskBranch, aligned_bilinear, features_at, predict_planes
from .planes import box_losses, make_student_planes
from .targets import Grid, PlaneTargets, assign_objects, make_plane_targets

__all__ = [
    "CondInst",
    "CondInstHeads",
    "Locations",
    "TeacherStudentCondInst",
    "TeacherStudentCondInstHeads",
]

# Cells along each side of a box, where masks leave the model without postprocessing.
_ROI_SIDE = 56
# Masks that are brought to the size of their image together.
_CHUNK = 16


@dataclass(frozen=True)
class Locations:
    """
    R locations of a batch, and what the controllers see there.

    Attributes:
        images: int64, shape (R,): positions in the batch.
        points, scales: shapes (R, 2) and (R,), see :func:`predict_planes`.
        tower_features: shape (R, D * 9), see :func:`features_at`.
    """

    images: torch.Tensor
    points: torch.Tensor
    scales: torch.Tensor
    tower_features: torch.Tensor


class CondInstHeads(nn.Module):
    """
    All of :class:`CondInst` above the backbone, in the form of Detectron2's ROI heads.

    Objects with a mask learn by Dice, the others by BoxInst's losses if there is box supervision.
    Dice and projection divide by the number of selected locations of the process; the pairwise loss
    is a mean over pairs, times the share of the locations whose object has no mask.
    """

    heads_at_test = ("student",)

    @configurable
    def __init__(
        self,
        *,
        box_predictor: FCOS,
        mask_branch: MaskBranch,
        mask_head: Controller,
        stride: int = 4,
        max_locations: int = 64,
        train_on_external_masks: bool = False,
        box_supervision: BoxSupervision | None = None,
        mask_loss: str = "dice",
    ):
        """
        Args:
            box_predictor: detects.
            mask_branch: makes the features of the masks.
            mask_head: makes the weights of the masks' layers.
            stride: of the masks' planes in pixels; that of the branch is a multiple of it.
            max_locations: of an image that train the masks, an equal number of each object, those
                with the highest product of class probability and centreness; one at least, so an
                image with many objects takes more memory.
            train_on_external_masks: take masks that another model made as ground truth, too.
            box_supervision: losses of locations whose object has no mask.
            mask_loss: of those whose object has one, "dice" or "bce".

        Raises:
            ValueError: an unknown loss, or a stride that does not divide that of the branch.
        """
        super().__init__()
        check_choice("The mask loss", mask_loss, tuple(MASK_LOSSES))
        if mask_branch.strides[0] % stride:
            raise ValueError(
                f"MODEL.CONDINST.STRIDE {stride} does not divide {mask_branch.strides[0]}, the "
                f"stride of {mask_branch.in_features[0]} (MODEL.CONDINST.IN_FEATURES)."
            )
        self.box_predictor, self.mask_branch = box_predictor, mask_branch
        self.mask_head = mask_head
        self.stride, self.max_locations = stride, max_locations
        self.train_on_external_masks = train_on_external_masks
        self.box_supervision = box_supervision
        self.mask_loss = MASK_LOSSES[mask_loss]
        self.mask_on = True  # GeneralizedRCNNWithTTA switches it

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        check_choice("TEST.MASK_HEAD", cfg.TEST.MASK_HEAD, cls.heads_at_test)
        check_choice("BOX_SUPERVISION.NAME", cfg.MODEL.BOX_SUPERVISION.NAME, ("", "boxinst"))
        box_predictor = FCOS(cfg, input_shape)
        ret = {
            "box_predictor": box_predictor,
            "mask_branch": MaskBranch(cfg, input_shape),
            "mask_head": Controller(input_shape[box_predictor.in_features[0]].channels),
            "stride": cfg.MODEL.CONDINST.STRIDE,
            "max_locations": cfg.MODEL.CONDINST.MAX_LOCATIONS,
            "train_on_external_masks": cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS,
            "mask_loss": cfg.MODEL.BOX_SUPERVISION.MASK_LOSS,
        }
        if cfg.MODEL.BOX_SUPERVISION.NAME:
            ret["box_supervision"] = BoxSupervision.from_config(cfg)
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        targets: list[Instances] | None = None,
        pixels: torch.Tensor | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: of the model, padded.
            features: of the backbone.
            targets: in training, of :class:`TeacherStudentDatasetMapper`.
            pixels: in training, shape (N, 3, H, W), RGB in 0-255.

        Returns:
            In training nothing and the losses; else, of each image, the detections with
            ``pred_masks``, probabilities of shape (n, 1, M, M) over the boxes, and ``pred_planes``,
            shape (n, h, w), over the padded image; and no losses.
        """
        output = self.box_predictor(features)
        grid = output.grid
        if not self.training:
            found = self.box_predictor.detect(output, images.image_sizes)
            for x in found:  # before their masks, as those of Mask R-CNN
                x.pred_boxes.clip(x.image_size)
            return self._add_masks(found, features, grid, output.towers), {}
        check_targets(targets)
        supervision = self.box_supervision or BoxSupervision()
        size, valid_sizes = images.tensor.shape[-2:], supervision.valid_sizes(targets)
        planes = make_plane_targets(targets, size, self.stride, valid_sizes)
        objects = []
        for i in range(len(targets)):
            rows = (planes.images == i).nonzero()[:, 0]
            boxes, centres = planes.boxes[rows], planes.centres[rows]
            sizes, radius = self.box_predictor.sizes, self.box_predictor.centre_radius
            own = assign_objects(grid, boxes, centres, sizes, radius)
            # To rows of the batch: those of an image follow one another.
            objects.append(own + (own >= 0) * rows.min() if len(rows) > 0 else own)
        objects = torch.stack(objects)
        losses = self.box_predictor.losses(output, objects, planes.boxes, planes.classes)
        scores = self.box_predictor.scores(output).amax(2)
        image, index = _select(scores, objects, self.max_locations)
        chosen = self._locations(grid, output.towers, image, index)
        mask_features = self.mask_branch(features)
        losses.update(
            self.compute_mask_losses(mask_features, chosen, objects[image, index], planes, pixels)
        )
        return [], losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add masks, as :meth:`forward` does, to ``pred_boxes`` and ``pred_classes``."""
        grid, towers = self.box_predictor.box_towers(features)
        for x in instances:
            x.locations = self.box_predictor.locate(grid, x.pred_boxes.tensor)
        return self._add_masks(instances, features, grid, towers)

    def compute_mask_losses(
        self,
        mask_features: torch.Tensor,
        chosen: Locations,
        objects: torch.Tensor,
        targets: PlaneTargets,
        pixels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        "loss_mask", and the losses of box supervision.

        Args:
            mask_features: of the mask branch.
            chosen, objects: R locations, and the row of ``targets`` that each should segment.
            targets, pixels: see :func:`box_losses`.
        """
        is_supervised = targets.has_mask
        if self.train_on_external_masks:
            is_supervised = is_supervised | targets.has_model_mask
        logits = self._predict(self.mask_head, mask_features, chosen, targets.classes[objects])
        put_scalars({"mask_head/accuracy": _accuracy(logits, targets, objects)})
        return self._losses_of("loss_mask", logits, objects, is_supervised, targets, pixels)

    def _losses_of(
        self,
        name: str,
        logits: torch.Tensor,
        objects: torch.Tensor,
        is_supervised: torch.Tensor,
        targets: PlaneTargets,
        pixels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        has_mask = is_supervised[objects]
        loss = self.mask_loss(logits, targets.masks[objects].to(logits.dtype), has_mask)
        if self.box_supervision is None:
            return {name: loss}
        share = has_mask.sum() / max(len(has_mask), 1)
        rows = (~has_mask).nonzero()[:, 0]
        iteration = get_event_storage().iter
        own = (logits[rows], objects[rows], targets, pixels, self.stride)
        others = box_losses(*own, self.box_supervision, iteration)
        return {name: loss * share} | {k: x * (1 - share) for k, x in others.items()}

    def _locations(
        self, grid: Grid, towers: Sequence[torch.Tensor], image: torch.Tensor, index: torch.Tensor
    ) -> Locations:
        sizes = self.box_predictor.sizes
        scales = grid.points.new_tensor([*sizes, 2 * sizes[-1]])[grid.levels[index]]
        own = features_at(towers, grid, image, index)
        return Locations(image, grid.points[index], scales, own)

    def _predict(
        self, head: Controller, mask_features: torch.Tensor, where: Locations, classes: torch.Tensor
    ) -> torch.Tensor:
        parameters = head(where.tower_features, classes)
        stride = self.mask_branch.strides[0]
        own = (where.images, where.points, where.scales)
        return predict_planes(parameters, mask_features, *own, stride, stride // self.stride)

    def _head_at_test(self) -> Controller:
        return self.mask_head

    def _add_masks(
        self,
        found: list[Instances],
        features: dict[str, torch.Tensor],
        grid: Grid,
        towers: Sequence[torch.Tensor],
    ) -> list[Instances]:
        if self.mask_on:
            mask_features, head = self.mask_branch(features), self._head_at_test()
            crop = ROIAlign((_ROI_SIDE, _ROI_SIDE), 1 / self.stride, 0, aligned=True)
            # A cell stands for the pixel stride // 2 after its first; for ROIAlign, for its middle.
            shift = self.stride // 2 + 0.5 - self.stride / 2
            for i, x in enumerate(found):
                image = torch.full_like(x.locations, i)
                where = self._locations(grid, towers, image, x.locations)
                x.pred_planes = self._predict(head, mask_features, where, x.pred_classes).sigmoid()
                rows = torch.arange(x.locations.shape[0], device=image.device)[:, None]
                rois = torch.cat([rows.to(where.points.dtype), x.pred_boxes.tensor - shift], dim=1)
                x.pred_masks = crop(x.pred_planes[:, None].float(), rois.float())
        for x in found:
            x.remove("locations")
        return found


class TeacherStudentCondInstHeads(TeacherStudentPair, CondInstHeads):
    """
    A class-agnostic teacher and a student whose masks know the class, at the same locations.

    The teacher is CondInst as it is, with all its losses, box supervision included (Sec. 4.3 of the
    paper). The paper does not say what the student is. Our reading, after the class-specific last
    layer of a mask head: a second controller on the same features, of which the last layer's
    weights come from weights of the object's class. Only the student runs at inference.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        ret = super().from_config(cfg, input_shape)
        channels = input_shape[ret["box_predictor"].in_features[0]].channels
        layers = cfg.MODEL.CONDINST.CLASS_SPECIFIC_LAYERS
        check_choice("MODEL.CONDINST.CLASS_SPECIFIC_LAYERS", layers, ("last", "all"))
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        student = Controller(channels, num_classes, all_layers=layers == "all")
        return ret | {"teacher_mask_head": ret["mask_head"], "mask_head": student}

    def compute_mask_losses(
        self,
        mask_features: torch.Tensor,
        chosen: Locations,
        objects: torch.Tensor,
        targets: PlaneTargets,
        pixels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """As the parent's, with "loss_mask_teacher"; "loss_mask" is the student's."""
        classes = targets.classes[objects]
        heads = (self.teacher_mask_head, self.mask_head)
        teacher, student = (self._predict(x, mask_features, chosen, classes) for x in heads)
        planes, has_target, scalars = make_student_planes(
            teacher.detach(),
            student.detach(),
            objects,
            targets,
            self.pseudo_masks,
            external=self.external_masks,
            has_pseudo_masks=self._has_pseudo_masks(),
            pixels=pixels,
            stride=self.stride,
        )
        scalars["teacher_mask/accuracy"] = _accuracy(teacher, targets, objects)
        scalars["student_mask/accuracy"] = _accuracy(student, targets, objects)
        put_scalars(scalars)
        if self._is_vis_iteration():
            # The first location of each of up to 8 objects.
            is_first = ~(objects[:, None] == objects).tril(-1).any(1)
            rows = (is_first & ~targets.has_mask[objects]).nonzero()[:8, 0]
            images = F.avg_pool2d(pixels, self.stride)[chosen.images[rows]] / 255
            masks = [x[rows] for x in (teacher.sigmoid(), student.sigmoid(), planes)]
            self._put_pictures("objects", images, masks)
        own = (objects, targets.has_mask, targets, pixels)
        losses = self._losses_of("loss_mask_teacher", teacher, *own)
        return {"loss_mask": self.student_loss(student, planes, has_target), **losses}


@META_ARCH_REGISTRY.register()
class CondInst(GeneralizedRCNN):
    """
    Instance segmentation without ROIs: FCOS detects, and a mask head made for each object runs on
    features of the whole image. With ``MODEL.BOX_SUPERVISION.NAME "boxinst"`` it is BoxInst.

    The interface is that of :class:`GeneralizedRCNN`, with all but the backbone in ``roi_heads``.
    """

    heads_class = CondInstHeads

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if not cfg.MODEL.MASK_ON:
            raise ValueError(f"{cls.__name__} needs MODEL.MASK_ON True.")
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": None,
            "roi_heads": cls.heads_class(cfg, backbone.output_shape()),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]):
        """As :meth:`GeneralizedRCNN.forward`."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        pixels = to_rgb(images.tensor, self.pixel_mean, self.pixel_std, self.input_format)
        _, losses = self.roi_heads(images, self.backbone(images.tensor), targets, pixels)
        return losses

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """
        As :meth:`GeneralizedRCNN.inference`. With ``do_postprocess`` a mask may leave its box, as
        in the official code; without, ``pred_masks`` are cut to the boxes.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if detected_instances is None:
            results, _ = self.roi_heads(images, features)
        else:
            given = [x.to(self.device) for x in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, given)
        if not do_postprocess:
            return results
        outputs = []
        for x, inputs, size in zip(results, batched_inputs, images.image_sizes):
            new_size = inputs.get("height", size[0]), inputs.get("width", size[1])
            x.remove("pred_masks")
            x = detector_postprocess(x, *new_size)
            stride = self.roi_heads.stride
            x.pred_masks = _to_image(x.pred_planes, stride, size, new_size)
            x.remove("pred_planes")
            outputs.append({"instances": x})
        return outputs


@META_ARCH_REGISTRY.register()
class TeacherStudentCondInst(CondInst):
    """:class:`CondInst` with the paper's pair; with box supervision "BoxInst + ours"."""

    heads_class = TeacherStudentCondInstHeads


def _select(
    scores: torch.Tensor, objects: torch.Tensor, max_locations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the selected entries of ``objects``, (N, L), with ``scores``, (N, L)."""
    images, indices = [], []
    for i, (own_scores, own) in enumerate(zip(scores, objects)):
        index = (own >= 0).nonzero()[:, 0]
        index = index[own_scores[index].argsort(descending=True, stable=True)]
        index = index[own[index].argsort(stable=True)]
        counts = own[index].unique_consecutive(return_counts=True)[1]
        rank = torch.arange(len(index), device=index.device)
        rank = rank - (counts.cumsum(0) - counts).repeat_interleave(counts)
        indices.append(index[rank < max(max_locations // max(len(counts), 1), 1)])
        images.append(torch.full_like(indices[-1], i))
    return torch.cat(images), torch.cat(indices)


def _accuracy(logits: torch.Tensor, targets: PlaneTargets, objects: torch.Tensor) -> torch.Tensor:
    # Of the cells in the boxes of objects with a human mask.
    counted = targets.box_masks[objects] & targets.has_mask[objects][:, None, None]
    return mask_accuracy(logits, targets.masks[objects], counted)


def _to_image(
    planes: torch.Tensor, stride: int, size: tuple[int, int], new_size: tuple[int, int]
) -> torch.Tensor:
    # Probabilities, (n, h, w), of an image of ``size`` -> bool, (n, *new_size).
    masks = [torch.zeros(0, *new_size, dtype=torch.bool, device=planes.device)]
    for part in planes[:, None].split(_CHUNK):
        part = aligned_bilinear(part, stride)[:, :, : size[0], : size[1]]
        resized = F.interpolate(part, new_size, mode="bilinear", align_corners=False)
        masks.append(resized[:, 0] > 0.5)
    return torch.cat(masks)
