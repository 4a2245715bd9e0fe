"""train_net.py as people run it: on a tiny dataset in this process, or as a program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_data import complete
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

import train_net
from teacher_student_mask import InputError, register_partial_coco
from teacher_student_mask.cli.main import main
from teacher_student_mask.engine import trainer

REPOSITORY = Path(__file__).resolve().parents[1]
SUBSETS = {"segm_seen", "segm_unseen", "segm_unseen_overlap", "segm_unseen_overlap_bins"}


@pytest.fixture
def run(tiny_cfg, tiny_coco, tmp_path):
    """Return ``run(*flags, opts)``: train_net.main with a tiny model; gives the output folder."""
    complete(tiny_coco.data)  # mask AP needs a mask on every object of the test set
    test_json = tmp_path / "complete.json"
    test_json.write_text(json.dumps(tiny_coco.data))
    DatasetCatalog.get(tiny_coco.name)  # the metadata's classes come from the json
    name = f"{tiny_coco.name}_complete"
    register_partial_coco(name, str(test_json), tiny_coco.image_root)
    cfg = tiny_cfg(dataset=tiny_coco)
    cfg.MODEL.ROI_HEADS.NAME = "TeacherStudentROIHeads"
    cfg.DATASETS.TEST = (name,)
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    config_file = tmp_path / "tiny.yaml"
    config_file.write_text(cfg.dump())
    output = tmp_path / "output"

    def run(*flags, opts=()):
        arguments = [*flags, "--config-file", str(config_file), "OUTPUT_DIR", str(output)]
        args = default_argument_parser().parse_args([*arguments, *map(str, opts)])
        train_net.main(args)
        return output

    torch.manual_seed(0)
    run.untrained = tmp_path / "untrained.pth"
    torch.save({"model": build_model(cfg).state_dict()}, run.untrained)
    yield run
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_grabcut_finds_masks_without_a_mask_head_and_boxes_alone_need_none(run, tiny_coco):
    opts = ["MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads"]
    output = run(opts=[*opts, "MODEL.META_ARCHITECTURE", "GrabCutRCNN", "SOLVER.MAX_ITER", 1])
    assert {"segm", *SUBSETS} < set(json.loads((output / "results.json").read_text()))
    # Some objects of this test set have no mask.
    boxes_alone = ["MODEL.WEIGHTS", output / "model_final.pth", "DATASETS.TEST", (tiny_coco.name,)]
    run("--eval-only", opts=[*opts, *boxes_alone])
    assert set(json.loads((output / "inference/results.json").read_text())) == {"bbox"}


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_train_resume_and_evaluate(run):
    output = run(opts=["MODEL.RESNETS.NORM", "FrozenBN"])  # of which there are no statistics
    assert (output / "config.yaml").is_file()
    categories = json.loads((output / "categories.json").read_text())
    assert categories == [
        {"id": 3, "name": "ant"},
        {"id": 17, "name": "cat"},
        {"id": 90, "name": "ship"},
    ]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"bbox", "segm"} | SUBSETS
    assert results["segm_unseen"]["num_gt"] == 3
    (last,) = [m for m in metrics(output) if "segm_unseen/AP" in m]
    assert {"segm_seen/AP50", "segm_unseen_overlap/AP75"} <= set(last)
    assert {"segm_unseen_overlap_bins/AP_0", "segm_unseen_overlap_bins/AP_0.9_1"} <= set(last)

    weights = torch.load(output / "model_final.pth", weights_only=False)["model"]
    assert any("roi_heads.teacher_mask_head" in key for key in weights)
    run("--resume", opts=["SOLVER.MAX_ITER", 4])
    log = (output / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert "training from scratch, with the changes MODEL.RESNETS.NORM BN" in log
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 3

    before = {x.name: x.read_bytes() for x in output.glob("*.*") if x.suffix in (".json", ".yaml")}
    run("--eval-only", opts=["MODEL.WEIGHTS", output / "model_0000001.pth"])
    again = json.loads((output / "inference" / "results.json").read_text())
    # The checkpoint after iteration 2 gives the same AP; the training's files are as they were.
    assert json.dumps(again) == json.dumps(results)
    assert before == {x: (output / x).read_bytes() for x in before}


@pytest.mark.parametrize("head", ["student", "teacher"])
def test_evaluation_on_ground_truth_boxes(run, head):
    output = run(
        "--eval-only",
        opts=["MODEL.WEIGHTS", run.untrained, "TEST.GT_BOXES", True, "TEST.MASK_HEAD", head],
    )
    output /= "inference"
    results = json.loads((output / "results.json").read_text())
    yardsticks = {x for x in results if "/" in x}
    # Every object is detected, at its own box and of its own class.
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert set(results) - yardsticks == {"bbox", "segm"} | SUBSETS
    assert len(yardsticks) == 8 and results["segm_unseen/filled_box"]["num_gt"] > 0
    assert f"{head} mask head, ground-truth boxes" in (output / "log.txt").read_text()


GRABCUT_MASKS = ["MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads", "TEST.EVAL_PERIOD", 0]
GRABCUT_MASKS += ["MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS", True]


def test_masks_of_a_model_that_are_not_in_the_data_stop_training(run, make_tiny_coco, monkeypatch):
    """Bug: the config without the json of GrabCut's masks trained the baseline in silence."""

    def mark_crowd(data):
        for x in data["annotations"]:
            if x["iscrowd"]:
                x["mask_source"] = "model"

    names = (make_tiny_coco(mark_crowd).name, make_tiny_coco().name)
    monkeypatch.setattr(trainer, "Trainer", None)  # nothing is built
    message = "TRAIN_ON_EXTERNAL_MASKS is True, .*{}.*{}.* has no mask with 'mask_source' 'model'"
    with pytest.raises(InputError, match=message.format(*names)):
        run(opts=[*GRABCUT_MASKS, "DATASETS.TRAIN", names])


