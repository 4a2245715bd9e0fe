"""The folder of a training: which files make it a model, and how they get there."""

import json
import os
from pathlib import Path

from .coco_json import open_atomically
from .errors import InputError

__all__ = [
    "as_value",
    "check_is_new",
    "find_model",
    "find_moved",
    "last_checkpoint",
    "read_class_names",
    "write_class_names",
]


def as_value(path: str | os.PathLike) -> str:
    """The path as a value of a config, to which "2024" would be a number; "" stays as it is."""
    return os.path.join(".", path) if os.fspath(path) else ""


def find_model(model: str | os.PathLike) -> tuple[str, str | None]:
    """
    The config and the weights of a model.

    Args:
        model: folder that a training, or ``tsmask export`` in the format "plain", has written. Its
            weights are model_best.pth, else model_final.pth, else the last checkpoint, else the
            export's model.pth. A yaml stands for itself, with the weights that it names.

    Returns:
        The paths of both; None for the weights of a yaml.

    Raises:
        InputError: there is no such folder, or it lacks config or weights.
    """
    path = Path(model)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return str(path), None
    names = ["model_best.pth", "model_final.pth", os.path.basename(last_checkpoint(path))]
    names = [x for x in (*names, "model.pth") if x]
    weights = [path / x for x in names if (path / x).is_file()]
    if not path.is_dir():
        problem = "is not a folder"
    elif not (path / "config.yaml").is_file():
        problem = "has no config.yaml"
    elif not weights:
        problem = f"has config.yaml, but none of {', '.join(names)}"
    else:
        return str(path / "config.yaml"), str(weights[0])
    raise InputError(
        f"{model} {problem}. The folder of a training holds config.yaml and model_final.pth, or, "
        "until it ends, a checkpoint and last_checkpoint with its name. For other files give "
        "--config-file and --weights."
    )


def find_moved(json_file: str, config_file: str | os.PathLike) -> str:
    """
    Where a json is that the config of a run names.

    Those that ``tsmask train DATA`` has written, to the folder ``data`` beside the config, move
    with it.
    """
    moved = Path(config_file).parent / "data" / Path(json_file).name
    is_moved = not os.path.exists(json_file) and moved.is_file()
    return str(moved) if is_moved else json_file


def last_checkpoint(folder: str | os.PathLike) -> str:
    """Path of the checkpoint that a training has written last, "" before the first."""
    path = Path(folder, "last_checkpoint")
    return str(path.with_name(path.read_text().strip())) if path.is_file() else ""


def check_is_new(folder: str) -> None:
    """Raise an InputError if a training has written its config or a checkpoint to ``folder``."""
    found = [x for x in ("config.yaml", "last_checkpoint") if Path(folder, x).exists()]
    if found:
        raise InputError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(found)}), which training would "
            "overwrite. Name another folder, or go on with that run by --resume."
        )


def write_class_names(folder: str | os.PathLike, names: list[str], ids: list[int]) -> None:
    """Write names and category ids of a model's classes, by contiguous id, if they have names."""
    if names:
        categories = [{"id": i, "name": name} for name, i in zip(names, ids)]
        with open_atomically(Path(folder, "categories.json")) as file:
            file.write(json.dumps(categories, indent=1) + "\n")


def read_class_names(folder: str | os.PathLike) -> tuple[list[str], list[int]] | None:
    """
    Names and the dataset's category ids, by contiguous id, that a training or an export has written
    into a folder; None where no file tells them.

    Raises:
        InputError: the file cannot be read.
    """
    for path in (Path(folder, x) for x in ("categories.json", "classes.json")):
        if path.is_file():
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))
                if path.name == "classes.json":  # of an export: names alone
                    rows = [{"id": i, "name": str(name)} for i, name in enumerate(rows)]
                return [x["name"] for x in rows], [x["id"] for x in rows]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"The classes in {path} cannot be read: {error!r}.") from error
    return None
