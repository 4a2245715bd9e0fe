"""Reading config files that may come from anybody: nothing in them runs."""

from __future__ import annotations

import logging

import yaml
from detectron2.config import CfgNode

__all__ = ["merge_config_file"]

logger = logging.getLogger(__name__)

# "_BASE_" is opened with these; other schemes are taken for paths.
_REMOTE = ("http://", "https://")


class _PlainConfig(CfgNode):
    """A config whose bases are files on this machine, without tags of Python."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if filename.startswith(_REMOTE):
            raise ValueError(
                f"_BASE_ is {filename}; a base must be a file on this machine, because a download "
                "would be kept under a name that other downloads trust. Save it beside the config."
            )
        return super().load_yaml_with_base(filename, allow_unsafe=False)


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """
    Merge a yaml file and its bases into ``cfg``, with Detectron2's rules but for three.

    - A tag of Python, such as ``!!python/object/apply``, which would run code, is an error.
      ``CfgNode.merge_from_file`` by itself falls back to ``yaml.unsafe_load``.
    - ``_BASE_`` names no URL.
    - ``MODEL.TRUST_PICKLED_WEIGHTS`` of a file is ignored, with a warning: whoever wrote the file
      may have written the pickle, too. It is taken from the command line alone.

    Args:
        cfg: changed in place.
        path: of a yaml file.

    Raises:
        ValueError: the file or one of its bases cannot be read or is no plain yaml of keys, or has
            a value of another type than the key.
        AssertionError, KeyError: Detectron2's, for its VERSION and for unknown keys.
    """
    try:
        _check_files(path)
        is_trusting = cfg.MODEL.TRUST_PICKLED_WEIGHTS
        cfg.merge_from_file(path, allow_unsafe=False)
    except yaml.YAMLError as error:
        raise ValueError(_yaml_message(path, error)) from error
    except OSError as error:
        raise ValueError(f"The config {path} cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"The config {path} cannot be read: its _BASE_ leads back to itself, or it is nested "
            "too deeply."
        ) from error
    if cfg.MODEL.TRUST_PICKLED_WEIGHTS and not is_trusting:
        cfg.MODEL.TRUST_PICKLED_WEIGHTS = False
        logger.warning(
            f"MODEL.TRUST_PICKLED_WEIGHTS of {path} is ignored; it counts on the command line "
            "alone, because a config may come from whoever made the pickle."
        )


def _check_files(path: str) -> None:
    """Read the file and its bases, without a change to any config."""
    try:
        content = _PlainConfig.load_yaml_with_base(path)
    except TypeError:
        # An empty yaml is None, in which Detectron2 looks for "_BASE_".
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"The config {path}, or one of its bases, is empty or no yaml of keys and values."
        )


def _yaml_message(path: str, error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark is not None else path
    if isinstance(error, yaml.constructor.ConstructorError) and "tag:yaml.org" in str(problem):
        return (
            f"The config {path} was refused and nothing of it was run: {where}: {problem}. Configs "
            "hold plain values; tags of Python could run any code. Write the value itself."
        )
    return f"The config {path} cannot be read: {where}: {problem or error}."
