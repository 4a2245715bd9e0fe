"""Datasets that a config names by the path of their json."""

import json
from pathlib import Path

import pytest
import torch
from bad_data import complete
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

import train_net
from teacher_student_mask.data import check_datasets, register_json_datasets, resolve_auto_settings
from teacher_student_mask.errors import InputError


@pytest.fixture(autouse=True)
def _forget_paths():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        if name.endswith(".json"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


@pytest.fixture
def folder(make_tiny_coco):
    """A folder as exports make it: train.json, val.json, and the images of both."""
    train = make_tiny_coco()
    root = Path(train.image_root)
    (root / "train.json").write_text(json.dumps(train.data))
    complete(train.data)
    (root / "val.json").write_text(json.dumps(train.data))
    return root


@pytest.fixture
def path_cfg(tiny_cfg, folder):
    def make(*opts):
        cfg = tiny_cfg()
        cfg.DATASETS.TRAIN = (str(folder / "train.json"),)
        cfg.DATASETS.TEST = (str(folder / "val.json"),)
        cfg.DATASETS.SEEN_CLASSES = "auto"
        cfg.DATASETS.MIN_MASKS_PER_CLASS = 3
        cfg.MODEL.ROI_HEADS.NAME = "TeacherStudentROIHeads"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
        cfg.SOLVER.MAX_ITER = 1
        cfg.merge_from_list(list(opts))
        return cfg

    return make


def test_images_lie_beside_the_json_or_in_a_folder_of_their_own(path_cfg, folder, tmp_path):
    cfg = path_cfg("DATASETS.TEST_IMAGE_ROOT", str(tmp_path / "elsewhere"))
    register_json_datasets(cfg)
    train, val = (DatasetCatalog.get(x[0])[0] for x in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    assert train["file_name"] == str(folder / "unseen.png")
    assert val["file_name"] == str(tmp_path / "elsewhere" / "unseen.png")


def test_registered_names_are_left_alone(path_cfg, folder):
    DatasetCatalog.register("a registered name.json", lambda: "mine")
    register_json_datasets(path_cfg("DATASETS.TRAIN", ("a registered name.json", "coco_2017_val")))
    assert DatasetCatalog.get("a registered name.json") == "mine"


def test_further_calls_see_what_has_changed(path_cfg, folder):
    cfg = path_cfg()
    name = cfg.DATASETS.TRAIN[0]
    register_json_datasets(cfg)
    DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes[0] == "ant"
    data = json.loads(Path(name).read_text())
    data["categories"][1]["name"] = "big ant"
    Path(name).write_text(json.dumps(data))
    register_json_datasets(cfg)
    DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes[0] == "big ant"
    cfg.DATASETS.TRAIN_IMAGE_ROOT = "elsewhere"
    register_json_datasets(cfg)
    assert MetadataCatalog.get(name).image_root == "elsewhere"


def start(cfg, tmp_path, *flags, opts=()):
    config_file = tmp_path / "given.yaml"
    config_file.write_text(cfg.dump())
    arguments = [*flags, "--config-file", str(config_file), *map(str, opts)]
    return train_net.main(default_argument_parser().parse_args(arguments))


def test_a_path_that_is_not_there(path_cfg, tmp_path, stop_before_model):
    for key in ("TRAIN", "TEST"):
        cfg = path_cfg(f"DATASETS.{key}", ("no such.json",))
        with pytest.raises(ValueError, match="no such.json: cannot be read"):
            start(cfg, tmp_path)
    # Evaluation does without the training data, but for "auto".
    cfg = path_cfg("DATASETS.TRAIN", ("no such.json",), "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    with pytest.raises(ValueError, match="'auto' asks the training data.*no such.json"):
        start(cfg, tmp_path, "--eval-only")
    with pytest.raises(stop_before_model):
        start(cfg, tmp_path, "--eval-only", opts=["TEST.SEEN_CLASSES", "ant"])


def test_the_custom_config_trains_on_paths(stop_before_model, folder, tmp_path):
    custom = Path(train_net.__file__).with_name("configs") / "custom"
    config_file = custom / "teacher_student.yaml"
    arguments = ["--config-file", str(config_file), "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    arguments += ["OUTPUT_DIR", str(tmp_path / "output")]
    arguments += ["DATASETS.TRAIN", f"('{folder}/train.json',)", "DATASETS.TRAIN_IMAGE_ROOT", ""]
    arguments += ["DATASETS.TEST", f"('{folder}/val.json',)", "DATASETS.TEST_IMAGE_ROOT", ""]
    args = default_argument_parser().parse_args(arguments)
    with pytest.raises(stop_before_model):
        train_net.main(args)
    assert not (tmp_path / "output" / "config.yaml").exists()
    cfg = train_net.setup(args)
    assert cfg.DATASETS.SEEN_CLASSES == "all" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    logged = (tmp_path / "output" / "log.txt").read_text()
    assert "human masks are not used" not in logged
    # The two jsons name the same files.
    assert "DATASETS.TRAIN and DATASETS.TEST share 4 images" in logged


@pytest.mark.slow
def test_from_paths_to_an_evaluation_without_the_training_data(path_cfg, folder, tmp_path):
    cfg = path_cfg()
    start(cfg, tmp_path)
    output = Path(cfg.OUTPUT_DIR)
    results = json.loads((output / "results.json").read_text())
    # Of the 12 objects, by hand: 4 ants and 3 cats are seen, 4 ships are not, and one is a crowd.
    assert results["segm_seen"]["num_gt"] == 7 and results["segm_unseen"]["num_gt"] == 4
    (folder / "train.json").unlink()
    trained = str(output / "config.yaml")
    parser = default_argument_parser()
    weights = str(output / "model_final.pth")
    args = ["--eval-only", "--config-file", trained, "MODEL.WEIGHTS", weights]
    again = train_net.main(parser.parse_args(args))
    assert again["segm_unseen"]["num_gt"] == 4
    model = torch.load(weights, weights_only=False)["model"]
    assert model["roi_heads.box_predictor.cls_score.bias"].shape == (4,)


def test_jsons_may_be_named_from_their_folder(path_cfg, folder, monkeypatch):
    monkeypatch.chdir(folder)
    opts = ["DATASETS.TRAIN", ("train.json",), "DATASETS.TEST", (), "DATASETS.SEEN_CLASSES", "all"]
    cfg = path_cfg(*opts, "DATASETS.TRAIN_IMAGE_ROOT", "")
    register_json_datasets(cfg)
    check_datasets(cfg)


@pytest.mark.parametrize("asked", ["nothing", "NUM_CLASSES", "SEEN_CLASSES"])
def test_a_second_training_json_with_other_ids_has_the_classes_of_the_first_by_name(
    path_cfg, folder, asked
):
    second = json.loads((folder / "train.json").read_text())
    new_ids = {x["id"]: 1000 - x["id"] for x in second["categories"]}
    for x in second["categories"]:
        x["id"] = new_ids[x["id"]]
    for x in second["annotations"]:
        x["category_id"] = new_ids[x["category_id"]]
    (folder / "second.json").write_text(json.dumps(second))
    paths = str(folder / "train.json"), str(folder / "second.json")
    opts = ["DATASETS.TEST", paths[1:], "DATASETS.SEEN_CLASSES", "all", "MODEL.MASK_ON", False]
    cfg = path_cfg("DATASETS.TRAIN", paths, *opts)
    register_json_datasets(cfg)
    if asked != "nothing":  # of the first one, before the checks
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
        cfg.DATASETS.SEEN_CLASSES = "auto" if asked == "SEEN_CLASSES" else "all"
        cfg = resolve_auto_settings(cfg)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    check_datasets(cfg)
    a, b = (DatasetCatalog.get(path) for path in paths)
    ids_of = [[x["category_id"] for image in y for x in image["annotations"]] for y in (a, b)]
    assert len(set(ids_of[0])) > 1 and ids_of[0] == ids_of[1]
    for path in paths:  # in the order of the first one's ids
        assert MetadataCatalog.get(path).thing_classes == ["ant", "cat", "ship"]
    second["categories"][0]["name"] = "elephant"
    (folder / "second.json").write_text(json.dumps(second))
    register_json_datasets(cfg)
    with pytest.raises(InputError, match="second.json.*elephant"):
        check_datasets(cfg)
