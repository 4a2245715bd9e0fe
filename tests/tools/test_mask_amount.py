"""tools/mask_amount.py: each training has its share of the masks, and its result its place."""

import json

import pytest

import mask_amount as program
from sweeps.training_jobs import REPOSITORY

CONFIGS = [str(REPOSITORY / x) for x in program.CONFIGS]


@pytest.fixture
def run(tiny_coco, tmp_path, monkeypatch, capsys):
    """Run the program with trainings that only write results: AP is what their name has to say."""

    def fake_jobs(title, jobs, slots):
        run.jobs, run.slots = jobs, slots
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            ap = 50.0 if "mask_rcnn" in job.name else 60.0
            ap += 10 * ("seed 2" in job.name) + ("keep_1_" in str(job.folder))
            ap += 100 * ("ground-truth" in job.name)
            results = {task: {"AP": ap, "AP50": ap + 0.5} for task in ("bbox", "segm")}
            (job.folder / "results.json").write_text(json.dumps(results))
        return run.is_successful

    def run(*arguments, configs=CONFIGS):
        data = ["--annotations", tiny_coco.json_file, "--image-root", tiny_coco.image_root]
        options = ["--output-dir", str(tmp_path / "out"), "--configs", *configs]
        code = program.main([*data, *options, *arguments])
        return code, capsys.readouterr().out

    run.is_successful = True
    monkeypatch.setattr(program, "run_jobs", fake_jobs)
    return run


def test_every_config_is_trained_on_every_share(run, tmp_path, tiny_coco):
    code, _ = run("--shares", "1/3", "1", "--seeds", "3", "--opts", "SOLVER.MAX_ITER", "7")
    assert code == 0 and len(run.jobs) == 8
    trainings = [x for x in run.jobs if x.num_iters]
    assert [x.num_iters for x in trainings] == [7] * 4
    seen = set()
    for job in trainings:
        values = dict(zip(job.arguments[1::2], map(str, job.arguments[2::2])))
        (path,) = eval(values["DATASETS.TRAIN"])
        with open(path) as f:
            rows = json.load(f)["annotations"]
        num_masks = sum(bool(x.get("segmentation")) and not x["iscrowd"] for x in rows)
        assert len(rows) == 12 and num_masks == (3 if "1_3" in path else 8)
        assert values["DATASETS.TRAIN_IMAGE_ROOT"] == tiny_coco.image_root
        assert values["DATASETS.SEEN_CLASSES"] == "all" and values["SEED"] == "3"
        assert values["SOLVER.MAX_ITER"] == "7"
        seen.add((values["--config-file"], path))
    assert len(seen) == 4
    # Few masks first, and each evaluation after its training.
    assert [x.num_iters > 0 for x in run.jobs] == [True, False] * 4
    assert all(b.after is a for a, b in zip(run.jobs[::2], run.jobs[1::2]))


def test_table_and_figure(run, tmp_path):
    code, output = run("--shares", "0.5", "1", "--seeds", "1", "2", "--jobs", "2")
    assert code == 0 and len(run.slots) == 2
    text = (tmp_path / "out/mask_amount.md").read_text()
    assert text in output
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines()]
    # Share, masks, config, then AP and AP50 on given boxes, AP and box AP on detected ones:
    # crowds have masks that stay, but nothing learns from them.
    spread = "± 7.1"  # of 50 and 60
    student = [f"165.0 {spread}", f"165.5 {spread}", f"65.0 {spread}", f"65.0 {spread}"]
    assert ["50 %", "5", "`teacher_student_box_fit`", *student] in rows
    baseline = [f"156.0 {spread}", f"156.5 {spread}", f"56.0 {spread}", f"56.0 {spread}"]
    assert ["100 %", "8", "`mask_rcnn`", *baseline] in rows
    assert "--shares 0.5 1 --seeds 1 2" in text and "Seeds: 1, 2; mean" in text
    assert (tmp_path / "out/mask_amount.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_training_ends_with_1_and_no_table(run, tmp_path):
    run.is_successful = False
    assert run("--shares", "1")[0] == 1
    assert not (tmp_path / "out/mask_amount.md").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shares", "0.5", "1/2"], "one is given twice: 0.5 1/2"),
        (["--shares", "2"], "from 0 to 1, got '2'"),
        (["--opts", "SOLVER.MAX_ITERS", "2"], "MAX_ITERS"),
        (["--jobs", "0"], "at least 1, got 0"),
        (["--annotations", "none.json"], "none.json: no such file"),
        (["--image-root", "none"], "none: no such folder"),
    ],
)
def test_wrong_command_lines_end_with_2(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_help_gives_examples(capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["--help"])
    assert error.value.code == 0 and "examples:" in capsys.readouterr().out
