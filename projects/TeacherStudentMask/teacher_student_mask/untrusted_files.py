"""Files that may come from anybody: nothing in them runs. Configs are values, weights tensors."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle  # nosec B403  # Only its exception is used.
import re
from collections.abc import Iterator
from urllib.parse import urlparse

import yaml
from detectron2.config import CfgNode

from .errors import InputError

__all__ = ["check_pickles", "merge_config_file", "safe_loading"]

logger = logging.getLogger(__name__)

# Pickles that are Detectron2's own: its model zoo, and the built-in names of Detectron's.
_TRUSTED_PREFIXES = (
    "detectron2://",
    "catalog://",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://dl.fbaipublicfiles.com/detectron/",
)
_OPT_IN = "if you trust who made it, add MODEL.TRUST_PICKLED_WEIGHTS True to the command line"
_ANY_CODE = "a pickle can run any code when it is read"


class _PlainConfig(CfgNode):
    """A config whose bases are files on this machine, without tags of Python."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if filename.startswith(("http://", "https://")):
            raise InputError(
                f"_BASE_ is {filename}; a base must be a file on this machine, because a download "
                "would be kept under a name that other downloads trust. Save it beside the config."
            )
        return super().load_yaml_with_base(filename, allow_unsafe=False)


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """
    Merge a yaml file and its bases into ``cfg``, by Detectron2's rules but for three.

    - A tag of Python, such as ``!!python/object/apply``, which would run code, is an error.
      ``CfgNode.merge_from_file`` by itself falls back to ``yaml.unsafe_load``.
    - ``_BASE_`` names no URL.
    - ``MODEL.TRUST_PICKLED_WEIGHTS`` of a file is ignored, with a warning: whoever wrote the file
      may have written the pickle, too. It is taken from the command line alone.

    Args:
        cfg: changed in place.
        path: of a yaml file.

    Raises:
        InputError: the file or one of its bases cannot be read, has an unknown key, or a value of
            another type than the key.
    """
    trusts = cfg.MODEL.TRUST_PICKLED_WEIGHTS
    try:
        if not isinstance(_PlainConfig.load_yaml_with_base(path), dict):
            raise InputError(f"The config {path} does not hold keys and values.")
        cfg.merge_from_file(path, allow_unsafe=False)
    except InputError:
        raise
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark is not None else path
        if isinstance(error, yaml.constructor.ConstructorError) and "tag:yaml" in str(problem):
            raise InputError(
                f"The config {path} was refused and nothing of it was run: {where}: {problem}. "
                "Configs hold plain values; tags of Python could run any code. Write the value "
                "itself."
            ) from error
        raise InputError(f"The config {path} cannot be read: {where}: {problem}.") from error
    except RecursionError as error:
        raise InputError(f"The config {path}: its _BASE_ leads back to itself.") from error
    # A TypeError is what an empty base or file ends in.
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"The config {path} cannot be read: {error}") from error
    if cfg.MODEL.TRUST_PICKLED_WEIGHTS and not trusts:
        cfg.MODEL.TRUST_PICKLED_WEIGHTS = False
        logger.warning(
            f"MODEL.TRUST_PICKLED_WEIGHTS of {path} is ignored; it counts on the command line "
            "alone, because a config may come from whoever made the pickle."
        )


def check_pickles(cfg: CfgNode) -> None:
    """
    Refuse what would be unpickled: untrusted weights, and precomputed proposals.

    Nothing is opened or downloaded here.

    Raises:
        InputError: see there; ``MODEL.TRUST_PICKLED_WEIGHTS`` allows them.
    """
    trusts = cfg.MODEL.TRUST_PICKLED_WEIGHTS
    _check_source(cfg.MODEL.WEIGHTS, trusts)
    if cfg.MODEL.LOAD_PROPOSALS and not trusts:
        files = (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST)
        raise InputError(
            f"MODEL.LOAD_PROPOSALS is True, and the proposals {', '.join(files) or '()'} are "
            f"pickles: {_ANY_CODE}. Set MODEL.LOAD_PROPOSALS False; or, {_OPT_IN}."
        )


@contextlib.contextmanager
def safe_loading(weights: str, trust_pickled: bool = False) -> Iterator[None]:
    """
    Around the code that lets Detectron2 read weights: check them before, explain what it refuses.

    Detectron2 unpickles files that end in ".pkl". It reads all others with ``torch.load``, which
    since PyTorch 2.6 takes tensors and plain values alone.

    Args:
        weights: path or URL; "" = none.
        trust_pickled: ``MODEL.TRUST_PICKLED_WEIGHTS``: pickles of any origin are allowed.

    Raises:
        InputError: there is no such file, it could run code, or it cannot be read.
    """
    _check_source(weights, trust_pickled)
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise InputError(
            f"The weights {weights} do not exist; give the checkpoint of a trained model, such as "
            "the model_final.pth in the OUTPUT_DIR of train_net.py."
        )
    try:
        yield
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        # PyTorch's own message advises to switch the check off.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise InputError(
                f"The weights {weights} were refused and nothing of them was run: they ask for "
                f"{found.group(1)}, but a checkpoint should hold tensors and plain values alone, "
                f"for {_ANY_CODE}."
            ) from error
        is_of_torch = any(x in str(error) for x in ("weights_only", "PytorchStreamReader", "magic"))
        if isinstance(error, RuntimeError) and not is_of_torch:
            raise
        raise InputError(
            f"The weights {weights} cannot be read as a checkpoint: they are damaged, or no file "
            "that torch.save wrote as a dictionary of tensors. Nothing of them was run."
        ) from error


def _check_source(weights: str, trust_pickled: bool) -> None:
    url = urlparse(weights)
    # Downloads are kept below a folder of caches, under the path of their URL.
    if "://" in weights and ".." in f"{url.netloc}{url.path}".split("/"):
        raise InputError(
            f"The weights {weights!r} were refused: a URL with '..' could name a file outside of "
            "the folder of downloads. Give the URL without it."
        )
    if trust_pickled or not weights:
        return
    # Releases of Detectron2 differ in what they drop before they look at the suffix.
    names = (weights, url._replace(query="").geturl(), url.path)
    if any(name.endswith(".pkl") for name in names):
        if not weights.startswith(_TRUSTED_PREFIXES):
            raise InputError(
                f"The weights {weights!r} were refused: {_ANY_CODE}, and only Detectron2's own "
                "(detectron2://..., https://dl.fbaipublicfiles.com/detectron2/...) are trusted; "
                f"{_OPT_IN}."
            )
    elif os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() not in ("", "0", "n"):
        raise InputError(
            f"The weights {weights!r} were refused: the environment variable "
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has them unpickled, and "
            f"{_ANY_CODE}; unset it; or, {_OPT_IN}."
        )
