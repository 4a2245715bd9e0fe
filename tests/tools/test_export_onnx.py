"""The student as TorchScript and ONNX: the same objects, other sizes, none, and without us."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_students import (
    run_without,
    small_config,
    small_model,
    write_noise,
    write_small_student,
)

import export_student
from deployment import student_deployment
from deployment.traced_student import (
    TOLERANCES,
    Agreement,
    compare,
    detect,
    make_traceable,
    missing_onnx_package,
    onnx_finder,
    torchscript_graph,
)

ROOT = Path(__file__).resolve().parents[2]
NEEDS_ONNX = pytest.mark.skipif(
    missing_onnx_package() is not None,
    reason=f"{missing_onnx_package()} is not installed: pip install -c constraints.txt onnx "
    "onnxruntime",
)
RUNTIMES = [
    pytest.param("model.ts", id="torchscript"),
    pytest.param("model.onnx", id="onnx", marks=NEEDS_ONNX),
]
# Of (64, 80), which is traced, neither; one that needs no padding, one with a side below 32.
# On noise of most of these sizes it finds objects, and none on black.
SIZES = [(64, 80), (100, 60), (96, 224), (20, 300)]


THRESHOLD = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.45]


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator) * 255


def finder_of(model):
    @torch.no_grad()
    def find(image):
        return tuple(x.numpy() for x in detect(model, image))

    return find


def torchscript_finder(path):
    model = torch.jit.load(str(path))

    @torch.no_grad()
    def find(image):
        return tuple(x.numpy() for x in model(image))

    return find


FINDERS = {"model.ts": torchscript_finder, "model.onnx": onnx_finder}


def export(folder, *arguments):
    options = ["--config-file", folder / "config.yaml", "--output-dir", folder / "exported"]
    return export_student.main([str(x) for x in [*options, *arguments]])


@pytest.fixture(scope="module")
def student():
    """A class-specific student with a threshold, without its teacher."""
    model = small_model(small_config("teacher_student.yaml", *THRESHOLD))
    model.roi_heads.teacher_mask_head = None
    return model


def write_student(folder):
    return write_small_student(folder, "teacher_student.yaml", *THRESHOLD)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with config.yaml, weights.pth, photo.png (noise) and, in exported/, all formats."""
    folder = tmp_path_factory.mktemp("student")
    write_student(folder)
    write_noise(folder / "photo.png", 100, 150)
    formats = ["plain", "torchscript", *(["onnx"] if missing_onnx_package() is None else [])]
    assert export(folder, "--formats", *formats, "--check-images", folder / "photo.png") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_graph_finds_the_same_on_images_of_other_sizes(student, exported, name):
    find, run = finder_of(student), FINDERS[name](str(exported / "exported" / name))
    images = [f(*size) for size in SIZES for f in (noise, lambda *s: torch.zeros(3, *s))]
    counts = {len(find(image)[1]) for image in images}
    assert 0 in counts and len(counts) > 2, counts
    for image in images:
        expected, found = find(image), run(image)
        assert [x.dtype for x in found] == [np.float32, np.float32, np.int64, np.float32]
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert np.array_equal(expected[2], found[2])
        for a, b in zip(expected, found):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_an_image_without_objects_gives_arrays_without_rows(exported, name):
    image = torch.zeros(3, 64, 80)
    boxes, scores, classes, masks = FINDERS[name](str(exported / "exported" / name))(image)
    assert boxes.shape == (0, 4) and scores.shape == classes.shape == (0,)
    assert masks.shape[0] == 0 and masks.ndim == 3


