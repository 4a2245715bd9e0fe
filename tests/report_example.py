"""An example of an analysis for the tests of the report: ellipses on made-up photographs."""

import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from pycocotools.coco import COCO

from teacher_student_mask.analysis.analysis import Analysis
from teacher_student_mask.analysis.objects import ObjectTable

MODELS = ("class-agnostic", "teacher-student")
SEEN = ("person", "car", "dog", "chair")
UNSEEN = ("kite", "umbrella", "skis", "toaster", "zebra", "book")
BINS = tuple(k / 10 for k in range(11))
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASKS = {"segm": 25.0, "segm_seen": 31.0, "segm_unseen": 22.0, "segm_unseen_overlap": 15.0}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</script>%{x}"


def example_analysis(
    num_images: int = 6,
    models: tuple[str, ...] = MODELS,
    image_size: tuple[int, int] = (120, 160),
    unseen: tuple[str, ...] = UNSEEN,
    gt_boxes: bool = True,
    pseudo_masks: bool = True,
    objects_per_image: int = 5,
) -> Analysis:
    """
    Masks and object tables fit one another; the AP are made up, better for each further model.

    Args:
        num_images, image_size, objects_per_image: of the ground truth; each image has a crowd, too.
        models: the first one's masks are the worst.
        unseen: names of the unseen classes.
        gt_boxes, pseudo_masks: whether there are such results.
    """
    rng = np.random.default_rng(0)
    coco = _ground_truth(rng, num_images, image_size, SEEN + unseen, objects_per_image)
    objects = {name: _object_table(coco, k, len(SEEN)) for k, name in enumerate(models)}
    names = SEEN + unseen
    summary = {
        "schema_version": 1,
        "created": "2026-11-22T14:00:00",
        "command": "python tools/analyze.py --annotations val.json --results a=a.json b=b.json",
        "versions": {"teacher-student-mask": "0.1.0", "python": "3.11.7", "numpy": "2.4.6"},
        "dataset": {
            "annotations": "data/val.json",
            "num_images": num_images,
            "num_objects": num_images * objects_per_image,
            "num_crowd": num_images,
            "num_seen": int((~objects[models[0]].is_unseen).sum()),
            "num_unseen": int(objects[models[0]].is_unseen.sum()),
            "seen_classes": list(SEEN),
            "unseen_classes": list(unseen),
        },
        "settings": {
            "num_resamples": 1000,
            "confidence": 0.95,
            "seed": 0,
            "overlap_threshold": 0.3,
            "overlap_bins": list(BINS),
            "score_threshold": 0.5,
            "min_objects_per_bin": 100,
            "ties": "seen",
            "max_detections": 100,
        },
        "models": {
            name: _model(name, k, objects[name], names, gt_boxes, pseudo_masks)
            for k, name in enumerate(models)
        },
        "differences": [
            _differences(a, b, protocol, j - i, names)
            for protocol in ("detections", *(("gt_boxes",) if gt_boxes else ()))
            for i, a in enumerate(models)
            for j, b in enumerate(models)
            if j > i
        ],
        "warnings": [
            {"file": "a.json", "message": "3 boxes reach outside their image", "count": 3}
        ],
    }
    return Analysis(summary, coco, objects)


def write_photos(analysis: Analysis, folder: Path) -> None:
    """Write the images: smooth colours with texture, which compress about as photographs do."""
    rng = np.random.default_rng(1)
    for info in analysis.coco.imgs.values():
        size = (info["width"], info["height"])
        pixels = np.full((size[1], size[0], 3), 128.0)
        for cells, strength in ((4, 60), (16, 30), (64, 20), (160, 12)):
            small = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            pixels += cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
        for annotation in analysis.coco.imgToAnns[info["id"]]:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * rng.integers(0, 256, 3)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / info["file_name"], quality=95)


def ellipse(size, centre, axes, angle=0) -> np.ndarray:
    mask = np.zeros(size, dtype=np.uint8)
    cv2.ellipse(mask, [int(v) for v in centre], [int(v) for v in axes], angle, 0, 360, 1, -1)
    return mask


