"""Pictures of the demo: the same validation images, a column per model."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from teacher_student_mask import GTBoxInference, add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES
from teacher_student_mask.weights_file import safe_loading

__all__ = ["draw_columns", "save_grid"]

_SCALE = 2
_SEEN_COLOUR, _UNSEEN_COLOUR = (40, 120, 255), (255, 140, 0)
_LEGEND = (
    "masks on ground-truth boxes; blue: class with masks in training, orange: class with boxes only"
)


def draw_columns(output: Path, names: list[str], num_images: int) -> dict[str, list[np.ndarray]]:
    """
    Draw the first validation images: plain, with the ground truth, with each model's masks.

    Args:
        output: folder of the demo.
        names: of the models, which are folders in it.
        num_images: how many images.

    Returns:
        Title -> one RGB uint8 picture per image. The models' masks are those on the ground-truth
        boxes and classes, so that the pictures differ by the masks alone.
    """
    root = output / "datasets" / "shapes"
    coco = COCO(str(root / "annotations" / "instances_val.json"))
    records = coco.loadImgs(sorted(coco.imgs)[:num_images])
    images = [cv2.imread(str(root / "val" / record["file_name"])) for record in records]
    truth = [coco.imgToAnns[record["id"]] for record in records]
    names_of = [[coco.cats[x["category_id"]]["name"] for x in objects] for objects in truth]

    def draw(masks: list) -> list[np.ndarray]:
        return [_draw(i, n, m) for i, n, m in zip(images, names_of, masks)]

    columns = {
        "image": [_draw(image, [], []) for image in images],
        "ground truth": draw([[coco.annToMask(x) > 0 for x in objects] for objects in truth]),
    }
    for name in names:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        merge_config_file(cfg, str(output / name / "config.yaml"))
        model = build_model(cfg).eval()
        weights = str(output / name / "model_final.pth")
        with safe_loading(weights):
            DetectionCheckpointer(model).load(weights)
        columns[name] = draw([_predict(model, i, x) for i, x in zip(images, truth)])
    return columns


def save_grid(columns: dict[str, list[np.ndarray]], path: Path) -> None:
    """Write the pictures as a PNG, a column per title and a row per image, with a legend."""
    side, header, gap = columns["image"][0].shape[0], 18, 4
    num_rows = len(columns["image"])
    size = ((side + gap) * len(columns), (side + gap) * num_rows + 2 * header)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for c, (title, pictures) in enumerate(columns.items()):
        draw.text((c * (side + gap) + 3, 3), title, fill="black")
        for r, picture in enumerate(pictures):
            grid.paste(Image.fromarray(picture), (c * (side + gap), header + r * (side + gap)))
    draw.text((3, size[1] - header + 2), _LEGEND, fill="black")
    grid.save(path)


@torch.no_grad()
def _predict(model: torch.nn.Module, image: np.ndarray, objects: list[dict]) -> np.ndarray:
    targets = Instances(image.shape[:2])
    boxes = [BoxMode.convert(x["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for x in objects]
    targets.gt_boxes = Boxes(torch.tensor(boxes))
    # The dataset's category ids start at 1.
    targets.gt_classes = torch.tensor([x["category_id"] - 1 for x in objects])
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    height, width = image.shape[:2]
    inputs = {"image": pixels, "instances": targets, "height": height, "width": width}
    return GTBoxInference(model)([inputs])[0]["instances"].pred_masks.numpy()


def _draw(image: np.ndarray, names: list[str], masks: list[np.ndarray]) -> np.ndarray:
    # BGR image, classes and bool masks -> enlarged RGB picture with outlined masks.
    size = (image.shape[1] * _SCALE, image.shape[0] * _SCALE)
    picture = cv2.resize(image[:, :, ::-1], size, interpolation=cv2.INTER_LINEAR)
    for name, mask in zip(names, masks):
        colour = _SEEN_COLOUR if name in SHAPES_SEEN_CLASSES else _UNSEEN_COLOUR
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR)
        picture[mask > 0] = (0.6 * picture[mask > 0] + 0.4 * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, 1)
    for name, mask in zip(names, masks):
        if mask.any():
            y, x = (int(v.mean()) * _SCALE for v in np.nonzero(mask))
            place = (x - 4 * len(name), y + 4)
            cv2.putText(picture, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 2)
            cv2.putText(picture, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1)
    return picture