@pytest.mark.slow
@NEEDS_ONNX
def test_the_graph_has_the_whole_last_layer_and_no_teacher(student, exported):
    import onnx

    model = onnx.load(exported / "exported/model.onnx")
    onnx.checker.check_model(model)
    tensors = {x.name: tuple(x.dims) for x in model.graph.initializer}
    predictor = student.roi_heads.mask_head.predictor
    (name,) = [x for x in tensors if "mask_head.predictor.weight" in x]
    assert tensors[name] == tuple(predictor.weight.shape) and predictor.weight.shape[0] > 1
    (user,) = [x for x in model.graph.node if name in x.input]
    assert user.op_type == "Conv"
    assert not any("teacher" in x for x in tensors)
    dims = [x.dim_param or x.dim_value for x in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [3, "height", "width"]


@pytest.mark.slow
def test_without_detectron2s_exporter_and_objects_the_graph_is_right(
    student, tmp_path, monkeypatch
):
    # As in Detectron2 0.6, whose detectron2.export imports caffe2; and traced where nothing is
    # found, while the graph must run where something is.
    monkeypatch.setitem(sys.modules, "detectron2.export", None)
    black = torch.zeros(3, 64, 80)
    adapter = make_traceable(student, black)
    assert type(adapter).__name__ == "_OneImageAdapter" and len(adapter(black)[1]) == 0
    content, run = torchscript_graph(adapter, black)
    (tmp_path / "model.ts").write_bytes(content)
    images = [noise(*size) for size in SIZES] + [torch.zeros(3, *size) for size in SIZES]
    for other in (run, torchscript_finder(tmp_path / "model.ts")):
        agreement = compare(finder_of(student), other, images)
        assert agreement.is_good() and agreement.unmatched == 0 and agreement.objects > 5


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
    "others, unmatched, differences",
    [
        (OBJECTS, 0, (0, 0, 0)),
        # The order is no matter where scores are the same up to rounding.
        (tuple(x[::-1] for x in OBJECTS), 0, (0, 0, 0)),
        (changed(0, [0.005, 0, 10, 10]), 0, (0.005, 0, 0)),
        (changed(0, [1, 0, 10, 10]), 2, (0, 0, 0)),
        (changed(1, 0.7), 2, (0, 0, 0)),
        (changed(2, 2), 2, (0, 0, 0)),
        (changed(3, 0.75), 0, (0, 0, 0.25)),
        (changed(3, np.nan), 0, (0, 0, np.inf)),
        (changed(0, np.nan), 2, (0, 0, 0)),
        (tuple(x[:1] for x in OBJECTS), 1, (0, 0, 0)),
        (tuple(x[:0] for x in OBJECTS), 2, (0, 0, 0)),
    ],
)
def test_comparing_by_hand(others, unmatched, differences):
    image = torch.zeros(3, 8, 8)
    agreement = compare(lambda _: OBJECTS, lambda _: others, [image])
    assert (agreement.images, agreement.objects, agreement.unmatched) == (1, 2, unmatched)
    assert tuple(agreement.differences.values()) == pytest.approx(differences)
    assert agreement.is_good() == (unmatched == 0 and max(differences) <= 0.005)


def test_an_object_is_the_counterpart_of_one():
    twice = tuple(x[[0, 0]] for x in OBJECTS)
    once = tuple(x[:1] for x in OBJECTS)
    agreement = compare(lambda _: twice, lambda _: once, [torch.zeros(3, 8, 8)])
    assert (agreement.objects, agreement.unmatched) == (2, 1)


def test_few_objects_may_lack_a_counterpart():
    differences = dict.fromkeys(TOLERANCES, 0.0)
    assert Agreement(1, 100, 1, differences).is_good()
    assert not Agreement(1, 100, 2, differences).is_good()
    assert not Agreement(1, 0, 1, differences).is_good()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, opts",
    [
        ("mask_rcnn.yaml", ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]),
        ("opmask.yaml", ["MODEL.ROI_BOX_HEAD.NORM", ""]),
    ],
    ids=["class-agnostic", "OPMask"],
)
def test_graphs_of_other_models(config, opts):
    model = small_model(small_config(config, *opts))
    images = [noise(64, 80), noise(100, 60), torch.zeros(3, 64, 64)]
    ((name, content, report),) = student_deployment.export_graphs(model, ["torchscript"], images)
    assert name == "model.ts" and len(content) > 1000
    assert "15 objects on 3 images, 0 without a counterpart" in report


