"""tsmask train DATA: which data it finds, what it chooses, and a whole run on drawn shapes."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from teacher_student_mask import InputError, training
from teacher_student_mask.cli.main import main
from teacher_student_mask.data import generate_shapes
from teacher_student_mask.judgement import _draw_pictures, evaluate
from teacher_student_mask.own_data import DataPart, find_data
from teacher_student_mask.trained_model import load_model

FEW_STEPS = ["SOLVER.MAX_ITER", "6", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A folder with train.json of 20 images, every third object without a mask, and images/."""
    monkeypatch.chdir(tmp_path)
    # The tutorial's model is done in seconds.
    monkeypatch.setitem(training.PRESETS, "nano", ("custom/tutorial.yaml", {}))
    generate_shapes("data", num_train=20, num_val=4, flat=True)
    coco = json.loads(Path("data/train.json").read_text())
    for annotation in coco["annotations"][::3]:
        annotation["segmentation"] = None
    Path("data/train.json").write_text(json.dumps(coco))
    return tmp_path / "data"


def read(path):
    return json.loads(Path(path).read_text())


def find(data, folder, image_root=None):
    return find_data(data, folder, image_root=image_root)


def test_a_tenth_of_the_images_is_set_aside_and_no_object_is_lost(shapes):
    (shapes / "val.json").unlink()
    whole = read(shapes / "train.json")
    train, validation = find(shapes, shapes / "run")
    assert Path(train.image_root) == shapes / "images"
    kept, aside = read(train.json_file), read(shapes / "run" / "val.json")
    assert (len(kept["images"]), len(aside["images"])) == (18, 2)
    both = sorted(kept["annotations"] + aside["annotations"], key=lambda x: x["id"])
    assert both == whole["annotations"]
    assert find(shapes, shapes / "again")[1].json_file.endswith(Path(validation.json_file).name)
    assert read(shapes / "again" / "val.json") == aside


def test_what_evaluation_alone_needs_is_added_to_what_is_set_aside(shapes):
    (shapes / "val.json").unlink()
    coco = read(shapes / "train.json")
    for annotation in coco["annotations"]:
        del annotation["area"]
    del coco["annotations"][3]["id"]
    (shapes / "train.json").write_text(json.dumps(coco))
    parts = find(shapes, shapes / "run")
    assert all(x.source == str(shapes / "train.json") for x in parts)
    found = [y for x in parts for y in read(x.json_file)["annotations"]]
    assert sorted(x["id"] for x in found) == list(range(1, len(coco["annotations"]) + 1))
    assert all(x["area"] == x["bbox"][2] * x["bbox"][3] for x in found)


def test_pictures_stay_in_their_folder_whatever_the_images_are_called(shapes):
    coco, run = read(shapes / "val.json"), shapes / "run"
    for image in coco["images"]:
        image["file_name"] = str(shapes / "images" / image["file_name"])
    (shapes / "val.json").write_text(json.dumps(coco))
    (run / "inference").mkdir(parents=True)
    (run / "inference/coco_instances_results.json").write_text("[]")
    _draw_pictures(run, DataPart(str(shapes / "val.json"), str(shapes)))
    assert len(list((run / "pictures").iterdir())) == 4


def test_a_validation_set_with_masks_on_some_objects_is_split_by_what_it_can_judge(shapes):
    coco = read(shapes / "val.json")
    del coco["annotations"][0]["segmentation"]
    coco["annotations"][1]["mask_source"] = "model"
    (shapes / "val.json").write_text(json.dumps(coco))
    _, validation = find(shapes, shapes / "run")
    boxes, masks = read(validation.json_file), read(validation.masks_file)
    assert [x["bbox"] for x in boxes["annotations"]] == [x["bbox"] for x in coco["annotations"]]
    assert not any("segmentation" in x for x in boxes["annotations"])
    assert masks["annotations"] == coco["annotations"][2:]


