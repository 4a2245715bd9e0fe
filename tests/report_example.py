"""A ground truth and two result files of rectangles, for the tests of the analysis."""

import json

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from teacher_student_mask.analysis import Settings, analyze

HEIGHT, WIDTH = 60, 80
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</script>%{x}"


def rectangle(x, y, w, h):
    """RLE as in a json."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def make_files(folder, names=("dog", "pole", "kite"), num_images=6):
    """
    Write truth.json, exact.json, swollen.json and the images; return the paths of the jsons.

    Each image has a seen dog, an unseen pole beside it and an unseen kite, whose box the dog covers
    by half. "exact" finds everything; in "swollen", every second kite swallows the dog.
    """
    boxes = ((5, 5, 20, 20), (50, 5, 6, 40), (15, 5, 20, 20))
    annotations = [
        {
            "id": 3 * i + k + 1,
            "image_id": i + 1,
            "category_id": k + 1,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": rectangle(*box),
        }
        for i in range(num_images)
        for k, box in enumerate(boxes)
    ]
    images = [
        {"id": i + 1, "height": HEIGHT, "width": WIDTH, "file_name": f"{i + 1}.png"}
        for i in range(num_images)
    ]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    truth = {"images": images, "categories": categories, "annotations": annotations}
    keys = ("image_id", "category_id", "bbox", "segmentation")
    exact = [{k: x[k] for k in keys} | {"score": 0.9} for x in annotations]
    swollen = [dict(x) for x in exact]
    for x in swollen:
        if x["category_id"] == 3 and x["image_id"] % 2:
            x["segmentation"] = rectangle(5, 5, 30, 20)
    rng = np.random.default_rng(0)
    for image in images:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    paths = {}
    for name, content in (("truth", truth), ("exact", exact), ("swollen", swollen)):
        paths[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(content))
    return paths


def run(files, names=("exact", "swollen"), settings=Settings(num_resamples=40), **kwargs):
    """The analysis of :func:`make_files`; ``names`` are those of the two models."""
    results = dict(zip(names, (files["exact"], files["swollen"])))
    kwargs = {"results": results, "seen_classes": "dog", **kwargs}
    return analyze(files["truth"], settings=settings, **kwargs)


def example_analysis(folder, names=("exact", "swollen"), classes=("dog", "pole", "kite")):
    """With results on ground-truth boxes and the quality of pseudo masks, too."""
    files = make_files(folder, classes)
    bins = [
        {"low": low, "high": high, "num_gt": 6, "mask_iou": 0.5 - high / 4}
        for low, high in [(0.0, 0.0), *((k / 10, (k + 1) / 10) for k in range(10))]
    ]
    quality = {"mask_iou": 0.4, "overlap_bins": bins}
    methods = {"threshold": quality, "interact": quality}
    return run(
        files,
        names,
        seen_classes=[classes[0]],
        gt_box_results=dict(zip(names, (files["exact"], files["swollen"]))),
        pseudo_masks={names[1]: {"num_objects": 66, "mask_side": 28, "methods": methods}},
    )
