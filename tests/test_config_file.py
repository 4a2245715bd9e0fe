"""Config files: values are read, tags of Python and URLs are refused."""

import pytest
import yaml
from detectron2.config import get_cfg
from malice import yaml_of

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file


def merge(path):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    merge_config_file(cfg, str(path))
    return cfg


@pytest.fixture
def write(tmp_path):
    """Return ``write(name, text)``: the path of a file."""

    def _write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return _write


def test_values_and_bases_are_those_of_detectron2(write):
    write("base.yaml", "SEED: 3\nSOLVER: {MAX_ITER: 5, STEPS: [3, 4]}\n")
    path = write("leaf.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6}\n")
    expected = get_cfg()
    add_teacher_student_mask_config(expected)
    expected.merge_from_file(str(path))
    cfg = merge(path)
    assert cfg == expected
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (3, 6, (3, 4))


@pytest.mark.parametrize("base", [None, "_BASE_: evil.yaml", "_BASE_: [plain.yaml, evil.yaml]"])
def test_tags_of_python_are_refused_and_not_run(write, tmp_path, base):
    evil = write("evil.yaml", f"SEED: 1\nOUTPUT_DIR: {yaml_of(tmp_path / 'trace')}\n")
    write("plain.yaml", "SEED: 2\n")
    path = write("leaf.yaml", f"{base}\n") if base else evil
    with pytest.raises(ValueError) as error:
        merge(path)
    message = str(error.value)
    assert f"The config {path} was refused and nothing of it was run: {evil}, line 2: " in message
    assert "python/object/apply:os.mkdir" in message and "Write the value itself" in message
    assert not (tmp_path / "trace").exists()
    # The file does what it is said to do.
    yaml.unsafe_load(evil.read_text())
    assert (tmp_path / "trace").exists()


def test_failed_merge_changes_nothing(write, tmp_path):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    before = cfg.clone()
    with pytest.raises(ValueError):
        merge_config_file(cfg, str(write("a.yaml", f"SEED: 5\nX: {yaml_of(tmp_path / 'trace')}\n")))
    assert cfg == before


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_base_is_never_downloaded(write, tmp_path, monkeypatch, scheme):
    # It would be kept beside the downloads of weights, where the name of the host does not count.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    url = f"{scheme}://127.0.0.1:9/detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    with pytest.raises(ValueError, match="a base must be a file on this machine"):
        merge(write("a.yaml", f"_BASE_: {url}\n"))
    assert not (tmp_path / "cache").exists()


def test_trust_is_not_taken_from_a_file(write, log):
    cfg = merge(write("a.yaml", "MODEL: {TRUST_PICKLED_WEIGHTS: True, WEIGHTS: x.pkl}\n"))
    assert cfg.MODEL.TRUST_PICKLED_WEIGHTS is False and cfg.MODEL.WEIGHTS == "x.pkl"
    assert "MODEL.TRUST_PICKLED_WEIGHTS of" in log.text and "is ignored" in log.text
    cfg.merge_from_list(["MODEL.TRUST_PICKLED_WEIGHTS", True])
    assert cfg.MODEL.TRUST_PICKLED_WEIGHTS is True


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1, 2\n", "cannot be read: .*line"),
        ("", "is empty or no yaml of keys and values"),
        ("- a\n", "is empty or no yaml of keys and values"),
        ("_BASE_: a.yaml\n", "its _BASE_ leads back to itself"),
        ("_BASE_: none.yaml\n", "cannot be read: .*none.yaml"),
    ],
)
def test_what_is_no_config_is_named(write, text, words):
    with pytest.raises(ValueError, match=words):
        merge(write("a.yaml", text))
