#!/usr/bin/env python
"""
Run the ONNX file of tools/export_student.py on images, without PyTorch. See --help.

This file needs numpy, Pillow and onnxruntime and nothing of this repository: copy it to where the
model runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

__all__ = ["Objects", "OnnxDetector", "draw", "paste_masks"]

DESCRIPTION = """
Finds and segments objects with the model.onnx of `tools/export_student.py --formats onnx`.
Needs numpy, Pillow and onnxruntime alone. Writes each image with its masks as DIR/NAME.png and
everything that was found as DIR/objects.json, by file: class, score, box (x0, y0, x1, y1 in pixels
of the image) and mask_area in pixels.
"""

EXAMPLES = """
examples:
  %(prog)s --model-dir output/exported --output-dir output/onnx data/images/*.png

  in Python:
    from run_onnx import OnnxDetector
    detector = OnnxDetector("output/exported")
    objects = detector(image)          # uint8 (H, W, 3), RGB
    objects.boxes, objects.scores, objects.classes, objects.masks

exit code: 0; 1 if an image could not be read (the others are done); 2 without a model.
"""


@dataclass
class Objects:
    """
    What was found in an image of H x W pixels: N objects, best score first.

    Attributes:
        boxes: float32 (N, 4), x0 y0 x1 y1 in pixels of the image.
        scores: float32 (N,), in [0, 1].
        classes: int64 (N,), indices of ``OnnxDetector.names``.
        masks: bool (N, H, W).
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


class OnnxDetector:
    """Runs the model on images, one at a time."""

    def __init__(self, folder: str | Path, providers=("CPUExecutionProvider",)) -> None:
        """
        Args:
            folder: with model.onnx and deployment.json.
            providers: of onnxruntime.

        Raises:
            FileNotFoundError: one of the files is not there.
        """
        path = Path(folder, "model.onnx")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; write it with tools/export_student.py --formats onnx."
            )
        facts = json.loads(Path(folder, "deployment.json").read_text())
        self.names: list[str] = facts["classes"]
        self._input = facts["input"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, list(providers))

    def __call__(self, image: np.ndarray) -> Objects:
        """
        Args:
            image: uint8, shape (H, W, 3), RGB.
        """
        height, width = image.shape[:2]
        new_height, new_width = self._size(height, width)
        resized = image
        if (new_height, new_width) != (height, width):
            picture = Image.fromarray(image).resize((new_width, new_height), Image.BILINEAR)
            resized = np.asarray(picture)
        if self._input["channels"] == "BGR":
            resized = resized[:, :, ::-1]
        pixels = np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32)
        boxes, scores, classes, probabilities = self._session.run(
            ["boxes", "scores", "classes", "masks"], {"image": pixels}
        )
        x, y = width / new_width, height / new_height
        limits = np.array([width, height, width, height], np.float32)
        boxes = np.clip(boxes * np.array([x, y, x, y], np.float32), 0, limits)
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes = boxes[kept]
        masks = paste_masks(probabilities[kept], boxes, height, width)
        return Objects(boxes, scores[kept], classes[kept], masks)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        shortest = self._input["shortest_edge"]
        if shortest is None:
            return height, width
        scale = shortest / min(height, width)
        sides = [scale * height, scale * width]
        longest = self._input["longest_edge_at_most"]
        if max(sides) > longest:
            sides = [side * (longest / max(sides)) for side in sides]
        return int(sides[0] + 0.5), int(sides[1] + 0.5)


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int
) -> np.ndarray:
    """
    Masks of the image from probabilities on a grid over each box.

    The probability at the centre of a pixel is interpolated between the centres of the nearest
    grid cells, those outside the box being 0; from 0.5 on the pixel belongs to the mask.

    Args:
        probabilities: shape (N, M, M), in [0, 1].
        boxes: shape (N, 4), x0 y0 x1 y1 in pixels of the image, not empty.
        height, width: of the image.

    Returns:
        bool, shape (N, height, width).
    """
    masks = np.zeros((len(boxes), height, width), bool)
    side = probabilities.shape[-1]
    for mask, grid, (x0, y0, x1, y1) in zip(masks, probabilities, boxes):
        rows, row_weights = _interpolation(y0, y1, height, side)
        columns, column_weights = _interpolation(x0, x1, width, side)
        mask[rows, columns] = row_weights @ grid @ column_weights.T >= 0.5
    return masks


def _interpolation(start: float, end: float, length: int, side: int) -> tuple[slice, np.ndarray]:
    # Of the pixels in a box: which they are, and the weight of each grid cell for them. A cell's
    # weight falls from 1 at its centre to 0 at the next one's. Outside the box all cells together
    # weigh less than 0.5, so no pixel there belongs to a mask.
    first, last = max(0, int(start)), min(length, int(np.ceil(end)))
    centres = (np.arange(first, last, dtype=np.float32) + 0.5 - start) / (end - start)
    distance = np.abs(centres[:, None] * side - 0.5 - np.arange(side, dtype=np.float32))
    return slice(first, last), np.maximum(0, 1 - distance)


def draw(image: np.ndarray, objects: Objects) -> np.ndarray:
    """Return a copy of an image (uint8, RGB) with a colour over each mask."""
    picture = image.astype(np.float32)
    for i, mask in enumerate(objects.masks):
        # Hues a golden ratio apart.
        hue = 2 * np.pi * (0.618034 * i + np.array([0, 1 / 3, 2 / 3]))
        picture[mask] = 0.5 * picture[mask] + 0.5 * (127.5 + 127.5 * np.cos(hue))
    return picture.round().astype(np.uint8)


def _describe(objects: Objects, names: list[str]) -> list[dict]:
    return [
        {
            "class": names[label],
            "score": round(float(score), 5),
            "box": [round(float(x), 2) for x in box],
            "mask_area": int(mask.sum()),
        }
        for label, score, box, mask in zip(
            objects.classes, objects.scores, objects.boxes, objects.masks
        )
    ]


def _free_name(folder: Path, image: Path, taken: set[str]) -> Path:
    # Images of two folders may have one name.
    name, number = f"{image.stem}.png", 2
    while name.lower() in taken:
        name, number = f"{image.stem}_{number}.png", number + 1
    taken.add(name.lower())
    return folder / name


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model-dir", required=True, metavar="DIR", help="of export_student.py")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        detector = OnnxDetector(args.model_dir)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    found, taken, failures = {}, set(), 0
    for path in args.images:
        try:
            with Image.open(path) as file:
                image = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            failures += 1
            continue
        objects = detector(image)
        found[str(path)] = _describe(objects, detector.names)
        Image.fromarray(draw(image, objects)).save(_free_name(args.output_dir, path, taken))
        print(f"{path}: {len(objects.scores)} objects")
    (args.output_dir / "objects.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"Results: {args.output_dir}, {failures} of {len(args.images)} images failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
