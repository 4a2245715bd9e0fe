#!/usr/bin/env python
"""
Run a trained model on images, folders, globs and videos.

Writes pictures with the detected objects, and their masks as COCO results. The model runs in
Detectron2's DefaultPredictor. See --help.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from pathlib import Path

from detectron2.engine import DefaultPredictor
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from coco_results import Classes, Predictions
from inference_setup import (
    UsageError,
    add_model_arguments,
    check_output_dir,
    find_classes,
    make_predictor,
    setup_cfg,
)
from media import Source, SourceError, find_sources
from overlays import OverlayWriter

logger = logging.getLogger("teacher_student_mask")

DESCRIPTION = """
Finds and segments the objects in images and videos with a trained model.

Inputs are image files, video files, folders (searched with their subfolders) and quoted globs. The
output folder then holds
  overlays/                    a picture for each image, an mp4 for each video, with masks, boxes,
                               classes and scores; small pictures are enlarged so that the labels
                               can be read
  coco_instances_results.json  the objects, in COCO's result format: image_id, category_id, bbox
                               (x, y, width, height), score, segmentation (compressed RLE)
  images.json                  what the ids mean: file, size and overlay of each image (for a video:
                               of each frame, counted from 0), and the categories
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
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, folder or glob")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="keep detections with a score above this (default: %(default)s)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write the json files only")
    add_model_arguments(parser)
    return parser, parser.parse_args(argv)


class Runner:
    """Runs a predictor over sources and collects what it finds."""

    def __init__(
        self, predictor: DefaultPredictor, classes: Classes, overlay_dir: Path | None
    ) -> None:
        """
        Args:
            predictor: takes a BGR image.
            classes: of the model.
            overlay_dir: None = no overlays.
        """
        self.predictions = Predictions(classes)
        self.failures: list[str] = []
        self._predictor = predictor
        self._overlay_dir = overlay_dir

    def run(self, sources: list[Source]) -> None:
        """Predict; what goes wrong with one source is logged and kept in ``failures``."""
        counts = [source.announced_images() for source in sources]
        with (
            logging_redirect_tqdm(loggers=[logger]),
            tqdm(total=sum(counts), unit="image") as progress,
        ):
            for source, count in zip(sources, counts):
                end = progress.n + count
                try:
                    self._run(source, progress)
                except SourceError as error:
                    self.failures.append(str(error))
                    logger.error(f"Failed: {error}")
                # What could not be read is done, too.
                progress.update(max(0, end - progress.n))

    def _run(self, source: Source, progress: tqdm) -> None:
        entry = {"file_name": str(source.path)}
        if self._overlay_dir is None:
            writer = contextlib.nullcontext()
        else:
            writer = OverlayWriter(source, self._overlay_dir, self.predictions.classes.names)
            entry["overlay"] = (Path(self._overlay_dir.name) / source.overlay).as_posix()
        with writer as overlay:
            for k, image in enumerate(source.read()):
                start = time.perf_counter()
                instances = self._predictor(image)["instances"].to("cpu")
                seconds = time.perf_counter() - start
                frame = {"frame": k} if source.is_video else {}
                self.predictions.add({**entry, **frame}, instances, seconds)
                progress.update()
                if overlay is not None:
                    overlay.write(image, instances)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    overlay_dir = args.output_dir / "overlays"
    try:
        sources = find_sources(args.inputs, overlay_dir)
        cfg = setup_cfg(args.config_file, args.weights, args.score_threshold, args.opts)
        predictor = make_predictor(cfg)
        check_output_dir(args.output_dir)
    except (SourceError, UsageError) as error:
        parser.error(str(error))
    classes = find_classes(cfg)
    runner = Runner(predictor, classes, None if args.no_overlays else overlay_dir)
    runner.run(sources)
    runner.predictions.write(args.output_dir)

    print(runner.predictions.table())
    print(f"Results: {args.output_dir}")
    if runner.failures:
        print(f"{len(runner.failures)} of {len(sources)} inputs failed:", file=sys.stderr)
        print("\n".join(f"  {failure}" for failure in runner.failures), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
