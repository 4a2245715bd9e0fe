"""The program that finishes a dataset, with a tiny model of random weights."""

import codecs
import contextlib
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from saved_model import TEACHER_STUDENT, save_model

import complete_masks as program
from completion import run as completion_run
from inference.setup import setup_cfg
from teacher_student_mask import (
    GTBoxInference,
    TeacherStudentDatasetMapper,
    register_partial_coco,
)
from teacher_student_mask.analysis.trained_model import load_model
from teacher_student_mask.data import load_partial_coco_json
from teacher_student_mask.engine import WriteError

# Without a mask in the json: three of the image 7, and the two of image 2; 107 is a crowd.
TARGETS = {104, 105, 106, 109, 110}


def forget_cats(data):
    for annotation in data["annotations"]:
        if annotation["id"] in (109, 110):
            annotation["segmentation"] = []


def write_oddly(dataset):
    """The json anew, a row a line, in a form that no writer of json would reproduce."""
    rows = [json.dumps(x) for x in dataset.data["annotations"]]
    rows[0] = rows[0].replace("2.0", "2.0e0").replace('"id":', '"caf\\u00e9":"\u00e9\\/" ,"id"\t:')
    data = {**dataset.data, "annotations": "ROWS"}
    text = json.dumps(data, indent=3).replace('"ROWS"', "[\n" + " ,\n".join(rows) + "\n]")
    with open(dataset.json_file, "w", encoding="utf-8", newline="") as f:
        f.write("\n\t" + text + "\r\n")


@pytest.fixture
def dataset(make_tiny_coco):
    dataset = make_tiny_coco(forget_cats)
    write_oddly(dataset)
    return dataset


@pytest.fixture
def run(dataset, tiny_cfg, tmp_path, capsys):
    """Return ``run(*arguments, opts=())``: exit code, stdout with stderr; output is out.json."""
    config_file, weights = save_model(tiny_cfg(opts=TEACHER_STUDENT), tmp_path / "model")

    def _run(*arguments, out="out.json", annotations=dataset.json_file, weights=weights):
        options = ["--config-file", config_file, "--weights", weights, "--annotations", annotations]
        options += ["--image-root", dataset.image_root, "--output", tmp_path / out]
        code = program.main([str(x) for x in [*options, *arguments]])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    _run.model = (config_file, weights)
    return _run


def exit_of(run, *arguments, **options):
    with pytest.raises(SystemExit) as error:
        run(*arguments, **options)
    return error.value.code


def annotations_of(path):
    return {x["id"]: x for x in json.loads(path.read_bytes())["annotations"]}


def load_coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_every_box_gets_a_mask_and_no_other_byte_changes(run, dataset, tmp_path):
    code, text = run()
    assert code == 0
    before = open(dataset.json_file, "rb").read().split(b"\n")
    after = (tmp_path / "out.json").read_bytes().split(b"\n")
    assert len(before) == len(after)
    changed = [json.loads(b.strip(b" ,")) for a, b in zip(before, after) if a != b]
    assert {x["id"] for x in changed} == TARGETS
    old = {x["id"]: x for x in dataset.data["annotations"]}
    made = {"segmentation", "area", "score", "mask_source", "teacher_student_agreement"}
    for annotation in changed:
        assert made <= annotation.keys() <= made | old[annotation["id"]].keys() | {"mask_fallback"}
        kept = old[annotation["id"]].keys() - made
        assert {k: annotation[k] for k in kept} == {k: old[annotation["id"]][k] for k in kept}
        assert annotation["mask_source"] == "model"
        assert 0 <= annotation["score"] <= 1 and 0 <= annotation["teacher_student_agreement"] <= 1
        assert ("mask_fallback" in annotation) == (annotation["score"] < 0.5)
    coco = load_coco(tmp_path / "out.json")
    for annotation in changed:
        mask = coco.annToMask(coco.anns[annotation["id"]])
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert mask.sum() == annotation["area"] > 0
        assert columns.min() >= x and columns.max() + 1 <= x + w
        assert rows.min() >= y and rows.max() + 1 <= y + h
    assert not (tmp_path / "out.json.parts").exists()
    total = next(x for x in text.splitlines() if x.startswith("all "))
    assert total.split()[1:4] == ["6", "0", "5"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["student", "teacher"])