def test_a_graph_that_finds_something_else_is_refused(monkeypatch):
    model = small_model(small_config("mask_rcnn.yaml"))
    find = finder_of(model)

    def change(image):
        return (*find(image)[:3], find(image)[3] + 0.1)

    graphs = {"torchscript": ("model.ts", lambda *_: (b"", change))}
    monkeypatch.setattr(student_deployment, "GRAPHS", graphs)
    with pytest.raises(student_deployment.UsageError, match="finds something else.*masks 1.0e-01"):
        list(student_deployment.export_graphs(model, ["torchscript"], [noise(64, 80)]))


def test_nothing_found_is_said(monkeypatch):
    model = small_model(small_config("mask_rcnn.yaml"))
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    graphs = {"torchscript": ("model.ts", lambda *_: (b"", finder_of(model)))}
    monkeypatch.setattr(student_deployment, "GRAPHS", graphs)
    ((_, _, report),) = student_deployment.export_graphs(model, ["torchscript"], [noise(64, 80)])
    assert "Nothing was found on them, so give --check-images" in report


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_first(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setattr(export_student, "missing_onnx_package", lambda: package)
    options = ["--config-file", "none.yaml", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        export_student.main([*options, "--formats", "onnx"])
    assert error.value.code == 2
    words = f"needs the package {package}, which is not installed: pip install -c constraints.txt"
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_unreadable_check_image_is_named(tmp_path, capsys):
    write_small_student(tmp_path, "mask_rcnn.yaml")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(SystemExit):
        export(tmp_path, "--formats", "torchscript", "--check-images", tmp_path / "a.png")
    assert "a.png" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


RUN_TORCHSCRIPT = """
import numpy as np, torch, torchvision
image = torch.as_tensor(np.load("image.npy").transpose(2, 0, 1).astype("float32"))
names = ["boxes", "scores", "classes", "masks"]
np.savez("found.npz", **dict(zip(names, torch.jit.load("exported/model.ts")(image))))
"""


@pytest.mark.slow
def test_what_is_written(exported):
    names = {path.name for path in (exported / "exported").iterdir()} - {"model.onnx"}
    plain = {"config.yaml", "model.pth"}
    assert names == {*plain, "classes.json", "deployment.json", "model.ts"}
    facts = json.loads((exported / "exported/deployment.json").read_text())
    image = facts["input"]
    assert (image["channels"], image["shortest_edge"], image["value_range"]) == (
        "BGR",
        64,
        [0, 255],
    )
    assert facts["classes"] == json.loads((exported / "exported/classes.json").read_text())
    assert facts["score_threshold"] == 0.45 and facts["max_objects"] == 5
    assert re.search("[1-9][0-9]* objects on 4 images, 0 without", facts["files"]["model.ts"])


@pytest.mark.slow
def test_torchscript_runs_without_detectron2(exported):
    image = np.asarray(Image.open(exported / "photo.png"))[:, :, ::-1]
    np.save(exported / "image.npy", image)
    run_without(["detectron2", "fvcore", "teacher_student_mask"], RUN_TORCHSCRIPT, exported)
    found = np.load(exported / "found.npz")
    cfg = write_student(exported)
    model = DefaultPredictor(cfg).model
    pixels = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)).astype("float32"))
    for name, expected in zip(("boxes", "scores", "classes", "masks"), finder_of(model)(pixels)):
        assert len(expected) > 0
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@NEEDS_ONNX
def test_onnx_runs_without_pytorch_from_the_program(exported):
    arguments = ["run_onnx.py", "--model-dir", "exported", "--output-dir", "found", "photo.png"]
    code = f"""
import runpy, sys
sys.argv = {arguments!r}
try:
    runpy.run_path({str(ROOT / "tools/run_onnx.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
"""
    run_without(["torch", "detectron2", "cv2", "teacher_student_mask"], code, exported)
    objects = json.loads((exported / "found/objects.json").read_text())["photo.png"]
    cfg = write_student(exported)
    image = np.asarray(Image.open(exported / "photo.png"))[:, :, ::-1]
    expected = DefaultPredictor(cfg)(image)["instances"]
    assert len(objects) == len(expected) > 0
    boxes = [x["box"] for x in objects]
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=0.02)
    scores = [x["score"] for x in objects]
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
    names = json.loads((exported / "exported/classes.json").read_text())
    assert [x["class"] for x in objects] == [names[k] for k in expected.pred_classes]
    areas = expected.pred_masks.flatten(1).sum(1).tolist()
    np.testing.assert_allclose([x["mask_area"] for x in objects], areas, atol=2)
    picture = np.asarray(Image.open(exported / "found/photo.png")).astype(int)
    mask = expected.pred_masks.any(0).numpy()
    is_changed = (picture != image[:, :, ::-1]).any(2)
    assert mask.any() and (is_changed == mask).mean() > 0.98


