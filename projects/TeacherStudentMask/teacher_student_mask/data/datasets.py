"""COCO jsons in which any object may lack its mask, as datasets: their classes and their checks."""

import difflib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..class_splits import AUTO, choose_seen_classes, match_classes
from ..coco_json import Report, check_coco, classes_of, is_from_model, read_json
from ..errors import InputError

__all__ = [
    "answer_of_main_process",
    "check_datasets",
    "dataset_classes",
    "load_partial_coco_json",
    "makes_masks",
    "register_json_datasets",
    "register_partial_coco",
    "resolve_auto_settings",
    "training_classes",
]

logger = logging.getLogger(__name__)

# Errors in spite of which a file can be loaded: a file without objects still has classes, and only
# evaluation needs ids.
_HARMLESS = {"no objects", "annotation.id", "annotation id twice"}


def register_partial_coco(name: str, json_file: str, image_root: str) -> None:
    """
    Register a COCO json, masks on any part of its objects, as a Detectron2 dataset.

    Args:
        name: of the dataset, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: path of the COCO annotations; read when the dataset is first used.
        image_root: folder that the ``file_name`` of the images is relative to.
    """
    DatasetCatalog.register(name, lambda: load_partial_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", reads_mask_source=True
    )


def load_partial_coco_json(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict]:
    """
    Read a COCO json into Detectron2's standard dataset format; no box is dropped.

    Detectron2's ``load_coco_json`` drops an object whose polygons are all malformed, and with it a
    box that detection needs. Here masks stay as they are, for the mapper. Keypoints are not read.

    Args:
        json_file: path of the COCO annotations.
        image_root: folder that the ``file_name`` of the images is relative to.
        dataset_name: if given, class names and the map from category ids to contiguous ids are
            those of its metadata, and stored there if it has none.

    Returns:
        One dict an image, sorted by image id. ``segmentation`` is there only where the json has
        one that is not empty, ``mask_source`` as in the json.

    Raises:
        InputError: what :func:`check_coco` calls an error, but for masks.
    """
    coco = read_json(json_file)
    # Masks are checked where they are used.
    for finding in check_coco(json_file, data=coco, reads_masks=False).errors:
        if finding.rule not in _HARMLESS:
            raise InputError(str(finding))
    classes = classes_of(coco)
    if dataset_name is not None:
        metadata = MetadataCatalog.get(dataset_name)
        if not metadata.get("thing_dataset_id_to_contiguous_id"):
            metadata.set(**classes)
        classes = metadata.as_dict()
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
    for annotation in coco["annotations"]:
        obj = {
            # Detectron2 would cut whole numbers after it has scaled them.
            "bbox": [float(x) for x in annotation["bbox"]],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": classes["thing_dataset_id_to_contiguous_id"][annotation["category_id"]],
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if "mask_source" in annotation:
            obj["mask_source"] = annotation["mask_source"]
        if annotation.get("segmentation"):
            obj["segmentation"] = annotation["segmentation"]
        records[annotation["image_id"]]["annotations"].append(obj)
    return list(records.values())


def register_json_datasets(cfg: CfgNode) -> None:
    """
    Register each json that ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names by its path.

    The path as it stands in the config becomes the name of the dataset. The images are looked for
    in ``DATASETS.TRAIN_IMAGE_ROOT`` and ``DATASETS.TEST_IMAGE_ROOT``; where that is empty, in the
    folder of the json. Nothing is read. Each process has a catalog of its own, so each calls this.
    """
    for key in ("TRAIN", "TEST"):
        for path in cfg.DATASETS[key]:
            if not path.lower().endswith(".json"):
                continue
            if path in DatasetCatalog:
                if not MetadataCatalog.get(path).get("reads_mask_source"):
                    continue  # a name that another function reads
                # The classes of a json that was edited may be others; metadata cannot be changed.
                DatasetCatalog.remove(path)
                MetadataCatalog.remove(path)
            image_root = cfg.DATASETS[f"{key}_IMAGE_ROOT"] or os.path.dirname(path)
            register_partial_coco(path, path, image_root)


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


def dataset_classes(dataset: str) -> tuple[list[str], list[int]]:
    """Names and category ids of a registered dataset, by contiguous id; it may be read for them."""
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset)  # the names of many are known when their json has been read
    names = metadata.get("thing_classes", [])
    # Without a mapping the json's ids are the contiguous ones, as for Detectron2's evaluator.
    contiguous_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    dataset_ids = {contiguous: i for i, contiguous in contiguous_ids.items()}
    return list(names), [dataset_ids.get(i, i) for i in range(len(names))]


def training_classes(train: Sequence[str]) -> list[str]:
    """
    The names of the classes by contiguous id, which all datasets of ``DATASETS.TRAIN`` share.

    Raises:
        InputError: there is no dataset, it has no classes, or two have other classes.
    """
    if not train:
        raise InputError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
    first, *others = train
    names, _ = dataset_classes(first)
    if not names:
        raise InputError(f"DATASETS.TRAIN names {first!r}, whose metadata lack 'thing_classes'.")
    for dataset in others:
        if dataset_classes(dataset)[0] != names:
            raise InputError(
                "The datasets of DATASETS.TRAIN must have the same classes in the same order; "
                f"{first!r} and {dataset!r} differ."
            )
    return names