def test_masks_are_those_of_inference_on_ground_truth_boxes(run, dataset, tiny_cfg, tmp_path, head):
    run("--masks-of", head)
    config_file, weights = run.model
    cfg = setup_cfg(config_file, weights, 0.0, ["TEST.MASK_HEAD", head, "TEST.GT_BOXES", True])
    model, _ = load_model(cfg)
    mapper = TeacherStudentDatasetMapper(cfg, is_train=False)
    made = annotations_of(tmp_path / "out.json")
    num_compared = 0
    for record in load_partial_coco_json(dataset.json_file, dataset.image_root, dataset.name):
        if record["image_id"] not in (7, 2):
            continue
        ids = [x["id"] for x in dataset.data["annotations"] if x["image_id"] == record["image_id"]]
        ids = [i for i in ids if i != 107]
        with torch.no_grad():
            (result,) = GTBoxInference(model)([mapper(record)])
        for i, mask in zip(ids, result["instances"].pred_masks.numpy(), strict=True):
            if i in TARGETS and "mask_fallback" not in made[i]:
                assert (mask_util.decode(made[i]["segmentation"]) == mask).all()
                num_compared += mask.any()
    assert num_compared >= 3


@pytest.mark.slow
def test_agreement_is_the_iou_of_the_masks_of_both_heads(run, tmp_path):
    of_head = {}
    for head in ("student", "teacher", "both"):
        run("--masks-of", head, out=f"{head}.json")
        of_head[head] = annotations_of(tmp_path / f"{head}.json")
    num_compared = 0
    for i in TARGETS:
        records = [x[i] for x in of_head.values()]
        assert len({x["teacher_student_agreement"] for x in records}) == 1
        if any("mask_fallback" in x for x in records[:2]):
            continue
        (iou,) = mask_util.iou([records[0]["segmentation"]], [records[1]["segmentation"]], [0])
        assert records[0]["teacher_student_agreement"] == pytest.approx(float(iou[0]), abs=1e-4)
        num_compared += 1
    assert num_compared >= 2


