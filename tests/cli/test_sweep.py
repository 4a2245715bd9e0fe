"""``tsmask sweep`` with a stub in the place of the training; once, slowly, with the real one."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES, sweep
from teacher_student_mask.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
BASELINE, OURS = (
    str(REPOSITORY / f"configs/coco/{x}.yaml") for x in ("mask_rcnn", "teacher_student")
)
OPTS = ["SOLVER.MAX_ITER", "40"]

# AP of unseen classes: 10 x seed for the baseline, 1 more for ours; on ground-truth boxes 50, and
# 60 of a teacher. $FAIL and $HANG name runs that fail and that do not end.
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
    ap = 60 if keys["TEST.MASK_HEAD"] == "teacher" else 50
else:
    if os.environ.get("HANG", "no run") in str(out):
        (out / "hangs").write_text(str(os.getpid()))
        time.sleep(600)
    (out / "model_final.pth").touch()
    ap = 10 * int(keys["SEED"]) + ("teacher_student" in keys["--config-file"])
metrics = {"AP": ap, "AP50": 2 * ap, "AP75": float("nan"), "num_gt": 3}
tasks = ("bbox", "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
if "--eval-only" in argv:
    out = out / "inference"
    out.mkdir(exist_ok=True)
results = {task: metrics for task in tasks}
if "--eval-only" in argv:
    results["segm_unseen/filled_box"] = {"AP": 33.75}
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return ``run(*arguments)``: ``tsmask sweep`` with the stub; gives its exit code."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "TRAIN_COMMAND", (sys.executable, str(stub)))

    def run(*arguments, configs=(BASELINE,), opts=OPTS):
        required = ["--output-dir", tmp_path / "out", "--num-gpus", 0, "--configs", *configs]
        return main([str(x) for x in ["sweep", *required, *arguments, "--opts", *opts]])

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def rows_of(out):
    # Strictly json: NaN is refused.
    paths = sorted(out.glob("runs/**/run.json"))
    return [json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths]


def calls_of(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_each_run_is_a_line_with_all_that_is_known_of_it(run, out, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("--seeds", 1, 2, "--jobs", 2, configs=(BASELINE, OURS)) == 0
    rows = rows_of(out)
    assert len(rows) == 4
    (row,) = [x for x in rows if x["seed"] == 2 and x["config"] == "coco/teacher_student"]
    assert row["name"] == "coco/teacher_student/seed_2" and row["opts"] == OPTS
    metrics = {"AP": 21, "AP50": 42, "AP75": None, "num_gt": 3}
    assert row["results"]["detections"]["segm_unseen"] == metrics
    threads = str(max(1, os.cpu_count() // 2))
    folder = out / "runs/coco/teacher_student/seed_2"
    (call,) = calls_of(folder)
    assert call["threads"] == threads
    expected = ["--resume", "--config-file", OURS, "MODEL.DEVICE", "cpu", *OPTS, "SEED", "2"]
    assert call["argv"] == [*expected, "OUTPUT_DIR", str(folder)]
    # Mean and deviation over the seeds, checked by hand.
    mean, spread = statistics.mean([11, 21]), statistics.stdev([11, 21])
    summary = (out / "summary.md").read_text()
    (line,) = [x for x in summary.splitlines() if "| coco/teacher_student " in x]
    assert f"{mean:.2f} ± {spread:.2f}" in line
    assert line in capsys.readouterr().out


def test_finished_runs_are_not_repeated_and_more_can_be_added(run, out, capsys):
    assert run("--seeds", 1) == 0
    assert run("--seeds", 1, 2, configs=(BASELINE, OURS)) == 0
    assert len(rows_of(out)) == 4
    assert len(calls_of(out / "runs/coco/mask_rcnn/seed_1")) == 1
    assert run("--seeds", 1, opts=["SOLVER.MAX_ITER", "50"]) == 1
    assert "has a run with other changes, SOLVER.MAX_ITER 40" in capsys.readouterr().err


def test_a_run_that_fails_is_shown_and_the_others_go_on(run, out, monkeypatch, log):
    monkeypatch.setenv("FAIL", "teacher_student")
    assert run(configs=(OURS, BASELINE)) == 1
    assert "the stub failed on purpose" in log.text
    assert [row["config"] for row in rows_of(out) if row["results"]] == ["coco/mask_rcnn"]
    monkeypatch.delenv("FAIL")
    assert run(configs=(OURS, BASELINE)) == 0
    assert all(row["results"] for row in rows_of(out))


def test_sets_replace_the_seen_classes(run, out, tmp_path):
    sets = [VOC_CLASSES, (*VOC_CLASSES, *NONVOC_CLASSES[:10])]
    paths = [tmp_path / f"seen_{len(x)}.json" for x in sets]
    for path, names in zip(paths, sets):
        path.write_text(json.dumps(names))
    assert run("--seen-sets", *paths, configs=(BASELINE, OURS)) == 0
    rows = {row["name"]: row for row in rows_of(out)}
    row = rows["coco/teacher_student/seen_20/seed_1"]
    assert row["seen_set"] == "seen_20"
    (call,) = calls_of(out / "runs/coco/teacher_student/seen_20/seed_1")
    assert call["argv"][call["argv"].index("DATASETS.SEEN_CLASSES") + 1] == str(paths[0])
    assert "seen_30" in (out / "summary.md").read_text()
    assert (out / "summary.png").stat().st_size > 5000


def test_a_report_evaluates_students_and_teachers_on_ground_truth_boxes(run, out, monkeypatch):
    pages = []
    monkeypatch.setattr(sweep, "write_sweep_report", lambda *args: pages.append(args))
    assert run("--report", configs=(BASELINE, OURS)) == 0
    aps = {
        row["config"]: {k: x["segm_unseen"]["AP"] for k, x in row["results"].items()}
        for row in rows_of(out)
    }
    assert aps["coco/mask_rcnn"] == {"detections": 10, "gt_boxes_student": 50}
    expected = {"detections": 11, "gt_boxes_student": 50, "gt_boxes_teacher": 60}
    assert aps["coco/teacher_student"] == expected
    (line,) = [x for x in (out / "summary.md").read_text().splitlines() if "filled box" in x]
    assert [x.strip() for x in line.split("|")][1:5] == ["gt_boxes", "filled box", "-", "1"]
    assert "33.75" in line
    ((group, folder),) = pages
    assert list(group) == ["coco/mask_rcnn", "coco/teacher_student"]
    assert folder == out / "reports/seed_1"


# The second as "nohup tsmask sweep &" and "kill": what a shell starts so ignores interrupts.
@pytest.mark.parametrize(
    "number, on_interrupt", [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)]
)
def test_no_process_stays_behind_when_it_is_interrupted(tmp_path, number, on_interrupt):
    (tmp_path / "stub.py").write_text(STUB)
    code = f"""
