"""Open a data set of any layout, and match the classes of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.coco_files import find_coco_splits, find_files
from pix2seq.data.formats.voc import find_voc_splits, is_voc, read_voc
from pix2seq.data.formats.yolo import find_yolo_splits, is_yolo, read_yolo
from pix2seq.data.splits import words_for
from pix2seq.errors import InputError, shortened
from pix2seq.geometry.keypoints import find_points
from pix2seq.types import Category, Target, category_key


def open_dataset(
    path: str | Path, split: str, *, annotations: str | Path | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> Dataset:
    """Open a split in COCO, Pascal VOC or YOLO layout; the first for which the folder has files is taken.

    `annotations` chooses a COCO file, absolute or below `path`, where several could be meant. Raises `InputError` if
    the folder has no such layout, or if ten or more images or annotations, and more than `max_bad_share` (0 to 1)
    of them, had to be dropped.
    """
    path = Path(path)
    if not path.is_dir():
        reason = "is a file" if path.exists() else "does not exist"
        raise InputError(f"data folder {path} {reason}; expected a folder in COCO, Pascal VOC or YOLO layout")
    if annotations is not None or find_files(path, split):
        return read_coco(path, split, annotations=annotations, max_bad_share=max_bad_share)
    if is_voc(path):
        return read_voc(path, split, max_bad_share=max_bad_share)
    if is_yolo(path):
        return read_yolo(path, split, max_bad_share=max_bad_share)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    splits = ", ".join(find_splits(path)) or "none"
    raise InputError(
        f"{path} has no annotations of split {split!r}: expected annotations/instances_{split}*.json (COCO), "
        f"Annotations/*.xml with ImageSets/Main/{split}.txt (Pascal VOC) or data.yaml (YOLO), found {found}; "
        f"its splits: {splits}; annotations=FILE (--annotations FILE) names a COCO file"
    )


def find_splits(path: Path) -> list[str]:
    """Return the names of the splits for which a folder has annotations."""
    return find_coco_splits(path) or (find_voc_splits(path) if is_voc(path) else find_yolo_splits(path))


def has_split(path: str | Path, split: str) -> bool:
    """Return whether a folder has annotations of a split, under any word for it."""
    path = Path(path)
    return find_files(path, split) is not None or any(word in find_splits(path) for word in words_for(split))


def labels_by_name(data: Sequence[Category], model: Sequence[Category]) -> dict[int, int]:
    """Map a data set's labels to a model's, by class name (case and outer spaces aside).

    Raises `InputError` with the names of the classes that the model does not know.
    """
    known = {category_key(category.name): category.label for category in model}
    missing = [category.name for category in data if category_key(category.name) not in known]
    if missing:
        listed = ", ".join(shortened(missing, 10))
        raise InputError(f"the model does not know these classes of the data: {listed}; use the data it was trained on")
    return {category.label: known[category_key(category.name)] for category in data}


def needed_categories(dataset: Dataset, known: Sequence[Category]) -> tuple[Category, ...]:
    """Return the classes of a data set, but for those without an object that `known` lacks; all, if it lacks all."""
    keys = {category_key(category.name) for category in known}
    used = set(dataset.annotations.labels.tolist())
    needed = [c for c in dataset.categories if c.label in used or category_key(c.name) in keys]
    return tuple(needed or dataset.categories)


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
        companions = tuple(map(self.to_model, target.companions))
        return replace(target, labels=self._labels[target.labels], keypoints=keypoints, companions=companions)


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
