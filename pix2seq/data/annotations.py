"""The images and annotations of a data set in flat arrays: a box takes 33 bytes, an image about 50.

Polygons, RLE masks, keypoints, captions and attributes, which only some annotations have, lie in their own arrays:
sorted by owner, with an array of each entry's owner, so annotations without them take no space. Training
data sets find their samples in these arrays (`find_samples`), and data loader workers share them
(`SharedArrays`). Shapes use I images, N annotations, K keypoints per object and S samples.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pix2seq.data.defects import OBJECT_COLUMNS
from pix2seq.types import Category, ImageRecord, MaskAnnotation, Target

WHOLE_IMAGE = -1  # in place of an object's index
_GATHER_CHUNK = 1 << 20  # values to move at a time; their indices take more memory than the values
_ARRAY_FOLDERS: weakref.WeakKeyDictionary[SharedArrays, Path] = weakref.WeakKeyDictionary()


class SharedArrays:
    """Base of frozen dataclasses (`eq=False`) of arrays and a few small values, which worker processes share.

    A forked worker shares the parent's arrays anyway, because nothing writes to them and they hold no
    Python objects. For spawned workers the arrays are written to the temporary folder, once for all
    workers, and memory-mapped; the files are removed with the parent's object. All other pickles
    and copies contain the arrays.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        values: dict[str, Any] = dict(vars(self))
        if get_spawning_popen() is None:
            return _rebuild, (type(self), values)
        folder = _ARRAY_FOLDERS.get(self)
        if folder is None:
            folder = _ARRAY_FOLDERS[self] = _write_arrays(values)
            weakref.finalize(self, _remove_folder, folder, os.getpid())
        small = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
        return _map_arrays, (type(self), folder, [name for name in values if name not in small], small)


