"""What each process of tools/complete_masks.py does, from the json to the finished json."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from completion.images import complete_image, load_images
from completion.index import index_annotations
from completion.parts import Parts, PartWriter
from completion.plan import check_classes, make_plan
from completion.ranking import write_ranking
from completion.results import (
    Results,
    collect_results,
    mean_agreement,
    summary_table,
    write_completed,
)
from inference.setup import UsageError
from teacher_student_mask.analysis.trained_model import load_model
from teacher_student_mask.checks.annotation_report import printable

__all__ = ["CompletionRun", "parts_of"]

logger = logging.getLogger("teacher_student_mask")


# Of teacher and student; below it the user is told. See docs/COMPLETE.md for what was measured.
_LOW_AGREEMENT = 0.6


def parts_of(output: Path) -> Parts:
    """Where what is finished is kept until the end."""
    return Parts(output.with_name(output.name + ".parts"))


class CompletionRun:
    """One process of a run; each has its share of the images, and the first one writes."""

    def __init__(self, args: argparse.Namespace, cfg: CfgNode):
        """
        Args:
            args: of ``complete_masks.py``, checked.
            cfg: of the model.
        """
        self.args, self.cfg = args, cfg
        self.parts = parts_of(args.output)
        self.is_first = comm.is_main_process()

    def run(self) -> None:
        """
        Complete the process's images; the first one then writes json and ranking.

        Raises:
            OSError, PartsError, UsageError, ValueError: says what is wrong; what has been finished
                is kept.
        """
        args = self.args
        with self._bytes("reading the json") as progress:
            self.index = index_annotations(args.annotations, args.redo_model_masks, progress.update)
        check_classes(self.cfg, self.index)
        self.model, heads = load_model(self.cfg)
        self.masks_of = args.masks_of or ("both" if len(heads) > 1 else heads[0])
        if self.masks_of not in (*heads, "both")[: 3 if len(heads) > 1 else 1]:
            raise UsageError(
                f"--masks-of {self.masks_of}: the model has the head {heads[0]!r} alone "
                f"(MODEL.ROI_HEADS.NAME {self.cfg.MODEL.ROI_HEADS.NAME!r})."
            )
        images = self._unfinished_images()
        self._complete(images[comm.get_rank() :: comm.get_world_size()])
        comm.synchronize()
        if self.is_first:
            self._write()
        comm.synchronize()

    def _unfinished_images(self) -> np.ndarray:
        args = self.args
        choices = {
            "--masks-of": self.masks_of,
            "--format": args.format,
            "--redo-model-masks": args.redo_model_masks,
        }
        plan = make_plan(self.cfg, self.index, choices)
        if self.is_first:
            self.parts.start(plan)
        comm.synchronize()
        self.parts.check(plan)
        is_finished = np.zeros(len(self.index.image_spans), bool)
        for _, record, _ in self.parts.images():
            is_finished[record["image"]] |= "broken" not in record
        # Nobody adds to what others are still reading.
        comm.synchronize()
        images = self.index.images_with_targets()
        unfinished = images[~is_finished[images]]
        if len(unfinished) < len(images):
            logger.info(
                f"Going on: {len(images) - len(unfinished)} of {len(images)} images are finished."
            )
        return unfinished

    def _complete(self, images: np.ndarray) -> None:
        classes = {i: k for k, i in enumerate(self.index.categories)}
        loader = load_images(self.cfg, self.index, self.args.image_root, images)
        shard = f"images of process 1 of {comm.get_world_size()}"
        with (
            PartWriter(self.parts, comm.get_rank()) as writer,
            logging_redirect_tqdm(loggers=[logger]),
            tqdm(loader, desc=shard, unit="image", disable=not self.is_first) as progress,
        ):
            start = time.perf_counter()
            for task in progress:
                record, objects = {"image": task.image}, []
                if task.problem:
                    self._report_broken(task.problem)
                    record["broken"] = task.problem
                else:
                    objects = complete_image(
                        self.model, task, classes, self.masks_of, self.args.format
                    )
                now = time.perf_counter()
                record["seconds"] = round(now - start, 6)
                writer.add(record, objects)
                start = now

    def _report_broken(self, problem: str) -> None:
        if not self.args.skip_broken_images:
            raise UsageError(
                f"{problem} What is finished is kept, and the same command goes on; "
                "--skip-broken-images leaves such images out."
            )
        logger.warning(f"Left out: {printable(problem)}")

    def _write(self) -> None:
        args = self.args
        results = collect_results(self.parts, self.index)
        # Before the output: that it is there means that all is done.
        if args.rank is not None:
            num_objects = write_ranking(self.index, self.parts, results, args.rank)
        with self._bytes("writing the json") as progress:
            write_completed(self.index, self.parts, results, args.output, progress.update)
        self.parts.remove()
        print(summary_table(self.index, results))
        agreement = mean_agreement(results)
        if agreement is not None and agreement < _LOW_AGREEMENT:
            logger.warning(
                f"Teacher and student agree little (mean IoU {agreement:.2f}): one of them may be "
                "far from the truth, and the mean of both then is, too. Look at pictures of both "
                "(--masks-of teacher, --masks-of student) before these masks are used."
            )
        _print_broken(results)
        if args.rank is not None:
            print(f"Ranking of {num_objects} objects: {args.rank}")
        print(f"Completed, masks of {self.masks_of}: {args.output}", flush=True)

    def _bytes(self, what: str) -> tqdm:
        size = os.path.getsize(self.args.annotations)
        disable = not self.is_first
        return tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=disable)


def _print_broken(results: Results) -> None:
    if results.broken:
        print(f"{len(results.broken)} images were left out:")
    for _, problem in sorted(results.broken.items()):
        print(f"  {problem}")
