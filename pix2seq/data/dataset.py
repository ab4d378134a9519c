"""Data sets of any layout: their common interface, opening a folder, and uniting the classes of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations
from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.formats.coco import CocoDataset, find_files
from pix2seq.data.formats.voc import VocDataset, is_voc
from pix2seq.errors import InputError
from pix2seq.geometry.keypoints import find_points
from pix2seq.types import Category, ImageRecord, Target, category_key


class Dataset(Protocol):
    """The interface of all readers: images with targets, and tables of objects and defects."""

    @property
    def root(self) -> Path: ...

    @property
    def split(self) -> str: ...

    @property
    def categories(self) -> tuple[Category, ...]: ...

    @property
    def images(self) -> Sequence[ImageRecord]: ...

    @property
    def annotations(self) -> Annotations: ...

    @property
    def objects(self) -> pd.DataFrame:
        """One row per used annotation, with `data.defects.OBJECT_COLUMNS`."""
        ...

    @property
    def defects(self) -> pd.DataFrame:
        """One row per defect, with `data.defects.DEFECT_COLUMNS`."""
        ...

    def __len__(self) -> int: ...

    def target(self, index: int) -> Target:
        """Return the annotations of image `index`, in the data set's own labels."""
        ...


def open_dataset(path: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> Dataset:
    """Open a split in COCO or Pascal VOC layout.

    Raises `InputError` if the folder has neither layout, or if ten or more images or annotations, and
    more than `max_bad_share` (0 to 1) of them, had to be dropped.
    """
    path = Path(path)
    if not path.is_dir():
        reason = "is a file" if path.exists() else "does not exist"
        raise InputError(f"data folder {path} {reason}; expected a folder in COCO or Pascal VOC layout")
    if find_files(path, split):
        return CocoDataset.read(path, split, max_bad_share=max_bad_share)
    if is_voc(path):
        return VocDataset.read(path, split, max_bad_share=max_bad_share)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{path} has no annotations of split {split!r}: expected annotations/instances_{split}*.json (COCO) or "
        f"Annotations/*.xml with ImageSets/Main/{split}.txt (Pascal VOC), found {found}"
    )


def find_splits(path: Path) -> list[str]:
    """Return the names of the splits for which a folder has annotations."""
    if is_voc(path):
        # Class-specific lists such as `aeroplane_train` are not splits.
        return sorted(f.stem for f in (path / "ImageSets" / "Main").glob("*.txt") if "_" not in f.stem)
    names = ["train", "val", "valid", "test"]
    for file in sorted((path / "annotations").glob("*.json")):
        names.append(file.stem.rsplit("_", 1)[-1])
    unique: list[str] = []
    taken: set[Path] = set()
    for name in names:
        files = set(find_files(path, name).values())
        if files and not files <= taken:
            unique.append(name)
            taken |= files
    return unique


def labels_by_name(data: Sequence[Category], model: Sequence[Category]) -> dict[int, int]:
    """Map a data set's labels to a model's, by class name (case and outer spaces aside).

    Raises `InputError` with the names of the classes that the model does not know.
    """
    known = {category_key(category.name): category.label for category in model}
    missing = [category.name for category in data if category_key(category.name) not in known]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise InputError(f"the model does not know these classes of the data: {listed}; use the data it was trained on")
    return {category.label: known[category_key(category.name)] for category in data}


class ClassMap:
    """Brings targets of a data set to the labels of a model and to its order of keypoints, all matched by name."""

    def __init__(self, data: Sequence[Category], model: Sequence[Category]) -> None:
        """Raises `InputError` if the model does not know a class, or a keypoint of a class that it has keypoints of."""
        labels = labels_by_name(data, model)
        known = {category.label: category for category in model}
        self.categories = tuple(dict.fromkeys(known[label] for label in labels.values()))  # the data's, as the model's
        self._labels = np.zeros(max(labels, default=0) + 1, np.int64)
        self._labels[list(labels)] = list(labels.values())
        self._num_keypoints = max((len(category.keypoints) for category in self.categories), default=0)
        self._points = {category.label: _find_points(known[labels[category.label]], category) for category in data}

    def to_model(self, target: Target) -> Target:
        """Return a target of the data set as the model knows it; keypoints that the data set lacks are unlabelled."""
        keypoints = np.zeros((len(target.labels), self._num_keypoints, 3), np.float32)
        for i, label in enumerate(target.labels.tolist() if self._num_keypoints else ()):
            points = self._points[label]
            keypoints[i, : len(points)] = target.keypoints[i, points] * (points >= 0)[:, None]
        return replace(target, labels=self._labels[target.labels], keypoints=keypoints)


def _find_points(ours: Category, theirs: Category) -> NDArray[np.int64]:
    """Return where each keypoint of the model's class is in the data set's, -1 for none; nothing if that has none."""
    if not theirs.keypoints:
        return np.zeros(0, np.int64)
    found = find_points(ours.keypoints, theirs.keypoints)
    unknown = [name for index, name in enumerate(theirs.keypoints) if index not in found]
    if len(found) and unknown:
        raise InputError(
            f"the model does not know these keypoints of {theirs.name!r}: {', '.join(unknown)}; it knows "
            f"{', '.join(ours.keypoints)}; give them the same names, in any order"
        )
    return found


def unite_categories(groups: Sequence[Sequence[Category]]) -> tuple[Category, ...]:
    """Merge classes by name. The first group keeps its labels; classes found only in later groups follow.

    A class takes its skeleton from the first group that has one; raises `InputError` if another group
    has other keypoints for it, apart from their order and spelling.
    """
    united: dict[str, Category] = {}
    for group in groups:
        first = not united
        for category in group:
            key = category_key(category.name)
            if key not in united:
                label = category.label if first else max((c.label for c in united.values()), default=0) + 1
                united[key] = replace(category, label=label)
            elif category.keypoints and not united[key].keypoints:
                skeleton = {name: getattr(category, name) for name in ("keypoints", "skeleton", "flip_pairs")}
                united[key] = replace(united[key], **skeleton)
            elif category.keypoints and not _same_points(united[key], category):
                ours, theirs = ", ".join(united[key].keypoints), ", ".join(category.keypoints)
                raise InputError(
                    f"two data sets have different keypoints for {category.name!r}: {ours}, and {theirs}; "
                    "give the class another name in one of them"
                )
    return tuple(united.values())


def _same_points(one: Category, other: Category) -> bool:
    found = find_points(one.keypoints, other.keypoints)
    return len(one.keypoints) == len(other.keypoints) and bool((found >= 0).all())
