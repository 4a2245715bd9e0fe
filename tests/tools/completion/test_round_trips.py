"""
Completed jsons in the programs of others, each in an interpreter of its own.

FiftyOne asks for older versions of OpenCV and Plotly than this project, and Label Studio's SDK is
large, so neither is installed for the tests. FIFTYONE_PYTHON and LABEL_STUDIO_PYTHON name an
interpreter that has fiftyone (with pycocotools), or label-studio-sdk. FiftyOne's reader of COCO is
called without its database.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from saved_model import TEACHER_STUDENT, save_model

import complete_masks

pytestmark = pytest.mark.slow

READ_WITH_FIFTYONE = """
import json, sys
import fiftyone.utils.coco as coco

classes = {x["id"]: x["name"] for x in json.load(open(sys.argv[1]))["categories"]}
_, _, _, images, annotations = coco.load_coco_detection_annotations(sys.argv[1], extra_attrs=True)
found = {}
for image_id, objects in annotations.items():
    size = images[image_id]["width"], images[image_id]["height"]
    for x in objects:
        detection = x.to_detection(size, classes, load_segmentation=True)
        fields = {k: detection[k] for k in sys.argv[2].split(",") if detection.has_field(k)}
        area = int(detection.mask.sum())
        found[x.id] = [detection.label, area, {"score": detection.confidence, **fields}]
print(json.dumps(found))
"""

CONVERT_FOR_LABEL_STUDIO = """
import json, sys
from label_studio_sdk.converter.imports.coco import convert_coco_to_ls

convert_coco_to_ls(sys.argv[1], sys.argv[2], to_name="image", from_name="label",
                   out_type="annotations", image_root_url="/data/")
print(open(sys.argv[2]).read())
"""

# Whose answer the tests compare; other masks of the json are left out where a program lacks RLE.
MADE = {104, 105, 106, 109, 110}


def forget_some_masks(data):
    for annotation in data["annotations"]:
        if annotation["id"] in (109, 110):
            annotation["segmentation"] = []


@pytest.fixture
def complete(make_tiny_coco, tiny_cfg, tmp_path):
    """Return ``complete(format, change)``: path and content of a completed json."""

    def _complete(segmentation_format, change=forget_some_masks):
        dataset = make_tiny_coco(change)
        config_file, weights = save_model(tiny_cfg(opts=TEACHER_STUDENT), tmp_path / "model")
        out = tmp_path / "out.json"
        options = ["--config-file", config_file, "--weights", weights, "--format"]
        options += [segmentation_format, "--annotations", dataset.json_file]
        options += ["--image-root", dataset.image_root, "--output", str(out)]
        assert complete_masks.main(options) == 0
        return out, json.loads(out.read_text())

    return _complete


def ask(variable, program, *arguments):
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter")
    command = [python, "-c", program, *map(str, arguments)]
    # Without what is on the path for the interpreter of the tests.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("segmentation_format", ["rle", "polygon"])
def test_fiftyone_reads_masks_scores_and_agreement(complete, segmentation_format):
    path, data = complete(segmentation_format)
    fields = ["mask_source", "teacher_student_agreement"]
    found = ask("FIFTYONE_PYTHON", READ_WITH_FIFTYONE, path, ",".join(fields))
    names = {x["id"]: x["name"] for x in data["categories"]}
    for annotation in data["annotations"]:
        if annotation["id"] in MADE:
            label, area, values = found[str(annotation["id"])]
            assert label == names[annotation["category_id"]]
            # All of the mask is in the box, to which FiftyOne crops it.
            assert area == annotation["area"]
            # Its name for the score is confidence.
            assert values == {k: annotation[k] for k in ("score", *fields)}


def only_polygons(data):
    """Label Studio's converter has no RLE: neither of a person nor of a crowd."""
    forget_some_masks(data)
    data["annotations"] = [x for x in data["annotations"] if x["id"] not in (102, 103, 107)]


def test_label_studio_converts_polygons(complete, tmp_path):
    path, data = complete("polygon", only_polygons)
    # A hole, for which the program writes an RLE, is no polygon.
    rows = [x for x in data["annotations"] if isinstance(x["segmentation"], list)]
    assert {x["id"] for x in rows} & MADE
    path.write_text(json.dumps({**data, "annotations": rows}))
    tasks = ask("LABEL_STUDIO_PYTHON", CONVERT_FOR_LABEL_STUDIO, path, tmp_path / "tasks.json")
    images = {x["id"]: x for x in data["images"]}
    expected = sorted(
        (np.array(p).reshape(-1, 2) / [images[x["image_id"]][k] for k in ("width", "height")] * 100)
        .round(6)
        .tolist()
        for x in rows
        for p in x["segmentation"]
    )
    found = sorted(
        np.round(item["value"]["points"], 6).tolist()
        for task in tasks
        for item in task["annotations"][0]["result"]
        if item["type"] == "polygonlabels"
    )
    assert found == expected


def test_the_programs_are_asked_in_their_own_interpreter(monkeypatch):
    monkeypatch.setenv("SOME_PYTHON", sys.executable)
    assert ask("SOME_PYTHON", "import sys; print('[1, 2]')") == [1, 2]
    monkeypatch.delenv("SOME_PYTHON")
    with pytest.raises(pytest.skip.Exception, match="SOME_PYTHON"):
        ask("SOME_PYTHON", "")
