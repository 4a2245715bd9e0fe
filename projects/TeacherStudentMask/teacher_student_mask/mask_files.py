"""Masks that are drawn as pictures, merged into a COCO json: the way back from a paint program."""

import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from .coco_json import check_coco, forget_mask, has_mask, is_from_model, read_json
from .errors import InputError
from .importers import ImportedDataset, files_in

__all__ = ["import_masks"]


def import_masks(
    path: str | os.PathLike, masks: str | os.PathLike, replace: bool = False
) -> ImportedDataset:
    """
    Give objects of a COCO json the masks that pictures show; they count as drawn by a human.

    A picture is a png of one channel and of the size of its image. Either its name is the id of an
    annotation, 17.png, and what is not 0 is the mask; or it is the name of an image, street.png for
    street.jpg, and each pixel has the id of its annotation, 0 where there is none.

    Args:
        path: of the json. Boxes and everything else stay as they are.
        masks: folder of the pictures.
        replace: whether a mask that a human has drawn before may be replaced, as one of a model may
            in any case.

    Raises:
        InputError: a picture belongs to nothing, has another size or kind, shows nothing, or would
            replace a human's mask.
    """
    coco = read_json(path)
    check_coco(path, data=coco).raise_on_error(logs=False)
    dataset = ImportedDataset(coco, None)
    objects = {x["id"]: x for x in dataset.coco["annotations"] if "id" in x}
    images = {x["id"]: x for x in dataset.coco["images"]}
    by_stem: dict[str, list[dict]] = defaultdict(list)
    for x in dataset.coco["images"]:
        by_stem[Path(x["file_name"]).stem].append(x)
    for file in files_in(Path(masks), ".png"):
        pixels = _read_pixels(file)
        # COCO's 000000000139 is a name, and no number.
        number = int(file.stem) if re.fullmatch("0|[1-9][0-9]*", file.stem) else None
        if number in objects and by_stem[file.stem]:
            raise InputError(
                f"{file}: {number} is both the id of an annotation and the name of an image of "
                f"{path}; rename the image."
            )
        if number in objects:
            image = images[objects[number]["image_id"]]
            drawn = {number: pixels != 0}
        elif len(by_stem[file.stem]) > 1:
            names = ", ".join(x["file_name"] for x in by_stem[file.stem])
            raise InputError(f"{file}: several images of {path} have this name: {names}.")
        elif by_stem[file.stem]:
            (image,) = by_stem[file.stem]
            drawn = {int(i): pixels == i for i in np.unique(pixels) if i != 0}
        else:
            raise InputError(f"{file}: is named after no annotation id and no image of {path}.")
        size = image["height"], image["width"]
        if pixels.shape != size:
            raise InputError(f"{file}: has the shape {pixels.shape}; allowed: {size}, one channel.")
        for i, mask in drawn.items():
            annotation = objects.get(i, {})
            if annotation.get("image_id") != image["id"] or not mask.any():
                raise InputError(f"{file}: has no pixel of an annotation {i} of this image.")
            if has_mask(annotation) and not is_from_model(annotation):
                if not replace:
                    raise InputError(
                        f"{file}: a human has drawn a mask of annotation {i}; see --replace."
                    )
                dataset.notes["masks of humans were replaced"] += 1
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            forget_mask(annotation)
            annotation["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
            annotation["area"] = int(mask_util.area(rle))
            dataset.notes["masks were read"] += 1
    return dataset


def _read_pixels(file: Path) -> np.ndarray:
    try:
        return np.array(Image.open(file))
    except Exception as error:  # PIL's readers raise many kinds on broken files
        raise InputError(f"{file}: cannot be read: {error}.") from error
