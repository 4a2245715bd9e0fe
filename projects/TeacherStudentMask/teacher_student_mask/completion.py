"""Finish a half-annotated dataset: a mask for every object of a COCO json that has only a box."""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import launch
from detectron2.utils import comm
from pycocotools.coco import COCO
from tabulate import tabulate
from tqdm import tqdm

from .coco_json import check_coco, has_mask, is_from_model, read_json, write_json
from .data import TeacherStudentDatasetMapper
from .errors import InputError
from .evaluation import compute_overlaps
from .masks_on_boxes import grabcut_masks, model_masks
from .modeling import GrabCutRCNN
from .trained_model import TrainedModel, load_config, load_model

__all__ = [
    "CompletionSettings",
    "CompletionSummary",
    "complete_dataset",
]

logger = logging.getLogger(__name__)

# What an object that is given a mask gets, always or sometimes.
_NEW_KEYS = ("segmentation", "area", "score", "mask_source", "teacher_student_agreement")
_NEW_KEYS += ("mask_fallback",)

# Of teacher and student; below it the user is told. See docs/COMPLETE.md for what was measured.
_LOW_AGREEMENT = 0.6
# Every process waits for the slowest one.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class CompletionSettings:
    """
    What is completed, and how.

    Args:
        annotations: COCO json; not changed.
        image_root: folder of the images.
        output: the json to write.
        config_file, weights, opts: of the model, see :func:`load_config`.
        grabcut: make the masks by GrabCut from box and colours, without a model.
        masks_of: "student", "teacher", or "both": of the mean of the two heads' probabilities.
            None: "both", or "student" where the model has one head.
        mask_format: "rle" or "polygon"; a mask with a hole is an RLE in any case.
        redo_model_masks: make masks with ``mask_source`` "model" anew; they are kept otherwise.
        skip_broken_images: leave the objects of images that cannot be read as they are.
        ranking: csv to write, of the objects that were to be given a mask, those that most need a
            human first.
        resume: go on with what an interrupted run has left beside ``output``.
        force: replace ``output`` and ``ranking``, and throw away what an interrupted run has left.
    """

    annotations: str
    image_root: str
    output: str
    config_file: str | None = None
    weights: str | None = None
    opts: Sequence = ()
    grabcut: bool = False
    masks_of: str | None = None
    mask_format: str = "rle"
    redo_model_masks: bool = False
    skip_broken_images: bool = False
    ranking: str | None = None
    resume: bool = False
    force: bool = False


@dataclass
class CompletionSummary:
    """
    What a run has done; as text, a table.

    Attributes:
        classes: {class: numbers of its objects: "human" and "model" (masks that were kept), "made",
            "missing" (left without a mask); of the made ones "fallback", the sums "score" and
            "agreement", and "agreements", how many have one}.
        no_mask: {why no mask was made: number of objects}.
        broken_images: a sentence about each image that was left out.
    """

    classes: dict[str, Counter]
    no_mask: Counter = field(default_factory=Counter)
    broken_images: list[str] = field(default_factory=list)

    @property
    def mean_agreement(self) -> float | None:
        """Mean IoU of the masks of teacher and student; None for a model with one head."""
        total = sum(self.classes.values(), Counter())
        return total["agreement"] / total["agreements"] if total["agreements"] else None

    def __str__(self) -> str:
        headers = ["class", "human masks kept", "model masks kept", "masks made", "with fallback"]
        headers += ["without a mask", "mean score", "mean agreement"]
        rows = [*self.classes.items(), ("all", sum(self.classes.values(), Counter()))]
        table = [
            [name, *(n[key] for key in ("human", "model", "made", "fallback", "missing"))]
            + [n["score"] / n["made"] if n["score"] else None]
            + [n["agreement"] / n["agreements"] if n["agreements"] else None]
            for name, n in rows
        ]
        options = {"floatfmt": ".3f", "missingval": "-", "disable_numparse": [0]}
        lines = [tabulate(table, headers=headers, **options)]
        lines += [f"{n} objects have no mask: {why}" for why, n in self.no_mask.most_common()]
        if self.broken_images:
            lines += [f"{len(self.broken_images)} images were left out:", *self.broken_images]
        return "\n".join(lines)