@pytest.mark.parametrize("ids", [{109}, range(200)], ids=["one", "all"])
def test_masks_of_a_model_in_one_dataset_are_trained_on(run, make_tiny_coco, tiny_coco, ids):
    """Without any of a human, too: they were refused as data without masks."""

    def mark(data):
        for x in data["annotations"]:
            if x["id"] in ids:
                x["mask_source"] = "model"

    names = (make_tiny_coco(mark).name, *([tiny_coco.name] if len(ids) == 1 else []))
    output = run(opts=[*GRABCUT_MASKS, "DATASETS.TRAIN", names, "DATASETS.TEST", ()])
    assert (output / "model_final.pth").is_file()


# ---- classes are matched by name ----


@pytest.fixture
def other_ids(run, tiny_coco, tmp_path):
    """Return ``write(ids, rename)``: options for the test json under other ids."""

    def write(ids, rename=()):
        data = json.loads(json.dumps(tiny_coco.data))
        data["categories"] = [
            {"id": ids[x["id"]], "name": dict(rename).get(x["name"], x["name"])}
            for x in data["categories"]
            if x["id"] in ids
        ]
        objects = [x for x in data["annotations"] if x["category_id"] in ids]
        data["annotations"] = [{**x, "category_id": ids[x["category_id"]]} for x in objects]
        path = tmp_path / "other_ids.json"
        path.write_text(json.dumps(data))
        return ["DATASETS.TEST", (str(path),), "DATASETS.TEST_IMAGE_ROOT", tiny_coco.image_root]

    return write


@pytest.mark.parametrize("on_gt_boxes", [True, False])
def test_a_test_json_may_list_the_classes_in_any_order_or_some_of_them(run, other_ids, on_gt_boxes):
    opts = ["MODEL.WEIGHTS", run.untrained, "TEST.GT_BOXES", on_gt_boxes]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]

    def evaluate(*test):
        folder = run("--eval-only", opts=[*opts, *test]) / "inference"
        found = json.loads((folder / "coco_instances_results.json").read_text())
        return json.loads((folder / "results.json").read_text()), found

    expected, of_training_ids = evaluate()
    for ids in ({3: 90, 17: 3, 90: 17}, {3: 5, 17: 4, 90: 1}):
        results, found = evaluate(*other_ids(ids))
        assert set(results) == set(expected)
        for task, metrics in results.items():
            assert metrics == pytest.approx(expected[task], rel=1e-9, nan_ok=True)
        back = {new: old for old, new in ids.items()}
        assert [{**x, "category_id": back[x["category_id"]]} for x in found] == of_training_ids
    results, found = evaluate(*other_ids({90: 1, 17: 2}))
    assert results["bbox"]["AP-ship"] == expected["bbox"]["AP-ship"]
    assert results["segm_seen"]["num_gt"] == 4 and {x["category_id"] for x in found} == {1, 2}


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_class_that_the_model_does_not_know_stops_at_once(run, other_ids, flags):
    opts = other_ids({3: 3, 17: 17, 90: 90}, rename={"ship": "shi"})
    with pytest.raises(InputError, match=r"'shi' \(nearest: ship\). Its 3 classes: ant, cat, ship"):
        run(*flags, opts=["MODEL.WEIGHTS", run.untrained, *opts])


def test_the_names_are_those_of_the_training(run, other_ids, log):
    """Not those of the test json: from beside the weights, else from beside the config."""
    names = [{"id": i, "name": x} for i, x in enumerate(("cat", "ship", "ant"))]
    (run.untrained.parent / "categories.json").write_text(json.dumps(names))
    opts = ["MODEL.WEIGHTS", run.untrained, "TEST.GT_BOXES", True]
    output = run("--eval-only", opts=[*opts, *other_ids({3: 3, 17: 17, 90: 90})])
    assert json.loads((output / "inference/categories.json").read_text()) == names
    found = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert {x["category_id"] for x in found} == {3, 17, 90}
    (run.untrained.parent / "categories.json").write_text('[{"name": "ant"}]')
    with pytest.raises(InputError, match="categories.json cannot be read"):
        run("--eval-only", opts=opts)


