"""Flat arrays from the JSON entries of COCO annotations: first as written, then checked all at once.

The files are not kept as Python objects, and official files list their categories last. So each entry
goes into columns before images and categories are known; `check_objects` and `check_captions` then
apply the policies of `pix2seq.data.formats.coco`. A row is the index of an entry in its columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations, ImageTable, box_annotations, gather, offsets
from pix2seq.data.defects import BOX_DEFECTS, MAX_COORD, Defect, clip_box, clip_boxes
from pix2seq.geometry.polygons import run_lengths
from pix2seq.types import ATTRIBUTES, Category

NO_ID = -(2**63)  # in a column of ids: not a whole number of 64 bits
_CHUNK = 1 << 20  # rows or numbers at a time, to keep temporary arrays small

_RowDefect = tuple[int, int, str, str, str]  # row, order, defect, action, detail

# The order of the defects of an annotation.
_ENTRY, _ID, _OWNER, _MASK, _KEYPOINTS, _BOX = range(6)


def whole_number(value: Any) -> int | None:
    """Return a value as int if it is a whole number of 64 bits, also one written as 7.0; else None."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and NO_ID < value < 2**63 else None


class ObjectColumns:
    """Boxes, masks and keypoints as written: `instances` first, then `person_keypoints`."""

    def __init__(self) -> None:
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.boxes = array("d")  # x, y, width, height; all 0 if missing, NaN if not four numbers
        self.areas = array("d")  # 0 if missing
        self.iscrowd = bytearray()
        self.ring_rows, self.ring_ends, self.points = array("q"), array("q"), array("f")
        self.rle_rows, self.rle_ends, self.rle_counts = array("q"), array("q"), bytearray()
        self.rle_sizes, self.rle_is_list = array("q"), bytearray()  # height, width of each mask
        self.keypoint_rows, self.keypoint_ends, self.keypoints = array("q"), array("q"), array("f")
        self.attribute_rows, self.attribute_kinds = array("q"), array("q")
        self.kinds: dict[tuple[tuple[str, str], ...], int] = {}  # the different attributes, and their numbers
        self.as_written: dict[tuple[int, str], str] = {}  # ids and boxes that do not fit a column
        self.defects: list[_RowDefect] = []
        self.num_no_object = 0  # entries without a row
        self.num_instances = 0  # rows before those of person_keypoints

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entry: Any, position: str) -> None:
        """Append an entry of a list of annotations; `position` describes it if it is not an object."""
        row = len(self.ids)
        if not isinstance(entry, dict):
            self.num_no_object += 1
            self.defects.append((row, _ENTRY, "annotation is no object", "dropped", position))
            return
        for column, name in ((self.ids, "id"), (self.image_ids, "image_id"), (self.category_ids, "category_id")):
            value = entry.get(name)
            number = whole_number(value)
            if number is None:
                self.as_written[row, name] = str(value)[:80]
                number = NO_ID
            column.append(number)
        self._add_box(row, entry.get("bbox"))
        area = entry.get("area")
        self.areas.append(area if type(area) is float or (type(area) is int and abs(area) < MAX_COORD**2) else 0.0)
        self.iscrowd.append(bool(entry.get("iscrowd", 0)))
        segmentation = entry.get("segmentation")
        if isinstance(segmentation, list):
            # A flat list in place of a list of lists is one defect, not one per number.
            nested = not segmentation or any(isinstance(part, list) for part in segmentation)
            for part in segmentation if nested else ["flat"]:
                self._add_ring(row, part)
        elif isinstance(segmentation, dict):
            self._add_rle(row, segmentation.get("size"), segmentation.get("counts"))
        elif segmentation is not None:
            self._mask_defect(row, "segmentation is neither polygons nor run lengths", "mask left out")
        keypoints = entry.get("keypoints")
        if keypoints is not None:  # an empty list too takes precedence over the other file
            flat = _numbers("f", keypoints or [])
            self.keypoints.extend(array("f", [np.nan]) if flat is None else flat)
            self.keypoint_rows.append(row)
            self.keypoint_ends.append(len(self.keypoints))
        attributes = tuple((name, entry[name]) for name in ATTRIBUTES if isinstance(entry.get(name), str))
        if attributes:
            self.attribute_rows.append(row)
            self.attribute_kinds.append(self.kinds.setdefault(attributes, len(self.kinds)))

    def _add_box(self, row: int, value: Any) -> None:
        box = array("d", (0, 0, 0, 0)) if value is None else _numbers("d", value)
        if box is None or len(box) != 4:
            self.as_written[row, "bbox"] = str(value)[:80]
            box = array("d", [np.nan] * 4)
        self.boxes.extend(box)

    def _add_ring(self, row: int, part: Any) -> None:
        flat = _numbers("f", part)
        if flat is None and isinstance(part, list) and len(part) >= 6 and not len(part) % 2:
            self._mask_defect(row, "polygon with unusable numbers", "part left out")
        elif flat is None or len(flat) < 6 or len(flat) % 2:
            self._mask_defect(row, "polygon of fewer than three points or odd length", "part left out")
        else:
            self.points.extend(flat)
            self.ring_rows.append(row)
            self.ring_ends.append(len(self.points))

    def _add_rle(self, row: int, size: Any, counts: Any) -> None:
        lengths = run_lengths(counts)
        sides = [whole_number(side) for side in size] if isinstance(size, list) else []
        height, width = sides if len(sides) == 2 else (None, None)
        if lengths is None or height is None or width is None or int(lengths.sum()) != height * width:
            self._mask_defect(row, "bad run-length mask", "mask left out")
            return
        self.rle_counts += counts.encode("ascii") if isinstance(counts, str) else lengths.astype(np.int32).tobytes()
        self.rle_rows.append(row)
        self.rle_ends.append(len(self.rle_counts))
        self.rle_sizes.extend((height, width))
        self.rle_is_list.append(isinstance(counts, list))

    def _mask_defect(self, row: int, defect: str, action: str) -> None:
        self.defects.append((row, _MASK, defect, action, ""))


