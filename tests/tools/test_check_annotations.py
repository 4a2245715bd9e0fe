"""The command line of tools/check_annotations.py; the checks are tested in tests/data."""

import json

import pytest

import check_annotations as program


def run(capsys, *arguments):
    code = program.main([str(x) for x in arguments])
    return code, capsys.readouterr().out


def test_a_clean_file_ends_with_0_and_the_table(tiny_coco, capsys):
    code, output = run(capsys, tiny_coco.json_file, "--seen-classes", "ant, ship")
    assert code == 0
    rows = [line.split() for line in output.splitlines()]
    # Class, split, objects, masks, boxes only, crowd, rectangles, left out.
    assert ["ant", "seen", "4", "3", "1", "1", "0", "-"] in rows
    assert ["cat", "unseen", "3", "3", "0", "0", "0", "-"] in rows
    assert ["ship", "seen", "4", "2", "2", "0", "0", "-"] in rows
    assert "4 images, 12 annotations" in output
    assert "0 kinds of errors, 0 kinds of warnings" in output


def test_warnings_end_with_0(make_tiny_coco, capsys):
    def change(data):
        data["annotations"][10]["bbox"][2] = 0

    code, output = run(capsys, make_tiny_coco(change).json_file)
    assert code == 0
    assert "warning: " in output and "annotation 111: 'bbox' is [4.0, 10.0, 0, 40.0]" in output
    assert "1 (box without area)" in output
    assert "0 kinds of errors, 1 kinds of warnings" in output


def test_errors_end_with_1(make_tiny_coco, capsys):
    def change(data):
        data["annotations"][10]["bbox"][2] = -1

    code, output = run(capsys, make_tiny_coco(change).json_file)
    assert code == 1
    assert "error: " in output and "annotation 111: 'bbox' is [4.0, 10.0, -1, 40.0]" in output


def test_the_number_of_classes_is_compared(tiny_coco, capsys):
    assert run(capsys, tiny_coco.json_file, "--num-classes", 3)[0] == 0
    code, output = run(capsys, tiny_coco.json_file, "--num-classes", 80)
    assert code == 1 and "set MODEL.ROI_HEADS.NUM_CLASSES 3" in output


@pytest.mark.parametrize("workers", [1, 2])
def test_images_are_read_on_request(tiny_coco, capsys, workers):
    arguments = [tiny_coco.json_file, "--image-root", tiny_coco.image_root, "--workers", workers]
    with open(f"{tiny_coco.image_root}/seen.png", "r+b") as f:
        f.truncate(100)
    assert run(capsys, *arguments)[0] == 0
    code = program.main([str(x) for x in [*arguments, "--images"]])
    captured = capsys.readouterr()
    assert code == 1
    assert f"image 30: 'file_name' is '{tiny_coco.image_root}/seen.png'" in captured.out
    assert "4/4" in captured.err  # the progress bar


def test_a_file_that_is_no_json_is_an_error_without_a_table(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("{")
    code, output = run(capsys, path)
    assert code == 1 and f"error: {path}: 'content' is unreadable" in output
    assert "left out" not in output.splitlines()[0]


def test_the_report_is_written_as_json(make_tiny_coco, tmp_path, capsys):
    def change(data):
        for row in data["annotations"][8:]:
            row["iscrowd"] = 7

    out = tmp_path / "out.json"
    assert run(capsys, make_tiny_coco(change).json_file, "--json", out)[0] == 1
    report = json.loads(out.read_text())
    assert report["num_images"] == 4 and report["num_annotations"] == 12
    (finding,) = report["findings"]
    assert finding["severity"] == "error" and finding["field"] == "iscrowd"
    assert finding["count"] == 4 and finding["examples"][0] == ["109", "7"]
    assert finding["message"].endswith("(4 in all: 109, 110, 111, 112).")
    assert {x["name"]: x["masks"] for x in report["classes"]} == {"ant": 2, "cat": 1, "ship": 1}


def test_the_annotations_are_never_replaced_and_other_files_only_when_told(
    tiny_coco, tmp_path, capsys
):
    """--json with the path of the annotations replaced them by the report."""
    before = open(tiny_coco.json_file, "rb").read()
    out = tmp_path / "out.json"
    out.write_text("mine")
    for path, words in ((tiny_coco.json_file, "never replaced"), (out, "exists; --force")):
        for arguments in ([], ["--force"]):
            if path == out and arguments:
                continue
            with pytest.raises(SystemExit):
                program.main([tiny_coco.json_file, "--json", str(path), *arguments])
            assert words in capsys.readouterr().err
    assert open(tiny_coco.json_file, "rb").read() == before and out.read_text() == "mine"
    assert run(capsys, tiny_coco.json_file, "--json", out, "--force")[0] == 0
    assert json.loads(out.read_text())["num_images"] == 4


def test_auto_takes_the_classes_with_enough_masks(tiny_coco, capsys):
    arguments = ["--seen-classes", "auto", "--min-masks-per-class", 3]
    code, output = run(capsys, tiny_coco.json_file, *arguments)
    splits = dict(line.split()[:2] for line in output.splitlines() if line[:4] in ("ant ", "ship"))
    # Three ants and two ships have a mask.
    assert code == 0 and splits == {"ant": "seen", "ship": "unseen"}
    code, output = run(capsys, tiny_coco.json_file, "--seen-classes", "auto")
    assert code == 1 and "no class has 10 masks, DATASETS.MIN_MASKS_PER_CLASS" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.json"], "none.json: no such file"),
        (["JSON", "--images"], "--images needs --image-root"),
        (["JSON", "--image-root", "none"], "--image-root none: no such folder"),
        (["JSON", "--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["JSON", "--num-classes", "-3"], "--num-classes is -3; it must be 1 or more"),
        (["JSON", "--min-masks-per-class", "0"], "--min-masks-per-class is 0; it must be 1 or"),
        (["JSON", "--json", "none/out.json"], "--json none/out.json: cannot be written"),
    ],
)
def test_wrong_command_lines_end_with_2(tiny_coco, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        program.main([tiny_coco.json_file if x == "JSON" else x for x in arguments])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["--help"])
    output = capsys.readouterr().out
    assert error.value.code == 0
    assert "examples:" in output and "exit code:" in output
