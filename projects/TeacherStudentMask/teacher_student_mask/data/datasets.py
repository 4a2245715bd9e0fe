"""COCO jsons in which any object may lack its mask, as datasets of Detectron2, and their checks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..coco_json import (
    Finding,
    Report,
    check_coco,
    classes_of,
    is_from_model,
    read_json,
    valid_polygons,
)
from ..coco_json.masks import is_outline
from ..errors import InputError

__all__ = [
    "answer_of_main_process",
    "check_datasets",
    "load_partial_coco_json",
    "register_json_datasets",
    "register_partial_coco",
]

logger = logging.getLogger(__name__)

# Errors in spite of which a file can be loaded: a file without objects still has classes, and only
# evaluation needs ids.
_HARMLESS = {"no objects", "annotation.id", "annotation id twice"}

# States of files that were found to be good, so that they are not checked at every reading.
_checked_files: set[tuple] = set()

# Datasets that a config names by their paths: path -> (folder of the images, state of the json).
_json_datasets: dict[str, tuple[str, tuple | None]] = {}

# Modules whose functions read a COCO json; the files of no other datasets are checked.
_OURS, _DETECTRON2S = __name__, "detectron2.data.datasets.coco"


def register_partial_coco(name: str, json_file: str, image_root: str) -> None:
    """
    Register a COCO json, masks on any part of its objects, as a Detectron2 dataset.

    Args:
        name: of the dataset, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: path of the COCO annotations; read when the dataset is first used.
        image_root: folder that the ``file_name`` of the images is relative to.
    """
    DatasetCatalog.register(name, lambda: load_partial_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def load_partial_coco_json(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict]:
    """
    Read a COCO json into Detectron2's standard dataset format; no box is dropped.

    Detectron2's ``load_coco_json`` drops an object whose polygons are all malformed, and with it a
    box that detection needs. Here such an object is one without a mask. Keypoints are not read.

    Args:
        json_file: path of the COCO annotations.
        image_root: folder that the ``file_name`` of the images is relative to.
        dataset_name: if given, class names and the map from category ids to contiguous ids are
            stored in its metadata.

    Returns:
        One dict an image, sorted by image id. ``segmentation`` is there only where the json holds
        at least one polygon or an RLE, ``mask_source`` as in the json.

    Raises:
        InputError: what :func:`check_coco` calls an error, but for masks.
    """
    coco = read_json(json_file)
    if _state_of(json_file) not in _checked_files:
        # Masks are checked where they are used.
        for finding in check_coco(json_file, data=coco, reads_masks=False).errors:
            if finding.rule not in _HARMLESS:
                raise InputError(str(finding))
    classes = classes_of(coco)
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(**classes)
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    }
    num_without_mask = 0
    for annotation in coco["annotations"]:
        obj = {
            "bbox": list(annotation["bbox"]),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": classes["thing_dataset_id_to_contiguous_id"][annotation["category_id"]],
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if "mask_source" in annotation:
            obj["mask_source"] = annotation["mask_source"]
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and set(map(type, segmentation)) <= {list}:
            # An outline in another form stays, for it is an error where it is used.
            if is_outline(segmentation):
                segmentation = valid_polygons(segmentation)
        if segmentation:
            obj["segmentation"] = segmentation
        num_without_mask += not segmentation
        records[annotation["image_id"]]["annotations"].append(obj)
    logger.info(
        f"Loaded {len(records)} images with {len(coco['annotations'])} objects from {json_file}; "
        f"{num_without_mask} objects have a box only."
    )
    return list(records.values())


def _state_of(json_file: str) -> tuple | None:
    # The file as it is now; None if there is none.
    try:
        stat = os.stat(json_file)
    except OSError:
        return None
    # Coarse clocks give two versions of a file one time; a replaced one has another number.
    return os.path.realpath(json_file), stat.st_ino, stat.st_mtime_ns, stat.st_size


def _is_json_path(name: str) -> bool:
    # A name that was registered in another way, whatever it ends in, is a name.
    is_other = name in DatasetCatalog.list() and name not in _json_datasets
    return name.lower().endswith(".json") and not is_other


def register_json_datasets(cfg: CfgNode, required: Sequence[str] = ()) -> None:
    """
    Register each json that ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names by its path.

    The path as it stands in the config becomes the name of the dataset. The images are looked for
    in ``DATASETS.TRAIN_IMAGE_ROOT`` and ``DATASETS.TEST_IMAGE_ROOT``; where that is empty, in the
    folder of the json. Nothing is read. Each process has a catalog of its own, so each calls this.
    Further calls change nothing but for a json that has changed, or has another folder of images.

    Args:
        cfg: not changed.
        required: of "TRAIN" and "TEST", whose files must exist.

    Raises:
        InputError: a required file does not exist; or one path is in both lists with two folders.
    """
    roots: dict[str, str] = {}
    for key in ("TRAIN", "TEST"):
        root = cfg.DATASETS[f"{key}_IMAGE_ROOT"]
        for path in filter(_is_json_path, cfg.DATASETS[key]):
            if key in required and not os.path.isfile(path):
                raise InputError(
                    f"DATASETS.{key} names {path!r}, which is not a registered dataset, and there "
                    f"is no such file; relative paths start at {os.getcwd()}. Allowed: the path of "
                    "a COCO json, or a name registered with register_partial_coco."
                )
            image_root = root or os.path.dirname(path)
            if roots.setdefault(path, image_root) != image_root:
                raise InputError(
                    f"{path} is in DATASETS.TRAIN and DATASETS.TEST, with its images in "
                    f"{roots[path]!r} and in {image_root!r}; DATASETS.TRAIN_IMAGE_ROOT and "
                    "DATASETS.TEST_IMAGE_ROOT must be the same for it."
                )
    for path, image_root in roots.items():
        state = (image_root, _state_of(path))
        if path in DatasetCatalog.list():
            if _json_datasets[path] == state:
                continue
            # The classes of a json that was edited may be others, and metadata cannot be changed.
            DatasetCatalog.remove(path)
            MetadataCatalog.remove(path)
        register_partial_coco(path, path, image_root)
        _json_datasets[path] = state


def answer_of_main_process(ask: Callable[[], Any]) -> Any:
    """
    Let the main process ask, and give its answer to all.

    Raises:
        InputError: in all processes, where ``ask`` has raised it in the main one.
    """
    answer = message = None
    try:
        answer = ask() if comm.is_main_process() else None
    except InputError as error:
        message = str(error)
    answer, message = comm.all_gather((answer, message))[0]
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
    rectangle_as_box_only: bool = False,
) -> None:
    """
    Check the json of every dataset that has one, before a model is built.

    Findings are logged, and for each training set the counts of its classes. The main process
    checks; the others wait for its answer, and all of them raise the same error. Only datasets
    that are read by this module, or Detectron2's ``load_coco_json``, are checked. Their classes
    become known, so that nothing needs to read a file for them.

    Args:
        train, test: names of registered datasets, ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        seen_classes: ``DATASETS.SEEN_CLASSES``, of the training sets.
        num_classes: of the model, for the training sets; None: any number will do.
        reads_masks: whether training has a mask head.
        needs_masks: whether this head learns from masks alone.
        rectangle_as_box_only: ``INPUT.RECTANGLE_AS_BOX_ONLY``.

    Raises:
        InputError: the sentence of the first error: file, id, field, value and what is allowed.
    """

    def check() -> tuple[list[tuple], dict[str, dict]]:
        reports, classes = _check_all(train, test, seen_classes, num_classes, reads_masks)
        # What one training set lacks, another may have.
        training = [reports.get(("train", name)) for name in train]
        lacking = {"no objects", "no seen mask"}
        if None in training or not all({x.rule for x in r.errors} & lacking for r in training):
            pardoned = lacking
        else:
            pardoned = set() if needs_masks and reads_masks else {"no seen mask"}
        for report in filter(None, training):
            report.findings = [x.as_warning() if x.rule in pardoned else x for x in report.findings]
        _log(reports, reads_masks, rectangle_as_box_only)
        for report in reports.values():
            for error in report.errors:
                raise InputError(str(error))
        return [_state_of(x.file) for x in reports.values()], classes

    states, classes = answer_of_main_process(check)
    _checked_files.update(states)
    for name, of_dataset in classes.items():
        MetadataCatalog.get(name).set(**of_dataset)


def _check_all(
    train: Sequence[str],
    test: Sequence[str],
    seen_classes: str,
    num_classes: int | None,
    reads_masks: bool,
) -> tuple[dict[tuple[str, str], Report], dict[str, dict]]:
    # Returns the reports by (use, name), and the classes of datasets that have none yet. Warns of
    # images that training and test sets share.
    uses_of: dict[str, list[tuple[str, str]]] = {}
    for use, name in dict.fromkeys([*(("train", x) for x in train), *(("test", x) for x in test)]):
        if name not in DatasetCatalog:
            raise InputError(
                f"DATASETS.{use.upper()} names {name!r}, which is not registered; allowed: "
                f"{', '.join(DatasetCatalog.list())}."
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and _loader_of(name) in (_OURS, _DETECTRON2S):
            uses_of.setdefault(json_file, []).append((use, name))
        else:
            logger.debug(f"{name} is read by a function of its own, and not checked.")
    reports, classes = {}, {}
    files: dict[str, set[str]] = {"train": set(), "test": set()}
    for json_file, uses in uses_of.items():
        # Once for all uses; gigabytes of a large file, which go before the next.
        try:
            data = read_json(json_file)
        except InputError:
            data = None  # the checks read it again, and say what is the matter
        for use, name in uses:
            report = _check_one(use, name, json_file, data, seen_classes, num_classes, reads_masks)
            reports[use, name] = report
            if not report.errors and not MetadataCatalog.get(name).get("thing_classes"):
                classes[name] = classes_of(data)
            if not report.errors:
                root = os.path.realpath(MetadataCatalog.get(name).get("image_root") or ".")
                names = (x.get("file_name") or "" for x in data["images"])
                files[use].update(os.path.normpath(os.path.join(root, x)) for x in names if x)
        del data
    if shared := files["train"] & files["test"]:
        logger.warning(
            f"DATASETS.TRAIN and DATASETS.TEST share {len(shared)} images, {min(shared)} for "
            f"instance (of {len(files['test'])} of DATASETS.TEST): AP on images of the training "
            "says little about others."
        )
    return reports, classes


def _loader_of(name: str) -> str:
    # The module of the function with which a dataset was registered.
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
    is_ours = _loader_of(name) == _OURS
    image_root = MetadataCatalog.get(name).get("image_root")
    options = {"data": data, "image_root": image_root}
    if use == "train":  # those of a test set are matched by name
        options["num_classes"] = num_classes
    if use == "test" and (not is_ours or isinstance(data, dict) and "annotations" in data):
        report = check_coco(json_file, use="evaluation", **options)
    else:
        options["reads_masks"] = reads_masks
        report = check_coco(json_file, seen_classes=seen_classes, **options)
    if use == "train" and reads_masks and not is_ours and report.classes:
        rows = data["annotations"]
        is_lost = [is_from_model(x) and bool(x.get("segmentation")) for x in rows]
        report.add("source is lost", rows, is_lost)
    report.findings = [_judge(x, use, name, data, num_classes) for x in report.findings]
    return report


def _judge(finding: Finding, use: str, name: str, data: object, num_classes: int | None) -> Finding:
    # What the function that reads the file makes of a finding.
    is_ours = _loader_of(name) == _OURS
    if finding.rule == "number of classes" and not _is_json_path(name):
        if len(data["categories"]) < num_classes:
            return finding.as_warning("the classes beyond them are never trained")
    if finding.rule in ("annotation.id", "annotation id twice") and use == "train" and is_ours:
        return finding.as_warning("training does without")
    # Our loader stops; so does pycocotools, which Detectron2's reads with.
    is_fatal = finding.rule == ("unknown image" if is_ours else "annotation without id")
    return replace(finding, severity="error") if is_fatal else finding


def _log(
    reports: dict[tuple[str, str], Report], reads_masks: bool, rectangle_as_box_only: bool
) -> None:
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
            num_masks = sum(x.masks for x in report.classes)
            num_rectangles = sum(x.rectangles for x in report.classes if x.is_seen is not False)
            notes = report.notes
            if num_masks and not reads_masks:
                notes.append(f"All {num_masks} human masks are not used because MASK_ON is False.")
            elif num_rectangles and rectangle_as_box_only:
                notes.append(
                    f"{num_rectangles} of {num_masks} human masks are not used because they are "
                    "the rectangles of their boxes, see INPUT.RECTANGLE_AS_BOX_ONLY."
                )
            for note in notes:
                logger.warning(f"{report.file}: {note}")
