#!/usr/bin/env python
"""Write a COCO json in which objects without a human mask have GrabCut's. See --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pycocotools.mask as mask_util
from tabulate import tabulate

from coco_json.mask_removal import (
    add_file_arguments,
    check_file_arguments,
    read_checked,
    remove_mask,
    write_or_explain,
)
from grabcut_jobs import Job, key_of, run_cached
from teacher_student_mask.checks import AnnotationReport
from teacher_student_mask.checks.mask_measures import has_mask
from teacher_student_mask.checks.mask_sources import MODEL, is_from_model

DESCRIPTION = """
Writes a COCO json in which every object without a mask of a human has one of GrabCut, made from its
box and the colours of the image. Training on such masks is the second reading of Mask GrabCut; the
first, GrabCut at test time, needs no file (configs/*/mask_grabcut.yaml).

A GrabCut mask is given to the objects of all classes but the seen ones, whose own masks are never
looked at, and to objects of seen classes that have none, an empty one, or one of a model. These
annotations then have "mask_source": "model", an RLE and its area. Crowds get none; those of unseen
classes lose theirs. All else is as it was.

The full box is the mask where the box has a side under 8 pixels or GrabCut finds nothing; the table
at the end counts masks that are rectangles. An object takes 0.01 to 1 second of one core, COCO's
training set hours. A run that was stopped goes on where it was if it is started again: what is done
stands in OUT.json.cache, which is removed at the end. The masks do not depend on --workers.
"""

EXAMPLES = """
example:
  masks of the 60 classes that are not VOC's, then training with them:
    %(prog)s data/train.json output/train_grabcut.json \\
        --image-root data/images --seen-classes voc
    train_net.py --config-file configs/coco/mask_rcnn.yaml MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS True \\
        DATASETS.TRAIN '("output/train_grabcut.json",)' \\
        DATASETS.TRAIN_IMAGE_ROOT data/images

exit code: 0 written; 1 not written, because of errors in the input, images that cannot be read, or
the disk; 2 for a wrong command line. An output that is not written as a whole is not written.
"""

_MAX_LISTED = 10


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    checked = read_checked(args.input, args.seen_classes)
    if checked is None:
        return 1
    data, report = checked
    seen = {x.category_id for x in report.classes if x.is_seen}
    sizes = {x["id"]: (int(x["height"]), int(x["width"])) for x in data["images"]}
    rows = [
        x
        for x in data["annotations"]
        if not x.get("iscrowd") and not keeps_mask(x, seen, sizes[x["image_id"]])
    ]
    jobs = make_jobs(data["images"], rows, args.image_root)
    missing = [job.path for job in jobs if not os.path.isfile(job.path)]
    if missing:
        return report_problems([f"{path}: no such file" for path in missing])
    try:
        masks, problems = run_cached(jobs, f"{args.output}.cache", args.workers)
    except BrokenProcessPool:
        print("error: a worker process died, perhaps for want of memory. Start again with fewer")
        print("--workers; what is done is not done again.")
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 1
    if problems:
        return report_problems(problems)
    counts = splice(rows, masks, data["images"])
    num_crowds = remove_crowd_masks(data["annotations"], seen)
    if not write_or_explain(args.output, data):
        return 1
    os.unlink(f"{args.output}.cache")
    print(class_table(report, counts))
    if num_crowds:
        print(f"Removed the masks of {num_crowds} crowds of unseen classes.")
    num_masks = sum(x["masks"] for x in counts.values())
    print(f"Written to {args.output}: {num_masks} GrabCut masks")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_file_arguments(parser)
    parser.add_argument("--image-root", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--seen-classes",
        required=True,
        metavar="SPEC",
        help='classes that keep their masks: "voc", "nonvoc", "all", names separated by commas, or '
        "the path of a list; as DATASETS.SEEN_CLASSES",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core, %(default)s here)",
    )
    args = parser.parse_args(argv)
    check_file_arguments(parser, args)
    if not os.path.isdir(args.image_root):
        parser.error(f"--image-root {args.image_root}: no such folder.")
    if args.workers < 1:
        parser.error(f"--workers must be 1 or more, got {args.workers}.")
    return args


def keeps_mask(annotation: dict, seen: set[int], size: tuple[int, int]) -> bool:
    """
    Whether an object of a seen class has a mask of a human that covers a pixel.

    Args:
        annotation: checked.
        seen: category ids.
        size: height and width of the image.
    """
    segmentation = annotation.get("segmentation")
    if annotation["category_id"] not in seen or not segmentation:
        return False
    if is_from_model(annotation):
        return False
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return bool(np.sum(mask_util.area(segmentation)) > 0)


def make_jobs(images: list[dict], rows: list[dict], root: str) -> list[Job]:
    """One job for each image with objects, in the order of the images."""
    of_image: dict[int, list[dict]] = {}
    for row in rows:
        of_image.setdefault(row["image_id"], []).append(row)
    return [
        Job(
            path=os.path.join(root, image["file_name"]),
            size=(int(image["height"]), int(image["width"])),
            keys=[key_of(row, image["file_name"]) for row in of_image[image["id"]]],
            boxes=[row["bbox"] for row in of_image[image["id"]]],
        )
        for image in images
        if image["id"] in of_image
    ]


def splice(rows: list[dict], masks: dict[str, str], images: list[dict]) -> dict[int, Counter]:
    """
    Give the annotations their masks, in place.

    Args:
        rows: annotations that need a mask.
        masks: counts of compressed RLEs by :func:`key_of`.
        images: of the json.

    Returns:
        By category id how many "masks" there are, "rectangles" among them, for the full box is
        one, and boxes "outside" of their image, which have no mask then.
    """
    by_id = {x["id"]: x for x in images}
    counts: dict[int, Counter] = {}
    for row in rows:
        image = by_id[row["image_id"]]
        size = [int(image["height"]), int(image["width"])]
        rle = {"size": size, "counts": masks[key_of(row, image["file_name"])]}
        area, (*_, width, height) = int(mask_util.area(rle)), mask_util.toBbox(rle)
        count = counts.setdefault(row["category_id"], Counter())
        if area == 0:
            remove_mask(row)
            row.pop("mask_source", None)
            count["outside"] += 1
            continue
        row.update(segmentation=rle, area=area, mask_source=MODEL)
        count["masks"] += 1
        count["rectangles"] += area == width * height
    return counts


def remove_crowd_masks(annotations: list[dict], seen: set[int]) -> int:
    """Take the masks from the crowds of unseen classes, in place; returns how many."""
    crowds = [
        x for x in annotations if x.get("iscrowd") and x["category_id"] not in seen and has_mask(x)
    ]
    for crowd in crowds:
        remove_mask(crowd)
    return len(crowds)


def report_problems(problems: list[str]) -> int:
    """Print what is wrong with the images; returns the exit code."""
    for problem in problems[:_MAX_LISTED]:
        print(f"error: {problem}")
    if len(problems) > _MAX_LISTED:
        print(f"... and {len(problems) - _MAX_LISTED} more")
    print(f"Not written: {len(problems)} images cannot be used.")
    return 1


def class_table(report: AnnotationReport, counts: dict[int, Counter]) -> str:
    """What each class that has objects has got."""
    rows = []
    for x in report.classes:
        count = counts.get(x.category_id, Counter())
        new, outside = count["masks"], count["outside"]
        objects = x.num_objects
        if objects == 0:
            continue
        split = "seen" if x.is_seen else "unseen"
        kept = objects - new - outside
        rows.append([x.name, split, objects, kept, new, count["rectangles"], outside])
    totals = [sum(numbers) for numbers in list(zip(*rows))[2:]] if rows else [0] * 5
    headers = ["class", "split", "objects", "masks kept", "GrabCut", "of them rectangles"]
    headers.append("outside the image")
    # Names such as "1e3" are no numbers.
    return tabulate([*rows, ["all", "", *totals]], headers=headers, disable_numparse=[0])


if __name__ == "__main__":
    sys.exit(main())
