"""
Training data in an order that depends on nothing but the seed, the rank and the iteration.

Order and augmentation are functions of the position in the stream, so ``--resume`` goes on with
the images, and the flips, that an uninterrupted training would have seen next; Detectron2's loader
starts its order anew, with random numbers that depend on the number of workers.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_batch_data_loader, get_detection_dataset_dicts
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import InputError

__all__ = ["TrainStream", "build_train_loader", "resumable_batches", "seed_generators"]

logger = logging.getLogger(__name__)


def seed_generators(
    key: tuple[int, ...], purpose: int, seed_torch: Callable[[int], object] = torch.manual_seed
) -> None:
    """
    Seed the global generators of Python, numpy and PyTorch.

    Args:
        key: numbers of 0 or more, such as (SEED, rank, iteration). Every key gives other streams.
        purpose: 0 or more; keeps users with the same key apart.
        seed_torch: takes the seed for PyTorch, a number of 63 bits.
    """
    words = np.random.SeedSequence(key, spawn_key=(purpose,)).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    seed_torch(int(words[3] >> np.uint64(1)))


@contextmanager
def _preserved_generators() -> Iterator[None]:
    # Those of Python, numpy and PyTorch's CPU.
    state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class TrainStream(IterableDataset):
    """
    The endless stream of one rank's mapped examples, which numbers its positions from 0.

    The example at a position is the same whichever worker of a DataLoader makes it and wherever
    the stream starts: with the waiting positions, then from ``num_taken`` on.
    """

    def __init__(
        self,
        dataset_dicts: list[dict],
        sampler: Iterable[int],
        mapper: Callable[[dict], dict],
        *,
        seed: int,
        batch_size: int,
        aspect_ratio_grouping: bool,
    ):
        """
        Args:
            dataset_dicts: images in Detectron2's standard dataset format.
            sampler: gives indices of ``dataset_dicts`` without end, each time the same.
            mapper: makes an example of a dataset dict.
            seed: 0 or more.
            batch_size: images of a batch of this rank.
            aspect_ratio_grouping: whether the batches are made of images of like aspect ratio.
        """
        self.sampler, self.mapper = sampler, mapper
        self.seed, self.rank, self.batch_size = seed, comm.get_rank(), batch_size
        self.sizes = None
        if aspect_ratio_grouping:
            self.sizes = np.array([(x["width"], x["height"]) for x in dataset_dicts])
        self.dataset = DatasetFromList(dataset_dicts, copy=False)
        self.num_taken = 0
        # Positions below num_taken in no batch yet: they wait for another of their aspect ratio.
        self.waiting: set[int] = set()

    def after(self, num_batches: int) -> TrainStream:
        """Return what is left of the stream once ``num_batches`` batches were made of it."""
        rest = copy.copy(self)
        rest.num_taken, rest.waiting = num_batches * self.batch_size, set()
        if self.sizes is None:
            return rest

        def stubs() -> Iterator[dict]:
            # Detectron2's own grouping decides, on sizes alone: no image is read.
            for position, index in enumerate(self.sampler):
                rest.num_taken = position + 1
                rest.waiting.add(position)
                width, height = self.sizes[index]
                yield {"width": width, "height": height, "position": position}

        for batch in islice(AspectRatioGroupedDataset(stubs(), self.batch_size), num_batches):
            rest.waiting.difference_update(stub["position"] for stub in batch)
        return rest

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        # DataLoader asks its workers in turn: for one example when Detectron2 groups them
        # afterwards, otherwise for a batch.
        chunk_size = self.batch_size if self.sizes is None else 1
        remaining = (
            x for x in enumerate(self.sampler) if x[0] >= self.num_taken or x[0] in self.waiting
        )
        for i, (position, index) in enumerate(remaining):
            if worker is not None and i // chunk_size % worker.num_workers != worker.id:
                continue
            # In the training process itself, NUM_WORKERS 0, training has its own random numbers.
            with _preserved_generators():
                key = (self.seed, self.rank, position)
                # Not 1: training itself seeds by iteration.
                seed_generators(key, 0, torch.default_generator.manual_seed)
                example = self.mapper(self.dataset[index])
            yield example


def resumable_batches(
    stream: TrainStream, make_batches: Callable[[TrainStream], Iterable[list[dict]]]
) -> Iterator[list[dict]]:
    """
    Generate batches from the iteration on that the trainer starts with.

    ``iter()`` alone does nothing, as Detectron2 0.6 calls it before the checkpoint is loaded; the
    first ``next()`` asks the trainer's event storage for the iteration. Without one it is 0.

    Args:
        stream: of the whole training.
        make_batches: makes batches of what is left of it.
    """
    try:
        iteration = get_event_storage().iter
    except AssertionError:  # Detectron2's answer where no training runs
        iteration = 0
    rest = stream.after(iteration)
    if iteration > 0:
        logger.info(f"The data goes on after iteration {iteration - 1}, image {rest.num_taken}.")
    # A DataLoader that starts draws a number from PyTorch's generator, which a training that was
    # not interrupted would not have done here.
    with _preserved_generators():
        batches = iter(make_batches(rest))
        first = next(batches)
    yield first
    yield from batches


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> Iterator[list[dict]]:
    """
    Build the loader of a training with a seed; reads the keys that Detectron2's own reads.

    Args:
        cfg: with SEED of 0 or more.
        mapper: makes an example of a dataset dict.

    Returns:
        An iterator without end over batches, lists of IMS_PER_BATCH / world size examples.

    Raises:
        InputError: a sampler that is not known here.
    """
    name, grouping = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.ASPECT_RATIO_GROUPING
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(dicts), seed=cfg.SEED)
    elif name == "RepeatFactorTrainingSampler":
        # The key REPEAT_SQRT is younger than Detectron2 0.6.
        has_sqrt = "REPEAT_SQRT" in cfg.DATALOADER
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts,
            cfg.DATALOADER.REPEAT_THRESHOLD,
            **({"sqrt": cfg.DATALOADER.REPEAT_SQRT} if has_sqrt else {}),
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    else:
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN {name!r} is not known with a SEED; allowed: "
            "TrainingSampler, RepeatFactorTrainingSampler."
        )
    stream = TrainStream(
        dicts,
        sampler,
        mapper,
        seed=cfg.SEED,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        aspect_ratio_grouping=grouping,
    )
    make_batches = partial(
        build_batch_data_loader,
        sampler=None,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=grouping,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return resumable_batches(stream, make_batches)