def resolve_auto_settings(cfg: CfgNode, needs_seen_classes: bool = True) -> CfgNode:
    """
    Put what the training data say in the place of ``SEEN_CLASSES`` "auto" and ``NUM_CLASSES`` 0.

    A config that is saved after this does not need the training data any more. All processes call
    this; the main one reads, and all get its answer.

    Args:
        cfg: not changed. The datasets of ``DATASETS.TRAIN`` are registered; "auto" needs jsons.
        needs_seen_classes: False: leave "auto" as it is, for programs that do not ask.

    Returns:
        ``cfg`` itself where there is nothing to replace, else a copy, frozen if ``cfg`` is.

    Raises:
        InputError: the training data cannot be read, or no class has enough masks.
    """
    specs = (cfg.DATASETS.SEEN_CLASSES, cfg.TEST.SEEN_CLASSES)
    needs_seen_classes = needs_seen_classes and AUTO in specs
    if not needs_seen_classes and cfg.MODEL.ROI_HEADS.NUM_CLASSES != 0:
        return cfg
    classes, spec = answer_of_main_process(lambda: _ask_training_data(cfg, needs_seen_classes))
    resolved = cfg.clone()
    resolved.defrost()
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        resolved.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    for node in (resolved.DATASETS, resolved.TEST):
        if needs_seen_classes and node.SEEN_CLASSES == AUTO:
            node.SEEN_CLASSES = spec
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def _ask_training_data(cfg: CfgNode, needs_seen_classes: bool) -> tuple[list[str], str]:
    # The classes, and the seen ones as resolve_seen_classes takes them.
    wanted = f"DATASETS.SEEN_CLASSES {AUTO!r}" if needs_seen_classes else "NUM_CLASSES 0"
    try:
        # Of the first one: the others' follow it by their names, see check_datasets.
        classes = training_classes(cfg.DATASETS.TRAIN[:1])
        if not needs_seen_classes:
            return classes, ""
        num_masks = dict.fromkeys(classes, 0)
        for dataset in cfg.DATASETS.TRAIN:
            found = check_coco(MetadataCatalog.get(dataset).json_file).classes
            match_classes([x.name for x in found], classes, dataset)
            for x in found:
                num_masks[x.name] += x.masks - cfg.INPUT.RECTANGLE_AS_BOX_ONLY * x.rectangles
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise InputError(
            f"{wanted} asks the training data, DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}, but: "
            f"{error} The config.yaml in the OUTPUT_DIR of the training has the answers."
        ) from error
    min_masks = cfg.DATASETS.MIN_MASKS_PER_CLASS
    names = choose_seen_classes(num_masks, min_masks)
    logger.info(
        f"DATASETS.SEEN_CLASSES {AUTO!r}: {len(names)} of {len(classes)} classes have at least "
        f"DATASETS.MIN_MASKS_PER_CLASS {min_masks} masks in the training data: {', '.join(names)}"
    )
    # A form that a config can hold, whatever the names are.
    return classes, f", {json.dumps(names, ensure_ascii=False)}"


def makes_masks(cfg: CfgNode) -> bool:
    """Whether the model of ``cfg`` finds masks; GrabCut does so without a mask head."""
    return cfg.MODEL.MASK_ON or cfg.MODEL.META_ARCHITECTURE == "GrabCutRCNN"


