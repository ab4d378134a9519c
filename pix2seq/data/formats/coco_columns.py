"""Flat arrays from annotations: first as written, then checked all at once.

Readers of all formats add their entries in the form of COCO's JSON. The files are not kept as Python objects, and
official files list their categories last. So each entry goes into columns before images and categories are known;
`link` then finds these by the ids of their own file, and `check_objects` and `check_captions` apply the policies
of `pix2seq.data.check`. A row is the index of an entry in its columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations, ImageTable, box_annotations, entries_by_owner, gather, offsets
from pix2seq.data.defects import BOX_DEFECTS, MAX_COORD, Defect, clip_box, clip_boxes
from pix2seq.errors import InputError
from pix2seq.geometry.polygons import ring_area, run_lengths
from pix2seq.types import ATTRIBUTES, Category

NO_ID = -(2**63)  # in a column of ids: neither a whole number of 64 bits nor text
UNKNOWN, LEFT_OUT = -1, -2  # in place of an index: nothing has this id; an image that was dropped has it
_FIRST_OF_TEXT = -(2**62)  # the number of the first id that is text; those after it are less
_DIFFICULT = 2  # in the column `iscrowd`
_LONGEST_NUMBER = 25  # characters of a number written as text
_FLAGS = (
    {"": False} | dict.fromkeys(("0", "false", "no", "0.0"), False) | dict.fromkeys(("1", "true", "yes", "1.0"), True)
)
_CHUNK = 1 << 20  # rows or numbers at a time, to keep temporary arrays small

_RowDefect = tuple[int, int, str, str, str]  # row, order, defect, action, detail

# The order of the defects of an annotation.
_ENTRY, _ID, _OWNER, _FLAG, _MASK, _KEYPOINTS, _BOX = range(7)


def whole_number(value: Any) -> int | None:
    """Return a value as int if it is a whole number of 64 bits, also one written as 7.0 or "7"; else None."""
    if isinstance(value, str) and len(value) < _LONGEST_NUMBER:
        try:
            value = float(value) if "." in value else int(value)
        except ValueError:
            return None
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and NO_ID < value < 2**63 else None


def flag(value: Any) -> bool | None:
    """Return a yes or no as JSON and XML have it, also in words or as text; None if it is neither."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if type(value) in (bool, int, float) and value in (0, 1) else False if value is None else None


class Ids:
    """Whole numbers for the ids of a data set: a number is itself, any other text gets a negative one of its own."""

    def __init__(self) -> None:
        self._of_text: dict[str, int] = {}

    def __call__(self, value: Any) -> int | None:
        """Return the number of an id; None if it is neither a whole number nor text."""
        number = whole_number(value)
        if number is None and isinstance(value, str) and value.strip():
            return self._of_text.setdefault(value.strip(), _FIRST_OF_TEXT - len(self._of_text))
        return number


