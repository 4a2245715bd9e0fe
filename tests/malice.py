"""Files that would make a file if they were read carelessly."""

import os
import pickle

import torch


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.mkdir, (self.trace,))


def write_checkpoint(path, trace, **options):
    """A checkpoint of PyTorch; reading it with ``weights_only=False`` makes the folder trace."""
    torch.save({"model": {"a": torch.ones(1), "b": Malice(trace)}}, path, **options)


def write_pickle(path, trace, protocol=2):
    """A pickle; reading it makes the folder trace."""
    with open(path, "wb") as file:
        pickle.dump({"model": Malice(trace), "__author__": "nobody"}, file, protocol=protocol)


def yaml_of(trace):
    """A value of a yaml; reading it with ``yaml.unsafe_load`` makes the folder trace."""
    return f'!!python/object/apply:os.mkdir ["{trace}"]'
