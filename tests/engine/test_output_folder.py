"""OUTPUT_DIR before a run starts or goes on, and when the disk fails in between."""

import errno
import json
import os
import shutil
import tempfile

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from teacher_student_mask.engine import (
    WriteError,
    check_last_checkpoint,
    check_output_dir,
    explain_write_errors,
    tidy_output_dir,
)


def test_new_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    check_output_dir(str(folder))
    check_output_dir(str(folder))
    assert folder.is_dir() and not os.listdir(folder)
    check_output_dir("s3://bucket/a")
    check_output_dir("")


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("")
    folder = os.path.join(tmp_path, "file", below)
    with pytest.raises(WriteError, match="Nothing can be written to OUTPUT_DIR '.*file.*; name a"):
        check_output_dir(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_read_only_folder():
    # Not below tmp_path, which nobody else may enter; root may write everywhere, so be nobody.
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            check_output_dir(folder)
        except WriteError as error:
            os.write(writer, f"{error.errno} {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as file:
        said = file.read()
    shutil.rmtree(folder)
    assert said.startswith(f"{errno.EACCES} ")
    assert f"Nothing can be written to OUTPUT_DIR {folder!r} (Permission denied); name a" in said


@pytest.mark.parametrize(
    "before, after",
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a"', b'{"a": 1}\n'),
        (b'{"a"', b""),
        (b"1\n" + b"x" * 200_000, b"1\n"),  # more than one block
        (b"x" * 65_535 + b"\n" + b"y" * 65_536, b"x" * 65_535 + b"\n"),
    ],
)
def test_unfinished_line_is_cut(tmp_path, log, before, after):
    metrics = tmp_path / "metrics.json"
    metrics.write_bytes(before)
    tidy_output_dir(str(tmp_path))
    assert metrics.read_bytes() == after
    assert ("did not finish" in log.text) == (before != after)


def test_partial_files_are_removed_and_nothing_else(tmp_path, log):
    kept = ["model.pth", "a.partial", ".hidden", "metrics.json"]
    for name in [*kept, ".model_0000001.pth.77.partial"]:
        (tmp_path / name).write_text("{}\n")
    tidy_output_dir(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert "Removed .model_0000001.pth.77.partial, left by a run" in log.text
    tidy_output_dir(str(tmp_path / "not_there"))
    tidy_output_dir("s3://bucket/a")


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = DetectionCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_0000003")
    return checkpointer


def test_good_or_no_checkpoint_passes(checkpointer, tmp_path):
    check_last_checkpoint(checkpointer)
    (tmp_path / "last_checkpoint").unlink()
    check_last_checkpoint(checkpointer)


@pytest.mark.parametrize("named", ["model_0000005.pth", ""])
def test_last_checkpoint_that_is_not_there(checkpointer, tmp_path, named):
    (tmp_path / "last_checkpoint").write_text(named)
    with pytest.raises(FileNotFoundError) as error:
        check_last_checkpoint(checkpointer)
    message = str(error.value)
    assert f"last_checkpoint names {named!r}, which is no file there." in message
    assert "(there are: model_0000001.pth, model_0000003.pth)" in message


def test_damaged_checkpoint(checkpointer, tmp_path):
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"model_0000003.pth is damaged: .*are: model_0000001.pth"):
        check_last_checkpoint(checkpointer)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_of_a_log_is_explained(tmp_path, number):
    with pytest.raises(
        WriteError, match="A log or result in OUTPUT_DIR .*; the checkpoints"
    ) as error:
        with explain_write_errors(str(tmp_path)):
            raise OSError(number, os.strerror(number))
    assert error.value.errno == number and os.strerror(number) in str(error.value)


def test_the_checkpoint_that_failed_first_is_what_is_told():
    with pytest.raises(WriteError, match="model.pth could not") as error:
        with explain_write_errors("output"):
            try:
                raise WriteError(errno.ENOSPC, "model.pth could not be written")
            finally:
                raise OSError(errno.ENOSPC, "No space left on device")  # as Detectron2's writers
    assert error.value.errno == errno.ENOSPC


def test_other_errors_pass():
    with pytest.raises(FileNotFoundError, match="image.jpg"), explain_write_errors("output"):
        open(json.dumps("image.jpg"))


def test_a_failure_that_follows_does_not_hide_the_full_disk():
    """Detectron2's printer of metrics divides by zero when it is called again at the end."""
    with pytest.raises(WriteError, match="in OUTPUT_DIR 'output' .*No space left on device"):
        with explain_write_errors("output"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                1 / 0
    with pytest.raises(ZeroDivisionError), explain_write_errors("output"):
        1 / 0
