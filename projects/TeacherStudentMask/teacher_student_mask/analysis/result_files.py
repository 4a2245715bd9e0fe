"""Reads the results of a model, in the format of COCO and from any framework, and checks them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from ..json_files import paused_gc
from .input_checks import (
    InputFile,
    InputWarning,
    boxes_outside,
    list_some,
    refusal,
    to_floats,
    to_id,
)
from .rle import check_rles, compress_mask

__all__ = ["load_results"]

_LAYOUT = (
    'a list of detections {"image_id": ..., "category_id": ..., "segmentation": ..., "score": ...}'
)

_where = "entry {}".format


@paused_gc()
def load_results(
    path: str | os.PathLike, coco: COCO, warnings: list[InputWarning] | None = None
) -> list[dict]:
    """
    Read a COCO result file of instance segmentation.

    Args:
        path: a json list of {"image_id", "category_id", "segmentation", "score"} with an optional
            "bbox"; other keys are not read. Masks may be polygons, compressed or uncompressed RLE.
        coco: the ground truth of :func:`.ground_truth.load_ground_truth`; not changed.
        warnings: where to append what is odd but can be analysed; it is logged in any case.

    Returns:
        One dict per detection in the order of the file, with "image_id" and "category_id" (int),
        "score" (float), "bbox" ([x, y, width, height], floats; the mask's own box where the file
        has none), "segmentation" (compressed RLE {"size": [height, width], "counts": bytes}) and
        "area" (the mask's, in pixels, float).

    Raises:
        InputError: if the file is no result file of this ground truth.
    """
    file = InputFile(path, warnings)
    entries = file.read_json()
    _check_layout(file, entries)
    if not entries:
        file.warn("no detections")
        return []
    image_ids = _image_ids(file, entries, coco)
    category_ids = _category_ids(file, entries, coco)
    scores = _scores(file, entries)
    size_by_image = {x["id"]: [x["height"], x["width"]] for x in coco.imgs.values()}
    sizes = [size_by_image[x] for x in image_ids]
    counts = _compress_masks(file, entries, sizes)
    areas = check_rles(file, counts, sizes, _where)
    boxes = _boxes(file, entries, counts, sizes)

    _warn(file, "masks without any pixel", np.flatnonzero(areas == 0))
    _warn(file, "scores outside [0, 1]", np.flatnonzero((scores < 0) | (scores > 1)))
    _warn_of_repetitions(file, entries, [image_ids, category_ids, scores.tolist()], counts)
    columns = (image_ids, category_ids, scores.tolist(), boxes.tolist(), sizes, counts)
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "score": score,
            "bbox": box,
            "segmentation": {"size": list(size), "counts": mask},
            "area": area,
        }
        for image_id, category_id, score, box, size, mask, area in zip(
            *columns, areas.astype(np.float64).tolist()
        )
    ]


def _check_layout(file: InputFile, entries: object) -> None:
    if isinstance(entries, dict):
        hint = ""
        if "images" in entries:
            hint = "; this looks like a ground-truth file"
        keys = list_some([repr(key) for key in entries])
        raise file.error(f"is a dict with the keys {keys}{hint}; allowed: {_LAYOUT}")
    if not isinstance(entries, list):
        raise file.error(f"is a {type(entries).__name__}; allowed: {_LAYOUT}")
    file.check_dicts(entries, _where)


def _image_ids(file: InputFile, entries: list[dict], coco: COCO) -> list[int]:
    values = _column(file, entries, "image_id")
    if not set(map(type, values)) <= {int}:
        texts = [i for i, x in enumerate(values) if _is_number_in_text(x)]
        _warn(file, '"image_id" is text, read as the number', texts)
        for i in texts:
            values[i] = int(values[i])
        values = _whole_numbers(file, values, "image_id")
    allowed = f"the ids of the {len(coco.imgs)} images of {{}}"
    _check_known(file, "image_id", values, coco, coco.imgs, allowed)
    return values


def _category_ids(file: InputFile, entries: list[dict], coco: COCO) -> list[int]:
    values = _column(file, entries, "category_id")
    if not set(map(type, values)) <= {int}:
        values = _whole_numbers(file, values, "category_id")
    num = len(coco.cats)
    allowed = f"the {num} category ids of {{}}, {min(coco.cats)} to {max(coco.cats)}"
    for first in (0, 1):
        if first <= min(values) and max(values) < first + num:
            allowed += (
                f". All ids lie in {first}..{first + num - 1}: the file seems to hold consecutive "
                "class numbers in place of category ids"
            )
            break
    _check_known(file, "category_id", values, coco, coco.cats, allowed)
    return values


def _check_known(
    file: InputFile, field: str, values: list[int], coco: COCO, known: dict, allowed: str
) -> None:
    if set(values) <= known.keys():
        return
    unknown = [i for i, x in enumerate(values) if x not in known]
    places = list_some([f"{values[i]} ({_where(i)})" for i in unknown])
    ground_truth = getattr(coco, "annotation_file", "the ground truth")
    raise file.error(
        f'{len(unknown)} of {len(values)} entries have an unknown "{field}": {places}; allowed: '
        + allowed.format(ground_truth)
    )


def _scores(file: InputFile, entries: list[dict]) -> np.ndarray:
    values = _column(file, entries, "score")
    scores = to_floats(values)
    if scores is None:
        index = next(i for i, x in enumerate(values) if to_floats([x]) is None)
        raise file.error(refusal("score", values[index], "a finite number"), _where(index))
    return scores


def _compress_masks(file: InputFile, entries: list[dict], sizes: list[list[int]]) -> list[bytes]:
    counts = []
    num_dropped = 0
    for entry, size in zip(entries, sizes):
        try:
            mask, num = compress_mask(entry["segmentation"], size)
        except KeyError:
            raise file.error('"segmentation" is missing', _where(len(counts))) from None
        except ValueError as error:
            raise file.error(str(error), _where(len(counts))) from None
        counts.append(mask)
        num_dropped += num
    file.warn("polygons of fewer than three points (left out)", num_dropped)
    return counts


def _boxes(
    file: InputFile, entries: list[dict], counts: list[bytes], sizes: list[list[int]]
) -> np.ndarray:
    values = [entry.get("bbox") for entry in entries]
    missing = [i for i, box in enumerate(values) if box is None]
    if missing:
        _warn(file, 'no "bbox", the mask\'s own box is taken', missing)
        rles = [{"size": sizes[i], "counts": counts[i]} for i in missing]
        for i, box in zip(missing, mask_util.toBbox(rles).tolist()):
            values[i] = box
    boxes = file.boxes(values, _where)
    is_outside = boxes_outside(boxes, np.array(sizes))
    what = "boxes that reach more than 1 pixel outside their image"
    _warn(file, what, np.flatnonzero(is_outside))
    return boxes


def _column(file: InputFile, entries: list[dict], field: str) -> list:
    try:
        return [entry[field] for entry in entries]
    except KeyError:
        index = next(i for i, entry in enumerate(entries) if field not in entry)
        raise file.error(f'"{field}" is missing', _where(index)) from None


def _whole_numbers(file: InputFile, values: list, field: str) -> list[int]:
    ids = [to_id(x) for x in values]
    if None in ids:
        index = ids.index(None)
        raise file.error(refusal(field, values[index], "a whole number"), _where(index))
    return ids


def _is_number_in_text(value: object) -> bool:
    """Whether it is text like "000000000139", the name of an image's file without its end."""
    return type(value) is str and value.isascii() and value.isdigit() and len(value) < 20


def _warn(file: InputFile, what: str, indices: Sequence[int]) -> None:
    unit = "entry" if len(indices) == 1 else "entries"
    file.warn(what, len(indices), f"{unit} {list_some(indices)}")


def _warn_of_repetitions(
    file: InputFile, entries: list[dict], columns: list[list], counts: list[bytes]
) -> None:
    keys = list(zip(*columns))
    if len(set(keys)) < len(keys):
        # Only these masks need to be compared.
        repeated = {key for key, num in Counter(keys).items() if num > 1}
        complete = [(key, mask) for key, mask in zip(keys, counts) if key in repeated]
        num = len(complete) - len(set(complete))
        file.warn("entries equal to an earlier one in image, category, score and mask", num)
    ids = [x["id"] for x in entries if isinstance(x.get("id"), (int, float, str))]
    file.warn('"id" of an earlier entry (ids of results are not used)', len(ids) - len(set(ids)))
