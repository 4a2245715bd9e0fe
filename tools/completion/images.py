"""The images of a shard, one after the other: read, run through the model, made into records."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from torch.utils.data import DataLoader, Dataset

from completion.entries import CROWD, TARGET
from completion.index import AnnotationIndex
from completion.masks import clip_box, make_mask
from completion.overlaps import overlaps_in_image
from teacher_student_mask import TeacherStudentDatasetMapper
from teacher_student_mask.modeling import predict_masks_on_boxes

__all__ = ["ImageTask", "complete_image", "load_images"]


@dataclass
class ImageTask:
    """
    Attributes:
        image: its number in the json.
        size: (height, width).
        rows: numbers of the annotations in the json; crowds are left out.
        annotations: of these rows.
        is_target: of these rows, whether a mask is to be made.
        inputs: of the model; None if the image cannot be used.
        problem: why not; begins with the image's path and id.
    """

    image: int
    size: tuple[int, int]
    rows: list[int]
    annotations: list[dict]
    is_target: list[bool]
    inputs: dict | None = None
    problem: str = ""


class _Images(Dataset):
    def __init__(self, cfg: CfgNode, index: AnnotationIndex, image_root: str, images: np.ndarray):
        cfg = cfg.clone()
        cfg.defrost()
        # Boxes are ours.
        cfg.TEST.GT_BOXES = False
        self._mapper = TeacherStudentDatasetMapper(cfg, is_train=False)
        self._index, self._image_root, self._images = index, image_root, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> ImageTask:
        number, index = int(self._images[i]), self._index
        image = index.read(index.image_spans[number])
        rows = [int(k) for k in index.annotations_of(number) if index.kinds[k] != CROWD]
        size = (int(image["height"]), int(image["width"]))
        task = ImageTask(
            image=number,
            size=size,
            rows=rows,
            annotations=[index.read(index.annotation_spans[k]) for k in rows],
            is_target=[bool(index.kinds[k] == TARGET) for k in rows],
        )
        record = {
            "file_name": os.path.join(self._image_root, image["file_name"]),
            "height": size[0],
            "width": size[1],
            "image_id": image["id"],
        }
        try:
            task.inputs = {"image": self._mapper(record)["image"]}
        except (OSError, ValueError) as error:
            task.problem = _with_name(str(error), record, index.path)
        return task


def _with_name(problem: str, record: dict, json_file: str) -> str:
    # The mapper names the image, but not where no file can have that name: with a NUL, ...
    path, image_id = record["file_name"], record["image_id"]
    if problem.startswith(f"{path} (image id {image_id})"):
        return problem
    return (
        f"{path!r} (image id {image_id}): the image cannot be used: {problem}; correct 'file_name' "
        f"in {json_file}."
    )


def load_images(
    cfg: CfgNode, index: AnnotationIndex, image_root: str, images: np.ndarray
) -> DataLoader:
    """
    Args:
        cfg: of the model. Unless it runs on the CPU, ``DATALOADER.NUM_WORKERS`` processes read
            ahead.
        index: of the json.
        image_root: folder that the ``file_name`` of the images is relative to.
        images: the numbers of the images, in the order in which they come.

    Returns:
        Yields :class:`ImageTask`.
    """
    # On the CPU the model has something to do for every core.
    num_workers = 0 if cfg.MODEL.DEVICE == "cpu" else cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        _Images(cfg, index, image_root, images),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )


def _as_it_is(task: ImageTask) -> ImageTask:
    return task


def complete_image(
    model: GeneralizedRCNN,
    task: ImageTask,
    classes: dict[int, int],
    masks_of: str,
    segmentation_format: str,
) -> list[dict]:
    """
    Make the masks of one image.

    Args:
        model: in evaluation mode.
        task: an image that can be used.
        classes: {category id: contiguous id}.
        masks_of, segmentation_format: of :func:`make_mask`.

    Returns:
        For each object that is to be given a mask, in the order of the file, what
        :func:`make_mask` returns, with "row", the number of its annotation, "category_id", and
        "overlap", O of Eq. (1) with the masks of all others, made ones too.
    """
    boxes = [clip_box(x["bbox"], task.size) if y else None for x, y in _pairs(task)]
    todo = [i for i, box in enumerate(boxes) if box is not None]
    probs = _predict(model, task, [boxes[i] for i in todo], classes, todo)
    made = {}
    for k, i in enumerate(todo):
        of_object = {head: x[k] for head, x in probs.items()}
        made[i] = make_mask(of_object, masks_of, boxes[i], task.size, segmentation_format)

    nothing = {"problem": "the box has no area inside the image"}
    records = [
        {
            "row": task.rows[i],
            "category_id": int(annotation["category_id"]),
            **made.get(i, nothing),
        }
        for i, (annotation, is_target) in enumerate(_pairs(task))
        if is_target
    ]
    _add_overlaps(task, records)
    return records


def _pairs(task: ImageTask) -> zip:
    return zip(task.annotations, task.is_target)


def _predict(
    model: GeneralizedRCNN,
    task: ImageTask,
    boxes: list[list[float]],
    classes: dict[int, int],
    rows: list[int],
) -> dict[str, torch.Tensor]:
    # Probabilities of each head for the boxes, on the CPU, where all masks are pasted.
    if not boxes:
        return {}
    height, width = task.inputs["image"].shape[-2:]
    # At test time the only transform is a resize.
    scale = torch.tensor([width / task.size[1], height / task.size[0]]).repeat(2)
    labels = torch.tensor([classes[int(task.annotations[i]["category_id"])] for i in rows])
    probs = predict_masks_on_boxes(model, task.inputs, torch.tensor(boxes) * scale, labels)
    return {head: x.float().cpu() for head, x in probs.items()}


def _add_overlaps(task: ImageTask, records: list[dict]) -> None:
    new = {x["row"]: x.get("segmentation") for x in records}
    boxes = [x.get("bbox") for x in task.annotations]
    segmentations = [
        new[row] if is_target else annotation.get("segmentation")
        for row, (annotation, is_target) in zip(task.rows, _pairs(task))
    ]
    overlaps, num_unreadable = overlaps_in_image(boxes, segmentations, task.size)
    of_row = dict(zip(task.rows, overlaps))
    for record in records:
        record["overlap"] = round(of_row[record["row"]], 4)
        # Once an image.
        record["num_unreadable"] = num_unreadable if record is records[0] else 0
