"""Data sets in YOLO layout: boxes, polygons or keypoints of one split.

    data.yaml, images/train/0001.jpg, labels/train/0001.txt

A YAML file in the data folder names the classes (`names`) and, for each split (`train`, `val` or `valid`, `test`),
folders of images or lists of their paths. Leading folders that do not exist are left out: they are those of another
computer. Without this file, `classes.txt` names the classes and `images/` is for training.

The labels of an image lie beside it, or in `labels/` where its path has `images/`; an image without such a file has no
object. A line is `class x y width height` with the centre of the box, or `class` and the points of a polygon, or a box
and `x y` or `x y visibility` of each point of `kpt_shape`, all in shares of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.formats.builder import NEW, Dataset, DatasetBuilder
from pix2seq.data.formats.coco_columns import whole_number
from pix2seq.data.image import image_size
from pix2seq.data.image_files import image_files
from pix2seq.data.splits import WORDS, words_for
from pix2seq.errors import InputError

_CLASS_LIST = "classes.txt"


def read_yolo(root: str | Path, split: str, *, max_bad_share: float = MAX_BAD_SHARE) -> Dataset:
    """Read a split.

    Raises `InputError` if its images or the names of the classes are missing, or if ten or more images or objects, and
    more than `max_bad_share` (0 to 1) of them, had to be dropped.
    """
    root = Path(root)
    where, config = _config(root)
    entry = next((config[word] for word in words_for(split) if config.get(word)), None)
    if entry is None:
        others = ", ".join(find_yolo_splits(root)) or "none"
        raise InputError(f"{where} has no split {split!r}; splits of this data set: {others}")
    paths = [
        path for text in ([entry] if isinstance(entry, str) else entry) for path in _images(root, config, str(text))
    ]
    if not paths:
        raise InputError(
            f"{where} has {split}: {entry}, where no image was found; expected a folder or a list of images"
        )
    builder = DatasetBuilder(root, split, where=where, max_bad_share=max_bad_share)
    points, dims = _keypoint_shape(where, config)
    names = _class_names(where, config)
    pairs = _flip_pairs(where, config, points)
    categories = {
        number: builder.add_category(NEW, name, points, flip_pairs=pairs) for number, name in enumerate(names)
    }
    builder.num_listed = len(paths)
    index: dict[int, int] = {}
    num_labels = 0
    for image_id, path in enumerate(dict.fromkeys(paths), start=1):
        label = _label_file(root, path)
        num_labels += label.is_file()
        try:
            size = image_size(root / path)
        except InputError as error:
            builder.defects.add(image_id, None, "unreadable image", "dropped", str(error))
            continue
        index[image_id] = builder.add_image(image_id, path, *size)
        if label.is_file():
            _add_objects(builder, label, image_id, size, len(points), dims)
    if not num_labels:
        raise InputError(f"no image of {where} has a file of labels; expected {_label_file(root, paths[0])} and so on")
    builder.link(index, categories)
    return builder.build()


def is_yolo(root: Path) -> bool:
    """Return whether a folder has a description of YOLO data."""
    return bool(_config(root)[1])


def find_yolo_splits(root: Path) -> list[str]:
    """Return the names of the splits: train, val, test."""
    config = _config(root)[1]
    return [group[0] for group in WORDS if any(config.get(word) for word in group)]


def _config(root: Path) -> tuple[Path, dict[str, Any]]:
    """Return the description of a data set and its file; empty if there is none."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read as YAML: {reason}; expected a YOLO data set") from None
        if isinstance(config, dict) and "names" in config:
            return path, config
    path = root / _CLASS_LIST
    if path.is_file() and (root / "labels").is_dir():
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return path, {"names": names, "train": "images"}
    return root, {}


def _class_names(where: Path, config: Mapping[str, Any]) -> list[str]:
    names = config["names"]
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise InputError(
            f"{where} has names: {names!r}; expected a list of classes, or a mapping from 0, 1, ... to them"
        )
    return [str(name) for name in names]