def interrupt_after(monkeypatch, num_images):
    """KeyboardInterrupt where the next image would begin. Returns the images that were begun."""
    complete, begun = completion_run.complete_image, []

    def interrupted(model, task, *args):
        begun.append(task.image)
        if len(begun) > num_images:
            raise KeyboardInterrupt
        return complete(model, task, *args)

    monkeypatch.setattr(completion_run, "complete_image", interrupted)
    return begun


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(run, tmp_path, monkeypatch, log):
    run("--rank", tmp_path / "whole.csv", out="whole.json")
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run("--rank", tmp_path / "out.csv")
        assert begun == [0, 1] and not (tmp_path / "out.json").exists()
    (part,) = (tmp_path / "out.json.parts").glob("rank-*")
    with open(part, "ab") as f:
        f.write(b'00000000 {"row": 9, "half a li')
    with monkeypatch.context() as patch:
        begun = interrupt_after(patch, 9)
        assert run("--rank", tmp_path / "out.csv")[0] == 0
        assert begun == [1]
    assert "1 of 2 images are finished" in log.text
    for suffix in (".json", ".csv"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (
            tmp_path / f"whole{suffix}"
        ).read_bytes()


@pytest.mark.parametrize("arguments", [(), ("--restart",)])
def test_a_run_whose_output_failed_goes_on_over_its_own_ranking(
    run, tmp_path, monkeypatch, arguments
):
    """The ranking is written first. Nobody else's file is replaced: one changed since stays."""
    ranking = tmp_path / "r.csv"

    def fail(*_):
        raise WriteError(28, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(completion_run, "write_completed", fail)
        assert run("--rank", ranking)[0] == 1
    written = ranking.read_bytes()
    ranking.write_bytes(written + b"my notes\n")
    assert exit_of(run, "--rank", ranking, *arguments) == 2
    assert ranking.read_bytes() == written + b"my notes\n"
    ranking.write_bytes(written)
    if arguments:
        # What has been thrown away leaves the ranking behind, in a second run that is interrupted.
        with monkeypatch.context() as patch:
            interrupt_after(patch, 0)
            with pytest.raises(KeyboardInterrupt):
                run("--rank", ranking, *arguments)
    assert run("--rank", ranking)[0] == 0
    assert ranking.read_bytes() == written and (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_going_on_with_something_else_is_refused(run, dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run()
    changed = str(tmp_path / "changed.json")
    with open(dataset.json_file) as f:
        open(changed, "w").write(f.read() + " ")
    weights = str(tmp_path / "others.pth")
    state = torch.load(run.model[1], weights_only=True)
    state["model"]["roi_heads.mask_head.predictor.bias"] += 1
    torch.save(state, weights)
    for arguments, options, difference in (
        ([], {"annotations": changed}, "annotations: sha256"),
        ([], {"weights": weights}, "weights: sha256"),
        (["--masks-of", "teacher"], {}, "--masks-of: both before, now teacher"),
        (["--opts", "INPUT.MIN_SIZE_TEST", "32"], {}, "INPUT.MIN_SIZE_TEST 64 before, now INPUT"),
    ):
        code, text = run(*arguments, **options)
        assert code == 1 and difference in text and "--restart" in text
    assert run("--masks-of", "teacher", "--restart")[0] == 0


@pytest.mark.slow
def test_model_masks_stay_unless_they_are_to_be_made_again(run, tmp_path):
    run("--masks-of", "teacher")
    first = tmp_path / "out.json"
    code, text = run(annotations=first, out="second.json")
    assert code == 0 and (tmp_path / "second.json").read_bytes() == first.read_bytes()
    assert next(x for x in text.splitlines() if x.startswith("all ")).split()[1:4] == [
        "6",
        "5",
        "0",
    ]
    run("--masks-of", "student", "--redo-model-masks", annotations=first, out="redone.json")
    run("--masks-of", "student", out="student.json")
    redone, student = (annotations_of(tmp_path / f"{x}.json") for x in ("redone", "student"))
    for i, annotation in redone.items():
        assert {k: v for k, v in annotation.items() if v is not None} == {
            k: v for k, v in student[i].items() if v is not None
        }


@pytest.mark.slow
def test_a_broken_image_stops_the_run_or_is_left_out(run, dataset, tmp_path):
    image = f"{dataset.image_root}/mixed.png"
    shutil.move(image, tmp_path / "aside.png")
    code, text = run()
    assert code == 1 and "mixed.png" in text and "--skip-broken-images" in text
    assert not (tmp_path / "out.json").exists()
    code, text = run("--skip-broken-images")
    assert code == 0 and "1 images were left out:" in text
    # Bug: the name stood there twice.
    (line,) = [x for x in text.splitlines() if x.startswith(f"  {image} (image id 7): ")]
    assert line.count("(image id 7)") == 1
    made = annotations_of(tmp_path / "out.json")
    assert {i for i, x in made.items() if "score" in x} == {109, 110}
    shutil.move(tmp_path / "aside.png", image)
    run("--force")
    assert {i for i, x in annotations_of(tmp_path / "out.json").items() if "score" in x} == TARGETS


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("category_id", 5, r"annotation number 4 \(id 104\): 'category_id' is 5; .*3, 17, 90"),
        ("image_id", 99, "'image_id' is 99"),
        ("bbox", [1, 2, 3], r"'bbox' is \[1, 2, 3\]; .*numbers \[x, y, width, height\]"),
        ("bbox", [1, 2, float("nan"), 3], "'bbox' is"),
    ],
)
def test_objects_that_cannot_be_completed_are_errors(run, dataset, tmp_path, field, value, message):
    dataset.data["annotations"][3][field] = value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(dataset.data))
    code, text = run(annotations=path)
    assert code == 1
    assert re.search(message, text) and str(path) in text


def test_boxes_without_area_keep_no_mask_and_are_counted_and_ranked_first(run, dataset, tmp_path):
    dataset.data["annotations"][3]["bbox"] = [5, 5, 0, 9]
    dataset.data["annotations"][8]["bbox"] = [500, 5, 5, 9]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(dataset.data))
    code, text = run("--rank", tmp_path / "r.csv", annotations=path)
    assert code == 0 and "no mask: the box has no area inside the image      2" in text
    made = annotations_of(tmp_path / "out.json")
    assert made[104] == dataset.data["annotations"][3]
    assert made[109] == dataset.data["annotations"][8]
    with open(tmp_path / "r.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(x["annotation_id"]) for x in rows[:2]] == [104, 109]
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


def test_names_that_utf8_cannot_say_are_ranked_and_said(run, dataset, tmp_path, monkeypatch):
    """
    Bug: a byte that is no UTF-8 in a file name, in json a lone surrogate, stopped the program when
    all images were done, with "'utf-8' codec can't encode character" and no word of the file.
    """
    name = os.fsdecode(b"uns\xe9en.png")
    root = Path(dataset.image_root)
    (root / "unseen.png").rename(root / name)
    dataset.data["images"][1]["file_name"] = name
    dataset.data["images"][0]["file_name"] = name + "x"
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(dataset.data))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", stdout)
    code, _ = run("--rank", tmp_path / "r.csv", "--skip-broken-images", annotations=path)
    stdout.flush()
    assert code == 0
    assert "uns\\udce9en.pngx (image id 7): " in stdout.buffer.getvalue().decode()
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text("utf-8").splitlines()))
    assert {x["file_name"] for x in rows} == {"uns\\udce9en.png"} and len(rows) == 2
    made = annotations_of(tmp_path / "out.json")
    assert {i for i, x in made.items() if "score" in x} == {109, 110}