@dataclass(frozen=True, eq=False)
class ImageTable(SharedArrays, Sequence[ImageRecord]):
    """The images of a data set as a sequence of `ImageRecord`, which are created on access."""

    root: Path
    ids: NDArray[np.int64]  # (I,)
    widths: NDArray[np.int32]  # (I,) pixels
    heights: NDArray[np.int32]  # (I,) pixels
    first_byte: NDArray[np.int64]  # (I + 1,) where each name starts in `names`
    names: NDArray[np.uint8]  # paths below `root`, as the file system encodes them

    @classmethod
    def build(cls, root: Path, images: Iterable[tuple[int, str, int, int]]) -> ImageTable:
        """Build from the id, the path below `root`, the width and the height of each image."""
        ids, names, widths, heights = [], [], [], []
        for image_id, name, width, height in images:
            ids.append(image_id)
            names.append(os.fsencode(name))
            widths.append(width)
            heights.append(height)
        return cls(
            root=root,
            ids=np.array(ids, np.int64),
            widths=np.array(widths, np.int32),
            heights=np.array(heights, np.int32),
            first_byte=offsets(np.array([len(name) for name in names], np.int64)),
            names=np.frombuffer(b"".join(names), np.uint8),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        name = os.fsdecode(self.names[self.first_byte[i] : self.first_byte[i + 1]].tobytes())
        return ImageRecord(int(self.ids[i]), self.root / name, int(self.widths[i]), int(self.heights[i]))


@dataclass(frozen=True, eq=False)
class Annotations(SharedArrays):
    """The annotations of a data set, sorted by image."""

    first: NDArray[np.int64]  # (I + 1,) where each image's annotations start
    boxes_xyxy: NDArray[np.float32]  # (N, 4) pixels
    labels: NDArray[np.int32]  # (N,) `Category.label`
    areas: NDArray[np.float32]  # (N,) square pixels
    iscrowd: NDArray[np.bool_]  # (N,)
    ids: NDArray[np.int64]  # (N,)
    num_keypoints: int  # K
    ring_owner: NDArray[np.int64]  # (rings,) annotation of each polygon ring, ascending
    first_point: NDArray[np.int64]  # (rings + 1,)
    points: NDArray[np.float32]  # (points, 2) x, y
    rle_owner: NDArray[np.int64]  # (RLEs,) annotation of each RLE mask, ascending
    first_byte: NDArray[np.int64]  # (RLEs + 1,)
    rle_counts: NDArray[np.uint8]  # `counts`: int32 if they are a list, else ASCII
    rle_is_list: NDArray[np.bool_]  # (RLEs,)
    keypoint_owner: NDArray[np.int64]  # (sets,) annotation of each set of keypoints, ascending
    keypoints: NDArray[np.float32]  # (sets, K, 3)
    caption_owner: NDArray[np.int64]  # (captions,) image of each caption, ascending
    first_char: NDArray[np.int64]  # (captions + 1,) in bytes
    captions: NDArray[np.uint8]  # UTF-8
    attribute_owner: NDArray[np.int64]  # (described,) each annotation with `ATTRIBUTES`, ascending
    attribute_kind: NDArray[np.int32]  # (described,) index into `attribute_kinds`
    attribute_kinds: tuple[dict[str, str], ...]  # the different descriptions
    difficult: NDArray[np.int64]  # annotations that are difficult in VOC's sense, ascending; they are in `iscrowd` too

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False  # a write would copy memory pages to each worker

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays in bytes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def target(self, index: int, image: ImageRecord) -> Target:
        """Return the annotations of image `index`; arrays are copies that the caller may change."""
        start, stop = int(self.first[index]), int(self.first[index + 1])
        keypoints = np.zeros((stop - start, self.num_keypoints, 3), np.float32)
        low, high = _owner_range(self.keypoint_owner, start, stop)
        keypoints[self.keypoint_owner[low:high] - start] = self.keypoints[low:high]
        difficult = np.zeros(stop - start, np.bool_)
        low, high = _owner_range(self.difficult, start, stop)
        difficult[self.difficult[low:high] - start] = True
        return Target(
            image=image,
            boxes_xyxy=self.boxes_xyxy[start:stop].copy(),
            labels=self.labels[start:stop].astype(np.int64),
            areas=self.areas[start:stop].copy(),
            iscrowd=self.iscrowd[start:stop].copy(),
            annotation_ids=self.ids[start:stop].copy(),
            segmentations=self._segmentations(start, stop, image),
            keypoints=keypoints,
            captions=self._captions(index),
            attributes=self._attributes(start, stop),
            difficult=difficult,
        )

    def all_captions(self) -> Captions:
        """Return the captions of all images, in order."""
        return Captions(self.captions, self.first_char)

    def table(self, images: ImageTable, categories: Sequence[Category]) -> pd.DataFrame:
        """Return one row per annotation with `OBJECT_COLUMNS`, in double precision; about 200 bytes each."""
        category_of = {category.label: category for category in categories}
        labels, codes = np.unique(self.labels, return_inverse=True)
        known = [category_of[label] for label in labels.tolist()]
        x0, y0, x1, y1 = self.boxes_xyxy.T.astype(np.float64)
        num_labelled = np.zeros(len(self), np.int64)
        num_labelled[self.keypoint_owner] = (self.keypoints[..., 2] > 0).sum(axis=1)
        columns = {
            "image_id": np.repeat(images.ids, np.diff(self.first)),
            "annotation_id": self.ids,
            "category_id": np.array([category.id for category in known], np.int64)[codes],
            "category": np.array([category.name for category in known], object)[codes],
            "x": x0,
            "y": y0,
            "width": x1 - x0,
            "height": y1 - y0,
            "area": self.areas.astype(np.float64),
            "iscrowd": self.iscrowd,
            "num_parts": np.bincount(self.ring_owner, minlength=len(self)),
            "num_keypoints": num_labelled,
        }
        return pd.DataFrame(columns, columns=list(OBJECT_COLUMNS))

    def _segmentations(self, start: int, stop: int, image: ImageRecord) -> tuple[MaskAnnotation | None, ...]:
        found: list[MaskAnnotation | None] = [None] * (stop - start)
        low, high = _owner_range(self.rle_owner, start, stop)
        for i in range(low, high):
            counts = self.rle_counts[self.first_byte[i] : self.first_byte[i + 1]].tobytes()
            plain = np.frombuffer(counts, np.int32).tolist() if self.rle_is_list[i] else counts.decode("ascii")
            found[int(self.rle_owner[i]) - start] = {"size": [image.height, image.width], "counts": plain}
        low, high = _owner_range(self.ring_owner, start, stop)
        if low < high:
            edges = self.first_point[low : high + 1]
            points = self.points[edges[0] : edges[-1]].copy()
            ends = (edges - edges[0]).tolist()
            owners = (self.ring_owner[low:high] - start).tolist()
            for owner, (begin, end) in zip(owners, pairwise(ends), strict=True):
                rings = found[owner]
                if isinstance(rings, list):
                    rings.append(points[begin:end])
                else:
                    found[owner] = [points[begin:end]]
        return tuple(found)

    def _captions(self, index: int) -> tuple[str, ...]:
        low, high = _owner_range(self.caption_owner, index, index + 1)
        ends = self.first_char[low : high + 1].tolist()
        return tuple(self.captions[begin:end].tobytes().decode("utf-8") for begin, end in pairwise(ends))

    def _attributes(self, start: int, stop: int) -> tuple[dict[str, str], ...]:
        low, high = _owner_range(self.attribute_owner, start, stop)
        if low == high:
            return ()
        found: list[dict[str, str]] = [{} for _ in range(stop - start)]
        for owner, kind in zip(self.attribute_owner[low:high], self.attribute_kind[low:high], strict=True):
            found[owner - start] = self.attribute_kinds[kind]
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Captions(SharedArrays, Sequence[str]):
    """Captions that lie end to end in memory, each decoded when it is read."""

    text: NDArray[np.uint8]  # UTF-8
    first_char: NDArray[np.int64]  # (captions + 1,) in bytes

    def __len__(self) -> int:
        return len(self.first_char) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.first_char[range(len(self))[index] :][:2]
        return self.text[begin:end].tobytes().decode("utf-8")


def box_annotations(
    first: NDArray[np.int64],
    boxes_xyxy: NDArray[np.float32],
    labels: NDArray[np.int32],
    areas: NDArray[np.float32],
    iscrowd: NDArray[np.bool_],
    ids: NDArray[np.int64],
    **more: Any,
) -> Annotations:
    """Build annotations from boxes and the optional fields in `more`."""
    no_owners, no_edges, no_bytes = np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint8)
    empty: dict[str, Any] = {
        "num_keypoints": 0,
        "ring_owner": no_owners,
        "first_point": no_edges,
        "points": np.zeros((0, 2), np.float32),
        "rle_owner": no_owners.copy(),
        "first_byte": no_edges.copy(),
        "rle_counts": no_bytes,
        "rle_is_list": np.zeros(0, np.bool_),
        "keypoint_owner": no_owners.copy(),
        "keypoints": np.zeros((0, more.get("num_keypoints", 0), 3), np.float32),
        "caption_owner": no_owners.copy(),
        "first_char": no_edges.copy(),
        "captions": no_bytes.copy(),
        "attribute_owner": no_owners.copy(),
        "attribute_kind": np.zeros(0, np.int32),
        "attribute_kinds": (),
        "difficult": no_owners.copy(),
    }
    return Annotations(first, boxes_xyxy, labels, areas, iscrowd, ids, **(empty | more))


