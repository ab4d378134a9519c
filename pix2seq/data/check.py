"""Read a complete data set once and report every defect by id.

The policies below hold for this check, for training and for evaluation:

| defect | policy |
|---|---|
| annotation file: cut off, not JSON or XML, not in UTF-8 or the encoding that it names | refused |
| annotation files: several could be meant | by the rules of `formats.coco_files`, and said; else refused |
| category: no id or no name, an id given twice, unreadable keypoints, no category at all | refused |
| category: a name given twice, or in other capitals or with other spaces around it | joined |
| image: no id or name, no file, or several files that could be meant | dropped |
| image: an id seen before | dropped; both, if they are different files |
| image: a file listed twice | joined; the second is dropped if it says another size |
| image: no width and height | read from the file |
| image: truncated, corrupt, not an image | skipped in training, refused in evaluation |
| image: size differs from the annotations | skipped in training, refused in evaluation |
| image: size agrees only without its EXIF orientation | read as stored |
| annotation: not an object, unknown image or category, an id seen before, no class name in VOC | dropped |
| annotation: no id | gets one |
| flag (`iscrowd`, `difficult`): neither 0 nor 1, in numbers, words or as text | read as 0 |
| box: NaN, infinite, not four numbers, beyond 1e7 pixels, without area, outside the image | dropped |
| box: reaches outside the image | clipped |
| box: none, but a mask or keypoints | rebuilt from them |
| boxes: all of them shares of the image, 0 to 1 | refused |
| polygon: fewer than three points, odd length, NaN, infinite, beyond 1e7 | part left out |
| RLE mask: bad counts, not the size of the image | mask left out |
| keypoints: not three numbers for each point of the class, NaN, infinite, beyond 1e7 | left out |
| skeleton: names an unknown keypoint | bone left out |
| caption: empty, not text, unknown image | dropped |
| split: nothing to learn from, neither an object that is no crowd nor a caption | refused in training |

If ten or more images, objects or captions, and more than `max_bad_share` of them, are dropped or skipped,
the data set is refused and the first ten are named: on opening, or during training for images that turn out
bad only when they are decoded. Validation images are decoded before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.image import SizeMismatchError, image_size, read_record_image
from pix2seq.data.splits import words_for
from pix2seq.errors import InputError, shortened
from pix2seq.types import ImageRecord, category_key

TRAIN, VAL = "train", "val"
NUM_LISTED = 10  # ids to print per defect
_CHUNK = 1024  # images to queue for the threads at a time


@dataclass(frozen=True)
class SplitReport:
    """The contents and the defects of one split."""

    split: str
    dataset: Dataset  # as read
    usable: list[int]  # indices of the images that training would use
    defects: pd.DataFrame
    refusal: str | None = None  # the reason why training and evaluation refuse the split, if they do

    @property
    def num_images(self) -> int:
        """Number of images that training would use."""
        return len(self.usable)

    @cached_property
    def objects(self) -> pd.DataFrame:
        """The objects of these images, one a row."""
        return self.dataset.select(self.split, self.usable).objects

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
            listed = "; ".join(shortened([_name(row) for row in rows.itertuples()], NUM_LISTED))
            lines.append(f"  {len(rows)} x {defect} ({action}): {listed}")
        if self.refusal is not None:
            lines.append(f"  refused in training and evaluation: {self.refusal}")
        return "\n".join(lines)

    def to_json(self, *, with_images: bool = False) -> dict[str, Any]:
        """Return plain values, with all defects; and with the classes, images and annotations if `with_images`."""
        more = {"classes": self._classes(), "images": self._images()} if with_images else {}
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
            **more,
        }

    def _classes(self) -> list[dict[str, Any]]:
        return [{"name": c.name, "keypoints": list(c.keypoints)} for c in self.dataset.categories]

    def _images(self) -> list[dict[str, Any]]:
        category_of = {category.label: category for category in self.dataset.categories}
        images = []
        for index in self.usable:
            target = self.dataset.target(index)
            image, x1y1 = target.image, target.boxes_xyxy[:, :2]
            objects = [
                {
                    "class": category_of[label].name,
                    "bbox": xywh,
                    "crowd": crowd,
                    "keypoints": points[: len(category_of[label].keypoints)].ravel().tolist(),
                }
                for label, xywh, crowd, points in zip(
                    target.labels.tolist(),
                    np.concatenate([x1y1, target.boxes_xyxy[:, 2:] - x1y1], axis=1).tolist(),
                    target.iscrowd.tolist(),
                    target.keypoints,
                    strict=True,
                )
            ]
            file = image.path.relative_to(self.dataset.root).as_posix()
            about = {"id": image.id, "file": file, "width": image.width, "height": image.height}
            images.append(about | {"captions": list(target.captions), "objects": objects})
        return images


@dataclass(frozen=True)
class CheckReport:
    """The reports of all splits."""

    root: Path
    splits: list[SplitReport]

    @property
    def usable(self) -> bool:
        """Whether training and evaluation can start: there is a split, and none is refused."""
        return bool(self.splits) and all(report.refusal is None for report in self.splits)

    def text(self) -> str:
        """Return the report that `pix2seq data check` prints."""
        total = sum(len(report.defects) for report in self.splits)
        verdict = f"{total} defects; dropped entries are not used in training and evaluation" if total else "no defects"
        refused = [report.split for report in self.splits if report.refusal is not None]
        if refused:
            verdict = f"refused in training and evaluation: {', '.join(refused)}; {verdict}"
        elif not total:
            verdict = "sound: no defects"
        return "\n".join([str(self.root), *(report.text() for report in self.splits), *self.notes, verdict])

    def to_json(self, *, with_images: bool = False) -> dict[str, Any]:
        """Return plain values; see `SplitReport.to_json`."""
        splits = [report.to_json(with_images=with_images) for report in self.splits]
        return {"root": str(self.root), "usable": self.usable, "splits": splits, "notes": self.notes}

    @property
    def notes(self) -> list[str]:
        """What is no defect of a split, but of the splits together."""
        reports = {report.split: report for report in self.splits if len(report.dataset.categories)}
        if "train" not in reports:
            return []
        known = reports["train"].objects["category"].unique()
        return [
            f"objects in {name} of classes that no object in train has: {', '.join(unseen)}"
            for name, report in reports.items()
            if (unseen := unseen_classes(report.objects["category"].unique(), known))
        ]


def unseen_classes(classes: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names of classes that are not known, in whatever capitals."""
    keys = {category_key(name) for name in known}
    return [name for name in classes if category_key(name) not in keys]