class ObjectColumns:
    """Boxes, masks and keypoints as written: `instances` first, then `person_keypoints`."""

    def __init__(self, ids: Ids) -> None:
        self.number = ids
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.image_index = np.zeros(0, np.int64)  # of the rows linked so far; UNKNOWN or LEFT_OUT if there is no image
        self.category_index = np.zeros(0, np.int64)  # of the same rows; UNKNOWN if there is no category
        self.boxes = array("d")  # x, y, width, height; all 0 if missing, NaN if not four numbers
        self.areas = array("d")  # 0 if missing
        self.iscrowd = bytearray()  # 1 for a crowd, 2 for a difficult object
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
        """Append an entry of a list of annotations; `position` describes it if it is not an object.

        Besides COCO's keys, `difficult` marks what VOC calls so.
        """
        row = len(self.ids)
        if not isinstance(entry, dict):
            self.num_no_object += 1
            self.defects.append((row, _ENTRY, "annotation is no object", "dropped", position))
            return
        for column, name in ((self.ids, "id"), (self.image_ids, "image_id"), (self.category_ids, "category_id")):
            value = entry.get(name)
            number = self.number(value)
            if number is None or number <= _FIRST_OF_TEXT:
                self.as_written[row, name] = str(value)[:80]
            column.append(NO_ID if number is None else number)
        self._add_box(row, entry.get("bbox"))
        self.areas.append(_area(entry.get("area")))
        self.iscrowd.append(self._flags(row, entry))
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

    def link(self, images: Mapping[int, int], categories: Mapping[int, int]) -> None:
        """Find image and category of all rows since the last call, by the ids in the file that the rows are from."""
        start = len(self.image_index)
        self.image_index = np.append(self.image_index, _linked(self.image_ids, start, images))
        self.category_index = np.append(self.category_index, _linked(self.category_ids, start, categories))

    def _flags(self, row: int, entry: dict[str, Any]) -> int:
        flags = []
        for name in ("iscrowd", "difficult"):
            value = flag(entry.get(name))
            if value is None:
                self.defects.append((row, _FLAG, f"{name} is neither 0 nor 1", "read as 0", str(entry[name])[:80]))
            flags.append(bool(value))
        return _DIFFICULT if flags[1] else int(flags[0])

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

    def __init__(self, ids: Ids) -> None:
        self.number = ids
        self.image_index = np.zeros(0, np.int64)  # as in `ObjectColumns`
        self.image_ids, self.ends, self.texts = array("q"), array("q"), bytearray()
        self.as_written: dict[int, str] = {}  # image ids that do not fit a column
        self.annotation_ids = array("q")

    def __len__(self) -> int:
        return len(self.image_ids)

    def add(self, entry: Any) -> None:
        """Append an entry of a list of captions."""
        fields = entry if isinstance(entry, dict) else {}
        image_id, annotation_id = self.number(fields.get("image_id")), whole_number(fields.get("id"))
        if image_id is None or image_id <= _FIRST_OF_TEXT:
            self.as_written[len(self)] = str(fields.get("image_id"))[:80]
        self.image_ids.append(NO_ID if image_id is None else image_id)
        self.annotation_ids.append(NO_ID if annotation_id is None else annotation_id)
        text = fields.get("caption")
        # JSON can hold half a surrogate pair, which UTF-8 cannot encode.
        self.texts += " ".join(text.split()).encode("utf-8", "replace") if isinstance(text, str) else b""
        self.ends.append(len(self.texts))

    def link(self, images: Mapping[int, int]) -> None:
        """Find the image of all rows since the last call, by the ids in the file that the rows are from."""
        start = len(self.image_index)
        self.image_index = np.append(self.image_index, _linked(self.image_ids, start, images))


