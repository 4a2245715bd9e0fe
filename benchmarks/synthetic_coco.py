"""COCO annotations and detections of any size, drawn at random: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

NUM_CLASSES = 80
HEIGHT, WIDTH = 480, 640


def make_ground_truth(num_images: int, num_objects: int, seed: int = 0) -> dict:
    """
    Draw images with star-shaped objects, as many per image and as large as COCO's on average.

    Args:
        num_images, num_objects: in all; the objects are spread at random.
        seed: of the generator.

    Returns:
        The content of a COCO json with polygons; 1 % of the objects are crowds.
    """
    rng = np.random.default_rng(seed)
    images = [
        {"id": i + 1, "height": HEIGHT, "width": WIDTH, "file_name": f"{i + 1:012d}.jpg"}
        for i in range(num_images)
    ]
    # Like COCO's: few frequent classes, many rare ones, and few classes in one image.
    frequency = 1 / np.arange(1, NUM_CLASSES + 1)
    frequency /= frequency.sum()
    palettes = rng.choice(NUM_CLASSES, size=(num_images, 4), p=frequency)
    annotations = []
    for k, image in enumerate(np.sort(rng.integers(num_images, size=num_objects))):
        polygon = _star(rng, rng.uniform(0, [WIDTH, HEIGHT]), np.exp(rng.normal(3.6, 0.8)))
        rle = mask_util.merge(mask_util.frPyObjects([polygon.ravel().tolist()], HEIGHT, WIDTH))
        annotations.append(
            {
                "id": k + 1,
                "image_id": int(image) + 1,
                "category_id": int(palettes[image, rng.integers(4)]) + 1,
                "segmentation": [polygon.ravel().round(2).tolist()],
                "bbox": _bbox(polygon),
                "area": float(mask_util.area(rle)),
                "iscrowd": 0,
            }
        )
        if rng.random() < 0.01:
            annotations[-1].update(iscrowd=1, segmentation=_text(rle))
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(NUM_CLASSES)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def make_detections(ground_truth: dict, num_detections: int, seed: int = 1) -> list[dict]:
    """
    Draw detections: every object found once, distorted, and false ones of the image's classes.

    Args:
        ground_truth: as of :func:`make_ground_truth`.
        num_detections: in all, no fewer than the objects.
        seed: of the generator.

    Returns:
        The content of a COCO result file, with RLE masks.
    """
    rng = np.random.default_rng(seed)
    objects = [x for x in ground_truth["annotations"] if not x["iscrowd"]]
    detections = []
    for k in range(num_detections):
        x = objects[k % len(objects)]
        is_first = k < len(objects)
        if is_first:
            polygon = np.reshape(x["segmentation"][0], (-1, 2))
            size = np.ptp(polygon, axis=0).mean()
            polygon = polygon + rng.normal(0, 0.03 * size, 2)
            polygon = np.clip(
                polygon + rng.normal(0, 0.02 * size, polygon.shape), 0, [WIDTH, HEIGHT]
            )
        else:
            centre = np.add(x["bbox"][:2], x["bbox"][2:]) / 2 + rng.normal(0, 60, 2)
            polygon = _star(rng, np.clip(centre, 0, [WIDTH, HEIGHT]), np.exp(rng.normal(3.6, 0.8)))
        rle = mask_util.merge(mask_util.frPyObjects([polygon.ravel().tolist()], HEIGHT, WIDTH))
        detections.append(
            {
                "image_id": x["image_id"],
                "category_id": x["category_id"],
                "segmentation": _text(rle),
                "bbox": _bbox(polygon),
                "score": float(rng.beta(4, 2) if is_first else rng.beta(1, 6)),
            }
        )
    return detections


def _star(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    # As many runs per mask as a pasted 28 x 28 prediction has: outlines with some waves.
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radii = radius * rng.uniform(0.6, 1.2, len(angles))
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = np.clip(points, 0, [WIDTH, HEIGHT])
    # An object in a corner can be cut to nothing.
    points[0] = np.clip(centre - 2, 0, [WIDTH, HEIGHT])
    points[8] = np.clip(centre + [2, -2], 0, [WIDTH, HEIGHT])
    points[16] = np.clip(centre + 2, 0, [WIDTH, HEIGHT])
    return points


def _bbox(polygon: np.ndarray) -> list[float]:
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _text(rle: dict) -> dict:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def write_files(
    folder: Path, num_images: int, num_objects: int, num_detections: int
) -> tuple[str, str]:
    """Write ground truth and detections to a folder and return the two paths."""
    ground_truth = make_ground_truth(num_images, num_objects)
    detections = make_detections(ground_truth, num_detections)
    paths = folder / "gt.json", folder / "dt.json"
    for path, content in zip(paths, (ground_truth, detections)):
        path.write_text(json.dumps(content))
    return str(paths[0]), str(paths[1])