def test_layouts_of_other_tools(shapes, tmp_path):
    for split in ("train", "valid"):
        folder = tmp_path / "roboflow" / split
        folder.mkdir(parents=True)
        for image in read(shapes / "val.json")["images"]:
            (folder / image["file_name"]).write_bytes(
                (shapes / "images" / image["file_name"]).read_bytes()
            )
        (folder / "_annotations.coco.json").write_text((shapes / "val.json").read_text())
    train, validation = find(tmp_path / "roboflow", tmp_path / "run")
    assert [Path(x.image_root).name for x in (train, validation)] == ["train", "valid"]

    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "yolo" / kind / split).mkdir(parents=True)
        Image.new("RGB", (100, 50)).save(tmp_path / "yolo" / "images" / split / "a.png")
        (tmp_path / "yolo" / "labels" / split / "a.txt").write_text(
            "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.5 0.1 0.5 0.9\n"
        )
    settings = {"names": ["ant", "bee"], "train": "images/train", "val": "images/val"}
    (tmp_path / "yolo" / "data.yaml").write_text(yaml.dump(settings))
    train, validation = find(tmp_path / "yolo", tmp_path / "run")
    box, outline = read(train.json_file)["annotations"]
    assert box["bbox"] == pytest.approx([40, 15, 20, 20]) and "segmentation" not in box
    assert outline["segmentation"] == [pytest.approx([10, 5, 50, 5, 50, 45])]
    assert validation.json_file.endswith("val_boxes.json")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere"], "nowhere does not exist; allowed: a COCO json"),
        (["."], "none of train.json, train/_annotations.coco.json, data.yaml"),
        (["data", "--model", "huge"], "allowed: nano, small, base"),
        (["data", "--resume"], "give DATA, one path, or --config-file"),
        (["data/train.json", "--output-dir", "."], "lies in ., the folder of the run"),
        (["--config-file", "a.yaml", "--time", "5m"], "--time.* go with DATA"),
        (["--config-file", "a.yaml", "--seed", "5"], "--seed go with DATA"),
        (["data", "--opts", "OUTPUT_DIR", "x"], "OUTPUT_DIR is chosen by output_dir"),
        (["data/moved.json"], "its image 'train_000000.png' is not in .*--image-root"),
        (["data/boxes.json"], "no object has a mask that a human drew; draw some"),
        (["data/flat.json"], r"'segmentation' is \["),
        (["data/nameless.json"], "'file_name' is missing"),
        (["data/stray.json"], "'image_id' is 999"),
        (["data", "--opts", "DATASETS.TEST", "('a.json',)"], "DATASETS.TEST is the val.json"),
        (["data", "--output-dir", "mine"], "mine has a folder data"),
        (["data", "--num-machines", "2"], "give DATA, one path, or --config-file"),
        ([], "give DATA"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(shapes, tmp_path, capsys, words, sentence):
    (shapes / "moved.json").write_text((shapes / "train.json").read_text())
    boxes = read(shapes / "train.json")
    for annotation in boxes["annotations"]:
        annotation["segmentation"] = None
    (shapes / "boxes.json").write_text(json.dumps(boxes))
    flat, nameless, stray = (read(shapes / "train.json") for _ in range(3))
    for annotation in flat["annotations"]:
        annotation["segmentation"] = [1, 1, 9, 1, 9, 9]
    for image in nameless["images"]:
        del image["file_name"]
    stray["annotations"][0]["image_id"] = 999
    for name, coco in (("flat", flat), ("nameless", nameless), ("stray", stray)):
        (shapes / f"{name}.json").write_text(json.dumps(coco))
    Path("mine/data").mkdir(parents=True)
    Path("mine/data/train.json").touch()
    if words == ["data/moved.json"]:
        (shapes / "images").rename(tmp_path / "photos")
    assert main(["train", *words]) == 1
    assert not list(Path("output").glob("*"))
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)