def check_datasets(cfg: CfgNode, num_classes: int | None = None, is_training: bool = True) -> None:
    """
    Check the json of every dataset that has one, before a model is built.

    Findings are logged, and for each training set the counts of its classes. The main process
    checks, and all raise the same error. Only datasets with ``json_file`` and ``evaluator_type``
    "coco" in their metadata are checked; their classes become known. Those of all training sets get
    the ids of the first one's, by their names.

    Args:
        cfg: names the datasets, and says what teaches the mask head.
        num_classes: of the model, for the training sets; None: any number will do.
        is_training: False: only ``DATASETS.TEST`` is used.

    Raises:
        InputError: the sentence of the first error: file, id, field, value and what is allowed.
    """
    train, test = cfg.DATASETS.TRAIN if is_training else (), cfg.DATASETS.TEST
    learns_model_masks = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS
    needs_masks = not (cfg.MODEL.BOX_SUPERVISION.NAME or learns_model_masks)

    def check() -> dict[str, dict]:
        classes: dict[str, dict] = {}
        files: dict[str, set[str]] = {"train": set(), "test": set()}
        reports: dict[str, list[Report]] = {"train": [], "test": []}
        for use, name in [*(("train", x) for x in train), *(("test", x) for x in test)]:
            found = _check_one(use, name, cfg, num_classes)
            if found is not None:
                reports[use].append(found[0])
                files[use] |= found[1]
                classes = found[2] | classes if use == "test" else classes | found[2]
            first = classes.get(train[0], MetadataCatalog.get(train[0]).as_dict()) if train else {}
            if use == "train" and name in classes and first.get("thing_classes"):
                # Under the ids of the first training set.
                names, own = first["thing_classes"], classes[name]
                new_ids = match_classes(own["thing_classes"], names, name)
                ids = own["thing_dataset_id_to_contiguous_id"]
                ids = {k: new_ids[i] for k, i in ids.items()}
                classes[name] = {"thing_classes": names, "thing_dataset_id_to_contiguous_id": ids}
        # What one training set lacks, or is not checked for, another may have.
        lacking = {"no objects", "no seen mask"}
        is_lacking = [any(x.rule in lacking for x in r.errors) for r in reports["train"]]
        if len(is_lacking) == len(train) and all(is_lacking):
            lacking = set() if needs_masks and cfg.MODEL.MASK_ON else {"no seen mask"}
        for report in reports["train"]:
            report.findings = [x.as_warning() if x.rule in lacking else x for x in report.findings]
            _log_classes(report, cfg.INPUT.RECTANGLE_AS_BOX_ONLY)
        every_report = reports["train"] + reports["test"]
        for report in every_report:
            report.log()
        for error in [x for report in every_report for x in report.errors]:
            raise InputError(str(error))
        if shared := files["train"] & files["test"]:
            logger.warning(
                f"DATASETS.TRAIN and DATASETS.TEST share {len(shared)} images, {min(shared)} for "
                "instance: AP on images of the training says little about others."
            )
        num_model_masks = sum(x.model_masks for r in reports["train"] for x in r.classes)
        is_known = bool(train) and len(is_lacking) == len(train)
        if learns_model_masks and num_model_masks == 0 and is_known:
            raise InputError(
                "MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS is True, but DATASETS.TRAIN "
                f"{tuple(train)} has no mask with 'mask_source' 'model'; see tsmask complete."
            )
        return classes

    for name, of_dataset in answer_of_main_process(check).items():
        MetadataCatalog.get(name).set(**of_dataset)


def _check_one(
    use: str, name: str, cfg: CfgNode, num_classes: int | None
) -> tuple[Report, set[str], dict[str, dict]] | None:
    # Without errors also the paths of the images, and the classes where metadata has none. None: a
    # function of its own reads the dataset.
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list())
        raise InputError(
            f"DATASETS.{use.upper()} names {name!r}, which is not registered, nor the path of a "
            f"json; nearest: {', '.join(near) or '-'}."
        )
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or metadata.get("evaluator_type") != "coco":
        return None
    data, reads_masks = read_json(json_file), cfg.MODEL.MASK_ON
    is_ours = metadata.get("reads_mask_source", False)
    options = {"data": data, "image_root": image_root, "reads_masks": reads_masks}
    if use == "test" and (not is_ours or isinstance(data, dict) and "annotations" in data):
        options["reads_masks"] = makes_masks(cfg)
        report = check_coco(json_file, use="evaluation", **options)
    else:
        # The classes of a test set are matched by name.
        options["num_classes"] = num_classes if use == "train" else None
        report = check_coco(json_file, seen_classes=cfg.DATASETS.SEEN_CLASSES, **options)
    if use == "train" and reads_masks and not is_ours and report.classes:
        rows = data["annotations"]
        is_lost = [is_from_model(x) and bool(x.get("segmentation")) for x in rows]
        report.add("source is lost", rows, is_lost)
    pardoned = _HARMLESS - {"no objects"} if use == "train" and is_ours else set()
    if pardoned and num_classes is not None and len(report.classes) < num_classes:
        pardoned |= {"number of classes"}
    # Our loader stops at them; so does pycocotools, which Detectron2's reads with.
    fatal = "unknown image" if is_ours else "annotation without id"
    for i, x in enumerate(report.findings):
        if x.rule in pardoned:
            report.findings[i] = x.as_warning("training goes on")
        elif x.rule == fatal:
            report.findings[i] = replace(x, severity="error")
    if report.errors:
        return report, set(), {}
    root = os.path.realpath(image_root or ".")
    names = [x["file_name"] for x in data["images"] if x.get("file_name")]
    files = {os.path.normpath(os.path.join(root, x)) for x in names}
    return report, files, {} if metadata.get("thing_classes") else {name: classes_of(data)}


def _log_classes(report: Report, rectangle_as_box_only: bool) -> None:
    if report.classes:
        logger.info(
            f"{report.file}: {report.num_images} images, {report.num_annotations} annotations, "
            f"{len(report.warnings)} kinds of warnings\n{report.class_table()}"
        )
    notes = report.notes
    rectangles = sum(x.rectangles for x in report.classes if x.is_seen is not False)
    if rectangles and rectangle_as_box_only:
        notes.append(
            f"{rectangles} human masks are not used because they are the rectangles of their "
            "boxes, see INPUT.RECTANGLE_AS_BOX_ONLY."
        )
    for note in notes:
        logger.warning(f"{report.file}: {note}")
