"""Shared by the readers of all formats: table columns, defects, and the policies on boxes, labels and bad data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.types import Category

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
    "num_parts",  # polygons of the mask; 0 for an RLE and without a mask
    "num_keypoints",  # labelled keypoints
)
DEFECT_COLUMNS = ("image", "annotation_id", "defect", "action", "detail")
MAX_COORD = 1e7  # pixels; larger ones are errors
BOX_DEFECTS = (  # by the code from `clip_boxes`
    None,
    "box is not four numbers",
    "box is absurdly large",
    "box has no area",
    "box lies outside the image",
    "box reaches outside the image",
)
MAX_BAD_SHARE = 0.5  # of images and of annotations; a data set with more is refused
SKIPPED = "skipped in training, refused in evaluation"  # action for an image that proves unusable when read
MIN_BAD = 10  # fewer defects never stop a run: a user can read them all, and half of a small set is easily bad

Defect: TypeAlias = tuple[Any, Any, str, str, str]
"""Image id, annotation id (None for a defect of the image), defect, action and detail."""


@dataclass
class Defects:
    """The defects that a reader found, in the order found."""

    rows: list[Defect] = field(default_factory=list)

    def add(self, image: Any, annotation: Any, defect: str, action: str, detail: str = "") -> None:
        """Add a defect of an annotation, or of the image if `annotation` is None."""
        self.rows.append((image, annotation, defect, action, detail))


def defect_frame(rows: Sequence[Defect]) -> pd.DataFrame:
    """Return one row per defect, with `DEFECT_COLUMNS`; ids are kept unchanged, None included."""
    columns = zip(*rows, strict=True) if rows else [()] * len(DEFECT_COLUMNS)
    return pd.DataFrame(
        {name: pd.Series(list(column), dtype=object) for name, column in zip(DEFECT_COLUMNS, columns, strict=True)}
    )


def clip_box(
    xywh: Sequence[float], width: int, height: int
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """Return a box as x0, y0, x1, y1 inside the image, or None if it is unusable; and its defect, or None."""
    xyxy, codes = clip_boxes(np.array([xywh], np.float64), np.array([width]), np.array([height]))
    defect = BOX_DEFECTS[codes[0]]
    if np.isnan(xyxy[0, 0]):
        return None, defect
    x0, y0, x1, y1 = xyxy[0].tolist()
    return (x0, y0, x1, y1), defect


def clip_boxes(
    xywh: NDArray[np.float64], widths: NDArray[np.integer], heights: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Return boxes (N, 4) as x0, y0, x1, y1 inside images of the given sizes (N,), and the defect of each (N,).

    An unusable box becomes NaN; a defect is an index into `BOX_DEFECTS`. NaN in an input box means that
    it was not four numbers.
    """
    codes = np.zeros(len(xywh), np.int8)
    codes[~(np.abs(xywh) <= MAX_COORD).all(axis=1)] = 2
    codes[~np.isfinite(xywh).all(axis=1)] = 1
    corners = np.where(codes[:, None] > 0, 0.0, xywh)
    codes[(codes == 0) & (corners[:, 2:] <= 0).any(axis=1)] = 3
    corners[:, 2:] += corners[:, :2]
    limits = np.stack([widths, heights], axis=1).astype(np.float64)
    xyxy = np.concatenate([np.maximum(corners[:, :2], 0.0), np.minimum(corners[:, 2:], limits)], axis=1)
    codes[(codes == 0) & (xyxy[:, 2:] <= xyxy[:, :2]).any(axis=1)] = 4
    # Boxes are stored in single precision, in which the sides of a very narrow one coincide.
    single = xyxy.astype(np.float32)
    codes[(codes == 0) & (single[:, 2:] <= single[:, :2]).any(axis=1)] = 3
    # Annotations are rounded to hundredths of a pixel, so a small overhang is not a defect.
    codes[(codes == 0) & (np.abs(xyxy - corners) > 0.5).any(axis=1)] = 5
    xyxy[(codes > 0) & (codes < 5)] = np.nan
    return xyxy, codes


class BadShareError(InputError):
    """Too much of a data set is unusable."""


def refuse_bad_share(what: str, defects: Sequence[Defect], total: int, *, where: Path, max_bad_share: float) -> None:
    """Raise `BadShareError` with the first ten bad entries if too many of `total` images or annotations are bad.

    Too many is at least `MIN_BAD`, and more than the share `max_bad_share` (0 to 1), of those listed in `where`.
    """
    dropped = [row for row in defects if row[3] in ("dropped", SKIPPED)]
    if len(dropped) < MIN_BAD or len(dropped) <= max_bad_share * total:
        return
    first_ten = "; ".join(f"{describe(row[0], row[1])}: {row[2]}" for row in dropped[:10])
    raise BadShareError(
        f"{len(dropped)} of {total} {what} in {where} cannot be used, more than the allowed share of "
        f"{max_bad_share:g}; repair them (pix2seq data check lists all). The first ten: {first_ten}"
    )


def describe(image: Any, annotation: Any) -> str:
    """Name an annotation, or an image if `annotation` is None, by the ids in the data set."""
    return f"image {image}" + ("" if annotation is None else f" annotation {annotation}")


def label_categories(categories: Sequence[Category]) -> tuple[Category, ...]:
    """Return categories in the order of their ids, with labels.

    If all ids lie in 1 to 899, they are the labels, as in the official numbering of COCO; otherwise
    labels count from 1 in the order of the ids.
    """
    ordered = sorted(categories, key=lambda category: category.id)
    ids_are_labels = all(1 <= category.id <= 899 for category in ordered)
    return tuple(
        replace(category, label=category.id if ids_are_labels else position)
        for position, category in enumerate(ordered, start=1)
    )
