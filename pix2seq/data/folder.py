"""Open a data folder, whatever its layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pix2seq.data.categories import same_name
from pix2seq.data.coco import CocoDataset, find_files
from pix2seq.data.table import MAX_BAD_SHARE
from pix2seq.data.target import Category, Dataset
from pix2seq.data.voc import VocDataset, is_voc
from pix2seq.errors import InputError


def open_dataset(path: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> Dataset:
    """The data set of a split in COCO or Pascal VOC layout.

    Raises `InputError` where there is neither, or where more than `max_bad_share` (0 to 1) of the
    pictures or of the annotations, and ten of them or more, had to be dropped.
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
