"""The prediction program with a tiny untrained model, against DefaultPredictor and pycocotools."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from tiny_model import TINY_MODEL

import predict
from inference import overlays, webcam
from teacher_student_mask import add_teacher_student_mask_config, register_partial_coco

ROOT = Path(__file__).resolve().parents[2]
# Neither contiguous nor in order in the json; contiguous id k is the k-th smallest.
CATEGORY_IDS = [90, 3, 41, 17, 5, 70, 8, 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Config and weights of a model that finds five objects in any image, all by chance."""
    folder = tmp_path_factory.mktemp("model")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/shapes/mask_rcnn.yaml"))
    cfg.merge_from_list(
        TINY_MODEL
        + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
        + ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
        + ["DATASETS.TEST", ("predict_no_such_dataset",), "DATASETS.TRAIN", ()]
    )
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Call main in tmp_path with the tiny model; the results go to "out"."""
    monkeypatch.chdir(tmp_path)

    def _run(*arguments, threshold=0.0, config=model / "config.yaml"):
        options = ["--config-file", config, "--output-dir", "out", "--score-threshold", threshold]
        return predict.main([str(x) for x in [*options, *arguments]])

    return _run


@pytest.fixture
def register(tmp_path):
    """Register a dataset whose metadata is known only once it is loaded."""
    names = []

    def _register(num_classes=8):
        name = f"predict_test_{next(_register.counter)}"
        ids = CATEGORY_IDS[:num_classes]
        categories = [{"id": i, "name": f"thing {i}"} for i in ids]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
        register_partial_coco(name, str(path), str(tmp_path))
        names.append(name)
        return name

    _register.counter = itertools.count()
    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_image(path, height, width, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8)).save(path)
    return path


def write_video(path, num_frames, codec):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, (80, 64))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV cannot write {codec}")
    rng = np.random.default_rng(0)
    for _ in range(num_frames):
        writer.write(rng.integers(0, 256, (64, 80, 3)).astype(np.uint8))
    writer.release()
    return path


def count_frames(path):
    capture = cv2.VideoCapture(str(path))
    num_frames = sum(1 for _ in itertools.takewhile(lambda x: x[0], iter(capture.read, None)))
    capture.release()
    return num_frames


def load_results(folder="out"):
    folder = Path(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "images.json"))
        return coco, coco.loadRes(str(folder / "coco_instances_results.json"))


def load_images(folder="out"):
    return json.loads((Path(folder) / "images.json").read_text())["images"]


def table_row(text, label):
    return re.search(rf"^{label} +(\S+)$", text, re.MULTILINE)[1]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_names_that_are_not_utf8(run, tmp_path, capsys):
    """OpenCV crashed on them, and took the results of all other images with it."""
    name = os.fsdecode(b"pl\xe9in")
    image = write_image(tmp_path / f"{name}.png", 40, 60)
    video = tmp_path / f"{name}.avi"
    video.write_bytes(b"a video")
    other = write_image(tmp_path / "other.png", 40, 60)
    assert run(image, video, other) == 1
    assert {x.name for x in Path("out/overlays").iterdir()} == {f"{name}.png", "other.png"}
    assert [x["file_name"] for x in load_images()] == [str(image), str(other)]
    assert "pl\\udce9in.avi: the name of a video must be UTF-8" in capsys.readouterr().err


def test_results_are_those_of_default_predictor(run, model, tmp_path, register):
    sizes = [(40, 60), (97, 33), (130, 64)]
    paths = [tmp_path / "wide.jpg", tmp_path / "gray.png", tmp_path / "tall.bmp"]
    for path, size, mode in zip(paths, sizes, ("RGB", "L", "RGB")):
        write_image(path, *size, mode)
    assert run(*paths, "--no-overlays", "--opts", "DATASETS.TEST", f"('{register()}',)") == 0

    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(model / "config.yaml"))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(cfg)
    coco, results = load_results()
    assert sorted(coco.imgs) == [1, 2, 3]
    for image_id, (path, size) in enumerate(zip(paths, sizes), start=1):
        image = coco.imgs[image_id]
        assert (image["file_name"], image["height"], image["width"]) == (str(path), *size)
        expected = predictor(cv2.imread(str(path)))["instances"]
        found = results.imgToAnns[image_id]
        assert len(found) == len(expected) == 5
        for k, result in enumerate(found):
            x0, y0, x1, y1 = expected.pred_boxes.tensor[k].tolist()
            assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
            assert result["score"] == pytest.approx(expected.scores[k].item())
            assert result["category_id"] == sorted(CATEGORY_IDS)[expected.pred_classes[k]]
            assert result["segmentation"]["size"] == list(size)
            mask = mask_util.decode(result["segmentation"]).astype(bool)
            assert (mask == expected.pred_masks[k].numpy()).all()
    names = {category["id"]: category["name"] for category in coco.cats.values()}
    assert names == {i: f"thing {i}" for i in CATEGORY_IDS}


def test_overlays_show_the_objects_on_the_enlarged_image(run, tmp_path):
    write_image(tmp_path / "small.jpg", 40, 60)
    write_image(tmp_path / "large.png", 410, 300)
    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "flat.webp", lossless=True)
    assert run("small.jpg", "large.png", "flat.webp") == 0
    assert {p.name for p in Path("out/overlays").iterdir()} == {
        "small.jpg",
        "large.png",
        "flat.png",
    }
    assert cv2.imread("out/overlays/small.jpg").shape == (7 * 40, 7 * 60, 3)
    assert cv2.imread("out/overlays/large.png").shape == (410, 300, 3)
    assert len(np.unique(cv2.imread("out/overlays/flat.png").reshape(-1, 3), axis=0)) > 50
    assert [x["overlay"] for x in load_images()] == [
        "overlays/small.jpg",
        "overlays/large.png",
        "overlays/flat.png",
    ]


def test_overlay_colors_are_far_from_black_and_white():
    colors = np.array([overlays.color_of(k) for k in range(150)])
    assert ((colors > 0.05) & (colors < 0.95)).all()
    assert len(np.unique(colors.round(3), axis=0)) == 150


def test_no_overlays(run, tmp_path):
    write_image(tmp_path / "a.png", 40, 60)
    assert run("a.png", "--no-overlays") == 0
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "coco_instances_results.json",
        "images.json",
    ]
    assert "overlay" not in load_images()[0]


def test_score_threshold_and_summary(run, tmp_path, capsys):
    write_image(tmp_path / "a.png", 40, 60)
    run("a.png", "--no-overlays")
    scores = sorted(
        x["score"] for x in json.loads(Path("out/coco_instances_results.json").read_text())
    )
    capsys.readouterr()
    run("a.png", "--no-overlays", threshold=(scores[1] + scores[2]) / 2)
    kept = json.loads(Path("out/coco_instances_results.json").read_text())
    assert sorted(x["score"] for x in kept) == pytest.approx(scores[2:])
    table = capsys.readouterr().out
    assert table_row(table, "images and frames") == "1"
    assert table_row(table, "detections") == "3"
    assert float(table_row(table, "seconds per image")) > 0
    counts = [line.split() for line in table.splitlines() if line.startswith("  class")]
    assert sum(int(n) for *_, n in counts) == 3


def test_broken_files_do_not_stop_the_others(run, tmp_path, capsys):
    write_image(tmp_path / "in/a.png", 40, 60)
    write_image(tmp_path / "in/b.png", 40, 60)
    write_image(tmp_path / "in/deep.png", 40, 60, "I;16")
    whole = (tmp_path / "in/b.png").read_bytes()
    (tmp_path / "in/b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/c.jpg").write_bytes(b"no image")
    (tmp_path / "in/d.mp4").write_bytes(b"no video")
    write_image(tmp_path / "in/z.png", 50, 60)
    (tmp_path / "in/notes.txt").write_text("ignored in a folder")
    assert run("in") == 1
    assert [Path(x["file_name"]).name for x in load_images()] == ["a.png", "z.png"]
    assert {p.name for p in Path("out/overlays").iterdir()} == {"a.png", "z.png"}
    errors = capsys.readouterr().err.rpartition("4 of 6 inputs failed:")[2]
    for name in ("b.png", "c.jpg", "d.mp4", "deep.png"):
        assert f"in/{name}" in errors
    assert "8 bits" in errors


def test_equal_names_do_not_overwrite_each_other(run, tmp_path):
    names = ["one/x.png", "two/x.png", "two/x.bmp", "tree/x.png", "tree/sub/x.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, 40, 60, seed=seed)
    assert run("one/x.png", "two/*", "tree", "tree/x.png") == 0
    images = load_images()
    assert sorted(x["file_name"] for x in images) == sorted(names)
    overlays = {x["overlay"] for x in images}
    assert overlays == {
        "overlays/x.png",
        "overlays/x_2.png",
        "overlays/x_3.png",
        "overlays/x_4.png",
        "overlays/sub/x.png",
    }
    pictures = {(Path("out") / name).read_bytes() for name in overlays}
    assert len(pictures) == len(names)


def test_overlays_of_an_earlier_run_are_no_inputs(run, tmp_path):
    write_image(tmp_path / "a.png", 40, 60)
    for _ in range(2):
        assert run(".") == 0
        assert [x["file_name"] for x in load_images()] == ["a.png"]


@pytest.mark.parametrize("name, codec", [("v.mp4", "mp4v"), ("v.avi", "MJPG")])
def test_video(run, tmp_path, name, codec):
    write_video(tmp_path / name, 3, codec)
    write_image(tmp_path / "z.png", 40, 60)
    assert run(name, "z.png") == 0
    images = load_images()
    assert [x.get("frame") for x in images] == [0, 1, 2, None]
    assert [(x["height"], x["width"]) for x in images] == [(64, 80)] * 3 + [(40, 60)]
    _, results = load_results()
    assert all(len(results.imgToAnns[i]) == 5 for i in (1, 2, 3, 4))
    assert count_frames("out/overlays/v.mp4") == 3
    capture = cv2.VideoCapture("out/overlays/v.mp4")
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert capture.read()[1].shape == (64, 80, 3)


def test_a_class_keeps_its_color_from_frame_to_frame():
    def draw(boxes, classes, **options):
        instances = Instances((410, 300))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float))
        instances.pred_classes, instances.scores = torch.tensor(classes), torch.ones(len(classes))
        image = np.full((410, 300, 3), 90, np.uint8)
        return overlays.draw_overlay(image, instances, ["a", "b", "c"], **options)

    upper, lower = [20, 20, 120, 150], [20, 220, 120, 380]
    one = draw([upper], [2], color_by_class=True)[:200]
    two = draw([lower, upper], [0, 2], color_by_class=True)[:200]
    assert (one != 90).any() and (one == two).all()
    assert (draw([upper], [2])[:200] != draw([lower, upper], [0, 2])[:200]).any()


def test_webcam_writes_a_video(run, tmp_path):
    # A file goes the way of a camera.
    write_video(tmp_path / "v.avi", 3, "MJPG")
    assert run("--webcam", "v.avi", "--max-frames", 2, "--html") == 0
    assert [(x["file_name"], x["frame"]) for x in load_images()] == [("v.avi", 0), ("v.avi", 1)]
    assert count_frames("out/overlays/webcam.mp4") == 2
    _, results = load_results()
    assert [len(results.imgToAnns[i]) for i in (1, 2)] == [5, 5]
    page = Path("out/contact_sheet.html").read_text()
    assert "at most, in one of 2 frames" in page and './overlays/webcam.mp4"' in page


def test_ctrl_c_ends_a_camera_and_keeps_its_results(run, tmp_path, monkeypatch):
    class Capture:
        frames = 0

        def __init__(self, device):
            assert device == 1

        def read(self):
            Capture.frames += 1
            if Capture.frames == 3:
                raise KeyboardInterrupt
            return True, np.zeros((64, 80, 3), np.uint8)

        def get(self, *_):
            return 0.0

        set = release = get

    monkeypatch.setattr(webcam.cv2, "VideoCapture", Capture)
    assert run("--webcam", 1) == 0
    assert [x["frame"] for x in load_images()] == [0, 1]
    assert Path("out/overlays/webcam_1.mp4").stat().st_size > 0


def test_show_opens_a_window_instead_of_a_video(run, tmp_path, monkeypatch):
    class Window:
        is_closed = False
        shown = []

        def show(self, picture):
            self.shown.append(picture.shape)
            self.is_closed = len(self.shown) == 2

        def close(self):
            self.is_closed = True

    monkeypatch.setattr(predict, "open_window", lambda title: Window())
    write_video(tmp_path / "v.avi", 3, "MJPG")
    assert run("--webcam", "v.avi", "--show") == 0
    assert Window.shown == [(64, 80, 3)] * 2
    assert len(load_images()) == 2 and not Path("out/overlays").exists()


def test_contact_sheet_has_all_that_was_read(run, tmp_path, monkeypatch):
    names = ["in/a.png", "in/sub/a.png", "in/b #1%.jpg"]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, 40, 60, seed=seed)
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    assert run("in", "--html") == 1
    page = Path("out/contact_sheet.html").read_text()
    links = re.findall(r'<a href="([^"]*overlays[^"]*)"><img [^>]*src="([^"]*)"', page)
    assert len(links) == 3 and "in/broken.png" in page
    assert all((Path("out") / unquote(x)).is_file() for pair in links for x in pair)
    tiles = json.loads(re.search(r'id="gallery-data">(.*?)</script>', page, re.DOTALL)[1])
    assert sorted(x["name"] for x in tiles) == sorted(names)
    _, results = load_results()
    scores = sorted(round(x["score"], 4) for x in results.anns.values())
    assert sorted(x[2] for tile in tiles for x in tile["items"]) == scores
    # Neither overlays nor thumbnails are inputs of a second run.
    write_image(tmp_path / "a.png", 40, 60)
    assert run(".", "--html", "--opts", "TEST.DETECTIONS_PER_IMAGE", "1") == 1
    assert sorted(x["file_name"] for x in load_images()) == sorted([*names, "a.png"])


def test_contact_sheet_without_jinja2(run, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png", 40, 60)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit):
        run("a.png", "--html")
    expected = "--html needs jinja2: pip install 'teacher-student-mask[report]'"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("num_classes", [None, 5], ids=["not registered", "other number"])
def test_classes_without_names(run, tmp_path, register, log, num_classes):
    write_image(tmp_path / "a.png", 40, 60)
    dataset = "predict_no_such_dataset" if num_classes is None else register(num_classes)
    assert run("a.png", "--no-overlays", "--opts", "DATASETS.TEST", f"('{dataset}',)") == 0
    assert "no names" in log.text and dataset in log.text
    coco, results = load_results()
    assert {i: x["name"] for i, x in coco.cats.items()} == {i: f"class {i}" for i in range(8)}
    assert {x["category_id"] for x in results.anns.values()} <= set(range(8))


def test_classes_of_the_training_set_where_the_test_set_is_missing(run, tmp_path, register):
    write_image(tmp_path / "a.png", 40, 60)
    assert run("a.png", "--no-overlays", "--opts", "DATASETS.TRAIN", f"('{register()}',)") == 0
    assert sorted(load_results()[0].cats) == sorted(CATEGORY_IDS)


def test_without_a_gpu_the_cpu_is_used(run, tmp_path, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_image(tmp_path / "a.png", 40, 60)
    assert run("a.png", "--no-overlays", "--opts", "MODEL.DEVICE", "cuda") == 0
    assert "using the CPU" in log.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.png"], "'nothing.png' matches no file"),
        (["a.png", "no/*.png"], "'no/*.png' matches no file"),
        (["empty"], "'empty' has no image"),
        (["notes.txt"], "'notes.txt' is of an unknown kind"),
        (["a.png", "--weights", "no.pth"], "no.pth do not exist"),
        (["a.png", "--weights", ""], "names no MODEL.WEIGHTS"),
        (["a.png", "--config-file", "no.yaml"], "no.yaml: no such file"),
        (["a.png", "--config-file", "strange.yaml"], "strange.yaml: 'Non-existent config key: STR"),
        (["a.png", "--output-dir", "notes.txt"], "Cannot write to --output-dir notes.txt"),
        (["a.png", "--score-threshold", "50"], "must be in [0, 1], got 50"),
        (["a.png", "--opts", "MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["a.png", "--opts", "MODEL.DEVICE"], "--opts MODEL.DEVICE"),
        ([], "Give images, videos, folders or globs; or --webcam"),
        (["a.png", "--webcam", "0"], "or --webcam, and none of them"),
        (["a.png", "--show"], "--show needs --webcam"),
        (["a.png", "--max-frames", "3"], "--max-frames needs --webcam"),
        (["--webcam", "0", "--max-frames", "-1"], "--max-frames is -1; it must be 1 or more"),
        (["a.png", "--annotations", "x.json"], "--annotations needs --compare"),
        (["a.png", "--html", "--no-overlays"], "--html shows the overlays"),
        (["a.png", "--compare", "--no-overlays"], "--compare shows the overlays"),
        (["a.png", "--compare", "--annotations", "x.json"], "x.json: unreadable"),
        (["v.mp4", "--compare", "--annotations", "x.json"], "no frames of videos"),
    ],
)
def test_usage_errors(run, tmp_path, capsys, arguments, message):
    write_image(tmp_path / "a.png", 40, 60)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "v.mp4").touch()
    (tmp_path / "strange.yaml").write_text("STRANGE: 1\n")
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out/images.json").exists()


def test_weights_next_to_the_config_are_pointed_out(run, model, tmp_path, capsys):
    write_image(tmp_path / "a.png", 40, 60)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text((model / "config.yaml").read_text())
    (tmp_path / "run/model_final.pth").touch()
    with pytest.raises(SystemExit):
        run("a.png", "--weights", "", config="run/config.yaml")
    assert "--weights run/model_final.pth" in capsys.readouterr().err


def test_runs_as_a_program(model, tmp_path):
    write_image(tmp_path / "a.png", 40, 60)
    package = str(ROOT / "projects/TeacherStudentMask")
    paths = [package, *filter(None, [os.getenv("PYTHONPATH")])]
    command = [sys.executable, ROOT / "tools/predict.py", "--config-file", model / "config.yaml"]
    command += ["--score-threshold", "0", "--output-dir", "out", "a.png"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "1/1" in result.stderr
    assert table_row(result.stdout, "detections") == "5"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as error:
        predict.main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "coco_instances_results.json" in text
