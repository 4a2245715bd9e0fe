"""
Weights that may come from anybody: what could run code is refused before it is read.

Detectron2 unpickles files that end in ".pkl", and a pickle can run any code. It reads all other
files with ``torch.load``, which since PyTorch 2.6 takes tensors and plain values alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle  # nosec B403  # Its exception alone is used.
import re
from collections.abc import Iterator
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from fvcore.common.checkpoint import Checkpointer

__all__ = ["check_pickled_files", "check_weights", "safe_loading", "weights_to_load"]

# Detectron2's own: its model zoo, and the names that it has built in for Detectron's.
_TRUSTED_PREFIXES = (
    "detectron2://",
    "catalog://",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://dl.fbaipublicfiles.com/detectron/",
)
_OPT_IN = "if you trust who made it, add MODEL.TRUST_PICKLED_WEIGHTS True to the command line"
_ANY_CODE = "a pickle can run any code when it is read"


def check_weights(weights: str, trust_pickled: bool = False) -> None:
    """
    Refuse weights that Detectron2 would read in a way that can run code.

    Nothing is opened or downloaded here.

    Args:
        weights: path or URL, as of ``MODEL.WEIGHTS``; "" is no weights.
        trust_pickled: ``MODEL.TRUST_PICKLED_WEIGHTS``: pickles of any origin are allowed.

    Raises:
        ValueError: a ".pkl" that is not Detectron2's own, a URL with "..", or a PyTorch that would
            unpickle everything.
    """
    if not weights:
        return
    url = urlparse(weights)
    # Downloads are kept below a folder of caches, under the path of their URL.
    if "://" in weights and ".." in f"{url.netloc}{url.path}".split("/"):
        raise ValueError(
            f"The weights {weights!r} were refused: a URL with '..' could name a file outside of "
            "the folder of downloads. Give the URL without it."
        )
    if trust_pickled:
        return
    if _is_unpickled(weights):
        if not weights.startswith(_TRUSTED_PREFIXES):
            raise ValueError(
                f"The weights {weights!r} were refused: {_ANY_CODE}, and only Detectron2's own "
                "(detectron2://..., https://dl.fbaipublicfiles.com/detectron2/...) are trusted. "
                f"Either, {_OPT_IN}; or convert it once, where it can do no harm: python "
                "tools/convert_weights.py --input FILE.pkl --output FILE.pth."
            )
        return
    reason = _why_torch_unpickles()
    if reason:
        raise ValueError(f"The weights {weights!r} were refused: {reason}; or, {_OPT_IN}.")


def check_pickled_files(cfg: CfgNode) -> None:
    """
    Check everything that a config would have unpickled: weights and precomputed proposals.

    Args:
        cfg: with this project's keys; not changed.

    Raises:
        ValueError: see :func:`check_weights`; or there are proposals without
            ``MODEL.TRUST_PICKLED_WEIGHTS``.
    """
    trusts = cfg.MODEL.TRUST_PICKLED_WEIGHTS
    check_weights(cfg.MODEL.WEIGHTS, trusts)
    if cfg.MODEL.LOAD_PROPOSALS and not trusts:
        files = (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST)
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS is True, and the proposals {', '.join(files) or '()'} are "
            f"pickles: {_ANY_CODE}. Set MODEL.LOAD_PROPOSALS False; or, {_OPT_IN}."
        )


def weights_to_load(checkpointer: Checkpointer, weights: str, resume: bool) -> str:
    """
    What ``checkpointer.resume_or_load(weights, resume=resume)`` will read.

    Args:
        checkpointer: of the output folder.
        weights: ``MODEL.WEIGHTS``.
        resume: whether the last checkpoint of the output folder wins.
    """
    if resume and checkpointer.has_checkpoint():
        return checkpointer.get_checkpoint_file()
    return weights


@contextlib.contextmanager
def safe_loading(weights: str, trust_pickled: bool = False) -> Iterator[None]:
    """
    Around the code that reads weights: check them before, and say what was refused.

    Args:
        weights, trust_pickled: as of :func:`check_weights`.

    Raises:
        ValueError: as of :func:`check_weights`; or the file holds more than tensors and plain
            values, none of which was made or run.
    """
    check_weights(weights, trust_pickled)
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise ValueError(_refusal(weights, str(error))) from error


def _refusal(weights: str, message: str) -> str:
    # PyTorch's own message advises to switch the check off.
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if not found:
        return (
            f"The weights {weights} cannot be read as a checkpoint: they are no file that "
            "torch.save wrote as a dictionary of tensors. Nothing of them was run."
        )
    return (
        f"The weights {weights} were refused and nothing of them was run: they ask for "
        f"{found.group(1)}, but a checkpoint should hold tensors and plain values alone, for "
        f"{_ANY_CODE}. If you trust who made it, keep its tensors: python tools/convert_weights.py "
        "--input FILE.pth --output NEW.pth."
    )


def _is_unpickled(weights: str) -> bool:
    """Whether any release of Detectron2 would unpickle it: some drop the query, all the path's."""
    url = urlparse(weights)
    names = (weights, url._replace(query="").geturl(), url.path)
    return any(name.endswith(".pkl") for name in names)


def _why_torch_unpickles() -> str:
    if torch.__version__ < (2, 6):
        return f"PyTorch {torch.__version__} would unpickle them, and {_ANY_CODE}; install 2.6"
    variable = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(variable, "0").lower() in ("1", "y", "yes", "true"):
        return f"the environment variable {variable} has them unpickled, and {_ANY_CODE}; unset it"
    return ""
