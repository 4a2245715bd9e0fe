"""Fixtures shared by all tests: a tiny COCO dataset, a tiny model, the real COCO if it is there."""

import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tiny_model import TINY_MODEL

from teacher_student_mask import add_teacher_student_mask_config, register_partial_coco

REPOSITORY = Path(__file__).resolve().parents[1]

_dataset_numbers = itertools.count()


def pytest_collection_modifyitems(items):
    # Whole trainings first, and the longest before them, so that not one process is left with them
    # at the end.
    longest = "test_the_commands_of_all_documents_run"
    items.sort(key=lambda item: (item.name != longest, item.get_closest_marker("slow") is None))


@pytest.fixture(autouse=True)
def _messages_reach_pytest():
    # Detectron2's setup_logger keeps messages from the root logger, whose handler caplog has.
    logging.getLogger("teacher_student_mask").propagate = True


@pytest.fixture
def log(caplog):
    """The log, from INFO on, also after a call of setup_logger."""
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("teacher_student_mask")
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@dataclass
class TinyCoco:
    """A dataset as :func:`make_tiny_coco` writes it."""

    name: str  # in DatasetCatalog
    json_file: str
    image_root: str
    data: dict  # what json_file holds
    thing_classes: tuple[str, ...] = ("ant", "cat", "ship")  # ids 3, 17, 90
    seen_classes: str = "ant, ship"  # contiguous ids 0 and 2; "cat" is unseen


@pytest.fixture
def make_tiny_coco(tmp_path) -> Callable[..., TinyCoco]:
    """
    Return ``make(change=None)``: write and register a dataset, forgotten after the test.

    ``change(data)`` may edit the json in place before it is written. The four images are

    1. ``mixed.png``, 64x64: polygon, compressed RLE, uncompressed RLE, no key, ``[]``, ``null``,
       a crowd, and an object of the unseen class with a polygon, in this order;
    2. ``unseen.png``, 64x80 (height, width): two objects of the unseen class;
    3. ``seen.png``, 80x64: two objects of seen classes with polygons;
    4. ``empty.png``, 64x64: none.
    """
    names = []

    def make(change: Callable[[dict], None] | None = None) -> TinyCoco:
        name = f"tiny_coco_{next(_dataset_numbers)}"
        image_root = tmp_path / name
        image_root.mkdir()
        data = _tiny_json()
        _write_images(data, image_root)
        if change is not None:
            change(data)
        json_file = tmp_path / f"{name}.json"
        json_file.write_text(json.dumps(data))
        register_partial_coco(name, str(json_file), str(image_root))
        names.append(name)
        return TinyCoco(name, str(json_file), str(image_root), data)

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def tiny_coco(make_tiny_coco) -> TinyCoco:
    """The dataset of :func:`make_tiny_coco` unchanged."""
    return make_tiny_coco()


@pytest.fixture
def tiny_cfg(tmp_path) -> Callable[..., CfgNode]:
    """
    Return ``make(num_classes=3, opts=(), dataset=None)``: the config of a model for the CPU.

    It is configs/Base-Shapes.yaml (PartiallySupervisedROIHeads) with few channels, images of
    64 pixels and no warm-up of the pseudo masks; a step of two images takes under 0.2 s. ``opts``
    are KEY VALUE overrides. ``dataset``, a :class:`TinyCoco`, becomes the train and test dataset,
    its seen classes SEEN_CLASSES.
    """

    def make(num_classes: int = 3, opts=(), dataset: TinyCoco | None = None) -> CfgNode:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        cfg.merge_from_file(str(REPOSITORY / "configs/Base-Shapes.yaml"))
        cfg.merge_from_list(
            TINY_MODEL
            + ["OUTPUT_DIR", str(tmp_path / "output"), "MODEL.FPN.OUT_CHANNELS", 16]
            + ["MODEL.ROI_HEADS.NUM_CLASSES", num_classes]
            + ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
            + ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
            + ["MODEL.PSEUDO_MASK.WARMUP_ITERS", 0]
            + ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64]
            + ["SOLVER.IMS_PER_BATCH", 2]
        )
        if dataset is not None:
            cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset.name,)
            cfg.DATASETS.SEEN_CLASSES = dataset.seen_classes
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture
def stop_before_model(monkeypatch):
    """Stop train_net where it would build its model; returns the exception that tells of it."""

    class Built(Exception):
        pass

    def build_model(*args):
        raise Built

    monkeypatch.setattr("teacher_student_mask.engine.Trainer.build_model", build_model)
    return Built


