"""Every pixel belongs to one object or region: panoptic quality and mean IoU of masks that were found one by one.

Masks may overlap. They become a map without overlap, the annotated ones and the found ones alike: things lie on stuff;
of two things, or two kinds of stuff, the one of the better score lies on top, of annotated ones the smaller. All stuff
of a class is one segment. A found segment of which less than half is left is dropped.

Where the classes name stuff, pixels that no annotation covers are void: they count for nothing. Where all classes are
things, such pixels are background, and what is found there is wrong. What is found in a crowd of its class is not.

Reference: Kirillov et al., Panoptic Segmentation, arXiv 1801.00868, and the code of COCO's panoptic challenge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_LEFT = 0.5  # share of a found mask that others must leave free
MIN_IOU = 0.5  # two segments match above it: so no segment has two matches
MAX_VOID = 0.5  # share of a found segment in void or in a crowd of its class above which it is not wrong

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """A mask of a class, in the order of rank: the first lies on top."""

    mask: Mask  # (H, W)
    class_id: int
    is_crowd: bool = False


class _Map(NamedTuple):
    """Segments without overlap."""

    numbers: NDArray[np.int64]  # (H, W) of each pixel's segment, -1 for none
    class_ids: list[int]  # of each segment


class PanopticQuality:
    """Sums over images, from which the scores follow."""

    def __init__(self, class_ids: Collection[int], stuff_ids: Collection[int]) -> None:
        """`stuff_ids` are those of `class_ids` that are stuff."""
        self.class_ids, self.stuff_ids = sorted(class_ids), frozenset(stuff_ids)
        self._index = {class_id: position for position, class_id in enumerate(self.class_ids)}
        size = len(self.class_ids)
        self._iou = np.zeros(size)
        self._right, self._missed, self._wrong = (np.zeros(size, np.int64) for _ in range(3))
        self._common, self._true_pixels, self._found_pixels = (np.zeros(size, np.int64) for _ in range(3))

    def add(self, truths: Sequence[Segment], found: Sequence[Segment]) -> None:
        """Take the annotated and the found segments of an image, the first of each on top."""
        if not truths and not found:
            return
        shape = (truths or found)[0].mask.shape
        true = self._flatten([s for s in truths if not s.is_crowd], shape, min_left=0.0)
        seen = self._flatten(found, shape, min_left=MIN_LEFT)
        unlabelled = true.numbers < 0
        crowds: dict[int, Mask] = {}  # by class
        for segment in truths:
            if segment.is_crowd:
                before = crowds.get(segment.class_id, np.zeros(shape, np.bool_))
                crowds[segment.class_id] = before | segment.mask & unlabelled
        in_crowds = np.logical_or.reduce([np.zeros(shape, np.bool_), *crowds.values()])
        void = unlabelled & ~in_crowds if self.stuff_ids else np.zeros(shape, np.bool_)
        self._count_pixels(true, seen, void | in_crowds)
        self._match(true, seen, void, crowds)

    def result(self) -> dict[str, float | None]:
        """Return PQ, its factors SQ and RQ, and the mean IoU, over the classes that occur; None if none does."""
        right, errors = self._right, (self._missed + self._wrong) / 2
        occurs = right + self._missed + self._wrong > 0
        quality = self._iou / np.maximum(right, 1)
        recognition = right / np.maximum(right + errors, 0.5)
        unions = self._true_pixels + self._found_pixels - self._common
        scores = {"PQ": _mean((quality * recognition)[occurs])}
        scores |= {"SQ": _mean(quality[right > 0]), "RQ": _mean(recognition[occurs])}
        if self.stuff_ids:
            is_stuff = np.array([class_id in self.stuff_ids for class_id in self.class_ids])
            scores["PQ_things"] = _mean((quality * recognition)[occurs & ~is_stuff])
            scores["PQ_stuff"] = _mean((quality * recognition)[occurs & is_stuff])
        return scores | {"mIoU": _mean((self._common / np.maximum(unions, 1))[unions > 0])}

    def _flatten(self, segments: Sequence[Segment], shape: tuple[int, ...], *, min_left: float) -> _Map:
        """Return segments, the first on top, without those of which others leave less than a share `min_left`."""
        numbers = np.full(shape, -1, np.int64)
        classes: list[int] = []
        stuff: dict[int, int] = {}  # class to the number of its segment
        for segment in sorted(segments, key=lambda each: each.class_id in self.stuff_ids):  # stable: keeps the ranks
            free = segment.mask & (numbers < 0)
            left, whole = np.count_nonzero(free), np.count_nonzero(segment.mask)
            is_stuff = segment.class_id in self.stuff_ids
            # Stuff is meant to lie behind things, so it may be covered.
            if not left or (not is_stuff and left < min_left * whole):
                continue
            number = stuff.get(segment.class_id, len(classes))
            if number == len(classes):
                classes.append(segment.class_id)
            if is_stuff:
                stuff[segment.class_id] = number
            numbers[free] = number
        return _Map(numbers, classes)

    def _count_pixels(self, true: _Map, found: _Map, ignored: Mask) -> None:
        none = len(self.class_ids)
        kept = ~ignored
        true_classes, found_classes = (  # of each pixel, by position; the number -1 is the last: none
            np.array([*(self._index[i] for i in each.class_ids), none])[each.numbers[kept]] for each in (true, found)
        )
        self._true_pixels += np.bincount(true_classes, minlength=none + 1)[:-1]
        self._found_pixels += np.bincount(found_classes, minlength=none + 1)[:-1]
        self._common += np.bincount(true_classes[true_classes == found_classes], minlength=none + 1)[:-1]

    def _match(self, true: _Map, found: _Map, void: Mask, crowds: Mapping[int, Mask]) -> None:
        true_map, true_classes = true
        found_map, found_classes = found
        table = np.zeros((len(true_classes) + 1, len(found_classes) + 1), np.int64)  # common pixels; the last is none
        np.add.at(table, (true_map.ravel(), found_map.ravel()), 1)
        true_areas, found_areas = table[:-1].sum(1), table[:, :-1].sum(0)
        in_void = np.bincount(found_map[void & (found_map >= 0)], minlength=len(found_classes))
        matched: set[int] = set()
        for i, class_id in enumerate(true_classes):
            for j in np.flatnonzero(table[i, :-1]).tolist():
                union = true_areas[i] + found_areas[j] - table[i, j] - in_void[j]
                iou = float(table[i, j] / union)
                if found_classes[j] == class_id and iou > MIN_IOU:
                    self._iou[self._index[class_id]] += iou
                    self._right[self._index[class_id]] += 1
                    matched.add(j)
                    break
            else:
                self._missed[self._index[class_id]] += 1
        for j, class_id in enumerate(found_classes):
            if j in matched:
                continue
            ignored = void | crowds[class_id] if class_id in crowds else void
            if np.count_nonzero(ignored & (found_map == j)) <= MAX_VOID * found_areas[j]:
                self._wrong[self._index[class_id]] += 1


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None
