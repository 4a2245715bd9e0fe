"""Data as people have them, as the jsons that a training and its validation read."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from .coco_json import check_coco, has_mask, is_from_model, read_coco, write_json
from .errors import InputError
from .importers import import_yolo, read_text
from .run_folder import find_moved

__all__ = ["DataPart", "find_data", "partly_masked_validation", "read_parts"]

# What a folder may hold: the training's file, and those that may be the validation's.
_LAYOUTS = (
    ("train.json", ("val.json", "valid.json")),
    ("train/_annotations.coco.json", ("valid/_annotations.coco.json",)),
    ("data.yaml", ()),
)
# A tenth of the images is set aside, at most so many; of fewer than _MIN_IMAGES none.
_VALIDATION_SHARE, _MAX_VALIDATION, _MIN_IMAGES = 0.1, 100, 10


@dataclass(frozen=True)
class DataPart:
    """A COCO json and the folder of its images."""

    json_file: str
    image_root: str
    # The objects with a mask alone, "" if there are none: for AP on given boxes.
    masks_file: str = ""
    # The json that images were set aside from, "" if none were.
    source: str = ""


def find_data(
    data: str | os.PathLike,
    folder: Path,
    *,
    image_root: str | os.PathLike | None = None,
    seed: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[DataPart, DataPart | None]:
    """
    Find what to train and to validate on.

    A tenth of the images is set aside where there is no validation set, and there are 10 images.
    Mask AP on detected boxes needs a mask on every object: a validation set that has masks on some
    becomes one of boxes alone, beside the one of the objects with a human's mask.

    Args:
        data: as for :func:`train`.
        folder: for the jsons that have to be written; made if needed.
        image_root: folder of the images; None: that of the json, or ``images`` in or beside it.
        seed: of the choice of validation images.
        say: takes the notes of a conversion.

    Raises:
        InputError: there is no data, or it is broken.
    """
    path, validation = Path(data), None
    if path.is_dir():
        train_name, names = next((x for x in _LAYOUTS if (path / x[0]).is_file()), ("", ()))
        if not train_name:
            allowed = ", ".join(x for x, _ in _LAYOUTS)
            raise InputError(f"{path}: none of {allowed} is in this folder; or name a COCO json.")
        validation = next((path / x for x in names if (path / x).is_file()), None)
        path = path / train_name
    if not path.is_file():
        raise InputError(f"{path} does not exist; allowed: a COCO json, a data.yaml, a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".yaml", ".yml"):
        if image_root is not None:
            raise InputError(f"{path} says where its images are; image_root is for a json.")
        parts = _convert_yolo(path, folder, say)
    else:
        files = [x for x in (path, validation) if x is not None]
        parts = [DataPart(str(x), str(image_root or _find_image_root(x))) for x in files]
    for x in parts:  # what is odd in the first is said by the plan
        report = check_coco(x.json_file, image_root=x.image_root)
        report.raise_on_error(logs=x is not parts[0])
    if len(parts) == 1:
        parts = _set_aside(parts[0], folder, seed)
    else:  # before the minutes after which the training would come to it
        check_coco(parts[1].json_file, use="evaluation", reads_masks=False).raise_on_error()
    parts[1:] = [_separate_masks(x, folder) for x in parts[1:]]
    (folder / "parts.json").write_text(json.dumps([vars(x) for x in parts]), encoding="utf-8")
    return parts[0], parts[1] if len(parts) > 1 else None


def read_parts(run: Path) -> list[DataPart]:
    """What the training in ``run`` was given by :func:`find_data`; validation is the second."""
    rows = json.loads((run / "data/parts.json").read_text(encoding="utf-8"))
    moved = functools.partial(find_moved, config_file=run / "config.yaml")
    names = ("json_file", "masks_file", "source")
    return [DataPart(**x | {k: moved(x[k]) for k in names if k in x}) for x in rows]


def partly_masked_validation(model: str | os.PathLike) -> str:
    """
    The json of the validation objects with a mask, "" where all have one or none.

    Args:
        model: folder of a training; of others the answer is "".
    """
    if not Path(model, "data/parts.json").is_file():
        return ""
    parts = [x for x in read_parts(Path(model))[1:] if x.masks_file != x.json_file]
    return parts[0].masks_file if parts else ""


def _convert_yolo(data_yaml: Path, folder: Path, say: Callable[[str], None]) -> list[DataPart]:
    parts, datasets = [], {"train": import_yolo(data_yaml, "train")}  # it checks the yaml
    if yaml.safe_load(read_text(data_yaml)).get("val"):
        datasets["val"] = import_yolo(data_yaml, "val")
    for split, dataset in datasets.items():
        for note, count in dataset.notes.items():
            say(f"{data_yaml}, {split}: {count} {note}")
        name = split if len(datasets) > 1 else "all"
        parts.append(DataPart(str(folder / f"{name}.json"), str(dataset.image_root)))
        write_json(parts[-1].json_file, dataset.coco)
    return parts


def _find_image_root(json_file: Path) -> Path:
    images = read_coco(json_file)["images"]
    name = str(images[0].get("file_name") or "") if images else ""
    parent = json_file.parent
    folders = [parent, parent / "images", parent.parent / "images"]
    for folder in folders:
        if (folder / name).exists():
            return folder
    looked = ", ".join(map(str, folders))
    raise InputError(f"{json_file}: its image {name!r} is not in {looked}; give --image-root.")


def _set_aside(part: DataPart, folder: Path, seed: int) -> list[DataPart]:
    coco = read_coco(part.json_file)
    ids = sorted(x["id"] for x in coco["images"])
    if len(ids) < _MIN_IMAGES:
        return [part]
    # Training does without, but evaluation does not.
    has_ids = all("id" in x for x in coco["annotations"])
    for number, x in enumerate(coco["annotations"], start=1):
        x.setdefault("area", x["bbox"][2] * x["bbox"][3])
        x["id"] = x["id"] if has_ids else number
    number = min(_MAX_VALIDATION, round(_VALIDATION_SHARE * len(ids)))
    chosen = {ids[i] for i in np.random.default_rng(seed).choice(len(ids), number, replace=False)}
    parts = []
    for name, wanted in (("train", set(ids) - chosen), ("val", chosen)):
        images = [x for x in coco["images"] if x["id"] in wanted]
        objects = [x for x in coco["annotations"] if x["image_id"] in wanted]
        file = str(folder / f"{name}.json")
        parts.append(DataPart(file, part.image_root, source=part.json_file))
        write_json(file, {**coco, "images": images, "annotations": objects})
    return parts


def _separate_masks(part: DataPart, folder: Path) -> DataPart:
    coco = read_coco(part.json_file)
    objects = [x for x in coco["annotations"] if not x.get("iscrowd")]
    masked = [x for x in objects if has_mask(x) and not is_from_model(x)]
    if len(masked) == len(objects):
        return replace(part, masks_file=part.json_file if objects else "")
    boxes, masks = folder / "val_boxes.json", folder / "val_masks.json"
    without = [{k: v for k, v in x.items() if k != "segmentation"} for x in coco["annotations"]]
    write_json(boxes, {**coco, "annotations": without})
    if masked:
        write_json(masks, {**coco, "annotations": masked})
    return replace(part, json_file=str(boxes), masks_file=str(masks) if masked else "")