# ---- a run's folder ----


def files_of(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir() if x.suffix in (".json", ".yaml")}


def test_a_run_is_neither_overwritten_nor_resumed_with_other_classes(run, make_tiny_coco, log):
    output = run(opts=["DATASETS.TEST", ()])
    before = files_of(output)
    assert {"config.yaml", "categories.json", "results.json"} <= set(before)
    (output.parent / "output_2").mkdir()
    with pytest.raises(InputError, match="holds another run .config.yaml.*--resume"):
        run()

    def add(data):
        data["categories"].append({"id": 1, "name": "new"})

    def exchange(data):
        names = {"ant": "ship", "ship": "ant"}
        for x in data["categories"]:
            x["name"] = names.get(x["name"], x["name"])

    for change, classes in ((add, "new, ant, cat, ship"), (exchange, "ship, cat, ant")):
        opts = ["DATASETS.TRAIN", (make_tiny_coco(change).name,), "SOLVER.MAX_ITER", 4]
        for num_classes in (3, 4):
            with pytest.raises(InputError, match=f"classes {classes}, but .* on ant, cat, ship;"):
                run("--resume", opts=[*opts, "MODEL.ROI_HEADS.NUM_CLASSES", num_classes])
    assert files_of(output) == before
    with pytest.raises(InputError, match="lacks .* parameters|cannot be used"):
        run("--resume", opts=["MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "SOLVER.MAX_ITER", 4])
    assert run("--resume") == output  # nothing is left to do, and no evaluation follows
    assert "has reached SOLVER.MAX_ITER 2, and its results.json stays as it is" in log.text
    assert {**files_of(output), "metrics.json": b""} == {**before, "metrics.json": b""}


def test_weights_of_which_nothing_fits_stop_the_training(run, tmp_path):
    state = torch.load(run.untrained)["model"]
    torch.save({"model": {f"net.{k}": x for k, x in state.items()}}, tmp_path / "names.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "state_dict.pth")
    torch.save({"ema": state}, tmp_path / "ema.pth")
    torch.save([state], tmp_path / "list.pth")
    for name, words in (
        ("names", "lacks .* parameters"),
        ("state_dict", "state_dict.pth cannot be used: .* must be saved under 'model'"),
        ("ema", "ema.pth cannot be used: .* must be saved under 'model'"),
        ("list", "list.pth cannot be used"),
    ):
        for flags in ((), ("--eval-only",)):
            with pytest.raises(InputError, match=words):
                run(*flags, opts=["MODEL.WEIGHTS", tmp_path / f"{name}.pth"])
    output = tmp_path / "output"
    assert not (output / "config.yaml").exists() and not (output / "categories.json").exists()


@pytest.mark.parametrize(
    "weights, words",
    [
        ("none.pth", "none.pth do not exist"),
        ("http://127.0.0.1:9/a/x.pth", "127.0.0.1:9/a/x.pth cannot be fetched .*put them at .*x.p"),
        ("detectron2://x.pkl", "https://dl.fbaipublicfiles.com/detectron2/x.pkl cannot be fetched"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_weights_that_are_not_there_stop_before_anything_is_written(
    run, tmp_path, monkeypatch, weights, words, flags
):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=words):
        run(*flags, opts=["MODEL.WEIGHTS", weights])
    assert not (tmp_path / "output").exists()


def test_without_a_gpu_the_cpu_trains(run, monkeypatch, log, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    run(opts=["MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()])
    assert "MODEL.DEVICE is cuda, but there is no GPU: using the CPU" in log.text
    assert main(["train", "--config-file", "a.yaml", "--num-gpus", "8"]) == 1
    assert "--num-gpus is 8, but this machine has 0" in capsys.readouterr().err


def test_the_command_is_the_same_program(monkeypatch, capsys):
    options = ["--eval-only", "--num-gpus", "0", "--config-file", "a.yaml", "SEED", "3"]
    taken = []
    monkeypatch.setattr("teacher_student_mask.engine.main", taken.append)
    assert main(["train", *options]) == 0
    expected = vars(default_argument_parser().parse_args(options))
    assert vars(taken[0]).items() >= {**expected, "dist_url": "auto"}.items()
    monkeypatch.undo()
    assert main(["train", "--config-file", "none.yaml"]) == 1
    assert "error: The config none.yaml cannot be read" in capsys.readouterr().err


def test_the_demo_dataset_is_known_by_name_in_a_new_process(tmp_path):
    config = REPOSITORY / "configs/shapes/mask_rcnn.yaml"
    command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", str(config)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "shapes/annotations/instances_train.json" in ended.stderr.splitlines()[-1]
