"""COCO AP on all, seen, unseen and unseen overlapped objects, and tables of it."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import log_first_n
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..class_splits import match_classes, resolve_seen_classes
from ..coco_json import check_coco, has_mask, prepare_ground_truth
from ..errors import InputError
from .overlap import compute_overlaps, overlap_bins
from .subset_ap import find_candidate_pairs
from .tasks import (
    MASK_TASKS,
    METRICS,
    YARDSTICKS,
    TaskMetrics,
    compare_with_yardsticks,
    tasks_with_objects,
    yardstick_results,
)

logger = logging.getLogger(__name__)

__all__ = ["PartiallySupervisedCOCOEvaluator", "results_table", "warn_of_many_objects"]


class PartiallySupervisedCOCOEvaluator(COCOEvaluator):
    """
    COCOEvaluator that also reports mask AP on seen classes, unseen classes and overlapped objects.

    To the parent's tasks "bbox" and "segm" it adds

    - "segm_seen", "segm_unseen": the objects of the seen and of the unseen classes;
    - "segm_unseen_overlap": the objects of unseen classes with an overlap, Eq. (1) of the paper, of
      at least the threshold. All others are ignored: a detection matched to one is neither right
      nor wrong. A detection matched to no object is a false positive as always.

    Each has AP, AP50, AP75, APs, APm, APl in 0-100, and num_gt, the number of non-crowd objects
    that count; an AP over no objects is nan. With ``overlap_bin_edges`` there is also

    - "segm_unseen_overlap_bins": AP of the unseen objects in each bin of the overlap, "AP_0" for
      those with O = 0, "AP_0.1_0.2" for 0.1 < O <= 0.2 (Fig. 2 of the paper).

    With ``with_yardsticks``, for predictions on ground-truth boxes, each mask task is there for the
    two of :func:`yardstick_results` as well: "segm_unseen/filled_box",
    "segm_unseen/inscribed_ellipse", and so on.

    Classes are matched by name: the dataset may list the model's under other ids, or a part of
    them; predictions of the classes that it lacks are left out.

    Mask AP needs a mask on every object; where no object has one, boxes alone are evaluated.
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
        with_yardsticks: bool = False,
        max_dets_per_image: int = 100,
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
            with_yardsticks: evaluate filled boxes and inscribed ellipses, too.
            max_dets_per_image: detections of a class that count; 100 as in COCO.

        Raises:
            InputError: a wrong argument, or annotations that cannot be evaluated.
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
                **kwargs,
            )
        except Exception:  # pycocotools takes a file for what it should be
            json_file = MetadataCatalog.get(dataset_name).get("json_file")
            if json_file:
                check_coco(json_file, use="evaluation").raise_on_error()
            raise
        self._overlap_threshold = overlap_threshold
        self._with_yardsticks = with_yardsticks
        self._overlap_bins = overlap_bins(overlap_bin_edges) if overlap_bin_edges else []
        if self._do_evaluation:
            reads_masks = self._tasks is None or "segm" in self._tasks
            prepare_ground_truth(self._coco_api, self._metadata.json_file, reads_masks)
            warn_of_many_objects(
                self._coco_api.dataset["annotations"],
                max_dets_per_image,
                self._metadata.json_file,
                "A TEST.DETECTIONS_PER_IMAGE above 150 raises both limits, the model's and AP's.",
            )
            annotations = self._coco_api.dataset["annotations"]
            if annotations and not any(map(has_mask, annotations)) and tasks != ("bbox",):
                json_file = self._metadata.json_file
                message = f"{json_file} has no masks: only boxes are evaluated."
                log_first_n(logging.WARNING, message, name=__name__, key="message")
                self._tasks = ("bbox",)
        # Datasets registered from a json set their metadata only when they are loaded.
        names = self._metadata.get("thing_classes")
        names = names or [x["name"] for _, x in sorted(self._coco_api.cats.items())]
        class_names = names if class_names is None else list(class_names)
        model_ids = match_classes(names, class_names, self._metadata.json_file)
        # By the model's ids; -1: the dataset lacks the class.
        self._dataset_ids = torch.full((len(class_names),), -1)
        self._dataset_ids[model_ids] = torch.arange(len(names))
        if isinstance(seen_classes, str):
            seen_classes = resolve_seen_classes(seen_classes, class_names)
        seen = set(seen_classes)
        if not seen <= set(range(len(class_names))):
            raise InputError(
                f"seen_classes is {seen_classes!r}; it must be one string (class names separated "
                f"by commas) or hold contiguous ids, 0 to {len(class_names) - 1}."
            )
        self._seen_classes = {i for i, k in enumerate(model_ids) if k in seen}

    def process(self, inputs, outputs):
        all_found = []
        for output in outputs:
            found = output["instances"].to("cpu")
            ids = self._dataset_ids[found.pred_classes.long()]
            found = found[ids >= 0]
            found.pred_classes = ids[ids >= 0]
            all_found.append({"instances": found})
        super().process(inputs, all_found)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)
        if iou_type not in ("bbox", "segm"):
            return results
        coco = self._coco_api
        image_ids = set(coco.imgs if coco_eval is None else coco_eval.params.imgIds)
        results["num_gt"] = sum(
            x["image_id"] in image_ids and not x["iscrowd"] for x in coco.dataset["annotations"]
        )
        self._results[iou_type] = results
        if coco_eval is None and self._tasks is None:
            # Without any prediction the parent infers the task "bbox" alone.
            self._results["segm"] = dict(results)
            iou_type = "segm"
        if iou_type == "segm":
            self._results.update(self._derive_subset_results(coco_eval))
        return results

    def _derive_subset_results(self, coco_eval: COCOeval | None) -> dict[str, dict[str, float]]:
        overlaps = compute_overlaps(self._coco_api)
        split = overlaps, self._seen_classes, self._overlap_threshold
        if coco_eval is None:
            evaluate = TaskMetrics(
                find_candidate_pairs(self._coco_api, []), *split, self._overlap_bins
            )
            # As the parent, which evaluates nothing where nothing is found.
            values = dict.fromkeys(evaluate(), float("nan"))
        else:
            params = coco_eval.params
            limits = {"max_detections": params.maxDets[-1], "image_ids": params.imgIds}
            found, ious = coco_eval.cocoDt.dataset["annotations"], coco_eval.ious
            pairs = find_candidate_pairs(coco_eval.cocoGt, found, ious=ious, **limits)
            evaluate = TaskMetrics(pairs, *split, self._overlap_bins)
            values = evaluate()
        results = evaluate.by_task(values)
        if self._overlap_bins:
            results["segm_unseen_overlap_bins"] = {
                f"AP_{x.low:g}_{x.high:g}" if x.high else "AP_0": float(values[f"bin {k}", "AP"])
                for k, x in enumerate(self._overlap_bins)
            }
        if self._with_yardsticks and coco_eval is not None:
            for name, found in yardstick_results(self._coco_api).items():
                evaluate = TaskMetrics(
                    find_candidate_pairs(self._coco_api, found, **limits), *split, bins=[]
                )
                of_tasks = evaluate.by_task(evaluate())
                results |= {_yardstick_task(task, name): x for task, x in of_tasks.items()}
        return results


