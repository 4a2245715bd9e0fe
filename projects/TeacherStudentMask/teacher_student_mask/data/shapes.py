"""A procedural dataset, small enough to train on a CPU in minutes, on which the method shows."""

import colorsys
import json
import math
import os

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw

from .datasets import register_partial_coco

__all__ = ["SHAPES_CLASSES", "SHAPES_SEEN_CLASSES", "generate_shapes", "register_shapes"]

SHAPES_CLASSES = ("crescent", "disk", "heart", "hexagon", "plus", "ring", "square", "star")
# Half of the classes; the other half is unseen.
SHAPES_SEEN_CLASSES = ("crescent", "disk", "ring", "star")

_SUPERSAMPLING = 4


def register_shapes(root: str) -> None:
    """Register ``shapes_train`` and ``shapes_val``, as :func:`generate_shapes` writes them."""
    for split in ("train", "val"):
        register_partial_coco(
            f"shapes_{split}",
            os.path.join(root, "annotations", f"instances_{split}.json"),
            os.path.join(root, split),
        )


def generate_shapes(
    root: str,
    *,
    num_train: int = 800,
    num_val: int = 200,
    image_size: int = 96,
    seed: int = 0,
    flat: bool = False,
) -> None:
    """
    Write the dataset in COCO's format: PNG images and a json with modal masks, for two splits.

    Eight classes differ in shape alone: hue, texture, size and rotation are drawn per object, so
    that "foreground" can be learned from some classes and holds for all. Objects lie in heaps, and
    each keeps at least 45 % and 60 pixels in view. Image k of a split is the same whatever the
    number of images is.

    Args:
        root: folder to write to; ``annotations/instances_{train,val}.json`` and ``{train,val}/``.
        num_train, num_val: images in the splits.
        image_size: side of the images in pixels, 32 or more; objects scale with it.
        seed: of the whole dataset.
        flat: write ``{train,val}.json`` and all images to ``images/`` instead.
    """
    for split_id, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
        names = (
            ("images", f"{split}.json") if flat else (split, f"annotations/instances_{split}.json")
        )
        folder, path = (os.path.join(root, x) for x in names)
        os.makedirs(folder, exist_ok=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        images, annotations = [], []
        for k in range(num_images):
            rng = np.random.default_rng([seed, split_id, k])
            pixels, objects = _draw_image(rng, image_size)
            file_name = f"{split}_{k:06d}.png" if flat else f"{k:06d}.png"
            Image.fromarray(pixels).save(os.path.join(folder, file_name))
            images.append(
                {"id": k + 1, "file_name": file_name, "height": image_size, "width": image_size}
            )
            for class_id, mask in objects:
                rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
                counts = rle["counts"].decode("ascii")
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": k + 1,
                        "category_id": class_id + 1,
                        "bbox": [float(v) for v in mask_util.toBbox(rle)],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": list(mask.shape), "counts": counts},
                    }
                )
        coco = {
            "info": {"description": f"shapes, seed {seed}, image size {image_size}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES_CLASSES)],
        }
        with open(path, "w", encoding="utf-8") as f:
            json.dump(coco, f)


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list]:
    """One image, uint8 (size, size, 3) RGB, and its (class id, visible bool mask) pairs."""
    pixels = _background(rng, size)
    objects: list[tuple[int, np.ndarray, float]] = []  # class, visible mask, full area
    for _ in range(rng.integers(3, 6)):
        class_id = int(rng.integers(len(SHAPES_CLASSES)))
        # A heap may have no room for this shape: after some attempts it may lie anywhere.
        on_heap = [bool(objects) and rng.random() < 0.88] * 50 + [False] * 10
        num_overlapped = _num_overlapped(objects)
        for must_overlap in on_heap:
            near = objects if must_overlap else []
            coverage = _place(rng, SHAPES_CLASSES[class_id], size, near)
            mask = coverage >= 0.5
            candidate = [(c, v & ~mask, area) for c, v, area in objects]
            candidate.append((class_id, mask, float(mask.sum())))
            # What must stay visible of an object that others cover.
            is_visible = all(v.sum() >= max(60, 0.45 * area) for _, v, area in candidate)
            if is_visible and (not must_overlap or _num_overlapped(candidate) > num_overlapped):
                objects = candidate
                pixels += coverage[:, :, None] * (_texture(rng, size) - pixels)
                break
    noisy = pixels + rng.normal(0, 0.015, pixels.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), [(c, m) for c, m, _ in objects]


