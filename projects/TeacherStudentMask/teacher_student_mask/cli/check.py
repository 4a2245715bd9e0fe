"""
Looks for what is wrong with a COCO json, in which any object may lack its mask, and its images.

Printed are, for each class, how many objects have a mask or a box only, the crowds, and the masks
that are just the rectangle of their box (boxes that were exported as masks?); notes on masks that
are not used, and on classes with few objects; then one sentence for each kind of problem, with the
first ids:
  error    training would stop, or go wrong without a word; the exit status is 1
  warning  training goes on as the sentence says

examples:
  the json alone:
    tsmask check train.json
  with the seen classes and the model's number of classes, and whether the images are there:
    tsmask check instances_train2017.json --image-root train2017 --seen-classes voc --num-classes 80
  and every image read to its end:
    tsmask check train.json --image-root images --seen-classes "cat, dog" --images
"""

import argparse

from ..errors import InputError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the json, and what to compare it with."""
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", help="in COCO's format")
    add("--image-root", metavar="DIR", help="folder of the images")
    text = (
        'classes with masks in training: "voc", "nonvoc", "all", "auto" (those with enough masks '
        "here), names separated by commas, or the path of a list (default: what holds for any)"
    )
    add("--seen-classes", metavar="SPEC", help=text)
    text = 'masks that a class needs for --seen-classes "auto" (default: %(default)s)'
    add("--min-masks-per-class", type=int, default=10, metavar="K", help=text)
    text = "the model's MODEL.ROI_HEADS.NUM_CLASSES"
    add("--num-classes", type=int, metavar="N", help=text)
    add("--images", action="store_true", help="read every image of --image-root to its end")


def run(args: argparse.Namespace) -> int:
    """Check, and print the table of the classes and the sentences."""
    from ..coco_json import check_coco

    if args.images and not args.image_root:
        raise InputError("--images needs --image-root.")
    report = check_coco(
        args.annotations,
        image_root=args.image_root,
        seen_classes=args.seen_classes,
        num_classes=args.num_classes,
        min_masks_per_class=args.min_masks_per_class,
        check_images=args.images,
    )
    if report.classes:
        print(report.class_table())
        print(f"\n{report.num_images} images, {report.num_annotations} annotations")
        for note in report.notes:
            print(f"note: {note}")
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    print(f"{len(report.errors)} kinds of errors, {len(report.warnings)} kinds of warnings")
    return 1 if report.errors else 0
