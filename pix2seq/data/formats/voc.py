"""Data sets in Pascal VOC layout: boxes of one split.

    Annotations/2007_000027.xml, JPEGImages/2007_000027.jpg, ImageSets/Main/train.txt

XML files are those in `Annotations/` and below it, or else all below the data folder. A split is a list of names in
`ImageSets/Main/`, `ImageSets/` or the data folder, or else the files in folders of its name (`train/a.xml`); without
lists and such folders, everything is for training. A line of a list is a name with or without folders and extension,
and maybe a 0, 1 or -1 after it. The image of an XML file has its name, and else that in `<filename>`;
`pix2seq.data.image_files` has the rules for folders.

Tags count in any case and namespace, and the root may have any name. VOC counts pixels from 1 and includes the last
one, so in edges counted from 0 a box covers xmin - 1 to xmax. Some tools write 0 for xmin and mean the edge.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pix2seq.data.defects import MAX_BAD_SHARE, MAX_COORD
from pix2seq.data.formats.builder import NEW, Dataset, DatasetBuilder
from pix2seq.data.image_files import IMAGE_SUFFIXES, ImageFinder
from pix2seq.data.splits import WORDS, folder_rank, words_for
from pix2seq.errors import InputError

_LIST_FOLDERS = ("ImageSets/Main", "ImageSets", "")
_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
_NUM_TRIED = 20  # XML files outside of Annotations/ to look into
_ID_STEP = 10_000  # objects of an image at most; annotation ids are image id * _ID_STEP + position


def read_voc(root: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> Dataset:
    """Read a split. Objects marked difficult are not trained on, and ignored in AP.

    Raises `InputError` if its list is missing or an XML file is damaged, or if ten or more images or
    objects, and more than `max_bad_share` (0 to 1) of them, had to be dropped.
    """
    root = Path(root)
    folder, files = _xml_files(root)
    # Ids and classes come from all files, so they are the same in every split.
    parsed = {name: _parse(path) for name, path in files.items()}
    builder = DatasetBuilder(root, split, where=folder, max_bad_share=max_bad_share)
    spellings = sorted({_text(o, "name") for tree in parsed.values() for o in tree.iter("object")} - {""})
    if not spellings:
        raise InputError(f"{folder} has no objects; expected <object> with <name> and <bndbox>")
    for name in spellings:
        builder.add_category(NEW, name)
    _Reader(builder, folder, parsed).read(_names_of(root, split, list(files)))
    return builder.build()


def is_voc(root: Path) -> bool:
    """Return whether a folder has annotations like Pascal VOC: XML files with objects."""
    folder, files = _xml_files(root)
    return bool(files) and (folder != root or any(map(_has_boxes, islice(files.values(), _NUM_TRIED))))


def find_voc_splits(root: Path) -> list[str]:
    """Return the names of the splits."""
    lists = _lists(root)
    if lists:
        # Class-specific lists such as `aeroplane_train` are not splits.
        return sorted(name for name in lists if "_" not in name) or sorted(lists)
    return _folder_splits(list(_xml_files(root)[1])) or [WORDS[0][0]]


def _xml_files(root: Path) -> tuple[Path, dict[str, Path]]:
    """Return the folder of XML files, and these by their paths below it without extension, sorted."""
    folders = [path for path in sorted(root.iterdir()) if path.name.lower() == "annotations" and path.is_dir()]
    for folder in [*folders, root]:
        paths = [p for p in folder.rglob("*") if p.suffix.lower() == ".xml" and not p.name.startswith(".")]
        if paths:
            return folder, dict(sorted((p.relative_to(folder).with_suffix("").as_posix(), p) for p in paths))
    return root, {}


def _lists(root: Path) -> dict[str, Path]:
    """Return the lists of names by split: those of the first folder that has any."""
    for folder in _LIST_FOLDERS:
        files = {path.stem: path for path in sorted((root / folder).glob("*.txt"))}
        if not folder:
            known = [word for group in WORDS for word in group]
            files = {name: path for name, path in files.items() if name.lower() in known}
        if files:
            return files
    return {}


def _folder_splits(names: Sequence[str]) -> list[str]:
    folders = {part for name in names for part in name.split("/")[:-1]}
    return [group[0] for group in WORDS if any(folder_rank(folder, group[0]) is not None for folder in folders)]


def _names_of(root: Path, split: str, names: Sequence[str]) -> list[str]:
    """Return the names of a split: of XML files, or as its list has them where there is none."""
    lists = _lists(root)
    of_word = {name.lower(): path for name, path in lists.items()}
    path = next((of_word[word] for word in words_for(split) if word in of_word), None)
    if path is not None:
        return _read_list(path, names)
    splits = _folder_splits(names)
    if not lists and not splits and split in words_for(WORDS[0][0]):
        return list(names)
    of_split = [name for name in names if any(folder_rank(f, split) is not None for f in name.split("/")[:-1])]
    if not of_split or lists:
        expected = root / _LIST_FOLDERS[0] / f"{split}.txt"
        others = ", ".join(find_voc_splits(root)) or "none"
        raise InputError(f"{expected} does not exist; splits of this data set: {others}")
    return of_split


def _read_list(path: Path, names: Sequence[str]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; expected one name per line, in UTF-8") from None
    known = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(name.rpartition("/")[2], []).append(name)
    return [_listed_name(line.strip(), known, by_base) for line in lines if line.strip()]


def _listed_name(line: str, known: Mapping[str, str], by_base: Mapping[str, Sequence[str]]) -> str:
    """Return the name of the XML file that a line of a list means, or the line without what is no name."""
    without_flag = re.sub(r"\s+-?[01]$", "", line)
    forms = []
    for form in (line, without_flag):
        path = form.replace("\\", "/")
        stem, suffix = os.path.splitext(path)
        forms += [path, stem] if suffix.lower() in (*IMAGE_SUFFIXES, ".xml") else [path]
    for form in forms:
        parts = form.split("/")
        for start in range(len(parts)):  # the fewer folders are left out, the better
            name = "/".join(parts[start:])
            found = known.get(name) or known.get(name.lower())
            if found is not None:
                return found
    bases = {tuple(by_base.get(form.rpartition("/")[2], ())) for form in forms} - {()}
    only = [names[0] for names in bases if len(names) == 1]
    return only[0] if len(only) == 1 and "/" not in line else forms[-1]


class _Reader:
    """Adds the images and objects of XML files to a builder."""

    def __init__(self, builder: DatasetBuilder, folder: Path, parsed: Mapping[str, ElementTree.Element]) -> None:
        self.builder, self.defects, self.parsed = builder, builder.defects, parsed
        self.finder = ImageFinder(builder.root, builder.split, beside=folder)
        self.image_ids = {name: position for position, name in enumerate(parsed, start=1)}

    def read(self, names: Sequence[str]) -> None:
        """Add what belongs to the names of a split."""
        unique = list(dict.fromkeys(names))
        paths = self._find([name for name in unique if name in self.parsed])
        self.builder.num_listed = len(names)
        if not any(paths.values()):
            lost = next((name for name in unique if name in self.parsed), None)
            why = (
                f"no XML file is called {unique[0]}.xml" if unique and lost is None else self.finder.explain(str(lost))
            )
            raise InputError(
                f"{self.builder.root} has none of the {len(names)} images of split {self.builder.split!r}; {why}"
            )
        seen: set[str] = set()
        index: dict[int, int] = {}
        for name in names:
            image_id, path = self.image_ids.get(name, name), paths.get(name)
            if name in seen:
                self.defects.add(image_id, None, "duplicate image id", "dropped", name)
            elif name not in self.parsed:
                self.defects.add(image_id, None, "missing annotation file", "dropped", name)
            elif path is None:
                self.defects.add(
                    image_id, None, "missing image file", "dropped", f"{name}: {self.finder.explain(name)}"
                )
            else:
                index[self.image_ids[name]] = self._add(self.image_ids[name], name, path)
            seen.add(name)
        self.builder.link(index)

    def _find(self, names: Sequence[str]) -> dict[str, str | None]:
        """Find images by the XML file's name and the extension in <filename>, by the name alone, and by <filename>."""
        in_file = {name: _text(self.parsed[name], ".//filename").replace("\\", "/") for name in names}
        passes = (
            ({name: name + os.path.splitext(in_file[name])[1] for name in names}, False),
            ({name: name for name in names}, True),
            (in_file, False),
        )
        found: dict[str, str | None] = dict.fromkeys(names)
        for wanted, any_suffix in passes:
            rest = [name for name in names if found[name] is None]
            found |= dict(zip(rest, self.finder.find([wanted[n] for n in rest], any_suffix=any_suffix), strict=True))
        return found

    def _add(self, image_id: int, name: str, path: str) -> int:
        """Add an image and its objects, and return the image's index."""
        tree, objects = self.parsed[name], self.builder.objects
        width, height = (_number(tree, f".//size/{side}") for side in ("width", "height"))
        index = self.builder.add_image(image_id, path, _whole(width), _whole(height))
        for position, entry in enumerate(tree.iter("object")):
            annotation_id = image_id * _ID_STEP + position
            category = _text(entry, "name")
            if not category:
                self.defects.add(image_id, annotation_id, "object without a name", "dropped", name)
                self.builder.num_left_out += 1
                continue
            corners = [_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            written = " ".join(f"{corner:g}" for corner in corners)
            objects.as_written[len(objects), "bbox"] = f"{name}: {written}"
            fields: dict[str, Any] = {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": self.builder.add_category(NEW, category),
                "bbox": _xywh(*corners),
                "difficult": _text(entry, "difficult"),
            }
            objects.add(fields, name)
        return index


def _xywh(xmin: float, ymin: float, xmax: float, ymax: float) -> list[float]:
    """Convert VOC's pixels to edges; what cannot be meant becomes a box that is refused for what it is."""
    if all(0 <= value <= 1 for value in (xmin, ymin, xmax, ymax)):
        return [xmin, ymin, xmax - xmin, ymax - ymin]  # shares of the image
    # 237 to 237 is one column in VOC's counting, but all such boxes are slips of the mouse.
    if xmax <= xmin or ymax <= ymin:
        return [xmin, ymin, 0, 0]
    left, top = (max(value - 1, 0) if value >= 0 else value - 1 for value in (xmin, ymin))
    return [left, top, xmax - left, ymax - top]


def _parse(path: Path) -> ElementTree.Element:
    """Read an XML file, with tags in lower case and without namespaces."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    declared = _ENCODING.match(content.removeprefix(b"\xef\xbb\xbf"))
    try:
        if declared:  # Python knows more encodings than the parser
            encoding = declared[1].decode("ascii")
            text = content.decode("utf-8-sig" if encoding.lower() == "utf-8" else encoding)
            content = re.sub(r"^\s*<\?xml.*?\?>", "", text, flags=re.DOTALL).encode("utf-8")
        if b"<!ENTITY" in content.replace(b"\0", b""):  # also in UTF-16; entities can expand without bound
            raise InputError(f"{path} defines XML entities, which annotations do not need; remove them")
        tree = ElementTree.fromstring(content)
    except InputError:
        raise
    except (UnicodeError, LookupError) as error:
        raise InputError(f"{path} is not in the encoding that it names ({error}); save it in UTF-8") from None
    except (ElementTree.ParseError, ValueError) as error:
        if not declared and _is_no_utf8(content):
            raise InputError(f"{path} is not in UTF-8, and names no other encoding; save it in UTF-8") from None
        raise InputError(f"{path} is not readable XML ({error}); the file is damaged: copy it again") from None
    for element in tree.iter():
        if isinstance(element.tag, str):  # comments have none
            element.tag = element.tag.rpartition("}")[2].lower()
    return tree


def _is_no_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _has_boxes(path: Path) -> bool:
    return b"<bndbox>" in path.read_bytes().lower()


def _whole(value: float) -> int | None:
    return int(value) if abs(value) <= MAX_COORD else None


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ElementTree.Element, path: str) -> float:
    """Return the number at `path`, NaN if there is none."""
    try:
        return float(_text(element, path))
    except ValueError:
        return float("nan")
