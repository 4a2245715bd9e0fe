"""The nested lists of seen classes in configs/seen_sets, and the program that wrote them."""

import json
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

import make_seen_sets
from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES, resolve_seen_classes

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "seen_sets"
SIZES = (20, 30, 40, 50, 60, 70)
# Contiguous ids of the classes that OPMask's setting "40" adds to the VOC classes, and their names.
OPMASK_IDS = {9, 10, 13, 23, 24, 25, 26, 36, 42, 47, 48, 49, 52, 54, 61, 63, 70, 74, 76, 79}
# fmt: off
OPMASK_NAMES = {
    "traffic light", "fire hydrant", "bench", "giraffe", "backpack", "umbrella", "handbag",
    "skateboard", "fork", "apple", "sandwich", "orange", "hot dog", "donut", "toilet", "laptop",
    "toaster", "clock", "scissors", "toothbrush",
}
# fmt: on


def path_of(size):
    return FOLDER / f"seen_{size}.json"


def names_of(size):
    return json.loads(path_of(size).read_text())


def coco_classes():
    return MetadataCatalog.get("coco_2017_val").thing_classes


def test_the_folder_holds_one_list_a_size():
    assert sorted(p.name for p in FOLDER.glob("*.json")) == [f"seen_{size}.json" for size in SIZES]


@pytest.mark.parametrize("size", SIZES)
def test_lists_have_their_size_and_are_accepted(size):
    names = names_of(size)
    assert len(names) == len(set(names)) == size
    ids = resolve_seen_classes(str(path_of(size)), coco_classes())
    assert {coco_classes()[i] for i in ids} == set(names)


def test_lists_are_nested_and_begin_with_voc():
    assert names_of(20) == list(VOC_CLASSES)
    for smaller, larger in zip(SIZES, SIZES[1:]):
        assert names_of(larger)[:smaller] == names_of(smaller)


def test_forty_classes_are_opmasks():
    assert set(names_of(40)) == set(VOC_CLASSES) | OPMASK_NAMES
    ids = resolve_seen_classes(str(path_of(40)), coco_classes())
    assert set(ids) - set(resolve_seen_classes("voc", coco_classes())) == OPMASK_IDS


def test_ten_classes_are_in_no_list():
    path = FOLDER / "always_unseen.txt"
    names = {coco_classes()[i] for i in resolve_seen_classes(str(path), coco_classes())}
    assert len(names) == 10
    assert names == set(NONVOC_CLASSES) - set(names_of(70))


def test_the_program_writes_these_files_byte_for_byte(tmp_path, capsys):
    assert make_seen_sets.main(["--output-dir", str(tmp_path / "new")]) == 0
    written = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert written == {p.name: p.read_bytes() for p in FOLDER.iterdir()}
    assert "toothbrush" in capsys.readouterr().out


def test_another_seed_is_another_draw_of_the_same_kind(tmp_path):
    make_seen_sets.main(["--output-dir", str(tmp_path), "--seed", "1"])
    other = {size: json.loads((tmp_path / f"seen_{size}.json").read_text()) for size in SIZES}
    assert set(other[40]) == set(names_of(40)) and other[20] == names_of(20)
    for size in (30, 50, 60, 70):
        assert len(other[size]) == size and set(other[size]) != set(names_of(size))
