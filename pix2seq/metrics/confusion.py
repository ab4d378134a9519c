"""Which classes are taken for which: objects and detections matched by IoU alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

MIN_IOU = 0.5
_IOU: Any = mask_utils.iou  # takes more than its stubs say


@dataclass(frozen=True)
class Confusion:
    """Counts of objects by their class (rows) and the class of the detection that overlaps them (columns).

    The last row holds detections of nothing, the last column objects that no detection overlaps.
    """

    names: tuple[str, ...]  # of the C classes
    counts: NDArray[np.int64]  # (C + 1, C + 1)
    threshold: float | None  # least score of the detections that count; None: there is none

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"names": list(self.names), "counts": self.counts.tolist(), "threshold": self.threshold}


def confusion(
    annotations: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    threshold: float | None,
) -> Confusion:
    """Match boxes in COCO's form, whatever their classes; class k of `names` has the id k + 1.

    The pair of the largest IoU of an image comes first, then the next of those left, down to an IoU of 0.5. Crowds,
    and detections that lie in one, do not count; nor do objects of an area that COCO ignores, and what finds them.
    """
    nothing = len(names)
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    likely = [each for each in detections if threshold is not None and each["score"] >= threshold]
    truths_of, found_of = _by_image(annotations), _by_image(likely)
    for image_id in truths_of.keys() | found_of.keys():
        truths, found = truths_of.get(image_id, []), found_of.get(image_id, [])
        is_ignored = np.array([bool(each["iscrowd"] or each["area"] > MAX_AREA) for each in truths], np.bool_)
        is_crowd = [int(each["iscrowd"]) for each in truths]
        overlaps = np.zeros((len(found), len(truths)))
        if truths and found:
            overlaps = _IOU([each["bbox"] for each in found], [each["bbox"] for each in truths], is_crowd)
        rows = dict.fromkeys(range(len(truths)), nothing)
        columns = dict.fromkeys(range(len(found)), nothing)
        # Counted objects first, so that an ignored one takes only what is left.
        for left_out in (False, True):
            chosen = np.where(is_ignored == left_out, overlaps, 0.0)
            for flat in np.argsort(-chosen, axis=None, kind="stable"):
                i, j = np.unravel_index(flat, chosen.shape)
                if chosen[i, j] < MIN_IOU:
                    break
                if int(i) in columns and (int(j) in rows or is_crowd[j]):
                    if not left_out:
                        counts[truths[j]["category_id"] - 1, found[i]["category_id"] - 1] += 1
                    rows.pop(int(j), None)
                    del columns[int(i)]
        for j in rows:
            if not is_ignored[j]:
                counts[truths[j]["category_id"] - 1, nothing] += 1
        for i in columns:
            counts[nothing, found[i]["category_id"] - 1] += 1
    return Confusion(tuple(names), counts, threshold)


MAX_AREA = 1e10  # larger objects are ignored


def _by_image(entries: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["image_id"], []).append(entry)
    return found
