"""
Write the student of a trained model (or its only mask head) for those without this project.

Always:
  deployment.json  how to prepare an image, what comes out, the classes, what was compared
  classes.json     the names of the classes, in the order of pred_classes
and of the --formats
  plain        config.yaml, model.pth, categories.json: a plain Mask R-CNN for those with Detectron2
  torchscript  model.ts: PyTorch and torchvision run it
  onnx         model.onnx: onnxruntime runs it, and run_onnx.py beside it is an example. Needs the
               extra "export": pip install -c constraints.txt onnx onnxruntime
Every format runs on the same images as the model first, random ones and those of --check-images,
and must find the same; otherwise nothing is written.

example:
  tsmask export output/train --output-dir output/exported --formats plain onnx \\
      --check-images data/images/*.jpg
"""

import argparse

from .main import add_model_arguments, load_chosen_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--output-dir", required=True, metavar="DIR", help="made if new")
    formats = ("plain", "torchscript", "onnx")
    add("--formats", nargs="+", choices=formats, default=["plain"], help="default: plain")
    text = "images on which the formats are compared, beside random ones"
    add("--check-images", nargs="+", default=[], metavar="IMAGE", help=text)


def run(args: argparse.Namespace) -> None:
    """Export, and print what was compared."""
    from ..exporters import export_student

    trained = load_chosen_model(args, heads=["student"])
    reports = export_student(trained, args.output_dir, args.formats, args.check_images)
    for name, report in reports.items():
        print(f"{args.output_dir}/{name}: {report}")
