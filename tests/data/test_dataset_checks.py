"""The checks of all datasets before a training or an evaluation starts."""

import logging
from pathlib import Path

import pytest
from bad_data import complete, entry, forget_masks, start_in_two_processes
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser

import train_net
from teacher_student_mask import add_teacher_student_mask_config, data
from teacher_student_mask.errors import InputError

SEEN = "ant, ship"
BOXES_ALONE = ["MODEL.MASK_ON", False]
forget_all = forget_masks(3, 17, 90)


def check_datasets(train, test, seen_classes, num_classes=None, opts=()):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_list(["MODEL.MASK_ON", True, "DATASETS.SEEN_CLASSES", seen_classes, *opts])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    data.check_datasets(cfg, num_classes)


@pytest.fixture
def register(make_tiny_coco):
    """Return ``register(change, how)``: a tiny dataset that another function reads."""
    names = []

    def make_one(change=None, how=register_coco_instances, **metadata):
        tiny = make_tiny_coco(change)
        name = f"{tiny.name}_{len(names)}"
        names.append(name)
        how(name, metadata, tiny.json_file, tiny.image_root)
        tiny.name = name
        return tiny

    yield make_one
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def by_unknown_function(name, metadata, json_file, image_root):
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, **metadata)


def change(key, entry_id, **fields):
    def change_one(data):
        complete(data)
        entry(key, entry_id, **fields)(data)

    return change_one


def test_a_good_dataset_is_passed_and_its_classes_are_counted(make_tiny_coco, log):
    train, test = make_tiny_coco(), make_tiny_coco(complete)
    check_datasets((train.name,), (test.name,), SEEN, num_classes=3)
    messages = [x.getMessage() for x in log.records]
    (table,) = [x for x in messages if "boxes only" in x]
    assert table.startswith(f"{train.json_file}: 4 images, 12 annotations, ")
    # Class, split, objects, human and model masks, boxes only, crowd, rectangles.
    rows = [line.split() for line in table.splitlines()]
    assert ["ant", "seen", "4", "3", "0", "1", "1", "0"] in rows
    assert ["cat", "unseen", "3", "3", "0", "0", "0", "0"] in rows
    assert rows[-1] == ["total", "11", "8", "0", "3", "1", "0"]
    # Ants, cats and ships, by hand: 3, 3 and 2 human masks.
    assert [x.getMessage() for x in log.records if x.levelno >= logging.WARNING] == [
        f"{train.json_file}: 3 of 8 human masks are not used because SEEN_CLASSES does not have "
        'their classes ("all" uses every mask): cat 3.',
        f"{train.json_file}: Classes with fewer than 5 objects: ant 4, cat 3, ship 4.",
    ]


def test_rectangles_that_are_not_used_are_counted(make_tiny_coco, log):
    def export_box(data):
        complete(data)
        x, y, w, h = data["annotations"][10]["bbox"]
        data["annotations"][10]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    dataset = make_tiny_coco(export_box)
    check_datasets((dataset.name,), (), "all", opts=["INPUT.RECTANGLE_AS_BOX_ONLY", True])
    assert "1 human masks are not used because they are the rectangles of" in log.text


def test_images_that_training_and_test_sets_share(make_tiny_coco, log):
    train, test = make_tiny_coco(complete), make_tiny_coco(complete)
    check_datasets((train.name,), (test.name,), "all")
    assert "share" not in log.text  # the same names in two folders
    check_datasets((train.name,), (train.name,), "all")
    assert "DATASETS.TRAIN and DATASETS.TEST share 4 images, " in log.text


def test_all_findings_of_all_files_are_logged_and_the_first_error_is_raised(make_tiny_coco, log):
    train = make_tiny_coco(change("annotations", 111, bbox=[1, 2, 0, 4]))
    test = make_tiny_coco(
        lambda data: (
            change("annotations", 111, area=-1)(data),
            change("annotations", 112, iscrowd=7)(data),
        )
    )
    with pytest.raises(ValueError, match=f"{test.json_file}: annotation 111: 'area' is -1"):
        check_datasets((train.name,), (test.name,), SEEN)
    found = [
        (x.levelname, x.getMessage()) for x in log.records if "annotation 11" in x.getMessage()
    ]
    assert [level for level, _ in found] == ["WARNING", "ERROR", "ERROR"]
    assert "'bbox' is [1, 2, 0, 4]" in found[0][1] and "'area' is -1" in found[1][1]


