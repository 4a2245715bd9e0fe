"""Which classes may be trained with masks: the field's splits, and how users name their own."""

import difflib
import json
import os
from collections.abc import Mapping, Sequence

from .errors import InputError

__all__ = [
    "AUTO",
    "NONVOC_CLASSES",
    "VOC_CLASSES",
    "choose_seen_classes",
    "match_classes",
    "resolve_seen_classes",
]

# COCO's names of the 20 PASCAL VOC classes; VOC itself says aeroplane, motorbike, sofa,
# pottedplant, diningtable and tvmonitor.
# fmt: off
VOC_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat",
    "dog", "horse", "sheep", "cow", "bottle", "chair", "couch", "potted plant", "dining table",
    "tv",
)
# The other 60 of COCO's 80 classes.
NONVOC_CLASSES = (
    "truck", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana",
    "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
    "bed", "toilet", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on

# The spec that the training data have to answer, see data/datasets.py.
AUTO = "auto"

_NAMED_SPLITS = {"voc": VOC_CLASSES, "nonvoc": NONVOC_CLASSES}


def resolve_seen_classes(spec: str, thing_classes: Sequence[str]) -> list[int]:
    """
    Turn a description of the seen classes into contiguous class ids.

    Seen classes ("base" in few-shot work) are those whose masks training may use; for every other
    class of the dataset only the boxes are used.

    Args:
        spec: one of

            * ``"voc"`` / ``"nonvoc"``: the halves of COCO's 80 classes; the dataset has no others.
            * ``"all"``: every class (the fully supervised oracle); ``"none"``: boxes alone.
            * names separated by commas, e.g. ``"cat, hair drier"``; after a comma, ``", all"``
              is a class, too.
            * a path to a ``.json`` file with a list of names, or to a text file with one name a
              line (``#`` starts a comment).
            * a json list after a comma, for names that contain commas: ``', ["cat, big", "dog"]'``
              (without the comma before it a config would read it as a list).
        thing_classes: the dataset's class names; the position is the contiguous id.

    Returns:
        The contiguous ids of the seen classes, sorted, each once.

    Raises:
        InputError: no name, one that the dataset lacks, or a file of another form.
    """
    spec, problem = spec.strip(), f"DATASETS.SEEN_CLASSES is {spec!r}"
    if spec == AUTO:
        raise InputError(
            f"{problem}, which only the training annotations can answer: use the config.yaml that "
            f"train_net.py writes to OUTPUT_DIR. A class of this name is meant by ', {AUTO}'."
        )
    if spec in ("all", "none"):
        return list(range(len(thing_classes))) if spec == "all" else []
    if spec in _NAMED_SPLITS:
        foreign = [name for name in thing_classes if name not in VOC_CLASSES + NONVOC_CLASSES]
        if foreign:
            raise InputError(
                f"{problem}, a split of COCO's 80 classes, but the dataset has others: "
                f"{foreign[:5]}. Name its seen classes instead, separated by commas."
            )
        return [i for i, name in enumerate(thing_classes) if name in _NAMED_SPLITS[spec]]
    names = _read_names(spec)
    if not names:
        raise InputError(
            f"{problem}, which names no class. Allowed: 'voc', 'nonvoc', 'all', 'none', names "
            "separated by commas, or a path to a text or json list."
        )
    return sorted(
        set(_find_names(names, thing_classes, f"{problem}, but the dataset has no class"))
    )


def match_classes(names: Sequence[str], model_classes: Sequence[str], source: str) -> list[int]:
    """
    Find the classes of a dataset among those of a model, by their names.

    Args:
        names: of the dataset; any part of the model's, in any order.
        model_classes: by the contiguous ids that the model predicts.
        source: what has these names, for the message.

    Returns:
        The model's id of each name.

    Raises:
        InputError: names that the model does not know.
    """
    problem = f"The model does not know all classes of {source}:"
    return _find_names(names, model_classes, problem)


def _find_names(names: Sequence[str], known: Sequence[str], problem: str) -> list[int]:
    ids = {name: i for i, name in enumerate(known)}
    hints = []
    for name in names:
        if name not in ids:
            near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
            hints.append(f"{name!r} (nearest: {', '.join(near)})" if near else repr(name))
    if hints:
        raise InputError(
            f"{problem} {', '.join(hints)}. Its {len(known)} classes: {', '.join(known[:100])}."
        )
    return [ids[name] for name in names]


def choose_seen_classes(num_masks: Mapping[str, int], min_masks: int) -> list[str]:
    """
    Choose the seen classes of "auto": those with enough human masks.

    Args:
        num_masks: {class name: number of human masks}.
        min_masks: masks that a class needs, ``DATASETS.MIN_MASKS_PER_CLASS``.

    Returns:
        Their names, in the order of ``num_masks``.

    Raises:
        InputError: no class has so many.
    """
    seen = [name for name, num in num_masks.items() if num >= min_masks]
    if not seen:
        most = sorted(num_masks, key=lambda name: (-num_masks[name], name))[:5]
        raise InputError(
            f"DATASETS.SEEN_CLASSES is {AUTO!r}, but no class has DATASETS.MIN_MASKS_PER_CLASS "
            f"{min_masks} masks (crowds and masks of a model do not count). The most masks: "
            f"{', '.join(f'{name} {num_masks[name]}' for name in most)}."
        )
    return seen


def _read_names(spec: str) -> list[str]:
    text = spec.lstrip(", ")
    if os.path.isfile(spec):
        with open(spec, encoding="utf-8-sig") as file:
            text = file.read()
        if not spec.endswith(".json"):
            lines = (line.split("#")[0].strip() for line in text.splitlines())
            return [line for line in lines if line]
    elif spec.endswith((".txt", ".json")):
        raise InputError(f"DATASETS.SEEN_CLASSES names a file that does not exist: {spec!r}.")
    elif not text.startswith("["):
        return [name.strip() for name in spec.split(",") if name.strip()]
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"The list of seen classes {spec!r} must be a json list of class names, "
            f'such as ["cat", "dog"]; it holds {text[:80]}.'
        )
    return names