@pytest.mark.slow
def test_a_run_ends_with_a_judged_model_and_the_next_runs_have_numbers(shapes, capsys):
    handlers = list(logging.getLogger("detectron2").handlers)
    assert main(["train", "data", "--opts", *FEW_STEPS]) == 0
    run = Path("output/train")
    assert logging.getLogger("detectron2").handlers == handlers
    # What the console is spared.
    assert "MAX_ITER: 6" in (run / "log.txt").read_text()
    printed = capsys.readouterr().out
    # 20 images, of which 2 of every 3 objects have a mask, and all of val.json's.
    assert "20 images" in printed and "data/val.json: 4 images" in printed
    assert "6 iterations, 0.6 passes" in printed
    assert printed.rstrip().splitlines()[-3].startswith("  tsmask complete output/train")
    for name in ("model_final.pth", "model_best.pth", "curves.png", "summary.md", "log.txt"):
        assert (run / name).is_file()
    assert len(list((run / "pictures").iterdir())) == 4
    cfg = load_model(run).cfg
    assert cfg.DATASETS.SEEN_CLASSES == "all" and cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS == 0
    found = evaluate(run, gt_boxes=True, output_dir="elsewhere")
    assert f"Masks on given boxes: AP {found['segm']['AP']:.1f}" in printed
    # Numbered, and no run is overwritten.
    other = training.train("data", opts=[*FEW_STEPS, "DATASETS.TEST", "()"])
    assert other == Path("output/train2")
    with pytest.raises(InputError, match="'tsmask train output/train' goes on with it"):
        training.train("data", run, opts=FEW_STEPS)
    # With the same seed, the same model.
    states = [torch.load(x / "model_final.pth")["model"] for x in (run, other)]
    assert all(torch.equal(states[0][k], x) for k, x in states[1].items())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was_moved_to(shapes, monkeypatch, capsys):
    (shapes / "val.json").unlink()
    opts = [*FEW_STEPS, "SOLVER.CHECKPOINT_PERIOD", "2"]
    whole = training.train("data", "2024", opts=opts)
    # The images that were set aside are to be completed, too.
    assert "--annotations data/train.json" in (whole / "summary.md").read_text()
    after_step = training._Progress.after_step

    def stop(self):
        after_step(self)
        if self.trainer.iter == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Progress, "after_step", stop)
        training.train("data", "cut", opts=opts)
    assert "'tsmask train cut' goes on" in capsys.readouterr().out
    Path("cut").rename("7")
    training.train("7")
    states = [torch.load(Path(x, "model_final.pth"))["model"] for x in (whole, "7")]
    assert all(torch.equal(states[0][k], x) for k, x in states[1].items())
    # Of the validation objects two of three have a mask.
    words = ["--resamples", "0", "--no-pseudo-masks"]
    assert main(["analyze", "7", "--output-dir", "report", *words]) == 0
    number = read("report/analysis.json")["dataset"]["num_objects"]
    assert number == len(read("7/data/val_masks.json")["annotations"])


@pytest.mark.slow
def test_a_training_stops_when_ap_does_not_rise_and_goes_on_when_told_to(
    shapes, monkeypatch, capsys
):
    values = iter([1.0, 2.0, 2.0, 1.5])
    opts = [*FEW_STEPS, "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_validation_ap", lambda metrics: next(values))
        run = training.train("data", early_stop=2, opts=opts)
    assert "AP has not risen for 2 evaluations" in capsys.readouterr().out
    assert torch.load(run / "model_best.pth")["iteration"] == 2
    assert (run / "last_checkpoint").read_text() == "model_0000003.pth"
    training.train(run)
    assert torch.load(run / "model_final.pth")["iteration"] == 5
    # A second training of the same process has a log, too.
    assert "Starting training from iteration 4" in (run / "log.txt").read_text()


def test_steps_are_timed_with_the_schedule_of_the_presets(tiny_cfg, tiny_coco):
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SEED", 1, "DATALOADER.NUM_WORKERS", 0]
    assert training._time_steps(tiny_cfg(opts=opts, dataset=tiny_coco)) > 0


def test_flips_are_off_where_names_tell_left_from_right(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "_time_steps", lambda cfg: 0.5)
    asked = ["INPUT.RANDOM_FLIP", "none"]
    for name, opts, flip, said in (
        ("left_door", [], "none", "no flips, as names"),
        ("door", [], None, "with flips"),
        ("door", asked, None, "no flips\n"),
    ):
        coco = read(shapes / "train.json")
        coco["categories"][0]["name"] = name
        (shapes / "train.json").write_text(json.dumps(coco))
        parts = find(shapes, shapes / "run")
        chosen = training._plan("nano", *parts, tmp_path / "run", 600, None, opts, print)
        assert chosen.get("INPUT.RANDOM_FLIP") == flip and said in capsys.readouterr().out
        # 600 seconds without a share for evaluations, at half a second a step.
        assert chosen["SOLVER.MAX_ITER"] == "1020"
        assert chosen["MODEL.PSEUDO_MASK.WARMUP_ITERS"] == "102"
