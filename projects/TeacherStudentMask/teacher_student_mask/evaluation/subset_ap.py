"""COCO AP over a subset of the classes or of the objects of a finished evaluation."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Collection

import numpy as np
from pycocotools.cocoeval import COCOeval

from .results_table import METRICS

__all__ = ["evaluate_objects", "summarize_classes"]


def summarize_classes(coco_eval: COCOeval, category_ids: Collection[int]) -> dict[str, float]:
    """
    The six AP of COCO over a subset of the categories, without matching again.

    COCOeval matches per category, so this equals a run with `params.catIds = category_ids`.

    Args:
        coco_eval: an accumulated evaluation of boxes or masks.
        category_ids: ids of the json; those that `coco_eval` did not evaluate are skipped.

    Returns:
        {metric: AP in 0-100}, nan where the categories have no object.
    """
    params = coco_eval.params
    in_subset = np.isin(params.catIds, list(category_ids))
    # IoU thresholds, recalls, categories, areas; the last limit on the detections is the largest.
    precision = coco_eval.eval["precision"][..., -1][:, :, in_subset]
    all_areas, small, medium, large = (
        precision[..., params.areaRngLbl.index(label)]
        for label in ("all", "small", "medium", "large")
    )
    return {
        "AP": _mean_precision(all_areas),
        "AP50": _mean_precision(all_areas[np.isclose(params.iouThrs, 0.5)]),
        "AP75": _mean_precision(all_areas[np.isclose(params.iouThrs, 0.75)]),
        "APs": _mean_precision(small),
        "APm": _mean_precision(medium),
        "APl": _mean_precision(large),
    }


def evaluate_objects(
    coco_eval: COCOeval, category_ids: Collection[int], annotation_ids: Collection[int]
) -> dict[str, float]:
    """
    The six AP of COCO over a subset of the objects; the other objects are ignored.

    A detection matched to an ignored object is neither a true nor a false positive; one matched to
    no object stays a false positive. Detections of other categories do not take part.

    Args:
        coco_eval: a finished evaluation, whose implementation, images, limits and IoU are reused.
            It and its annotations are not changed.
        category_ids: the categories of the subset.
        annotation_ids: the objects of the subset. Crowd annotations stay ignored.

    Returns:
        {metric: AP in 0-100}, nan where there is no object.
    """
    if len(category_ids) == 0 or len(annotation_ids) == 0:
        return dict.fromkeys(METRICS, float("nan"))
    subset_eval = _subset_eval_class(type(coco_eval))(
        coco_eval.cocoGt, coco_eval.cocoDt, coco_eval.params.iouType
    )
    subset_eval.params = copy.deepcopy(coco_eval.params)
    subset_eval.params.catIds = sorted(category_ids)
    subset_eval.annotation_ids = set(annotation_ids)
    subset_eval.known_ious = coco_eval.ious
    with contextlib.redirect_stdout(io.StringIO()):
        subset_eval.evaluate()
        subset_eval.accumulate()
    return summarize_classes(subset_eval, category_ids)


def _subset_eval_class(base: type) -> type:
    """Derive from the implementation in use; official and compiled ones call both methods."""

    class SubsetCOCOeval(base):
        def _prepare(self):
            super()._prepare()
            # COCOeval has just set "ignore" to "iscrowd". Copies, because these dicts are the
            # shared ground truth. "iscrowd" itself must stay: it changes the IoU.
            ground_truth = defaultdict(list)
            for key, objects in self._gts.items():
                ground_truth[key] = [
                    {**x, "ignore": int(x["ignore"] or x["id"] not in self.annotation_ids)}
                    for x in objects
                ]
            self._gts = ground_truth

        def computeIoU(self, imgId, catId):
            return self.known_ious[imgId, catId]

    return SubsetCOCOeval


def _mean_precision(precision: np.ndarray) -> float:
    # COCOeval marks categories without objects by -1.
    values = precision[precision > -1]
    return float(np.mean(values)) * 100 if values.size else float("nan")
