"""Read a data set once, all of it, and report every defect by id."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from pix2seq.data.folder import find_splits, open_dataset
from pix2seq.data.image import image_size, read_image
from pix2seq.data.table import BadShareError, defect_frame, describe
from pix2seq.data.target import ImageRecord
from pix2seq.errors import InputError

NUM_LISTED = 10  # ids a defect
_AT_A_TIME = 1024  # pictures that wait for a thread


@dataclass(frozen=True)
class SplitReport:
    """What one split holds and what is wrong with it."""

    split: str
    num_images: int
    objects: pd.DataFrame  # as read, without what was dropped
    defects: pd.DataFrame
    refusal: str | None = None  # why training and evaluation refuse the split, if they do

    def text(self) -> str:
        """Statistics, then each kind of defect with its first ids."""
        objects = self.objects
        counts = objects.groupby("image_id").size()
        lines = [f"{self.split}: {self.num_images} images, {len(objects)} objects"]
        if len(objects):
            per_image = counts.reindex(range(0), fill_value=0) if not len(counts) else counts
            side = (objects["width"] * objects["height"]) ** 0.5
            quantiles = side.quantile([0.05, 0.5, 0.95])
            lines.append(
                f"  objects an image: median {per_image.median():g}, most {per_image.max():g}, "
                f"{self.num_images - len(counts)} images without any"
            )
            lines.append(
                "  box side (square root of its area), px: "
                + ", ".join(
                    f"{name} {value:.0f}" for name, value in zip(("5 %", "median", "95 %"), quantiles, strict=True)
                )
            )
            lines.append(
                f"  crowd or difficult: {int(objects['iscrowd'].sum())}, with keypoints: "
                f"{int((objects['num_keypoints'] > 0).sum())}, with polygons: {int((objects['num_parts'] > 0).sum())}"
            )
            classes = objects["category"].value_counts()
            shown = ", ".join(f"{name} {count}" for name, count in classes.head(12).items())
            lines.append(f"  {len(classes)} classes: {shown}" + (" ..." if len(classes) > 12 else ""))
        if not len(self.defects):
            lines.append("  no defects")
        for (defect, action), rows in self.defects.groupby(["defect", "action"], sort=True):
            listed = "; ".join(_name(row) for row in rows.head(NUM_LISTED).itertuples())
            more = f"; and {len(rows) - NUM_LISTED} more" if len(rows) > NUM_LISTED else ""
            lines.append(f"  {len(rows)} x {defect} ({action}): {listed}{more}")
        if self.refusal is not None:
            lines.append(f"  refused in training and evaluation: {self.refusal}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values; defects in full."""
        return {
            "split": self.split,
            "num_images": self.num_images,
            "num_objects": len(self.objects),
            "refused": self.refusal,
            "objects_per_class": {str(k): int(v) for k, v in self.objects["category"].value_counts().items()},
            "defects": [
                {key: None if pd.isna(value) else value for key, value in row.items()}
                for row in self.defects.astype(object).to_dict(orient="records")
            ],
        }


@dataclass(frozen=True)
class CheckReport:
    """The reports of all splits."""

    root: Path
    splits: list[SplitReport]

    @property
    def usable(self) -> bool:
        """Whether anything is left to train on, of a split that is not refused."""
        return any(report.num_images and report.refusal is None for report in self.splits)

    def text(self) -> str:
        """What `pix2seq data check` prints."""
        total = sum(len(report.defects) for report in self.splits)
        verdict = f"{total} defects; what was dropped is left out of training and evaluation" if total else "sound"
        return "\n".join([str(self.root), *(report.text() for report in self.splits), verdict])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"root": str(self.root), "usable": self.usable, "splits": [report.to_json() for report in self.splits]}


def check_dataset(path: str | Path, split: str | None = None) -> CheckReport:
    """Read the annotations and decode every picture of one split, or of all.

    Raises `InputError` where the folder or its annotation files cannot be used at all.
    """
    path = Path(path)
    splits = [split] if split else (find_splits(path) if path.is_dir() else [])
    return CheckReport(path, [_check_split(path, name) for name in splits or ["train"]])


def _check_split(path: Path, split: str) -> SplitReport:
    refusal = None
    try:
        dataset = open_dataset(path, split)
    except BadShareError as error:
        dataset, refusal = open_dataset(path, split, max_bad_share=1.0), str(error)
    num_images = len(dataset.images)
    rows = []
    # Decoding releases the interpreter lock.
    with ThreadPoolExecutor() as pool, tqdm(total=num_images, unit="image", desc=split) as bar:
        for start in range(0, num_images, _AT_A_TIME):
            some = dataset.images[start : start + _AT_A_TIME]
            rows += [row for row in pool.map(_check_image, some) if row is not None]
            bar.update(len(some))
    defects = pd.concat([dataset.defects, defect_frame(rows)], ignore_index=True) if rows else dataset.defects
    unreadable = sum(row[2] == "unreadable image" for row in rows)
    return SplitReport(split, num_images - unreadable, dataset.objects, defects, refusal)


def _check_image(record: ImageRecord) -> tuple[Any, None, str, str, str] | None:
    try:
        height, width = read_image(record.path).shape[:2]
    except InputError as error:
        return record.id, None, "unreadable image", "skipped in training, refused in evaluation", str(error)
    if (width, height) == (record.width, record.height):
        return None
    said = f"{record.path.name} is {width}x{height}, the annotations say {record.width}x{record.height}"
    if (record.width, record.height) == image_size(record.path, upright=False):
        return record.id, None, "sides swapped by EXIF orientation", "boxes kept as written", said
    return record.id, None, "size disagrees with the annotations", "boxes kept as written", said


def _name(row: Any) -> str:
    detail = f" ({row.detail})" if row.detail else ""
    return describe(row.image, row.annotation_id) + detail
