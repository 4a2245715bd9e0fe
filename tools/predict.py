#!/usr/bin/env python
"""
Run a trained model on images, folders, globs, videos and cameras.

Writes pictures with the detected objects, and their masks as COCO results. The model runs in
Detectron2's DefaultPredictor. See --help.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from inference.coco_results import Classes, Predictions
from inference.compare import BothHeads, Comparison, GroundTruth
from inference.media import Source, SourceError, find_sources
from inference.overlays import Draw, OverlayWriter, plain_overlays
from inference.setup import (
    UsageError,
    add_model_arguments,
    check_output_dir,
    find_classes,
    make_predictor,
    setup_cfg,
)
from inference.webcam import Camera, LiveView, open_window
from pages.contact_sheet import THUMBNAILS, ContactSheet
from teacher_student_mask.checks.annotation_report import printable

logger = logging.getLogger("teacher_student_mask")

OVERLAYS = "overlays"  # in the output folder

DESCRIPTION = """
Finds and segments the objects in images and videos with a trained model.

Inputs are image files, video files, folders (searched with their subfolders) and quoted globs, or
a camera (--webcam). The output folder then holds
  overlays/                    a picture for each image, an mp4 for each video, with masks, boxes,
                               classes and scores; small pictures are enlarged so that the labels
                               can be read
  coco_instances_results.json  the objects, in COCO's result format: image_id, category_id, bbox
                               (x, y, width, height), score, segmentation (compressed RLE)
  images.json                  what the ids mean: file, size and overlay of each image (for a video:
                               of each frame, counted from 0), and the categories
  contact_sheet.html           with --html: small pictures of all, to sort and to choose by class
                               and score; thumbnails/ belongs to it
Results of an earlier run in that folder are replaced.
"""

EXAMPLES = """
examples:
  an image, with a model that train_net.py trained:
    %(prog)s --config-file output/run/config.yaml --weights output/run/model_final.pth \\
        --output-dir output/predictions photo.jpg

  everything in two folders, a glob and a video; only certain detections; masks without pictures:
    %(prog)s --config-file ... --output-dir ... --score-threshold 0.8 --no-overlays \\
        holiday/ work/ "archive/2024-*/*.png" clip.mp4

  what the teacher and the student make of the same boxes, beside the ground truth, and a page to
  look through:
    %(prog)s --config-file ... --output-dir output/look --compare --annotations val.json --html \\
        images/

  a camera, in a window, until q is pressed (without a display: a video, until Ctrl+C):
    %(prog)s --config-file ... --output-dir output/camera --webcam 0 --show

  any config key, at the end:
    %(prog)s --config-file ... --output-dir ... photo.jpg --opts MODEL.DEVICE cpu

  the results in Python:
    from pycocotools.coco import COCO
    results = COCO("images.json").loadRes("coco_instances_results.json")
    mask = results.annToMask(results.anns[1])

