"""
Measure one or several models on the same ground truth, and write a report that opens in a browser.

What is measured, with bootstrap intervals over the images: AP of all, seen, unseen and overlapped
unseen objects, per class, and per bin of the overlap O, the share of an object's box that another
object's mask covers; where masks on ground-truth boxes are given, mask IoU and boundary IoU, and
the same of two yardsticks, the filled box and the ellipse inscribed in it; what the false-positive
pixels of unseen objects lie on; differences between the models.

Inputs are a COCO ground truth with a mask on every object, and either
  result files   --annotations and --results, and --gt-box-results for masks that were made on the
                 ground-truth boxes (as TEST.GT_BOXES or box-prompted SAM gives them), such as
                 Detectron2's coco_instances_results.json or MMDetection's *.segm.json;
  a trained model  MODEL, which runs on its test dataset first. Student and teacher become two
                 models of the report; the quality of the pseudo masks is added.
Both may be combined. DIR then holds report.html (one file, no network needed), analysis.json and,
of a model, what it has found in results/; docs/ANALYSIS.md says what is where.

examples:
  two result files, masks of the 20 VOC classes in training:
    tsmask analyze --annotations instances_val2017.json --seen voc --output-dir report \\
        --results baseline=a.json ours=b.json --images val2017

  a model of this project, on its own test dataset:
    tsmask analyze output/train --output-dir output/train/report
"""

import argparse
import itertools
import logging
import os

from ..errors import InputError, require
from .main import add_model_arguments, choose_model, key_and_value

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tsmask analyze``."""
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="made if new")
    add = parser.add_argument_group("result files").add_argument
    add("--annotations", metavar="JSON", help="COCO ground truth")
    for option, boxes in (("--results", "detected"), ("--gt-box-results", "ground-truth")):
        text = f"COCO result files, masks on {boxes} boxes"
        add(option, nargs="+", default=[], type=key_and_value, metavar="NAME=FILE", help=text)
    text = 'classes with masks in training: "voc", "nonvoc", "all", names separated by commas, '
    text += "or the path of a list (default: that of the config)"
    add("--seen", metavar="SPEC", help=text)
    add("--baseline", metavar="NAME", help="compare the others with it (default: each pair)")
    add("--images", metavar="DIR", help="folder of the images, for the report's pictures")
    group = parser.add_argument_group("a trained model")
    add_model_arguments(group)
    text = "do not measure the pseudo masks"
    group.add_argument("--no-pseudo-masks", action="store_true", help=text)
    add = parser.add_argument_group("what is measured").add_argument
    add("--threshold", type=float, default=0.3, metavar="O", help="smallest overlap (%(default)s)")
    text = "edges of the overlap bins; O = 0 has a bin of its own (default: 0 0.1 ... 1)"
    edges = [k / 10 for k in range(11)]
    add("--bins", type=float, nargs="+", default=edges, metavar="O", help=text)
    text = "smallest score of a detection whose false positives are attributed (%(default)s)"
    add("--score-threshold", type=float, default=0.5, metavar="P", help=text)
    text = "detections of a class in an image that count (%(default)s, as in COCO)"
    add("--max-detections", type=int, default=100, metavar="N", help=text)
    add("--resamples", type=int, default=1000, metavar="N", help="0: no intervals (%(default)s)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--num-pictures", type=int, default=200, metavar="N", help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the model if there is one, measure, and write the report."""
    require("report", "jinja2", "pandas", "plotly")  # before what takes long
    results, gt_box_results = dict(args.results), dict(args.gt_box_results)
    if len(results) < len(args.results) or len(gt_box_results) < len(args.gt_box_results):
        raise InputError("--results, --gt-box-results: each file needs a NAME of its own.")
    has_model = bool(args.model or args.config_file)
    if not has_model and not (args.annotations and args.seen and results | gt_box_results):
        raise InputError(
            "give MODEL, the folder of a training, or --annotations, --seen and --results (or "
            "--gt-box-results)."
        )
    if has_model and {"student", "teacher"} & set(results | gt_box_results):
        raise InputError("student and teacher are the masks of MODEL; name the files otherwise.")
    if args.images and not os.path.isdir(args.images):
        raise InputError(f"--images {args.images}: no such folder.")
    from ..analysis import Settings, analyze, write_report
    from ..analysis.report import headline

    settings = Settings(
        overlap_threshold=args.threshold,
        overlap_bins=args.bins,
        score_threshold=args.score_threshold,
        num_resamples=args.resamples,
        confidence=args.confidence,
        seed=args.seed,
        max_detections=args.max_detections,
    )
    annotations, images, seen, pseudo_masks = args.annotations, args.images, args.seen, {}
    if has_model:
        model = _run_model(args)
        # The model first: it is the baseline of the differences.
        results, gt_box_results = model.results | results, model.gt_box_results | gt_box_results
        annotations, images = model.annotations, images or model.image_root
        seen, pseudo_masks = seen or model.seen, model.pseudo_masks
    analysis = analyze(
        annotations,
        results,
        seen_classes=seen,
        gt_box_results=gt_box_results,
        settings=settings,
        pseudo_masks=pseudo_masks,
        baseline=args.baseline,
    )
    report = write_report(
        analysis, args.output_dir, image_root=images, num_objects=args.num_pictures
    )
    print(*headline(analysis.summary), f"Report: {report}", sep="\n")