def _num_overlapped(objects: list) -> int:
    """How many objects have 0.31 or more of their box covered by one other object."""
    count = 0
    for _, mask, _ in objects:
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        count += any(x[box].mean() >= 0.31 for _, x, _ in objects if x is not mask)
    return count


def _place(rng: np.random.Generator, name: str, size: int, objects: list) -> np.ndarray:
    """Coverage in [0, 1], (size, size), of a shape near one of the objects, if there are any."""
    radius = size * rng.uniform(0.17, 0.32)
    centre = rng.uniform(0, size, 2)
    if objects:
        rows, columns = np.nonzero(objects[rng.integers(len(objects))][1])
        angle, distance = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.05, 0.25)
        centre = np.array([columns.mean(), rows.mean()])
        centre += distance * np.array([np.cos(angle), np.sin(angle)])
    centre = centre.clip(radius, size - radius)

    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    polygons = [
        (fill, np.array(outline) @ rotation.T * radius + centre)
        for fill, outline in _outlines(name)
    ]
    # Only the window around the first polygon, which holds the others' visible parts.
    low = np.floor(polygons[0][1].min(axis=0)).astype(int).clip(0, size)
    high = np.ceil(polygons[0][1].max(axis=0)).astype(int).clip(0, size)
    width, height = high - low
    image = Image.new("L", (int(width) * _SUPERSAMPLING, int(height) * _SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for fill, points in polygons:
        draw.polygon([tuple(p) for p in (points - low) * _SUPERSAMPLING], fill=fill)
    coverage = np.zeros((size, size))
    coverage[low[1] : high[1], low[0] : high[0]] = np.asarray(image.reduce(_SUPERSAMPLING)) / 255
    return coverage


def _outlines(name: str) -> list[tuple[int, list[tuple[float, float]]]]:
    """Polygons in the unit circle, each filled with 255 (shape) or 0 (hole) in turn."""
    if name == "disk":
        return [(255, _regular([0.9] * 64))]
    if name == "ring":
        return [(255, _regular([1.0] * 64)), (0, _regular([0.5] * 64))]
    if name == "crescent":
        hole = [(x + 0.55, y) for x, y in _regular([0.8] * 64)]
        return [(255, _regular([1.0] * 64)), (0, hole)]
    if name == "square":
        return [(255, _regular([0.95] * 4))]
    if name == "hexagon":
        return [(255, _regular([0.95] * 6))]
    if name == "heart":
        t = np.linspace(0, 6.28, 64)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [(255, list(zip(16 / 17 * np.sin(t) ** 3, (y + 2) / 17)))]
    if name == "star":
        return [(255, _regular([1.1, 0.5] * 5))]
    a = 0.4  # a plus
    corners = [(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
    return [(255, corners + [(-x, -y) for x, y in corners])]


def _regular(radii: list[float]) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(k * step), r * math.sin(k * step)) for k, r in enumerate(radii)]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A full image, (size, size, 3) in [0, 1], of which an object shows its part: vivid colours."""
    hue, saturation, value = rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.55, 1.0)
    first = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    hue, value = hue + rng.uniform(-0.06, 0.06), value * rng.uniform(0.75, 1.0)
    second = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.integers(3)
    if kind == 0:  # plain
        weight = np.zeros((size, size))
    elif kind == 1:  # gradient
        weight = (along - along.min()) / np.ptp(along)
    else:  # stripes
        weight = (np.sin(along * 2 * np.pi * rng.uniform(8, 16)) > 0).astype(float)
    return first + weight[:, :, None] * (second - first)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft blobs between two greyish colours, (size, size, 3) in [0, 1]."""
    grid = Image.fromarray(rng.random((5, 5)).astype(np.float32))
    blobs = np.asarray(grid.resize((size, size), Image.BICUBIC), dtype=np.float64).clip(0, 1)
    first, second = (rng.uniform(0.25, 0.75) + rng.uniform(-0.03, 0.03, 3) for _ in range(2))
    return first + blobs[:, :, None] * (second - first)
