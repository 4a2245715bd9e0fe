"""
Run the model.onnx of "tsmask export --formats onnx" on images, without PyTorch.

This file needs numpy, Pillow and onnxruntime and nothing of the project that it comes from: the
export copies it beside the model, and it runs wherever that folder is copied. It prints the objects
of each image and writes it with their masks as DIR/NAME.png.

  python output/exported/run_onnx.py --output-dir output/onnx data/images/*.png

In Python, with the folder on the path:
  from run_onnx import OnnxDetector
  detector = OnnxDetector("output/exported")
  boxes, scores, classes, masks = detector(image)          # uint8 (H, W, 3), RGB
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

__all__ = ["OnnxDetector", "main", "paste_masks"]


class OnnxDetector:
    """Runs the model on images, one at a time."""

    def __init__(self, folder: str | Path, providers=("CPUExecutionProvider",)) -> None:
        """
        Args:
            folder: with model.onnx and deployment.json.
            providers: of onnxruntime.
        """
        facts = json.loads(Path(folder, "deployment.json").read_text())
        self.names: list[str] = facts["classes"]
        self._input = facts["input"]
        path = str(Path(folder, "model.onnx"))
        self._session = onnxruntime.InferenceSession(path, providers=list(providers))

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        """
        Args:
            image: uint8, shape (H, W, 3), RGB.

        Returns:
            N objects, best score first: boxes, float32 (N, 4), x0 y0 x1 y1 in pixels of the image;
            scores, float32 (N,), in [0, 1]; classes, int64 (N,), indices of ``names``; masks, bool
            (N, H, W).
        """
        height, width = image.shape[:2]
        scale = 1.0
        if self._input["shortest_edge"] is not None:
            scale = self._input["shortest_edge"] / min(height, width)
            scale = min(scale, self._input["longest_edge_at_most"] / max(height, width))
        new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
        resized = Image.fromarray(image).resize((new_width, new_height), Image.BILINEAR)
        pixels = np.asarray(resized, dtype=np.float32)
        if self._input["channels"] == "BGR":
            pixels = pixels[:, :, ::-1]
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        names = ["boxes", "scores", "classes", "masks"]
        boxes, scores, classes, grids = self._session.run(names, {"image": pixels})
        boxes *= np.array([width / new_width, height / new_height] * 2, np.float32)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = paste_masks(grids[kept], boxes[kept], height, width)
        return boxes[kept], scores[kept], classes[kept], masks


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int
) -> np.ndarray:
    """
    Masks, bool (N, height, width), from probabilities (N, M, M) on a grid over each box (N, 4).

    The probability at the centre of a pixel is interpolated between the centres of the nearest
    grid cells, those outside the box being 0; from 0.5 on the pixel belongs to the mask.
    """
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, grid, (x0, y0, x1, y1) in zip(masks, probabilities, boxes):
        rows, row_weights = _interpolation(y0, y1, height, len(grid))
        columns, column_weights = _interpolation(x0, x1, width, len(grid))
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


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    here = str(Path(__file__).parent)
    parser.add_argument("--model-dir", default=here, metavar="DIR", help="default: of this file")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    detector = OnnxDetector(args.model_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        picture = image.astype(np.float32)
        for i, (box, score, label, mask) in enumerate(zip(*detector(image))):
            print(f"{path}: {detector.names[label]} {score:.5f}, box {box.round(2).tolist()}")
            # Hues a golden ratio apart.
            hue = 2 * np.pi * (0.618034 * i + np.array([0, 1 / 3, 2 / 3]))
            picture[mask] = 0.5 * picture[mask] + 0.5 * (127.5 + 127.5 * np.cos(hue))
        Image.fromarray(picture.astype(np.uint8)).save(args.output_dir / f"{path.stem}.png")


if __name__ == "__main__":
    main()