def test_a_name_that_no_file_can_have_is_said_with_the_image_and_the_json(run, dataset, tmp_path):
    """Bug: all that was said was "embedded null byte"."""
    dataset.data["images"][1]["file_name"] = "un\0seen.png"
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(dataset.data))
    code, text = run(annotations=path)
    where = f"'{dataset.image_root}/un\\x00seen.png' (image id 2)"
    assert code == 1 and f"error: {where}: the image cannot be used: embedded null byte; " in text
    assert f"correct 'file_name' in {path}." in text


def test_a_byte_order_mark_is_left_out_so_that_pycocotools_reads_the_output(run, dataset, tmp_path):
    """Bug: such a json was refused, with a text that did not say why."""
    run(out="without.json")
    path = tmp_path / "marked.json"
    path.write_bytes(codecs.BOM_UTF8 + Path(dataset.json_file).read_bytes())
    with pytest.raises(ValueError, match="BOM"):
        load_coco(path)
    assert run(annotations=path)[0] == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "without.json").read_bytes()
    assert TARGETS <= load_coco(tmp_path / "out.json").anns.keys()


@pytest.mark.parametrize("text", ["[]", '"score": 1, "score": 2, "id": 1'])
def test_an_input_that_is_changed_during_the_run_is_named(
    run, dataset, tmp_path, monkeypatch, text
):
    """Bug: what was said of a row that had become another one did not name the file."""
    path = Path(dataset.json_file)
    collect = completion_run.collect_results

    def change_and_collect(*args):
        data = {**dataset.data, "annotations": ["ROW"] * len(dataset.data["annotations"])}
        row = text if text == "[]" else f"{{{text}}}"
        path.write_text(json.dumps(data).replace('"ROW"', row))
        return collect(*args)

    monkeypatch.setattr(completion_run, "collect_results", change_and_collect)
    code, said = run()
    assert code == 1 and not (tmp_path / "out.json").exists()
    assert f"error: {path} was changed during the run; begin anew (--restart).\n" in said


@pytest.mark.slow
def test_nothing_to_do_is_a_copy(run, dataset, tmp_path):
    for data in (
        {"images": [], "annotations": [], "categories": dataset.data["categories"]},
        {**dataset.data, "annotations": dataset.data["annotations"][:3]},
    ):
        path = tmp_path / "complete.json"
        path.write_text(json.dumps(data))
        assert run("--force", annotations=path)[0] == 0
        assert (tmp_path / "out.json").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_polygons_load_in_pycocotools_and_have_their_area(run, tmp_path):
    assert run("--format", "polygon")[0] == 0
    coco = load_coco(tmp_path / "out.json")
    for i in TARGETS:
        assert coco.annToMask(coco.anns[i]).sum() == coco.anns[i]["area"]
    kinds = {type(coco.anns[i]["segmentation"]) for i in TARGETS}
    assert list in kinds


