"""COCO AP on all, seen, unseen and unseen overlapped objects."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval

from ..class_splits import match_classes, resolve_seen_classes
from ..coco_json import check_coco, has_mask, prepare_ground_truth
from ..errors import InputError
from .overlap import OverlapBin, compute_overlaps, overlap_bins
from .results_table import results_table
from .subset_ap import (
    AREA_RANGES,
    METRICS,
    Matches,
    PrecisionOfSubsets,
    Subset,
    find_candidate_pairs,
    mean_percent,
    subset_metrics,
)

logger = logging.getLogger(__name__)

__all__ = ["PartiallySupervisedCOCOEvaluator", "has_compiled_cocoeval", "warn_of_many_objects"]


class PartiallySupervisedCOCOEvaluator(COCOEvaluator):
    """
    COCOEvaluator that also reports mask AP on seen classes, unseen classes and overlapped objects.

    To the parent's tasks "bbox" and "segm" it adds

    - "segm_seen", "segm_unseen": the objects of the seen and of the unseen classes;
    - "segm_unseen_overlap": the objects of unseen classes with an overlap, Eq. (1) of the paper, of
      at least the threshold. All other objects are ignored: a detection matched to one is neither
      right nor wrong. A detection matched to no object is a false positive as always.

    Each has AP, AP50, AP75, APs, APm, APl in 0-100, and num_gt, the number of non-crowd objects
    that count; an AP over no objects is nan. With ``overlap_bin_edges`` there is also

    - "segm_unseen_overlap_bins": AP of the unseen objects in each bin of the overlap, "AP_0" for
      those with O = 0, "AP_0.1_0.2" for 0.1 < O <= 0.2 (Fig. 2 of the paper).

    Classes are matched by name: the dataset may list the model's under other ids, or a part of
    them; predictions of the classes that it lacks are left out.

    Mask AP needs a mask on every object, of unseen classes too. With annotations that have no masks
    at all, boxes alone are evaluated.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        seen_classes: str | Iterable[int],
        class_names: Sequence[str] | None = None,
        overlap_threshold: float = 0.3,
        overlap_bin_edges: Sequence[float] | None = None,
        max_dets_per_image: int = 100,
        use_fast_impl: bool | None = None,
        **kwargs,
    ):
        """
        Args:
            dataset_name, tasks, distributed, output_dir, kwargs: see COCOEvaluator.
            seen_classes: the classes whose masks training used: a specification for
                `resolve_seen_classes` ("voc", "nonvoc", "all", names, a path), or contiguous ids.
            class_names: the model's, by the ids that it predicts; None: those of the dataset.
            overlap_threshold: smallest overlap, in [0, 1], of an object in "segm_unseen_overlap".
            overlap_bin_edges: of "segm_unseen_overlap_bins", rising from 0 to 1; None: without.
            max_dets_per_image: detections of a class that count; 100 as in COCO.
            use_fast_impl: False: do not use Detectron2's compiled matching, whose AP differs from
                the official one by rounding only.

        Raises:
            InputError: a wrong argument, or annotations that cannot be evaluated; the sentence
                names the file, the id, the field, its value and what is allowed.
        """
        if not 0 <= overlap_threshold <= 1:
            raise InputError(f"overlap_threshold is {overlap_threshold}; it must be in [0, 1].")
        try:
            super().__init__(
                dataset_name,
                tasks,
                distributed,
                output_dir,
                max_dets_per_image=max_dets_per_image,
                use_fast_impl=has_compiled_cocoeval() and use_fast_impl is not False,
                **kwargs,
            )
        except Exception:  # pycocotools takes a file for what it should be
            json_file = MetadataCatalog.get(dataset_name).get("json_file")
            if json_file:
                check_coco(json_file, use="evaluation").raise_on_error()
            raise
        self._overlap_threshold = overlap_threshold
        self._overlap_bins = overlap_bins(overlap_bin_edges) if overlap_bin_edges else []
        self._overlaps: dict[int, float] | None = None
        if self._do_evaluation:
            reads_masks = self._tasks is None or "segm" in self._tasks
            prepare_ground_truth(self._coco_api, self._metadata.json_file, reads_masks)
            warn_of_many_objects(
                self._coco_api.dataset["annotations"],
                max_dets_per_image,
                f"objects in {self._metadata.json_file}",
                "A TEST.DETECTIONS_PER_IMAGE above 150 raises both limits, the model's and AP's.",
            )
            self._leave_out_masks_if_there_are_none()
        names = self._class_names()
        class_names = names if class_names is None else list(class_names)
        model_ids = match_classes(names, class_names, self._metadata.json_file)
        # By the model's ids; -1: the dataset lacks the class.
        self._dataset_ids = torch.full((len(class_names),), -1)
        self._dataset_ids[model_ids] = torch.arange(len(names))
        seen = _resolve_contiguous_ids(seen_classes, class_names)
        self._seen_classes = {i for i, k in enumerate(model_ids) if k in seen}

    def process(self, inputs, outputs):
        super().process(inputs, [self._with_ids_of_dataset(output) for output in outputs])

    def _with_ids_of_dataset(self, output: dict) -> dict:
        if "instances" not in output:
            return output
        found = output["instances"].to("cpu")
        ids = self._dataset_ids[found.pred_classes.long()]
        found = found[ids >= 0]
        found.pred_classes = ids[ids >= 0]
        return {**output, "instances": found}

    def _class_names(self) -> list[str]:
        # Datasets registered from a json set their metadata only when they are loaded.
        names = self._metadata.get("thing_classes")
        if names is None:
            names = [category["name"] for _, category in sorted(self._coco_api.cats.items())]
        return list(names)

    def _leave_out_masks_if_there_are_none(self):
        annotations = self._coco_api.dataset["annotations"]
        if not annotations or any(map(has_mask, annotations)):
            return
        if self._tasks is not None and "segm" in self._tasks:
            raise InputError(
                f"{self._metadata.json_file}: no annotation has a mask, but tasks is "
                f"{self._tasks}; pass tasks=('bbox',) to evaluate boxes alone."
            )
        if self._tasks is None:
            logger.warning(f"{self._metadata.json_file} has no masks: only boxes are evaluated.")
            self._tasks = ("bbox",)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)
        if iou_type not in ("bbox", "segm"):
            return results
        results["num_gt"] = len(self._evaluated_objects(coco_eval))
        self._results[iou_type] = results
        if coco_eval is None and self._tasks is None:
            # Without any prediction the parent infers the task "bbox" alone.
            self._results["segm"] = dict(results)
            iou_type = "segm"
        if iou_type == "segm":
            self._results.update(self._derive_subset_results(coco_eval))
            logger.info("Results, unseen classes in bold:\n" + results_table(self._results))
        return results

    def _derive_subset_results(self, coco_eval: COCOeval | None) -> dict[str, dict[str, float]]:
        seen, unseen = self._split_category_ids()
        if self._overlaps is None:
            self._overlaps = compute_overlaps(self._coco_api)
        objects = self._evaluated_objects(coco_eval)
        overlaps = [self._overlaps[x["id"]] for x in objects if x["category_id"] in unseen]
        num_gt = {
            "segm_seen": len(objects) - len(overlaps),
            "segm_unseen": len(overlaps),
            "segm_unseen_overlap": sum(x >= self._overlap_threshold for x in overlaps),
        }
        bins = {
            "AP_0" if x.high == 0 else f"AP_{x.low:g}_{x.high:g}": x for x in self._overlap_bins
        }
        if coco_eval is None:
            results = {task: dict.fromkeys(METRICS, float("nan")) for task in num_gt}
            of_bins = dict.fromkeys(bins, float("nan"))
        else:
            results, of_bins = self._evaluate_subsets(coco_eval, seen, unseen, bins)
        results = {task: {**results[task], "num_gt": num_gt[task]} for task in num_gt}
        if bins:
            results["segm_unseen_overlap_bins"] = of_bins
        return results

    def _evaluate_subsets(
        self, coco_eval: COCOeval, seen: set[int], unseen: set[int], bins: dict[str, OverlapBin]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        pairs = find_candidate_pairs(
            coco_eval.cocoGt,
            coco_eval.cocoDt.dataset["annotations"],
            max_detections=coco_eval.params.maxDets[-1],
            image_ids=coco_eval.params.imgIds,
            ious=coco_eval.ious,
        )
        # Crowds have no overlap, and count nowhere.
        overlaps = np.array([self._overlaps.get(x, 0.0) for x in pairs.gt_ids.tolist()])
        is_unseen = np.isin(pairs.category_ids[pairs.gt_classes], list(unseen))
        is_overlapped = is_unseen & (overlaps >= self._overlap_threshold)
        subsets = {name: Subset(is_unseen & x.contains(overlaps)) for name, x in bins.items()}
        for area in AREA_RANGES:
            subsets[f"all/{area}"] = Subset(np.ones_like(is_unseen), area)
            subsets[f"overlap/{area}"] = Subset(is_overlapped, area)
        precision = PrecisionOfSubsets(Matches(pairs), subsets)()
        results = {
            "segm_seen": subset_metrics(precision, "all", pairs.positions_of_classes(seen)),
            "segm_unseen": subset_metrics(precision, "all", pairs.positions_of_classes(unseen)),
            "segm_unseen_overlap": subset_metrics(precision, "overlap"),
        }
        results = {task: {k: float(x) for k, x in of.items()} for task, of in results.items()}
        return results, {name: float(mean_percent(precision[name])) for name in bins}

    def _split_category_ids(self) -> tuple[set[int], set[int]]:
        """The json's category ids of the seen and of the unseen classes."""
        category_ids = set(self._coco_api.getCatIds())
        # Like the parent, take the ids as contiguous where the metadata has no mapping.
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            to_contiguous = {x: x for x in range(len(self._class_names()))}
        unknown = sorted(category_ids - set(to_contiguous))
        if unknown:
            raise InputError(
                f"{self._metadata.json_file}: categories {unknown} are not among the dataset's "
                f"classes {sorted(to_contiguous)}. A dataset registered from a json must be loaded "
                "before it is evaluated."
            )
        seen = {x for x in category_ids if to_contiguous[x] in self._seen_classes}
        return seen, category_ids - seen

    def _evaluated_objects(self, coco_eval: COCOeval | None) -> list[dict]:
        """The non-crowd annotations of the evaluated images; of all images without an eval."""
        coco = self._coco_api
        image_ids = set(coco.imgs if coco_eval is None else coco_eval.params.imgIds)
        return [
            x
            for x in coco.dataset["annotations"]
            if x["image_id"] in image_ids and x["category_id"] in coco.cats and not x["iscrowd"]
        ]


def warn_of_many_objects(
    annotations: Sequence[Mapping], max_detections: int, what: str, remedy: str
) -> bool:
    """
    Warn, once, where an image has more objects or detections of a class than AP counts.

    Args:
        annotations: of the ground truth, or the entries of results.
        max_detections: of a class in an image.
        what: the annotations are, such as "objects of val.json".
        remedy: where to change the number.

    Returns:
        Whether there is such an image.
    """
    counts = Counter(
        (x["image_id"], x["category_id"]) for x in annotations if not x.get("iscrowd", 0)
    )
    num = sum(x > max_detections for x in counts.values())
    if num:
        (image, category), most = counts.most_common(1)[0]
        logger.warning(
            f"AP counts {max_detections} detections of a class in an image, but there are more "
            f"{what}: {most} of category {category} in image {image} are the most of {num} such "
            f"cases. {remedy}"
        )
    return num > 0


def has_compiled_cocoeval() -> bool:
    """Whether this Detectron2 has compiled code; a pure Python build has a stand-in `_C.py`."""
    spec = importlib.util.find_spec("detectron2._C")
    return spec is not None and not str(spec.origin).endswith(".py")


def _resolve_contiguous_ids(seen_classes: str | Iterable[int], class_names: list[str]) -> set[int]:
    if isinstance(seen_classes, str):
        return set(resolve_seen_classes(seen_classes, class_names))
    ids = set(seen_classes)
    if not ids <= set(range(len(class_names))):
        raise InputError(
            f"seen_classes is {seen_classes!r}; it must be one string (class names separated by "
            f"commas) or hold contiguous ids, 0 to {len(class_names) - 1}."
        )
    return ids
