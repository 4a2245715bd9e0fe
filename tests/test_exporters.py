"""The exported student finds the same, in other sizes and without this project."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from detectron2.engine import DefaultPredictor
from PIL import Image
from small_students import run_without, small_config, small_model, write_noise, write_small_student

from teacher_student_mask import exporters
from teacher_student_mask.cli.main import main
from teacher_student_mask.exporters import compare, detect, export_student
from teacher_student_mask.trained_model import TrainedModel, load_model

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnx", reason="the extra 'export' is not installed")

# Of (256, 320), which is traced, none; one that needs no padding, one with a side below 32. On
# noise of most of these sizes the student finds objects, and none on black.
SIZES = [(64, 80), (100, 60), (96, 224), (20, 300)]
THRESHOLD = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.45]


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, height, width, generator=generator) * 255


@torch.no_grad()
def numpy_of(run, image):
    return tuple(x.numpy() for x in run(image))


def export_to(folder, *arguments):
    options = ["--config-file", folder / "config.yaml", "--output-dir", folder / "exported"]
    return main(["export", *map(str, [*options, *arguments])])


def trained_student(config, *opts):
    cfg = small_config(config, *opts)
    names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    return TrainedModel(cfg, small_model(cfg), names, list(range(len(names))), ("student",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with config.yaml, weights.pth, photo.png (noise) and, in exported/, all formats."""
    folder = tmp_path_factory.mktemp("student")
    norm = ["MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
    write_small_student(folder, "teacher_student.yaml", *THRESHOLD, *norm)
    write_noise(folder / "photo.png", 100, 150)
    formats = ["--formats", "plain", "torchscript", "onnx"]
    assert export_to(folder, *formats, "--check-images", folder / "photo.png") == 0
    return folder


PLAIN = """
import numpy as np
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

cfg = get_cfg()
cfg.merge_from_file("exported/config.yaml")
instances = DefaultPredictor(cfg)(np.load("image.npy"))["instances"]
np.savez("found.npz", boxes=instances.pred_boxes.tensor.numpy(), scores=instances.scores.numpy(),
         classes=instances.pred_classes.numpy(), masks=instances.pred_masks.numpy())
"""

TORCHSCRIPT = """
import numpy as np, torch, torchvision
image = torch.as_tensor(np.load("image.npy").transpose(2, 0, 1).astype("float32"))
names = ["boxes", "scores", "classes", "masks"]
np.savez("found.npz", **dict(zip(names, torch.jit.load("exported/model.ts")(image))))
"""

ONNX = """
import runpy, sys
sys.argv = ["run_onnx.py", "--output-dir", "found", "photo.png"]
runpy.run_path("exported/run_onnx.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, opts",
    [
        ("teacher_student.yaml", []),
        ("mask_rcnn.yaml", ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]),
    ],
    ids=["student", "class-agnostic"],
)
def test_the_plain_model_finds_the_same_without_this_project(
    tmp_path, monkeypatch, capsys, config, opts
):
    cfg = write_small_student(tmp_path, config, *opts)
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    expected = DefaultPredictor(cfg)(image)["instances"]
    assert len(expected) == 5
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--config-file", "config.yaml", "--output-dir", "exported"]) == 0
    assert "15 objects on 3 images, 0 without a counterpart" in capsys.readouterr().out

    run_without(["teacher_student_mask"], PLAIN, tmp_path)
    moved = (tmp_path / "exported").rename(tmp_path / "moved")
    assert torch.equal(load_model(moved).predict(image).pred_classes, expected.pred_classes)
    found = np.load("found.npz")
    assert np.array_equal(found["boxes"], expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found["classes"], expected.pred_classes.numpy())
    assert np.array_equal(found["scores"], expected.scores.numpy())
    masks = expected.pred_masks.numpy()
    assert 0 < masks.mean() < 1 and (found["masks"] == masks).mean() > 0.9999


@pytest.mark.slow
def test_torchscript_runs_without_detectron2(exported):
    image = np.asarray(Image.open(exported / "photo.png"))[:, :, ::-1]
    np.save(exported / "image.npy", image)
    run_without(["detectron2", "fvcore", "teacher_student_mask"], TORCHSCRIPT, exported)
    found = np.load(exported / "found.npz")
    model = load_model(str(exported / "config.yaml")).model
    pixels = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)).astype("float32"))
    for name, x in zip(exporters.OUTPUTS, numpy_of(lambda x: detect(model, x), pixels)):
        assert len(x) > 0
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_onnx_runs_without_pytorch_from_the_program_beside_it(exported):
    run_without(["torch", "detectron2", "cv2", "teacher_student_mask"], ONNX, exported)
    image = np.asarray(Image.open(exported / "photo.png"))[:, :, ::-1]
    expected = load_model(str(exported / "config.yaml")).predict(image)
    assert len(expected) > 0
    picture = np.asarray(Image.open(exported / "found/photo.png")).astype(int)
    mask = expected.pred_masks.any(0).numpy()
    is_changed = (picture != image[:, :, ::-1]).any(2)
    assert mask.any() and (is_changed == mask).mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.ts", "model.onnx"])
def test_a_graph_finds_the_same_on_images_of_other_sizes(exported, name):
    model = load_model(str(exported / "config.yaml")).model
    path = str(exported / "exported" / name)
    if name == "model.ts":
        graph = torch.jit.load(path)
        run = lambda image: numpy_of(graph, image)  # noqa: E731
    else:
        graph = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = list(exporters.OUTPUTS)
        run = lambda image: graph.run(names, {"image": image.numpy()})  # noqa: E731
    images = [f(*size) for size in SIZES for f in (noise, lambda *s: torch.zeros(3, *s))]
    counts = set()
    for image in images:
        expected, found = numpy_of(lambda x: detect(model, x), image), run(image)
        assert [x.dtype for x in found] == [np.float32, np.float32, np.int64, np.float32]
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert np.array_equal(expected[2], found[2])
        for a, b in zip(expected, found):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
        counts.add(len(found[1]))
    assert 0 in counts and len(counts) > 1, counts


@pytest.mark.slow
def test_what_is_written(exported):
    folder = exported / "exported"
    written = {"config.yaml", "model.pth", "categories.json", "classes.json", "deployment.json"}
    graphs = {"model.ts", "model.onnx", "run_onnx.py"}
    assert {x.name for x in folder.iterdir()} == written | graphs
    weights = torch.load(folder / "model.pth", weights_only=True)["model"]
    assert weights and not any("teacher" in x for x in weights)
    # Detectron2's own keys alone, and only those that are not its defaults.
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert content["VERSION"] == 2 and content["MODEL"]["ROI_HEADS"]["NAME"] == "StandardROIHeads"
    assert "TEACHER_MASK_HEAD" not in content["MODEL"]
    assert "META_ARCHITECTURE" not in content["MODEL"]
    facts = json.loads((folder / "deployment.json").read_text())
    assert facts["input"]["channels"] == "BGR" and facts["input"]["shortest_edge"] == 64
    assert facts["classes"] == json.loads((folder / "classes.json").read_text())
    assert facts["score_threshold"] == 0.45 and facts["max_objects"] == 5
    for name in ("model.ts", "model.onnx"):
        assert re.search("[1-9][0-9]* objects on 4 images, 0 without", facts["files"][name])


@pytest.mark.slow
def test_a_graph_of_a_mask_prior(tmp_path):
    trained = trained_student("opmask.yaml", "MODEL.ROI_BOX_HEAD.NORM", "")
    reports = export_student(trained, tmp_path, ["torchscript"])
    assert "15 objects on 3 images, 0 without a counterpart" in reports["model.ts"]


@pytest.mark.parametrize(
    "config, opts, words",
    [
        ("opmask.yaml", ["MODEL.ROI_BOX_HEAD.NORM", ""], "ROI_MASK_PRIOR.NAME is 'ClassAct"),
        (
            "mask_rcnn.yaml",
            ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvMultiUpsampleHead"]
            + ["MODEL.ROI_MASK_HEAD.NUM_DECONV", 2],
            "'MaskRCNNConvMultiUpsampleHead', which a plain Mask R-CNN does not have",
        ),
    ],
)
def test_what_detectron2_does_not_have_is_named(tmp_path, capsys, config, opts, words):
    write_small_student(tmp_path, config, *opts)
    assert export_to(tmp_path) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("kind", ["plain", "torchscript"])
def test_what_finds_something_else_is_not_written(tmp_path, monkeypatch, kind):
    def build_changed(cfg):
        model = small_model(cfg)
        model.load_state_dict = lambda _: None
        model.roi_heads.mask_head.predictor.bias.data += 0.1
        return model

    def trace_changed(detector, image):
        return b"", lambda x: tuple(y.numpy() + (y.ndim == 3) * 0.1 for y in detector(x))

    monkeypatch.setattr(exporters, "build_model", build_changed)
    monkeypatch.setattr(exporters, "_trace", trace_changed)
    with pytest.raises(exporters.InputError, match="finds something else.*masks .* of .* allowed"):
        export_student(trained_student("mask_rcnn.yaml"), tmp_path / "exported", [kind])
    assert not (tmp_path / "exported").exists()


def test_the_files_of_a_training_are_never_replaced(tmp_path, capsys):
    """An export into OUTPUT_DIR took the config of the training with it, and the teacher."""
    write_small_student(tmp_path, "teacher_student.yaml")
    config = tmp_path / "config.yaml"
    before = config.read_text()
    assert main(["export", "--config-file", str(config), "--output-dir", str(tmp_path)]) == 1
    assert "holds config.yaml, which no export has written to its end" in capsys.readouterr().err
    assert config.read_text() == before and not (tmp_path / "model.pth").exists()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.pth").write_text("mine")
    assert main(["export", "--config-file", str(config), "--output-dir", str(alone)]) == 1
    assert "holds model.pth, which no export has written to its end" in capsys.readouterr().err
    # An earlier export is replaced, with what is no longer asked for.
    exported = tmp_path / "exported"
    assert (
        export_to(tmp_path, "--formats", "plain", "torchscript") == 0
        and (exported / "model.ts").exists()
    )
    assert export_to(tmp_path) == 0 and not (exported / "model.ts").exists()


def test_a_config_that_evaluates_the_teacher_has_its_student_exported(tmp_path):
    write_small_student(tmp_path, "teacher_student.yaml", "TEST.MASK_HEAD", "teacher")
    trained = load_model(str(tmp_path / "config.yaml"))
    weight = trained.model.roi_heads.mask_head.predictor.weight
    export_student(trained, tmp_path / "exported")
    weights = torch.load(tmp_path / "exported/model.pth", weights_only=True)["model"]
    assert torch.equal(weights["roi_heads.mask_head.predictor.weight"], weight)
    # The model that was given is as it was.
    assert trained.model.roi_heads.test_mask_head == "teacher"
    assert trained.model.roi_heads.teacher_mask_head is not None and weight.requires_grad


def test_a_plain_export_keeps_the_category_ids_of_the_dataset(tmp_path):
    """It numbered them from 0, and results of it did not fit the dataset."""
    trained = trained_student("mask_rcnn.yaml")
    ids = [3 * i + 1 for i in trained.category_ids]
    export_student(dataclasses.replace(trained, category_ids=ids), tmp_path)
    assert load_model(tmp_path).category_ids == ids


OBJECTS = (
    np.array([[0, 0, 10, 10], [5, 5, 9, 9]], np.float32),
    np.array([0.9, 0.8], np.float32),
    np.array([1, 2]),
    np.full((2, 4, 4), 0.5, np.float32),
)


def changed(index, value):
    objects = [x.copy() for x in OBJECTS]
    objects[index][0] = value
    return tuple(objects)


@pytest.mark.parametrize(
    "others, words",
    [
        (OBJECTS, "0 without .* boxes 0.0e.00 .* masks 0.0e.00"),
        # The order is no matter where scores are the same up to rounding.
        (tuple(x[::-1] for x in OBJECTS), "0 without .* boxes 0.0e.00 .* masks 0.0e.00"),
        (changed(0, [0.005, 0, 10, 10]), "0 without .* boxes 5.0e-03"),
        (changed(1, 0.7), "something else.* 2 without"),
        (changed(3, 0.75), "something else.* 0 without .* masks 2.5e-01"),
        (changed(3, np.nan), "something else.* 0 without .* masks inf"),
        (tuple(x[:1] for x in OBJECTS), "something else.* 1 without"),
        (tuple(x[[0, 0]] for x in OBJECTS), "something else.* 2 without"),
    ],
)
def test_comparing_by_hand(others, words):
    try:
        report = compare(lambda _: OBJECTS, lambda _: others, [torch.zeros(3, 8, 8)])
    except exporters.InputError as error:
        report = f"something else {error}"
    assert report.startswith("something else") == words.startswith("something else")
    assert re.search(f"2 objects on 1 images, {words.removeprefix('something else.* ')}", report)
