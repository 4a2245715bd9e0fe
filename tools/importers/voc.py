"""The xmls of Pascal VOC, one an image: boxes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree  # nosec B405  # _PlainTree refuses what can declare entities
from xml.etree.ElementTree import Element  # nosec B405  # As above.

from importers.imported_dataset import ImportedDataset
from importers.input_files import InputError, check_declared_size, read_header

__all__ = ["read_voc"]

_DECLARED_ENCODING = re.compile(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)")


class _PlainTree(ElementTree.TreeBuilder):
    """Without a DOCTYPE there are no entities, which could grow without end."""

    def doctype(self, name, pubid, system):
        raise ValueError("a DOCTYPE is not allowed")


def read_voc(
    folder: Path,
    image_root: Path,
    class_names: Sequence[str] | None,
    zero_based: bool,
    progress,
) -> ImportedDataset:
    """
    Args:
        folder: of the xmls.
        image_root: folder of the images.
        class_names: in the order of their ids; None: those that occur, by the alphabet.
        zero_based: whether 0 is the left border of the image. In VOC 1 is the first pixel, and
            xmax the last pixel that belongs to the object.
        progress: wraps the list of xmls.

    Raises:
        InputError: see its message.
    """
    roots = {path: _read_xml(path) for path in progress(sorted(folder.rglob("*.xml")))}
    if not roots:
        raise InputError(f"{folder}: there is no xml in it.")
    if class_names is None:
        names = {
            _text(x, "name", path) for path, root in roots.items() for x in root.iter("object")
        }
        class_names = sorted(names)
    dataset = ImportedDataset(image_root, dict(enumerate(class_names, start=1)))
    for path, root in roots.items():
        header = read_header(image_root / _text(root, "filename", path), str(path))
        # Programs differ in whether they turn images by their EXIF; the size tells.
        declared = [(root.findtext(f"size/{x}") or "").strip() for x in ("width", "height")]
        check_declared_size(header, declared, str(path), "<size>")
        dataset.add_image(header)
        for number, element in enumerate(root.findall("object")):
            where = f"{path}, object {number}"
            category_id = dataset.category_id(_text(element, "name", path), where)
            dataset.add_box(category_id, _corners(element, where, zero_based))
            if (element.findtext("difficult") or "").strip() == "1":
                dataset.notes["objects are marked as difficult; they are kept"] += 1
    return dataset


def _read_xml(path: Path) -> Element:
    parser = ElementTree.XMLParser(target=_PlainTree())  # nosec B314  # As above.
    try:
        parser.feed(_decoded(path.read_bytes()))
        return parser.close()
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:
        raise InputError(f"{path}: no xml that can be read: {error}.") from error


def _decoded(content: bytes) -> str | bytes:
    declared = _DECLARED_ENCODING.match(content)
    if not declared:
        return content  # UTF-8 or UTF-16, which the parser tells apart
    # Not left to the parser, which takes no encoding with several bytes a character, as GB2312.
    encoding = declared[1].decode("ascii").lower()
    # Some programs declare UTF-16 and write UTF-8; one byte a character was enough up to here.
    return content.decode("utf-8" if encoding.startswith("utf-16") else encoding)


def _text(element: Element, name: str, path: Path) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise InputError(f"{path}: <{element.tag}> has no <{name}>.")
    return text


def _corners(element: Element, where: str, zero_based: bool) -> list[float]:
    texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = map(float, texts)
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not (x0 <= x1 and y0 <= y1 and math.isfinite(x0 + y0 + x1 + y1)):
        raise InputError(
            f"{where}: xmin, ymin, xmax, ymax of <bndbox> are {texts}; allowed: finite numbers, "
            "the maxima not below the minima."
        )
    first = 0 if zero_based else 1
    return [x0 - first, y0 - first, x1, y1]
