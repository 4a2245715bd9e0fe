"""Not one mask of an unseen object gets past the guard, and nothing else stops at it."""

import copy
import json

import numpy as np
import pytest
import test_train_net
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.engine import SimpleTrainer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, polygons_to_bitmask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teacher_student_mask import ImageMask, TeacherStudentDatasetMapper
from teacher_student_mask.engine import UnseenMaskGuard, trainer
from teacher_student_mask.engine.unseen_mask_guard import find_unseen_masks, is_box_shaped

run_tiny = test_train_net.run  # the fixture
UNSEEN = 1  # contiguous id of the tiny dataset's class "cat"
SEEN = {0, 2}
AUGMENTATIONS = [
    T.RandomRotation([-40, 40], expand=False),
    T.RandomCrop("relative_range", (0.5, 0.5)),
    T.ResizeShortestEdge((48, 96), 200, "choice"),
    T.RandomFlip(),
    T.RandomRotation([-20, 20], expand=True),
]
# A notch, two parts, and a ball.
L_SHAPE = [[10, 10, 50, 10, 50, 20, 20, 20, 20, 50, 10, 50]]
TWO_PARTS = [[10, 10, 25, 10, 25, 50, 10, 50], [35, 10, 50, 10, 50, 50, 35, 50]]
ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
BALL = [(80 + 70 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)).ravel().tolist()]


def masks_of(polygons, size=(160, 160), mask_format="polygon"):
    polygons = [np.asarray(x, dtype=np.float64) for x in polygons]
    if mask_format == "polygon":
        return PolygonMasks([polygons])
    return BitMasks(torch.from_numpy(polygons_to_bitmask(polygons, *size))[None])


def instances_of(masks, has_mask=False, box=(10, 10, 50, 50), size=(160, 160), class_id=UNSEEN):
    instances = Instances(size)
    instances.gt_boxes = Boxes([list(box)])
    instances.gt_classes = torch.tensor([class_id])
    instances.gt_masks = masks
    instances.gt_has_mask = torch.tensor([has_mask])
    instances.gt_exclusion_masks = ImageMask(torch.zeros(size), 1)
    return instances


formats = pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])


@formats
@pytest.mark.parametrize("polygons", [L_SHAPE, TWO_PARTS, BALL], ids=["notch", "two", "ball"])
def test_what_no_augmentation_makes_of_a_box_is_seen(polygons, mask_format):
    assert not is_box_shaped(masks_of(polygons, mask_format=mask_format), 0)
    rectangle = masks_of([[10, 10, 50, 10, 50, 50, 10, 50]], mask_format=mask_format)
    assert is_box_shaped(rectangle, 0)


@pytest.mark.parametrize("points", [[3, 3] * 4, [1, 2, 9, 2, 9, 2], [1, 1, 5, 5, 9, 9]])
def test_lines_and_points_are_no_masks(points):
    assert is_box_shaped(masks_of([points]), 0)


@st.composite
def augmented_boxes(draw):
    """The polygons of a box after any augmentations, and the size of the image then."""
    height, width = draw(st.integers(8, 120)), draw(st.integers(8, 120))
    x0, x1 = sorted(draw(st.floats(-5, width + 5)) for _ in range(2))
    y0, y1 = sorted(draw(st.floats(-5, height + 5)) for _ in range(2))
    polygons = [np.array([x0, y0, x1, y0, x1, y1, x0, y1]).reshape(4, 2)]
    kinds = ["flip", "resize", "crop", "rotate", "crop", "resize", "rotate", "crop"]
    for kind in [x for x in kinds if draw(st.booleans())]:
        if kind == "flip":
            transform = T.HFlipTransform(width)
        elif kind == "resize":
            size = draw(st.integers(8, 200)), draw(st.integers(8, 200))
            transform = T.ResizeTransform(height, width, *size)
            height, width = size
        elif kind == "rotate":
            transform = T.RotationTransform(height, width, draw(st.floats(-180, 180)))
            height, width = transform.bound_h, transform.bound_w
        else:
            left, top = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
            w, h = draw(st.integers(4, width - left)), draw(st.integers(4, height - top))
            transform = T.CropTransform(left, top, w, h)
            height, width = h, w
        polygons = transform.apply_polygons(polygons)
    return [x.ravel() for x in polygons], (height, width)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(augmented_boxes())
def test_what_augmentations_leave_of_a_box_is_none(polygons_and_size):
    polygons, size = polygons_and_size
    assert is_box_shaped(masks_of(polygons), 0)
    assert is_box_shaped(masks_of(polygons, size, "bitmask"), 0)


def examples_of(cfg, dataset, mapper, num_epochs):
    np.random.seed(0)
    images = DatasetCatalog.get(dataset.name)
    return [mapper(copy.deepcopy(x)) for _ in range(num_epochs) for x in images]


def notch_of(data):
    """Masks of the unseen class that are no boxes."""
    for x in data["annotations"]:
        if x["category_id"] == 17:
            left, top, w, h = x["bbox"]
            points = np.array([(0, 0), (1, 0), (1, 0.2), (0.2, 0.2), (0.2, 1), (0, 1)])
            x["segmentation"] = [(points * (w, h) + (left, top)).ravel().tolist()]


