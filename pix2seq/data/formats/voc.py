"""Data sets in Pascal VOC layout: boxes of one split.

    Annotations/2007_000027.xml, JPEGImages/2007_000027.jpg, ImageSets/Main/train.txt

VOC counts pixels from 1 and includes the last one, so in edges counted from 0 a box covers xmin - 1 to
xmax. Some tools write 0 for xmin and mean the edge; clipping to the image corrects that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations, ImageTable, box_annotations
from pix2seq.data.defects import (
    MAX_BAD_SHARE,
    MAX_COORD,
    Defects,
    clip_box,
    defect_frame,
    label_categories,
    refuse_bad_share,
)
from pix2seq.data.image import image_size
from pix2seq.errors import InputError
from pix2seq.types import Category, Target

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo")


@dataclass(frozen=True)
class VocDataset:
    """A VOC split, see `pix2seq.data.dataset.Dataset`; difficult objects count as crowd: not trained on, not scored."""

    root: Path
    split: str
    categories: tuple[Category, ...]
    images: ImageTable
    defects: pd.DataFrame
    annotations: Annotations
    truncated: NDArray[np.bool_]  # (N,) marked as cut off by the image or hidden by others

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> pd.DataFrame:
        """One row per used annotation, with `OBJECT_COLUMNS`, `difficult` and `truncated`; rebuilt on each access."""
        table = self.annotations.table(self.images, self.categories)
        table["difficult"], table["truncated"] = self.annotations.iscrowd, self.truncated
        return table

    def target(self, index: int) -> Target:
        """Return the annotations of image `index`."""
        return self.annotations.target(index, self.images[index])

    @classmethod
    def read(cls, root: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> VocDataset:
        """Read a split.

        Raises `InputError` if its list is missing or an XML file is damaged, or if ten or more images or
        objects, and more than `max_bad_share` (0 to 1) of them, had to be dropped.
        """
        root = Path(root)
        names = read_split(root, split)
        # Ids and classes come from all files, so they are the same in every split.
        everything = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        image_ids = {name: position for position, name in enumerate(everything, start=1)}
        parsed = {name: _parse(root / "Annotations" / f"{name}.xml") for name in everything}
        classes = sorted({_text(o, "name") for tree in parsed.values() for o in tree.iter("object")} - {""})
        if not classes:
            raise InputError(f"{root / 'Annotations'} has no objects; expected <object> with <name> and <bndbox>")
        categories = label_categories([(i, name, (), ()) for i, name in enumerate(classes, start=1)])
        return _read_objects(root, split, names, image_ids, parsed, categories, max_bad_share)


def is_voc(root: Path) -> bool:
    """Return whether a folder looks like Pascal VOC."""
    return (root / "Annotations").is_dir() and any((root / "Annotations").glob("*.xml"))


def read_split(root: Path, split: str) -> list[str]:
    """Return the names in ImageSets/Main/SPLIT.txt, without extension."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        others = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise InputError(f"{path} does not exist; splits of this data set: {others}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; expected one name per line, in UTF-8") from None
    return [line.split()[0] for line in lines if line.split()]


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if b"<!ENTITY" in content.replace(b"\0", b""):  # also in UTF-16; entities can expand without bound
        raise InputError(f"{path} defines XML entities, which annotations do not need; remove them")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two come from its encoding
        raise InputError(f"{path} is not readable XML ({error}); the file is damaged: copy it again") from None


