#!/usr/bin/env python
"""Write the student of a trained model for those who do not have this project. See --help."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import nn

from deployment.plain_student import export_plain
from deployment.student_deployment import describe_deployment, export_graphs, make_check_images
from deployment.traced_student import missing_onnx_package
from inference.setup import UsageError, add_model_arguments, check_output_dir, find_classes
from teacher_student_mask.analysis.trained_model import load_config, load_model
from teacher_student_mask.engine import open_atomically

logger = logging.getLogger("teacher_student_mask")

DESCRIPTION = """
Writes the student (or the only mask head of a baseline or oracle) without this project. Always:
  deployment.json  how to prepare an image, what comes out, the classes, what was compared
  classes.json     the names of the classes, in the order of pred_classes
and of the --formats
  plain        config.yaml, what differs from Detectron2's defaults, with MODEL.WEIGHTS
               DIR/model.pth, and model.pth, the weights without the teacher's: a plain Detectron2
               Mask R-CNN, for whoever has Detectron2 and not this project
  torchscript  model.ts: PyTorch and torchvision run it, Detectron2 is not needed (traced with
               Detectron2's exporter where that can be imported)
  onnx         model.onnx: onnxruntime runs it, PyTorch is not needed (tools/run_onnx.py is an
               example). Needs the extra "export": pip install -c constraints.txt onnx onnxruntime
Before anything is written, every format runs on the same images as the model and must find the
same: random ones, and those of --check-images. An earlier export in the folder is replaced; other
files of these names, such as the config.yaml of a training, never are.

Both graphs take one image of any size, without a batch axis, and return any number of objects;
masks are probabilities on a grid over each box and want pasting; thresholds are the config's and
cannot be changed later. The CPU is what they are made on and for. Models with parts that Detectron2
does not have (a mask prior such as OPMask's, hourglass heads, masks of 56x56) cannot be written as
a plain one, and the message names the part; their graphs can.
"""

EXAMPLES = """
examples:
  %(prog)s --config-file output/mine/config.yaml --weights output/mine/model_final.pth \\
      --output-dir output/exported

  then, without this project:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor
    cfg = get_cfg()
    cfg.merge_from_file("output/exported/config.yaml")
    instances = DefaultPredictor(cfg)(image)["instances"]

  all formats, compared on photos, too:
    %(prog)s --config-file ... --weights ... --output-dir output/exported \\
        --formats plain torchscript onnx --check-images data/images/a.jpg data/images/b.jpg

  graphs that keep what they are surer of:
    %(prog)s ... --formats onnx --opts MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5

exit code: 0, or 2 if the model cannot be exported; nothing is written then.
"""

FORMATS = ("plain", "torchscript", "onnx")
# What is written last, so that a folder which has it is an export.
DEPLOYMENT = "deployment.json"
FILES = ("config.yaml", "model.pth", "model.ts", "model.onnx", "classes.json", DEPLOYMENT)


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["plain"],
        help="what to write (default: plain)",
    )
    parser.add_argument(
        "--check-images",
        nargs="+",
        default=[],
        type=Path,
        metavar="IMAGE",
        help="images on which the graphs are compared, beside random ones",
    )
    add_model_arguments(parser)
    return parser, parser.parse_args(argv)


def load_student(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """
    Load the model without its teacher.

    Raises:
        UsageError: the config or the weights are wrong.
    """
    try:
        cfg = load_config(args.config_file, args.weights, args.opts)
        # A config that evaluated the teacher has a student all the same.
        cfg.TEST.MASK_HEAD = "student"
        model, _ = load_model(cfg, ["student"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    if hasattr(model.roi_heads, "teacher_mask_head"):
        model.roi_heads.teacher_mask_head = None
    return cfg, model


def check_free(output_dir: Path) -> None:
    """
    Raises:
        UsageError: the folder has one of FILES, and no export has written it.
    """
    taken = [name for name in FILES if (output_dir / name).exists()]
    if taken and not (output_dir / DEPLOYMENT).exists():
        raise UsageError(
            f"--output-dir {output_dir} holds {', '.join(taken)}, which no export has written (the "
            "folder of a training?); name another folder."
        )


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    files, rows = {}, []
    try:
        # Before minutes of tracing, and with the names of all formats.
        check_free(args.output_dir)
        if "onnx" in args.formats and (missing := missing_onnx_package()):
            raise UsageError(
                f"--formats onnx needs the package {missing}, which is not installed: "
                "pip install -c constraints.txt onnx onnxruntime"
            )
        cfg, model = load_student(args)
        if "plain" in args.formats:
            files, report = export_plain(cfg, model, args.output_dir)
            rows.append(("model.pth", report))
        graphs = [x for x in FORMATS[1:] if x in args.formats]
        if graphs:
            images = make_check_images(cfg, args.check_images)
            for name, content, report in export_graphs(model, graphs, images):
                files[name] = content
                rows.append((name, report))
        check_output_dir(args.output_dir)
    except UsageError as error:
        parser.error(str(error))
    names = find_classes(cfg).names
    facts = describe_deployment(cfg, names, dict(rows))
    for name, content in (("classes.json", names), (DEPLOYMENT, facts)):
        files[name] = (json.dumps(content, indent=1) + "\n").encode()
    try:
        for name, content in files.items():
            with open_atomically(args.output_dir / name, "wb") as stream:
                stream.write(content)
    except OSError as error:
        parser.error(str(error))
    for name, report in rows:
        size = len(files[name]) / 2**20
        print(f"{args.output_dir / name}, {size:.1f} MiB: {report}")
    print(f"Exported: {', '.join(sorted(files))} in {args.output_dir}")
    return 0


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
