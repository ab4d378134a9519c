"""Data sets in COCO layout: boxes, masks, keypoints and captions of one split.

    annotations/instances_train2017.json, person_keypoints_train2017.json, captions_train2017.json
    train2017/000000000139.jpg

At least one of the three files must exist; `coco_files` has the rules for their names, `image_files` those for images.
Each file may number images and classes for itself: an image is the same in two files if its `file_name` means the same
file, a class if it has the same name, and an object if image, class and box are the same.

`defects` lists everything wrong, by the policies of `pix2seq.data.check`. The data set is refused if too much is
dropped or if a file is damaged. Format reference: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.formats.builder import Dataset, DatasetBuilder
from pix2seq.data.formats.coco_columns import LEFT_OUT, whole_number
from pix2seq.data.formats.coco_files import CocoFiles, find_files
from pix2seq.data.formats.json_stream import stream_json
from pix2seq.data.image_files import ImageFinder
from pix2seq.errors import InputError

_NUM_EXPLAINED = 10  # missing images for which a defect tells what lies there instead


def read_coco(
    root: str | Path, split: str, *, annotations: str | Path | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> Dataset:
    """Read the files of a split, or the file `annotations` and those that go with it.

    Raises `InputError` if they are missing or not COCO JSON, or if ten or more images, objects or
    captions, and more than `max_bad_share` (0 to 1) of them, had to be dropped.
    """
    root = Path(root)
    files = find_files(root, split, annotations)
    if files is None:
        raise InputError(
            f"{root} has no COCO annotations of split {split!r}; expected "
            f"annotations/instances_{split}*.json, person_keypoints_{split}*.json or captions_{split}*.json"
        )
    return _Reader(root, split, files, max_bad_share).read()


class _Entry(NamedTuple):
    """An entry of `images`."""

    number: int
    id: Any  # as written
    name: str
    width: Any
    height: Any


class _Reader:
    """One pass over the files of a split, entry by entry."""

    def __init__(self, root: Path, split: str, files: CocoFiles, max_bad_share: float) -> None:
        self.root, self.files = root, files
        self.builder = DatasetBuilder(root, split, where=files.first, max_bad_share=max_bad_share)
        self.defects = self.builder.defects
        self.finder = ImageFinder(root, files.split, beside=files.first.parent)
        self.found: set[str] = set()  # paths of images
        self.missing: dict[str, None] = {}  # names of images, in order

    def read(self) -> Dataset:
        first, left_out = self.files.first, self.files.left_out
        if left_out:
            taken, *others = (_below(path, self.root) for path in (first, *left_out))
            detail = f"{taken}, not {', '.join(others)}; choose with annotations=FILE, or --annotations FILE"
            self.defects.add(None, None, "several annotation files", "one was taken", detail)
        num_categories = 0
        for kind, path in self.files.files.items():
            num_categories += self._read(kind, path)
            if kind == "instances":
                self.builder.objects.num_instances = len(self.builder.objects)
        if not self.found and self.missing:
            raise InputError(
                f"none of the {len(self.missing)} images listed in {first} was found under {self.root}; "
                f"{self.finder.explain(next(iter(self.missing)))}"
            )
        if not num_categories and "captions" not in self.files.files:
            raise InputError(f"{first} has no categories; expected a list of objects with id and name")
        return self.builder.build()

    def _read(self, kind: str, path: Path) -> int:
        """Add the images and annotations of a file, and return the number of its classes."""
        number = {"images": 0, "annotations": 0}
        images: list[_Entry] = []
        categories: Any = []
        for name, value in stream_json(path, ("images", "annotations")):
            if name == "images":
                images += self._entry(value, f"{kind} entry {number[name]}")
            elif name == "annotations" and kind == "captions":
                self.builder.captions.add(value)
            elif name == "annotations":
                self.builder.objects.add(value, f"{kind} entry {number[name]}")
            elif name == "categories":
                categories = value
            if name in number:
                number[name] += 1
        image_index = self._add_images(images)
        if kind == "captions":
            self.builder.captions.link(image_index)
            return 0
        category_index = self._add_categories(path, categories)
        self.builder.link(image_index, category_index)
        return len(category_index)

    def _entry(self, entry: Any, position: str) -> list[_Entry]:
        fields = entry if isinstance(entry, dict) else {}
        number, name = self.builder.number(fields.get("id")), fields.get("file_name")
        if number is None or not isinstance(name, str):
            written = None if fields.get("id") is None else str(fields["id"])[:80]
            self.builder.num_listed += 1
            self.defects.add(written, None, "image without id or file_name", "dropped", position)
            return []
        return [_Entry(number, fields["id"], name, fields.get("width"), fields.get("height"))]

    def _add_images(self, entries: list[_Entry]) -> dict[int, int]:
        """Find the files of a file's images, and return the index of each by its number."""
        paths = self.finder.find([entry.name for entry in entries])
        paths_of: dict[int, str | None] = {}
        doubtful: set[int] = set()  # numbers of two different images: their annotations could belong to either
        for entry, path in zip(entries, paths, strict=True):
            if paths_of.setdefault(entry.number, path) != path:
                doubtful.add(entry.number)
        index: dict[int, int] = {}
        first_with: dict[str, _Entry] = {}  # path to the entry of this file that has it
        for entry, path in zip(entries, paths, strict=True):
            is_known = path in self.found or entry.name in self.missing
            self.builder.num_listed += path in first_with or not is_known
            if entry.number in doubtful:
                self.defects.add(entry.id, None, "image id of two files", "dropped", entry.name)
                index[entry.number] = LEFT_OUT
            elif entry.number in index:
                self.defects.add(entry.id, None, "duplicate image id", "dropped", entry.name)
            elif path is None:
                index[entry.number] = LEFT_OUT
                if not is_known:
                    explain = len(self.missing) < _NUM_EXPLAINED
                    detail = f"{entry.name}: {self.finder.explain(entry.name)}" if explain else entry.name
                    self.defects.add(entry.id, None, "missing image file", "dropped", detail)
                    self.missing[entry.name] = None
            elif path in first_with and _sizes_differ(entry, first_with[path]):
                self.defects.add(entry.id, None, "image file listed twice, in two sizes", "dropped", entry.name)
                index[entry.number] = LEFT_OUT
            else:
                if path in first_with:
                    joined = f"joined with image {first_with[path].id}"
                    self.defects.add(entry.id, None, "image file listed twice", joined, entry.name)
                self.found.add(path)
                index[entry.number] = self.builder.add_image(entry.number, path, entry.width, entry.height)
                first_with.setdefault(path, entry)
        return index

    def _add_categories(self, path: Path, entries: Any) -> dict[int, int]:
        """Add the classes of a file, and return the index of each by its number."""
        names: dict[int, str] = {}
        index: dict[int, int] = {}
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            fields = entry if isinstance(entry, dict) else {}
            number, name = self.builder.number(fields.get("id")), fields.get("name")
            if number is None or not isinstance(name, str):
                raise InputError(f"{path} has a category without an id and a name: {entry!r}"[:300])
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
            is_stuff = fields.get("isthing") == 0
            place = self.builder.add_category(number, name, keypoints, bones, flip_pairs, is_stuff=is_stuff)
            if index.setdefault(number, place) != place:
                raise InputError(
                    f"{path} gives the category id {fields['id']} to {name!r}, but {names[number]!r} has it already; "
                    "give each category its own id"
                )
            first = next(other for other, where in index.items() if where == place)
            if first != number:
                detail = f"{name!r} has the ids {first} and {fields['id']}"
                self.defects.add(None, None, "class name given twice", "joined", detail)
            names.setdefault(number, name)
        return index


def _sizes_differ(entry: _Entry, other: _Entry) -> bool:
    pairs = ((entry.width, other.width), (entry.height, other.height))
    numbers = [(whole_number(a), whole_number(b)) for a, b in pairs]
    return any(a is not None and b is not None and a != b for a, b in numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
