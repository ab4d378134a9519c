"""The table of annotations that every reader fills, and what is done about each defect.

A reader collects rows and defects; `checked` applies the policies that all formats share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pix2seq.data.target import Category

OBJECT_COLUMNS = (
    "image_id",
    "annotation_id",
    "category_id",
    "category",
    "x",
    "y",
    "width",
    "height",
    "area",
    "iscrowd",
    "num_parts",  # polygons of the mask; 0 for RLE and for none
    "num_keypoints",  # labelled ones
)
DEFECT_COLUMNS = ("image", "annotation_id", "defect", "action", "detail")
HUGE = 1e7  # pixels; no coordinate of a picture is larger


@dataclass
class Defects:
    """Everything wrong that a reader met, in the order it met it."""

    rows: list[tuple[Any, Any, str, str, str]] = field(default_factory=list)

    def add(self, image: Any, annotation: Any, defect: str, action: str, detail: str = "") -> None:
        """Note one defect of an annotation, or of a whole image where `annotation` is None."""
        self.rows.append((image, annotation, defect, action, detail))

    def frame(self) -> pd.DataFrame:
        """A row per defect."""
        return pd.DataFrame(self.rows, columns=list(DEFECT_COLUMNS))


def clip_box(
    xywh: Sequence[float], width: int, height: int
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """A box as x0, y0, x1, y1 inside the picture, or None if it cannot be used; and its defect, or None."""
    values = np.asarray(xywh, np.float64)
    if values.shape != (4,) or not np.isfinite(values).all():
        return None, "box is not four numbers"
    if np.abs(values).max() > HUGE:
        return None, "box is absurdly large"
    x, y, w, h = values.tolist()
    if w <= 0 or h <= 0:
        return None, "box has no area"
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0:
        return None, "box lies outside the picture"
    # Annotations are rounded to hundredths of a pixel; so small an overhang is no defect.
    overhang = max(x0 - x, y0 - y, x + w - x1, y + h - y1)
    return (x0, y0, x1, y1), "box reaches outside the picture" if overhang > 0.5 else None


def label_categories(
    categories: Sequence[tuple[int, str, tuple[str, ...], tuple[tuple[int, int], ...]]],
) -> tuple[Category, ...]:
    """Categories as id, name, keypoints, skeleton, with labels.

    Ids of 1 to 899 are taken as labels, which is the official numbering of COCO; otherwise labels
    count from 1 in the order of the ids.
    """
    ordered = sorted(categories)
    ids = [entry[0] for entry in ordered]
    own_ids = all(1 <= category_id <= 899 for category_id in ids)
    return tuple(
        Category(category_id if own_ids else position, category_id, name, keypoints, skeleton)
        for position, (category_id, name, keypoints, skeleton) in enumerate(ordered, start=1)
    )
