"""tools/coco_json/splicing.py on generated json texts, against the standard library's reader."""

import codecs
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coco_json import splicing
from coco_json.splicing import JsonRows, splice

blanks = st.text(" \t\r\n", max_size=2)
numbers = st.sampled_from(["1.0e2", "-0", "3", "0.10", "1E+5", "-0.5e-3", "12345678901234567890"])
words = st.sampled_from(["true", "false", "null", "NaN", "-Infinity"])
# Raw UTF-8, escapes, surrogate pairs, and what looks like structure.
strings = st.one_of(
    st.text(max_size=5).map(json.dumps),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5).map(
        lambda x: json.dumps(x, ensure_ascii=False)
    ),
    st.sampled_from(['"\\/"', '"\\u00e9\\ud83d\\ude00"', '"é😀"', '"[{\\"}],:"', '"\\\\"']),
)


def list_of(children):
    items = st.lists(st.tuples(blanks, children, blanks).map("".join), max_size=3)
    return st.builds(lambda x, b: f"[{','.join(x) or b}]", items, blanks)


def object_of(children, keys=strings):
    member = st.tuples(blanks, keys, blanks, st.just(":"), blanks, children, blanks)
    members = st.lists(member, max_size=4, unique_by=lambda x: json.loads(x[1]))
    return st.builds(
        lambda x, b: "{" + (",".join("".join(m) for m in x) or b) + "}", members, blanks
    )


values = st.recursive(
    st.one_of(numbers, words, strings), lambda x: list_of(x) | object_of(x), max_leaves=4
)
keys = st.one_of(strings, st.sampled_from(['"images"', '"annotations"', '"\\u0061"', '"score"']))
documents = st.tuples(blanks, object_of(values, keys), blanks).map("".join)


def rows_of(path, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splicing, "_CHUNK", chunk)
        rows = JsonRows(path)
        return list(rows), rows.sha256


@settings(max_examples=30, deadline=None)
@given(text=documents, chunk=st.integers(1, 40), mark=st.sampled_from([b"", codecs.BOM_UTF8]))
def test_pieces_are_the_file_and_rows_are_those_of_the_json_module(
    tmp_path_factory, text, chunk, mark
):
    """But for a byte order mark. Bug: a file that had one was no json object in UTF-8."""
    path = tmp_path_factory.getbasetemp() / "generated.json"
    data = mark + text.encode("utf-8")
    path.write_bytes(data)
    pieces, sha256 = rows_of(path, chunk)
    assert b"".join(x.raw for x in pieces) == data.removeprefix(mark)
    assert sha256 == hashlib.sha256(data).hexdigest()
    expected = [
        repr(row) for value in json.loads(text).values() if type(value) is list for row in value
    ]
    rows = [x for x in pieces if x.key is not None]
    assert [repr(json.loads(x.raw)) for x in rows] == expected
    for piece in pieces:
        assert data[piece.offset : piece.offset + len(piece.raw)] == piece.raw


@settings(max_examples=30, deadline=None)
@given(text=object_of(values, keys), value=st.sampled_from([1.5, None, {"a": [1]}, "\\"]))
def test_splicing_changes_what_it_should_and_no_other_byte(text, value):
    raw = text.encode("utf-8")
    before = json.loads(text)
    for key in ("annotations", "new"):
        spliced = splice(raw, {key: value})
        # As text, for NaN is not NaN; and so that the order counts.
        assert json.dumps(json.loads(spliced)) == json.dumps({**before, key: value})
        if key not in before:
            assert _is_insertion(raw, spliced)
    assert splice(raw, {}) == raw


def _is_insertion(short, long):
    prefix = next((i for i, (a, b) in enumerate(zip(short, long)) if a != b), len(short))
    tail = zip(short[::-1], long[::-1])
    suffix = next((i for i, (a, b) in enumerate(tail) if a != b), len(short))
    return prefix + suffix >= len(short)


def test_new_members_look_like_the_old_ones():
    raw = b'{\n  "id" : 1.0e2,\n  "segmentation" : null\n}'
    changed = splice(raw, {"segmentation": [1], "score": 0.5, "area": 2})
    assert changed == (
        b'{\n  "id" : 1.0e2,\n  "segmentation" : [1],\n  "score" : 0.5,\n  "area" : 2\n}'
    )
    assert splice(b'{"id":7}', {"a": 1}) == b'{"id":7, "a":1}'
    assert splice(b"{ }", {"a": 1, "b": 2}) == b'{ "a": 1, "b": 2}'


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"a": [1, 2}', r"byte 11: found '}'; allowed: , or \]"),
        (b'{"a": [1, 2]', "byte 12: found the end of the file"),
        (b'{"a": tru}', "byte 6: Expecting value"),
        (b'{"a": 1} x', "text behind"),
        (b"[]", "byte 0: found '\\['; allowed: {"),
        (b"", "the end of the file"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}', "byte 3"),
        (b"\xef\xbb\xbf", "byte 3: found the end of the file"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": "\xff"}', "no UTF-8"),
        (b'{"a": "\xc3', "no UTF-8"),
        (b'{"a": ' + b"[" * 10**5, "too deep|too many|recursion"),
        (b"{1: 2}", "byte 1"),
        (b'{"a": [' + b"1" * 4301 + b"]}", "byte 7: .*whole number of more than 4300 digits"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(tmp_path, content, problem):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        list(JsonRows(path))
    assert str(path) in str(error.value)


def test_what_stands_at_the_top_is_known(tmp_path):
    path = tmp_path / "top.json"
    path.write_text('{"a": [], "b": [1], "c": null, "d": {"e": [2]}, "f": "g"}')
    rows = JsonRows(path)
    for _ in range(2):
        assert [x.value for x in rows if x.key] == [1]
        assert rows.lists == {"a", "b"}
        assert rows.no_lists == {"c": "None", "d": "{'e': [2]}", "f": "'g'"}


@pytest.mark.parametrize("number", ["1.0e+2", "-0.5E-3", "12345", "-Infinity", "1e5"])
def test_a_number_is_whole_wherever_the_chunks_end(tmp_path, number):
    """Bug: of "1.0e2" cut behind its "e", 1.0 was taken for the number."""
    path = tmp_path / "number.json"
    path.write_text(f'{{"a": {number}, "b": [{number}, {number} ]}}')
    for chunk in range(1, 40):
        pieces, _ = rows_of(path, chunk)
        assert [x.value for x in pieces if x.key] == [float(number)] * 2


def test_an_error_far_from_the_end_does_not_read_the_rest(tmp_path, monkeypatch):
    """Bug of a first version: any error was taken for a value that goes on."""
    path = tmp_path / "broken.json"
    # If it were read, the bytes that are no UTF-8 would be the error.
    path.write_bytes(b'{"a": [{"b": x}, ' + b"1, " * 10**4 + b"\xff]}")
    monkeypatch.setattr(splicing, "_CHUNK", 1000)
    with pytest.raises(ValueError, match="byte 13: Expecting value"):
        list(JsonRows(path))


def test_a_key_that_stands_twice_is_not_changed():
    with pytest.raises(ValueError, match="'score' stands twice"):
        splice(b'{"score": 1, "id": 2, "score": 3}', {"score": 4})
    with pytest.raises(ValueError, match="no json object"):
        splice(b"[1]", {"score": 4})