def check_objects(
    columns: ObjectColumns, images: ImageTable, categories: Sequence[Category], *, where: Path
) -> tuple[Annotations, list[Defect], int]:
    """Return the usable annotations (without captions), the defects, and the number of annotations read.

    All rows must be linked, to indices in `images` and `categories`. Annotations of an image that was LEFT_OUT are not
    used; this does not count as a defect. Raises `InputError`, which names `where` they are from, if most boxes are
    shares of their images.
    """
    row_defects = list(columns.defects)
    image_index, category_index = columns.image_index, columns.category_index
    ids, is_new = _identities(columns, row_defects)
    partners = _partners(columns, ids)
    fresh = is_new & (partners < 0)
    image_ids, category_ids = _int64(columns.image_ids), _int64(columns.category_ids)

    def written(row: int, name: str, column: NDArray[np.int64]) -> str:
        return columns.as_written.get((row, name)) or str(column[row])

    for row in np.flatnonzero(fresh & (image_index == UNKNOWN)).tolist():
        row_defects.append((row, _OWNER, "unknown image id", "dropped", ""))
    for row in np.flatnonzero(fresh & (image_index >= 0) & (category_index < 0)).tolist():
        row_defects.append((row, _OWNER, "unknown category id", "dropped", written(row, "category_id", category_ids)))
    known = fresh & (image_index >= 0) & (category_index >= 0)
    _refuse_shares(_float64(columns.boxes).reshape(-1, 4)[known], where)

    rings = _valid_rings(columns, row_defects)
    rles = _valid_rles(columns, images, image_index, known, row_defects)
    keypoints, keypoint_rows = _valid_keypoints(columns, partners, known, categories, row_defects)
    boxes, areas = _boxes(columns, images, image_index, known, rings, rles, keypoints, keypoint_rows, row_defects)
    columns.boxes = array("d")  # free the largest column of a data set of boxes

    used = np.flatnonzero(~np.isnan(boxes[:, 0]))
    used = used[np.argsort(image_index[used], kind="stable")]
    new_row = np.full(len(columns), -1, np.int64)
    new_row[used] = np.arange(len(used))
    labels = np.array([category.label for category in categories], np.int32)
    ring_owner, ring_order = entries_by_owner(_int64(columns.ring_rows), rings, new_row)
    rle_owner, rle_order = entries_by_owner(_int64(columns.rle_rows), rles, new_row)
    keypoint_owner, keypoint_order = entries_by_owner(keypoint_rows, np.ones(len(keypoint_rows), np.bool_), new_row)
    described = _int64(columns.attribute_rows)
    attribute_owner, attribute_order = entries_by_owner(described, np.ones(len(described), np.bool_), new_row)
    ring_edges, rle_edges = (np.append(0, _int64(ends)) for ends in (columns.ring_ends, columns.rle_ends))
    points = np.frombuffer(columns.points, np.float32).reshape(-1, 2)
    flags = np.frombuffer(columns.iscrowd, np.uint8)[used]
    annotations = box_annotations(
        first=np.searchsorted(image_index[used], np.arange(len(images) + 1)).astype(np.int64),
        boxes_xyxy=boxes[used],
        labels=labels[category_index[used]],
        areas=areas[used],
        iscrowd=flags > 0,
        ids=_unique(ids[used], columns.num_instances, used),
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
        difficult=np.flatnonzero(flags == _DIFFICULT),
    )
    row_defects.sort(key=lambda defect: defect[:2])
    defects: list[Defect] = []
    for row, order, defect, action, detail in row_defects:
        if order == _ENTRY and defect == "annotation is no object":
            defects.append((None, None, defect, action, detail))
        elif order <= _OWNER or known[row]:
            image_id = columns.as_written.get((row, "image_id")) or int(image_ids[row])
            annotation_id = columns.as_written.get((row, "id")) if is_new[row] and ids[row] <= _FIRST_OF_TEXT else None
            defects.append((image_id, annotation_id or int(ids[row]), defect, action, detail))
    return annotations, defects, len(columns) + columns.num_no_object - int((partners >= 0).sum())


def check_captions(columns: CaptionColumns, images: ImageTable) -> tuple[dict[str, Any], list[Defect]]:
    """Return the caption fields of `Annotations`, and the defects. All rows must be linked."""
    image_ids, annotation_ids = _int64(columns.image_ids), _int64(columns.annotation_ids)
    image_index = columns.image_index
    edges = np.append(0, _int64(columns.ends))
    sizes = np.diff(edges)
    defects: list[Defect] = []
    for row in np.flatnonzero((image_index == UNKNOWN) | ((image_index >= 0) & (sizes == 0))).tolist():
        image_id, number = int(image_ids[row]), int(annotation_ids[row])
        defect = "unknown image id" if image_index[row] < 0 else "empty caption"
        named = columns.as_written.get(row) or image_id
        defects.append((named, None if number == NO_ID else number, defect, "dropped", ""))
    owner, order = entries_by_owner(image_index, sizes > 0, np.arange(len(images), dtype=np.int64))
    fields = {
        "caption_owner": owner,
        "first_char": offsets(sizes[order]),
        "captions": gather(np.frombuffer(columns.texts, np.uint8), edges, order),
    }
    return fields, defects