def test_a_test_set_needs_masks_and_areas_now_and_not_when_training_ends(make_tiny_coco):
    dataset = make_tiny_coco()
    check_datasets((dataset.name,), (), SEEN)
    message = f"{dataset.json_file}: annotation 104: 'segmentation' is missing; mask AP needs"
    with pytest.raises(ValueError, match=message):
        check_datasets((), (dataset.name,), SEEN)
    check_datasets((), (dataset.name,), SEEN, opts=BOXES_ALONE)


def test_a_test_set_without_annotations_can_be_predicted_on(register):
    check_datasets((), (register(lambda data: data.pop("annotations")).name,), SEEN)
    with pytest.raises(InputError, match="'images' is missing"):
        check_datasets((), (register(lambda data: data.clear()).name,), SEEN)


def test_a_list_is_no_dataset_and_a_number_no_name(make_tiny_coco):
    with pytest.raises(InputError, match="'file_name' is 5"):
        check_datasets((), (make_tiny_coco(change("images", 7, file_name=5)).name,), SEEN)
    dataset = make_tiny_coco()
    Path(dataset.json_file).write_text("[]")
    with pytest.raises(InputError, match="'content' is a list"):
        check_datasets((dataset.name,), (), SEEN, num_classes=3)


def test_detectron2s_own_loader_is_checked_too(register):
    dataset = register(change("annotations", 111, bbox=[1, 2, 3]))
    with pytest.raises(ValueError, match="annotation 111: 'bbox' is \\[1, 2, 3\\]"):
        check_datasets((dataset.name,), (), SEEN)
    dataset = register(change("annotations", 111, id=...))
    with pytest.raises(ValueError, match="annotation number 10: 'id' is missing"):
        check_datasets((dataset.name,), (), SEEN)  # pycocotools would stop with a KeyError


def test_objects_of_unknown_images_stop_whoever_reads_them(register, make_tiny_coco):
    unknown = change("annotations", 111, image_id=31)
    for dataset in (register(unknown), make_tiny_coco(unknown)):
        with pytest.raises(ValueError, match="annotation 111: 'image_id' is 31; allowed: an id of"):
            check_datasets((dataset.name,), (), SEEN)
    with pytest.raises(ValueError, match="annotation 111: 'image_id' is 31; allowed: an id of"):
        check_datasets((), (dataset.name,), SEEN)
    check_datasets((), (register(unknown).name,), SEEN)  # as COCO's evaluation has it


def test_a_dataset_with_a_function_of_its_own_is_passed_over(register):
    dataset = register(change("annotations", 111, bbox=[1, 2, 3]), by_unknown_function)
    check_datasets((dataset.name,), (dataset.name,), SEEN)
    with pytest.raises(ValueError, match="names 'shapes_trian', .* nearest: shapes_train"):
        check_datasets((), ("shapes_trian",), SEEN)


def test_masks_may_come_from_another_training_set_or_be_of_no_use(make_tiny_coco):
    boxes, masks = make_tiny_coco(forget_all), make_tiny_coco()
    with pytest.raises(ValueError, match="'seen_classes' is classes without any mask"):
        check_datasets((boxes.name,), (), SEEN)
    check_datasets((boxes.name, masks.name), (), SEEN)
    check_datasets((boxes.name,), (), SEEN, opts=["MODEL.BOX_SUPERVISION.NAME", "boxinst"])
    broken = make_tiny_coco(change("annotations", 111, segmentation="mask.png"))
    with pytest.raises(ValueError, match="'segmentation' is 'mask.png'"):
        check_datasets((broken.name,), (), SEEN)
    check_datasets((broken.name,), (), SEEN, opts=BOXES_ALONE)


@pytest.fixture
def arguments(tiny_cfg, tmp_path):
    """Return ``make(train, test)``: the command line of a tiny model on these datasets."""

    def make_one(train, test, *flags):
        cfg = tiny_cfg(dataset=train)
        cfg.DATASETS.TEST = (test.name,)
        config_file = tmp_path / "tiny.yaml"
        config_file.write_text(cfg.dump())
        return [*flags, "--config-file", str(config_file), "OUTPUT_DIR", str(tmp_path / "output")]

    return make_one


