"""Two process groups, of 2 and of 3 ranks, that run once for all tests of this folder."""

import functools

import pytest
import torch
from distributed_evaluation import TEST_SETS
from distributed_runs import run_everything, start

from teacher_student_mask.data.shapes import generate_shapes


@pytest.fixture(scope="session", autouse=True)
def _gpus_are_hidden():
    # From the processes: Detectron2's launch would take NCCL and one GPU for each.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """Folder of the datasets of ``TEST_SETS``."""
    root = tmp_path_factory.mktemp("shapes")
    for name, num_images in TEST_SETS.items():
        generate_shapes(str(root / name), num_train=0, num_val=num_images, image_size=64)
    return root


@pytest.fixture(scope="session")
def results_of(shapes_root, tmp_path_factory):
    """Return ``results(world_size, what)``: what each rank saved, in the order of the ranks."""

    @functools.cache
    def folder_of(world_size):
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        start(run_everything, world_size, (str(folder), str(shapes_root)))
        return folder

    def results(world_size, what):
        paths = [folder_of(world_size) / f"{what} {rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=True) for path in paths]

    return results
