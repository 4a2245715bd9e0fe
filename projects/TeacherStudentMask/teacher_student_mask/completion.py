"""Finish a half-annotated dataset: a mask for every object of a COCO json that has only a box."""

import contextlib
import csv
import functools
import glob
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import supervision as sv
import torch
from detectron2.data import build_detection_test_loader
from tabulate import tabulate
from tqdm import tqdm

from .box_prompts import load_predictor
from .class_splits import match_classes
from .coco_json import check_coco, is_from_model, read_json, write_json
from .coco_json.masks import KEYS_OF_MODELS
from .data import TeacherStudentDatasetMapper
from .drawing import annotations_to_detections
from .errors import InputError
from .object_masks import PLAIN_IOU, is_plain, make_image_masks, make_model_masks
from .trained_model import load_model

__all__ = ["CompletionSettings", "complete", "write_yolo"]

# Keys of an object that is given a mask, always or sometimes.
_NEW_KEYS = {"segmentation", "area", *KEYS_OF_MODELS}
# What may be another one when an interrupted run goes on.
_FREE_SETTINGS = {"output", "skip_broken_images", "ranking", "yolo", "resume", "force"}
_FREE_SETTINGS |= {"num_processes"}
# Of teacher and student; below it the user is told.
_LOW_AGREEMENT = 0.6


@dataclass(frozen=True)
class CompletionSettings:
    """
    What is completed, and how.

    Args:
        annotations, image_root, output: COCO json, folder of its images, and the json to write.
        model, weights, opts: of the model, see :func:`load_model`.
        grabcut: make the masks by GrabCut from box and colours, without a model.
        predictor: make them by a model that is prompted with the boxes, see :func:`load_predictor`;
            ``weights`` are its own, and it runs on a GPU where there is one.
        masks_of: "student", "teacher", or "both": of the mean of the two heads' probabilities.
            None: "both", or "student" where the model has one head.
        mask_format: "rle" or "polygon"; a mask with a hole is an RLE in any case.
        redo_model_masks: make masks with ``mask_source`` "model" anew; they are kept otherwise.
        skip_broken_images: leave the objects of images that cannot be read as they are.
        ranking: csv of the objects that were to be given a mask, the greatest need first.
        yolo: folder for the outcome as labels of YOLO, see :func:`write_yolo`.
        resume, force: go on with what an interrupted run has left; replace it, and the outputs.
        num_processes: one per GPU, or on the CPU where the model runs there.
    """

    annotations: str
    image_root: str
    output: str
    model: str | None = None
    weights: str | None = None
    opts: Sequence = ()
    grabcut: bool = False
    predictor: str | None = None
    masks_of: str | None = None
    mask_format: str = "rle"
    redo_model_masks: bool = False
    skip_broken_images: bool = False
    ranking: str | None = None
    yolo: str | None = None
    resume: bool = False
    force: bool = False
    num_processes: int = 1