class CaptionColumns:
    """Captions as written, with each run of spaces replaced by one."""

    def __init__(self) -> None:
        self.image_ids, self.ends, self.texts = array("q"), array("q"), bytearray()
        self.as_written: dict[int, str] = {}  # image ids that do not fit a column
        self.annotation_ids = array("q")

    def __len__(self) -> int:
        return len(self.image_ids)

    def add(self, entry: Any) -> None:
        """Append an entry of a list of captions."""
        fields = entry if isinstance(entry, dict) else {}
        image_id, annotation_id = whole_number(fields.get("image_id")), whole_number(fields.get("id"))
        if image_id is None:
            self.as_written[len(self)] = str(fields.get("image_id"))[:80]
        self.image_ids.append(NO_ID if image_id is None else image_id)
        self.annotation_ids.append(NO_ID if annotation_id is None else annotation_id)
        text = fields.get("caption")
        # JSON can hold half a surrogate pair, which UTF-8 cannot encode.
        self.texts += " ".join(text.split()).encode("utf-8", "replace") if isinstance(text, str) else b""
        self.ends.append(len(self.texts))


def check_objects(
    columns: ObjectColumns, images: ImageTable, categories: Sequence[Category], dropped_images: Collection[int]
) -> tuple[Annotations, list[Defect], int]:
    """Return the usable annotations (without captions), the defects, and the number of annotations read.

    Annotations of an image in `dropped_images` are not used; this does not count as a defect.
    """
    row_defects = list(columns.defects)
    ids, is_new, is_same_person = _identities(columns, row_defects)
    image_ids, category_ids = _int64(columns.image_ids), _int64(columns.category_ids)
    image_index = _find_index(image_ids, images.ids)
    category_index = _find_index(category_ids, np.array([category.id for category in categories], np.int64))
    fresh = is_new & ~is_same_person

    def written(row: int, name: str, column: NDArray[np.int64]) -> str:
        return columns.as_written.get((row, name)) or str(column[row])

    for row in np.flatnonzero(fresh & (image_index < 0)).tolist():
        if int(image_ids[row]) not in dropped_images:
            row_defects.append((row, _OWNER, "unknown image id", "dropped", ""))
    for row in np.flatnonzero(fresh & (image_index >= 0) & (category_index < 0)).tolist():
        row_defects.append((row, _OWNER, "unknown category id", "dropped", written(row, "category_id", category_ids)))
    known = fresh & (image_index >= 0) & (category_index >= 0)

    rings = _valid_rings(columns, row_defects)
    rles = _valid_rles(columns, images, image_index, known, row_defects)
    is_same_person &= is_new
    num_points = np.array([len(category.keypoints) for category in categories] + [0], np.int64)[category_index]
    keypoints, keypoint_rows = _valid_keypoints(columns, ids, is_same_person, known, num_points, row_defects)
    boxes, areas = _boxes(columns, images, image_index, known, rings, keypoints, keypoint_rows, row_defects)
    columns.boxes = array("d")  # free the largest column of a data set of boxes

    used = np.flatnonzero(~np.isnan(boxes[:, 0]))
    used = used[np.argsort(image_index[used], kind="stable")]
    new_row = np.full(len(columns), -1, np.int64)
    new_row[used] = np.arange(len(used))
    labels = np.array([category.label for category in categories], np.int32)
    ring_owner, ring_order = _entries_by_owner(_int64(columns.ring_rows), rings, new_row)
    rle_owner, rle_order = _entries_by_owner(_int64(columns.rle_rows), rles, new_row)
    keypoint_owner, keypoint_order = _entries_by_owner(keypoint_rows, np.ones(len(keypoint_rows), np.bool_), new_row)
    described = _int64(columns.attribute_rows)
    attribute_owner, attribute_order = _entries_by_owner(described, np.ones(len(described), np.bool_), new_row)
    ring_edges, rle_edges = (np.append(0, _int64(ends)) for ends in (columns.ring_ends, columns.rle_ends))
    points = np.frombuffer(columns.points, np.float32).reshape(-1, 2)
    annotations = box_annotations(
        first=np.searchsorted(image_index[used], np.arange(len(images) + 1)).astype(np.int64),
        boxes_xyxy=boxes[used],
        labels=labels[category_index[used]],
        areas=areas[used],
        iscrowd=np.frombuffer(columns.iscrowd, np.bool_)[used],
        ids=ids[used],
        num_keypoints=keypoints.shape[1],
        ring_owner=ring_owner,
        first_point=offsets(np.diff(ring_edges // 2)[ring_order]),
        points=gather(points, ring_edges // 2, ring_order),
        rle_owner=rle_owner,
        first_byte=offsets(np.diff(rle_edges)[rle_order]),
        rle_counts=gather(np.frombuffer(columns.rle_counts, np.uint8), rle_edges, rle_order),
        rle_is_list=np.frombuffer(columns.rle_is_list, np.bool_)[rle_order],
        keypoint_owner=keypoint_owner,
        keypoints=keypoints[keypoint_order],
        attribute_owner=attribute_owner,
        attribute_kind=_int64(columns.attribute_kinds)[attribute_order].astype(np.int32),
        attribute_kinds=tuple(dict(kind) for kind in columns.kinds),
    )
    row_defects.sort(key=lambda defect: defect[:2])
    defects: list[Defect] = []
    for row, order, defect, action, detail in row_defects:
        if order == _ENTRY and defect == "annotation is no object":
            defects.append((None, None, defect, action, detail))
        elif order <= _OWNER or known[row]:
            image_id = columns.as_written.get((row, "image_id")) or int(image_ids[row])
            defects.append((image_id, int(ids[row]), defect, action, detail))
    return annotations, defects, len(columns) + columns.num_no_object - int(is_same_person.sum())


def check_captions(
    columns: CaptionColumns, images: ImageTable, dropped_images: Collection[int]
) -> tuple[dict[str, Any], list[Defect]]:
    """Return the caption fields of `Annotations`, and the defects."""
    image_ids, annotation_ids = _int64(columns.image_ids), _int64(columns.annotation_ids)
    image_index = _find_index(image_ids, images.ids)
    edges = np.append(0, _int64(columns.ends))
    sizes = np.diff(edges)
    defects: list[Defect] = []
    for row in np.flatnonzero((image_index < 0) | (sizes == 0)).tolist():
        image_id, number = int(image_ids[row]), int(annotation_ids[row])
        if image_id in dropped_images:
            continue
        defect = "unknown image id" if image_index[row] < 0 else "empty caption"
        named = columns.as_written.get(row) or image_id
        defects.append((named, None if number == NO_ID else number, defect, "dropped", ""))
    owner, order = _entries_by_owner(image_index, sizes > 0, np.arange(len(images), dtype=np.int64))
    fields = {
        "caption_owner": owner,
        "first_char": offsets(sizes[order]),
        "captions": gather(np.frombuffer(columns.texts, np.uint8), edges, order),
    }
    return fields, defects


def _identities(
    columns: ObjectColumns, row_defects: list[_RowDefect]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return each row's id, whether it is the first in its file with that id, and whether the instances have it too."""
    ids = _int64(columns.ids).copy()
    unnamed = np.flatnonzero(ids == NO_ID)
    below = min(int(ids[ids != NO_ID].min(initial=0)), 0)
    ids[unnamed] = below - 1 - np.arange(len(unnamed))
    row_defects += [(row, _ENTRY, "no annotation id", "one was given", "") for row in unnamed.tolist()]
    is_new = np.zeros(len(ids), np.bool_)
    for start, stop in ((0, columns.num_instances), (columns.num_instances, len(ids))):
        is_new[start + np.unique(ids[start:stop], return_index=True)[1]] = True
    row_defects += [(row, _ID, "duplicate annotation id", "dropped", "") for row in np.flatnonzero(~is_new).tolist()]
    is_same_person = np.zeros(len(ids), np.bool_)
    is_same_person[columns.num_instances :] = np.isin(ids[columns.num_instances :], ids[: columns.num_instances])
    return ids, is_new, is_same_person


def _valid_rings(columns: ObjectColumns, row_defects: list[_RowDefect]) -> NDArray[np.bool_]:
    """Mark the rings that have only usable numbers."""
    valid = np.ones(len(columns.ring_rows), np.bool_)
    points, ends = np.frombuffer(columns.points, np.float32), _int64(columns.ring_ends)
    for start in range(0, len(points), _CHUNK):
        bad = np.flatnonzero(~(np.abs(points[start : start + _CHUNK]) <= MAX_COORD))
        valid[np.searchsorted(ends, start + bad, side="right")] = False
    for ring in np.flatnonzero(~valid).tolist():
        row_defects.append((columns.ring_rows[ring], _MASK, "polygon with unusable numbers", "part left out", ""))
    return valid


def _valid_rles(
    columns: ObjectColumns,
    images: ImageTable,
    image_index: NDArray[np.int64],
    known: NDArray[np.bool_],
    row_defects: list[_RowDefect],
) -> NDArray[np.bool_]:
    """Mark the RLE masks that have the size of their image."""
    rows = _int64(columns.rle_rows)
    valid = known[rows]
    index = image_index[rows[valid]]
    sizes = np.stack([images.heights[index], images.widths[index]], axis=1)
    fits = (_int64(columns.rle_sizes).reshape(-1, 2)[valid] == sizes).all(axis=1)
    for row in rows[valid][~fits].tolist():
        row_defects.append((row, _MASK, "bad run-length mask", "mask left out", ""))
    valid[np.flatnonzero(valid)[~fits]] = False
    return valid


def _valid_keypoints(
    columns: ObjectColumns,
    ids: NDArray[np.int64],
    is_same_person: NDArray[np.bool_],
    known: NDArray[np.bool_],
    num_points: NDArray[np.int64],
    row_defects: list[_RowDefect],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the sets of keypoints (M, K, 3) with at least one labelled point, and the row of each, ascending.

    Rows have `num_points` (rows,) by their class; sets of fewer than the largest are filled with unlabelled points.
    """
    count = int(num_points.max(initial=0))
    rows, edges = _int64(columns.keypoint_rows), np.append(0, _int64(columns.keypoint_ends))
    if not count or not len(rows):
        return np.zeros((0, count, 3), np.float32), np.zeros(0, np.int64)
    # The keypoints of a person in both files replace those in the row of the instances.
    order = np.argsort(ids[: columns.num_instances], kind="stable")
    of_file = is_same_person[rows]
    owner = rows.copy()
    owner[of_file] = order[np.searchsorted(ids[order], ids[rows[of_file]])]
    chosen = np.argsort(owner * 2 + ~of_file, kind="stable")  # the set of the keypoint file first
    chosen = chosen[np.unique(owner[chosen], return_index=True)[1]]
    chosen = chosen[known[owner[chosen]] & (num_points[owner[chosen]] > 0) & (np.diff(edges)[chosen] > 0)]

    values = np.frombuffer(columns.keypoints, np.float32)
    expected = 3 * num_points[owner[chosen]]
    valid = np.diff(edges)[chosen] == expected
    sets = np.zeros((len(chosen), 3 * count), np.float32)
    sets[valid[:, None] & (np.arange(3 * count) < expected[:, None])] = gather(values, edges, chosen[valid])
    valid &= (np.abs(sets) <= MAX_COORD).all(axis=1)
    for row, size in zip(owner[chosen[~valid]].tolist(), expected[~valid].tolist(), strict=True):
        row_defects.append((row, _KEYPOINTS, "bad keypoints", "left out", f"expected {size} numbers"))
    sets, owner = sets[valid].reshape(-1, count, 3), owner[chosen[valid]]
    sets[sets[..., 2] <= 0] = 0
    labelled = sets[..., 2].any(axis=1)
    return sets[labelled], owner[labelled]


def _boxes(
    columns: ObjectColumns,
    images: ImageTable,
    image_index: NDArray[np.int64],
    known: NDArray[np.bool_],
    rings: NDArray[np.bool_],
    keypoints: NDArray[np.float32],
    keypoint_rows: NDArray[np.int64],
    row_defects: list[_RowDefect],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return boxes (rows, 4) as x0, y0, x1, y1, NaN if the row cannot be used, and areas (rows,)."""
    xywh, written_areas = _float64(columns.boxes).reshape(-1, 4), _float64(columns.areas)
    boxes, areas = np.full(xywh.shape, np.nan, np.float32), np.zeros(len(xywh), np.float32)
    for start in range(0, len(xywh), _CHUNK):
        rows = start + np.flatnonzero(known[start : start + _CHUNK])
        index = image_index[rows]
        xyxy, codes = clip_boxes(xywh[rows], images.widths[index], images.heights[index])
        for i in np.flatnonzero(codes).tolist():
            row = int(rows[i])
            if not xywh[row].any():
                box = _rebuild_box(columns, row, images, int(index[i]), rings, keypoints, keypoint_rows)
                if box is not None:
                    xyxy[i] = box
                    row_defects.append((row, _BOX, "no box", "rebuilt from mask or keypoints", ""))
                    continue
            detail = columns.as_written.get((row, "bbox")) or f"[{', '.join(f'{v:.12g}' for v in xywh[row].tolist())}]"
            action = "dropped" if np.isnan(xyxy[i, 0]) else "clipped"
            row_defects.append((row, _BOX, str(BOX_DEFECTS[codes[i]]), action, detail))
        boxes[rows] = xyxy
        area = written_areas[rows]
        box_area = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
        areas[rows] = np.where((area > 0) & (area < MAX_COORD**2), area, box_area)
    return boxes, areas


def _rebuild_box(
    columns: ObjectColumns,
    row: int,
    images: ImageTable,
    index: int,
    rings: NDArray[np.bool_],
    keypoints: NDArray[np.float32],
    keypoint_rows: NDArray[np.int64],
) -> tuple[float, float, float, float] | None:
    """Return the box around the polygons or the labelled keypoints of a row, clipped to the image."""
    corners = list(_valid_rings_of(columns, row, rings))
    if not corners:
        low, high = np.searchsorted(keypoint_rows, (row, row + 1))
        corners = [points[points[:, 2] > 0, :2] for points in keypoints[low:high]]
    if not corners:
        return None
    points = np.concatenate(corners).astype(np.float64)
    low_xy, high_xy = points.min(axis=0), points.max(axis=0)
    xywh = (*low_xy.tolist(), *(high_xy - low_xy).tolist())
    return clip_box(xywh, int(images.widths[index]), int(images.heights[index]))[0]


def _valid_rings_of(columns: ObjectColumns, row: int, valid: NDArray[np.bool_]) -> Iterator[NDArray[np.float32]]:
    points = np.frombuffer(columns.points, np.float32).reshape(-1, 2)
    low, high = np.searchsorted(_int64(columns.ring_rows), (row, row + 1)).tolist()
    for ring in range(low, high):
        if valid[ring]:
            yield points[(columns.ring_ends[ring - 1] if ring else 0) // 2 : columns.ring_ends[ring] // 2]


def _entries_by_owner(
    rows: NDArray[np.int64], valid: NDArray[np.bool_], new_row: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for the valid entries of used rows, the new rows in ascending order, and the indices of the entries."""
    owner = np.where(valid & (rows >= 0), new_row[rows] if len(new_row) else -1, -1)
    entries = np.flatnonzero(owner >= 0)
    order = entries[np.argsort(owner[entries], kind="stable")]
    return owner[order], order


def _find_index(ids: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each id in `known`, which has no duplicates; -1 if it is not there."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    index = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
    return np.where(known[index] == ids, index, -1)


def _numbers(typecode: str, value: Any) -> array[float] | None:
    """Convert a list of numbers to an array, infinite where they do not fit; None if it is not such a list."""
    try:
        if type(value) is list:
            return array(typecode, value)
    except (TypeError, OverflowError):
        pass  # try numbers written as strings next
    try:
        flat = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return array(typecode, flat.tolist()) if flat.ndim == 1 else None


def _int64(values: array[int]) -> NDArray[np.int64]:
    return np.frombuffer(values, np.int64)


def _float64(values: array[float]) -> NDArray[np.float64]:
    return np.frombuffer(values, np.float64)
