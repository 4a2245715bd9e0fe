"""Files appear as a whole or not at all, and a failure says which file and why."""

import errno
import os
import resource
import signal
import stat

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from teacher_student_mask.engine import (
    AtomicPathManager,
    WriteError,
    atomic_files,
    open_atomically,
    tidy_output_dir,
)


def checkpointer_in(folder, value):
    model = torch.nn.Linear(100, 1000)
    torch.nn.init.constant_(model.weight, value)
    checkpointer = DetectionCheckpointer(model, str(folder))
    checkpointer.path_manager = AtomicPathManager(checkpointer.path_manager)
    return checkpointer


def weight_in(path):
    return torch.load(path, weights_only=True)["model"]["weight"][0, 0].item()


@pytest.fixture
def small_files():
    """No file of this process may exceed 64 KiB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_content_appears_at_the_end_and_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with open_atomically(path) as file:
        file.write("new é")
        file.flush()
        assert path.read_text() == "old"
        (partial,) = [x for x in os.listdir(tmp_path) if x != "a.json"]
        assert partial == f".a.json.{os.getpid()}.partial"
    assert path.read_bytes() == "new é".encode()
    assert os.listdir(tmp_path) == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_block_that_raises_leaves_the_old_file(tmp_path, mode):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), open_atomically(path, mode) as file:
        file.write("new" if mode == "w" else b"new")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "a"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with open_atomically(link) as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_path_manager_does_the_rest_as_before(tmp_path):
    manager = AtomicPathManager(PathManager)
    path = str(tmp_path / "log")
    with manager.open(path, "w") as file:
        file.write("1\n")
    with manager.open(path, "a") as file:  # appended at once, not replaced
        file.write("2\n")
        file.flush()
        assert (tmp_path / "log").read_text() == "1\n2\n"
    with manager.open(path) as file:
        assert file.read() == "1\n2\n"
    assert manager.exists(path) and manager.ls(str(tmp_path)) == ["log"]


def test_remote_files_pass_through():
    class Remote:
        def open(self, path, mode, **kwargs):
            return path, mode, kwargs

    opened = AtomicPathManager(Remote()).open("s3://bucket/a", "wb", buffering=7)
    assert opened == ("s3://bucket/a", "wb", {"buffering": 7})


def test_checkpoints_are_those_of_detectron2(tmp_path):
    checkpointer_in(tmp_path, 1.0).save("model_0", iteration=3)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    other = checkpointer_in(tmp_path, 2.0)
    assert other.resume_or_load("", resume=True)["iteration"] == 3
    assert other.model.weight[0, 0].item() == 1.0


def test_full_disk_leaves_the_checkpoints_and_says_so(tmp_path, small_files):
    checkpointer = checkpointer_in(tmp_path, 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, resource.RLIM_INFINITY))
    checkpointer.save("model_0")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    torch.nn.init.constant_(checkpointer.model.weight, 2.0)
    for name in ("model_1", "model_0"):  # a new file, and one that is there already
        with pytest.raises(WriteError) as error:
            checkpointer.save(name)
        assert error.value.errno == errno.EFBIG
        assert str(tmp_path / f"{name}.pth") in str(error.value)
        assert "could not be written (File too large); files that were there before, earlier " in (
            str(error.value)
        )
        assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
        assert weight_in(tmp_path / "model_0.pth") == 1.0
        assert (tmp_path / "last_checkpoint").read_text() == "model_0.pth"


def test_no_space_left_is_what_is_said(tmp_path):
    path = tmp_path / "model.pth"
    # Where the bytes go first has no space.
    (tmp_path / f".model.pth.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"model.pth could not be written \(No space left on"):
        with open_atomically(path, "wb") as file:
            torch.save({"a": torch.zeros(10000)}, file)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["_PatientFile", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_failure_at_other_steps(tmp_path, monkeypatch, step, number):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_files if step == "_PatientFile" else os, step, fail)
    with pytest.raises(WriteError, match=r"results.json could not be written") as error:
        with open_atomically(path) as file:
            file.write("new")
    assert error.value.errno == number and f"({os.strerror(number)})" in str(error.value)
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with open_atomically(path, "wb") as file:
            file.write(b"new")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = [x for x in os.listdir(tmp_path) if x != "model.pth"]
    assert atomic_files.is_partial_file(left) and not left.endswith(".pth")
    tidy_output_dir(str(tmp_path))
    assert os.listdir(tmp_path) == ["model.pth"]