def select_images(
    images: ImageTable, annotations: Annotations, indices: NDArray[np.int64]
) -> tuple[ImageTable, Annotations]:
    """Return only the images of `indices`, in that order, and their annotations."""
    rows = gather(np.arange(len(annotations)), annotations.first, indices)
    new_row = np.full(len(annotations), -1, np.int64)
    new_row[rows] = np.arange(len(rows))
    new_image = np.full(len(images), -1, np.int64)
    new_image[indices] = np.arange(len(indices))

    def entries(owner: NDArray[np.int64], new: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return entries_by_owner(owner, np.ones(len(owner), np.bool_), new)

    ring_owner, rings = entries(annotations.ring_owner, new_row)
    rle_owner, rles = entries(annotations.rle_owner, new_row)
    keypoint_owner, sets = entries(annotations.keypoint_owner, new_row)
    caption_owner, captions = entries(annotations.caption_owner, new_image)
    attribute_owner, attributes = entries(annotations.attribute_owner, new_row)
    chosen_images = replace(
        images,
        ids=images.ids[indices],
        widths=images.widths[indices],
        heights=images.heights[indices],
        first_byte=offsets(np.diff(images.first_byte)[indices]),
        names=gather(images.names, images.first_byte, indices),
    )
    return chosen_images, Annotations(
        first=offsets(np.diff(annotations.first)[indices]),
        boxes_xyxy=annotations.boxes_xyxy[rows],
        labels=annotations.labels[rows],
        areas=annotations.areas[rows],
        iscrowd=annotations.iscrowd[rows],
        ids=annotations.ids[rows],
        num_keypoints=annotations.num_keypoints,
        ring_owner=ring_owner,
        first_point=offsets(np.diff(annotations.first_point)[rings]),
        points=gather(annotations.points, annotations.first_point, rings),
        rle_owner=rle_owner,
        first_byte=offsets(np.diff(annotations.first_byte)[rles]),
        rle_counts=gather(annotations.rle_counts, annotations.first_byte, rles),
        rle_is_list=annotations.rle_is_list[rles],
        keypoint_owner=keypoint_owner,
        keypoints=annotations.keypoints[sets],
        caption_owner=caption_owner,
        first_char=offsets(np.diff(annotations.first_char)[captions]),
        captions=gather(annotations.captions, annotations.first_char, captions),
        attribute_owner=attribute_owner,
        attribute_kind=annotations.attribute_kind[attributes],
        attribute_kinds=annotations.attribute_kinds,
        difficult=np.sort(new_row[annotations.difficult][new_row[annotations.difficult] >= 0]),
    )


def find_samples(annotations: Annotations, learns_from: str, *, each_object: bool) -> NDArray[np.int32]:
    """Return (S, 2) rows (image, object) of the training samples of a task that learns from `learns_from`.

    A sample is an image with at least one usable object, or one usable object if `each_object`.
    """
    if learns_from == "caption":
        images = np.unique(annotations.caption_owner)
        return _index_rows(images, np.full(len(images), WHOLE_IMAGE))
    usable = _USABLE[learns_from](annotations) & ~annotations.iscrowd  # (N,)
    first = annotations.first
    if each_object:
        objects = np.flatnonzero(usable)
        images = first.searchsorted(objects, side="right") - 1
        return _index_rows(images, objects - first[images])
    before = np.append(0, np.cumsum(usable, dtype=np.int32))  # number of usable annotations before each one
    images = np.flatnonzero(before[first[1:]] > before[first[:-1]])
    return _index_rows(images, np.full(len(images), WHOLE_IMAGE))


def contents(target: Target) -> frozenset[str]:
    """Return all values of `learns_from` for which a target is a training sample."""
    real = ~target.iscrowd
    found = {
        "object": bool(real.any()),
        "mask": any(bool(s) and r for s, r in zip(target.segmentations, real.tolist(), strict=True)),
        "labelled keypoint": bool((target.keypoints[real, :, 2] > 0).any()),
        "caption": bool(target.captions),
    }
    return frozenset(name for name, is_there in found.items() if is_there)


def offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of each of (L,) pieces laid end to end, and the end of the last one: (L + 1,)."""
    return np.append(0, np.cumsum(sizes)).astype(np.int64)


def gather(values: NDArray[Any], edges: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[Any]:
    """Concatenate the pieces `values[edges[i] : edges[i + 1]]` for each i in `order`."""
    starts, sizes = edges[order], edges[order + 1] - edges[order]
    out_edges = offsets(sizes)
    out = np.empty((int(out_edges[-1]), *values.shape[1:]), values.dtype)
    piece = 0
    while piece < len(order):
        # At least one piece, and at most `_GATHER_CHUNK` values otherwise.
        stop = max(int(np.searchsorted(out_edges, out_edges[piece] + _GATHER_CHUNK, side="right")) - 1, piece + 1)
        shift = starts[piece:stop] - out_edges[piece:stop]
        here = np.arange(out_edges[piece], out_edges[stop])
        out[here] = values[here + np.repeat(shift, sizes[piece:stop])]
        piece = stop
    return out


def entries_by_owner(
    rows: NDArray[np.int64], valid: NDArray[np.bool_], new_row: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for the valid entries of used rows, the new rows in ascending order, and the indices of the entries."""
    owner = np.where(valid & (rows >= 0), new_row[rows] if len(new_row) else -1, -1)
    entries = np.flatnonzero(owner >= 0)
    order = entries[np.argsort(owner[entries], kind="stable")]
    return owner[order], order


def _owner_range(owner: NDArray[np.int64], start: int, stop: int) -> tuple[int, int]:
    """Return the range of entries that belong to owners from `start` to before `stop`."""
    if not len(owner):
        return 0, 0
    low, high = owner.searchsorted((start, stop)).tolist()
    return low, high


def _write_arrays(values: dict[str, Any]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pix2seq-"))
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value, allow_pickle=False)
    return folder


def _remove_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits this call, but does not own the folder
        shutil.rmtree(folder, ignore_errors=True)


def _rebuild(cls: type[Any], values: dict[str, Any]) -> Any:
    return cls(**values)


def _map_arrays(cls: type[Any], folder: Path, names: list[str], small: dict[str, Any]) -> Any:
    return cls(**{name: _load_mapped(folder / f"{name}.npy") for name in names}, **small)


def _load_mapped(path: Path) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # slicing a memmap takes several times as long


def _index_rows(images: NDArray[np.integer], objects: NDArray[np.integer]) -> NDArray[np.int32]:
    return np.stack([images, objects], axis=1).astype(np.int32)


def _has_mask(annotations: Annotations) -> NDArray[np.bool_]:
    found = np.zeros(len(annotations), np.bool_)
    found[annotations.ring_owner] = True
    found[annotations.rle_owner] = True
    return found


def _has_keypoints(annotations: Annotations) -> NDArray[np.bool_]:
    found = np.zeros(len(annotations), np.bool_)
    found[annotations.keypoint_owner] = (annotations.keypoints[..., 2] > 0).any(axis=1)
    return found


_USABLE: dict[str, Callable[[Annotations], NDArray[np.bool_]]] = {
    "object": lambda annotations: np.ones(len(annotations), np.bool_),
    "mask": _has_mask,
    "labelled keypoint": _has_keypoints,
}
