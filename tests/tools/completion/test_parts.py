"""tools/completion/parts.py: what survives a kill, and who may go on."""

import fcntl

import pytest

from completion.parts import Parts, PartsError, PartWriter, read_object

PLAN = {"weights": "sha256 1", "config": "A 1\nB 2"}


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path / "out.json.parts")
    parts.start(PLAN)
    with PartWriter(parts, 0) as writer:
        writer.add({"image": 3, "seconds": 0.5}, [{"row": 7}, {"row": 9}])
        writer.add({"image": 1, "seconds": 0.5}, [])
    with PartWriter(parts, 1) as writer:
        writer.add({"image": 2, "seconds": 0.5}, [{"row": 4}])
    return parts


def test_what_was_added_is_found_by_its_place(parts):
    images = list(parts.images())
    assert [(x.part, x.record["image"]) for x in images] == [(0, 3), (0, 1), (1, 2)]
    assert [[y["row"] for _, y in x.objects] for x in images] == [[7, 9], [], [4]]
    with open(parts.files()[0], "rb") as stream:
        (offset, record), *_ = images[0].objects[::-1]
        assert read_object(stream, offset) == record == {"row": 9}


@pytest.mark.parametrize("keep", range(1, 200, 7))
def test_an_image_cut_anywhere_is_not_finished_and_the_rest_is(parts, keep):
    path = parts.files()[0]
    whole = path.read_bytes()
    size_of_first = whole.index(b"\n", whole.index(b'"image"')) + 1
    path.write_bytes(whole[:keep])
    parts.start(PLAN)
    finished = [x.record["image"] for x in parts.images() if x.part == 0]
    assert finished == ([3] if keep >= size_of_first else []) + ([1] if keep >= len(whole) else [])
    # The next line begins a new one.
    with PartWriter(parts, 0) as writer:
        writer.add({"image": 8, "seconds": 0}, [{"row": 1}])
    assert [x.record["image"] for x in parts.images() if x.part == 0] == [*finished, 8]


@pytest.mark.parametrize("damage", [b"\0" * 50, b"00000000 {}\n", b'{"image": 5}\n', b"x\n\n"])
def test_a_damaged_end_is_cut_off(parts, damage, log):
    path = parts.files()[1]
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    parts.start(PLAN)
    assert path.read_bytes() == whole
    assert f"Removed {len(damage)} bytes" in log.text


def test_a_changed_character_in_the_middle_drops_what_follows(parts):
    path = parts.files()[0]
    path.write_bytes(path.read_bytes().replace(b'"row": 9', b'"row": 8'))
    parts.start(PLAN)
    assert [x.record["image"] for x in parts.images()] == [2]


def test_another_plan_is_refused_and_the_difference_named(parts):
    with pytest.raises(PartsError, match="weights: sha256 1 before, now sha256 2.*--restart"):
        parts.start(PLAN | {"weights": "sha256 2"})
    with pytest.raises(PartsError, match="config: B 2 before, now B 3"):
        parts.check(PLAN | {"config": "A 1\nB 3"})
    parts.remove()
    with pytest.raises(PartsError, match="all machines share"):
        parts.check(PLAN)
    parts.remove()


def test_nobody_else_writes_at_the_same_time(parts):
    with open(parts.files()[0], "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(PartsError, match="another process"):
            PartWriter(parts, 0)
        with pytest.raises(PartsError, match="another process"):
            parts.start(PLAN)
