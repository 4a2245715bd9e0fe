"""What training shows: the scalars that tell of a collapse by hand, and class activation maps."""

import pytest
import torch

from teacher_student_mask.modeling.visualization import describe_pseudo_masks


def test_foreground_share_and_agreement():
    teacher = torch.tensor([[[0.9, 0.5], [0.1, 0.4]]])
    student = torch.tensor([[[0.6, 0.4], [0.2, 0.3]]])  # the second cell differs: 0.5 is foreground
    scalars = describe_pseudo_masks(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), teacher, student)
    logged = {name: value.item() for name, value in scalars.items()}
    assert logged["pseudo_mask/fg_ratio"] == pytest.approx(0.25)
    assert logged["pseudo_mask/agreement"] == pytest.approx(0.75)
    assert logged["pseudo_mask/num_rois"] == 1
