"""Pictures of the demo: the same validation images, a column per model."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from PIL import Image, ImageDraw

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES

__all__ = ["draw_columns", "save_grid"]

_SCALE = 2
_MIN_SCORE = 0.5
_SEEN_COLOUR, _UNSEEN_COLOUR = (40, 120, 255), (255, 140, 0)
_LEGEND = "blue: class with masks in training    orange: class with boxes only"


def draw_columns(output: Path, names: list[str], num_images: int) -> dict[str, list[np.ndarray]]:
    """
    Draw the first validation images: plain, with the ground truth, and with each model's masks.

    Args:
        output: folder of the demo.
        names: of the models, which are folders in it.
        num_images: how many images.

    Returns:
        Title -> one RGB uint8 picture per image; ground truth and detections with a score of at
        least 0.5.
    """
    root = output / "datasets" / "shapes"
    coco = json.loads((root / "annotations" / "instances_val.json").read_text())
    classes = [category["name"] for category in coco["categories"]]
    records = coco["images"][:num_images]
    images = [cv2.imread(str(root / "val" / record["file_name"])) for record in records]
    truth = {record["id"]: [] for record in records}
    for x in coco["annotations"]:
        if x["image_id"] in truth:
            name = classes[x["category_id"] - 1]
            truth[x["image_id"]].append((name, mask_util.decode(x["segmentation"]) > 0))

    columns = {
        "image": [_draw(image, []) for image in images],
        "ground truth": [_draw(i, truth[r["id"]]) for i, r in zip(images, records)],
    }
    for name in names:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        cfg.merge_from_file(str(output / name / "config.yaml"))
        cfg.MODEL.WEIGHTS = str(output / name / "model_final.pth")
        predictor = DefaultPredictor(cfg)
        columns[name] = [_draw(image, _predict(predictor, image, classes)) for image in images]
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


def _predict(
    predictor: DefaultPredictor, image: np.ndarray, classes: list[str]
) -> list[tuple[str, np.ndarray]]:
    instances = predictor(image)["instances"].to("cpu")
    instances = instances[instances.scores >= _MIN_SCORE]
    names = [classes[k] for k in instances.pred_classes.tolist()]
    return list(zip(names, instances.pred_masks.numpy()))


def _draw(image: np.ndarray, objects: list[tuple[str, np.ndarray]]) -> np.ndarray:
    # BGR image and (class, bool mask) pairs -> enlarged RGB picture with outlined masks.
    size = (image.shape[1] * _SCALE, image.shape[0] * _SCALE)
    picture = cv2.resize(image[:, :, ::-1], size, interpolation=cv2.INTER_LINEAR)
    for name, mask in objects:
        colour = _SEEN_COLOUR if name in SHAPES_SEEN_CLASSES else _UNSEEN_COLOUR
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR)
        picture[mask > 0] = (0.6 * picture[mask > 0] + 0.4 * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, 1)
    for name, mask in objects:
        if mask.any():
            y, x = (int(v.mean()) * _SCALE for v in np.nonzero(mask))
            place = (x - 4 * len(name), y + 4)
            cv2.putText(picture, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 2)
            cv2.putText(picture, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1)
    return picture