@formats
@pytest.mark.parametrize("augmentations", [None, AUGMENTATIONS], ids=["config", "rotations"])
def test_our_mapper_gives_no_unseen_mask(tiny_cfg, make_tiny_coco, mask_format, augmentations):
    dataset = make_tiny_coco(notch_of)
    opts = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.6]]
    cfg = tiny_cfg(opts=[*opts, "INPUT.MASK_FORMAT", mask_format], dataset=dataset)
    mapper = TeacherStudentDatasetMapper(cfg, is_train=True)
    if augmentations:
        mapper.augmentations = T.AugmentationList(augmentations)
    examples = [x["instances"] for x in examples_of(cfg, dataset, mapper, 15)]
    assert sum(int((x.gt_classes == UNSEEN).sum()) for x in examples) > 20
    assert sum(len(find_unseen_masks(x, SEEN)) for x in examples) == 0
    # The same, had the mapper taken all classes for seen.
    mapper.seen_classes = frozenset({0, 1, 2})
    examples = [x["instances"] for x in examples_of(cfg, dataset, mapper, 1)]
    found = [y for x in examples for y in find_unseen_masks(x, SEEN)]
    assert found and set(found) == {(UNSEEN, "gt_has_mask is True")}
    # And had it only claimed to have forgotten them.
    for x in examples:
        x.gt_has_mask &= x.gt_classes != UNSEEN
    found = [reason for x in examples for _, reason in find_unseen_masks(x, SEEN)]
    assert any("gt_masks is not its box" in x for x in found) or augmentations
    # A model of all classes may see them.
    assert not any(find_unseen_masks(x, {0, 1, 2}) for x in examples)


def test_real_annotations_pass_without_and_stop_with_their_masks(coco_root, tiny_cfg):
    """Every image of the shared COCO, as its own annotations have it."""
    cfg = tiny_cfg(num_classes=80, opts=["DATASETS.TRAIN", ("coco_2017_val",)])
    cfg.DATASETS.SEEN_CLASSES = "voc"
    mapper = TeacherStudentDatasetMapper(cfg, is_train=True)
    seen = mapper.seen_classes
    images = [x for x in DatasetCatalog.get("coco_2017_val") if x["annotations"]][:40]
    examples = [mapper(copy.deepcopy(x))["instances"] for x in images]
    assert sum(len(find_unseen_masks(x, seen)) for x in examples) == 0
    mapper.seen_classes = frozenset(range(80))
    num_objects = num_found = 0
    for image in images:
        instances = mapper(copy.deepcopy(image))["instances"]
        # Even if each is marked as forgotten, and none is missing from the exclusion masks.
        is_unseen = torch.tensor([k not in seen for k in instances.gt_classes.tolist()])
        instances.gt_has_mask &= ~is_unseen
        is_large = instances.gt_boxes.area() > 30**2
        num_objects += int((is_unseen & is_large).sum())
        num_found += len(find_unseen_masks(instances[is_large], seen))
    assert num_found > 0.8 * num_objects > 10


def test_masks_of_another_mapper_are_found(tiny_cfg, tiny_coco):
    cfg = tiny_cfg(dataset=tiny_coco)
    (image,) = [x for x in DatasetCatalog.get(tiny_coco.name) if "unseen" in x["file_name"]]
    instances = DatasetMapper(cfg, is_train=True)(image)["instances"]
    assert not instances.has("gt_has_mask")
    found = find_unseen_masks(instances, SEEN)
    assert found == [(UNSEEN, "it has gt_masks, but no gt_has_mask")] * 2
    assert find_unseen_masks(instances, {UNSEEN}) == []
    instances.remove("gt_masks")
    assert find_unseen_masks(instances, SEEN) == []


@formats
def test_an_unseen_mask_in_the_exclusion_masks_is_found(mask_format):
    box = masks_of([[10, 10, 50, 10, 50, 50, 10, 50]], mask_format=mask_format)
    instances = instances_of(box)
    assert find_unseen_masks(instances, SEEN) == []
    leaked = masks_of(L_SHAPE, mask_format="bitmask").tensor[0]
    instances.gt_exclusion_masks = ImageMask(leaked, 1)
    ((class_id, reason),) = find_unseen_masks(instances, SEEN)
    assert class_id == UNSEEN and "gt_exclusion_masks covers it" in reason
    # The same pixels are those of a seen object here.
    seen = instances_of(masks_of(L_SHAPE, mask_format=mask_format), True, class_id=0)
    seen.gt_exclusion_masks = instances.gt_exclusion_masks
    assert find_unseen_masks(Instances.cat([instances, seen]), SEEN) == []


@pytest.mark.parametrize("has_classes", [False, True])
def test_images_without_objects_are_no_problem(has_classes):
    instances = Instances((20, 30))
    if has_classes:
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        instances.gt_masks = PolygonMasks([])
    assert find_unseen_masks(instances, SEEN) == []


