"""Data sets in COCO layout: boxes, masks, keypoints and captions of one split.

    annotations/instances_train2017.json, person_keypoints_train2017.json, captions_train2017.json
    train2017/000000000139.jpg

Any of the three files may be missing, but not all. Where a split is asked for as `train`, the file
may be called `instances_train.json`, `instances_train2017.json` and so on; pictures are looked for in a
folder of the split's name, in `images/` and beside it. Roboflow's `train/_annotations.coco.json` is read too.

What is wrong with an annotation is noted in `defects` and the annotation dropped or mended: see
`_Reader`. Reference of the format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pix2seq.data.image import image_size
from pix2seq.data.table import HUGE, OBJECT_COLUMNS, Defects, clip_box, label_categories
from pix2seq.data.target import Category, ImageRecord, Segmentation, Target
from pix2seq.errors import InputError

KINDS = ("instances", "person_keypoints", "captions")


@dataclass(frozen=True)
class CocoDataset:
    """See `pix2seq.data.target.Dataset`. Annotations lie in flat arrays, sorted by image."""

    root: Path
    split: str
    categories: tuple[Category, ...]
    images: list[ImageRecord]
    objects: pd.DataFrame
    defects: pd.DataFrame
    _first: NDArray[np.int64]  # (images + 1,) where each image's annotations start
    _boxes_xyxy: NDArray[np.float32]
    _labels: NDArray[np.int64]
    _segmentations: list[Segmentation | None]
    _keypoints: NDArray[np.float32]
    _captions: dict[int, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.images)

    def target(self, index: int) -> Target:
        """The annotations of image `index`."""
        here = slice(int(self._first[index]), int(self._first[index + 1]))
        rows = self.objects.iloc[here]
        return Target(
            image=self.images[index],
            boxes_xyxy=self._boxes_xyxy[here],
            labels=self._labels[here],
            areas=rows["area"].to_numpy(np.float32),
            iscrowd=rows["iscrowd"].to_numpy(bool),
            annotation_ids=rows["annotation_id"].to_numpy(np.int64),
            segmentations=tuple(self._segmentations[here]),
            keypoints=self._keypoints[here],
            captions=self._captions.get(self.images[index].id, ()),
        )

    @classmethod
    def read(cls, root: str | Path, split: str) -> CocoDataset:
        """Read the files of a split. Raises `InputError` where they are missing or no COCO JSON."""
        root = Path(root)
        files = find_files(root, split)
        if not files:
            raise InputError(
                f"{root} has no COCO annotations of split {split!r}; expected "
                f"annotations/instances_{split}*.json, person_keypoints_{split}*.json or captions_{split}*.json"
            )
        return _Reader(root, split, files).dataset()


def find_files(root: Path, split: str) -> dict[str, Path]:
    """The annotation files of a split by kind; empty if there are none."""
    found = {}
    pattern = re.compile(rf"(instances|person_keypoints|captions)_{re.escape(split)}\d*\.json")
    for path in sorted((root / "annotations").glob("*.json")):
        match = pattern.fullmatch(path.name)
        if match and match[1] not in found:
            found[match[1]] = path
    if not found:
        names = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}.get(split, (split,))
        for name in names:
            if (root / name / "_annotations.coco.json").is_file():
                return {"instances": root / name / "_annotations.coco.json"}
    return found


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object, with or without a byte order mark. Raises `InputError` with file, line and column."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "the file is damaged or cut off: copy it again"
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; expected a COCO annotation file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a COCO object with images and annotations")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise InputError(f"{path} has no list of {key}; expected a COCO annotation file")
    return content


class _Reader:
    """One pass over the files of a split.

    Policies: an annotation is dropped if its id was seen before, its image or category is unknown,
    or its box is not finite, absurd, empty or outside; a box that reaches outside is clipped; an empty
    box is rebuilt from the mask or the keypoints where there are any, as some labelling tools leave
    it out. Bad mask parts and bad keypoints are left out and the rest kept. A picture that is listed
    twice or has no file is dropped.
    """

    def __init__(self, root: Path, split: str, files: dict[str, Path]) -> None:
        self.root, self.split, self.files = root, split, files
        self.content = {kind: load_json(path) for kind, path in files.items()}
        self.defects = Defects()

    def dataset(self) -> CocoDataset:
        images = self._images()
        place = {image.id: position for position, image in enumerate(images)}
        categories = self._categories()
        by_id = {category.id: category for category in categories}
        num_keypoints = max((len(category.keypoints) for category in categories), default=0)

        rows, boxes, labels, segmentations, keypoints = [], [], [], [], []
        for annotation in self._annotations():
            image_id, annotation_id = annotation.get("image_id"), annotation["id"]
            category_id = _plain_int(annotation.get("category_id"))
            category = None if category_id is None else by_id.get(category_id)
            if image_id not in place:
                if image_id not in self.dropped_images:
                    self.defects.add(image_id, annotation_id, "unknown image id", "dropped")
                continue
            if category is None:
                detail = repr(annotation.get("category_id"))
                self.defects.add(image_id, annotation_id, "unknown category id", "dropped", detail)
                continue
            image = images[place[image_id]]
            segmentation = self._segmentation(annotation, image)
            points = self._keypoints(annotation, image_id, num_keypoints)
            box = self._box(annotation, image, segmentation, points)
            if box is None:
                continue
            parts = len(segmentation) if isinstance(segmentation, list) else 0
            area = _finite(annotation.get("area")) or (box[2] - box[0]) * (box[3] - box[1])
            rows.append(
                (place[image_id], image_id, annotation_id, category.id, category.name, box[0], box[1], box[2] - box[0])
                + (box[3] - box[1], area, bool(annotation.get("iscrowd", 0)), parts, int((points[:, 2] > 0).sum()))
            )
            boxes.append(box)
            labels.append(category.label)
            segmentations.append(segmentation)
            keypoints.append(points)

        table = pd.DataFrame(rows, columns=["place", *OBJECT_COLUMNS])
        order = np.argsort(table["place"].to_numpy(np.int64), kind="stable")
        first = np.searchsorted(table["place"].to_numpy(np.int64)[order], np.arange(len(images) + 1))
        return CocoDataset(
            root=self.root,
            split=self.split,
            categories=categories,
            images=images,
            objects=table.iloc[order].drop(columns="place").reset_index(drop=True),
            defects=self.defects.frame(),
            _first=first,
            _boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4)[order],
            _labels=np.array(labels, np.int64)[order],
            _segmentations=[segmentations[i] for i in order],
            _keypoints=np.array(keypoints, np.float32).reshape(len(rows), num_keypoints, 3)[order],
            _captions=self._captions(place),
        )

    def _images(self) -> list[ImageRecord]:
        self.dropped_images: set[Any] = set()
        listing = _FileListing(self.root, self.split)
        records: dict[Any, ImageRecord] = {}
        missing = 0
        for kind, content in self.content.items():
            for position, entry in enumerate(content["images"]):
                image_id, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
                if not isinstance(image_id, int) or not isinstance(name, str):
                    self.defects.add(image_id, None, "image without id or file_name", "dropped", f"entry {position}")
                    continue
                if image_id in records or image_id in self.dropped_images:
                    if kind == next(iter(self.content)):
                        self.defects.add(image_id, None, "duplicate image id", "dropped", name)
                    continue
                path = listing.find(name)
                if path is None:
                    missing += 1
                    self.dropped_images.add(image_id)
                    self.defects.add(image_id, None, "missing image file", "dropped", name)
                    continue
                size = self._size(entry, path)
                if size is None:
                    self.dropped_images.add(image_id)
                    continue
                records[image_id] = ImageRecord(image_id, path, *size)
        if not records and missing:
            raise InputError(
                f"none of the {missing} pictures that {next(iter(self.files.values()))} lists was found under "
                f"{self.root}; expected them in {self.split}*/ or images/"
            )
        return list(records.values())

    def _size(self, entry: dict[str, Any], path: Path) -> tuple[int, int] | None:
        width, height = _plain_int(entry.get("width")), _plain_int(entry.get("height"))
        if width is not None and height is not None and width > 0 and height > 0:
            return width, height
        try:
            size = image_size(path)
        except InputError as error:
            self.defects.add(entry["id"], None, "unreadable image", "dropped", str(error))
            return None
        self.defects.add(entry["id"], None, "no width and height", "read from the file", path.name)
        return size

    def _categories(self) -> tuple[Category, ...]:
        merged: dict[int, tuple[int, str, tuple[str, ...], tuple[tuple[int, int], ...]]] = {}
        for kind in ("instances", "person_keypoints"):
            for entry in self.content.get(kind, {}).get("categories", []):
                category_id, name = _plain_int(entry.get("id")), entry.get("name")
                if category_id is None or not isinstance(name, str):
                    raise InputError(
                        f"{self.files[kind]} has a category without a whole id and a name: {entry!r}"[:300]
                    )
                keypoints = tuple(str(point) for point in entry.get("keypoints", ()))
                skeleton = tuple((int(a) - 1, int(b) - 1) for a, b in entry.get("skeleton", ()))
                if category_id not in merged or keypoints:
                    merged[category_id] = (category_id, name.strip(), keypoints, skeleton)
        if not merged and "captions" not in self.content:
            raise InputError(
                f"{next(iter(self.files.values()))} has no categories; expected a list with id and name each"
            )
        return label_categories(list(merged.values()))

    def _annotations(self) -> Iterable[dict[str, Any]]:
        """Instances, with the keypoints of the same annotation id; then what only the keypoint file has."""
        with_points: dict[Any, dict[str, Any]] = {}
        for entry in self.content.get("person_keypoints", {}).get("annotations", []):
            if isinstance(entry, dict) and entry.get("id") is not None:
                with_points.setdefault(entry["id"], entry)
        seen: set[Any] = set()
        unnamed = -1
        for kind in ("instances", "person_keypoints"):
            again: set[Any] = set()
            for position, entry in enumerate(self.content.get(kind, {}).get("annotations", [])):
                if not isinstance(entry, dict):
                    self.defects.add(None, None, "annotation is no object", "dropped", f"{kind} entry {position}")
                    continue
                annotation_id = _plain_int(entry.get("id"))
                if annotation_id is None:
                    annotation_id, unnamed = unnamed, unnamed - 1
                    self.defects.add(entry.get("image_id"), annotation_id, "no annotation id", "one was given")
                if annotation_id in again:
                    self.defects.add(entry.get("image_id"), annotation_id, "duplicate annotation id", "dropped")
                    continue
                again.add(annotation_id)
                if annotation_id in seen:
                    continue  # the same person, read with the instances
                seen.add(annotation_id)
                points = with_points.get(annotation_id, {}).get("keypoints") if kind == "instances" else None
                yield entry | {"id": annotation_id} | ({"keypoints": points} if points is not None else {})

    def _segmentation(self, annotation: dict[str, Any], image: ImageRecord) -> Segmentation | None:
        value, ids = annotation.get("segmentation"), (image.id, annotation["id"])
        if isinstance(value, dict):
            size, counts = value.get("size"), value.get("counts")
            whole = isinstance(counts, str | list) and size == [image.height, image.width]
            if isinstance(counts, list) and whole:
                whole = all(isinstance(c, int) and c >= 0 for c in counts) and sum(counts) == image.height * image.width
            if not whole:
                self.defects.add(*ids, "bad run-length mask", "mask left out")
                return None
            return {"size": size, "counts": counts}
        rings = []
        for part in value if isinstance(value, list) else ():
            try:
                flat = np.asarray(part, np.float64)
            except (TypeError, ValueError):
                flat = np.array([np.nan])
            if flat.ndim != 1 or len(flat) < 6 or len(flat) % 2:
                self.defects.add(*ids, "polygon of fewer than three points or odd length", "part left out")
            elif not np.isfinite(flat).all() or np.abs(flat).max() > HUGE:
                self.defects.add(*ids, "polygon with unusable numbers", "part left out")
            else:
                rings.append(flat.reshape(-1, 2).astype(np.float32))
        return rings or None

    def _keypoints(self, annotation: dict[str, Any], image_id: int, count: int) -> NDArray[np.float32]:
        empty = np.zeros((count, 3), np.float32)
        value = annotation.get("keypoints")
        if not value or not count:
            return empty
        try:
            points = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            points = np.array([np.nan])
        if points.shape != (3 * count,) or not np.isfinite(points).all() or np.abs(points).max() > HUGE:
            self.defects.add(image_id, annotation["id"], "bad keypoints", "left out", f"expected {3 * count} numbers")
            return empty
        points = points.reshape(count, 3)
        points[points[:, 2] <= 0] = 0
        return points.astype(np.float32)

    def _box(
        self,
        annotation: dict[str, Any],
        image: ImageRecord,
        segmentation: Segmentation | None,
        points: NDArray[np.float32],
    ) -> tuple[float, float, float, float] | None:
        ids = (image.id, annotation["id"])
        value = annotation.get("bbox")
        try:
            box, defect = clip_box(value if value is not None else (0, 0, 0, 0), image.width, image.height)
        except (TypeError, ValueError):
            box, defect = None, "box is not four numbers"
        if box is None and (value is None or not any(_finite(v) for v in value)) and defect == "box has no area":
            known = np.concatenate(segmentation) if isinstance(segmentation, list) else points[points[:, 2] > 0, :2]
            if len(known):
                low, high = known.min(axis=0), known.max(axis=0)
                box, _ = clip_box((*low, *(high - low)), image.width, image.height)
                if box is not None:
                    self.defects.add(*ids, "no box", "rebuilt from mask or keypoints")
                    return box
        if defect is not None:
            self.defects.add(*ids, defect, "dropped" if box is None else "clipped", str(value)[:80])
        return box

    def _captions(self, place: dict[int, int]) -> dict[int, tuple[str, ...]]:
        captions: dict[int, list[str]] = {}
        for entry in self.content.get("captions", {}).get("annotations", []):
            text = " ".join(str(entry.get("caption", "")).split()) if isinstance(entry, dict) else ""
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            if image_id not in place:
                if image_id not in self.dropped_images:
                    self.defects.add(
                        image_id, entry.get("id") if isinstance(entry, dict) else None, "unknown image id", "dropped"
                    )
            elif not text:
                self.defects.add(image_id, entry.get("id"), "empty caption", "dropped")
            else:
                captions.setdefault(image_id, []).append(text)
        return {image_id: tuple(texts) for image_id, texts in captions.items()}


class _FileListing:
    """Finds pictures with one look into each folder instead of one at each file."""

    def __init__(self, root: Path, split: str) -> None:
        folders = sorted(path for path in root.glob(f"{split}*") if path.is_dir())
        folders += [root / "images" / path.name for path in folders]
        folders += sorted((root / "images").glob(f"{split}*")) + [root / "images", root / "valid", root]
        self.files: dict[str, Path] = {}
        for folder in folders:
            if folder.is_dir():
                for entry in os.scandir(folder):
                    self.files.setdefault(entry.name, Path(entry.path))
        self.root = root

    def find(self, name: str) -> Path | None:
        """The file of a `file_name`, which may have folders in it."""
        if "/" in name or "\\" in name:
            path = self.root / name.replace("\\", "/")
            # Never outside the data folder: names are data, and data may come from anyone.
            inside = path.resolve().is_relative_to(self.root.resolve())
            if inside and path.is_file():
                return path
            name = name.replace("\\", "/").rsplit("/", 1)[-1]
        return self.files.get(name)


def _plain_int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or int(value) != value:
        return None
    return int(value)


def _finite(value: Any) -> float:
    """A usable number, or 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and np.isfinite(value) and abs(value) < HUGE**2 else 0.0
