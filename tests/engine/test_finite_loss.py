"""A loss, a gradient or a weight that is not finite ends training and spoils no checkpoint."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_train_net
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch import nn

import train_net
from teacher_student_mask.engine import FiniteLoss
from teacher_student_mask.engine.finite_loss import non_finite_tensors

run_tiny = test_train_net.run  # the fixture

REPOSITORY = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """Two losses of one weight; ``broken[iteration]`` replaces losses by other numbers."""

    def __init__(self, broken):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.broken = broken

    def forward(self, batch):
        if not self.training:
            return [{"instances": NAN}]
        iteration = batch[0]["image_id"] // 10
        loss = (self.weight**2).sum()
        losses = {"loss_a": loss, "loss_b": 2 * loss, "loss_c": loss / 4}
        for name, value in self.broken.get(iteration, {}).items():
            losses[name] = loss.detach() * 0 + value
        return losses


class Trainer(SimpleTrainer):
    """As train_net.Trainer, around any model."""

    def __init__(self, model, finite_loss, folder, data, optimizer=None):
        super().__init__(model, data, optimizer or torch.optim.SGD(model.parameters(), lr=0.01))
        self.finite_loss = finite_loss
        self.checkpointer = DetectionCheckpointer(model, str(folder), trainer=self)
        self.evaluations = []
        self.register_hooks(
            [
                finite_loss,
                PeriodicCheckpointer(self.checkpointer, 2),
                EvalHook(0, lambda: self.evaluations.append(self.iter)),
            ]
        )

    def run_step(self):
        with self.finite_loss.explain():
            super().run_step()


def batches():
    iteration = 0
    while True:
        yield [
            {"file_name": f"{iteration}_{k}.jpg", "image_id": 10 * iteration + k} for k in range(2)
        ]
        iteration += 1


@pytest.fixture
def make(tmp_path):
    def make(broken=None, model=None):
        return Trainer(model or Model(broken or {}), FiniteLoss(), tmp_path, batches())

    return make


def error_of(trainer, max_iter=10):
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, max_iter)
    return str(error.value)


def saved(folder):
    """{name: weights} of the checkpoints, and the name in last_checkpoint."""
    weights = {
        path.name: torch.load(path, weights_only=False)["model"] for path in folder.glob("*.pth")
    }
    return weights, (folder / "last_checkpoint").read_text()


def test_message_names_iteration_images_and_losses_and_what_to_do(make, tmp_path):
    trainer = make({5: {"loss_a": NAN, "loss_c": INF}})
    message = error_of(trainer)
    assert "stops at iteration 5: losses not finite: loss_a nan, loss_c inf;" in message
    weight = trainer.model.weight.detach()
    assert f"the largest finite one is loss_b {2 * (weight**2).sum():.6g}." in message
    assert "batch on rank 0: 5_0.jpg (image_id 50), 5_1.jpg (image_id 51)." in message
    for advice in ("SOLVER.BASE_LR", "SOLVER.WARMUP_ITERS", "SOLVER.CLIP_GRADIENTS", "images"):
        assert advice in message
    assert "4_0.jpg" not in message  # the weights were fine
    weights, last = saved(tmp_path)
    assert last == "model_0000003.pth" and set(weights) == {"model_0000001.pth", last}
    assert all(x.isfinite().all() for x in weights[last].values())
    # The weights in memory are those of the step before.
    assert weight.isfinite().all() and not torch.equal(weight, weights[last]["weight"])


@pytest.mark.parametrize(
    "losses, what",
    [
        (dict.fromkeys(("loss_a", "loss_b", "loss_c"), NAN), "none is finite"),
        ({"loss_a": INF, "loss_b": -INF}, "loss_a inf, loss_b -inf; the largest finite one is"),
        (dict.fromkeys(("loss_a", "loss_b"), 3e38), "each loss is finite, but their sum is not"),
    ],
)
def test_every_loss_that_is_not_finite_is_named(make, losses, what):
    assert what in error_of(make({0: losses}))


def test_finite_losses_change_nothing(make, tmp_path):
    plain = SimpleTrainer(model := Model({}), batches(), torch.optim.SGD(model.parameters(), 0.01))
    plain.train(0, 4)
    trainer = make()
    trainer.train(0, 4)
    assert torch.equal(model.weight, trainer.model.weight)
    assert saved(tmp_path)[1] == "model_final.pth" and trainer.evaluations == [4]
    # The hooks are gone, and nothing of this is in the checkpoint.
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert "hooks" not in checkpoint["trainer"]


def test_evaluation_and_copies_of_the_model_are_not_checked(make):
    class Evaluate(HookBase):
        def after_step(self):
            model = copy.deepcopy(self.trainer.model).eval()
            assert model([{"image_id": 0}]) == [{"instances": NAN}]

    trainer = make()
    trainer.register_hooks([Evaluate()])
    trainer.train(0, 2)


def test_a_failure_in_the_last_iteration_is_not_evaluated(make, tmp_path):
    trainer = make({9: {"loss_a": NAN}})
    assert "stops at iteration 9" in error_of(trainer, max_iter=10)
    assert trainer.evaluations == []
    assert saved(tmp_path)[1] == "model_0000007.pth"


class BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * INF


class ModelWithBrokenGradient(Model):
    """All losses are finite; in one iteration the gradient is not."""

    def __init__(self, iteration):
        super().__init__({})
        self.iteration = iteration

    def forward(self, batch):
        losses = super().forward(batch)
        if self.training and batch[0]["image_id"] // 10 == self.iteration:
            losses["loss_a"] = BrokenGradient.apply(losses["loss_a"])
        return losses


@pytest.mark.parametrize("max_iter", [4, 10])
def test_weights_spoiled_by_a_gradient_are_not_saved(make, tmp_path, max_iter):
    # A checkpoint is due in iteration 3; in a training of 4 iterations model_final, too.
    trainer = make(model=ModelWithBrokenGradient(3))
    message = error_of(trainer, max_iter)
    assert "stops at iteration 3: 1 of the model's 2 tensors are not finite" in message
    assert "(first 'weight')" in message and "3_0.jpg (image_id 30)" in message
    weights, last = saved(tmp_path)
    assert set(weights) == {last} == {"model_0000001.pth"}
    assert all(x.isfinite().all() for x in weights[last].values())
    assert trainer.evaluations == []


def test_the_step_before_is_named_where_its_gradient_was_to_blame(make):
    # No checkpoint is due in iteration 2: the loss of 3 tells.
    message = error_of(make(model=ModelWithBrokenGradient(2)))
    assert "stops at iteration 3: losses not finite" in message
    first, second = message.split("not finite (first 'weight') already before this step")
    assert "3_0.jpg (image_id 30)" in first and "2_1.jpg (image_id 21)" in second


def test_a_spoiled_buffer_is_not_saved_either(make, tmp_path):
    class Spoil(HookBase):
        def before_step(self):
            if self.trainer.iter == 3:
                self.trainer.model.running_mean[1] = NAN

    trainer = make()
    trainer.register_hooks([Spoil()])
    assert "(first 'running_mean')" in error_of(trainer)
    assert saved(tmp_path)[1] == "model_0000001.pth"


def test_names_are_those_of_the_model_that_is_wrapped():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Model({})
    assert non_finite_tensors(model) == ([], 2)
    model.weight.data[0] = INF
    assert non_finite_tensors(Wrapper(model)) == (["weight"], 2)
    assert non_finite_tensors(nn.ReLU()) == ([], 0)


def test_errors_of_detectron2_get_the_images(make, tmp_path):
    class Diverged(Model):
        def forward(self, batch):
            if batch[0]["image_id"] >= 30:
                # As find_top_rpn_proposals.
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
            return super().forward(batch)

    message = error_of(make(model=Diverged({})))
    assert "iteration 3: Predicted boxes or scores contain Inf/NaN. Images" in message
    assert "3_1.jpg (image_id 31)" in message and "SOLVER.BASE_LR" in message


def test_errors_that_are_none_of_numbers_pass(make):
    class Wrong(Model):
        def forward(self, batch):
            raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="^other$"):
        make(model=Wrong({})).train(0, 2)


def test_a_gradient_scaler_leaves_the_step_out_and_training_goes_on(make, tmp_path):
    """What AMPTrainer does, on the CPU: scaled gradients that overflow are no error."""

    class Scaled(Trainer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def run_step(self):
            losses = self.model(next(self.data_loader))
            self.optimizer.zero_grad()
            self.scaler.scale(sum(losses.values())).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    trainer = Scaled(ModelWithBrokenGradient(3), FiniteLoss(), tmp_path, batches())
    trainer.train(0, 6)
    assert saved(tmp_path)[1] == "model_final.pth"
    assert trainer.scaler.get_scale() == 2.0


def train_on_rank(rank, folder):
    """One of two processes; the loss of rank 1 is NaN in iteration 3."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Model({3: {"loss_a": NAN}} if rank == 1 else {}))
    data = ([{"file_name": f"rank{rank}_{i}.jpg", "image_id": 10 * i}] for i in range(10))
    Trainer(model, FiniteLoss(), f"{folder}/rank{rank}", data).train(0, 10)


