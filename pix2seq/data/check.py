"""Read a complete data set once and report every defect by id.

The policies below hold for this check, for training and for evaluation:

| defect | policy |
|---|---|
| annotation file: cut off, not JSON or XML, not UTF-8 (a byte order mark is allowed) | refused |
| category: no integer id or no name, an id given twice, unreadable keypoints, no category at all | refused |
| image: no id or name, an id seen before, no file | dropped |
| image: no width and height | read from the file |
| image: truncated, corrupt, not an image | skipped in training, refused in evaluation |
| image: size differs from the annotations | skipped in training, refused in evaluation |
| image: size agrees only without its EXIF orientation | read as stored |
| annotation: not an object, unknown image or category, an id seen before, no class name in VOC | dropped |
| annotation: no id | gets one |
| box: NaN, infinite, not four numbers, beyond 1e7 pixels, without area, outside the image | dropped |
| box: reaches outside the image | clipped |
| box: none, but a mask or keypoints | rebuilt from them |
| polygon: fewer than three points, odd length, NaN, infinite, beyond 1e7 | part left out |
| RLE mask: bad counts, not the size of the image | mask left out |
| keypoints: not three numbers per point, NaN, infinite, beyond 1e7 | left out |
| skeleton: names an unknown keypoint | bone left out |
| caption: empty, not text, unknown image | dropped |

If ten or more images, objects or captions, and more than `max_bad_share` of them, are dropped or skipped,
the data set is refused and the first ten are named: on opening, or during training for images that turn out
bad only when they are decoded.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from pix2seq.data.dataset import find_splits, open_dataset
from pix2seq.data.defects import (
    MAX_BAD_SHARE,
    SKIPPED,
    BadShareError,
    Defect,
    defect_frame,
    describe,
    refuse_bad_share,
)
from pix2seq.data.image import SizeMismatchError, image_size, read_record_image
from pix2seq.errors import InputError
from pix2seq.types import ImageRecord

NUM_LISTED = 10  # ids to print per defect
_CHUNK = 1024  # images to queue for the threads at a time


@dataclass(frozen=True)
class SplitReport:
    """The contents and the defects of one split."""

    split: str
    num_images: int
    objects: pd.DataFrame  # as read, without dropped ones
    defects: pd.DataFrame
    refusal: str | None = None  # the reason why training and evaluation refuse the split, if they do

    def text(self) -> str:
        """Return statistics, then each kind of defect with its first ids."""
        objects = self.objects
        counts = objects.groupby("image_id").size()
        lines = [f"{self.split}: {self.num_images} images, {len(objects)} objects"]
        if len(objects):
            side = (objects["width"] * objects["height"]) ** 0.5
            quantiles = side.quantile([0.05, 0.5, 0.95])
            lines.append(
                f"  objects per image: median {counts.median():g}, most {counts.max():g}, "
                f"{self.num_images - len(counts)} images without objects"
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
        """Return plain values, with all defects."""
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
        """Whether at least one split has images and is not refused."""
        return any(report.num_images and report.refusal is None for report in self.splits)

    def text(self) -> str:
        """Return the report that `pix2seq data check` prints."""
        total = sum(len(report.defects) for report in self.splits)
        verdict = f"{total} defects; dropped entries are not used in training and evaluation" if total else "no defects"
        return "\n".join([str(self.root), *(report.text() for report in self.splits), verdict])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"root": str(self.root), "usable": self.usable, "splits": [report.to_json() for report in self.splits]}


def check_dataset(path: str | Path, split: str | None = None, *, max_bad_share: float = MAX_BAD_SHARE) -> CheckReport:
    """Read the annotations and decode every image of one split, or of all splits.

    A split with more than a share of `max_bad_share` (0 to 1) bad entries is reported as refused.
    Raises `InputError` if the folder or its annotation files cannot be used at all.
    """
    path = Path(path)
    splits = [split] if split else (find_splits(path) if path.is_dir() else [])
    return CheckReport(path, [_check_split(path, name, max_bad_share) for name in splits or ["train"]])


def _check_split(path: Path, split: str, max_bad_share: float) -> SplitReport:
    refusal = None
    try:
        dataset = open_dataset(path, split, max_bad_share=max_bad_share)
    except BadShareError as error:
        dataset, refusal = open_dataset(path, split, max_bad_share=1.0), str(error)
    num_images = len(dataset.images)
    rows: list[Defect] = []
    # Threads are enough: decoding releases the interpreter lock.
    with ThreadPoolExecutor() as pool, tqdm(total=num_images, unit="image", desc=split) as bar:
        for start in range(0, num_images, _CHUNK):
            some = dataset.images[start : start + _CHUNK]
            rows += [row for row in pool.map(_check_image, some) if row is not None]
            bar.update(len(some))
    defects = pd.concat([dataset.defects, defect_frame(rows)], ignore_index=True) if rows else dataset.defects
    try:
        refuse_bad_share("images", rows, num_images, where=path, max_bad_share=max_bad_share)
    except BadShareError as error:
        refusal = refusal or str(error)
    num_skipped = sum(row[3] == SKIPPED for row in rows)
    return SplitReport(split, num_images - num_skipped, dataset.objects, defects, refusal)


def _check_image(record: ImageRecord) -> Defect | None:
    try:
        read_record_image(record)
        width, height = image_size(record.path)
    except SizeMismatchError as error:
        return record.id, None, "size disagrees with the annotations", SKIPPED, str(error)
    except InputError as error:
        return record.id, None, "unreadable image", SKIPPED, str(error)
    if (width, height) == (record.width, record.height):
        return None
    detail = f"{record.path.name} is upright at {width}x{height}, the annotations say {record.width}x{record.height}"
    return record.id, None, "sides swapped by EXIF orientation", "read as stored", detail


def _name(row: Any) -> str:
    detail = f" ({row.detail})" if row.detail else ""
    return describe(row.image, row.annotation_id) + detail