def complete(
    model: str | os.PathLike | None,
    annotations: str | os.PathLike,
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    **options,
) -> str:
    """
    Give every object of a COCO json that has a box only a mask, and write the json with them.

    A mask is made for objects that are not crowds and have none (``segmentation`` missing, null or
    empty; whatever was drawn is kept). All else keeps its value. Each process appends the images
    that it has finished to an OUTPUT.part-NUMBER.jsonl; at the end these are merged and removed.

    Args:
        model: folder of a training; None: ``options`` name what makes the masks.
        annotations, image_root, output: COCO json, folder of its images, and the json to write.
        options: of :class:`CompletionSettings`.

    Returns:
        A table of the classes: the masks that were kept and made; mean score and agreement.

    Raises:
        InputError: a path, the json, the model or an image cannot be used.
    """
    paths = map(os.fspath, (annotations, image_root, output))
    settings = CompletionSettings(*paths, model=model and os.fspath(model), **options)
    _check_paths(settings)
    data = read_json(settings.annotations)
    check_coco(settings.annotations, data=data).raise_on_error()
    header = {k: str(v) for k, v in asdict(settings).items() if k not in _FREE_SETTINGS}
    header["annotations"] = hashlib.sha256(Path(settings.annotations).read_bytes()).hexdigest()
    shards = _shard_paths(settings.output)
    if shards and not settings.resume:
        if not settings.force:
            raise InputError(f"{shards[0]} is left of another run: give --resume or --force.")
        for path in shards:
            os.unlink(path)
        shards = []
    finished = _read_shards(shards, header)
    kinds = [_kind(x, settings.redo_model_masks) for x in data["annotations"]]
    todo = [
        x
        for x in _image_tasks(data, kinds, settings.image_root)
        if "objects" not in finished.get(x["number"], {})
    ]
    num_processes = max(1, min(settings.num_processes, len(todo)))
    # A shard of an interrupted run may end with half a line, so each run has its own.
    first = 1 + max((int(x.rsplit("-", 1)[1].split(".")[0]) for x in shards), default=-1)
    args = settings, num_processes, todo, header, data["categories"], first
    if todo and num_processes == 1:
        _complete_images(0, *args)
    elif todo:
        try:
            torch.multiprocessing.spawn(_complete_images, args, num_processes)
        except torch.multiprocessing.ProcessRaisedException as error:
            _, is_ours, message = str(error).strip().rpartition("InputError: ")
            raise InputError(message) if is_ours else error
    finished = _read_shards(_shard_paths(settings.output), header)
    return _write_output(settings, data, kinds, finished)


def _check_paths(settings: CompletionSettings) -> None:
    if [settings.grabcut, bool(settings.predictor), bool(settings.model)].count(True) != 1:
        raise InputError("Give one of a trained model, --grabcut, or a model that takes boxes.")
    outputs = [settings.output, settings.ranking, settings.yolo]
    paths = [settings.annotations, *filter(None, outputs)]
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise InputError("Annotations, output, ranking and yolo must be different paths.")
    for path in paths[1:]:
        if os.path.exists(path) and not settings.force:
            raise InputError(f"{path} exists; --force replaces it.")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def _image_tasks(data: dict, kinds: list[str], image_root: str) -> list[dict]:
    """Detectron2's dicts of the images with objects that are to be given a mask."""
    # By image: (place of the annotation in the json, category id, XYWH box) each.
    objects = defaultdict(list)
    for row, (x, kind) in enumerate(zip(data["annotations"], kinds)):
        if kind == "missing":
            objects[x["image_id"]].append((row, x["category_id"], x["bbox"]))
    return [
        {
            "height": int(image["height"]),
            "width": int(image["width"]),
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "number": number,
            "objects": objects[image["id"]],
        }
        for number, image in enumerate(data["images"])
        if image["id"] in objects
    ]


def _kind(annotation: dict, redo_model_masks: bool) -> str:
    if annotation.get("iscrowd"):
        return "crowd"
    if not any(annotation.get("segmentation") or ()):
        return "missing"
    if is_from_model(annotation):
        return "missing" if redo_model_masks else "model"
    return "human"


def _shard_paths(output: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(output)}.part-*.jsonl"))


def _read_shards(paths: list[str], header: dict) -> dict[int, dict]:
    """{number of an image: its record}; what was made goes before a problem of another try."""
    found: dict[int, dict] = {}
    for path in paths:
        # A kill may have left a last line half written.
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
        first, *records = map(json.loads, lines or [json.dumps(header)])
        if different := [key for key in header if first.get(key) != header[key]]:
            raise InputError(f"{path} is of a run with other {', '.join(different)}; see --force.")
        for record in records:
            if "objects" in record or record["image"] not in found:
                found[record["image"]] = record
    return found


