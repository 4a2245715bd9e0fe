#!/usr/bin/env python
"""Show where in each detected box the box classifier sees the class, as Fig. 5 of the paper."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from inference.media import SourceError, find_sources
from inference.setup import (
    UsageError,
    add_model_arguments,
    check_output_dir,
    find_classes,
    make_predictor,
    setup_cfg,
)
from teacher_student_mask.modeling.priors import normalized_activation_maps

logger = logging.getLogger("teacher_student_mask")

DESCRIPTION = """
Draws, for the detected objects of each image, the class activation map (CAM): what the box
classifier's weights of the object's class give in each cell of the ROI, before the average over the
cells (Eq. (8) and (9) of the paper). OPMask adds this map to the features of the mask head.

Needs a model whose config has MODEL.ROI_MASK_PRIOR.NAME "ClassActivationPrior" (the opmask_*
configs). A row of a picture is an object: its box in the image | the map, dark = 0, bright = 1 |
the map over the box | the mask over the box.

The maps are pooled at the detected boxes (MODEL.ROI_MASK_PRIOR.REPOOL True), which are those shown.
OPMask itself takes those of the proposals, so its masks can differ a little from the ones here.
"""

EXAMPLES = """
examples:
  %(prog)s --config-file output/opmask/config.yaml --weights output/opmask/model_final.pth \\
      --output-dir output/cam photo.jpg folder/

  all objects with a score of at least 0.2:
  %(prog)s --config-file ... --output-dir ... --score-threshold 0.2 --max-objects 100 photo.jpg

exit code: 0; 1 if an image could not be read (the others are done); 2 if nothing could be started.
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder or quoted glob")
    add(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="of the detections (default: %(default)s)",
    )
    add(
        "--max-objects",
        type=int,
        default=8,
        metavar="N",
        help="of an image, those with the highest scores (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser, parser.parse_args(argv)


class ClassActivation:
    """Runs a model on an image and keeps the class activation maps of what it detects."""

    def __init__(self, predictor: DefaultPredictor) -> None:
        """
        Args:
            predictor: of a model with a mask prior.
        """
        self._predictor = predictor
        self._calls: list[tuple[Instances, torch.Tensor, torch.Tensor]] = []
        predictor.model.roi_heads.mask_prior.register_forward_hook(self._keep)

    def _keep(self, prior: nn.Module, inputs: tuple, output: object) -> None:
        context = inputs[1]
        (instances,) = context.instances
        # The mask head adds to the instances; the boxes are scaled to the image in place.
        boxes = instances.pred_boxes.tensor.clone()
        self._calls.append(
            (
                instances,
                boxes,
                normalized_activation_maps([instances], context.class_maps, context.classifier),
            )
        )

    def __call__(self, image: np.ndarray) -> tuple[Instances, np.ndarray]:
        """
        Args:
            image: uint8 (H, W, 3), BGR.

        Returns:
            The R detections by falling score: ``pred_boxes`` in pixels of the image, ``scores``,
            ``pred_classes``, and ``pred_masks`` (R, 1, M, M), probabilities; and their maps, shape
            (R, h, w), in [0, 1].
        """
        self._calls.clear()
        self._predictor(image)
        instances, boxes, maps = self._calls[-1]
        instances, boxes, maps = instances.to("cpu"), Boxes(boxes.cpu()), maps[:, 0].cpu().numpy()
        height, width = image.shape[:2]
        boxes.scale(width / instances.image_size[1], height / instances.image_size[0])
        boxes.clip((height, width))
        instances.pred_boxes = boxes
        order = instances.scores.argsort(descending=True)
        return instances[order], maps[order.numpy()]


def draw(
    image: np.ndarray, instances: Instances, maps: np.ndarray, names: list[str]
) -> Figure | None:
    """
    Draw a row for each object.

    Args:
        image: uint8 (H, W, 3), BGR.
        instances, maps: of :class:`ClassActivation`.
        names: of the classes.

    Returns:
        None if there is no object of at least a pixel.
    """
    rows = list(_rows(image, instances, maps))
    if not rows:
        return None
    figure = Figure(figsize=(8, 0.4 + 2.0 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for title, ax in zip(("box", "class activation", "over the box", "mask"), axes[0]):
        ax.set_title(title, fontsize=10)
    for (k, crop, cam, mask), row in zip(rows, axes):
        extent = (0, crop.shape[1], crop.shape[0], 0)
        grey = crop.mean(axis=2)
        label = f"{names[instances.pred_classes[k]]} {100 * instances.scores[k]:.0f}%"
        row[0].set_ylabel(label, fontsize=9)
        row[0].imshow(crop, extent=extent)
        # The cells as they are; over the box, resized as for the mask features.
        row[1].imshow(cam, cmap="inferno", vmin=0, vmax=1, extent=extent)
        row[2].imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
        row[2].imshow(
            cam, cmap="inferno", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear", extent=extent
        )
        row[3].imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
        row[3].imshow(mask, cmap="inferno", vmin=0, vmax=1, alpha=0.5, extent=extent)
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
    return figure


def _rows(image: np.ndarray, instances: Instances, maps: np.ndarray) -> Iterator[tuple]:
    masks = paste_masks_in_image(instances.pred_masks[:, 0], instances.pred_boxes, image.shape[:2])
    for k, (box, mask) in enumerate(zip(instances.pred_boxes.tensor.round().int().tolist(), masks)):
        x0, y0, x1, y1 = box
        if x1 > x0 and y1 > y0:
            crop = image[y0:y1, x0:x1, ::-1]
            yield k, crop, maps[k], mask[y0:y1, x0:x1].numpy()


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    try:
        if args.max_objects < 1:
            raise UsageError(f"--max-objects must be at least 1, got {args.max_objects}.")
        sources = find_sources(args.inputs, args.output_dir)
        videos = [str(x.path) for x in sources if x.is_video]
        if videos:
            raise UsageError(f"Give images; these are videos: {', '.join(videos[:5])}.")
        opts = [*args.opts, "MODEL.ROI_MASK_PRIOR.REPOOL", "True"]
        cfg = setup_cfg(args.config_file, args.weights, args.score_threshold, opts)
        if cfg.MODEL.ROI_MASK_PRIOR.NAME != "ClassActivationPrior":
            raise UsageError(
                f"{args.config_file}: MODEL.ROI_MASK_PRIOR.NAME is "
                f"{cfg.MODEL.ROI_MASK_PRIOR.NAME!r}, so its mask heads use no class activation "
                'map; give the config of a model with "ClassActivationPrior", such as OPMask.'
            )
        class_activation = ClassActivation(make_predictor(cfg))
        check_output_dir(args.output_dir)
    except (SourceError, UsageError) as error:
        parser.error(str(error))
    names = find_classes(cfg).names
    num_pictures, failures = 0, []
    with logging_redirect_tqdm(loggers=[logger]):
        for source in tqdm(sources, unit="image"):
            try:
                (image,) = source.read()
            except SourceError as error:
                failures.append(str(error))
                continue
            instances, maps = class_activation(image)
            n = args.max_objects
            figure = draw(image, instances[:n], maps[:n], names)
            if figure is None:
                logger.info(f"{source.path}: no object with a score above {args.score_threshold}.")
                continue
            path = args.output_dir / source.overlay.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100)
            num_pictures += 1
    print(f"{num_pictures} pictures of {len(sources)} images: {args.output_dir}")
    if failures:
        print(f"{len(failures)} images failed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