class Model(nn.Module):
    """Takes anything."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": self.weight.sum()}


def train(batches, model=None, num_iters=None):
    model = model or Model()
    guard = UnseenMaskGuard(SEEN, ["ant", "cat", "ship"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, iter(batches), optimizer)
    trainer.register_hooks([guard])
    error = None
    try:
        trainer.train(0, num_iters or len(batches))
    except RuntimeError as e:
        error = str(e)
    return trainer, guard, error


def example(name, has_mask):
    box = masks_of([[10, 10, 50, 10, 50, 50, 10, 50]])
    return {"file_name": name, "image_id": 7, "instances": instances_of(box, has_mask)}


def test_the_error_names_image_class_and_count_before_the_step(log):
    batches = [[example("a.png", False)], [example("b.png", False), example("c.png", True)], []]
    trainer, guard, error = train(batches)
    assert error == (
        "Training stops at iteration 1: 1 masks of objects of unseen classes would reach the model,"
        " of c.png (image id 7): 1 of 'cat' (gt_has_mask is True). DATASETS.SEEN_CLASSES says whose"
        " masks training may use; the mapper must forget all others, as TeacherStudentDatasetMapper"
        " does."
    )
    assert trainer.model.weight.item() == pytest.approx(0.9)  # of one step
    assert trainer.storage.latest()["leak/num_unseen_masks"] == (1, 1)
    assert "1 masks of unseen objects reached the model in 1 iterations (3 objects" in log.text


def test_many_images_are_not_all_named():
    error = train([[example(f"{x}.png", True) for x in "abcde"]])[2]
    assert "c.png" in error and "d.png" not in error and "; and 2 images more." in error


def test_evaluation_is_not_looked_at_and_the_hook_goes_with_the_training(log):
    trainer, guard, error = train([[example("a.png", False)]] * 3)
    assert error is None
    assert (
        "0 masks of unseen objects reached the model in 3 iterations (3 objects of unseen classes)"
        in log.text
    )
    trainer.model([example("a.png", True)])  # the training is over
    guard.before_train()
    trainer.model.eval()([example("a.png", True)])
    with pytest.raises(RuntimeError, match="a.png"):
        trainer.model.train()(batch=[example("a.png", True)])
    # A copy of the model, as for averages of weights, works.
    copy.deepcopy(trainer.model.eval())


def test_batches_that_pass_the_model_by_are_warned_of(log):
    class Trainer(SimpleTrainer):
        def run_step(self):
            self.model.forward([])

    model = Model()
    trainer = Trainer(model, [[]] * 2, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([UnseenMaskGuard(SEEN, [])])
    trainer.train(0, 2)
    assert "Only 0 batches of 2 iterations were looked at" in log.text


def test_a_model_of_several_processes_is_guarded_before_it_moves_tensors(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Model())
        assert train([[example("a.png", False)]], model)[2] is None
        assert "a.png" in train([[example("a.png", True)]], model)[2]
    finally:
        torch.distributed.destroy_process_group()


def test_the_seen_classes_are_those_of_the_config(tiny_cfg, tiny_coco):
    cfg = tiny_cfg(dataset=tiny_coco)
    guard = UnseenMaskGuard(cfg)
    assert guard.seen_classes == SEEN and guard.class_names == ("ant", "cat", "ship")
    cfg.DATASETS.SEEN_CLASSES = "all"
    assert UnseenMaskGuard(cfg).seen_classes == {0, 1, 2}


class Forgetful(TeacherStudentDatasetMapper):
    """Forgets to forget."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen_classes = frozenset({0, 1, 2})


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_net_records_that_there_was_none(run_tiny):
    output = run_tiny(opts=["DATASETS.TEST", "()"])
    values = [x["leak/num_unseen_masks"] for x in metrics(output) if "total_loss" in x]
    assert values and set(values) == {0}
    text = (output / "log.txt").read_text()
    assert "0 masks of unseen objects reached the model in 2 iterations (" in text
    assert "(0 objects" not in text


@pytest.mark.parametrize("num_iters", [1, 5])
def test_train_net_stops_when_the_mapper_is_broken(run_tiny, monkeypatch, tmp_path, num_iters):
    """In the last iteration, too, after which Detectron2 would evaluate."""
    monkeypatch.setattr(trainer, "TeacherStudentDatasetMapper", Forgetful)
    message = r"iteration 0: .* masks of objects of unseen classes .* of 'cat' \(gt_has_mask is"
    with pytest.raises(RuntimeError, match=message):
        run_tiny(opts=["SOLVER.MAX_ITER", num_iters])
    output = tmp_path / "output"
    assert (output / "log.txt").is_file()
    assert not list(output.glob("*.pth")) and not (output / "results.json").exists()


@pytest.mark.slow
def test_train_net_trains_the_oracle(run_tiny):
    output = run_tiny(opts=["DATASETS.TEST", "()", "DATASETS.SEEN_CLASSES", "all"])
    assert "in 2 iterations (0 objects of unseen classes)" in (output / "log.txt").read_text()