@pytest.mark.slow
def test_a_model_with_one_head_has_no_agreement(run, tiny_cfg, tmp_path, dataset, capsys):
    config_file, weights = save_model(tiny_cfg(), tmp_path / "one_head")
    options = ["--config-file", config_file, "--weights", weights, "--image-root"]
    options += [dataset.image_root, "--annotations", dataset.json_file, "--output"]
    options += [str(tmp_path / "one.json")]
    assert program.main([*options, "--masks-of", "both"]) == 1
    assert "has the head 'student' alone" in capsys.readouterr().err
    assert program.main(options) == 0
    made = annotations_of(tmp_path / "one.json")
    assert all("score" in made[i] and "teacher_student_agreement" not in made[i] for i in TARGETS)


def test_wrong_command_lines_say_what_is_right(run, dataset, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    for arguments, options in (
        ([], {"out": "there.json"}),
        ([], {"annotations": "nowhere.json"}),
        (["--num-gpus", "0"], {}),
        (["--num-machines", "2"], {}),
        (["--machine-rank", "1"], {}),
        (["--rank", dataset.json_file], {}),
    ):
        assert exit_of(run, *arguments, **options) == 2


def test_a_ranking_that_would_replace_something_or_be_lost_is_refused(
    run, dataset, tmp_path, capsys
):
    """Bugs: it replaced any file; that of --output was lost, and said to be there."""
    there = tmp_path / "r.csv"
    there.write_text("notes")
    (tmp_path / "link").symlink_to(tmp_path)
    for ranking, reason in (
        (there, "exists; --force replaces it."),
        (dataset.json_file, "the input itself; it is never replaced."),
        (tmp_path / "out.json", "the file of --output too; name another one."),
        (tmp_path / "link/out.json", "the file of --output too; name another one."),
        (tmp_path / "out.json.parts/r.csv", "which is removed at the end; name another folder."),
        (tmp_path / "out.json.parts", "which is removed at the end; name another folder."),
    ):
        assert exit_of(run, "--rank", ranking) == 2
        text = capsys.readouterr().err
        assert f"--rank {ranking}: " in text and text.endswith(f"{reason}\n")
    assert there.read_text() == "notes" and not (tmp_path / "out.json").exists()
    assert run("--rank", there, "--force")[0] == 0
    assert there.read_text().startswith("rank,need,")


def test_another_order_of_classes_is_refused(run, dataset, tmp_path, tiny_cfg):
    data = dataset.data
    data["categories"][0]["name"], data["categories"][1]["name"] = "ant", "ship"
    path = tmp_path / "swapped.json"
    path.write_text(json.dumps(data))
    opts = ["--opts", "DATASETS.TRAIN", f"('{dataset.name}',)"]
    code, text = run(*opts, annotations=path)
    assert code == 1 and "class 0" in text and "'ship'" in text and "'ant'" in text
    data["categories"].append({"id": 91, "name": "dog"})
    path.write_text(json.dumps(data))
    code, text = run(annotations=path)
    assert code == 1 and "NUM_CLASSES" in text


@pytest.mark.slow
def test_two_heads_that_disagree_are_told_of(run, log):
    """Of random weights the heads have nothing in common."""
    run()
    assert "Teacher and student agree little" in log.text


@pytest.mark.slow
def test_the_output_trains_and_its_made_masks_are_external(run, dataset, tiny_cfg, tmp_path):
    """What people drew teaches the teacher; what a model made never does."""
    run()
    name = f"{dataset.name}_completed"
    register_partial_coco(name, str(tmp_path / "out.json"), dataset.image_root)
    try:
        cfg = tiny_cfg(opts=TEACHER_STUDENT)
        cfg.DATASETS.TRAIN, cfg.DATASETS.SEEN_CLASSES = (name,), "all"
        mapper = TeacherStudentDatasetMapper(cfg, is_train=True)
        examples = {x["image_id"]: mapper(x)["instances"] for x in DatasetCatalog.get(name)}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    # 101, 102, 103 and 108 of people, 104 to 106 made; the crowd 107 is left out.
    assert examples[7].gt_has_mask.tolist() == [True] * 3 + [False] * 3 + [True]
    assert examples[7].gt_has_model_mask.tolist() == [False] * 3 + [True] * 3 + [False]
    assert not examples[2].gt_has_mask.any() and examples[2].gt_has_model_mask.all()
    assert examples[30].gt_has_mask.all() and not examples[30].gt_has_model_mask.any()
