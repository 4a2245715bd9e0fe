"""
What DistributedDataParallel makes of the ranks' losses.

A loss is a mean over the ROIs of its rank, and DDP averages the gradients of the ranks: with n_r
ROIs on rank r of W, each of them weighs 1 / (W * n_r). Where all ranks have equally many that is
1 / N, as in one process with all images; else it is not, and a rank without a ROI still counts.
"""

import pytest
import torch
from distributed_gradients import GRADIENT_METHODS, SYNC_METHODS

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
on_2_and_3_ranks = pytest.mark.parametrize("world_size", [2, 3])


def distance(a, b):
    """Largest relative distance, |a - b| / |b|, of the gradients of a parameter."""
    assert a.keys() == b.keys()
    # Sums that cancel have no digits left: compare them with the largest gradients.
    floor = 0.01 * max(x.norm() for x in b.values())
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=floor)) for k in b)


@on_2_and_3_ranks
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradient_is_the_mean_of_what_each_rank_gives_alone(results_of, world_size, method):
    """The ranks have different kinds of image; a rank of three has no object."""
    ranks = results_of(world_size, f"gradients {method}")
    for found in ranks:
        assert distance(found["different, DDP"], found["different, mean"]) < TOLERANCE
        for name, gradient in found["different, DDP"].items():
            assert torch.equal(gradient, ranks[0]["different, DDP"][name]), name


@on_2_and_3_ranks
@pytest.mark.parametrize("method", (*GRADIENT_METHODS, *SYNC_METHODS))
def test_gradient_is_that_of_one_batch_where_ranks_have_equally_many_rois(
    results_of, world_size, method
):
    """With "naiveSyncBN_N" the statistics are those of all ranks, too."""
    for found in results_of(world_size, f"gradients {method}"):
        assert distance(found["equal, DDP"], found["equal, one batch"]) < TOLERANCE
        mask_gradients = [x for name, x in found["equal, DDP"].items() if "mask_head" in name]
        assert mask_gradients and all(x.any() for x in mask_gradients)


@on_2_and_3_ranks
@pytest.mark.parametrize("method", ["ours", "opmask + boxinst + ours"])
def test_roi_weighs_one_by_ranks_times_rois_of_its_rank(results_of, world_size, method):
    """The formula above, on the objects of distributed_training.IMAGES, each a ROI."""
    num_rois = [3, 2, 0][:world_size]
    found, *_ = results_of(world_size, f"gradients {method}")
    alone = [found[f"mask, rank {rank}"] for rank in range(world_size)]

    def weighted(weights):
        return {name: sum(w * x[name] for w, x in zip(weights, alone)) for name in alone[0]}

    mean_of_ranks = weighted([1 / world_size] * world_size)
    mean_of_rois = weighted([n / sum(num_rois) for n in num_rois])
    assert distance(found["mask, DDP"], mean_of_ranks) < TOLERANCE
    assert distance(found["mask, one batch"], mean_of_rois) < TOLERANCE
    # They do differ, so the test can tell.
    assert distance(mean_of_ranks, mean_of_rois) > 0.01
