"""``tsmask check``; the checks are tested in tests/test_coco_json.py and tests/data."""

import pytest

from teacher_student_mask.cli.main import main


def run(capsys, *arguments):
    code = main(["check", *(str(x) for x in arguments)])
    return code, capsys.readouterr()


def change_box(width):
    def change(data):
        data["annotations"][10]["bbox"][2] = width

    return change


def test_a_clean_file_ends_with_0_and_the_table(tiny_coco, capsys):
    code, output = run(capsys, tiny_coco.json_file, "--seen-classes", "ant, ship")
    assert code == 0
    rows = [line.split() for line in output.out.splitlines()]
    # Class, split, objects, human and model masks, boxes only, crowd, rectangles.
    assert ["ant", "seen", "4", "3", "0", "1", "1", "0"] in rows
    assert ["cat", "unseen", "3", "3", "0", "0", "0", "0"] in rows
    assert ["ship", "seen", "4", "2", "0", "2", "0", "0"] in rows
    assert "4 images, 12 annotations" in output.out
    assert "0 kinds of errors, 0 kinds of warnings" in output.out


def test_warnings_end_with_0_and_errors_with_1(make_tiny_coco, capsys):
    code, output = run(capsys, make_tiny_coco(change_box(0)).json_file)
    assert (
        code == 0
        and "warning: " in output.out
        and "annotation 111: 'bbox' is [4.0, 10.0, 0, " in output.out
    )
    code, output = run(capsys, make_tiny_coco(change_box(-1)).json_file)
    assert code == 1 and "annotation 111: 'bbox' is [4.0, 10.0, -1, 40.0]" in output.out
    assert "1 kinds of errors, 0 kinds of warnings" in output.out


def test_images_are_read_on_request(tiny_coco, capsys):
    arguments = [tiny_coco.json_file, "--image-root", tiny_coco.image_root]
    with open(f"{tiny_coco.image_root}/seen.png", "r+b") as f:
        f.truncate(100)
    assert run(capsys, *arguments)[0] == 0
    code, output = run(capsys, *arguments, "--images")
    assert code == 1
    assert f"image 30: 'file_name' is '{tiny_coco.image_root}/seen.png'" in output.out
    assert "4/4" in output.err  # the progress bar


def test_auto_takes_the_classes_with_enough_masks(tiny_coco, capsys):
    arguments = ["--seen-classes", "auto", "--min-masks-per-class", 3]
    code, output = run(capsys, tiny_coco.json_file, *arguments)
    lines = [line.split() for line in output.out.splitlines() if line[:4] in ("ant ", "ship")]
    # Three ants and two ships have a mask.
    assert code == 0 and {x[0]: x[1] for x in lines} == {"ant": "seen", "ship": "unseen"}
    code, output = run(capsys, tiny_coco.json_file, "--seen-classes", "auto")
    assert code == 1 and "no class has DATASETS.MIN_MASKS_PER_CLASS 10 masks" in output.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.json"], "none.json: cannot be read"),
        (["JSON", "--images"], "--images needs --image-root"),
        (["JSON", "--image-root", "none"], "'image_root' is 'none'; allowed: a folder"),
    ],
)
def test_wrong_arguments_are_a_sentence(tiny_coco, capsys, arguments, words):
    code, output = run(capsys, *(tiny_coco.json_file if x == "JSON" else x for x in arguments))
    assert code == 1 and words in output.err + output.out
