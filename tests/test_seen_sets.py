"""The nested lists of seen classes in configs/seen_sets."""

import json
from pathlib import Path

from detectron2.data import MetadataCatalog

from teacher_student_mask import VOC_CLASSES, resolve_seen_classes

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "seen_sets"
SIZES = (20, 30, 40, 50, 60, 70)
# Contiguous ids of the classes that OPMask's setting "40" adds to the VOC classes.
OPMASK_IDS = {9, 10, 13, 23, 24, 25, 26, 36, 42, 47, 48, 49, 52, 54, 61, 63, 70, 74, 76, 79}


def test_the_lists_are_nested_begin_with_voc_and_contain_opmasks():
    classes = MetadataCatalog.get("coco_2017_val").thing_classes
    assert sorted(x.name for x in FOLDER.glob("*.json")) == [f"seen_{size}.json" for size in SIZES]
    names = {size: json.loads((FOLDER / f"seen_{size}.json").read_text()) for size in SIZES}
    assert names[20] == list(VOC_CLASSES)
    for size in SIZES:
        assert len(names[size]) == len(set(names[size])) == size
        ids = resolve_seen_classes(str(FOLDER / f"seen_{size}.json"), classes)
        assert {classes[i] for i in ids} == set(names[size])
    for smaller, larger in zip(SIZES, SIZES[1:]):
        assert names[larger][:smaller] == names[smaller]
    ids = resolve_seen_classes(str(FOLDER / "seen_40.json"), classes)
    assert set(ids) - set(resolve_seen_classes("voc", classes)) == OPMASK_IDS