def to_rle(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def make_coco(images: list, annotations: list, names: tuple[str, ...]) -> COCO:
    """Categories 1, 2, .. have the names, in this order."""
    coco = COCO()
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def annotation(annotation_id, image_id, category_id, mask, iscrowd=0) -> dict:
    rle = to_rle(mask)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(v) for v in mask_util.toBbox(rle)],
        "area": float(mask_util.area(rle)),
        "iscrowd": iscrowd,
        "segmentation": rle,
    }


def _ground_truth(rng, num_images, size, names, objects_per_image) -> COCO:
    height, width = size
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        name = f"{image_id:06d}.jpg"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for k in range(objects_per_image + 1):
            centre = rng.uniform((0.15 * width, 0.15 * height), (0.85 * width, 0.85 * height))
            axes = rng.uniform(0.06, 0.25, 2) * height + 3
            mask = ellipse(size, centre, axes, rng.uniform(0, 180))
            is_crowd = k == objects_per_image
            category_id = 1 + (len(annotations) % len(names))
            annotations.append(
                annotation(len(annotations) + 1, image_id, category_id, mask, int(is_crowd))
            )
    return make_coco(images, annotations, names)


def _object_table(coco: COCO, skill: int, num_seen: int) -> ObjectTable:
    """Each mask is the truth, moved, and what it covers of a neighbour; every ninth is missing."""
    rng = np.random.default_rng(10 + skill)
    rows = []
    for x in coco.dataset["annotations"]:
        if x["iscrowd"]:
            continue
        masks = {
            y["id"]: mask_util.decode(y["segmentation"]).astype(bool)
            for y in coco.imgToAnns[x["image_id"]]
        }
        own = masks[x["id"]]
        others = [y for y in coco.imgToAnns[x["image_id"]] if y["id"] != x["id"]]
        left, top, width, height = (int(v) for v in x["bbox"])
        box = np.zeros_like(own)
        box[top : top + height, left : left + width] = True
        shares = [(masks[y["id"]] & box).sum() / box.sum() for y in others if not y["iscrowd"]]
        moved = np.roll(own, rng.integers(-8, 9, 2) // (skill + 1), axis=(0, 1))
        for y in others:
            if not y["iscrowd"] and rng.random() < 0.5 / (skill + 1):
                moved = moved | (masks[y["id"]] & box)
        wrong = moved & ~own
        of_kind = {"seen": np.zeros_like(own), "unseen": np.zeros_like(own)}
        crowd = np.zeros_like(own)
        for y in others:
            kind = "seen" if y["category_id"] <= num_seen else "unseen"
            target = crowd if y["iscrowd"] else of_kind[kind]
            target |= masks[y["id"]]
        seen = wrong & of_kind["seen"]
        unseen = wrong & of_kind["unseen"] & ~seen
        on_crowd = wrong & crowd & ~seen & ~unseen
        background = wrong & ~seen & ~unseen & ~on_crowd
        is_matched = x["id"] % 9 != 0 and moved.any()
        counts = [background.sum(), seen.sum(), unseen.sum(), on_crowd.sum()]
        rows.append(
            {
                "id": x["id"],
                "overlap": max(shares, default=0.0),
                "is_unseen": x["category_id"] > num_seen,
                "score": round(0.5 + 0.5 * rng.random(), 3) if is_matched else np.nan,
                "iou": (moved & own).sum() / (moved | own).sum() if is_matched else np.nan,
                "counts": counts if is_matched else [0, 0, 0, 0],
                "rle": to_rle(moved) if is_matched else None,
            }
        )
    counts = np.array([x["counts"] for x in rows], dtype=np.int64)
    ious = np.array([x["iou"] for x in rows])
    return ObjectTable(
        annotation_ids=np.array([x["id"] for x in rows], dtype=np.int64),
        overlaps=np.array([x["overlap"] for x in rows]),
        is_unseen=np.array([x["is_unseen"] for x in rows]),
        scores=np.array([x["score"] for x in rows]),
        ious=ious,
        boundary_ious=0.8 * ious,
        false_positives=counts[:, :3],
        crowd_pixels=counts[:, 3],
        rles=[x["rle"] for x in rows],
        protocol="detections",
        num_unmatched_detections=4,
    )


def _model(name, skill, table, names, gt_boxes, pseudo_masks) -> dict:
    model = {"results": f"{name}.json", "gt_box_results": None, "num_detections": 1234 + skill}
    model |= _results(skill, 0.0, names, table)
    if gt_boxes:
        quality = {"mask_iou": 0.55 + 0.05 * skill, "boundary_iou": 0.35 + 0.05 * skill}
        model["gt_boxes"] = _results(skill, 6.0, names, table) | quality
        for k, one in enumerate(model["gt_boxes"]["overlap_bins"]):
            iou = 0.72 - 0.03 * k + 0.04 * skill
            one |= {"num_masks": one["num_gt"], "mask_iou": iou, "boundary_iou": 0.7 * iou}
    if pseudo_masks and skill == 1:
        model["pseudo_masks"] = {"num_objects": 300, "mask_side": 28, "methods": {}}
        for k, method in enumerate(("threshold", "interact", "box_fit")):
            bins = [
                {"low": low, "high": high, "num_gt": 30, "mask_iou": 0.5 + 0.05 * k - 0.02 * i}
                for i, (low, high) in enumerate(_edges())
            ]
            quality = {"mask_iou": 0.45 + 0.05 * k, "overlap_bins": bins}
            model["pseudo_masks"]["methods"][method] = quality
    return model


def _results(skill, bonus, names, table) -> dict:
    results = {"intervals": {}}
    for task, base in TASKS.items():
        values = {m: base + bonus + 1.5 * skill + 3 * k for k, m in enumerate(METRICS)}
        results[task] = values | {"num_gt": 321}
        results["intervals"][task] = {m: [v - 1.6, v + 1.7] for m, v in values.items()}
    # An undefined metric.
    results["segm_unseen_overlap"]["APl"] = None
    results["intervals"]["segm_unseen_overlap"]["APl"] = None
    results["overlap_bins"] = [
        _bin(low, high, 30 - 2.4 * k + bonus + 1.5 * skill, 480 // (k + 1))
        for k, (low, high) in enumerate(_edges())
    ]
    results["per_class"] = [
        {
            "name": name,
            "category_id": k,
            "seen": k <= len(SEEN),
            "num_gt": 40 + k,
            "AP": 20.0 + bonus + k,
            "AP50": 40.0 + k,
            "AP75": 18.0 + k,
            "interval": [17.0 + bonus + k, 24.0 + bonus + k],
        }
        for k, name in enumerate(names, start=1)
    ]
    is_used = table.is_unseen & ~np.isnan(table.ious)
    background, seen, unseen = (int(v) for v in table.false_positives[is_used].sum(axis=0))
    results["false_positives"] = {
        "protocol": "gt_boxes" if bonus else "detections",
        "score_threshold": None if bonus else 0.5,
        "background": background,
        "seen": seen,
        "unseen": unseen,
        "total": background + seen + unseen,
        "crowd": int(table.crowd_pixels[is_used].sum()),
        "num_objects": int(is_used.sum()),
        "num_unmatched_objects": int((table.is_unseen & ~is_used).sum()),
        "num_unmatched_detections": 4,
    }
    return results


def _edges() -> list[tuple[float, float]]:
    return [(0.0, 0.0), *zip(BINS, BINS[1:])]


def _bin(low, high, ap, num_gt) -> dict:
    return {
        "low": low,
        "high": high,
        "num_gt": num_gt,
        "few": num_gt < 100,
        "AP": ap,
        "AP50": 1.8 * ap,
        "AP_interval": [ap - 2, ap + 2],
        "AP50_interval": [1.8 * ap - 3, 1.8 * ap + 3],
    }


def _difference(value, margin) -> dict:
    low, high = value - margin, value + margin
    return {"difference": value, "interval": [low, high], "includes_zero": low <= 0 <= high}


def _differences(baseline, model, protocol, steps, names) -> dict:
    tasks = {
        task: {
            m: _difference(1.5 * steps, 0.9 if task == "segm_unseen" else 2.0 + 0.1 * k)
            for k, m in enumerate(METRICS)
        }
        for task in TASKS
    }
    undefined = {"difference": None, "interval": None, "includes_zero": True}
    tasks["segm_unseen_overlap"]["APl"] = undefined
    per_class = [
        {"name": name, "seen": k < len(SEEN), "num_gt": 41 + k}
        | _difference(((7 * k) % len(names)) - 0.4 * len(names), 1.5)
        for k, name in enumerate(names)
    ]
    return {
        "baseline": baseline,
        "model": model,
        "protocol": protocol,
        "tasks": tasks,
        "per_class": per_class,
    }