@pytest.mark.slow
@NEEDS_ONNX
def test_onnx_on_a_real_image_is_the_predictor(exported, coco_root):
    from run_onnx import OnnxDetector

    cfg = write_student(exported)
    detector, predictor = OnnxDetector(exported / "exported"), DefaultPredictor(cfg)
    count = 0
    for path in sorted(Path(coco_root, "val2017").glob("*.jpg"))[:4]:
        image = np.asarray(Image.open(path).convert("RGB"))
        expected, found = predictor(image[:, :, ::-1])["instances"], detector(image)
        count += len(expected)
        assert np.array_equal(found.classes, expected.pred_classes.numpy())
        # Ten times the graph's: the boxes are scaled up from 64 pixels to 640.
        np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)
        np.testing.assert_allclose(found.scores, expected.scores.numpy(), atol=1e-4)
        masks = expected.pred_masks.numpy()
        assert found.masks.shape == masks.shape
        assert (found.masks != masks).sum() <= 1e-4 * masks.size
    assert count > 0


number = st.floats(-40, 80, width=32)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(number, number, st.floats(0.5, 90), st.floats(0.5, 90)), max_size=3),
    st.integers(0, 1000),
)
def test_pasting_is_detectron2s(corners, seed):
    paste = pytest.importorskip("run_onnx", reason="onnxruntime is not installed").paste_masks
    boxes = [(x, y, min(x + w, 60), min(y + h, 50)) for x, y, w, h in corners]
    boxes = [(max(x0, 0), max(y0, 0), x1, y1) for x0, y0, x1, y1 in boxes]
    boxes = [b for b in boxes if b[2] - b[0] > 0.1 and b[3] - b[1] > 0.1]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    probs = np.random.default_rng(seed).random((len(boxes), 28, 28), dtype=np.float32)
    found = paste(probs, boxes, 50, 60)
    assert found.shape == (len(boxes), 50, 60) and found.dtype == bool
    expected = paste_masks_in_image(
        torch.as_tensor(probs), Boxes(torch.as_tensor(boxes)), (50, 60), threshold=0.5
    ).numpy()
    # A probability of 0.5 up to rounding may fall on either side.
    assert (found != expected).sum() <= 2 * len(boxes)


@pytest.mark.parametrize("missing", ["exported", "exported/deployment.json"])
def test_run_onnx_without_a_model_says_how_to_make_one(tmp_path, missing, capsys):
    run_onnx = pytest.importorskip("run_onnx", reason="onnxruntime is not installed")
    if missing != "exported":
        (tmp_path / "exported").mkdir()
        (tmp_path / "exported/model.onnx").touch()
    options = ["--model-dir", str(tmp_path / "exported"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        run_onnx.main(["a.png", *options])
    assert missing in capsys.readouterr().err


def test_names_of_two_pictures_do_not_collide(tmp_path):
    run_onnx = pytest.importorskip("run_onnx", reason="onnxruntime is not installed")
    taken = set()
    names = [run_onnx._free_name(tmp_path, Path(x), taken).name for x in ("a/x.jpg", "b/X.png")]
    assert names == ["x.png", "X_2.png"]


@pytest.mark.slow
@NEEDS_ONNX
def test_the_python_of_the_documentation_runs(exported, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/DEPLOY.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "output").mkdir()
    (tmp_path / "output/exported").symlink_to(exported / "exported")
    (tmp_path / "data/images").mkdir(parents=True)
    write_noise(tmp_path / "data/images/a.png", 100, 150)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/DEPLOY.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count(", 100, 150") == 2 and ", 4])" in printed
