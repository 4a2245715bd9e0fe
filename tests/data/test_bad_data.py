"""
The corpus of broken annotation files and images, seen by the checks and by training.

Each is named by one sentence of the checks, or is no problem. And each, without the checks, loads
and maps as it should or stops with a ValueError that names the file and the id.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bad_data import CASES, UNBROKEN, Case, make

from teacher_student_mask import (
    TeacherStudentDatasetMapper,
    load_partial_coco_json,
    resolve_seen_classes,
)
from teacher_student_mask.checks.annotation_checks import check_annotations

corpus = pytest.mark.parametrize("case", [pytest.param(x, id=x.name) for x in CASES])


def check(case, dataset, **options):
    return check_annotations(
        dataset.json_file,
        dataset.image_root,
        case.seen_classes,
        case.num_classes,
        check_images=True,
        **options,
    )


def test_the_unbroken_file_has_no_findings(make_tiny_coco):
    assert check(Case("unbroken"), make_tiny_coco()).findings == []
    assert len(CASES) >= 40


@corpus
def test_the_finding_is_one_sentence(case, make_tiny_coco):
    dataset = make(case, make_tiny_coco)
    report = check(case, dataset)
    found = [(x.severity, str(x)) for x in report.findings]
    if case.message is None:
        assert found == []
        return
    message = case.message.replace("{root}", dataset.image_root)
    pattern = re.escape(f"{dataset.json_file}: {message}").replace(r"\#", r"\d+")
    matching = [severity for severity, text in found if re.fullmatch(pattern, text)]
    assert matching == [case.severity], "\n".join(text for _, text in found)
    # One broken thing is not told as several, unless it is.
    assert len(found) <= 2
    if case.severity == "error":
        with pytest.raises(ValueError, match=re.escape(dataset.json_file)):
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
    words = case.trains
    if not isinstance(words, str):
        assert load_and_map(case, dataset) == UNBROKEN | words
        return
    with pytest.raises(ValueError) as error:
        load_and_map(case, dataset)
    message = str(error.value)
    assert words.replace("{json}", dataset.json_file) in message
    if not words:
        # Whatever the sentence is, it has to say where.
        assert dataset.json_file in message or dataset.image_root in message
        assert re.search(r"\b(image|annotation|category|content|annotations)\b", message)