@pytest.mark.slow
def test_the_rank_with_the_loss_ends_the_group(tmp_path):
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    program = (
        "import sys, test_finite_loss as t, torch.multiprocessing as mp\n"
        "mp.start_processes(t.train_on_rank, (sys.argv[1],), nprocs=2, start_method='fork')\n"
    )
    folders = [Path(__file__).parent, REPOSITORY / "tests", REPOSITORY, REPOSITORY / "tools"]
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode != 0
    message = "FloatingPointError: Training stops at iteration 3: losses not finite: loss_a nan;"
    assert message in result.stderr
    assert "Images of the batch on rank 1: rank1_3.jpg (image_id 30)." in result.stderr
    weights, last = saved(tmp_path / "rank0")  # the other one saves nothing
    assert set(weights) == {last} == {"model_0000001.pth"}


@pytest.mark.slow
def test_training_of_a_detector_stops(run_tiny, tmp_path, monkeypatch):
    """train_net.py itself, with Detectron2's own RPN error: the weights are NaN."""

    class Spoil(HookBase):
        def before_step(self):
            if self.trainer.iter == 2:
                next(self.trainer.model.backbone.parameters()).data.fill_(NAN)

    build_hooks = train_net.Trainer.build_hooks
    monkeypatch.setattr(
        train_net.Trainer, "build_hooks", lambda self: [*build_hooks(self), Spoil()]
    )
    opts = ["SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"]
    with pytest.raises(FloatingPointError) as error:
        run_tiny(opts=opts)
    message = str(error.value)
    assert "Training stops at iteration 2" in message and "already before this step" in message
    assert ".png (image_id " in message
    output = tmp_path / "output"
    assert message in (output / "log.txt").read_text()
    weights, last = saved(output)
    assert set(weights) == {last} == {"model_0000001.pth"}
    assert all(x.isfinite().all() for x in weights[last].values())