def _keypoint_shape(where: Path, config: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the names of the keypoints, and how many numbers each has; none and 0 without keypoints."""
    shape = config.get("kpt_shape")
    if shape is None:
        return (), 0
    if not (isinstance(shape, list) and len(shape) == 2 and type(shape[0]) is int and shape[1] in (2, 3)):
        raise InputError(f"{where} has kpt_shape: {shape!r}; expected [number of keypoints, 2 or 3]")
    names = config.get("kpt_names")
    names = next(iter(names.values()), None) if isinstance(names, dict) else names
    if not (isinstance(names, list) and len(names) == shape[0]):
        names = [f"point {number}" for number in range(1, shape[0] + 1)]
    return tuple(str(name) for name in names), int(shape[1])


def _flip_pairs(where: Path, config: Mapping[str, Any], points: tuple[str, ...]) -> tuple[tuple[str, str], ...] | None:
    """Return the points that swap in a mirror, by `flip_idx`: which point each becomes. None if it is not given."""
    order = config.get("flip_idx")
    if order is None or not points:
        return None
    numbers = list(range(len(points)))
    counts_points = isinstance(order, list) and all(type(i) is int for i in order) and sorted(order) == numbers
    if not counts_points or any(order[order[i]] != i for i in numbers):
        raise InputError(
            f"{where} has flip_idx: {order!r}; expected which of the {len(points)} points, counted from 0, each "
            "becomes in a mirror, such as [0, 2, 1]"
        )
    return tuple((points[i], points[j]) for i, j in enumerate(order) if i < j)


def _images(root: Path, config: Mapping[str, Any], entry: str) -> list[str]:
    """Return the paths below the root of the images in a folder, or in a list of paths."""
    place = _existing(root, f"{config.get('path') or '.'}/{entry}") or _existing(root, entry)
    if place is None:
        return []
    if (root / place).is_dir():
        return image_files(root, place)
    lines = (root / place).read_text(encoding="utf-8-sig").splitlines()
    return [path for line in lines if line.strip() and (path := _existing(root, line.strip())) is not None]


def _existing(root: Path, path: str) -> str | None:
    """Return the longest end of a path that exists below the root."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if (root / end).exists()), None)


def _label_file(root: Path, path: str) -> Path:
    folders = path.split("/")[:-1]
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        folders[last] = "labels"
    return root.joinpath(*folders, path.rpartition("/")[2]).with_suffix(".txt")


def _add_objects(
    builder: DatasetBuilder, label: Path, image_id: int, size: tuple[int, int], num_points: int, dims: int
) -> None:
    scale = np.array(size, np.float64)  # width, height
    lines = label.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label.name} line {number}"
        try:
            values = np.array(line.split()[1:], np.float64)
        except ValueError:
            values = np.zeros(0)
        fields: dict[str, Any] = {"id": len(builder.objects) + builder.num_left_out + 1, "image_id": image_id}
        fields["category_id"] = whole_number(line.split()[0])
        if len(values) == 4 + num_points * dims:
            centre, sides = values[:2] * scale, values[2:4] * scale
            fields["bbox"] = [*(centre - sides / 2).tolist(), *sides.tolist()]
            if num_points:
                points = values[4:].reshape(num_points, dims)
                seen = points[:, 2] if dims == 3 else 2.0 * points.any(axis=1)
                fields["keypoints"] = np.column_stack([points[:, :2] * scale, seen]).ravel().tolist()
        elif len(values) >= 6 and len(values) % 2 == 0 and not num_points:
            ring = values.reshape(-1, 2) * scale
            fields["segmentation"] = [ring.ravel().tolist()]
            fields["bbox"] = [*ring.min(axis=0).tolist(), *np.ptp(ring, axis=0).tolist()]
        else:
            builder.defects.add(image_id, None, "label is no box, polygon or pose", "dropped", f"{where}: {line[:80]}")
            builder.num_left_out += 1
            continue
        builder.objects.add(fields, where)
