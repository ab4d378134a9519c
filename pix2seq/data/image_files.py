"""Find the image files that annotations name: the right file or none.

1. A name is a path with `/` or `\\`. A file matches it if its path ends in all parts of the name. Only if no name of
   the split is found, the folders that all names begin with are left out, from the left and as few as possible: they
   are those of another computer.
2. The folders of a split come first: the one with its annotation file, unless that is the data folder or
   `annotations/`, then `images/SPLIT`, `SPLIT` and `data/SPLIT` (`pix2seq.data.splits` has the names that SPLIT may
   have). Where one of them has an image of the split, all images of the split must lie in these folders.
3. Otherwise the images are looked for in `images/`, `JPEGImages/`, `data/` and the data folder, in this order. For
   training, validation and test splits, folders of another split are left out.
4. In each of these folders the name is a path from there, as in `images/NAME`. Where none has it, a deeper file counts
   if it is the only match.
5. Names are compared as they are spelled, then in any Unicode form, then in any case; each time only one file may
   match. Two names of different spelling cannot mean one file, unless both are spelled as the file is.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from pix2seq.data.splits import folder_rank, is_known, is_of_other_split
from pix2seq.errors import shortened
from pix2seq.types import text_key

# JPEG under any of its extensions, and what else `pix2seq.data.image` reads; other files must be named in full.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .mpo .png .apng .webp .tif .tiff .bmp .dib .gif .avif .avifs".split()
)
_CONTAINERS = ("images", "jpegimages", "data")  # folders that may hold all images, or a folder of images for each split
_NUM_EXAMPLES = 3  # files to list in a message


class ImageFinder:
    """The files below a data folder, listed once, as images of one split."""

    def __init__(self, root: Path, split: str, *, beside: Path | None = None) -> None:
        """`split` is its name in the annotation file; `beside` is the folder of that file."""
        self.root, self.split = root, split
        self.paths = list(_walk(root))  # below the root, sorted
        folders = {path.rpartition("/")[0] for path in self.paths}
        self.own_places = _own_places(root, folders, split, beside)
        self.shared_places = [*(f"{name}/" for name in _named(folders, _CONTAINERS)), ""]
        self._places: list[str] | None = None  # the kind of places in which images were found
        self._skipped = 0  # leading folders of names that are left out

    def find(self, names: Sequence[str], *, any_suffix: bool = False) -> list[str | None]:
        """Return the path below the data folder of each name, None where no file, or more than one, is meant.

        With `any_suffix`, names have no extension, and files have one of `IMAGE_SUFFIXES`.
        """
        parts = [_parts(name) for name in names]
        if self._places is not None:
            return self._find(parts, self._places, any_suffix)
        for self._skipped in range(_num_shared_folders(parts) + 1):
            for places in (self.own_places, self.shared_places):
                found = self._find(parts, places, any_suffix)
                if any(path is not None for path in found):
                    self._places = places
                    return found
        self._skipped = 0
        return [None] * len(names)

    def explain(self, name: str) -> str:
        """Tell where a name that was not found was looked for, and what lies there."""
        parts = _parts(name)
        stem = text_key(os.path.splitext(parts[-1])[0]) if parts else ""
        places = self._places or [*self.own_places, *self.shared_places]
        alike = [path for path in self.paths if text_key(os.path.splitext(os.path.basename(path))[0]) == stem]
        near = alike or [path for path in self.paths if _is_image(path)]
        where = ", ".join(place or "the data folder" for place in places)
        there = ", ".join(shortened(near, _NUM_EXAMPLES)) or "no image"
        return f"looked for {'/'.join(parts) or name!r} in {where}; found {there}"

    def _find(self, names: Sequence[tuple[str, ...]], places: Sequence[str], any_suffix: bool) -> list[str | None]:
        index = self._stem_index if any_suffix else self._path_index
        found = [self._find_one(parts[self._skipped :], places, index) for parts in names]
        users = Counter(path for path, _ in {pair for pair in zip(found, names, strict=True) if pair[0] is not None})
        return [
            None if path is None or (users[path] > 1 and not _is_spelled(path, parts)) else path
            for path, parts in zip(found, names, strict=True)
        ]

    def _find_one(self, parts: tuple[str, ...], places: Sequence[str], index: _Index) -> str | None:
        if not parts:
            return None
        name = "/".join(parts)
        for place in places:
            matches = index.by_path.get(text_key(place + name))
            if matches:
                return _the_one(matches, name)
        for place in places:
            matches = [path for path in index.ending_in(name) if self._is_inside(path, place, len(parts))]
            if matches:
                return _the_one(matches, name)
        return None

    def _is_inside(self, path: str, place: str, num_parts: int) -> bool:
        if not path.startswith(place):
            return False
        between = path[len(place) :].split("/")[:-num_parts]  # folders that nobody named
        return not (is_known(self.split) and any(is_of_other_split(folder, self.split) for folder in between))

    @cached_property
    def _path_index(self) -> _Index:
        return _Index((path, path) for path in self.paths)

    @cached_property
    def _stem_index(self) -> _Index:
        return _Index((path, os.path.splitext(path)[0]) for path in self.paths if _is_image(path))


class _Index:
    """Paths by what names are compared with: the key of the path, and of its last part."""

    def __init__(self, paths: Iterable[tuple[str, str]]) -> None:
        self.by_path: dict[str, list[str]] = {}
        for path, name in paths:
            self.by_path.setdefault(text_key(name), []).append(path)

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self.by_path:
            found.setdefault(key.rpartition("/")[2], []).append(key)
        return found

    def ending_in(self, name: str) -> Iterator[str]:
        """Yield the paths that end in all parts of a name."""
        ending = f"/{text_key(name)}"
        for key in self._by_last.get(ending.rpartition("/")[2], ()):
            if f"/{key}".endswith(ending):
                yield from self.by_path[key]


def image_files(root: Path, folder: str = "", *, also: frozenset[str] = frozenset()) -> list[str]:
    """Return the paths below `root` of all images in a folder and below it, and of files `also` with these suffixes."""
    return [path for path in _walk(root, folder) if _is_image(path) or os.path.splitext(path)[1].lower() in also]


def _walk(root: Path, folder: str = "") -> Iterator[str]:
    """Yield the files below a folder, in order; links to folders are followed, hidden folders are not."""
    seen = set()
    for path, folders, files in os.walk(root / folder, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if real in seen:
            continue  # a link back to where it lies
        seen.add(real)
        below = os.path.relpath(path, root).replace(os.sep, "/")
        yield from ((name if below == "." else f"{below}/{name}") for name in sorted(files) if name[0] != ".")


def _own_places(root: Path, folders: set[str], split: str, beside: Path | None) -> list[str]:
    places = []
    if beside is not None and beside != root and text_key(beside.name) not in ("annotations", "annotation"):
        places.append(f"{beside.relative_to(root).as_posix()}/")
    every = {name for folder in folders for name in _parents(folder)}
    for holder in [*_named(folders, _CONTAINERS[:2]), "", *_named(folders, _CONTAINERS[2:])]:
        inside = [name for name in every if name.rpartition("/")[0] == holder]
        ranks = {name: folder_rank(name.rpartition("/")[2], split) for name in inside}
        own = sorted((rank, name) for name, rank in ranks.items() if rank is not None)
        places += [f"{name}/" for _, name in own]
    return places


def _parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _named(folders: set[str], names: Sequence[str]) -> list[str]:
    tops = {folder.split("/")[0] for folder in folders} - {""}
    return [folder for name in names for folder in sorted(tops) if text_key(folder) == name]


def _parts(name: str) -> tuple[str, ...]:
    name = name.rpartition("?d=")[2]  # as Label Studio writes the path of a local file
    return tuple(part for part in name.strip().replace("\\", "/").split("/") if part not in ("", "."))


def _num_shared_folders(names: Sequence[tuple[str, ...]]) -> int:
    """Return how many leading folders all names have in common."""
    if not names:
        return 0
    first, last = min(names), max(names)  # what these share, all share
    limit = min(len(parts) for parts in names) - 1
    return next((i for i in range(max(limit, 0)) if first[i] != last[i]), max(limit, 0))


def _the_one(paths: Sequence[str], name: str) -> str | None:
    """Return the path that is spelled like a name, or that means it; None if several do."""
    exact = [path for path in paths if _ends_in(path, name)]
    composed = unicodedata.normalize("NFC", name)
    alike = exact or [path for path in paths if _ends_in(unicodedata.normalize("NFC", path), composed)] or list(paths)
    return alike[0] if len(alike) == 1 else None


def _ends_in(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}") or f"/{os.path.splitext(path)[0]}".endswith(f"/{name}")


def _is_spelled(path: str, parts: tuple[str, ...]) -> bool:
    return os.path.basename(path) == parts[-1] or os.path.splitext(os.path.basename(path))[0] == parts[-1]


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