def check_dataset(
    path: str | Path,
    split: str | None = None,
    *,
    annotations: str | Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> CheckReport:
    """Read the annotations and decode every image of one split, or of all splits.

    A split with more than a share of `max_bad_share` (0 to 1) bad entries is reported as refused, and so is one for
    training without anything to learn from. Raises `InputError` if the folder or its annotation files cannot be used
    at all. `annotations` as in `open_dataset`, for the split that is given, by default `train`.
    """
    path = Path(path)
    splits = [split] if split else (find_splits(path) if path.is_dir() and annotations is None else [])
    reports = [_check_split(path, name, annotations, max_bad_share) for name in splits or [TRAIN]]
    return CheckReport(path, reports)


def find_bad_images(images: Sequence[ImageRecord], *, name: str) -> list[Defect]:
    """Decode images and return the defects of those that are unusable or turned; `name` stands beside the progress."""
    rows: list[Defect] = []
    # Threads are enough: decoding releases the interpreter lock.
    with ThreadPoolExecutor() as pool, tqdm(total=len(images), unit="image", desc=name) as bar:
        for start in range(0, len(images), _CHUNK):
            some = images[start : start + _CHUNK]
            rows += [row for row in pool.map(_check_image, some) if row is not None]
            bar.update(len(some))
    return rows


def refuse_skipped(dataset: Dataset, defects: Sequence[Defect]) -> str | None:
    """Return why a data set cannot be evaluated on, None if no image has one of the `defects` that stop it."""
    count = sum(row[3] == SKIPPED for row in defects)
    return f"{count} images of split {dataset.split!r} cannot be evaluated: {_list_skipped(defects)}" if count else None


def _list_skipped(defects: Sequence[Defect]) -> str:
    skipped = [row[4] for row in defects if row[3] == SKIPPED]
    return "; ".join(shortened(skipped, NUM_LISTED))


def _check_split(path: Path, split: str, annotations: str | Path | None, max_bad_share: float) -> SplitReport:
    refusal = None
    try:
        dataset = open_dataset(path, split, annotations=annotations, max_bad_share=max_bad_share)
    except BadShareError as error:
        dataset, refusal = open_dataset(path, split, annotations=annotations, max_bad_share=1.0), str(error)
    rows = find_bad_images(dataset.images, name=split)
    defects = pd.concat([dataset.defects, defect_frame(rows)], ignore_index=True) if rows else dataset.defects
    skipped = {row[0] for row in rows if row[3] == SKIPPED}
    usable = [index for index, image in enumerate(dataset.images) if image.id not in skipped]
    try:
        refuse_bad_share("images", rows, len(dataset.images), where=path, max_bad_share=max_bad_share)
    except BadShareError as error:
        refusal = refusal or str(error)
    if refusal is None and split in words_for(TRAIN):
        refusal = _nothing_to_learn(dataset.select(split, usable))
        if refusal is not None and skipped:
            refusal += f"; {_list_skipped(rows)}"
    elif refusal is None and split in words_for(VAL):
        refusal = refuse_skipped(dataset, rows)
    return SplitReport(split, dataset, usable, defects, refusal)


def _nothing_to_learn(dataset: Dataset) -> str | None:
    num_objects, num_crowds = len(dataset.annotations), int(dataset.annotations.iscrowd.sum())
    if num_objects > num_crowds or len(dataset.annotations.caption_owner):
        return None
    crowds = f" but {num_crowds} crowds or difficult ones" if num_crowds else ""
    return (
        f"{dataset.root} has no object{crowds} and no caption in the {len(dataset)} usable images of split "
        f"{dataset.split!r}: there is nothing to learn from"
    )


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
    if row.image is None and row.annotation_id is None:  # a defect of the files or the classes
        return str(row.detail)
    detail = f" ({row.detail})" if row.detail else ""
    return describe(row.image, row.annotation_id) + detail
