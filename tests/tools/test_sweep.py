"""tools/sweep.py, with a stub in the place of train_net.py; once, slowly, with the real one."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import sweep
from sweeps import summary as sweep_summary
from sweeps import training_jobs
from sweeps.reports import short_names
from sweeps.summary import draw_summary, group_rows, write_summary
from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES, generate_shapes

REPOSITORY = Path(__file__).resolve().parents[2]
BASELINE = "configs/voc2nonvoc/mask_rcnn_R_50_FPN_1x.yaml"
OURS = "configs/voc2nonvoc/teacher_student_R_50_FPN_1x.yaml"
OPTS = ["SOLVER.MAX_ITER", "40", "SOLVER.REFERENCE_WORLD_SIZE", "0"]

# AP of unseen classes: 10 x seed for the baseline, 1 more for ours; on ground-truth boxes 50, and
# 60 of a teacher; of another evaluation, the number of classes that it takes for seen. $FAIL and
# $HANG name runs that fail and that do not end; $LINGER has the seconds between results and end, by
# the name of the folder.
STUB = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
keys = dict(zip(argv, argv[1:]))
out = pathlib.Path(keys["OUTPUT_DIR"])
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls.jsonl", "a") as f:
    f.write(json.dumps({"argv": argv, "threads": os.environ["OMP_NUM_THREADS"]}) + "\\n")
print("a line of the stub")
if os.environ.get("FAIL", "no run") in str(out):
    sys.exit("the stub failed on purpose")
if "--eval-only" in argv:
    assert pathlib.Path(keys["MODEL.WEIGHTS"]).is_file()
    if "TEST.GT_BOXES" in argv:
        ap = 60 if keys["TEST.MASK_HEAD"] == "teacher" else 50
    else:
        ap = len(json.loads(pathlib.Path(keys["TEST.SEEN_CLASSES"]).read_text()))
else:
    with open(out / "metrics.json", "a") as f:
        f.write(json.dumps({"iteration": 19}) + "\\n")
    if os.environ.get("HANG", "no run") in str(out):
        (out / "hangs").touch()
        time.sleep(60)
    with open(out / "metrics.json", "a") as f:
        f.write(json.dumps({"iteration": int(keys["SOLVER.MAX_ITER"]) - 1}) + "\\n")
    (out / "model_final.pth").touch()
    (out / "last_checkpoint").write_text("model_final.pth")
    ap = 10 * int(keys["SEED"]) + ("teacher_student" in keys["--config-file"])
metrics = {"AP": ap, "AP50": 2 * ap, "AP75": float("nan"), "num_gt": 3}
tasks = ("bbox", "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
(out / "results.json").write_text(json.dumps({task: metrics for task in tasks}))
time.sleep(json.loads(os.environ.get("LINGER", "{}")).get(out.name, 0))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return ``run(*arguments)``: sweep.main with the stub; gives its exit code."""
    monkeypatch.setattr(training_jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "draw_summary", lambda path, rows: None)  # saves time
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    required = ["--output-dir", tmp_path / "out", "--train-program", stub, "--num-gpus", 0]

    def run(*arguments, configs=(BASELINE,), opts=OPTS):
        configs = [REPOSITORY / path for path in configs]
        arguments = [*required, "--configs", *configs, *arguments, "--opts", *opts]
        return sweep.main([str(x) for x in arguments])

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def rows_of(out):
    # Strictly json: NaN is refused.
    lines = (out / "results.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def calls_of(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def folder_of(out, config, *parts):
    return out.joinpath("runs", "voc2nonvoc", Path(config).stem, *parts)


def table_of(text):
    """{heading: [cells]} of the first Markdown table."""
    lines = text[text.index("|") :].split("\n\n")[0].splitlines()
    lines = [x for x in lines if x.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return dict(zip(table[0], zip(*table[2:])))


def test_each_run_is_a_line_with_all_that_is_known_of_it(run, out, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("--seeds", 1, 2, "--jobs", 2, configs=(BASELINE, OURS)) == 0
    rows = rows_of(out)
    assert len(rows) == 4
    (row,) = [x for x in rows if x["seed"] == 2 and x["config"] == OURS]
    assert row["run"] == "voc2nonvoc/teacher_student_R_50_FPN_1x/seed_2"
    assert row["seen_set"] is None and row["num_seen_classes"] == 20
    assert row["results"]["segm_unseen"] == {"AP": 21, "AP50": 42, "AP75": None, "num_gt": 3}
    assert set(row["results"]) == {"bbox", "segm", "segm_seen", "segm_unseen"} | {
        "segm_unseen_overlap"
    }
    assert row["seconds"] >= 0 and row["opts"] == OPTS and row["always_unseen"] is None
    assert row["versions"]["torch"] == metadata.version("torch")
    assert {"python", "detectron2", "numpy"} <= set(row["versions"])
    assert row["hardware"]["cores"] == os.cpu_count() and row["hardware"]["runs_at_once"] == 2
    threads = max(1, os.cpu_count() // 2)
    assert row["hardware"]["threads"] == threads
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    if commit:
        assert re.fullmatch(rf"{commit.strip()}(-dirty)?", row["commit"])
    folder = folder_of(out, OURS, "seed_2")
    (call,) = calls_of(folder)
    assert call["threads"] == str(threads)
    expected = ["--resume", "--config-file", OURS, *OPTS, "MODEL.DEVICE", "cpu", "SEED", "2"]
    assert call["argv"] == [*expected, "OUTPUT_DIR", str(folder)]
    assert row["command"].startswith("python ") and f"--config-file {OURS} " in row["command"]


def test_the_summary_has_mean_and_deviation_over_the_seeds(run, out, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "draw_summary", draw_summary)
    assert run("--seeds", 1, 2, 4, configs=(BASELINE, OURS)) == 0
    printed = capsys.readouterr().out
    text = (out / "summary.md").read_text()
    for table in (table_of(printed), table_of(text)):
        assert table["config"] == ("mask_rcnn_R_50_FPN_1x", "teacher_student_R_50_FPN_1x")
        assert table["seeds"] == ("3", "3") and table["seen classes"] == ("20", "20")
        # 10, 20, 40: mean 23.33; squares of the differences 177.8 + 11.1 + 277.8 = 466.7, and
        # sqrt(466.7 / 2) = 15.28. Ours has 1 more each.
        assert table["**unseen AP**"] == ("23.33 ± 15.28", "24.33 ± 15.28")
        assert table["unseen AP50"] == ("46.67 ± 30.55", "48.67 ± 30.55")
    assert "6 runs" in text and "Overrides: SOLVER.MAX_ITER 40 SOLVER" in text
    with Image.open(out / "summary.png") as image:
        assert image.format == "PNG" and min(image.size) > 200


def test_what_is_done_is_not_done_again_and_further_seeds_are_added(run, out, capsys):
    assert run("--seeds", 1) == 0
    assert table_of(capsys.readouterr().out)["**unseen AP**"] == ("10.00",)  # no ±: one run
    before = (out / "results.jsonl").read_text()
    assert run("--seeds", 1) == 0
    assert "Sweep: done already" in capsys.readouterr().out
    assert (out / "results.jsonl").read_text() == before
    assert run("--seeds", 3, configs=(OURS,)) == 0
    assert (out / "results.jsonl").read_text().startswith(before)
    assert [row["seed"] for row in rows_of(out)] == [1, 3]
    # The earlier run is in the summary, too.
    assert table_of(capsys.readouterr().out)["**unseen AP**"] == ("10.00", "31.00")
    assert len(calls_of(folder_of(out, BASELINE, "seed_1"))) == 1


def test_a_lost_line_of_the_results_is_written_again(run, out):
    assert run("--seeds", 1, 2) == 0
    rows = rows_of(out)
    (out / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert run("--seeds", 1, 2) == 0
    again = rows_of(out)
    assert [row["seed"] for row in again] == [1, 2]
    assert {**again[1], "finished": ""} == {**rows[1], "finished": ""}
    assert len(calls_of(folder_of(out, BASELINE, "seed_2"))) == 1


def test_a_failing_run_is_reported_and_the_others_go_on(run, out, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "seed_1")
    assert run("--seeds", 1, 2) == 1
    output = capsys.readouterr().out
    name = "voc2nonvoc/mask_rcnn_R_50_FPN_1x/seed_1"
    assert f"Sweep failed for {name} (exit code 1)" in output
    assert "the stub failed on purpose" in output
    assert [row["seed"] for row in rows_of(out)] == [2]
    assert f"Not finished: {name}." in (out / "summary.md").read_text()
    monkeypatch.delenv("FAIL")
    assert run("--seeds", 1, 2) == 0
    assert [row["seed"] for row in rows_of(out)] == [2, 1]
    assert "Not finished" not in (out / "summary.md").read_text()
    assert len(calls_of(folder_of(out, BASELINE, "seed_2"))) == 1


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on_with_resume(run, out, capsys, monkeypatch, signal_number):
    folder = folder_of(out, BASELINE, "seed_2")
    refresh = training_jobs.tqdm.refresh

    def interrupt(bar, **kwargs):
        if (folder / "hangs").is_file():
            os.kill(os.getpid(), signal_number)
        return refresh(bar, **kwargs)

    monkeypatch.setattr(training_jobs.tqdm, "refresh", interrupt)
    monkeypatch.setenv("HANG", "seed_2")
    # A shell lets what it starts in the background ignore SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("--seeds", 1, 2) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "the same command goes on" in capsys.readouterr().err
    assert [row["seed"] for row in rows_of(out)] == [1]
    assert not (folder / "results.json").exists()
    record = json.loads((folder / "run.json").read_text())
    assert record["seconds"] > 0
    (folder / "run.json").write_text(json.dumps({**record, "seconds": 1000.0}))
    (folder / "hangs").unlink()
    monkeypatch.delenv("HANG")
    assert run("--seeds", 1, 2) == 0
    calls = calls_of(folder)
    assert len(calls) == 2 and calls[1]["argv"] == calls[0]["argv"]
    assert "--resume" in calls[1]["argv"]
    assert [row["seed"] for row in rows_of(out)] == [1, 2]
    assert 1000 <= rows_of(out)[1]["seconds"] < 1030  # of both calls
    assert len(calls_of(folder_of(out, BASELINE, "seed_1"))) == 1
    # From 20 of 40 iterations; the other run is not counted.
    assert "| 20/40" in capsys.readouterr().err


def test_a_result_on_the_way_is_not_taken_for_the_last(run, out):
    folder = folder_of(out, BASELINE, "seed_1")
    assert run() == 0
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    (out / "results.jsonl").unlink()
    assert run() == 0
    assert len(calls_of(folder)) == 2 and len(rows_of(out)) == 1


@pytest.fixture
def reported(monkeypatch):
    """The names of the runs of each call of write_reports, which writes none here."""
    calls = []
    monkeypatch.setattr(sweep, "check_reports", lambda runs: None)

    def write_reports(output, runs):
        calls.append([run.name for run in runs if run.is_done()])
        return [output / "report.html"]

    monkeypatch.setattr(sweep, "write_reports", write_reports)
    return calls


def test_a_report_is_asked_for_after_the_trainings(run, out, reported, capsys):
    assert run("--seeds", 1, 2, configs=(BASELINE, OURS)) == 0
    assert reported == [] and "Masks alone" not in capsys.readouterr().out
    assert all(row["gt_boxes"] is None for row in rows_of(out))
    assert run("--report", "--seeds", 1, 2, configs=(BASELINE, OURS)) == 0
    (names,) = reported
    assert len(names) == 4 and names[0] == "voc2nonvoc/mask_rcnn_R_50_FPN_1x/seed_1"
    # The trainings are those of the first call; their lines are written again.
    folder = folder_of(out, OURS, "seed_2")
    assert len(calls_of(folder)) == 1 and len(rows_of(out)) == 8
    last = {row["run"]: row for row in rows_of(out)}
    aps = {
        name: {head: results["segm_unseen"]["AP"] for head, results in row["gt_boxes"].items()}
        for name, row in last.items()
    }
    assert aps["voc2nonvoc/mask_rcnn_R_50_FPN_1x/seed_1"] == {"student": 50}
    assert aps["voc2nonvoc/teacher_student_R_50_FPN_1x/seed_2"] == {"student": 50, "teacher": 60}
    (call,) = calls_of(folder / "gt_boxes_teacher")
    assert call["argv"][:3] == ["--eval-only", "--config-file", str(folder / "config.yaml")]
    assert call["argv"][-4:] == ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", "teacher"]
    printed = capsys.readouterr().out
    assert f"Report, to be opened in a browser: {out / 'report.html'}" in printed
    for text in (printed, (out / "summary.md").read_text()):
        table = table_of(text[text.index("Masks alone") :])
        names = ["mask_rcnn_R_50_FPN_1x", *2 * ["teacher_student_R_50_FPN_1x"]]
        assert table["config"] == tuple(names)
        assert table["mask head"] == ("student", "student", "teacher")
        assert table["**unseen AP**"] == ("50.00 ± 0.00", "50.00 ± 0.00", "60.00 ± 0.00")
        assert table["seeds"] == ("2", "2", "2")


def test_a_run_is_one_line_however_its_processes_end(run, out, reported, monkeypatch):
    """Two lines were written when one process ended while another's results were there already."""
    monkeypatch.setenv("LINGER", '{"gt_boxes_student": 1.5, "gt_boxes_teacher": 0.7}')
    assert run("--report", "--seeds", 1, 2, "--jobs", 2, configs=(OURS,)) == 0
    rows = rows_of(out)
    assert sorted(row["seed"] for row in rows) == [1, 2]
    assert all(set(row["gt_boxes"]) == {"student", "teacher"} for row in rows)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["mask_rcnn_shapes", "teacher_student_shapes_crf"], ["mask_rcnn", "teacher_student_crf"]),
        (["a_R_50_FPN_1x", "b_R_50_FPN_1x", "b_R_101_FPN_1x"], ["a_50", "b_50", "b_101"]),
        # Nothing would be left, or they would be the same.
        (["a_x", "x"], ["a_x", "x"]),
        (["a_b_x", "b_a_x"], ["a_b_x", "b_a_x"]),
        (["alone"], ["alone"]),
    ],
)
def test_names_in_a_report_leave_out_what_all_have(names, expected):
    assert short_names(names) == expected


def test_models_of_other_data_cannot_be_compared_in_a_report(run, out, capsys, tiny_dataset):
    opts = [*OPTS, "DATASETS.TRAIN", f"('{tiny_dataset}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    opts += ["DATASETS.SEEN_CLASSES", "a"]
    with pytest.raises(SystemExit):
        run("--report", opts=[*opts, "DATASETS.TEST", f"('{tiny_dataset}', 'coco_2017_val')"])
    assert "--report needs one dataset in DATASETS.TEST, got ('tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--report", opts=[*opts, "DATASETS.TEST", "('nowhere',)"])
    assert "'nowhere', which is not registered" in capsys.readouterr().err
    other = out.parent / "other" / "other.yaml"
    other.parent.mkdir()
    other.write_text(f"_BASE_: {REPOSITORY / BASELINE}\nTEST:\n  SEEN_CLASSES: 'b'\n")
    opts += ["DATASETS.TEST", f"('{tiny_dataset}',)"]
    with pytest.raises(SystemExit):
        run("--report", configs=(BASELINE, other), opts=opts)
    message = capsys.readouterr().err
    assert "mask_rcnn_R_50_FPN_1x/seed_1 and other/other/seed_1 are tested on other" in message
    assert not (out / "runs").exists()


@pytest.fixture
def tiny_dataset(tmp_path):
    """The name of a dataset of the classes a and b, without images, until the end of the test."""
    path = tmp_path / "tiny.json"
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    metadata = MetadataCatalog.get("tiny_of_sweep")
    metadata.set(json_file=str(path), image_root=str(tmp_path), thing_classes=["a", "b"])
    DatasetCatalog.register("tiny_of_sweep", list)
    yield "tiny_of_sweep"
    DatasetCatalog.remove("tiny_of_sweep")
    MetadataCatalog.remove("tiny_of_sweep")


@pytest.fixture
def seen_sets(tmp_path):
    """Nested lists of 20, 22 and 25 classes."""
    paths = []
    for size in (20, 22, 25):
        paths.append(tmp_path / f"seen_{size}.json")
        paths[-1].write_text(json.dumps([*VOC_CLASSES, *NONVOC_CLASSES[: size - 20]]))
    return paths


def test_seen_sets_replace_the_seen_classes_of_the_config(run, out, seen_sets):
    assert run("--seen-sets", *seen_sets) == 0
    rows = {row["num_seen_classes"]: row for row in rows_of(out)}
    assert sorted(rows) == [20, 22, 25]
    assert rows[22]["run"] == "voc2nonvoc/mask_rcnn_R_50_FPN_1x/seen_22/seed_1"
    assert rows[22]["seen_set"] == str(seen_sets[1])
    (call,) = calls_of(folder_of(out, BASELINE, "seen_22", "seed_1"))
    # By name, so that the saved config does not depend on the list.
    names = call["argv"][call["argv"].index("DATASETS.SEEN_CLASSES") + 1].split(", ")
    assert set(names) == {*VOC_CLASSES, *NONVOC_CLASSES[:2]} and len(names) == 22


def test_models_are_compared_on_the_classes_that_no_set_has(run, out, seen_sets, capsys):
    assert run("--seen-sets", *seen_sets, "--seeds", 1, 2, "--jobs", 2) == 0
    rows = {(row["num_seen_classes"], row["seed"]): row for row in rows_of(out)}
    assert len(rows) == len(rows_of(out)) == 6
    coco = MetadataCatalog.get("coco_2017_val").thing_classes
    unseen = [name for name in coco if name in NONVOC_CLASSES[5:]]
    for (size, seed), row in rows.items():
        assert row["always_unseen"]["classes"] == unseen and len(unseen) == 55
        ap = row["always_unseen"]["results"]["segm_unseen"]["AP"]
        # The evaluation was told of all 25 seen ones. With the largest set nothing is evaluated
        # again: its own unseen classes are these.
        assert ap == (10 * seed if size == 25 else 25)
        folders = list(folder_of(out, BASELINE, f"seen_{size}", f"seed_{seed}").glob("always_*"))
        assert len(folders) == (size != 25)
        if folders:
            (call,) = calls_of(folders[0])
            model = folder_of(out, BASELINE, f"seen_{size}", f"seed_{seed}")
            assert call["argv"][:3] == ["--eval-only", "--config-file", str(model / "config.yaml")]
    table = table_of(capsys.readouterr().out)
    assert table["set"] == ("seen_20", "seen_22", "seen_25")
    assert table["unseen in all sets AP"] == ("25.00 ± 0.00", "25.00 ± 0.00", "15.00 ± 7.07")
    assert f"Unseen in all sets: {unseen[0]}, {unseen[1]}" in (out / "summary.md").read_text()


def test_a_larger_set_evaluates_the_earlier_models_again(run, out, seen_sets, capsys):
    def num_seen_in_evaluations():
        rows = {Path(row["seen_set"]).stem: row["always_unseen"]["results"] for row in rows_of(out)}
        return {name: results["segm_unseen"]["AP"] for name, results in rows.items()}

    assert run("--seen-sets", *seen_sets[:2]) == 0
    # The trainings' own AP is 10.
    assert num_seen_in_evaluations() == {"seen_20": 22, "seen_22": 10}
    assert run("--seen-sets", *seen_sets, "--jobs", 2) == 0
    assert num_seen_in_evaluations() == {"seen_20": 25, "seen_22": 25, "seen_25": 10}
    # Two lines for those that were evaluated again; they were trained once, by the first call.
    assert len(rows_of(out)) == 5
    assert len(calls_of(folder_of(out, BASELINE, "seen_20", "seed_1"))) == 1
    at_once = {row["run"].split("/")[2]: row["hardware"]["runs_at_once"] for row in rows_of(out)}
    assert at_once == {"seen_20": 1, "seen_22": 1, "seen_25": 2}
    capsys.readouterr()
    # The classes of the last call count; other ones are not put beside them.
    assert run("--seen-sets", *seen_sets[:2], configs=(OURS,)) == 0
    table = table_of(capsys.readouterr().out)
    compared = dict(zip(zip(table["config"], table["set"]), table["unseen in all sets AP"]))
    assert compared["teacher_student_R_50_FPN_1x", "seen_20"] == "22.00"
    assert [x for (name, _), x in compared.items() if "mask_rcnn" in name] == ["-"] * 3
    # Until they are compared on the same, for which nothing has to run.
    assert run("--seen-sets", *seen_sets[:2]) == 0
    table = table_of(capsys.readouterr().out.split("done already")[1])
    assert table["unseen in all sets AP"] == ("22.00", "10.00", "-", "22.00", "11.00")


def test_one_set_or_sets_of_all_classes_leave_nothing_to_compare(run, out, tmp_path):
    paths = [tmp_path / "first.txt", tmp_path / "second.txt"]
    paths[0].write_text("\n".join(VOC_CLASSES))
    paths[1].write_text("# the others\n" + "\n".join(NONVOC_CLASSES))
    assert run("--seen-sets", paths[0]) == 0
    assert rows_of(out)[0]["always_unseen"] is None
    assert run("--seen-sets", *paths) == 0
    assert [row["num_seen_classes"] for row in rows_of(out)] == [20, 60]
    assert all(row["always_unseen"] is None for row in rows_of(out))


def made_up_row(config="a/x.yaml", seed=1, seen_set=None, num_seen=20, ap=10.0, always=None):
    return {
        "run": f"{config}/{seen_set}/{seed}",
        "config": config,
        "seed": seed,
        "seen_set": seen_set,
        "num_seen_classes": num_seen,
        "opts": [],
        "commit": None,
        "seconds": 36.0,
        "finished": "2030-01-01T00:00:00",
        "results": {"segm_unseen": {"AP": ap}, "segm_seen": {"AP": None}},
        "always_unseen": always
        and {"classes": ["b", "c"], "results": {"segm_unseen": {"AP": always}}},
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return ``draw(rows)``: the axes of the figure."""
    figures = []
    monkeypatch.setattr(
        sweep_summary.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )

    def draw(rows):
        draw_summary(tmp_path / "figure.png", rows)
        return figures[-1].axes

    return draw


def test_ap_is_drawn_over_the_number_of_seen_classes(drawn):
    aps = {("x", 20): [10, 12], ("x", 40): [20], ("y", 20): [1], ("y", 40): [5, 3, 4]}
    rows = [
        made_up_row(f"a/{name}.yaml", seed, f"{num}.json", num, ap, ap + 0.5)
        for (name, num), values in aps.items()
        for seed, ap in enumerate(values)
    ]
    axes = drawn(rows[::-1])
    assert [ax.get_title() for ax in axes] == [
        "Mask AP, classes unseen in each set",
        "Mask AP, the 2 classes unseen in all sets",
    ]
    for ax, shift in zip(axes, (0, 0.5)):
        lines = {x.get_label(): x for x in ax.lines if not x.get_label().startswith("_")}
        assert set(lines) == {"x", "y"}
        assert lines["x"].get_xydata().tolist() == [[20, 11 + shift], [40, 20 + shift]]
        assert lines["y"].get_xydata().tolist() == [[20, 1 + shift], [40, 4 + shift]]
        points = [xy for x in ax.lines if x.get_label() not in lines for xy in x.get_xydata()]
        expected = [[n, ap + shift] for (_, n), values in aps.items() for ap in values]
        assert sorted(map(list, points)) == sorted(expected)
        assert list(ax.get_xticks()) == [20, 40]


def test_without_a_comparable_set_of_classes_there_is_one_panel(drawn):
    rows = [made_up_row(seen_set=f"{num}.json", num_seen=num) for num in (20, 40)]
    assert len(drawn(rows)) == 1


def test_bars_are_means_and_every_seed_is_a_point(drawn):
    rows = [made_up_row("a/x.yaml", seed, ap=ap) for seed, ap in ((1, 10.0), (2, 20.0))]
    rows += [made_up_row("b/x.yaml", ap=7.0), made_up_row("b/y.yaml", ap=None)]
    axes = drawn(rows)
    by_title = {ax.get_title(): ax for ax in axes}
    ax = by_title["Mask AP, unseen classes"]
    assert [bar.get_width() for bar in ax.patches] == [15, 7]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[10, 20], [7]]
    assert [text.get_text() for text in ax.texts] == [
        f"15.00 ± {statistics.stdev([10, 20]):.2f}",
        "7.00",
    ]
    # The folder where the names are the same.
    assert [x.get_text() for x in axes[0].get_yticklabels()] == ["a/x", "b/x", "y"]
    assert not by_title["Mask AP, seen classes"].patches


def test_what_is_undefined_is_left_out_of_the_means(tmp_path):
    rows = [made_up_row(seed=seed, ap=ap) for seed, ap in ((1, 10.0), (2, None), (3, 20.0))]
    table = table_of(write_summary(tmp_path / "summary.md", rows, []))
    assert table["**unseen AP**"] == ("15.00 ± 7.07",) and table["seen AP"] == ("-",)
    assert table["seeds"] == ("3",)


def test_several_test_datasets_show_the_first(tmp_path):
    row = made_up_row()
    row["results"] = {"first": {"segm_unseen": {"AP": 3.0}}, "second": {"segm_unseen": {"AP": 4.0}}}
    table = table_of(write_summary(tmp_path / "summary.md", [row], []))
    assert table["**unseen AP**"] == ("3.00",)
    assert "in percent on first alone" in (tmp_path / "summary.md").read_text()


def test_groups_are_ordered_by_config_and_number_of_classes():
    rows = [
        made_up_row("a/y.yaml", 2, "s40", 40),
        made_up_row("a/x.yaml", 1, "s20", 20),
        made_up_row("a/y.yaml", 1, "s20", 20),
        made_up_row("a/y.yaml", 1, "s40", 40),
    ]
    groups = group_rows(rows)
    names = [(g.config, g.seen_set, [row["seed"] for row in g.rows]) for g in groups]
    expected = [("x", "s20", [1]), ("y", "s20", [1]), ("y", "s40", [1, 2])]
    assert names == [(f"a/{name}.yaml", *rest) for name, *rest in expected]


@pytest.mark.parametrize(
    "visible, expected",
    [(None, ["0,1", "2,0", "1,2"]), ("5,7,6", ["5,7", "6,5", "7,6"])],
)
def test_gpus_are_dealt_out_in_turn(monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots = sweep.make_slots(3, 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in sweep.make_slots(3, 0))


def test_gpus_change_device_and_schedule(tmp_path, monkeypatch):
    """The base config is for 8 GPUs: with 2 it takes four times as many iterations."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ["--output-dir", tmp_path, "--configs", REPOSITORY / BASELINE]
    jobs = {}
    for num_gpus in (0, 1, 2):
        _, args = sweep.parse_args([*map(str, arguments), "--num-gpus", str(num_gpus)])
        sweep.check_numbers(args)
        (run,) = sweep.plan_runs(args)
        jobs[num_gpus] = run.training
    assert [jobs[n].num_iters for n in (0, 1, 2)] == [87960 * 8, 87960 * 8, 87960 * 4]
    pairs = {n: list(zip(job.arguments, job.arguments[1:])) for n, job in jobs.items()}
    assert ("MODEL.DEVICE", "cpu") in pairs[0] and ("MODEL.DEVICE", "cuda") in pairs[1]
    assert ("--num-gpus", 2) in pairs[2] and ("--dist-url", "auto") in pairs[2]
    assert "--num-gpus" not in jobs[1].arguments
    _, args = sweep.parse_args([*map(str, arguments), "--opts", "MODEL.DEVICE", "cuda:1"])
    sweep.check_numbers(args)
    assert args.num_gpus == 1
    (run,) = sweep.plan_runs(args)
    assert run.training.arguments.count("MODEL.DEVICE") == 1


def test_runs_of_other_settings_are_not_mixed(run, out, capsys):
    assert run("--seeds", 1) == 0
    # Another seed with another schedule would be averaged with the first.
    with pytest.raises(SystemExit) as error:
        run("--seeds", 2, opts=["SOLVER.MAX_ITER", "41", *OPTS[2:]])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "SOLVER.MAX_ITER is 41, there 40" in message and "another --output-dir" in message
    assert not folder_of(out, BASELINE, "seed_2").exists()
    # A key that came with another version of the code; it is off by default.
    path = folder_of(out, BASELINE, "seed_1") / "run.json"
    record = json.loads(path.read_text())
    del record["settings"]["MODEL.PSEUDO_MASK.METHOD"]
    path.write_text(json.dumps(record))
    # Neither of these changes what is learned.
    assert run("--seeds", 2, opts=[*OPTS, "MODEL.DEVICE", "cpu", "VIS_PERIOD", "5"]) == 0


def test_results_of_unknown_origin_are_refused(run, out, capsys):
    folder = folder_of(out, BASELINE, "seed_1")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        run()
    assert "no sweep has made them" in capsys.readouterr().err


def test_two_sweeps_do_not_run_in_one_folder(run, out, capsys):
    with sweep.locked(out), pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 2
    assert f"Another sweep is running in {out}" in capsys.readouterr().err
    assert run() == 0


def test_a_broken_line_of_the_results_is_named(run, out, capsys):
    assert run() == 0
    with open(out / "results.jsonl", "a") as f:
        f.write('{"run": "half\n')
    with pytest.raises(SystemExit):
        run()
    assert "results.jsonl, line 2 is not the result of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--configs", "none.yaml"], "none.yaml: no such file"),
        (["--configs", BASELINE, BASELINE], "would have the same name in the results"),
        (["--seeds", "1", "1"], "--seeds: 1 and 1 would have the same name"),
        (["--seeds", "-1"], "--seeds must not be negative"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--num-gpus", "99"], "--num-gpus must be from 0 to the number of GPUs"),
        (["--train-program", "none.py"], "--train-program none.py: no such file"),
        (["--seen-sets", "none.json"], "--seen-sets none.json: no such file"),
        (["--seen-sets", "TMP/typo.json"], "no class 'aeroplane' (nearest: airplane"),
        (["--configs", "configs/voc2nonvoc/oracle_R_50_FPN_1x.yaml"], None),
        (
            ["--configs", "configs/voc2nonvoc/oracle_R_50_FPN_1x.yaml"]
            + ["--seen-sets", "TMP/voc.json"],
            "sets TEST.SEEN_CLASSES",
        ),
        (
            ["--seen-sets", "TMP/voc.json", "--opts", "DATASETS.SEEN_CLASSES", "voc"],
            "--opts DATASETS.SEEN_CLASSES: the sweep sets this key itself",
        ),
        (["--opts", "SEED", "3"], "--opts SEED: the sweep sets this key itself"),
        (["--opts", "NO.SUCH", "3"], "--opts NO.SUCH 3: Non-existent key"),
        (["--opts", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["--opts", "DATASETS.SEEN_CLASSES", "unicorn"], "no class 'unicorn'"),
        (["--opts", "SOLVER.IMS_PER_BATCH", "15"], "SOLVER.REFERENCE_WORLD_SIZE"),
        (["--output-dir", "TMP/voc.json/out"], "Cannot write to --output-dir"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sweep, "run_sweep", lambda *_: True)
    (tmp_path / "voc.json").write_text(json.dumps(VOC_CLASSES))
    (tmp_path / "typo.json").write_text('["aeroplane"]')
    arguments = [x.replace("TMP/", f"{tmp_path}/") for x in arguments]
    defaults = {"--configs": BASELINE, "--output-dir": str(tmp_path / "out")}
    for option, value in defaults.items():
        if option not in arguments:
            arguments = [option, value, *arguments]
    if words is None:
        assert sweep.main(arguments) == 0
        return
    with pytest.raises(SystemExit) as error:
        sweep.main(arguments)
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.partition("error:")[2].split())


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(["--help"])
    assert error.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.slow
def test_two_methods_are_trained_and_evaluated_for_real(tmp_path):
    datasets = tmp_path / "datasets"
    generate_shapes(str(datasets / "shapes"), num_train=4, num_val=3, image_size=64)
    coco = json.loads((datasets / "shapes/annotations/instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    objects = [names[annotation["category_id"]] for annotation in coco["annotations"]]
    further = next(name for name in objects if name not in SHAPES_SEEN_CLASSES)
    sets = {"four": list(SHAPES_SEEN_CLASSES), "five": [*SHAPES_SEEN_CLASSES, further]}
    for name, classes in sets.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(classes))

    configs = [f"configs/shapes/{name}_shapes.yaml" for name in ("mask_rcnn", "teacher_student")]
    command = [sys.executable, "tools/sweep.py", "--output-dir", tmp_path / "out"]
    command += ["--report", "--jobs", 2, "--num-gpus", 0, "--configs", *configs]
    command += ["--seen-sets", *(tmp_path / f"{name}.txt" for name in sets)]
    command += ["--opts", "SOLVER.MAX_ITER", 2, "MODEL.PSEUDO_MASK.WARMUP_ITERS", 1]
    command += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    command += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64]
    result = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    rows = {
        (Path(row["config"]).name, Path(row["seen_set"]).stem): row
        for row in rows_of(tmp_path / "out")
    }
    assert len(rows) == 4
    num_unseen = {name: sum(x not in sets[name] for x in objects) for name in sets}
    assert num_unseen["five"] < num_unseen["four"]
    for (_, name), row in rows.items():
        assert row["num_seen_classes"] == len(sets[name])
        assert row["results"]["segm"]["num_gt"] == len(objects)
        assert row["results"]["segm_unseen"]["num_gt"] == num_unseen[name]
        of_always_unseen = row["always_unseen"]["results"]["segm_unseen"]
        assert of_always_unseen["num_gt"] == num_unseen["five"]
        heads = {"student", "teacher"} if "teacher" in row["config"] else {"student"}
        assert set(row["gt_boxes"]) == heads
        for results in row["gt_boxes"].values():
            assert results["segm_unseen"]["num_gt"] == num_unseen[name]
    assert (tmp_path / "out" / "summary.png").is_file()
    for name in sets:
        folder = tmp_path / "out" / "reports" / name / "seed_1"
        assert "teacher_student" in (folder / "report.html").read_text()
        analysis = json.loads((folder / "analysis.json").read_text())
        assert set(analysis["dataset"]["seen_classes"]) == set(sets[name])
        assert list(analysis["models"]) == ["mask_rcnn", "teacher_student"]
        for results in analysis["models"].values():
            assert results["gt_boxes"]["segm_unseen"]["num_gt"] == num_unseen[name]
        quality = analysis["models"]["teacher_student"]["pseudo_masks"]
        assert quality["num_objects"] == num_unseen[name]
        assert {x["baseline"] for x in analysis["differences"]} == {"mask_rcnn"}
