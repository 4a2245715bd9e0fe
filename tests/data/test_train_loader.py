"""The order of the training data: what it depends on, and that it goes on where it stopped."""

import random
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask import TeacherStudentDatasetMapper
from teacher_student_mask.data import build_train_loader
from teacher_student_mask.data.train_loader import train_batches
from teacher_student_mask.errors import InputError

SIZES = ((64, 48), (48, 64), (50, 50))  # wide, tall, square


def dicts_of(sizes):
    return [
        {"file_name": f"{i}.png", "width": w, "height": h, "index": i}
        for i, (w, h) in enumerate(sizes)
    ]


def draw(dataset_dict):
    """A mapper that says which image it was given and which random numbers it met."""
    numbers = (random.random(), np.random.random(), torch.rand(()).item())
    return {**dataset_dict, "numbers": numbers}


def make_loader(sizes, batch_size, *, grouping=True, num_workers=0, factors=None, seed=5):
    if factors is None:
        sampler = TrainingSampler(len(sizes), seed=seed)
    else:
        sampler = RepeatFactorTrainingSampler(torch.tensor(factors), seed=seed)
    cfg = get_cfg()
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = seed, batch_size
    cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.DATALOADER.NUM_WORKERS = grouping, num_workers
    return train_batches(cfg, dicts_of(sizes), sampler, draw)


def batches_of(loader, num_batches, start_iter=0):
    """Batches as a trainer gets them that starts at ``start_iter``: [(index, numbers), ...]."""
    with EventStorage(start_iter):
        batches = list(islice(loader, num_batches))
    return [[(x["index"], x["numbers"]) for x in batch] for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=9),
    batch_size=st.integers(1, 5),
    start=st.integers(0, 12),
    grouping=st.booleans(),
    factors=st.one_of(st.none(), st.lists(st.floats(1, 3), min_size=9, max_size=9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_resumed_stream_is_the_rest_of_the_uninterrupted_one(
    sizes, batch_size, start, grouping, factors, seed
):
    factors = factors and factors[: len(sizes)]
    make = partial(make_loader, sizes, batch_size, grouping=grouping, factors=factors, seed=seed)
    whole = batches_of(make(), start + 4)
    assert all(len(batch) == batch_size for batch in whole)
    assert batches_of(make(), 4, start_iter=start) == whole[start:]


@pytest.mark.parametrize("grouping", [True, False])
def test_neither_the_workers_nor_an_interruption_change_the_order(grouping):
    sizes = [SIZES[i % 3] for i in range(7)]
    whole = batches_of(make_loader(sizes, 3, grouping=grouping), 9)
    assert len({index for batch in whole for index, _ in batch}) == 7
    for num_workers in (1, 2):
        loader = make_loader(sizes, 3, grouping=grouping, num_workers=num_workers)
        assert batches_of(loader, 4, start_iter=5) == whole[5:]
    loader = make_loader(sizes, 3, grouping=grouping, num_workers=2)
    assert batches_of(loader, 9) == whole


def test_iter_alone_starts_nothing():
    """Detectron2 0.6 calls iter() before it knows where to start."""
    whole = batches_of(make_loader([SIZES[0]] * 5, 2), 6)
    batches = iter(make_loader([SIZES[0]] * 5, 2))
    with EventStorage(4):
        first = next(batches)
    assert [(x["index"], x["numbers"]) for x in first] == whole[4]
    assert next(iter(make_loader([SIZES[0]] * 5, 2)))[0]["index"] == whole[0][0][0]  # no storage


def test_examples_have_random_numbers_of_their_own():
    numbers = [x for batch in batches_of(make_loader([SIZES[0]] * 4, 2), 8) for _, x in batch]
    # Each of the three generators, also when an image comes again.
    assert [len(set(column)) for column in zip(*numbers)] == [16, 16, 16]
    other = batches_of(make_loader([SIZES[0]] * 4, 2, seed=6), 1)
    assert other[0][0][1] not in numbers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_numbers_of_training_are_left_alone(num_workers):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    batches_of(make_loader([SIZES[0]] * 4, 2, num_workers=num_workers), 3)
    drawn = random.random(), np.random.random(), torch.rand(()).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.random(), torch.rand(()).item())


def test_ranks_share_the_images_and_not_the_random_numbers(monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        make = partial(make_loader, [SIZES[0]] * 6, 4, grouping=False)  # 2 for each rank
        seen.append([x for batch in batches_of(make(), 3) for x in batch])
        assert batches_of(make(), 2, start_iter=1) == [seen[-1][2:4], seen[-1][4:6]]
    assert sorted(index for rank in seen for index, _ in rank[:3]) == list(range(6))
    assert not {x for _, x in seen[0]} & {x for _, x in seen[1]}


@pytest.mark.parametrize("num_images", [0, 2, 4])
def test_every_process_has_as_many_images(tiny_cfg, tiny_coco, monkeypatch, num_images):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    cfg = tiny_cfg(dataset=tiny_coco, opts=["SEED", 0, "SOLVER.IMS_PER_BATCH", num_images])
    with pytest.raises(InputError, match=f"IMS_PER_BATCH is {num_images}; .* the 3 processes"):
        build_train_loader(cfg, draw)


def file_names(loader, num_batches):
    return [[x["file_name"] for x in batch] for batch in islice(loader, num_batches)]


def test_the_images_of_a_seed_are_those_of_detectron2(tiny_cfg, tiny_coco):
    """TrainingSampler with the seed: the images a user of Detectron2's main has seen so far."""
    cfg = tiny_cfg(dataset=tiny_coco, opts=["SEED", 7, "DATALOADER.NUM_WORKERS", 0])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    dicts = [x for x in DatasetCatalog.get(tiny_coco.name) if x["annotations"]]
    order = islice(TrainingSampler(len(dicts), seed=7), 6)
    expected = [dicts[i]["file_name"] for i in order]
    loader = build_train_loader(cfg, TeacherStudentDatasetMapper(cfg, True))
    assert sum(file_names(loader, 3), []) == expected


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_every_sampler_goes_on(tiny_cfg, tiny_coco, sampler):
    cfg = tiny_cfg(dataset=tiny_coco, opts=["SEED", 0, "DATALOADER.SAMPLER_TRAIN", sampler])
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.REPEAT_THRESHOLD = 2.0
    mapper = TeacherStudentDatasetMapper(cfg, True)
    whole = file_names(build_train_loader(cfg, mapper), 8)
    with EventStorage(3):
        assert file_names(build_train_loader(cfg, mapper), 5) == whole[3:]
    cfg.SEED = 1
    assert file_names(build_train_loader(cfg, mapper), 8) != whole


def test_other_samplers_are_refused(tiny_cfg, tiny_coco):
    opts = ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    with pytest.raises(ValueError, match="is not known with a SEED; allowed: TrainingSampler, Rep"):
        build_train_loader(tiny_cfg(dataset=tiny_coco, opts=opts), draw)
