"""
The corpus of broken annotation files and images, seen by the checks and by training.

Each is named by a sentence of the checks, or is not a problem. And each, without the checks, loads
and maps as it should or stops with an InputError that names the file.
"""

import json
import re
from pathlib import Path

import pytest
from bad_data import CASES, UNBROKEN, Case, make

from teacher_student_mask import (
    InputError,
    TeacherStudentDatasetMapper,
    load_partial_coco_json,
    resolve_seen_classes,
)
from teacher_student_mask.coco_json import check_coco

corpus = pytest.mark.parametrize("case", [pytest.param(x, id=x.name) for x in CASES])


def check(case, dataset):
    return check_coco(
        dataset.json_file,
        image_root=dataset.image_root,
        seen_classes=case.seen_classes,
        num_classes=case.num_classes,
        check_images=True,
    )


def test_the_unbroken_file_has_no_findings(make_tiny_coco):
    assert check(Case("unbroken"), make_tiny_coco()).findings == []
    assert len(CASES) >= 70


@corpus
def test_the_finding_is_one_sentence(case, make_tiny_coco):
    dataset = make(case, make_tiny_coco)
    report = check(case, dataset)
    found = [(x.severity, str(x)) for x in report.findings]
    if case.message is None:
        assert found == []
        return
    start = f"{dataset.json_file}: {case.message.replace('{root}', dataset.image_root)}"
    assert [severity for severity, text in found if text.startswith(start)] == [case.severity]
    # One broken thing is not told as several, unless it is.
    assert len(found) <= 2
    if case.severity == "error":
        with pytest.raises(InputError, match=re.escape(dataset.json_file)):
            report.raise_on_error()
    else:
        report.raise_on_error()


def load_and_map(case, dataset):
    """{image id: (number of objects, number of masks)}, all kept in a training example."""
    images = load_partial_coco_json(dataset.json_file, dataset.image_root, dataset.name)
    data = json.loads(Path(dataset.json_file).read_text())
    categories = sorted(data["categories"], key=lambda x: x["id"])
    mapper = TeacherStudentDatasetMapper(
        is_train=True,
        seen_classes=resolve_seen_classes(case.seen_classes, [x["name"] for x in categories]),
        augmentations=[],
        image_format="BGR",
        use_instance_mask=True,
    )
    counts = {}
    for image in images:
        instances = mapper(image)["instances"]
        counts[image["image_id"]] = (len(instances), int(instances.gt_has_mask.sum()))
    return counts


@corpus
def test_training_takes_it_or_stops_with_a_sentence(case, make_tiny_coco):
    dataset = make(case, make_tiny_coco)
    if not isinstance(case.trains, str):
        assert load_and_map(case, dataset) == UNBROKEN | case.trains
        return
    with pytest.raises(ValueError) as error:
        load_and_map(case, dataset)
    message = str(error.value)
    assert case.trains in message
    if not case.trains:
        # Whatever the sentence is, it has to say where.
        assert dataset.json_file in message or dataset.image_root in message
