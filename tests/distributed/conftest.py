"""A process group of 2 ranks, which runs once for all tests of this folder."""

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
    """Return ``results(what)``: what each rank saved, in the order of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    start(run_everything, 2, (str(folder), str(shapes_root)))
    return lambda what: [
        torch.load(folder / f"{what} {rank}.pt", weights_only=True) for rank in range(2)
    ]
