"""tsmask complete, with a tiny model of random weights."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from pycocotools.coco import COCO
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask import GTBoxInference, TeacherStudentDatasetMapper, completion
from teacher_student_mask.cli.main import main
from teacher_student_mask.completion import write_yolo
from teacher_student_mask.data import load_partial_coco_json
from teacher_student_mask.trained_model import load_model

# Without a mask in the json: three of the image 7, and the two of image 2; 107 is a crowd.
TARGETS = {104, 105, 106, 109, 110}
CATEGORIES = [{"id": 3, "name": "ant"}, {"id": 17, "name": "cat"}, {"id": 90, "name": "ship"}]
NEW_KEYS = {"segmentation", "area", "score", "mask_source", "teacher_student_agreement"}


def forget_cats(data):
    """Masks of image 2 are gone; keys and values that no reader of COCO knows are there."""
    for annotation in data["annotations"]:
        if annotation["id"] in (109, 110):
            annotation["segmentation"] = []
    data["annotations"][0]["caf\u00e9"] = {"\u00e9": [1e300, None, True, 2**60]}
    data["more"] = "\u00e9/"


@pytest.fixture
def dataset(make_tiny_coco):
    return make_tiny_coco(forget_cats)


def save_named_model(cfg, folder):
    paths = save_model(cfg, folder)
    (folder / "categories.json").write_text(json.dumps(CATEGORIES))
    return paths


@pytest.fixture
def run(dataset, tiny_cfg, tmp_path, capsys):
    """Return ``run(*arguments, out, annotations)``: exit code, stdout with stderr."""
    config_file, weights = save_named_model(tiny_cfg(opts=TEACHER_STUDENT), tmp_path / "model")

    def _run(*arguments, out="out.json", annotations=dataset.json_file, model=("model", weights)):
        options = ["--annotations", annotations, "--image-root", dataset.image_root]
        options += ["--output", tmp_path / out]
        if model:
            options += [Path(config_file).parent, "--weights", model[1]]
        code = main(["complete", *map(str, [*options, *arguments])])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    _run.model = (config_file, weights)
    return _run


def write(dataset, tmp_path):
    """The path of a json with what ``dataset.data`` holds now."""
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(dataset.data))
    return path


def annotations_of(path):
    return {x["id"]: x for x in json.loads(path.read_text())["annotations"]}


def made_in(path):
    return {i for i, x in annotations_of(path).items() if "score" in x}


def load_coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_every_box_gets_a_mask_and_nothing_else_changes(run, dataset, tmp_path, mask_format):
    code, text = run("--format", mask_format)
    assert code == 0
    data = json.loads((tmp_path / "out.json").read_text())
    before = {x["id"]: x for x in dataset.data["annotations"]}
    after = {x["id"]: x for x in data["annotations"]}
    assert list(after) == list(before)
    assert {k: v for k, v in data.items() if k != "annotations"} == {
        k: v for k, v in dataset.data.items() if k != "annotations"
    }
    assert {i for i in after if after[i] != before[i]} == TARGETS
    coco = load_coco(tmp_path / "out.json")
    for i in TARGETS:
        kept = before[i].keys() - NEW_KEYS
        assert after[i].keys() - {"mask_fallback"} == NEW_KEYS | kept
        assert {k: after[i][k] for k in kept} == {k: before[i][k] for k in kept}
        assert after[i]["mask_source"] == "model"
        assert 0 <= after[i]["score"] <= 1 and 0 <= after[i]["teacher_student_agreement"] <= 1
        assert ("mask_fallback" in after[i]) == (after[i]["score"] < 0.5)
        mask = coco.annToMask(coco.anns[i])
        rows, columns = np.nonzero(mask)
        x, y, w, h = after[i]["bbox"]
        assert mask.sum() == after[i]["area"] > 0
        assert columns.min() >= x and columns.max() + 1 <= x + w
        assert rows.min() >= y and rows.max() + 1 <= y + h
    kinds = {type(after[i]["segmentation"]) for i in TARGETS}
    assert kinds == {dict} if mask_format == "rle" else list in kinds
    assert not list(tmp_path.glob("*.part-*"))
    total = next(x for x in text.splitlines() if x.startswith("all "))
    assert total.split()[1:4] == ["6", "0", "5"]
    assert f"tsmask train {tmp_path / 'out.json'} --image-root {dataset.image_root}" in text


def test_the_outcome_as_labels_of_yolo_comes_back_as_it_was(run, dataset, tmp_path):
    code, _ = run("--yolo", tmp_path / "yolo")
    assert code == 0
    coco = load_coco(tmp_path / "out.json")
    settings = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert settings["names"] == ["ant", "cat", "ship"]
    for image in coco.loadImgs(coco.getImgIds()):
        rows = (tmp_path / "yolo/labels" / image["file_name"]).with_suffix(".txt").read_text()
        drawn = np.zeros((3, image["height"], image["width"]), np.uint8)
        for row in rows.splitlines():
            k, *numbers = row.split()
            points = np.array(numbers, float).reshape(-1, 2) * drawn.shape[:0:-1]
            cv2.fillPoly(drawn[int(k)], [np.rint(points).astype(np.int32)], 1)
        for k, category_id in enumerate((3, 17, 90)):
            ids = coco.getAnnIds(image["id"], [category_id], iscrowd=False)
            masks = [coco.annToMask(coco.anns[i]) for i in ids]
            union = np.any([np.zeros_like(drawn[k]), *masks], axis=0)
            intersection, union = (drawn[k] & union).sum(), (drawn[k] | union).sum()
            # Parts of a pixel or two have no outline.
            assert intersection >= 0.8 * union


def test_broken_images_have_no_labels_of_yolo(run, dataset, tmp_path):
    Path(dataset.image_root, "seen.png").write_bytes(b"no image")
    assert run("--yolo", tmp_path / "yolo", "--skip-broken-images")[0] == 0
    names = {x.stem for x in (tmp_path / "yolo/labels").rglob("*.txt")}
    assert "mixed" in names and "seen" not in names


@pytest.mark.slow
def test_masks_are_those_of_inference_on_ground_truth_boxes(run, dataset, tmp_path):
    config_file, weights = run.model
    of_head, num_compared = {}, 0
    for head in ("student", "teacher"):
        run("--masks-of", head, out=f"{head}.json")
        made = of_head[head] = annotations_of(tmp_path / f"{head}.json")
        opts = ["TEST.MASK_HEAD", head, "TEST.GT_BOXES", True]
        trained = load_model(config_file, weights=weights, opts=opts)
        mapper = TeacherStudentDatasetMapper(trained.cfg, is_train=False)
        for record in load_partial_coco_json(dataset.json_file, dataset.image_root, dataset.name):
            with torch.no_grad():
                (result,) = GTBoxInference(trained.model)([mapper(record)])
            ids = [
                x["id"]
                for x in dataset.data["annotations"]
                if x["image_id"] == record["image_id"] and not x["iscrowd"]
            ]
            for i, mask in zip(ids, result["instances"].pred_masks.numpy(), strict=True):
                if i in TARGETS and "mask_fallback" not in made[i]:
                    assert (mask_util.decode(made[i]["segmentation"]) == mask).all()
                    num_compared += mask.any()
    assert num_compared >= 6
    for i in TARGETS:
        student, teacher = (x[i] for x in of_head.values())
        if not any("mask_fallback" in x for x in (student, teacher)):
            iou = mask_util.iou([student["segmentation"]], [teacher["segmentation"]], [0]).item()
            assert student["teacher_student_agreement"] == pytest.approx(iou, abs=1e-4)


def interrupt_after(monkeypatch, num_images):
    """KeyboardInterrupt where the next image would begin. Returns the images that were begun."""
    make, begun = completion.make_model_masks, []

    def interrupted(*args):
        begun.append(args[-1]["number"])
        if len(begun) > num_images:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(completion, "make_model_masks", interrupted)
    return begun


def test_labels_of_yolo_stay_in_their_folder(tmp_path):
    coco = {"categories": [{"id": 1, "name": "ant"}], "images": [], "annotations": []}
    for i, name in enumerate(("a/x.png", "b/y.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "photos" / name), np.zeros((8, 8, 3), np.uint8))
        file = str(tmp_path / "photos" / name)
        coco["images"].append({"id": i, "file_name": file, "width": 8, "height": 8})
        coco["annotations"].append({"image_id": i, "category_id": 1, "bbox": [0, 0, 4, 4]})
    write_yolo(coco, "elsewhere", tmp_path / "yolo")
    labels = {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*.txt")}
    assert labels == {"yolo/labels/a/x.txt", "yolo/labels/b/y.txt"}


def test_objects_need_no_id(run, dataset, tmp_path):
    for annotation in dataset.data["annotations"]:
        del annotation["id"]
    path = write(dataset, tmp_path)
    assert run("--rank", tmp_path / "rank.csv", annotations=path)[0] == 0
    assert len((tmp_path / "rank.csv").read_text().splitlines()) == 1 + len(TARGETS)


def test_an_interrupted_run_goes_on_and_ends_the_same(run, tmp_path, monkeypatch):
    run("--rank", tmp_path / "whole.csv", out="whole.json")
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 1)
        assert run("--rank", tmp_path / "out.csv")[0] == 130
        assert begun == [0, 1] and not (tmp_path / "out.json").exists()
    (shard,) = tmp_path.glob("out.json.part-*.jsonl")
    # Of two processes, the first of which had not begun.
    shard = shard.rename(tmp_path / "out.json.part-00001.jsonl")
    with open(shard, "a") as file:
        file.write('{"image": 1, "half a li')
    # What has been made is neither mixed with something else nor thrown away unasked.
    code, text = run()
    assert code == 1 and "--resume" in text
    code, text = run("--resume", "--masks-of", "teacher")
    assert code == 1 and "a run with other masks_of" in text
    code, text = run("--resume", "--opts", "INPUT.MIN_SIZE_TEST", "32")
    assert code == 1 and "a run with other opts" in text
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 9)
        assert run("--resume", "--rank", tmp_path / "out.csv")[0] == 0
        assert begun == [1]
    for name in ("out.json", "out.csv"):
        whole = tmp_path / name.replace("out", "whole")
        assert (tmp_path / name).read_text() == whole.read_text()
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_model_masks_stay_unless_they_are_to_be_made_again(run, tmp_path):
    run("--masks-of", "teacher")
    first = tmp_path / "out.json"
    code, text = run(annotations=first, out="second.json")
    assert code == 0 and annotations_of(tmp_path / "second.json") == annotations_of(first)
    total = next(x for x in text.splitlines() if x.startswith("all "))
    assert total.split()[1:4] == ["6", "5", "0"]
    run("--masks-of", "student", "--redo-model-masks", annotations=first, out="redone.json")
    run("--masks-of", "student", out="student.json")
    redone, student = (annotations_of(tmp_path / f"{x}.json") for x in ("redone", "student"))
    assert redone == student


@pytest.mark.slow
def test_a_broken_image_stops_the_run_or_is_left_out(run, dataset, tmp_path):
    image = f"{dataset.image_root}/mixed.png"
    shutil.move(image, tmp_path / "aside.png")
    code, text = run()
    assert code == 1 and "mixed.png" in text and "--skip-broken-images" in text
    assert not (tmp_path / "out.json").exists()
    code, text = run("--skip-broken-images", "--resume")
    assert code == 0 and "1 images were left out:" in text and f"{image} (image id 7)" in text
    assert made_in(tmp_path / "out.json") == {109, 110}
    shutil.move(tmp_path / "aside.png", image)
    run("--force")
    assert made_in(tmp_path / "out.json") == TARGETS


def test_boxes_without_area_keep_no_mask_and_are_counted_and_ranked_first(run, dataset, tmp_path):
    dataset.data["annotations"][3]["bbox"] = [5, 5, 0, 9]
    dataset.data["annotations"][8]["bbox"] = [500, 5, 5, 9]
    code, text = run("--rank", tmp_path / "r.csv", annotations=write(dataset, tmp_path))
    assert code == 0 and "2 objects have no mask: the box has no area inside the image" in text
    made = annotations_of(tmp_path / "out.json")
    assert made[104] == dataset.data["annotations"][3]
    assert made[109] == dataset.data["annotations"][8]
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [x["annotation_id"] for x in rows[:2]] == ["104", "109"]
    assert {int(x["annotation_id"]) for x in rows} == TARGETS
    needs = [float(x["need"]) for x in rows]
    assert needs == sorted(needs, reverse=True) and needs[:2] == [1, 1]
    for row in rows[2:]:
        annotation = made[int(row["annotation_id"])]
        assert [float(row[x]) for x in ("x", "y", "width", "height")] == annotation["bbox"]
        score, agreement = float(row["score"]), float(row["agreement"])
        assert score == annotation["score"]
        assert float(row["need"]) == pytest.approx(1 - score * agreement, abs=1e-4)
    assert {x["file_name"] for x in rows} == {"mixed.png", "unseen.png"}


def test_classes_are_found_by_their_names(run, dataset, tmp_path):
    run(out="first.json")
    # The ids of ant and ship change places, in the categories and in the annotations.
    swapped = {3: 90, 90: 3}
    for x in dataset.data["categories"]:
        x["id"] = swapped.get(x["id"], x["id"])
    for x in dataset.data["annotations"]:
        x["category_id"] = swapped.get(x["category_id"], x["category_id"])
    assert run(annotations=write(dataset, tmp_path))[0] == 0
    first, out = (annotations_of(tmp_path / x) for x in ("first.json", "out.json"))
    assert all(out[i]["segmentation"] == first[i]["segmentation"] for i in TARGETS)


@pytest.mark.slow
def test_a_model_with_one_head_has_no_agreement(run, tiny_cfg, tmp_path):
    _, weights = save_named_model(tiny_cfg(), tmp_path / "one_head")
    model = ["--opts", "MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads"]
    code, text = run("--masks-of", "both", *model, model=("", weights))
    assert code == 1 and "it can be student." in text
    assert run(*model, model=("", weights))[0] == 0
    made = annotations_of(tmp_path / "out.json")
    assert made_in(tmp_path / "out.json") == TARGETS
    assert not any("teacher_student_agreement" in x for x in made.values())


def test_wrong_command_lines_say_what_is_right(run, dataset, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("{}")
    for arguments, options, words in (
        ([], {"out": "there.json"}, "there.json exists; --force"),
        ([], {"annotations": "nowhere.json"}, "nowhere.json: cannot be read"),
        (["--rank", dataset.json_file], {}, "must be different paths"),
        (["--rank", there], {}, "there.json exists; --force"),
        (["--grabcut"], {}, "one of a trained model, --grabcut, or a model that takes boxes"),
    ):
        code, text = run(*arguments, **options)
        assert code == 1 and words in text, text
    assert there.read_text() == "{}"


def test_grabcut_needs_no_model(run, dataset, tmp_path):
    code, text = run("--grabcut", model=None)
    assert code == 0
    before = {x["id"]: x for x in dataset.data["annotations"]}
    after = annotations_of(tmp_path / "out.json")
    assert {i for i in after if after[i] != before[i]} == TARGETS
    coco = load_coco(tmp_path / "out.json")
    for i in TARGETS:
        assert after[i].keys() == before[i].keys() | {"segmentation", "area", "mask_source"}
        assert coco.annToMask(coco.anns[i]).sum() == after[i]["area"] > 0


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_one_error_is_said(run, dataset, tmp_path):
    run("--rank", tmp_path / "one.csv", out="one.json")
    # The second process has this image.
    image = tmp_path / "unseen.png"
    shutil.move(f"{dataset.image_root}/unseen.png", image)
    two = ["--rank", tmp_path / "two.csv", "--num-gpus", 2]
    code, text = run(*two, out="two.json")
    assert code == 1 and "unseen.png" in text and "--resume" in text and "Traceback" not in text
    shutil.move(image, f"{dataset.image_root}/unseen.png")
    assert run(*two, "--resume", out="two.json")[0] == 0
    for suffix in ("json", "csv"):
        assert (tmp_path / f"two.{suffix}").read_text() == (tmp_path / f"one.{suffix}").read_text()


def test_an_outline_in_another_form_stops_the_run(run, dataset, tmp_path):
    dataset.data["annotations"][0]["segmentation"] = [[4, 10], [40, 10], [40, 50]]
    code, text = run("--grabcut", model=None, annotations=write(dataset, tmp_path))
    assert code == 1 and "'segmentation' is" in text and not (tmp_path / "out.json").exists()


def test_nothing_that_was_drawn_is_replaced(run, dataset, tmp_path):
    """Crossing edges whose areas cancel out; a point; a line; no pixel in the image."""
    drawn = {
        101: [[4, 10, 40, 50, 40, 10, 4, 50]],
        104: [[4, 10]],
        105: [[4, 10, 40, 50]],
        106: [[900, 10, 940, 50, 940, 10]],
    }
    for row in dataset.data["annotations"]:
        row["segmentation"] = drawn.get(row["id"], row.get("segmentation"))
    assert run("--grabcut", model=None, annotations=write(dataset, tmp_path))[0] == 0
    after = annotations_of(tmp_path / "out.json")
    assert {i: after[i]["segmentation"] for i in drawn} == drawn