def _run_model(args: argparse.Namespace) -> argparse.Namespace:
    """Evaluate the heads of a model, and name what it has written and was trained on."""
    # Only now: reading result files needs no model.
    from ..analysis.pseudo_mask_quality import measure_pseudo_masks
    from ..class_splits import AUTO, resolve_seen_classes
    from ..data import dataset_classes, resolve_auto_settings
    from ..judgement import evaluate
    from ..own_data import partly_masked_validation
    from ..trained_model import find_test_dataset, load_model

    model, opts = choose_model(args), args.opts
    masks_file = "" if "DATASETS.TEST" in opts else partly_masked_validation(model)
    if masks_file:
        print("Some validation objects have no mask: the others are measured, on their boxes.")
        opts = ["DATASETS.TEST", repr((masks_file,)), *opts]
    trained = load_model(model, weights=args.weights, opts=opts)
    cfg, found = trained.cfg, argparse.Namespace(results={}, gt_box_results={}, pseudo_masks={})
    found.annotations, found.image_root = find_test_dataset(cfg)
    given = args.annotations or found.annotations
    if os.path.realpath(given) != os.path.realpath(found.annotations):
        raise InputError(
            f"MODEL runs on its test data, {found.annotations}; for {given} give --opts "
            "DATASETS.TEST in the place of --annotations."
        )
    opts = [*opts, "DATASETS.TEST", repr(cfg.DATASETS.TEST[:1])]
    for head, gt_boxes in itertools.product(trained.heads, (False, True)):
        if masks_file and not gt_boxes:
            continue
        folder = os.path.join(args.output_dir, "results", head + "_gt_boxes" * gt_boxes)
        print(f"Running the {head}'s masks on {'given' if gt_boxes else 'detected'} boxes.")
        of_boxes = found.gt_box_results if gt_boxes else found.results
        if found.results or found.gt_box_results:  # what is odd has been said
            logging.disable(logging.WARNING)
        try:
            options = {"weights": args.weights, "opts": opts, "output_dir": folder}
            evaluate(model, gt_boxes=gt_boxes, head=head, **options)
        finally:
            logging.disable(logging.NOTSET)
        of_boxes[head] = os.path.join(folder, "inference", "coco_instances_results.json")
    is_asked = cfg.TEST.SEEN_CLASSES in ("", AUTO)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=is_asked)
    spec = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
    names = [trained.class_names[i] for i in resolve_seen_classes(spec, trained.class_names)]
    # Without those that the dataset lacks.
    in_dataset, _ = dataset_classes(cfg.DATASETS.TEST[0])
    found.seen = [x for x in names if x in in_dataset]
    if "teacher" in trained.heads and not args.no_pseudo_masks:
        found.pseudo_masks["teacher"] = measure_pseudo_masks(trained, overlap_bins=args.bins)
    return found
