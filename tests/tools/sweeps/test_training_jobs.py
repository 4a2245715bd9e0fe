"""Runs of a training program as processes: order, limits, failures, and that none stays behind."""

import json
import os
import re
import subprocess
import time
import types

import pytest

from sweeps import training_jobs
from sweeps.training_jobs import Job, run_jobs

# Prints its arguments and writes results.json, like train_net.py in much less time.
PROGRAM = """
import json, os, pathlib, sys, time
folder, action = pathlib.Path(sys.argv[1]), sys.argv[2]
start = time.time()
print("arguments:", sys.argv[2:])
print(*range(30), sep="\\n", flush=True)
if action == "fail":
    sys.exit("out of luck")
if action == "linger":
    (folder / "results.json").write_text("{}")
time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
if action == "succeed":
    (folder / "results.json").write_text("{}")
log = {"start": start, "end": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}
log["slot"] = os.environ.get("SLOT")
(folder / "log.json").write_text(json.dumps(log))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.setattr(training_jobs, "POLL_SECONDS", 0.02)
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def make_job(tmp_path, name, *arguments, **kwargs):
    folder = tmp_path / name
    return Job(name, folder, [folder, *(arguments or ["succeed"])], **kwargs)


def log_of(job):
    return json.loads((job.folder / "log.json").read_text())


def test_iterations_come_from_the_last_whole_line_of_the_metrics(tmp_path):
    job = Job("a", tmp_path, [], num_iters=40)
    assert job.iters_done() == 0
    lines = [{"iteration": 19}, {"iteration": 39}, {"iteration": 39, "segm/AP": 1.0}]
    metrics = tmp_path / "metrics.json"
    metrics.write_text("\n".join(map(json.dumps, lines[:1])))
    assert job.iters_done() == 20
    # As it is read while the program writes to it.
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"iterat')
    assert job.iters_done() == 40


def test_a_training_is_done_when_its_last_evaluation_is(tmp_path):
    training, evaluation = Job("a", tmp_path, [], num_iters=9), Job("a", tmp_path, [])
    note, results = tmp_path / "last_checkpoint", tmp_path / "results.json"
    assert not training.is_done() and not evaluation.is_done()
    results.write_text("{}")  # with TEST.EVAL_PERIOD, on the way
    assert evaluation.is_done()
    assert not training.is_done()
    note.write_text("model_0000004.pth")
    os.utime(note, ns=(0, 0))
    assert not training.is_done()
    note.write_text("model_final.pth")
    os.utime(note, ns=(10**18, 10**18))
    os.utime(results, ns=(10**18 - 1, 10**18 - 1))
    assert not training.is_done()
    os.utime(results, ns=(10**18 + 1, 10**18 + 1))
    assert training.is_done()


def test_a_failing_job_is_reported_with_the_end_of_its_output(tmp_path, capsys):
    """With the real program, as the demo runs it."""
    done = Job("done", tmp_path / "done", ["--no-such-flag"])
    done.folder.mkdir()
    (done.folder / "results.json").write_text("{}")
    assert run_jobs("Training", [done])
    assert "Training: done already" in capsys.readouterr().out
    broken = Job("broken", tmp_path / "broken", ["--no-such-flag"])
    assert not run_jobs("Training", [done, broken])
    output = capsys.readouterr().out
    assert "Training failed for broken (exit code 2)" in output
    assert "unrecognized arguments" in output


def test_the_others_go_on_when_one_fails(tmp_path, program, capsys):
    names = {"good": "succeed", "bad": "fail", "empty": "silent", "late": "succeed"}
    jobs = [make_job(tmp_path, *item) for item in names.items()]
    ends = []
    assert not run_jobs(
        "Jobs", jobs, [{"OMP_NUM_THREADS": "1"}], program, lambda *end: ends.append(end)
    )
    assert [(job.name, is_done) for job, _, is_done in ends] == [
        ("good", True),
        ("bad", False),
        ("empty", False),
        ("late", True),
    ]
    captured = capsys.readouterr()
    of_bad = captured.out.partition("Jobs failed for bad")[2].partition("\n\n")[0].splitlines()
    assert of_bad[0] == " (exit code 1); the end of its output:"
    # Fifteen lines, the last of which is the error.
    assert of_bad[1:] == [*map(str, range(16, 30)), "out of luck"]
    assert "Jobs failed for empty (it ended without results.json)" in captured.out
    assert "2 of 4 done" in captured.err
    # What failed runs again, the rest does not.
    ends.clear()
    run_jobs("Jobs", jobs, [{"OMP_NUM_THREADS": "1"}], program, lambda *end: ends.append(end))
    assert [job.name for job, *_ in ends] == ["bad", "empty"]


def test_as_many_jobs_run_at_once_as_there_are_slots(tmp_path, program):
    jobs = [make_job(tmp_path, f"job{k}", "succeed", 0.5) for k in range(5)]
    slots = [{"OMP_NUM_THREADS": "3", "SLOT": str(k)} for k in range(2)]
    seconds = {}
    run_jobs("Jobs", jobs, slots, program, lambda job, s, _: seconds.update({job.name: s}))
    logs = [log_of(job) for job in jobs]
    for log in logs:
        others = [x for x in logs if x is not log]
        at_start = [x for x in others if x["start"] <= log["start"] < x["end"]]
        assert len(at_start) <= 1
        assert all(x["slot"] != log["slot"] for x in at_start)
    assert {log["slot"] for log in logs} == {"0", "1"} and {x["threads"] for x in logs} == {"3"}
    assert all(seconds[job.name] >= 0.5 for job in jobs)


def test_without_slots_all_run_at_once_with_a_share_of_the_cores(tmp_path, program, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = [make_job(tmp_path, f"job{k}", "succeed", 3) for k in range(3)]
    assert run_jobs("Jobs", jobs, program=program)
    logs = [log_of(job) for job in jobs]
    assert {log["threads"] for log in logs} == {"2"}
    assert max(log["start"] for log in logs) < min(log["end"] for log in logs)


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("1", 1), ("", 2), ("0", 2), ("four", 2), (None, 2)]
)
def test_who_has_set_a_number_of_threads_gets_it_for_each_job(monkeypatch, given, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert training_jobs.threads_per_job(3) == expected


def test_a_job_waits_for_what_it_needs(tmp_path, program, capsys):
    first = make_job(tmp_path, "first", "succeed", 0.2)
    second = make_job(tmp_path, "second", after=first)
    assert run_jobs("Jobs", [second, first], [{"OMP_NUM_THREADS": "1"}] * 2, program)
    assert log_of(first)["end"] <= log_of(second)["start"]
    # Results that are there do not mean that the process has ended.
    lingering = make_job(tmp_path, "lingering", "linger", 0.5)
    next_one = make_job(tmp_path, "next", after=lingering)
    assert run_jobs("Jobs", [lingering, next_one], [{"OMP_NUM_THREADS": "1"}] * 2, program)
    assert log_of(lingering)["end"] <= log_of(next_one)["start"]

    broken = make_job(tmp_path, "broken", "fail")
    third = make_job(tmp_path, "third", after=broken)
    fourth = make_job(tmp_path, "fourth", after=third)
    other = make_job(tmp_path, "other")
    jobs = [fourth, third, broken, other]
    assert not run_jobs("Jobs", jobs, [{"OMP_NUM_THREADS": "1"}], program)
    assert other.is_done() and not third.folder.exists()
    output = capsys.readouterr().out
    for name in ("third", "fourth"):
        assert f"Jobs failed for {name} (not started, because what it needs failed)." in output
    # Not among the jobs and not done.
    assert not run_jobs("Jobs", [third], [{"OMP_NUM_THREADS": "1"}], program)


def is_alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def test_no_process_stays_behind_when_the_wait_is_interrupted(tmp_path, monkeypatch):
    # A training with a worker of its own that would go on by itself.
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "worker = subprocess.Popen(['sleep', '60'])\n"
        "new = pathlib.Path(sys.argv[1], 'pids.tmp')\n"
        "new.write_text(f'{os.getpid()} {worker.pid}')\n"
        "new.rename(new.with_suffix('.txt'))\n"
        "time.sleep(60)\n"
    )
    job = make_job(tmp_path, "job")
    pids = job.folder / "pids.txt"

    def interrupt(seconds):
        time.sleep(0.05)
        if pids.is_file():
            raise KeyboardInterrupt

    # Not time.sleep itself, with which subprocess waits, too.
    clock = types.SimpleNamespace(sleep=interrupt, perf_counter=time.perf_counter)
    monkeypatch.setattr(training_jobs, "time", clock)
    ends = []
    with pytest.raises(KeyboardInterrupt):
        run_jobs("Jobs", [job], None, program, lambda *end: ends.append(end))
    deadline = time.monotonic() + 10
    while any(map(is_alive, map(int, pids.read_text().split()))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ((_, seconds, is_done),) = ends
    assert not is_done and 0 < seconds < 15


def test_the_bar_counts_iterations_from_where_the_trainings_are(tmp_path, program, capsys):
    job = make_job(tmp_path, "job", "silent", 0.1, num_iters=40)
    job.folder.mkdir()
    (job.folder / "metrics.json").write_text('{"iteration": 29}\n')
    run_jobs("Jobs", [job], None, program)
    # Not as if 30 iterations had been done just now, from which follows a wrong remaining time.
    bar = capsys.readouterr().err
    assert "| 30/40" in bar and "| 0/40" not in bar


def test_the_rate_is_that_of_the_time_since_the_last_report(tmp_path, program, capsys):
    program.write_text(
        "import pathlib, sys, time\n"
        "metrics = pathlib.Path(sys.argv[1], 'metrics.json')\n"
        "time.sleep(0.8)\n"
        "metrics.write_text('{\"iteration\": 19}\\n')\n"
        "time.sleep(0.3)\n"
    )
    run_jobs("Jobs", [make_job(tmp_path, "job", num_iters=40)], None, program)
    rates = re.findall(r"\| 20/40 .*?([\d.]+)iteration/s", capsys.readouterr().err)
    # 20 iterations in at least 0.8 s.
    assert rates and all(0 < float(rate) <= 25 for rate in rates)


def test_the_default_program_is_train_net():
    assert training_jobs.TRAIN_PROGRAM.name == "train_net.py"
    assert training_jobs.TRAIN_PROGRAM.is_file()