def warn_of_many_objects(
    annotations: Sequence[Mapping], max_detections: int, json_file: str, remedy: str
) -> None:
    """Warn where an image has more objects of a class than AP counts, and say the remedy."""
    groups = ((x["image_id"], x["category_id"]) for x in annotations if not x.get("iscrowd", 0))
    counts = Counter(groups)
    num = sum(x > max_detections for x in counts.values())
    if num:
        (image, category), most = counts.most_common(1)[0]
        logger.warning(
            f"AP counts {max_detections} detections of a class in an image, but there are more "
            f"objects in {json_file}: {most} of category {category} in image {image} are the most "
            f"of {num} such cases. {remedy}"
        )


def results_table(results: Mapping) -> str:
    """
    Results as a Markdown table of one row per task that has objects; unseen classes are in bold.

    Where there are yardsticks, a sentence names the tasks on which the masks do not beat them.

    Args:
        results: {task: {metric: value}} as an evaluator returns it, or {dataset: such a dict},
            which gives one table per dataset.
    """
    if any(isinstance(x, Mapping) for of_task in results.values() for x in of_task.values()):
        return "\n\n".join(f"{name}:\n{results_table(x)}" for name, x in results.items())
    yardsticks = {
        name: {task: results[_yardstick_task(task, name)] for task in MASK_TASKS}
        for name in YARDSTICKS
        if _yardstick_task("segm", name) in results
    }
    tasks = ["bbox"] if "bbox" in results else []
    for task in tasks_with_objects(results):
        tasks += [task, *(_yardstick_task(task, name) for name in yardsticks)]
    if not tasks:
        return "no results"
    header, lines = ("task", *METRICS, "num_gt"), []
    for task in tasks:
        values = [results[task].get(metric, math.nan) for metric in header[1:]]
        texts = [f"{x:.{0 if isinstance(x, int) else 2}f}".replace("nan", "-") for x in values]
        lines.append([f"**{x}**" if "unseen" in task else x for x in (task, *texts)])
    alignment = ["left", *["right"] * len(header[1:])]
    table = tabulate(lines, header, tablefmt="pipe", colalign=alignment, disable_numparse=True)
    sentence = compare_with_yardsticks(results, yardsticks) if yardsticks else ""
    return f"{table}\n\n{sentence}" if sentence else table


def _yardstick_task(task: str, yardstick: str) -> str:
    return f"{task}/{yardstick.replace(' ', '_')}"