def _complete_images(
    rank: int,
    settings: CompletionSettings,
    num_processes: int,
    tasks: list[dict],
    header: dict,
    categories: list[dict],
    first_shard: int,
) -> None:
    """Complete this process's share of the images, and write each to the process's shard."""
    tasks = tasks[rank::num_processes]
    if num_processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
    mapper, make_masks, num_workers = _prepare(settings, categories)
    loader = build_detection_test_loader(
        tasks, mapper=functools.partial(_read_image, mapper), num_workers=num_workers
    )
    with open(f"{settings.output}.part-{first_shard + rank:05}.jsonl", "x") as shard:
        shard.write(json.dumps(header) + "\n")
        for (task,) in tqdm(loader, desc="images of process 1", unit="image", disable=rank > 0):
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


def _read_image(mapper: TeacherStudentDatasetMapper, task: dict) -> dict:
    try:
        return mapper(task)
    except ValueError as error:
        return {**task, "problem": str(error)}


def _prepare(
    settings: CompletionSettings, categories: list[dict]
) -> tuple[TeacherStudentDatasetMapper, Callable[[dict], list[dict]], int]:
    """How images are read, how their masks are made, and the number of workers that read ahead."""
    if not settings.model:
        options = {"augmentations": [], "image_format": "BGR", "seen_classes": ()}
        mapper = TeacherStudentDatasetMapper(False, **options)
        predictor = None
        if settings.predictor:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            predictor = load_predictor(settings.predictor, settings.weights or "", device)
        return mapper, functools.partial(make_image_masks, predictor, settings.mask_format), 0
    trained = load_model(settings.model, weights=settings.weights, opts=settings.opts)
    allowed = ("student", "teacher", "both") if len(trained.heads) > 1 else trained.heads
    masks_of = settings.masks_of or allowed[-1]
    if masks_of not in allowed:
        raise InputError(f"--masks-of {masks_of}: of this model it can be {', '.join(allowed)}.")
    cfg = trained.cfg
    names = [x["name"] for x in categories]
    model_ids = match_classes(names, trained.class_names, settings.annotations)
    class_ids = {x["id"]: k for x, k in zip(categories, model_ids)}
    make_masks = functools.partial(
        make_model_masks, trained.model, class_ids, masks_of, settings.mask_format
    )
    # On the CPU the model has something to do for every core.
    num_workers = 0 if cfg.MODEL.DEVICE == "cpu" else cfg.DATALOADER.NUM_WORKERS
    return TeacherStudentDatasetMapper(cfg, is_train=False), make_masks, num_workers


def _write_output(
    settings: CompletionSettings, data: dict, kinds: list[str], finished: dict[int, dict]
) -> str:
    """Fill the masks in, write the json and the ranking, remove the shards; return the table."""
    candidates, problems, scores, agreements = [], Counter(), [], []
    sizes = {x["id"]: (int(x["height"]), int(x["width"])) for x in data["images"]}
    num_plain = 0
    for _, record in sorted(finished.items()):
        if "problem" in record:
            problems[f"images were left out: {record['problem']}"] += 1
        for made in record.get("objects", ()):
            row = made.pop("row")
            annotation = data["annotations"][row]
            candidates.append((annotation, made))
            if "problem" in made:
                problems[f"objects have no mask: {made['problem']}"] += 1
                continue
            kinds[row] = "made"
            kept = {k: v for k, v in annotation.items() if k not in _NEW_KEYS}
            data["annotations"][row] = kept | made
            num_plain += is_plain(kept | made, sizes[kept["image_id"]])
            scores += [made[k] for k in ["score"] if k in made]
            agreements += [made[k] for k in ["teacher_student_agreement"] if k in made]
    if settings.ranking:
        _write_ranking(settings.ranking, data, candidates)
    write_json(settings.output, data)
    for path in _shard_paths(settings.output):
        os.unlink(path)

    counts = Counter(zip((x["category_id"] for x in data["annotations"]), kinds))
    columns = ("human", "model", "made", "missing")
    table = [[x["name"], *(counts[x["id"], kind] for kind in columns)] for x in data["categories"]]
    table = [row for row in table if any(row[1:])]
    table.append(["all", *(kinds.count(kind) for kind in columns)])
    headers = ["class", "human masks kept", "model masks kept", "masks made", "without a mask"]
    lines = [tabulate(table, headers, disable_numparse=[0])]
    if num_plain:
        lines.append(
            f"{num_plain} of {kinds.count('made')} new masks are no more than their filled box or "
            f"the ellipse in it (IoU over {PLAIN_IOU}). Many such masks mean a poor model."
        )
    if scores:
        lines.append(f"Mean score of the new masks: {np.mean(scores):.3f}")
    if agreements:
        mean = np.mean(agreements)
        lines.append(f"Mean agreement of teacher and student: {mean:.3f}")
        if mean < _LOW_AGREEMENT:
            lines.append("One of them may be far from the truth: see --masks-of teacher, student.")
    lines += [f"{n} {problem}" for problem, n in problems.most_common()]
    if settings.yolo:
        write_yolo(data, settings.image_root, settings.yolo)
    return "\n".join(lines)