@pytest.fixture(scope="session")
def coco_root() -> str:
    """Folder of COCO 2017 with ``annotations`` and ``val2017``; skips where there is none."""
    datasets = os.getenv("DETECTRON2_DATASETS")
    if not datasets:
        pytest.skip("COCO is not there: DETECTRON2_DATASETS is not set")
    root = os.path.join(datasets, "coco")
    if not os.path.isfile(os.path.join(root, "annotations", "instances_val2017.json")):
        pytest.skip(f"COCO is not there: {root} has no annotations/instances_val2017.json")
    return root


def _tiny_json() -> dict:
    images = [
        {"id": 7, "file_name": "mixed.png", "height": 64, "width": 64},
        {"id": 2, "file_name": "unseen.png", "height": 64, "width": 80},
        {"id": 30, "file_name": "seen.png", "height": 80, "width": 64},
        {"id": 5, "file_name": "empty.png", "height": 64, "width": 64},
    ]
    ant, cat, ship = 3, 17, 90
    # Image id, category id, left, top, width, height; the mask is a triangle that fills the box.
    objects = [
        (7, ant, 2, 2, 20, 16),
        (7, ship, 14, 8, 24, 18),
        (7, ant, 40, 4, 20, 20),
        (7, ship, 4, 30, 18, 14),
        (7, ant, 26, 28, 16, 16),
        (7, ship, 44, 30, 16, 18),
        (7, ant, 2, 48, 30, 14),
        (7, cat, 30, 20, 26, 34),
        (2, cat, 6, 8, 30, 40),
        (2, cat, 30, 10, 40, 44),
        (30, ant, 4, 10, 36, 40),
        (30, ship, 20, 34, 40, 40),
    ]
    annotations = []
    for i, (image_id, category_id, *box) in enumerate(objects):
        annotations.append(
            {
                "id": 101 + i,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [float(v) for v in box],
                "area": box[2] * box[3] / 2,
                "iscrowd": 0,
                "segmentation": [_triangle(*box)],
            }
        )
    annotations[1]["segmentation"] = _compressed(annotations[1])
    annotations[2]["segmentation"] = _uncompressed(annotations[2])
    del annotations[3]["segmentation"]
    annotations[4]["segmentation"] = []
    annotations[5]["segmentation"] = None
    annotations[6].update(iscrowd=1, segmentation=_uncompressed(annotations[6]))
    categories = [{"id": 90, "name": "ship"}, {"id": 3, "name": "ant"}, {"id": 17, "name": "cat"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _triangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [float(v) for v in (x, y + h, x + w / 3, y, x + w, y + h)]


def _compressed(annotation: dict, size: tuple[int, int] = (64, 64)) -> dict:
    rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def _uncompressed(annotation: dict, size: tuple[int, int] = (64, 64)) -> dict:
    pixels = mask_util.decode(_compressed(annotation, size)).ravel(order="F")
    changes = np.nonzero(np.diff(pixels))[0] + 1
    counts = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
    return {"size": list(size), "counts": ([0] if pixels[0] else []) + counts}


def _write_images(data: dict, root: Path) -> None:
    rng = np.random.default_rng(0)
    for image in data["images"]:
        size = (image["height"], image["width"])
        pixels = rng.integers(100, 140, (*size, 3), dtype=np.uint8)
        for annotation in data["annotations"]:
            if annotation["image_id"] == image["id"]:
                polygon = _triangle(*annotation["bbox"])
                mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects([polygon], *size)))
                pixels[mask.astype(bool)] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(root / image["file_name"])
