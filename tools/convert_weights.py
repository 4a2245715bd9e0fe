#!/usr/bin/env python
"""Turn pickled weights into a checkpoint of tensors that is safe to read. See --help."""

from __future__ import annotations

import argparse
import pickle  # nosec B403  # Reading pickles is what this program is for; it says so.
import sys
from pathlib import Path

import numpy as np
import torch

DESCRIPTION = """
Reads a pickle (.pkl) or a checkpoint that PyTorch refuses (.pth), and writes its tensors as a .pth
that train_net.py and tools/ read without MODEL.TRUST_PICKLED_WEIGHTS.

READING THE INPUT CAN RUN ANY CODE that whoever made it wrote into it. Convert what you trust, or
do it where it can do no harm: in a container without a network and without your files.

The result gives the same model: Detectron2's matching by names, and its conversion of Caffe2's
weights, stay as they are. An optimizer's state and whatever else stands beside the model is left
out, and named.
"""

EXAMPLES = """
examples:
  %(prog)s --input R-50-custom.pkl --output R-50-custom.pth

exit code: 0, or 2 if there are no tensors in the input.
"""

# What Detectron2's checkpointer looks at beside the model.
KEPT = ("__author__", "matching_heuristics")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what would be right."""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help=".pkl or .pth")
    add("--output", type=Path, required=True, metavar="PTH", help="a new file")
    return parser, parser.parse_args(argv)


def read(path: Path) -> dict:
    """
    Read weights as Detectron2 does; this can run any code that the file holds.

    Returns:
        {"model": weights by name, ...}
    """
    try:
        if path.suffix != ".pkl":
            data = torch.load(
                path, map_location="cpu", weights_only=False
            )  # nosec B614  # As above.
            return data if isinstance(data, dict) and "model" in data else {"model": data}
        with open(path, "rb") as file:
            data = pickle.load(file, encoding="latin1")  # nosec B301  # As above.
    # A broken pickle raises errors of many types.
    except Exception as error:
        raise UsageError(f"--input {path}: {type(error).__name__}: {error}") from error
    if isinstance(data, dict) and {"model", "__author__"} <= set(data):
        return data
    # Weights of Caffe2: models of detectors have them below "blobs", those of ImageNet have not.
    weights = data.get("blobs", data) if isinstance(data, dict) else data
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def tensors_of(weights: object, path: Path) -> dict[str, torch.Tensor]:
    """
    Numpy arrays and tensors by name, as tensors; momenta of Caffe2 are left out.

    Raises:
        UsageError: there is something else.
    """
    if not isinstance(weights, dict) or not weights:
        raise UsageError(f"--input {path} holds no dictionary of tensors.")
    tensors = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, (np.ndarray, torch.Tensor)):
            raise UsageError(
                f"--input {path}: {name!r} is a {type(value).__name__}, neither a tensor nor an "
                "array; nothing was written."
            )
        if name.endswith("_momentum"):
            continue
        try:
            tensors[name] = torch.as_tensor(value).detach().clone()
        except TypeError as error:
            raise UsageError(f"--input {path}: {name!r}: {error}") from error
    return tensors


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    try:
        if not args.input.is_file():
            raise UsageError(f"--input {args.input}: no such file.")
        if args.output.suffix != ".pth" or args.output.exists():
            raise UsageError(f"--output {args.output}: give the name of a new file, NAME.pth.")
        data = read(args.input)
        tensors = tensors_of(data.pop("model"), args.input)
        kept = {key: data[key] for key in KEPT if isinstance(data.get(key), (bool, str))}
        try:
            torch.save({"model": tensors, **kept}, args.output)
        except (OSError, RuntimeError) as error:
            args.output.unlink(missing_ok=True)
            raise UsageError(f"--output {args.output}: {error}") from error
    except UsageError as error:
        parser.error(str(error))
    left_out = ", ".join(sorted(str(key) for key in set(data) - set(kept)))
    print(f"Wrote {len(tensors)} tensors: {args.output}. Left out: {left_out or 'nothing'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
