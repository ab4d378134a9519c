"""Data sets in COCO layout: boxes, masks, keypoints and captions of one split.

    annotations/instances_train2017.json, person_keypoints_train2017.json, captions_train2017.json
    train2017/000000000139.jpg

At least one of the three files must exist. For the split `train`, the file may be called
`instances_train.json`, `instances_train2017.json` and so on; images may lie in a folder of the split's
name, in `images/` or beside it. Roboflow's `train/_annotations.coco.json` is read too.

`defects` lists everything wrong. An annotation is dropped if its id was seen before, if its image or
category is unknown, or if its box is not finite, too large, empty or outside; a box that reaches outside
is clipped. Some labelling tools leave boxes empty: these are rebuilt from polygons or keypoints if there
are any. Bad mask parts and bad keypoints are left out and the rest is kept. An image that is listed twice
or has no file is dropped. The data set is refused if too much is dropped or if a file is damaged.
Format reference: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pix2seq.data.annotations import Annotations, ImageTable
from pix2seq.data.defects import MAX_BAD_SHARE, MAX_COORD, Defects, defect_frame, label_categories, refuse_bad_share
from pix2seq.data.formats.coco_columns import CaptionColumns, ObjectColumns, check_captions, check_objects, whole_number
from pix2seq.data.formats.json_stream import stream_json
from pix2seq.data.image import image_size
from pix2seq.errors import InputError
from pix2seq.types import Category, Target

_CategoryEntry = tuple[int, str, tuple[str, ...], tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class CocoDataset:
    """A COCO split, see `pix2seq.data.dataset.Dataset`; workers share its flat arrays."""

    root: Path
    split: str
    categories: tuple[Category, ...]
    images: ImageTable
    defects: pd.DataFrame
    annotations: Annotations

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> pd.DataFrame:
        """One row per used annotation, with `OBJECT_COLUMNS`; rebuilt on each access."""
        return self.annotations.table(self.images, self.categories)

    def target(self, index: int) -> Target:
        """Return the annotations of image `index`."""
        return self.annotations.target(index, self.images[index])

    @classmethod
    def read(cls, root: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> CocoDataset:
        """Read the files of a split.

        Raises `InputError` if they are missing or not COCO JSON, or if ten or more images, objects or
        captions, and more than `max_bad_share` (0 to 1) of them, had to be dropped.
        """
        root = Path(root)
        files = find_files(root, split)
        if not files:
            raise InputError(
                f"{root} has no COCO annotations of split {split!r}; expected "
                f"annotations/instances_{split}*.json, person_keypoints_{split}*.json or captions_{split}*.json"
            )
        return _Reader(root, split, files, max_bad_share).dataset()


def find_files(root: Path, split: str) -> dict[str, Path]:
    """Return the annotation files of a split by kind; empty if there are none."""
    found = {}
    pattern = re.compile(rf"(instances|person_keypoints|captions)_{re.escape(split)}\d*\.json")
    for path in sorted((root / "annotations").glob("*.json")):
        match = pattern.fullmatch(path.name)
        if match and match[1] not in found:
            found[match[1]] = path
    if not found:
        names = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}.get(split, (split,))
        for name in names:
            if (root / name / "_annotations.coco.json").is_file():
                return {"instances": root / name / "_annotations.coco.json"}
    return found


class _Reader:
    """One pass over the files of a split: reads them entry by entry into columns, then checks these."""

    def __init__(self, root: Path, split: str, files: dict[str, Path], max_bad_share: float) -> None:
        self.root, self.split, self.files, self.max_bad_share = root, split, files, max_bad_share
        self.first_kind = next(iter(files))
        self.defects = Defects()  # of images and categories
        self.images: dict[int, tuple[str, int, int]] = {}  # path below the root, width, height
        self.dropped_images: set[int] = set()
        self.num_listed = self.num_missing = 0
        self.listing = _FileListing(root, split)
        self.categories: dict[int, _CategoryEntry] = {}
        self.flip_pairs: dict[int, tuple[tuple[str, str], ...] | None] = {}  # by category
        self.objects, self.captions = ObjectColumns(), CaptionColumns()

    def dataset(self) -> CocoDataset:
        for kind, path in self.files.items():  # sorted by name, so instances come before keypoints
            self._read(kind, path)
            if kind == "instances":
                self.objects.num_instances = len(self.objects)
        file = self.files[self.first_kind]
        if not self.images and self.num_missing:
            raise InputError(
                f"none of the {self.num_missing} images listed in {file} was found under {self.root}; "
                f"expected them in {self.split}*/ or images/"
            )
        if not self.images and self.num_listed:
            image, _, defect, _, detail = self.defects.rows[0]
            raise InputError(
                f"none of the {self.num_listed} images listed in {file} can be used; "
                f"the first: image {image}: {defect} ({detail})"
            )
        limit: dict[str, Any] = {"where": file, "max_bad_share": self.max_bad_share}
        refuse_bad_share("images", self.defects.rows, self.num_listed, **limit)
        if not self.categories and "captions" not in self.files:
            raise InputError(f"{file} has no categories; expected a list of objects with id and name")
        labelled = label_categories(list(self.categories.values()))
        categories = tuple(replace(category, flip_pairs=self.flip_pairs[category.id]) for category in labelled)
        images = ImageTable.build(self.root, ((image_id, *entry) for image_id, entry in self.images.items()))

        annotations, of_objects, num_objects = check_objects(self.objects, images, categories, self.dropped_images)
        refuse_bad_share("annotations", of_objects, num_objects, **limit)
        captions, of_captions = check_captions(self.captions, images, self.dropped_images)
        refuse_bad_share("captions", of_captions, len(self.captions), **limit)
        return CocoDataset(
            root=self.root,
            split=self.split,
            categories=categories,
            images=images,
            defects=defect_frame([*self.defects.rows, *of_objects, *of_captions]),
            annotations=replace(annotations, **captions),
        )

    def _read(self, kind: str, path: Path) -> None:
        number = {"images": 0, "annotations": 0}
        categories: Any = []
        for name, value in stream_json(path, ("images", "annotations")):
            if name == "images":
                self._add_image(kind, value, number[name])
            elif name == "annotations" and kind == "captions":
                self.captions.add(value)
            elif name == "annotations":
                self.objects.add(value, f"{kind} entry {number[name]}")
            elif name == "categories":
                categories = value
            if name in number:
                number[name] += 1
        if kind != "captions":
            self._add_categories(path, categories)

    def _add_image(self, kind: str, entry: Any, position: int) -> None:
        fields = entry if isinstance(entry, dict) else {}
        image_id, name = whole_number(fields.get("id")), fields.get("file_name")
        again = image_id in self.images or image_id in self.dropped_images
        if again and kind != self.first_kind:
            return
        self.num_listed += 1
        if image_id is None or not isinstance(name, str):
            written = None if fields.get("id") is None else str(fields["id"])[:80]
            detail = f"{kind} entry {position}"
            self.defects.add(written, None, "image without id or file_name", "dropped", detail)
            return
        if again:
            self.defects.add(image_id, None, "duplicate image id", "dropped", name)
            return
        path = self.listing.find(name)
        if path is None:
            self.num_missing += 1
            self.dropped_images.add(image_id)
            self.defects.add(image_id, None, "missing image file", "dropped", name)
            return
        size = self._size(image_id, fields, self.root / path)
        if size is None:
            self.dropped_images.add(image_id)
            return
        self.images[image_id] = (path, *size)

    def _size(self, image_id: int, entry: dict[str, Any], path: Path) -> tuple[int, int] | None:
        width, height = whole_number(entry.get("width")), whole_number(entry.get("height"))
        if width is not None and height is not None and 0 < width <= MAX_COORD and 0 < height <= MAX_COORD:
            return width, height
        try:
            size = image_size(path)
        except InputError as error:
            self.defects.add(image_id, None, "unreadable image", "dropped", str(error))
            return None
        self.defects.add(image_id, None, "no width and height", "read from the file", path.name)
        return size

    def _add_categories(self, path: Path, entries: Any) -> None:
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            fields = entry if isinstance(entry, dict) else {}
            category_id, name = whole_number(fields.get("id")), fields.get("name")
            if category_id is None or not isinstance(name, str):
                raise InputError(f"{path} has a category without an integer id and a name: {entry!r}"[:300])
            try:
                keypoints = tuple(str(point) for point in fields.get("keypoints") or ())
                skeleton = tuple((int(a) - 1, int(b) - 1) for a, b in fields.get("skeleton") or ())
                pairs = fields.get("flip_pairs")
                flip_pairs = None if pairs is None else tuple((_text(a), _text(b)) for a, b in pairs)
            except (TypeError, ValueError):
                raise InputError(
                    f"{path}: category {name!r} has unreadable keypoints, skeleton or flip_pairs; expected a list of "
                    "names, a list of pairs that count them from 1, and a list of pairs of names"
                ) from None
            bones = tuple(bone for bone in skeleton if all(0 <= end < len(keypoints) for end in bone))
            if bones != skeleton:
                self.defects.add(None, None, "skeleton names an unknown keypoint", "bone left out", name)
            known = self.categories.get(category_id)
            if known is not None and known[1].lower() != name.strip().lower():
                raise InputError(
                    f"{path} gives the category id {category_id} to {name!r}, but {known[1]!r} has it already; "
                    "give each category its own id"
                )
            if known is None or keypoints:
                self.categories[category_id] = (category_id, name.strip(), keypoints, bones)
                self.flip_pairs[category_id] = flip_pairs


class _FileListing:
    """Finds images by listing each folder once instead of looking for each file."""

    def __init__(self, root: Path, split: str) -> None:
        folders = sorted(path for path in root.glob(f"{split}*") if path.is_dir())
        folders += [root / "images" / path.name for path in folders]
        folders += sorted((root / "images").glob(f"{split}*")) + [root / "images", root / "valid", root]
        self.root = root
        self.folders: list[str] = []  # below the root
        self.files: dict[str, int] = {}  # index of a file's folder; numbers take less memory than paths
        self.nested: dict[str, frozenset[str]] = {}
        for folder in folders:
            if folder.is_dir():
                for name in _files_in(folder):
                    self.files.setdefault(name, len(self.folders))
                self.folders.append(folder.relative_to(root).as_posix())

    def find(self, name: str) -> str | None:
        """Return the path below the root of a `file_name`, which may contain folders."""
        folder, _, base = name.replace("\\", "/").rpartition("/")
        if folder:
            if folder not in self.nested:
                self.nested[folder] = self._list(folder)
            if base in self.nested[folder]:
                return f"{folder}/{base}"
        index = self.files.get(base)
        return None if index is None else f"{self.folders[index]}/{base}"

    def _list(self, folder: str) -> frozenset[str]:
        # Names are untrusted data, so they must not lead outside the data folder.
        try:
            path = (self.root / folder).resolve()
            inside = path.is_relative_to(self.root.resolve()) and path.is_dir()
            return frozenset(_files_in(path)) if inside else frozenset()
        except (OSError, ValueError):  # for example a name with a zero byte
            return frozenset()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _files_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file()]