def _write_ranking(path: str, data: dict, candidates: list[tuple[dict, dict]]) -> None:
    """
    Write a csv with a row for each object that was to be given a mask, the greatest need first.

    The need is 1 - score * agreement, 1 - score without a second head, and 1 without a mask.
    """
    file_names = {x["id"]: x["file_name"] for x in data["images"]}
    names = {x["id"]: x["name"] for x in data["categories"]}
    rows = []
    for annotation, made in candidates:
        score, agreement = made.get("score"), made.get("teacher_student_agreement")
        need = round(1 - (score or 0) * (1 if agreement is None else agreement), 4)
        image_id = annotation["image_id"]
        about = annotation.get("id", ""), image_id, file_names[image_id]
        class_name = names[annotation["category_id"]]
        remark = made.get("problem", "fallback to box_fit" * ("mask_fallback" in made))
        rows.append((need, *about, class_name, *annotation["bbox"], score, agreement, remark))
    header = "need,annotation_id,image_id,file_name,class,x,y,width,height,score,agreement,remark"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header.split(","), *sorted(rows, key=lambda x: -x[0])])


def write_yolo(coco: dict, image_root: str, folder: str | os.PathLike) -> None:
    """
    Write a checked COCO json as labels of YOLO, by supervision.

    ``folder`` then holds data.yaml with the names of the classes, and labels/ with a txt for each
    image that can be read, in the folders of the images below ``image_root``, or below what is
    common to all, if one is elsewhere. A row is an outline, or the box where an object has no mask;
    each part of a mask has a row of its own. Crowds are left out.
    """
    categories = sorted(coco["categories"], key=lambda x: x["id"])
    class_ids = {x["id"]: k for k, x in enumerate(categories)}
    objects = defaultdict(list)
    for x in coco["annotations"]:
        if not x.get("iscrowd"):
            objects[x["image_id"]].append(x)
    names = [x["name"] for x in categories]
    root = os.path.abspath(image_root)
    paths = [os.path.normpath(os.path.join(root, x["file_name"])) for x in coco["images"]]
    if os.path.commonpath([root, *paths]) != root:
        root = os.path.commonpath([os.path.dirname(x) for x in paths])
    sv.DetectionDataset(names, [], {}).as_yolo(data_yaml_path=str(Path(folder, "data.yaml")))
    for image, path in zip(coco["images"], paths):
        rows, size = objects[image["id"]], (int(image["height"]), int(image["width"]))
        ids = [class_ids[x["category_id"]] for x in rows]
        found = annotations_to_detections(rows, size, ids)
        # Ultralytics looks for labels in the same folders as images.
        labels = Path(folder, "labels", os.path.relpath(path, root)).parent
        dataset = sv.DetectionDataset(names, [path], {path: found})
        with contextlib.suppress(ValueError):  # the image cannot be read: it has no labels
            dataset.as_yolo(annotations_directory_path=str(labels))
