"""The COCO loader: no box gets lost, errors say where, clean files load as in Detectron2."""

import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from teacher_student_mask import load_partial_coco_json


def by_image_id(dicts):
    return {x["image_id"]: x for x in dicts}


def test_registration_reads_when_first_used(tiny_coco):
    metadata = MetadataCatalog.get(tiny_coco.name)
    assert (metadata.json_file, metadata.image_root) == (tiny_coco.json_file, tiny_coco.image_root)
    assert metadata.evaluator_type == "coco"
    assert "thing_classes" not in metadata.as_dict()
    for _ in range(2):
        DatasetCatalog.get(tiny_coco.name)
        assert metadata.thing_classes == ["ant", "cat", "ship"]
        assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 17: 1, 90: 2}


def test_names_that_a_script_has_set_need_no_ids(tiny_coco):
    MetadataCatalog.get(tiny_coco.name).thing_classes = ["ant", "cat", "ship"]
    dicts = DatasetCatalog.get(tiny_coco.name)
    assert by_image_id(dicts)[7]["annotations"][1]["category_id"] == 2


def test_images_come_in_the_order_of_their_ids_with_all_their_boxes(make_tiny_coco):
    whole = make_tiny_coco(lambda data: data["annotations"][0].update(bbox=[2, 2, 20, 16]))
    dicts = DatasetCatalog.get(whole.name)
    assert [x["image_id"] for x in dicts] == [2, 5, 7, 30]
    assert [len(x["annotations"]) for x in dicts] == [2, 0, 8, 2]
    assert [(x["height"], x["width"]) for x in dicts] == [(64, 80), (64, 64), (64, 64), (80, 64)]
    assert all(os.path.isfile(x["file_name"]) for x in dicts)
    mixed = by_image_id(dicts)[7]["annotations"]
    assert [x["category_id"] for x in mixed] == [0, 2, 0, 2, 0, 2, 0, 1]
    assert [x["iscrowd"] for x in mixed] == [0] * 6 + [1, 0]
    assert mixed[0]["bbox"] == [2, 2, 20, 16] and mixed[0]["bbox_mode"] == BoxMode.XYWH_ABS
    # Bug: a transform left boxes of whole numbers whole.
    assert {type(x) for annotation in mixed for x in annotation["bbox"]} == {float}


def test_segmentation_is_there_only_where_the_json_holds_one(tiny_coco):
    mixed = by_image_id(load_partial_coco_json(tiny_coco.json_file, "images"))[7]["annotations"]
    # Polygon, two RLEs, no key, [], null, crowd, polygon.
    present = [True, True, True, False, False, False, True, True]
    assert ["segmentation" in x for x in mixed] == present
    assert mixed[0]["segmentation"] == tiny_coco.data["annotations"][0]["segmentation"]
    assert mixed[2]["segmentation"] == tiny_coco.data["annotations"][2]["segmentation"]


@pytest.fixture
def dataset_names():
    names = ["loaded_by_detectron2", "loaded_by_us"]
    yield names
    for name in names:
        MetadataCatalog.pop(name, None)


def test_a_clean_json_loads_as_in_detectron2(make_tiny_coco, dataset_names):
    def keep_polygons(data):
        data["annotations"] = [
            x for x in data["annotations"] if isinstance(x.get("segmentation"), list)
        ]
        data["annotations"] = [x for x in data["annotations"] if x["segmentation"]]

    dataset = make_tiny_coco(keep_polygons)
    first, second = dataset_names
    expected = load_coco_json(dataset.json_file, dataset.image_root, first)
    assert load_partial_coco_json(dataset.json_file, dataset.image_root, second) == expected
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get(first).get(key) == MetadataCatalog.get(second).get(key)
    assert sum(len(x["annotations"]) for x in expected) == 6