import sys
from teacher_student_mask import sweep
from teacher_student_mask.cli.main import main
sweep.TRAIN_COMMAND = (sys.executable, {str(tmp_path / "stub.py")!r})
sys.exit(main({["sweep", "--output-dir", str(tmp_path), "--num-gpus", "0", "--configs", OURS]!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "HANG": "seed_1", "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt),
        stdout=subprocess.PIPE,
        text=True,
    )
    hangs = tmp_path / "runs/coco/teacher_student/seed_1/hangs"
    deadline = time.monotonic() + 300
    while not (hangs.is_file() and hangs.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(hangs.read_text()), 0)


def test_paths_may_have_blanks_and_packages_may_be_missing(run, out, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a = b's"
    folder.mkdir()
    (folder / "c.yaml").write_text(f"_BASE_: {BASELINE}\n")
    (planned,) = sweep.plan_sweep([str(folder / "c.yaml")], out)
    assert planned.name == "a___b_s/c/seed_1"
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(configs=[BASELINE]) == 1
    assert "Not installed: submitit; pip install 'teacher-" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, configs, opts, words",
    [
        ([], ["none.yaml"], [], "none.yaml"),
        ([], [BASELINE, BASELINE], [], "Two runs are named coco/mask_rcnn/seed_1"),
        ([], [BASELINE], ["SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITERS"),
        ([], [BASELINE], ["DATASETS.TEST", "()"], "DATASETS.TEST is (); allowed: one"),
        (["--seen-sets", "none.json"], [BASELINE], [], "none.json"),
        ([], [f"it's={BASELINE}"], [], "No closing quotation"),
    ],
)
def test_what_is_wrong_is_found_before_anything_runs(
    run, out, capsys, arguments, configs, opts, words
):
    assert run(*arguments, configs=configs, opts=opts) == 1
    assert words in capsys.readouterr().err
    assert not (out / "runs").exists()
