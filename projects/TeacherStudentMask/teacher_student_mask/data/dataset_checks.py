"""The checks of all annotation files of a training or evaluation, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..coco_json import check_coco, classes_of, is_from_model, read_json
from ..coco_rules import Finding, Report
from ..errors import InputError
from .datasets import is_json_path, remember_as_checked

__all__ = ["answer_of_main_process", "check_datasets"]

logger = logging.getLogger(__name__)

# Modules whose functions read a COCO json; with one of them a dataset was registered.
_OURS = f"{__package__}.datasets"
_DETECTRON2S, _LVIS = "detectron2.data.datasets.coco", "detectron2.data.datasets.lvis"
_MAY_HAND_ON = (
    "unless the function hands on 'mask_source', as load_coco_json does with "
    "extra_annotation_keys=['mask_source']"
)
# What one training set lacks, another may have.
_LACKS = {"no objects", "no seen mask"}


def answer_of_main_process(ask: Callable[[], Any]) -> Any:
    """
    Let the main process ask, and give its answer to all.

    Raises:
        InputError: in all processes where the main one has failed, which raises what ``ask`` did.
    """
    answer = failure = None
    if comm.is_main_process():
        try:
            answer = ask()
        except Exception as error:  # the others wait, whatever it is
            failure = error
    message = None if failure is None else str(failure) or repr(failure)
    answer, message = comm.all_gather((answer, message))[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise InputError(message)
    return answer


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
    ``json_file`` in their metadata are passed over. For training with a dataset that is read by a
    function that is not known here, findings are warnings. The classes of the datasets become
    known, so that nothing needs to read a file for them.

    Args:
        train, test: names of registered datasets, ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        seen_classes: ``DATASETS.SEEN_CLASSES``, of the training sets.
        num_classes: of the model; None: any number will do.
        reads_masks: whether training has a mask head.
        needs_masks: whether this head learns from masks alone.

    Raises:
        InputError: the sentence of the first error: file, id, field, value and what is allowed.
    """

    def check() -> tuple[list[str], dict[str, dict]]:
        reports, classes = _check_all(train, test, seen_classes, num_classes, reads_masks)
        training = [reports.get(("train", name)) for name in train]
        if None in training or not all({x.rule for x in r.errors} & _LACKS for r in training):
            pardoned = _LACKS
        else:
            pardoned = set() if needs_masks and reads_masks else {"no seen mask"}
        for report in filter(None, training):
            report.findings = [x.as_warning() if x.rule in pardoned else x for x in report.findings]
        _log(reports)
        for report in reports.values():
            for error in report.errors:
                raise InputError(str(error))
        ours = {MetadataCatalog.get(n).json_file for _, n in reports if _loader_of(n) == _OURS}
        return sorted(ours), classes

    checked_files, classes = answer_of_main_process(check)
    for json_file in checked_files:
        remember_as_checked(json_file)
    for name, of_dataset in classes.items():
        MetadataCatalog.get(name).set(**of_dataset)


def _check_all(
    train: Sequence[str],
    test: Sequence[str],
    seen_classes: str,
    num_classes: int | None,
    reads_masks: bool,
) -> tuple[dict[tuple[str, str], Report], dict[str, dict]]:
    # Returns the reports by (use, name), and the classes of datasets that have none yet.
    uses_of: dict[str, list[tuple[str, str]]] = {}
    for use, name in dict.fromkeys([*(("train", x) for x in train), *(("test", x) for x in test)]):
        if name not in DatasetCatalog:
            raise InputError(
                f"DATASETS.{use.upper()} names {name!r}, which is not registered; allowed: "
                f"{', '.join(DatasetCatalog.list())}."
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file:
            uses_of.setdefault(json_file, []).append((use, name))
        else:
            logger.debug(f"{name} has no json_file; its annotations are not checked.")
    reports, classes = {}, {}
    for json_file, uses in uses_of.items():
        try:
            data = read_json(PathManager.get_local_path(json_file))
        except (OSError, ValueError):
            data = None  # the checks read it again, and say what is the matter
        for use, name in uses:
            report = _check_one(use, name, json_file, data, seen_classes, num_classes, reads_masks)
            reports[use, name] = report
            is_known = _loader_of(name) in (_OURS, _DETECTRON2S)
            if (
                is_known
                and not report.errors
                and not MetadataCatalog.get(name).get("thing_classes")
            ):
                classes[name] = classes_of(data)
        del data  # of a large file, gigabytes
    return reports, classes


def _loader_of(name: str) -> str:
    """The module of the function with which a dataset was registered."""
    return getattr(DatasetCatalog[name], "__module__", "")


def _check_one(
    use: str,
    name: str,
    json_file: str,
    data: object,
    seen_classes: str,
    num_classes: int | None,
    reads_masks: bool,
) -> Report:
    loader, metadata = _loader_of(name), MetadataCatalog.get(name)
    # Other functions may look for the images elsewhere.
    image_root = metadata.get("image_root") if loader in (_OURS, _DETECTRON2S) else None
    if image_root is not None and "://" in str(image_root):
        image_root = None  # not a folder of this machine
    options = {"data": data, "image_root": image_root, "num_classes": num_classes}
    may_be_predicted_on = loader != _OURS or (isinstance(data, dict) and "annotations" in data)
    if use == "test" and may_be_predicted_on:
        report = check_coco(json_file, use="evaluation", **options)
    else:
        thing_classes = metadata.get("thing_classes")
        if thing_classes and not _has_classes(data, thing_classes):
            seen_classes = None  # they are other names
        options["reads_masks"] = reads_masks and seen_classes is not None
        report = check_coco(json_file, seen_classes=seen_classes, **options)
    num = len(data["categories"]) if "number of classes" in {x.rule for x in report.errors} else 0
    # A json that the config names by its path is not part of another dataset.
    is_part = num < (num_classes or 0) and not is_json_path(name)
    report.findings = [_judge(x, use, loader, is_part) for x in report.findings]
    if use == "train" and reads_masks and loader != _OURS and report.classes:
        rows = data["annotations"]
        consequence = [_MAY_HAND_ON] if loader not in (_DETECTRON2S, _LVIS) else []
        is_lost = [is_from_model(x) and bool(x.get("segmentation")) for x in rows]
        report.add("source is lost", rows, is_lost, None, *consequence)
    return report


def _has_classes(data: object, names: Sequence[str]) -> bool:
    try:
        return classes_of(data)["thing_classes"] == list(names)
    except (KeyError, TypeError):
        return False


def _judge(finding: Finding, use: str, loader: str, is_part: bool) -> Finding:
    # What the function that reads the file makes of a finding.
    if finding.rule == "number of classes" and is_part:
        return finding.as_warning("the classes beyond them are never trained")
    is_id = finding.rule in ("annotation.id", "annotation id twice")
    if is_id and use == "train" and loader == _OURS:
        return finding.as_warning("training does without")
    if finding.rule == "unknown image" and use == "test" and loader == _OURS:
        return replace(finding, severity="error")
    if finding.rule == "annotation without id" and loader == _DETECTRON2S:
        return replace(finding, severity="error")  # pycocotools would stop with a KeyError
    is_optional = finding.field in ("file_name", "categories") or use == "train"
    if finding.severity == "error" and is_optional and loader not in (_OURS, _DETECTRON2S):
        return finding.as_warning("the function of this dataset may read something else")
    return finding


def _log(reports: dict[tuple[str, str], Report]) -> None:
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
