"""The checks of all annotation files of a training or evaluation, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..checks.annotation_checks import check_annotations
from ..checks.annotation_report import AnnotationReport, Finding
from ..checks.evaluation_checks import check_for_evaluation
from ..checks.mask_sources import is_from_model
from ..checks.reading import read_json
from .datasets import classes_of, remember_as_checked
from .json_datasets import is_json_path

__all__ = ["check_datasets"]

logger = logging.getLogger(__name__)

# Modules whose functions read a COCO json; with one of them a dataset was registered.
_OURS = f"{__package__}.datasets"
_DETECTRON2S, _LVIS = "detectron2.data.datasets.coco", "detectron2.data.datasets.lvis"


@dataclass
class _Outcome:
    """What the main process tells the others."""

    error: str | None = None
    checked_files: tuple[str, ...] = ()
    classes: dict[str, dict] | None = None  # metadata of datasets that have none yet


def check_datasets(
    train: Sequence[str],
    test: Sequence[str],
    seen_classes: str,
    num_classes: int | None = None,
    reads_masks: bool = True,
    needs_masks: bool = True,
) -> None:
    """
    Check the json of every dataset that has one, before a model is built.

    Findings are logged, and for each training set the counts of its classes. The main process
    checks; the others wait for its answer, and all of them raise the same error. Datasets without
    ``json_file`` in their metadata are passed over. Of functions that are not known here, only what
    is wrong with any COCO json is an error. The classes of the datasets become known, so that
    nothing needs to read a file for them.

    Args:
        train, test: names of registered datasets, ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        seen_classes: ``DATASETS.SEEN_CLASSES``, of the training sets.
        num_classes: of the model; None: any number will do.
        reads_masks: whether training has a mask head.
        needs_masks: whether this head learns from masks alone.

    Raises:
        ValueError: the sentence of the first error: file, id, field, value and what is allowed.
    """
    outcome, failure = None, None
    if comm.is_main_process():
        try:
            outcome = _Checks(seen_classes, num_classes, reads_masks, needs_masks).run(train, test)
        except Exception as error:  # the others wait, whatever it is
            failure, outcome = error, _Outcome(f"the check of the datasets failed: {error!r}")
    (outcome,) = (x for x in comm.all_gather(outcome) if x is not None)
    if failure is not None:
        raise failure
    if outcome.error is not None:
        raise ValueError(outcome.error)
    for json_file in outcome.checked_files:
        remember_as_checked(json_file)
    for name, classes in outcome.classes.items():
        MetadataCatalog.get(name).set(**classes)


class _Checks:
    """The checks of one start."""

    def __init__(
        self, seen_classes: str, num_classes: int | None, reads_masks: bool, needs_masks: bool
    ):
        self._seen_classes, self._num_classes = seen_classes, num_classes
        self._reads_masks, self._needs_masks = reads_masks, reads_masks and needs_masks

    def run(self, train: Sequence[str], test: Sequence[str]) -> _Outcome:
        uses = [*(("train", name) for name in train), *(("test", name) for name in test)]
        by_file = {}
        for use, name in dict.fromkeys(uses):
            if name not in DatasetCatalog:
                key = f"DATASETS.{use.upper()}"
                return _Outcome(
                    f"{key} names {name!r}, which is not registered; allowed: "
                    f"{', '.join(DatasetCatalog.list())}."
                )
            json_file = MetadataCatalog.get(name).get("json_file")
            if json_file:
                by_file.setdefault(json_file, []).append((use, name))
            else:
                logger.debug(f"{name} has no json_file; its annotations are not checked.")
        reports, classes = {}, {}
        for json_file, its_uses in by_file.items():
            # Not kept: a large one fills gigabytes.
            data = self._read(json_file)
            for use, name in its_uses:
                report = reports[use, name] = self._check(use, name, json_file, data)
                is_known = _loader_of(name) in (_OURS, _DETECTRON2S)
                if is_known and not report.errors and isinstance(data, dict):
                    if not MetadataCatalog.get(name).get("thing_classes"):
                        classes[name] = classes_of(data)
            del data
        _judge_lacks(reports, train)
        _log(reports)
        for report in reports.values():
            for error in report.errors:
                return _Outcome(str(error))
        ours = {MetadataCatalog.get(n).json_file for _, n in reports if _loader_of(n) == _OURS}
        return _Outcome(checked_files=tuple(ours), classes=classes)

    def _read(self, json_file: str) -> object:
        try:
            return read_json(PathManager.get_local_path(json_file))
        except (OSError, ValueError):
            return None  # the checks read it again, and say what is the matter

    def _check(self, use: str, name: str, json_file: str, data: object) -> AnnotationReport:
        loader, metadata = _loader_of(name), MetadataCatalog.get(name)
        # Other functions may look for the images elsewhere.
        image_root = metadata.get("image_root") if loader in (_OURS, _DETECTRON2S) else None
        if image_root is not None and "://" in str(image_root):
            image_root = None  # no folder of this machine
        if use == "test":
            report = check_for_evaluation(
                json_file, data, image_root=image_root, num_classes=self._num_classes
            )
            if loader == _OURS and isinstance(data, dict) and "annotations" not in data:
                report = check_annotations(json_file, data=data)
        else:
            seen_classes = self._seen_classes
            thing_classes = metadata.get("thing_classes")
            if thing_classes and not _has_names(data, thing_classes):
                seen_classes = None  # they are other names
            report = check_annotations(
                json_file, image_root, seen_classes, self._num_classes, data=data
            )
            if self._reads_masks and loader != _OURS and isinstance(data, dict):
                _check_sources_arrive(report, data, loader)
            reads_masks = self._reads_masks and seen_classes is not None
            report = report.judged(lambda x: _judge_training(x, reads_masks, self._needs_masks))
        # A json that the config names by its path is no part of another dataset.
        may_be_part = isinstance(data, dict) and not is_json_path(name)
        if may_be_part and _num_categories(data) < (self._num_classes or 0):
            report = report.judged(_judge_fewer_classes)
        return report.judged(lambda x: _judge_loading(x, use, loader, json_file))


def _loader_of(name: str) -> str:
    """The module of the function with which a dataset was registered."""
    return getattr(DatasetCatalog[name], "__module__", "")


def _num_categories(data: dict) -> int:
    categories = data.get("categories")
    return len(categories) if isinstance(categories, list) else 0


def _has_names(data: object, names: Sequence[str]) -> bool:
    """Whether these are the classes of a COCO json."""
    try:
        return classes_of(data)["thing_classes"] == list(names)
    except (KeyError, TypeError):
        return False


def _check_sources_arrive(report: AnnotationReport, data: dict, loader: str) -> None:
    """Functions that are not ours may leave "mask_source" out: a model's mask is a human's then."""
    rows = data.get("annotations")
    if type(rows) is not list or not set(map(type, rows)) <= {dict}:
        return  # found already
    is_known = loader in (_DETECTRON2S, _LVIS)
    if is_known:
        remedy = (
            "Detectron2's function of this dataset leaves this field out, and training would take "
            "the mask for a human's; register the file with register_partial_coco, or give its "
            "path in DATASETS.TRAIN"
        )
    else:
        remedy = (
            "training takes the mask for a human's unless the function of this dataset hands on "
            "'mask_source', as load_coco_json does with extra_annotation_keys=['mask_source']"
        )
    is_lost = [is_from_model(x) and bool(x.get("segmentation")) for x in rows]
    severity = "error" if is_known else "warning"
    report.add(severity, "annotation", rows, is_lost, "mask_source", remedy)


def _judge_training(finding: Finding, reads_masks: bool, needs_masks: bool) -> Finding:
    if finding.severity == "error" and finding.field == "segmentation" and not reads_masks:
        return finding.as_warning()
    is_lack = finding.field == "seen_classes" and finding.is_about_none
    return finding.as_warning() if is_lack and not needs_masks else finding


def _judge_fewer_classes(finding: Finding) -> Finding:
    if (finding.unit, finding.field) == ("", "categories"):
        return finding.as_warning("the classes beyond them are never trained")
    return finding


def _judge_loading(finding: Finding, use: str, loader: str, json_file: str) -> Finding:
    """What the function that reads the file makes of an error."""
    where = (finding.unit, finding.field)
    if loader == _OURS:
        is_left_out = where == ("annotation", "image_id")
        if use == "train":
            is_id = where == ("annotation", "id")
            return finding.as_warning("training does without") if is_id else finding
        if is_left_out:  # by COCO's evaluation, but not by this function
            return replace(finding, severity="error", remedy="allowed: an id of 'images'")
        return finding
    if finding.severity == "warning":
        # pycocotools indexes annotations by their ids.
        return finding.as_error() if where == ("annotation", "id") else finding
    if where == ("annotation", "image_id"):
        return finding.as_warning("Detectron2 leaves the object out")
    if where == ("annotation", "id") and use == "train" and "minival" in json_file:
        return finding.as_warning("Detectron2 takes it in this file")
    if where == ("image", "file_name") and loader != _DETECTRON2S:
        return finding.as_warning("the function of this dataset may know another")
    is_optional = use == "train" or where == ("", "categories")
    if is_optional and loader not in (_DETECTRON2S, _LVIS):
        return finding.as_warning("the function of this dataset may read something else")
    return finding


def _judge_lacks(reports: dict[tuple[str, str], AnnotationReport], train: Sequence[str]) -> None:
    """What one training set lacks, another may have: objects, and masks."""
    training = [reports.get(("train", name)) for name in train]
    if None in training or not all(any(map(_is_lack, x.errors)) for x in training):
        for report in filter(None, training):
            judged = report.judged(lambda x: x.as_warning() if _is_lack(x) else x)
            report.findings = judged.findings


def _is_lack(finding: Finding) -> bool:
    return finding.field in ("annotations", "seen_classes") and finding.is_about_none


def _log(reports: dict[tuple[str, str], AnnotationReport]) -> None:
    told = set()
    for (use, name), report in reports.items():
        new = [x for x in report.findings if str(x) not in told]
        told.update(map(str, new))
        replace(report, findings=new).log()
        if use == "train" and report.classes:
            logger.info(
                f"{name}: {report.num_images} images, {report.num_annotations} annotations in "
                f"{report.file}, {len(report.warnings)} kinds of warnings\n{report.class_table()}"
            )
