"""
Give a mask to every object of a COCO json that has a box only, by a model that is prompted by it.

Segment Anything and its relatives, or any model with the interface of segment-anything's predictor.
Their packages and weights are not part of this project. Masks that humans made stay; the new ones
are marked "mask_source": "model", and in training they teach the student alone.

MODEL is sam:vit_b (vit_l, vit_h) of the package segment-anything, mobile_sam:vit_t,
sam2:configs/sam2.1/sam2.1_hiera_t.yaml, or MODULE:FUNCTION, a function of yours that takes path and
device and returns the predictor.

  tsmask prompt sam:vit_b --weights sam_vit_b_01ec64.pth --annotations data/train.json \\
      --image-root data/images --output data/prompted.json
"""

import argparse

from .complete import add_data_arguments, run_with

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options of ``tsmask complete`` that hold here, too."""
    parser.add_argument("predictor", metavar="MODEL", help="such as sam:vit_b")
    parser.add_argument("--weights", required=True, metavar="PTH", help="path of its checkpoint")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Make the masks, and print a table and the next command."""
    run_with(args)
