"""
Training data in an order that depends on nothing but the seed, the rank and the iteration.

Order and augmentation are functions of the position in the stream, so ``--resume`` goes on with
the images, and the flips, that an uninterrupted training would have seen next; Detectron2's loader
starts its order anew, with random numbers that depend on the number of workers.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError

__all__ = ["build_train_loader", "seed_generators", "train_batches"]


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


class _Examples(Dataset):
    # By (position in the stream, index of the image), mapped with random numbers of their own.

    def __init__(self, dataset_dicts: list[dict], mapper: Callable[[dict], dict], seed: int):
        self.dataset = DatasetFromList(dataset_dicts, copy=False)
        self.mapper, self.seed, self.rank = mapper, seed, comm.get_rank()

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        # In the training process itself, NUM_WORKERS 0, training has its own random numbers.
        state, numpy_state = random.getstate(), np.random.get_state()
        torch_state = torch.get_rng_state()
        # Purpose 1 is that of training itself, which seeds by iteration.
        numbers = (self.seed, self.rank, position)
        seed_generators(numbers, 0, torch.default_generator.manual_seed)
        example = self.mapper(self.dataset[index])
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        return example


def train_batches(
    cfg: CfgNode, dataset_dicts: list[dict], sampler: Iterable[int], mapper: Callable[[dict], dict]
) -> Iterator[list[dict]]:
    """
    Generate one rank's batches from the iteration on that the trainer starts with.

    ``iter()`` alone does nothing, as Detectron2 0.6 calls it before the checkpoint is loaded; the
    first ``next()`` asks the trainer's event storage for the iteration. Without one it is 0.

    Args:
        cfg: with SEED of 0 or more.
        dataset_dicts: images in Detectron2's standard dataset format.
        sampler: gives indices of ``dataset_dicts`` without end, each time the same.
        mapper: makes an example of a dataset dict.
    """
    try:
        iteration = get_event_storage().iter
    except AssertionError:  # Detectron2's answer where no training runs
        iteration = 0
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    sizes = np.array([(x["width"], x["height"]) for x in dataset_dicts])
    # Detectron2's own grouping decides, on sizes alone: no image is read to find the place.
    stubs = (
        {"key": (position, index), "width": sizes[index, 0], "height": sizes[index, 1]}
        for position, index in enumerate(sampler)
    )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        batches = AspectRatioGroupedDataset(stubs, batch_size)
    else:
        batches = (list(itertools.islice(stubs, batch_size)) for _ in itertools.count())
    yield from DataLoader(
        _Examples(dataset_dicts, mapper, cfg.SEED),
        batch_sampler=(
            [x["key"] for x in batch] for batch in itertools.islice(batches, iteration, None)
        ),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        # A DataLoader that starts draws a number, which must not be one of the training's.
        generator=torch.Generator(),
    )


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> Iterator[list[dict]]:
    """
    Build the loader of a training with a seed; reads the keys that Detectron2's own reads.

    Args:
        cfg: with SEED of 0 or more.
        mapper: makes an example of a dataset dict.

    Returns:
        An iterator without end over batches, lists of IMS_PER_BATCH / world size examples.

    Raises:
        InputError: a sampler that is not known here, or IMS_PER_BATCH does not fit the processes.
    """
    name, options = cfg.DATALOADER.SAMPLER_TRAIN, {}
    num_images, num_processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if num_images < 1 or num_images % num_processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {num_images}; allowed: a multiple of the {num_processes} "
            "processes."
        )
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(dicts), seed=cfg.SEED)
    elif name == "RepeatFactorTrainingSampler":
        if "REPEAT_SQRT" in cfg.DATALOADER:  # younger than Detectron2 0.6
            options["sqrt"] = cfg.DATALOADER.REPEAT_SQRT
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, **options
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    else:
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN {name!r} is not known with a SEED; allowed: "
            "TrainingSampler, RepeatFactorTrainingSampler."
        )
    return train_batches(cfg, dicts, sampler, mapper)
