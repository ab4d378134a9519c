"""What readers of all formats share: the columns of their tables, defects, and the policies on boxes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    "num_parts",  # polygons of the mask; 0 for RLE and for none
    "num_keypoints",  # labelled ones
)
DEFECT_COLUMNS = ("image", "annotation_id", "defect", "action", "detail")
HUGE = 1e7  # pixels; no coordinate of an image is larger
BOX_DEFECTS = (  # by the code that `clip_boxes` gives
    None,
    "box is not four numbers",
    "box is absurdly large",
    "box has no area",
    "box lies outside the image",
    "box reaches outside the image",
)
MAX_BAD_SHARE = 0.5  # of images and of annotations; beyond it the data are not what they seem
SKIPPED = "skipped in training, refused in evaluation"  # what is done about an image that proves unusable when read
MIN_OFFENDERS = 10  # fewer never stop a run: so many can be read one by one, and a small set is soon half bad


Defect: TypeAlias = tuple[Any, Any, str, str, str]
"""Image id, annotation id or None for a whole image, what is wrong, what was done about it, and a detail."""


@dataclass
class Defects:
    """Everything wrong that a reader met, in the order it met it."""

    rows: list[Defect] = field(default_factory=list)

    def add(self, image: Any, annotation: Any, defect: str, action: str, detail: str = "") -> None:
        """Note one defect of an annotation, or of a whole image where `annotation` is None."""
        self.rows.append((image, annotation, defect, action, detail))

    def frame(self) -> pd.DataFrame:
        """A row per defect."""
        return defect_frame(self.rows)


def defect_frame(rows: Sequence[Defect]) -> pd.DataFrame:
    """A row per defect, with `DEFECT_COLUMNS`; ids stay what they are, None included."""
    columns = zip(*rows, strict=True) if rows else [()] * len(DEFECT_COLUMNS)
    return pd.DataFrame(
        {name: pd.Series(list(column), dtype=object) for name, column in zip(DEFECT_COLUMNS, columns, strict=True)}
    )


def clip_box(
    xywh: Sequence[float], width: int, height: int
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """A box as x0, y0, x1, y1 inside the image, or None if it cannot be used; and its defect, or None."""
    xyxy, codes = clip_boxes(np.array([xywh], np.float64), np.array([width]), np.array([height]))
    defect = BOX_DEFECTS[codes[0]]
    if np.isnan(xyxy[0, 0]):
        return None, defect
    x0, y0, x1, y1 = xyxy[0].tolist()
    return (x0, y0, x1, y1), defect


def clip_boxes(
    xywh: NDArray[np.float64], widths: NDArray[np.integer], heights: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Boxes (N, 4) as x0, y0, x1, y1 inside images of such sizes (N,), and the defect of each (N,).

    A box that cannot be used is NaN; a defect is an index into `BOX_DEFECTS`. NaN in a box says that
    it is not four numbers.
    """
    codes = np.zeros(len(xywh), np.int8)
    codes[~(np.abs(xywh) <= HUGE).all(axis=1)] = 2
    codes[~np.isfinite(xywh).all(axis=1)] = 1
    corners = np.where(codes[:, None] > 0, 0.0, xywh)
    codes[(codes == 0) & (corners[:, 2:] <= 0).any(axis=1)] = 3
    corners[:, 2:] += corners[:, :2]
    limits = np.stack([widths, heights], axis=1).astype(np.float64)
    xyxy = np.concatenate([np.maximum(corners[:, :2], 0.0), np.minimum(corners[:, 2:], limits)], axis=1)
    codes[(codes == 0) & (xyxy[:, 2:] <= xyxy[:, :2]).any(axis=1)] = 4
    # In single precision, as boxes are kept, the sides of a very narrow one coincide.
    single = xyxy.astype(np.float32)
    codes[(codes == 0) & (single[:, 2:] <= single[:, :2]).any(axis=1)] = 3
    # Annotations are rounded to hundredths of a pixel; so small an overhang is no defect.
    codes[(codes == 0) & (np.abs(xyxy - corners) > 0.5).any(axis=1)] = 5
    xyxy[(codes > 0) & (codes < 5)] = np.nan
    return xyxy, codes


class BadShareError(InputError):
    """Too much of a data set cannot be used."""


def refuse_bad_share(what: str, defects: Sequence[Defect], total: int, *, where: Path, max_bad_share: float) -> None:
    """Raise `BadShareError` with the first ten offenders if too many of `total` images or annotations cannot be used.

    That is more than the share `max_bad_share` (0 to 1), and at least `MIN_OFFENDERS`, of what `where` lists.
    """
    dropped = [row for row in defects if row[3] in ("dropped", SKIPPED)]
    if len(dropped) < MIN_OFFENDERS or len(dropped) <= max_bad_share * total:
        return
    offenders = "; ".join(f"{describe(row[0], row[1])}: {row[2]}" for row in dropped[:10])
    raise BadShareError(
        f"{len(dropped)} of {total} {what} in {where} cannot be used, and at most a share of {max_bad_share:g} may be "
        f"bad; repair them (pix2seq data check lists all). The first ten: {offenders}"
    )


def describe(image: Any, annotation: Any) -> str:
    """Name an annotation, or an image where `annotation` is None, by the ids in the data set."""
    return f"image {image}" + ("" if annotation is None else f" annotation {annotation}")


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