def _read_objects(
    root: Path,
    split: str,
    names: list[str],
    image_ids: dict[str, int],
    parsed: dict[str, ElementTree.Element],
    categories: tuple[Category, ...],
    max_bad_share: float,
) -> VocDataset:
    image_defects, defects = Defects(), Defects()
    files = _image_files(root)
    category_of = {category.name: category for category in categories}
    images: list[tuple[int, str, int, int]] = []
    first = [0]
    num_objects = 0
    boxes: list[tuple[float, float, float, float]] = []
    rows: list[tuple[int, int, bool, bool]] = []  # annotation id, label, difficult, truncated
    seen: set[str] = set()
    for name in names:
        if name in seen:
            image_defects.add(image_ids.get(name, name), None, "duplicate image id", "dropped", name)
            continue
        seen.add(name)
        if name not in parsed or name not in files:
            missing = "annotation" if name not in parsed else "image"
            image_defects.add(image_ids.get(name, name), None, f"missing {missing} file", "dropped", name)
            continue
        tree, image_id = parsed[name], image_ids[name]
        width, height = (_number(tree, f"size/{side}") for side in ("width", "height"))
        if not (1 <= width <= MAX_COORD and 1 <= height <= MAX_COORD):
            try:
                width, height = image_size(files[name])
            except InputError as error:
                image_defects.add(image_id, None, "unreadable image", "dropped", str(error))
                continue
            image_defects.add(image_id, None, "no width and height", "read from the file", name)
        width, height = int(width), int(height)
        images.append((image_id, files[name].relative_to(root).as_posix(), width, height))
        for position, entry in enumerate(tree.findall("object")):
            num_objects += 1
            annotation_id = image_id * 10_000 + position
            category = category_of.get(_text(entry, "name"))
            if category is None:
                defects.add(image_id, annotation_id, "object without a name", "dropped", name)
                continue
            xmin, ymin, xmax, ymax = (_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            # Checked on the numbers as written: 237 to 237 is one column in VOC's counting, but all such
            # boxes are slips of the mouse.
            degenerate = xmax <= xmin or ymax <= ymin
            box, defect = clip_box((xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1), width, height)
            if degenerate:
                box, defect = None, "box has no area"
            if defect is not None and not (
                box is not None and min(xmin, ymin) >= 0 and xmax <= width and ymax <= height
            ):
                action = "dropped" if box is None else "clipped"
                defects.add(image_id, annotation_id, defect, action, f"{name}: {xmin:g} {ymin:g} {xmax:g} {ymax:g}")
            if box is None:
                continue
            difficult, truncated = (_number(entry, flag) == 1 for flag in ("difficult", "truncated"))
            boxes.append(box)
            rows.append((annotation_id, category.label, difficult, truncated))
        first.append(len(rows))
    if not images:
        raise InputError(f"{root} has none of the {len(names)} images of split {split!r}; expected them in JPEGImages/")
    limit: dict[str, Any] = {"where": root / "Annotations", "max_bad_share": max_bad_share}
    refuse_bad_share("images", image_defects.rows, len(names), **limit)
    refuse_bad_share("objects", defects.rows, num_objects, **limit)
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    ids, labels, difficult_ones, truncated_ones = np.array(rows, np.int64).reshape(-1, 4).T
    annotations = box_annotations(
        first=np.array(first, np.int64),
        boxes_xyxy=corners.astype(np.float32),
        labels=labels.astype(np.int32),
        areas=((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).astype(np.float32),
        iscrowd=difficult_ones.astype(np.bool_),
        ids=ids.copy(),
    )
    return VocDataset(
        root=root,
        split=split,
        categories=categories,
        images=ImageTable.build(root, images),
        defects=defect_frame([*image_defects.rows, *defects.rows]),
        annotations=annotations,
        truncated=truncated_ones.astype(np.bool_),
    )


def _image_files(root: Path) -> dict[str, Path]:
    """Return the image files by their name without extension."""
    folder = root / "JPEGImages"
    if not folder.is_dir():
        raise InputError(f"{root} has no folder JPEGImages; expected Pascal VOC layout")
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        # Sorted, so that the choice between two files of one name is always the same.
        for name in sorted(entry.name for entry in entries if entry.is_file()):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(stem, folder / name)
    return found


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ElementTree.Element, path: str) -> float:
    """Return the number at `path`, NaN if there is none."""
    try:
        return float(_text(element, path))
    except ValueError:
        return float("nan")