exit code: 0; 1 if an input could not be read, or its overlay could not be written (the others are
done, the list is printed at the end); 2 if nothing could be started.
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, video, folder or glob")
    add(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="keep detections with a score above this (default: %(default)s)",
    )
    add("--no-overlays", action="store_true", help="write the json files only")
    add(
        "--compare",
        action="store_true",
        help="overlays show side by side: image | teacher | student (a model without a teacher: "
        "image | model); the json files have the masks of TEST.MASK_HEAD",
    )
    add(
        "--annotations",
        metavar="JSON",
        help="with --compare, a further panel: the objects that this COCO json has for the image; "
        "dashed boxes are objects without a mask",
    )
    add("--html", action="store_true", help="write contact_sheet.html, too (needs jinja2)")
    add(
        "--webcam",
        nargs="?",
        const="0",
        metavar="N",
        help="look at a camera instead of files: its number (default: 0), or the address of a "
        "stream; Ctrl+C ends it. Its results are kept in memory until then",
    )
    add(
        "--show",
        action="store_true",
        help="with --webcam: show a window (q ends it) instead of writing a video",
    )
    add("--max-frames", type=int, metavar="N", help="with --webcam: end after so many frames")
    add_model_arguments(parser)
    return parser, parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: arguments that do not go together.
    """
    if (args.webcam is None) == (not args.inputs):
        raise UsageError("Give images, videos, folders or globs; or --webcam, and none of them.")
    for option, needed in (
        ("show", "webcam"),
        ("max_frames", "webcam"),
        ("annotations", "compare"),
    ):
        if getattr(args, option) and not getattr(args, needed):
            raise UsageError(f"--{option.replace('_', '-')} needs --{needed}.")
    if args.max_frames is not None and args.max_frames < 1:
        raise UsageError(f"--max-frames is {args.max_frames}; it must be 1 or more.")
    if args.no_overlays:
        for option in ("compare", "html", "show"):
            if getattr(args, option):
                raise UsageError(f"--{option} shows the overlays; leave --no-overlays out.")


class Runner:
    """Runs a predictor over sources and collects what it finds."""

    def __init__(
        self,
        predict: Callable[[np.ndarray], dict],
        classes: Classes,
        open_overlay: Callable[[Source], OverlayWriter] | None,
        sheet: ContactSheet | None = None,
    ) -> None:
        """
        Args:
            predict: from a BGR image to a dict with "instances".
            classes: of the model.
            open_overlay: what takes the overlays of a source; None = no overlays.
            sheet: given all overlays.
        """
        self.predictions = Predictions(classes)
        self.failures: list[str] = []
        self._predict = predict
        self._open_overlay = open_overlay
        self._sheet = sheet

    def run(self, sources: list[Source]) -> None:
        """Predict; what goes wrong with one source is logged and kept in ``failures``."""
        counts = [source.announced_images() for source in sources]
        with (
            logging_redirect_tqdm(loggers=[logger]),
            tqdm(total=sum(counts) or None, unit="image") as progress,
        ):
            for source, count in zip(sources, counts):
                end = progress.n + count
                try:
                    self._run(source, progress)
                except SourceError as error:
                    self.failures.append(printable(str(error)))
                    logger.error(f"Failed: {self.failures[-1]}")
                # What could not be read is done, too.
                progress.update(max(0, end - progress.n))

    def _run(self, source: Source, progress: tqdm) -> None:
        entry = {"file_name": str(source.path)}
        writer = contextlib.nullcontext()
        if self._open_overlay is not None:
            writer = self._open_overlay(source)
            entry["overlay"] = (Path(OVERLAYS) / source.overlay).as_posix()
        with writer as overlay:
            for k, image in enumerate(source.read()):
                start = time.perf_counter()
                outputs = self._predict(image)
                found = outputs["instances"].to("cpu")
                seconds = time.perf_counter() - start
                self.predictions.add({**entry, **source.image_fields(k)}, found, seconds)
                progress.update()
                if overlay is not None:
                    picture = overlay.write(image, outputs)
                    if self._sheet is not None:
                        name = entry["file_name"]
                        self._sheet.add(name, entry["overlay"], picture, found, source.is_video)


def find_inputs(args: argparse.Namespace) -> list[Source]:
    """
    Raises:
        SourceError: an input that is not there, or of an unknown kind.
        UsageError: ground truth is asked for, and there are videos.
    """
    if args.webcam is not None:
        sources = [Camera(args.webcam, args.max_frames)]
    else:
        output_dirs = (args.output_dir / OVERLAYS, args.output_dir / THUMBNAILS)
        sources = find_sources(args.inputs, *output_dirs)
    videos = [str(x.path) for x in sources if x.is_video]
    if args.annotations and videos:
        raise UsageError(
            "--annotations has no frames of videos; leave it out, or these: "
            f"{', '.join(videos[:5])}."
        )
    return sources


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    try:
        check_args(args)
        sources = find_inputs(args)
        cfg = setup_cfg(args.config_file, args.weights, args.score_threshold, args.opts)
        truth = GroundTruth(args.annotations) if args.annotations else None
        predictor = make_predictor(cfg)
        check_output_dir(args.output_dir)
        classes = find_classes(cfg)
        sheet = ContactSheet(args.output_dir, classes.names) if args.html else None
    except (SourceError, UsageError) as error:
        parser.error(str(error))
    draw = plain_overlays(classes.names)
    if args.compare:
        predictor, draw = BothHeads(predictor), Comparison(classes.names, truth)

    def open_overlay(source: Source) -> OverlayWriter | LiveView:
        window = open_window(str(source.path)) if args.show else None
        if window is not None:
            return LiveView(source, window, draw)
        return OverlayWriter(source, args.output_dir / OVERLAYS, draw)

    runner = Runner(predictor, classes, None if args.no_overlays else open_overlay, sheet)
    try:
        runner.run(sources)
    except KeyboardInterrupt:
        # A camera has no other end; what has been found until then is kept.
        if args.webcam is None:
            raise
    runner.predictions.write(args.output_dir)
    if sheet is not None:
        print(f"Contact sheet: {sheet.write(runner.failures, args.score_threshold)}")
    return report(args, runner, draw, len(sources))


def report(args: argparse.Namespace, runner: Runner, draw: Draw, num_sources: int) -> int:
    """Print what was found and what failed; returns the exit code."""
    print(runner.predictions.table())
    print(f"Results: {args.output_dir}")
    if getattr(draw, "num_unknown", 0):
        print(f"{draw.num_unknown} images are not in {args.annotations}.")
    if not runner.failures:
        return 0
    print(f"{len(runner.failures)} of {num_sources} inputs failed:", file=sys.stderr)
    print("\n".join(f"  {failure}" for failure in runner.failures), file=sys.stderr)
    return 1


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
