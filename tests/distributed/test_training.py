"""
Training with DistributedDataParallel where ranks lack seen, unseen or any objects.

Every method on 2 ranks for 10 steps; ``distributed_training.schedule`` says which images they get.
DDP runs with ``find_unused_parameters`` False, as Detectron2 has it: the step after one in which a
parameter of any rank got no gradient raises.
"""

import math

import pytest
import torch
from detectron2.layers import get_norm
from distributed_training import EVERY_METHOD, NUM_STEPS, schedule
from test_base_methods import WITH_EXTERNAL_MASKS, has_mask_head, has_teacher
from torch import nn

from teacher_student_mask.modeling.mask_heads import has_batch_norm

LOSSES = {
    "loss_mask": lambda method: has_mask_head(EVERY_METHOD[method]),
    "loss_mask_teacher": lambda method: has_teacher(EVERY_METHOD[method]),
    "loss_mask_projection": lambda method: "boxinst" in method,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_ranks_without_objects_train_and_stay_alike(results_of, method):
    ranks = results_of(f"training {method}")
    names = set(ranks[0]["losses"][0])
    for name, is_expected in LOSSES.items():
        assert (name in names) == is_expected(method)
    for rank, result in enumerate(ranks):
        assert len(result["losses"]) == NUM_STEPS
        for step, losses in zip(schedule(), result["losses"]):
            # Detectron2 averages the ranks' losses by the names of the main process.
            assert set(losses) == names
            assert all(math.isfinite(x) for x in losses.values()), (rank, step, losses)
            if step[rank] == "no object":
                assert all(x == 0 for name, x in losses.items() if "mask" in name)
            if step[rank] == "no seen object" and method in ("baseline", *WITH_EXTERNAL_MASKS):
                # Masks of a model alone.
                assert (losses["loss_mask"] > 0) == (method != "baseline")
    first = ranks[0]["state"]
    for other in ranks[1:]:
        # Buffers, too: there are no batch statistics but synchronised ones.
        assert first.keys() == other["state"].keys()
        for name, value in first.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, other["state"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ours, naiveSyncBN_N", "baseline, naiveSyncBN_N"])
def test_synchronised_statistics_are_those_of_the_ranks_with_rois(results_of, method):
    state = results_of(f"training {method}")[0]["state"]
    variances = {name: x for name, x in state.items() if name.endswith("running_var")}
    heads = {name.split(".")[1] for name in variances}
    assert heads == ({"mask_head"} if "baseline" in method else {"mask_head", "teacher_mask_head"})
    for name, variance in variances.items():
        assert (variance > 0).all() and not torch.equal(variance, torch.ones_like(variance)), name


@pytest.mark.parametrize(
    "norm, expected",
    [(x, True) for x in ("BN", "naiveSyncBN", "naiveSyncBN_N", "SyncBN")]
    + [("GN", False), ("FrozenBN", False)],
)
def test_every_norm_with_batch_statistics_is_known_as_one(norm, expected):
    """
    A head with one sees all ROIs in one call. Bug: nn.SyncBatchNorm, no BatchNorm2d, was missed;
    ranks with and without unmasked ROIs would then wait for each other's statistics for ever.
    """
    assert has_batch_norm(nn.Sequential(nn.Conv2d(4, 4, 1), get_norm(norm, 32))) == expected
