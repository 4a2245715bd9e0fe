"""Pictures of single objects: which ones, which part of the image, and what is drawn."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_example import MODELS, annotation, example_analysis, make_coco, to_rle, write_photos

from teacher_student_mask.analysis.picture_drawing import (
    CORRECT,
    FALSE_POSITIVE_KINDS,
    MISSED,
    crop_window,
    pixel_kinds,
)
from teacher_student_mask.analysis.pictures import draw_objects, models_to_picture, select_objects

NAN = float("nan")


def table(ious, is_unseen, false_positives=None, areas=None, protocol="detections"):
    num = len(ious)
    masks = [np.arange(100) < n for n in (areas or [10] * num)]
    return SimpleNamespace(
        ious=np.array(ious),
        is_unseen=np.array(is_unseen, dtype=bool),
        false_positives=np.array(false_positives or [[0, 0, 0]] * num),
        rles=[None if np.isnan(iou) else to_rle(m.reshape(10, 10)) for iou, m in zip(ious, masks)],
        protocol=protocol,
    )


def pixels_of(picture):
    prefix, data = picture.source.split(",")
    assert prefix in ("data:image/webp;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=int)


# ---- which objects ----


def test_unseen_objects_come_first_then_the_largest_difference():
    is_unseen = [0, 1, 1, 0, 1]
    a = table([0.1, 0.5, 0.9, 0.2, NAN], is_unseen)
    b = table([0.9, 0.6, 0.5, 0.3, 0.9], is_unseen)
    # Unseen: 2 (0.4), 1 (0.1); 4 has no mask of a. Seen: 0 (0.8), 3 (0.1).
    assert select_objects([a, b], 10).tolist() == [2, 1, 0, 3]
    assert select_objects([a, b], 3).tolist() == [2, 1, 0]
    assert select_objects([a, b], 0).tolist() == []


def test_one_model_shows_the_largest_share_of_false_positives():
    pixels = [[5, 0, 0], [0, 1, 1], [0, 0, 0], [8, 0, 0], [1, 0, 0]]
    only = table([0.5] * 4 + [NAN], [0, 1, 1, 1, 1], pixels, areas=[10, 4, 10, 20, 1])
    # Shares 0.5 (seen), 0.5, none, 0.4, no mask.
    assert select_objects([only], 10).tolist() == [1, 3, 0]


def test_equal_objects_keep_their_order():
    a, b = table([0.5] * 4, [1] * 4), table([0.6] * 4, [1] * 4)
    assert select_objects([a, b], 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "protocols, expected",
    [
        (["detections", "gt_boxes", "detections"], ["m0", "m2"]),
        (["detections", "gt_boxes"], ["m0"]),
        (["gt_boxes", "gt_boxes"], ["m0", "m1"]),
        ([], []),
    ],
)
def test_only_masks_that_were_made_in_the_same_way_are_compared(protocols, expected):
    objects = {f"m{k}": SimpleNamespace(protocol=x) for k, x in enumerate(protocols)}
    assert models_to_picture(SimpleNamespace(objects=objects)) == expected


# ---- which part of the image ----


def test_window_is_the_box_and_30_percent():
    assert crop_window([100, 200, 100, 80], 1000, 1000) == (85, 188, 215, 292)


def test_window_of_a_narrow_box_is_widened():
    x0, y0, x1, y1 = crop_window([500, 100, 4, 400], 1000, 1000)
    assert (y1 - y0, x1 - x0) == (520, 390)
    assert (x0 + x1) / 2 == pytest.approx(502, abs=1)


def test_window_is_moved_into_the_image():
    assert crop_window([0, 0, 50, 50], 100, 100) == (0, 0, 65, 65)
    assert crop_window([50, 50, 50, 50], 100, 100) == (35, 35, 100, 100)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.tuples(*[st.floats(-50, 350)] * 2, *[st.floats(0, 400)] * 2),
)
def test_window_lies_in_the_image_and_holds_what_the_image_has_of_the_box(height, width, box):
    x0, y0, x1, y1 = crop_window(box, height, width)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    x, y, w, h = box
    # A box that is partly outside is moved, not cut, so the inside must fit.
    if 0 <= x and x + w <= width:
        assert x0 <= x + 1 and x1 >= x + w - 1
    if 0 <= y and y + h <= height:
        assert y0 <= y + 1 and y1 >= y + h - 1


# ---- what is drawn ----


def test_kinds_of_pixels_by_hand():
    def row(text):
        return np.array([[c == "1" for c in text]])

    kinds = pixel_kinds(
        mask=row("1101111110"),
        own=row("1010000000"),
        seen=row("0001001000"),
        # Seen and unseen objects, and the object itself.
        objects=row("1011101000"),
        everything=row("1011111000"),
    )
    background, seen, unseen = (FALSE_POSITIVE_KINDS[x] for x in ("background", "seen", "unseen"))
    crowd_alone = 0
    assert kinds[0].tolist() == [
        CORRECT,
        background,
        MISSED,
        seen,
        unseen,
        crowd_alone,
        seen,
        background,
        background,
        0,
    ]


def test_drawn_errors_are_those_that_were_counted():
    # The tables of the example were counted with numpy on whole images.
    analysis = example_analysis(num_images=3)
    coco = analysis.coco
    seen_ids = {1, 2, 3, 4}
    compared = 0
    for object_table in analysis.objects.values():
        for row, annotation_id in enumerate(object_table.annotation_ids.tolist()):
            if object_table.rles[row] is None:
                continue
            own = coco.anns[annotation_id]
            regions = {"seen": [], "objects": [], "everything": []}
            for x in coco.imgToAnns[own["image_id"]]:
                mask = mask_util.decode(x["segmentation"]).astype(bool)
                regions["everything"].append(mask)
                if not x["iscrowd"]:
                    regions["objects"].append(mask)
                    if x["category_id"] in seen_ids:
                        regions["seen"].append(mask)
            kinds = pixel_kinds(
                mask_util.decode(object_table.rles[row]).astype(bool),
                mask_util.decode(own["segmentation"]).astype(bool),
                **{
                    k: np.any([np.zeros(own["segmentation"]["size"], bool), *v], axis=0)
                    for k, v in regions.items()
                },
            )
            counts = [(kinds == k).sum() for k in FALSE_POSITIVE_KINDS.values()]
            assert counts == object_table.false_positives[row].tolist()
            compared += sum(counts) > 0
    assert compared > 10


SIZE = (200, 200)


def rectangle(top, left, bottom, right):
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def scene(tmp_path):
    """
    An object of 80 x 80 pixels at (60, 60), of an unseen class; a seen object right of it, an
    unseen one below, a crowd above. Two models: one whose mask reaches 20 pixels too far on all
    sides, one that misses the right half.
    """
    masks = {
        "own": rectangle(60, 60, 140, 140),
        "seen": rectangle(60, 140, 140, 180),
        "unseen": rectangle(140, 60, 180, 140),
        "crowd": rectangle(20, 60, 60, 140),
    }
    annotations = [
        annotation(1, 9, 2, masks["own"]),
        annotation(2, 9, 1, masks["seen"]),
        annotation(3, 9, 2, masks["unseen"]),
        annotation(4, 9, 1, masks["crowd"], iscrowd=1),
    ]
    image = {"id": 9, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    coco = make_coco([image], annotations, ("seen class", "unseen class"))
    Image.new("RGB", SIZE, (200, 40, 40)).save(tmp_path / "a.png")

    def objects(mask, iou):
        nans = np.full(3, NAN)
        return SimpleNamespace(
            annotation_ids=np.array([1, 2, 3]),
            overlaps=np.zeros(3),
            is_unseen=np.array([True, False, True]),
            ious=np.array([iou, NAN, NAN]),
            boundary_ious=nans,
            false_positives=np.array([[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
            rles=[to_rle(mask), None, None],
            protocol="detections",
        )

    summary = {"dataset": {"seen_classes": ["seen class"]}, "settings": {"ties": "seen"}}
    large, half = rectangle(40, 40, 160, 160), rectangle(60, 60, 140, 100)
    tables = {"large": objects(large, 0.44), "half": objects(half, 0.5)}
    return SimpleNamespace(summary=summary, coco=coco, objects=tables), tmp_path


def test_panels_show_masks_and_errors(scene):
    analysis, folder = scene
    (picture,) = draw_objects(analysis, ["large", "half"], str(folder), 10)
    assert (picture.annotation_id, picture.class_name, picture.is_unseen) == (
        1,
        "unseen class",
        True,
    )
    assert picture.ious == (0.44, 0.5) and picture.has_image
    # Three columns and two rows of 160 x 160, 2 pixels apart.
    pixels = pixels_of(picture)
    assert pixels.shape == (322, 484, 3) == (picture.height, picture.width, 3)
    # The window is 48..152 in both directions, enlarged to 160 pixels.
    scale = 160 / 104

    def at(column, row, y, x):
        top, left = row * 162 + round((y - 48) * scale), column * 162 + round((x - 48) * scale)
        return pixels[top - 1 : top + 2, left - 1 : left + 2].mean(axis=(0, 1))

    def is_close(a, b, tolerance=30):
        return np.abs(np.asarray(a) - b).max() < tolerance

    photo, grey = np.array([200, 40, 40]), np.full(3, 280 / 3)
    blue, vermillion = np.array([0, 0x72, 0xB2]), np.array([0xD5, 0x5E, 0])
    green, orange, purple = ([0, 0x9E, 0x73], [0xE6, 0x9F, 0], [0xCC, 0x79, 0xA7])
    # Above: ground truth in white, masks in the colours of the models.
    assert is_close(at(0, 0, 100, 120), 0.55 * photo + 0.45 * 255)
    assert is_close(at(1, 0, 100, 120), 0.55 * photo + 0.45 * blue)
    assert is_close(at(2, 0, 100, 80), 0.55 * photo + 0.45 * vermillion)
    assert is_close(at(2, 0, 100, 120), photo)
    # Below: the image; errors of the first model right, below, above (crowd), left of the object.
    assert is_close(at(0, 1, 100, 100), photo)
    assert is_close(at(1, 1, 100, 146), 0.25 * grey + 0.75 * np.array(orange))
    assert is_close(at(1, 1, 146, 100), 0.25 * grey + 0.75 * np.array(purple))
    assert is_close(at(1, 1, 100, 54), 0.25 * grey + 0.75 * np.array(green))
    assert is_close(at(1, 1, 54, 100), 0.5 * grey)
    assert is_close(at(1, 1, 100, 100), 0.45 * grey + 130)
    # The second model misses the right half: black and white stripes.
    missed = pixels[162 + 60 : 162 + 100, 324 + 95 : 324 + 125].mean(axis=2)
    assert missed.min() < 80 and missed.max() > 170
    assert 90 < missed.mean() < 170


@pytest.mark.parametrize("ties, kind", [("seen", "seen"), ("smaller", "unseen")])
def test_errors_on_two_objects_are_drawn_as_they_were_counted(scene, ties, kind):
    analysis, folder = scene
    # Unseen, and smaller than the seen object on which it lies.
    small = annotation(5, 9, 2, rectangle(80, 141, 120, 170))
    coco = analysis.coco
    coco.anns[5] = small
    coco.imgToAnns[9].append(small)
    analysis.summary["settings"]["ties"] = ties
    (picture,) = draw_objects(analysis, ["large"], str(folder), 10)
    y, x = 162 + round((100 - 48) * 160 / 104), 162 + round((146 - 48) * 160 / 104)
    drawn = pixels_of(picture)[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
    colours = {"seen": [0xE6, 0x9F, 0], "unseen": [0xCC, 0x79, 0xA7]}
    distances = {k: np.abs(drawn - c).sum() for k, c in colours.items()}
    assert min(distances, key=distances.get) == kind


def test_picture_of_one_model_has_two_columns(scene):
    analysis, folder = scene
    (picture,) = draw_objects(analysis, ["large"], str(folder), 10)
    assert (picture.width, picture.height) == (322, 322)
    assert picture.ious == (0.44,)


def test_masks_stand_on_grey_without_a_folder(scene, log):
    analysis, _ = scene
    (picture,) = draw_objects(analysis, ["large", "half"], None, 10)
    assert not picture.has_image
    assert np.abs(pixels_of(picture)[200:300, 10:150] - 150).max() < 10
    assert not log.records


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "unreadable":
        path.write_bytes(path.read_bytes()[:60])
    else:
        Image.new("RGB", (200, 199)).save(path)


@pytest.mark.parametrize(
    "how", ["missing", "unreadable", "of another size than the annotations say"]
)
def test_images_that_cannot_be_used_are_counted(scene, log, how):
    analysis, folder = scene
    damage(folder / "a.png", how)
    (picture,) = draw_objects(analysis, ["large", "half"], str(folder), 10)
    assert not picture.has_image
    (record,) = log.records
    assert record.levelname == "WARNING"
    assert f"of 1 images with objects to show, 1 {how}." in record.getMessage()


@pytest.mark.parametrize("is_absolute", [False, True])
def test_pictures_from_outside_the_folder_are_not_shown(scene, log, is_absolute):
    # The report is passed on: a json of a stranger must not put a private picture into it.
    analysis, folder = scene
    image_root = folder / "images"
    image_root.mkdir()
    (info,) = analysis.coco.imgs.values()
    info["file_name"] = str(folder / "a.png") if is_absolute else "../a.png"
    before = sorted(folder.rglob("*"))
    (picture,) = draw_objects(analysis, ["large", "half"], str(image_root), 10)
    assert not picture.has_image
    assert np.abs(pixels_of(picture)[200:300, 10:150] - 150).max() < 10
    assert "1 outside of this folder." in log.records[0].getMessage()
    assert sorted(folder.rglob("*")) == before


def test_orientation_of_the_camera_is_applied(scene):
    # A photo of 100 x 200 whose tag says "turn by 90 degrees" has 200 x 100 for the annotations.
    analysis, folder = scene
    analysis.coco.imgs[9].update(height=200, width=200)
    pixels = np.zeros((200, 200, 3), dtype=np.uint8)
    pixels[:100] = (250, 250, 250)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the top becomes the right side
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    (picture,) = draw_objects(analysis, ["large", "half"], str(folder), 10)
    panel = pixels_of(picture)[162:, :160].mean(axis=2)
    assert panel[:, :70].mean() < 20 and panel[:, 90:].mean() > 230


def test_objects_of_many_images_stand_in_the_order_of_the_selection(tmp_path):
    analysis = example_analysis(num_images=4)
    write_photos(analysis, tmp_path)
    pictures = draw_objects(analysis, list(MODELS), str(tmp_path), 9)
    rows = select_objects(list(analysis.objects.values()), 9)
    ids = analysis.objects[MODELS[0]].annotation_ids[rows].tolist()
    assert [x.annotation_id for x in pictures] == ids
    assert len({x.image_id for x in pictures}) > 1
    assert all(max(x.width / 3, x.height / 2) <= 162 for x in pictures)
