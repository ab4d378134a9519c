"""The objects that were found in an image, as a list that converts to what other libraries take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.geometry.polygons import rasterize, rle_to_mask
from pix2seq.types import Instance

if TYPE_CHECKING:
    from pandas import DataFrame
COLUMNS = (
    *("x0", "y0", "x1", "y1", "category_id", "category", "score"),
    *("mask_score", "keypoint_score", "polygons", "keypoints"),
)


class Instances(list[Instance]):
    """Objects of one image of `size` (width, height), best first.

    Slices and comprehensions give plain lists; `Instances(some, size=found.size)` converts those too.
    """

    def __init__(self, instances: Iterable[Instance] = (), *, size: tuple[int, int]) -> None:
        super().__init__(instances)
        self.size = size

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return entries of COCO's format for results, as `pycocotools.coco.COCO.loadRes` takes them.

        `bbox` is x, y, width, height in pixels. A mask is a run-length encoding where there is one, else polygons.
        """
        return [
            {"image_id": image_id}
            | {key: value for key, value in instance.to_json().items() if value != []}
            | ({} if instance.rle is None else {"segmentation": _json_rle(instance.rle)})
            for instance in self
        ]

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with masks (N, H, W) if any object has one. Class ids are the data set's.

        Raises `InputError` if supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise InputError(f"supervision cannot be imported ({error}); run pip install supervision") from None
        has_masks = any(instance.polygons or instance.rle for instance in self)
        return Detections(
            xyxy=np.array([instance.box_xyxy for instance in self], np.float32).reshape(-1, 4),
            mask=np.stack([mask_of(instance, self.size) for instance in self]) if has_masks else None,
            confidence=np.array([instance.score for instance in self], np.float32),
            class_id=np.array([instance.category.id for instance in self], int),
            data={"class_name": np.array([instance.category.name for instance in self], str)},
        )

    def to_pandas(self) -> DataFrame:
        """Return a table with a row for each object and the columns `COLUMNS`; corners are in pixels."""
        from pandas import DataFrame

        rows = [
            (
                *instance.box_xyxy,
                instance.category.id,
                instance.category.name,
                instance.score,
                instance.mask_score,
                instance.keypoint_score,
                instance.polygons,
                instance.keypoints,
            )
            for instance in self
        ]
        return DataFrame(rows, columns=list(COLUMNS))


def mask_of(instance: Instance, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask (H, W) of an object in an image of `size` (width, height); empty if it has none."""
    if instance.rle is not None:
        return rle_to_mask(instance.rle)
    return rasterize(instance.polygons, size[1], size[0])


def _json_rle(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
