"""
Training data in an order that depends on nothing but the seed, the rank and the iteration.

Detectron2's loader starts its order anew when a training goes on after an interruption, and the
random numbers of its augmentation depend on the number of workers. Here both are functions of
the position in the stream, so that ``--resume`` goes on with the images, and the flips, that an
uninterrupted training would have seen next.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_batch_data_loader, get_detection_dataset_dicts
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import InputError

__all__ = [
    "ResumableTrainLoader",
    "TrainStream",
    "build_train_loader",
    "preserved_generators",
    "seed_generators",
]

logger = logging.getLogger(__name__)

_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")

# For seed_generators: training itself seeds by iteration, under another number.
_PURPOSE = 0


def seed_generators(
    key: tuple[int, ...], purpose: int, seed_torch: Callable[[int], object] = torch.manual_seed
) -> None:
    """
    Seed the global generators of Python, numpy and PyTorch.

    Args:
        key: numbers of 0 or more, such as (SEED, rank, iteration). Every key gives other streams,
            which neither overlap nor resemble one another.
        purpose: 0 or more; keeps users with the same key apart.
        seed_torch: takes the seed for PyTorch, a number of 63 bits.
    """
    words = np.random.SeedSequence(key, spawn_key=(purpose,)).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    seed_torch(int(words[3] >> np.uint64(1)))


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Afterwards the generators of Python, numpy and PyTorch's CPU are as they were before."""
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
        self.sampler = sampler
        self.mapper = mapper
        self.seed = seed
        self.rank = comm.get_rank()
        self.batch_size = batch_size
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
        if self.sizes is None:
            rest.num_taken = num_batches * self.batch_size
            return rest
        rest.waiting = set()

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
            if worker is None or i // chunk_size % worker.num_workers == worker.id:
                yield self._example(position, index)

    def _example(self, position: int, index: int) -> dict:
        # In the training process itself, NUM_WORKERS 0, training has its own random numbers.
        in_training = get_worker_info() is None
        with preserved_generators() if in_training else nullcontext():
            seed_generators(
                (self.seed, self.rank, position), _PURPOSE, torch.default_generator.manual_seed
            )
            return self.mapper(self.dataset[index])


class ResumableTrainLoader:
    """
    Batches from the iteration on that the trainer starts with.

    ``iter()`` alone does nothing, as Detectron2 0.6 calls it before the checkpoint is loaded; the
    first ``next()`` asks the trainer's event storage for the iteration. Without one it is 0.
    """

    def __init__(
        self, stream: TrainStream, make_batches: Callable[[TrainStream], Iterable[list[dict]]]
    ):
        """
        Args:
            stream: of the whole training.
            make_batches: makes batches of what is left of it.
        """
        self.stream = stream
        self.make_batches = make_batches

    def __iter__(self) -> Iterator[list[dict]]:
        try:
            iteration = get_event_storage().iter
        except AssertionError:  # Detectron2's answer where no training runs
            iteration = 0
        stream = self.stream.after(iteration)
        if iteration > 0:
            logger.info(
                f"The data goes on where iteration {iteration - 1} left it: this rank has taken "
                f"{stream.num_taken} images, of which {len(stream.waiting)} wait for "
                "another of their aspect ratio."
            )
        # A DataLoader that starts draws a number from PyTorch's generator, which a training that
        # was not interrupted would not have done here.
        with preserved_generators():
            batches = iter(self.make_batches(stream))
            first = next(batches)
        yield first
        yield from batches


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> ResumableTrainLoader:
    """
    Build the loader of a training with a seed; reads the keys that Detectron2's own reads.

    Args:
        cfg: with SEED of 0 or more.
        mapper: makes an example of a dataset dict.

    Returns:
        An iterable without end over batches, lists of IMS_PER_BATCH / world size examples.

    Raises:
        InputError: no seed, or a sampler that is not known here.
    """
    if cfg.SEED < 0:
        raise InputError(f"SEED must be 0 or more for data in a fixed order, got {cfg.SEED}.")
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    grouping = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    stream = TrainStream(
        dicts,
        _build_sampler(cfg, dicts),
        mapper,
        seed=cfg.SEED,
        batch_size=batch_size // comm.get_world_size(),
        aspect_ratio_grouping=grouping,
    )
    make_batches = partial(
        build_batch_data_loader,
        sampler=None,
        total_batch_size=batch_size,
        aspect_ratio_grouping=grouping,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    return ResumableTrainLoader(stream, make_batches)


def _build_sampler(cfg: CfgNode, dicts: list[dict]) -> Iterable[int]:
    name, seed = cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED
    if name not in _SAMPLERS:
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN {name!r} is not known with a SEED; allowed: "
            f"{', '.join(_SAMPLERS)}."
        )
    logger.info(f"Using training sampler {name} with seed {seed}")
    if name == "TrainingSampler":
        return TrainingSampler(len(dicts), seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(dicts), ratio, seed_shuffle=seed, seed_subset=seed)
    # The key REPEAT_SQRT is younger than Detectron2 0.6.
    options = {}
    if "REPEAT_SQRT" in cfg.DATALOADER:
        options["sqrt"] = cfg.DATALOADER.REPEAT_SQRT
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **options
    )
    return RepeatFactorTrainingSampler(factors, seed=seed)
