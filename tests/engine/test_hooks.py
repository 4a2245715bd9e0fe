"""Masks of unseen objects and numbers that are not finite stop a training; its random numbers."""

import copy
import random

import numpy as np
import pytest
import test_train_net
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from teacher_student_mask import TeacherStudentDatasetMapper
from teacher_student_mask.engine import (
    FiniteLoss,
    SeedEveryIteration,
    Trainer,
    UnseenMaskGuard,
    trainer,
)

run_tiny = test_train_net.run  # the fixture

NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """Three losses of one weight; ``broken[iteration]`` replaces losses by other numbers."""

    def __init__(self, broken=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.broken = broken or {}

    def forward(self, batch):
        if not self.training:
            return [{"instances": NAN}]
        loss = (self.weight**2).sum()
        losses = {"loss_a": loss, "loss_b": 2 * loss, "loss_c": loss / 4}
        iteration = batch[0]["image_id"] // 10 if batch else -1
        for name, value in self.broken.get(iteration, {}).items():
            losses[name] = loss.detach() * 0 + value
        return losses


class SmallTrainer(SimpleTrainer):
    """The steps and checkpoints of our trainer, around any model."""

    def __init__(self, model, folder, data=None, hooks=()):
        data = data if data is not None else batches()
        super().__init__(model, data, torch.optim.SGD(model.parameters(), lr=0.01))
        self.finite_loss = FiniteLoss()
        checkpointer = DetectionCheckpointer(model, str(folder), trainer=self)
        self.register_hooks([self.finite_loss, *hooks, PeriodicCheckpointer(checkpointer, 2)])

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:
            raise self.finite_loss.explain(error) from error


def batches(prefix=""):
    for i in range(100):
        yield [{"file_name": f"{prefix}{i}_{k}.jpg", "image_id": 10 * i + k} for k in range(2)]


def saved(folder):
    """{name: weights} of the checkpoints, all finite, and the name in last_checkpoint."""
    weights = {
        path.name: torch.load(path, weights_only=False)["model"] for path in folder.glob("*.pth")
    }
    assert all(x.isfinite().all() for tensors in weights.values() for x in tensors.values())
    return weights, (folder / "last_checkpoint").read_text()


# ---- random numbers ----


class DrawingTrainer(TrainerBase):
    """Draws numbers in every step; tests/test_resume.py sees where they go on."""

    def __init__(self, seed):
        super().__init__()
        self.drawn = []
        self.register_hooks([SeedEveryIteration(seed)])

    def run_step(self):
        self.drawn += [random.random(), np.random.random(), torch.rand(()).item()]


def test_seeds_and_ranks_differ(monkeypatch):
    drawn = []
    for seed, rank in [(3, 0), (4, 0), (3, 1)]:
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        trainer = DrawingTrainer(seed)
        trainer.train(0, 3)
        drawn += trainer.drawn
    assert len(set(drawn)) == 27


# ---- masks of unseen objects ----

UNSEEN = 1  # contiguous id of the tiny dataset's class "cat"


def example(name, has_mask=None, class_id=UNSEEN):
    """An image with one object; ``has_mask`` None: without the field."""
    instances = Instances((60, 60))
    instances.gt_boxes = Boxes([[10, 10, 50, 50]])
    instances.gt_classes = torch.tensor([class_id])
    instances.gt_masks = PolygonMasks([[np.array([10.0, 10, 50, 10, 50, 50, 10, 50])]])
    if has_mask is not None:
        instances.gt_has_mask = torch.tensor([has_mask])
    return {"file_name": name, "image_id": 7, "instances": instances}


def train_guarded(examples, tmp_path, model=None):
    guard = UnseenMaskGuard({0, 2}, ["ant", "cat", "ship"])
    trainer = SmallTrainer(model or Model(), tmp_path, iter([[x] for x in examples]), [guard])
    try:
        trainer.train(0, len(examples))
    except RuntimeError as error:
        return trainer, str(error)
    return trainer, None


def test_the_error_names_image_and_class_before_the_step(tmp_path):
    trainer, error = train_guarded([example("a.png", False), example("b.png", True)], tmp_path)
    assert (
        "Training stops at iteration 1: masks of objects of unseen classes would reach the model, "
        "1 of 'cat', of b.png (image_id 7). The mapper" in error
    )
    assert trainer.storage.latest()["leak/num_unseen_masks"] == (0, 0)  # of one step


def test_a_mapper_that_marks_no_masks_is_found(tmp_path):
    seen = example("a.png", class_id=0)
    without_masks = example("b.png")
    without_masks["instances"].remove("gt_masks")
    assert train_guarded([seen, without_masks, {"image_id": 3}], tmp_path)[1] is None
    error = train_guarded([seen, example("c.png")], tmp_path)[1]
    assert "1 of 'cat', of c.png (image_id 7)" in error


def test_the_guard_looks_at_training_alone_and_goes_with_it(tmp_path):
    trainer, error = train_guarded([example("a.png", False)] * 3, tmp_path)
    assert error is None
    trainer.model([example("a.png", True)])  # the training is over
    guard = UnseenMaskGuard({0, 2}, ["ant", "cat", "ship"])
    guard.trainer = trainer
    guard.before_train()
    trainer.model.eval()([example("a.png", True)])
    copy.deepcopy(trainer.model)  # as for averages of weights
    with pytest.raises(RuntimeError, match="a.png"):
        trainer.model.train()([example("a.png", True)])


def test_a_model_of_several_processes_is_guarded_before_it_moves_tensors(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        assert "a.png" in train_guarded([example("a.png", True)], tmp_path, model)[1]
    finally:
        torch.distributed.destroy_process_group()


class Forgetful(TeacherStudentDatasetMapper):
    """Forgets to forget."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen_classes = frozenset({0, 1, 2})


def test_train_net_stops_when_the_mapper_is_broken(run_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "TeacherStudentDatasetMapper", Forgetful)
    with pytest.raises(RuntimeError, match="iteration 0: .* of 'cat'"):
        run_tiny(opts=["SOLVER.MAX_ITER", 5])
    output = tmp_path / "output"
    assert (output / "log.txt").is_file()
    assert not list(output.glob("*.pth")) and not (output / "results.json").exists()


# ---- losses that are not finite ----


@pytest.mark.parametrize(
    "losses, words",
    [
        ({"loss_a": NAN, "loss_c": INF}, "loss_a nan, loss_b 2."),
        ({"loss_a": INF, "loss_b": -INF}, "loss_a inf, loss_b -inf"),
        (dict.fromkeys(("loss_a", "loss_b"), 3e38), "loss_a 3e+38, loss_b 3e+38"),  # their sum
    ],
)
def test_the_message_names_iteration_images_and_losses(tmp_path, losses, words):
    trainer = SmallTrainer(Model({5: losses}), tmp_path)
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 10)
    message = str(error.value)
    assert "stops at iteration 5: the losses are not finite: " in message and words in message
    assert "batch on rank 0: 5_0.jpg (image_id 50), 5_1.jpg (image_id 51). Nothing" in message
    assert "SOLVER.BASE_LR" in message
    weights, last = saved(tmp_path)
    assert last == "model_0000003.pth" and set(weights) == {"model_0000001.pth", last}
    # The weights in memory are those of the step before.
    weight = trainer.model.weight.detach()
    assert weight.isfinite().all() and not torch.equal(weight, weights[last]["weight"])


def test_finite_losses_change_nothing(tmp_path):
    plain = SimpleTrainer(model := Model(), batches(), torch.optim.SGD(model.parameters(), lr=0.01))
    plain.train(0, 4)
    trainer = SmallTrainer(Model(), tmp_path)
    trainer.train(0, 4)
    assert torch.equal(model.weight, trainer.model.weight)
    assert saved(tmp_path)[1] == "model_final.pth"
    trainer.model.broken = {0: {"loss_a": NAN}}
    trainer.model([{"image_id": 0}])  # the training is over


@pytest.mark.slow
def test_training_of_a_detector_stops(run_tiny, tmp_path, monkeypatch):
    """train_net.py itself, with Detectron2's own RPN error: the weights are NaN."""

    class Spoil(HookBase):
        def before_step(self):
            if self.trainer.iter == 2:
                next(self.trainer.model.backbone.parameters()).data.fill_(NAN)

    build_hooks = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), Spoil()])
    opts = ["SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"]
    with pytest.raises(FloatingPointError) as error:
        run_tiny(opts=opts)
    message = str(error.value)
    assert "Training stops at iteration 2" in message and ".png (image_id " in message
    assert message in (tmp_path / "output" / "log.txt").read_text()
    assert saved(tmp_path / "output")[1] == "model_0000001.pth"
