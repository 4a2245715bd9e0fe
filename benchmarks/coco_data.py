"""Images and annotations for the benchmarks: COCO where it is there, else drawn at random."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image
from synthetic_coco import HEIGHT, WIDTH, make_ground_truth

from teacher_student_mask import load_partial_coco_json

OBJECTS_PER_IMAGE = 7  # as in COCO


def val_images_folder() -> str:
    """Where Detectron2 looks for COCO's val images."""
    return os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "coco", "val2017")


def read_images(folder: str, num_images: int) -> tuple[list[np.ndarray], str]:
    """
    Read the first images of a folder; noise if there is none.

    Returns:
        uint8 arrays of shape (H, W, 3), BGR, and what they are, for the output.
    """
    paths = sorted(Path(folder).glob("*.jpg"))[:num_images]
    if not paths:
        rng = np.random.default_rng(0)
        shape = (num_images, HEIGHT, WIDTH, 3)
        images = list(rng.integers(0, 256, shape, dtype=np.uint8))
        return images, f"{num_images} SYNTHETIC images: {folder} has no .jpg"
    images = [utils.read_image(path, format="BGR") for path in paths]
    return images, f"{len(paths)} images of {folder}"


def as_input(image: np.ndarray, size: int) -> dict:
    """
    What a model takes at inference.

    Args:
        image: of :func:`read_images`.
        size: of the short side, in pixels; the long side is at most 1333, as in the recipe.
    """
    height, width = image.shape[:2]
    resize = T.ResizeShortestEdge(size, max_size=1333).get_transform(image)
    pixels = np.ascontiguousarray(resize.apply_image(image).transpose(2, 0, 1))
    return {"image": torch.as_tensor(pixels), "height": height, "width": width}


def read_dataset(name: str, num_images: int, folder: str) -> tuple[list[dict], str]:
    """
    Read images with objects of a registered dataset; a synthetic one if its file is not there.

    Args:
        name: of a COCO dataset in DatasetCatalog.
        num_images: taken at equal distances from those with objects, fewer if there are fewer.
        folder: where the synthetic dataset is written.

    Returns:
        Dataset dicts of 80 classes, and what they are, for the output.
    """
    json_file = MetadataCatalog.get(name).json_file
    if not os.path.isfile(json_file):
        dicts = _make_synthetic_dataset(num_images, Path(folder))
        return dicts, f"{len(dicts)} SYNTHETIC images: there is no {json_file}"
    dicts = [x for x in DatasetCatalog.get(name) if x["annotations"]]
    dicts = dicts[:: max(1, len(dicts) // num_images)][:num_images]
    return dicts, f"{len(dicts)} images of {name} ({json_file})"


def _make_synthetic_dataset(num_images: int, folder: Path) -> list[dict]:
    ground_truth = make_ground_truth(num_images, OBJECTS_PER_IMAGE * num_images)
    rng = np.random.default_rng(0)
    for image in ground_truth["images"]:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    json_file = folder / "synthetic.json"
    json_file.write_text(json.dumps(ground_truth))
    return load_partial_coco_json(str(json_file), str(folder), "benchmark_synthetic_coco")
