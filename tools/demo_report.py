"""The analysis of the demo's models, side by side in one report."""

from __future__ import annotations

from pathlib import Path

from sweeps.training_jobs import result_file
from teacher_student_mask import register_partial_coco
from teacher_student_mask.analysis import analyze, write_report
from teacher_student_mask.analysis.pseudo_mask_quality import measure_pseudo_masks
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES

__all__ = ["write_analysis"]


def write_analysis(
    output: Path,
    on_detections: dict[str, Path],
    on_gt_boxes: dict[str, Path],
    pseudo_masks_of: dict[str, Path],
) -> Path:
    """
    Write output/report and return the path of its page.

    Args:
        output: folder of the demo.
        on_detections, on_gt_boxes: {name of the model: folder of its evaluation}.
        pseudo_masks_of: {name of the model: folder of its training}, whose pseudo masks are
            compared with the truth, by each method.
    """
    root = output / "datasets" / "shapes"
    annotations, image_root = str(root / "annotations" / "instances_val.json"), str(root / "val")
    results, gt_box_results = (
        {name: result_file(folder) for name, folder in folders.items()}
        for folders in (on_detections, on_gt_boxes)
    )
    # "shapes_val" is looked for under DETECTRON2_DATASETS as it was when this process began.
    register_partial_coco("demo_val", annotations, image_root)
    quality = {
        name: measure_pseudo_masks(
            str(folder / "config.yaml"),
            str(folder / "model_final.pth"),
            opts=["DATASETS.TEST", ("demo_val",)],
        )
        for name, folder in pseudo_masks_of.items()
    }
    analysis = analyze(
        annotations,
        results,
        seen_classes=SHAPES_SEEN_CLASSES,
        gt_box_results=gt_box_results,
        pseudo_masks=quality,
    )
    return write_report(analysis, output / "report", image_root=image_root, num_objects=60)
