"""Data sets of any layout: what each gives, how a folder is opened, and how classes of several become one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pandas as pd

from pix2seq.data.annotations import Annotations
from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.formats.coco import CocoDataset, find_files
from pix2seq.data.formats.voc import VocDataset, is_voc
from pix2seq.errors import InputError
from pix2seq.types import Category, ImageRecord, Target


class Dataset(Protocol):
    """What every reader gives: images with targets, and a table of everything that was read."""

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
        """A row for each annotation that is used, with `data.defects.OBJECT_COLUMNS`."""
        ...

    @property
    def defects(self) -> pd.DataFrame:
        """A row for each defect, with `data.defects.DEFECT_COLUMNS`."""
        ...

    def __len__(self) -> int: ...

    def target(self, index: int) -> Target:
        """The annotations of image `index`, in the data set's own labels."""
        ...


def open_dataset(path: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> Dataset:
    """The data set of a split in COCO or Pascal VOC layout.

    Raises `InputError` where there is neither, or where more than `max_bad_share` (0 to 1) of the
    images or of the annotations, and ten of them or more, had to be dropped.
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
    """Names of the splits that a folder has annotations of."""
    if is_voc(path):
        # Class-specific lists such as `aeroplane_train` are no splits of their own.
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
    """A data set's labels to a model's, for classes of the same name (case and outer spaces aside).

    Raises `InputError` naming the classes that the model does not know.
    """
    known = {same_name(category.name): category.label for category in model}
    missing = [category.name for category in data if same_name(category.name) not in known]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise InputError(f"the model does not know these classes of the data: {listed}; use the data it was trained on")
    return {category.label: known[same_name(category.name)] for category in data}


def same_name(name: str) -> str:
    """What two classes are compared by: case and outer spaces aside."""
    return name.strip().lower()


def unite_categories(groups: Sequence[Sequence[Category]]) -> tuple[Category, ...]:
    """Every class once, by name. The first group keeps its labels; classes that only others have follow.

    A skeleton comes from the first group that has one for the class; raises `InputError` where another
    group has other points for it.
    """
    united: dict[str, Category] = {}
    for group in groups:
        first = not united
        for category in group:
            name = same_name(category.name)
            if name not in united:
                label = category.label if first else max((c.label for c in united.values()), default=0) + 1
                united[name] = replace(category, label=label)
            elif category.keypoints and not united[name].keypoints:
                united[name] = replace(united[name], keypoints=category.keypoints, skeleton=category.skeleton)
            elif category.keypoints and category.keypoints != united[name].keypoints:
                ours, theirs = ", ".join(united[name].keypoints), ", ".join(category.keypoints)
                raise InputError(
                    f"two data sets have different keypoints for {category.name!r}: {ours}, and {theirs}; "
                    "give the class another name in one of them"
                )
    return tuple(united.values())