def _identities(columns: ObjectColumns, row_defects: list[_RowDefect]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each row's id, and whether it is the first in its file with that id."""
    ids = _int64(columns.ids).copy()
    unnamed = np.flatnonzero(ids == NO_ID)
    below = min(int(ids[ids > _FIRST_OF_TEXT].min(initial=0)), 0)
    ids[unnamed] = below - 1 - np.arange(len(unnamed))
    row_defects += [(row, _ENTRY, "no annotation id", "one was given", "") for row in unnamed.tolist()]
    is_new = np.zeros(len(ids), np.bool_)
    for start, stop in ((0, columns.num_instances), (columns.num_instances, len(ids))):
        is_new[start + np.unique(ids[start:stop], return_index=True)[1]] = True
    row_defects += [(row, _ID, "duplicate annotation id", "dropped", "") for row in np.flatnonzero(~is_new).tolist()]
    return ids, is_new


def _partners(columns: ObjectColumns, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each row of person_keypoints the row of the same object among the instances, or -1; for others -1.

    Same means: the same image and class, and the same box to a pixel. Each file may number its annotations for itself,
    so an equal id only goes first, and counts for a box that is missing.
    """
    num, partners = columns.num_instances, np.full(len(ids), -1, np.int64)
    boxes = _float64(columns.boxes).reshape(-1, 4)
    owners = np.stack([columns.image_index, columns.category_index], axis=1)

    def same(rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (owners[rows] == owners[others]).all(axis=1) & (np.abs(boxes[rows] - boxes[others]) <= 1).all(axis=1)

    rows = np.arange(num, len(ids))
    by_id = _find_index(ids[rows], ids[:num])
    rows, others = rows[by_id >= 0], by_id[by_id >= 0]
    is_missing = (owners[rows] == owners[others]).all(axis=1) & ~boxes[rows].any(axis=1)
    matched = same(rows, others) | is_missing
    partners[rows[matched]] = others[matched]

    free: dict[tuple[int, ...], list[int]] = {}
    rest = num + np.flatnonzero((partners[num:] < 0) & (owners[num:] >= 0).all(axis=1))
    wanted = {tuple(owner) for owner in owners[rest].tolist()}
    taken = set(partners[num:].tolist())
    for row, owner in enumerate(map(tuple, owners[:num].tolist())) if wanted else ():
        if owner in wanted and row not in taken:
            free.setdefault(owner, []).append(row)
    for row in rest.tolist():
        candidates = np.array(free.get(tuple(owners[row].tolist()), ()), np.int64)
        found = candidates[same(np.full(len(candidates), row), candidates)]
        if len(found) and boxes[row].any():
            partners[row] = found[0]
            free[tuple(owners[row].tolist())].remove(int(found[0]))
    return partners


def _unique(ids: NDArray[np.int64], num_instances: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give new ids to the objects of person_keypoints whose ids other objects have among the instances."""
    again = (rows >= num_instances) & np.isin(ids, ids[rows < num_instances])
    return np.where(again, ids.max(initial=0) + np.cumsum(again), ids)


def _refuse_shares(xywh: NDArray[np.float64], where: Path) -> None:
    """Raise `InputError` if most boxes (N, 4) are shares of their images, 0 to 1, in place of pixels."""
    boxes = xywh[(xywh[:, 2:] > 0).all(axis=1)]
    shares = boxes[((boxes >= 0) & (boxes <= 1)).all(axis=1)]
    if len(shares) > len(boxes) / 2:
        example = ", ".join(f"{value:g}" for value in shares[0])
        raise InputError(
            f"{where}: {len(shares)} of {len(boxes)} boxes are normalised, shares of the image from 0 to 1 (the first "
            f"is {example}); expected pixels: multiply x and width by the image's width, y and height by its height"
        )


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
    partners: NDArray[np.int64],
    known: NDArray[np.bool_],
    categories: Sequence[Category],
    row_defects: list[_RowDefect],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the sets of keypoints (M, K, 3) with at least one labelled point, and the row of each, ascending.

    K is the most points of a class; classes with fewer have zeros in the last rows.
    """
    counts = np.array([len(category.keypoints) for category in categories], np.int64)
    most = int(counts.max(initial=0))
    rows, edges = _int64(columns.keypoint_rows), np.append(0, _int64(columns.keypoint_ends))
    if not most or not len(rows):
        return np.zeros((0, most, 3), np.float32), np.zeros(0, np.int64)
    # The keypoints of an object in both files replace those in the row of the instances.
    of_file = partners[rows] >= 0
    owner = np.where(of_file, partners[rows], rows)
    chosen = np.argsort(owner * 2 + ~of_file, kind="stable")  # the set of the keypoint file first
    chosen = chosen[np.unique(owner[chosen], return_index=True)[1]]
    sizes = np.diff(edges)
    chosen = chosen[known[owner[chosen]] & (sizes[chosen] > 0)]

    expected = 3 * counts[columns.category_index[owner[chosen]]]
    values = np.frombuffer(columns.keypoints, np.float32)
    # Some tools write zeros for the classes without keypoints too.
    needless = [not values[edges[i] : edges[i + 1]].any() for i in chosen[expected == 0].tolist()]
    keep = np.ones(len(chosen), np.bool_)
    keep[np.flatnonzero(expected == 0)[needless]] = False
    chosen, expected = chosen[keep], expected[keep]

    valid = sizes[chosen] == expected
    sets = np.zeros((len(chosen), 3 * most), np.float32)
    sets[valid[:, None] & (np.arange(3 * most) < expected[:, None])] = gather(values, edges, chosen[valid])
    valid &= (np.abs(sets) <= MAX_COORD).all(axis=1)
    for row, size in zip(owner[chosen[~valid]].tolist(), expected[~valid].tolist(), strict=True):
        row_defects.append((row, _KEYPOINTS, "bad keypoints", "left out", f"expected {size} numbers"))
    sets, owner = sets[valid].reshape(-1, most, 3), owner[chosen[valid]]
    sets[sets[..., 2] <= 0] = 0
    labelled = sets[..., 2].any(axis=1)
    return sets[labelled], owner[labelled]


def _boxes(
    columns: ObjectColumns,
    images: ImageTable,
    image_index: NDArray[np.int64],
    known: NDArray[np.bool_],
    rings: NDArray[np.bool_],
    rles: NDArray[np.bool_],
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
        areas[rows] = written_areas[rows]
    mask_areas = _mask_areas(columns, rings, rles, np.flatnonzero(known & (areas <= 0)))
    areas = np.where(areas > 0, areas, mask_areas)
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes, np.where(areas > 0, areas, box_areas)


def _mask_areas(
    columns: ObjectColumns, rings: NDArray[np.bool_], rles: NDArray[np.bool_], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the area of the mask of each of some rows, 0 without a valid one; 0 for other rows (all rows,)."""
    areas = np.zeros(len(columns), np.float32)
    for row in rows.tolist():
        areas[row] = sum(abs(ring_area(ring)) for ring in _valid_rings_of(columns, row, rings))
        low, high = np.searchsorted(_int64(columns.rle_rows), (row, row + 1)).tolist()
        if low < high and rles[low]:
            counts = bytes(columns.rle_counts[columns.rle_ends[low - 1] if low else 0 : columns.rle_ends[low]])
            lengths = (
                np.frombuffer(counts, np.int32) if columns.rle_is_list[low] else run_lengths(counts.decode("ascii"))
            )
            assert lengths is not None  # it was read once
            areas[row] = lengths[1::2].sum()
    return areas


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


def _find_index(ids: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each id in `known`, which has no duplicates; -1 if it is not there."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    index = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
    return np.where(known[index] == ids, index, -1)


def _linked(ids: array[int], start: int, index: Mapping[int, int]) -> NDArray[np.int64]:
    """Return what `index` gives for each id from row `start` on, UNKNOWN where it has no such id."""
    position = _find_index(_int64(ids)[start:], np.fromiter(index, np.int64, len(index)))
    return np.append(np.fromiter(index.values(), np.int64, len(index)), UNKNOWN)[position]


def _area(value: Any) -> float:
    """Return an area in square pixels as written, 0 if it is not usable."""
    try:
        area = float(value) if type(value) in (int, float, str) else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return area if 0 < area < MAX_COORD**2 else 0.0


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
