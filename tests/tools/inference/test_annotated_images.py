"""What is known of the objects of a partly annotated json, against values counted by hand."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest

from inference.annotated_images import KINDS, AnnotatedImages
from inference.setup import UsageError

IMAGES = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (5, 1)]
CATEGORIES = [{"id": 9, "name": "ship"}, {"id": 4, "name": "ant"}]


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def rle(x, y, side, size=(20, 30)):
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(size), "counts": encoded["counts"].decode()}


def annotation(i, box, **fields):
    return {"id": i, "image_id": 5, "category_id": 4, "bbox": box, "iscrowd": 0, **fields}


@pytest.fixture
def write(tmp_path):
    def _write(*annotations, **changes):
        data = {"images": IMAGES, "annotations": list(annotations), "categories": CATEGORIES}
        path = tmp_path / "some.json"
        path.write_text(json.dumps(data | changes))
        return str(path)

    return _write


def test_kinds(write):
    annotated = AnnotatedImages(
        write(
            annotation(1, [0, 0, 4, 4], segmentation=square(0, 0, 4)),
            annotation(2, [0, 0, 4, 4], segmentation=rle(0, 0, 4)),
            annotation(3, [0, 0, 4, 4], segmentation=None),
            annotation(4, [0, 0, 4, 4], segmentation=[]),
            annotation(5, [0, 0, 4, 4]),
            annotation(6, [0, 0, 4, 4], segmentation=square(0, 0, 4), mask_source="model"),
            annotation(7, [0, 0, 4, 4], segmentation=rle(0, 0, 4), mask_source="human"),
            annotation(8, [0, 0, 4, 4], mask_source="model"),
            annotation(9, [0, 0, 4, 4], segmentation=rle(0, 0, 4), iscrowd=1),
            annotation(10, [0, 0, 4, 4], segmentation=rle(0, 0, 4), category_id=9),
            annotation(
                11, [0, 0, 4, 4], segmentation=rle(0, 0, 4), category_id=9, mask_source="model"
            ),
            # Without a pixel: training takes it as an object without a mask.
            annotation(12, [0, 0, 4, 4], segmentation=rle(0, 0, 0)),
        ),
        seen_classes="ant",
    )
    objects = annotated.objects_of([5])[5]
    assert [x.kind for x in objects] == (
        ["human", "human", "box", "box", "box", "model", "human", "box", "crowd"]
        + ["unused", "model", "box"]
    )
    assert {x.kind for x in objects} == set(KINDS)
    assert annotated.names == ["ant", "ship"] and annotated.seen == {0}
    assert [x.class_index for x in objects] == [0] * 9 + [1, 1, 0]
    assert [x.annotation_id for x in objects] == list(range(1, 13))
    assert objects[0].polygons == (tuple(square(0, 0, 4)[0]),)
    assert [x.polygons for x in objects[1:3]] == [(), ()]
    assert mask_util.area(objects[0].rle) == mask_util.area(objects[1].rle) == 16
    assert objects[2].rle is None


def test_overlaps_and_where_they_are_lower_bounds(write):
    annotated = AnnotatedImages(
        write(
            # Half of its box is covered by the mask of the second; the third, a box, reaches in.
            annotation(1, [0, 0, 4, 4], segmentation=square(0, 0, 4)),
            annotation(2, [2, 0, 4, 4], segmentation=rle(2, 0, 4)),
            annotation(3, [0, 3, 1, 4]),
            # Far from all others but a crowd, which counts for nothing.
            annotation(4, [20, 10, 4, 4], segmentation=square(20, 10, 4)),
            annotation(5, [20, 10, 4, 4], segmentation=rle(20, 10, 4), iscrowd=1),
            # Boxes that touch have no common pixel.
            annotation(6, [24, 10, 4, 4]),
        )
    )
    objects = annotated.objects_of([5, 1])
    assert objects[1] == []
    found = [(x.overlap, x.is_lower_bound) for x in objects[5]]
    # A quarter of the third's box lies under the first's mask.
    assert found == [
        (0.5, True),
        (0.5, False),
        (0.25, False),
        (0, False),
        (None, False),
        (0, False),
    ]
    assert all(x.overlap is None for x in annotated.objects_of([5], with_overlaps=False)[5])


def test_annotations_without_ids_are_shown(write):
    rows = [annotation(0, [i, 0, 4, 4], segmentation=square(i, 0, 4)) for i in (0, 2)]
    for row in rows:
        del row["id"]
    objects = AnnotatedImages(write(*rows)).objects_of([5])[5]
    assert [(x.annotation_id, x.overlap) for x in objects] == [("-", 0.5), ("-", 0.5)]


def test_counts_and_auto(write):
    rows = [annotation(i, [0, 0, 4, 4], segmentation=square(0, 0, 4)) for i in range(3)]
    rows.append(annotation(3, [0, 0, 4, 4], segmentation=square(0, 0, 4), category_id=9))
    rows.append(annotation(4, [0, 0, 4, 4], category_id=9))
    path = write(*rows)
    assert AnnotatedImages(path, "auto", min_masks=2).seen == {0}
    assert AnnotatedImages(path, "auto", min_masks=1).seen == {0, 1}
    assert AnnotatedImages(path).count_kinds() == [{"human": 3}, {"human": 1, "box": 1}]
    counts = AnnotatedImages(path, "ant").count_kinds()
    assert counts == [{"human": 3}, {"unused": 1, "box": 1}]
    with pytest.raises(UsageError, match="no class has DATASETS.MIN_MASKS_PER_CLASS 4"):
        AnnotatedImages(path, "auto", min_masks=4)


def test_masks_that_cover_nothing_are_none_as_in_training(write):
    """Bug: "auto" counted them, so a class could be seen here and unseen in training."""
    outside = {"segmentation": square(40, 0, 4), "category_id": 9}
    path = write(
        annotation(1, [0, 0, 4, 4], segmentation=square(0, 0, 4)),
        annotation(2, [0, 0, 4, 4], **outside),
        annotation(3, [0, 0, 4, 4], segmentation=rle(0, 0, 0), category_id=9),
    )
    annotated = AnnotatedImages(path, "auto", min_masks=1)
    assert annotated.seen == {0}
    assert annotated.count_kinds() == [{"human": 1}, {"box": 2}]
    objects = annotated.objects_of([5])[5]
    assert [(x.kind, x.polygons == (), x.rle is None) for x in objects[1:]] == [
        ("box", True, True)
    ] * 2
    # What they may cover is not known, as of any other box.
    assert objects[0].is_lower_bound


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bbox": [0, 0, 4]}, "annotation 1: 'bbox' is"),
        ({"image_id": 77}, "annotation 1: 'image_id' is 77"),
        ({"segmentation": rle(0, 0, 4, (30, 20))}, "but the image has"),
        # Broken runs of a class that training does not read would crash pycocotools all the same.
        ({"segmentation": {"size": [20, 30], "counts": [1, 2]}, "category_id": 9}, "run lengths"),
    ],
)
def test_a_wrong_json_is_one_sentence(write, fields, message):
    path = write(annotation(1, [0, 0, 4, 4], segmentation=square(0, 0, 4)) | fields)
    with pytest.raises(UsageError) as error:
        AnnotatedImages(path, seen_classes="ant")
    assert message in str(error.value) and "some.json" in str(error.value)


def test_unreadable_and_unknown(write, tmp_path):
    with pytest.raises(UsageError, match="nothing.json: unreadable"):
        AnnotatedImages(str(tmp_path / "nothing.json"))
    path = write(annotation(1, [0, 0, 4, 4]))
    with pytest.raises(UsageError, match="--seen-classes aunt: .*nearest: ant"):
        AnnotatedImages(path, "aunt")