def complete_dataset(
    settings: CompletionSettings,
    *,
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> CompletionSummary | None:
    """
    Give every object of a COCO json that has a box only a mask, and write the json with them.

    A mask is made for objects that are not crowds and have none (``segmentation`` missing, null or
    empty). Everything else of the json keeps its value. Each process appends the images that it has
    finished to OUTPUT.part-RANK.jsonl; at the end these files are merged and removed.

    Args:
        settings: what is completed, and how.
        num_processes: on this machine; one per GPU, or on the CPU where the model runs there.
        num_machines, machine_rank, dist_url: as of Detectron2's ``launch``, for GPUs. All machines
            must share the disk of the output.

    Returns:
        What has been done; None on machines other than the first, which writes the output.

    Raises:
        InputError: a path, the json, the model, an image or a number cannot be used; what is
            finished is kept for ``resume``.
    """
    _check_paths(settings)
    cfg, device = None, "cpu"
    if not settings.grabcut:
        cfg = load_config(settings.config_file, settings.opts, weights=settings.weights)
        device = cfg.MODEL.DEVICE
    data = read_json(settings.annotations)
    check_coco(settings.annotations, data=data).raise_on_error()
    header = _shard_header(settings, cfg)
    if settings.force and not settings.resume and machine_rank == 0:
        for path in _shard_paths(settings.output):
            os.unlink(path)
    if _shard_paths(settings.output) and not settings.resume:
        raise InputError(
            f"An interrupted run has left {_shard_paths(settings.output)[0]}: --resume goes on "
            "with it, --force begins anew."
        )
    finished = _read_shards(settings.output, header)
    tasks = _image_tasks(data, settings)
    todo = [x for x in tasks if "objects" not in finished.get(x["number"], {})]
    if len(todo) < len(tasks):
        logger.info(f"Going on: {len(tasks) - len(todo)} of {len(tasks)} images are finished.")
    if todo:
        args = settings, todo, header, data["categories"]
        _start_processes(args, device, num_processes, num_machines, machine_rank, dist_url)
    if machine_rank > 0:
        return None
    return _finish(settings, data, _read_shards(settings.output, header))


def _check_paths(settings: CompletionSettings) -> None:
    if not os.path.isfile(settings.annotations):
        raise InputError(f"The annotations {settings.annotations} do not exist.")
    if not os.path.isdir(settings.image_root):
        raise InputError(f"The folder of the images {settings.image_root} does not exist.")
    if settings.grabcut == bool(settings.config_file):
        raise InputError("Give either the config of a trained model or --grabcut.")
    if settings.grabcut and settings.ranking:
        raise InputError("GrabCut's masks have no score to rank them by; leave the ranking out.")
    taken = [os.path.realpath(settings.annotations)]
    for path, may_replace in (
        (settings.output, settings.force),
        (settings.ranking, settings.force or settings.resume),
    ):
        if path is None:
            continue
        if os.path.realpath(path) in taken:
            raise InputError(f"{path} is another file of this run; name a file of its own.")
        if os.path.isdir(path) or (os.path.exists(path) and not may_replace):
            raise InputError(f"{path} exists; --force replaces a file.")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        taken.append(os.path.realpath(path))


def _kind(annotation: dict, redo_model_masks: bool) -> str:
    if annotation.get("iscrowd"):
        return "crowd"
    if not has_mask(annotation):
        return "missing"
    if is_from_model(annotation):
        return "missing" if redo_model_masks else "model"
    return "human"


def _image_tasks(data: dict, settings: CompletionSettings) -> list[dict]:
    """
    What processes need to know of each image with objects that are to be given a mask.

    Returns:
        Detectron2's dicts of images (path, size and id), with "number", the place of the image in
        the json, and "objects": (place of the annotation in the json, category id, XYWH box) each.
    """
    objects = defaultdict(list)
    for row, x in enumerate(data["annotations"]):
        if _kind(x, settings.redo_model_masks) == "missing":
            objects[x["image_id"]].append((row, x["category_id"], x["bbox"]))
    return [
        {
            "file_name": os.path.join(settings.image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "number": number,
            "objects": objects[image["id"]],
        }
        for number, image in enumerate(data["images"])
        if image["id"] in objects
    ]


def _start_processes(
    args: tuple,
    device: str,
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
) -> None:
    is_on_gpu = device.startswith("cuda")
    most = torch.cuda.device_count() if is_on_gpu else num_processes
    if not 1 <= num_processes <= most or not 0 <= machine_rank < num_machines:
        raise InputError(
            f"{num_processes} processes, machine {machine_rank} of {num_machines}: there must be 1 "
            "or more processes, at most one per GPU, and machines count from 0."
        )
    if num_machines > 1 and (dist_url == "auto" or not is_on_gpu):
        raise InputError("Several machines need GPUs, and --dist-url tcp://HOST:PORT of machine 0.")
    try:
        if is_on_gpu or num_processes == 1:
            shape = num_processes, num_machines, machine_rank
            launch(_complete_images, *shape, dist_url, args, _TIMEOUT)
        else:  # Detectron2 0.6 launches processes on GPUs alone.
            with tempfile.TemporaryDirectory() as folder:
                spawn_args = f"file://{folder}/processes", num_processes, args
                torch.multiprocessing.spawn(_join_on_cpu, spawn_args, nprocs=num_processes)
    except torch.multiprocessing.ProcessExitedException as error:
        raise InputError(
            "A process stopped, for the reason above; what is finished is kept, and --resume goes "
            "on with it."
        ) from error


def _join_on_cpu(rank: int, url: str, num_processes: int, args: tuple) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    cv2.setNumThreads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=url, timeout=_TIMEOUT, world_size=num_processes, rank=rank
    )
    _complete_images(*args)


def _complete_images(
    settings: CompletionSettings, tasks: list[dict], header: dict, categories: list[dict]
) -> None:
    """Complete this process's share of the images, and write each to the process's shard."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    try:
        mapper, make_masks, num_workers = _prepare(settings, categories)
        loader = build_detection_test_loader(
            tasks, mapper=functools.partial(_read_image, mapper), num_workers=num_workers
        )
        description = f"images of process 1 of {world_size}"
        with (
            _open_shard(f"{settings.output}.part-{rank:05}.jsonl", header) as shard,
            tqdm(loader, desc=description, unit="image", disable=rank > 0) as progress,
        ):
            for (task,) in progress:
                record = {"image": task["number"]}
                if "problem" not in task:
                    record["objects"] = make_masks(task)
                elif settings.skip_broken_images:
                    record["problem"] = task["problem"]
                else:
                    raise InputError(
                        f"{task['problem']} What is finished is kept for --resume; "
                        "--skip-broken-images leaves such images out."
                    )
                shard.write(json.dumps(record) + "\n")
                shard.flush()
    except InputError as error:
        if world_size == 1:
            raise
        # An exception would reach the user as a traceback of processes.
        logger.error(f"error: {error}")
        sys.exit(1)
    comm.synchronize()


def _read_image(mapper: TeacherStudentDatasetMapper, task: dict) -> dict:
    try:
        return mapper(task)
    except ValueError as error:
        return {**task, "problem": str(error)}


def _prepare(
    settings: CompletionSettings, categories: list[dict]
) -> tuple[TeacherStudentDatasetMapper, Callable[[dict], list[dict]], int]:
    """How images are read, how their masks are made, and the number of workers that read ahead."""
    if settings.grabcut:
        mapper = TeacherStudentDatasetMapper(
            False, augmentations=[], image_format="BGR", seen_classes=()
        )
        return mapper, grabcut_masks, 0
    trained = load_model(settings.config_file, weights=settings.weights, opts=settings.opts)
    if isinstance(trained.model, GrabCutRCNN):
        raise InputError("A GrabCutRCNN has no mask head; --grabcut makes its masks without it.")
    allowed = ("student", "teacher", "both") if len(trained.heads) > 1 else trained.heads
    masks_of = settings.masks_of or allowed[-1]
    if masks_of not in allowed:
        raise InputError(
            f"--masks-of {masks_of}: of a model with MODEL.ROI_HEADS.NAME "
            f"{trained.cfg.MODEL.ROI_HEADS.NAME!r} it can be {', '.join(allowed)}."
        )
    cfg = trained.cfg.clone()
    cfg.TEST.GT_BOXES = False  # The boxes are ours.
    make_masks = functools.partial(
        model_masks,
        trained.model,
        _class_ids(trained, categories, settings.annotations),
        masks_of,
        settings.mask_format,
    )
    # On the CPU the model has something to do for every core.
    num_workers = 0 if cfg.MODEL.DEVICE == "cpu" else cfg.DATALOADER.NUM_WORKERS
    return TeacherStudentDatasetMapper(cfg, is_train=False), make_masks, num_workers


def _class_ids(trained: TrainedModel, categories: list[dict], path: str) -> dict[int, int]:
    """{category id of the json: contiguous id of the model's class of this name}."""
    categories = sorted(categories, key=lambda x: x["id"])
    known, names = trained.class_names, [x["name"] for x in categories]
    if known == [f"class {i}" for i in range(len(names))]:
        logger.warning(f"Taken for the model's classes, in this order: {', '.join(names)}.")
        known = names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"{path} has the categories {', '.join(unknown[:8])}, which are not classes of the "
            f"model: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}."
        )
    return {x["id"]: known.index(x["name"]) for x in categories}


def _shard_paths(output: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(output)}.part-*.jsonl"))


def _shard_header(settings: CompletionSettings, cfg: CfgNode | None) -> dict:
    """What must be the same for an interrupted run to go on."""
    keys = ("grabcut", "masks_of", "mask_format", "redo_model_masks")
    header = {key: getattr(settings, key) for key in keys}
    files = {"annotations": settings.annotations}
    if cfg is not None:
        cfg, files["weights"] = cfg.clone(), cfg.MODEL.WEIGHTS
        # Where it runs does not matter.
        cfg.MODEL.DEVICE = cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR = ""
        cfg.DATALOADER.NUM_WORKERS = 0
        header["config"] = hashlib.sha256(cfg.dump().encode()).hexdigest()
    for name, path in files.items():
        if os.path.isfile(path):
            header[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        else:
            header[name] = path
    return header


def _open_shard(path: str, header: dict) -> TextIO:
    if os.path.exists(path):
        # A line that a kill has left half written is cut off.
        os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
    shard = open(path, "a", encoding="utf-8")
    if shard.tell() == 0:
        shard.write(json.dumps(header) + "\n")
    return shard


def _read_shards(output: str, header: dict) -> dict[int, dict]:
    """{number of an image: its record}; what was made goes before a problem of another try."""
    found: dict[int, dict] = {}
    for path in _shard_paths(output):
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
        first, *records = map(json.loads, lines or ["{}"])
        different = [key for key in header if lines and first.get(key) != header[key]]
        if different:
            raise InputError(
                f"{path} is of a run with other {', '.join(different)}; give those again, or begin "
                "anew with --force."
            )
        for record in records:
            if "objects" in record or record["image"] not in found:
                found[record["image"]] = record
    return found


def _finish(
    settings: CompletionSettings, data: dict, finished: dict[int, dict]
) -> CompletionSummary:
    """Fill the masks in, write the json and the ranking, and remove the shards."""
    names = {x["id"]: x["name"] for x in data["categories"]}
    summary = CompletionSummary({x: Counter() for x in names.values()})
    for x in data["annotations"]:
        summary.classes[names[x["category_id"]]][_kind(x, settings.redo_model_masks)] += 1
    candidates = []
    for _, record in sorted(finished.items()):
        if "problem" in record:
            summary.broken_images.append(record["problem"])
        for made in record.get("objects", ()):
            annotation = data["annotations"][made.pop("row")]
            candidates.append((annotation, made))
            if "problem" in made:
                summary.no_mask[made["problem"]] += 1
                continue
            for key in _NEW_KEYS:
                annotation.pop(key, None)
            annotation.update(made)
            count = summary.classes[names[annotation["category_id"]]]
            count.update(made=1, missing=-1, fallback=int("mask_fallback" in made))
            count.update(score=made.get("score", 0))
            if "teacher_student_agreement" in made:
                count.update(agreements=1, agreement=made["teacher_student_agreement"])
    if settings.ranking:
        _write_ranking(settings.ranking, data, candidates)
    write_json(settings.output, data)
    for path in _shard_paths(settings.output):
        os.unlink(path)
    agreement = summary.mean_agreement
    if agreement is not None and agreement < _LOW_AGREEMENT:
        logger.warning(
            f"Teacher and student agree little (mean IoU {agreement:.2f}): one of them may be far "
            "from the truth, and the mean of both then is, too. Look at pictures of both "
            "(--masks-of teacher, --masks-of student) before these masks are used."
        )
    return summary


def _write_ranking(path: str, data: dict, candidates: list[tuple[dict, dict]]) -> None:
    """
    Write a csv with a row for each object that was to be given a mask, the greatest need first.

    The need is 1 - score * agreement, 1 - score without a second head, and 1 without a mask.
    """
    images = {x["id"]: x for x in data["images"]}
    names = {x["id"]: x["name"] for x in data["categories"]}
    coco = COCO()
    coco.imgs = {x["image_id"]: images[x["image_id"]] for x, _ in candidates}
    coco.imgToAnns = defaultdict(list)
    for annotation in data["annotations"]:
        coco.imgToAnns[annotation["image_id"]].append(annotation)
    overlaps = compute_overlaps(coco)
    rows = []
    for annotation, made in candidates:
        score, agreement = made.get("score"), made.get("teacher_student_agreement")
        need = 1.0 if score is None else 1 - score * (1 if agreement is None else agreement)
        row = {
            "rank": 0,
            "need": round(need, 4),
            "annotation_id": annotation["id"],
            "image_id": annotation["image_id"],
            "file_name": images[annotation["image_id"]]["file_name"],
            "category_id": annotation["category_id"],
            "class": names[annotation["category_id"]],
            **dict(zip(("x", "y", "width", "height"), annotation["bbox"])),
            "score": score,
            "agreement": agreement,
            "overlap": round(overlaps[annotation["id"]], 4),
            "remark": made.get("problem", "fallback to box_fit" * ("mask_fallback" in made)),
        }
        rows.append(row)
    rows.sort(key=lambda x: -x["need"])
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["rank", "need"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "rank": k} for k, row in enumerate(rows, start=1))
