"""tools/grabcut_masks.py: who gets a mask, the same masks however they are made, going on."""

import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO

import grabcut_jobs
import grabcut_masks as program
from teacher_student_mask.modeling import grab_cut

UNSEEN = 17


def add_more(data):
    """A crowd of the unseen class, a mask of a model, a mask of no pixel."""
    crowd = {"size": [64, 64], "counts": [100, 300, 3696]}
    row = {"id": 200, "image_id": 7, "category_id": UNSEEN, "iscrowd": 1, "area": 300}
    data["annotations"].append(row | {"bbox": [1, 2, 30, 20], "segmentation": crowd})
    by_id = {x["id"]: x for x in data["annotations"]}
    by_id[111]["mask_source"] = "model"
    by_id[112]["segmentation"] = [[70, 70, 70, 70, 70, 70]]


@pytest.fixture
def run(make_tiny_coco, tmp_path, capsys):
    """Return ``run(*options, change)``: exit code, content of OUT.json or None, what was said."""
    dataset = make_tiny_coco(add_more)

    def run(*options, name="out.json", json_file=dataset.json_file):
        out = tmp_path / name
        arguments = [json_file, out, "--image-root", dataset.image_root]
        arguments += ["--seen-classes", dataset.seen_classes, *options]
        code = program.main([str(x) for x in arguments])
        said = capsys.readouterr().out
        return code, json.loads(out.read_text()) if out.exists() else None, said

    run.dataset, run.cache = dataset, tmp_path / "out.json.cache"
    return run


def test_objects_without_a_human_mask_get_grabcuts(run):
    code, data, said = run("--workers", 1)
    assert code == 0
    file_names = {x["id"]: x["file_name"] for x in data["images"]}
    changed = []
    for before, after in zip(run.dataset.data["annotations"], data["annotations"]):
        if before == after:
            continue
        changed.append(after["id"])
        rest = {"segmentation", "area", "mask_source"}
        assert {k: x for k, x in before.items() if k not in rest} == {
            k: x for k, x in after.items() if k not in rest
        }
        if after["id"] == 200:
            assert "segmentation" not in after and "mask_source" not in after
            continue
        assert after["mask_source"] == "model"
        x, y, w, h = after["bbox"]
        path = f"{run.dataset.image_root}/{file_names[after['image_id']]}"
        expected = grab_cut(np.ascontiguousarray(read_image(path, "BGR")), (x, y, x + w, y + h))
        assert np.array_equal(mask_util.decode(after["segmentation"]), expected)
        assert after["area"] == expected.sum() > 0
    # No mask: 104-106; unseen: 108-110; of a model: 111; without a pixel: 112; the crowd.
    assert changed == [104, 105, 106, 108, 109, 110, 111, 112, 200]
    assert "Written to" in said and "8 GrabCut masks" in said and "1 crowds" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    # Objects, kept, GrabCut.
    assert rows["cat"][:4] == ["unseen", "3", "0", "3"] and rows["all"][:3] == ["11", "3", "8"]
    assert not run.cache.exists()


def test_pycocotools_reads_the_result(run, tmp_path):
    run("--workers", 1)
    coco = COCO(str(tmp_path / "out.json"))
    for annotation in coco.loadAnns(coco.getAnnIds(iscrowd=False)):
        assert coco.annToMask(annotation).sum() > 0


def test_masks_of_unseen_objects_are_never_looked_at(run, tmp_path):
    _, expected, _ = run("--workers", 1)
    rng = np.random.default_rng(0)
    data = json.loads(json.dumps(run.dataset.data))
    for annotation in data["annotations"]:
        if annotation["category_id"] == UNSEEN and not annotation["iscrowd"]:
            annotation.update(segmentation=[(rng.random(10) * 60).tolist()], area=1.0)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(data))
    _, actual, _ = run("--workers", 1, name="other.json", json_file=changed)
    assert actual == expected


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(run, tmp_path):
    for workers in (1, 2, 3):
        code, _, _ = run("--workers", workers, name=f"{workers}.json")
        assert code == 0
    contents = [(tmp_path / f"{workers}.json").read_bytes() for workers in (1, 2, 3)]
    assert contents[0] == contents[1] == contents[2]


def test_a_run_that_was_stopped_goes_on(run, monkeypatch):
    _, expected, _ = run("--workers", 1, name="whole.json")
    make_masks, made = grabcut_jobs.make_masks, []

    def stop_at_the_second(job):
        made.append(job.path)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make_masks(job)

    monkeypatch.setattr(grabcut_jobs, "make_masks", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run("--workers", 1)
    # As if the machine had died in the middle of a line.
    with run.cache.open("a") as f:
        f.write('{"104-00')
    code, data, said = run("--workers", 1)
    assert code == 0 and data == expected
    assert "Going on: 1 of 3 images are done." in said
    assert len(made) == 4 and made[0] not in made[1:]


def test_another_box_is_not_taken_from_the_cache(run, monkeypatch):
    make_masks, made = grabcut_jobs.make_masks, []
    monkeypatch.setattr(
        grabcut_jobs, "make_masks", lambda job: made.append(job.path) or make_masks(job)
    )
    job = grabcut_jobs.Job(
        path=f"{run.dataset.image_root}/unseen.png",
        size=(64, 80),
        keys=[grabcut_jobs.key_of({"id": 1, "bbox": [6, 8, 30, 40]}, "unseen.png")],
        boxes=[[6, 8, 30, 40]],
    )
    moved = {"id": 1, "bbox": [7, 8, 30, 40]}
    other = grabcut_jobs.key_of(moved, "unseen.png")
    cache = str(run.cache)
    for x in (job, job, grabcut_jobs.Job(job.path, job.size, [other], [moved["bbox"]])):
        masks, problems = grabcut_jobs.run_cached([x], cache, 1)
        assert problems == [] and set(masks) >= set(x.keys)
    assert len(made) == 2


def test_a_cache_of_another_version_is_not_used(run):
    run.cache.write_text('{"version": 0, "opencv": "1"}\n')
    code, data, said = run("--workers", 1)
    assert code == 1 and data is None and "of another version" in said and "remove it" in said


@pytest.mark.parametrize("kind, message", [("missing", "no such file"), ("text", "cannot ident")])
def test_images_that_cannot_be_used_are_named(run, kind, message):
    path = f"{run.dataset.image_root}/unseen.png"
    if kind == "missing":
        os.unlink(path)
    else:
        with open(path, "w") as f:
            f.write("no image")
    code, data, said = run("--workers", 1)
    assert code == 1 and data is None
    assert "unseen.png" in said and message in said and "Not written: 1 images" in said


def test_an_image_of_another_size_is_named(run, tmp_path):
    data = json.loads(json.dumps(run.dataset.data))
    data["images"][1]["height"] = 65
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(data))
    code, content, said = run("--workers", 1, json_file=changed)
    assert code == 1 and content is None and "(64, 80) pixels" in said and "(65, 80)" in said


def test_a_wrong_command_line_ends_it(run, capsys):
    for options, message in (
        (["--workers", 0], "--workers must be 1 or more, got 0"),
        (["--image-root", "/no/such"], "--image-root /no/such: no such folder"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*options)
        assert end.value.code == 2 and message in capsys.readouterr().err