def start(command_line):
    train_net.main(default_argument_parser().parse_args(command_line))


def test_train_net_stops_before_the_model_is_built(arguments, make_tiny_coco, stop_before_model):
    good = make_tiny_coco(complete)
    bad = make_tiny_coco(change("annotations", 111, segmentation="mask.png"))
    with pytest.raises(stop_before_model):
        start(arguments(good, good))
    for train, test in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=f"{bad.json_file}: annotation 111: 'segmentation'"):
            start(arguments(train, test))
    output = Path(arguments(good, good)[-1])
    assert "annotation 111: 'segmentation' is 'mask.png'" in (output / "log.txt").read_text()


def test_train_net_asks_for_what_its_model_needs(arguments, make_tiny_coco, stop_before_model):
    good, boxes = make_tiny_coco(complete), make_tiny_coco(forget_all)
    with pytest.raises(ValueError, match="classes without any mask"):
        start(arguments(boxes, good))
    for options in (["MODEL.BOX_SUPERVISION.NAME", "boxinst"], ["MODEL.MASK_ON", "False"]):
        with pytest.raises(stop_before_model):
            start([*arguments(boxes, good), *options])
    with pytest.raises(ValueError, match="the model has 2; set MODEL.ROI_HEADS.NUM_CLASSES 3"):
        start([*arguments(good, good), "MODEL.ROI_HEADS.NUM_CLASSES", "2"])


@pytest.mark.slow
def test_all_processes_stop_with_the_sentence(arguments, make_tiny_coco, tmp_path):
    bad = make_tiny_coco(change("annotations", 111, segmentation="mask.png"))
    # Training on the CPU is for one process.
    start_in_two_processes(bad, arguments(bad, bad, "--eval-only"), tmp_path)
    told = [(tmp_path / rank).read_text() for rank in "01"]
    assert told[0] == told[1]
    assert told[0].startswith(f"{bad.json_file}: annotation 111: 'segmentation' is 'mask.png'")


def of_model(data):
    complete(data)
    for x in data["annotations"]:
        if x["id"] in (108, 111):
            x["mask_source"] = "model"


def test_masks_of_models_that_would_pass_for_human_ones_stop_the_training(register):
    """Detectron2's function reads the fields that it knows."""
    dataset = register(of_model)
    with pytest.raises(ValueError) as error:
        check_datasets((dataset.name,), (), SEEN, num_classes=3)
    text = str(error.value)
    assert text.startswith(f"{dataset.json_file}: annotation 108: 'mask_source' is 'model'; ")
    assert "register_partial_coco" in text and "(2 in all: 108, 111)" in text
    # A detector of boxes reads none.
    check_datasets((dataset.name,), (), SEEN, num_classes=3, opts=BOXES_ALONE)


def test_masks_of_models_are_trained_on_but_not_evaluated_on(make_tiny_coco, log):
    dataset = make_tiny_coco(of_model)
    check_datasets((dataset.name,), (), SEEN, num_classes=3)
    (table,) = [x.getMessage() for x in log.records if "boxes only" in x.getMessage()]
    rows = [line.split() for line in table.splitlines()]
    # Human masks, then a model's.
    assert ["cat", "unseen", "3", "2", "1", "0", "0", "0"] in rows
    with pytest.raises(ValueError, match=r"'model' \(of 12 objects 2\)"):
        check_datasets((), (dataset.name,), SEEN, num_classes=3)


def test_training_goes_on_with_repeated_ids_and_fewer_classes_than_the_model(make_tiny_coco, log):
    def repeat_id(data):
        data["annotations"][1]["id"] = data["annotations"][0]["id"]

    dataset = make_tiny_coco(repeat_id)
    check_datasets((dataset.name,), (), SEEN, num_classes=4)
    warnings = [x.getMessage() for x in log.records if "training goes on" in x.getMessage()]
    assert len(warnings) == 2
    assert "'categories' is 3 classes" in warnings[0] and "'id' is" in warnings[1]
    with pytest.raises(InputError, match="NUM_CLASSES 3"):
        check_datasets((dataset.name,), (), SEEN, num_classes=2)
