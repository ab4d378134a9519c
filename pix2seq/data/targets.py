"""Annotations in the coordinates of another image: mapped to a training input, or cropped to one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.affine import Affine
from pix2seq.geometry.boxes import box_area, clip_boxes_xyxy, padded_region
from pix2seq.geometry.polygons import rle_to_rings
from pix2seq.types import MaskAnnotation, Target

EDGE = 1e-3  # pixels that rounding may move the edge of an image


def transform_target(
    target: Target,
    affine: Affine,
    size: tuple[int, int],
    *,
    min_visible: float = 0.0,
    mirror_orders: Mapping[int, NDArray[np.int64]] | None = None,
    with_masks: bool = True,
) -> Target:
    """Map a target to pixels of an output of `size` (height, width).

    Boxes are clipped to the output. Objects are dropped if they keep no area there, or less than
    `min_visible` of it. Keypoints outside become unlabelled (0, 0, 0). If the map mirrors, the order for the
    object's label in `mirror_orders` puts left and right back under their names; keypoints of labels that have
    no order become unlabelled. Masks become rings, which may reach beyond the output. Crowds lose their masks,
    as no task learns from them; `with_masks=False` drops all masks.
    """
    height, width = size
    moved = affine.boxes(target.boxes_xyxy)
    boxes = clip_boxes_xyxy(moved, width, height)
    area = np.maximum(box_area(boxes), 0)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (area >= min_visible * box_area(moved))

    keypoints = target.keypoints.copy()
    if affine.scale_x < 0 and mirror_orders is not None:
        for i, label in enumerate(target.labels.tolist()):
            if label in mirror_orders:
                order = mirror_orders[label]
                keypoints[i, : len(order)] = keypoints[i, order]
            else:
                keypoints[i] = 0
    keypoints[..., :2] = affine.points(keypoints[..., :2])
    inside = ((keypoints[..., :2] >= 0) & (keypoints[..., :2] <= [width, height])).all(axis=-1)
    keypoints[~inside | (keypoints[..., 2] == 0)] = 0

    return replace(
        target,
        boxes_xyxy=boxes[keep],
        labels=target.labels[keep],
        areas=(target.areas * abs(affine.scale_x * affine.scale_y))[keep].astype(np.float32),
        iscrowd=target.iscrowd[keep],
        annotation_ids=target.annotation_ids[keep],
        segmentations=tuple(
            _transform_segmentation(s, affine) if with_masks and not crowd else None
            for s, crowd, kept in zip(target.segmentations, target.iscrowd, keep, strict=True)
            if kept
        ),
        keypoints=keypoints[keep],
        attributes=tuple(each for each, kept in zip(target.attributes, keep, strict=False) if kept),
        difficult=None if target.difficult is None else target.difficult[keep],
        scale_xy=(affine.scale_x * target.scale_xy[0], affine.scale_y * target.scale_xy[1]),
        offset_xy=(
            affine.scale_x * target.offset_xy[0] + affine.offset_x,
            affine.scale_y * target.offset_xy[1] + affine.offset_y,
        ),
    )


def shown_whole(target: Target, size: tuple[int, int]) -> Target | None:
    """Return a target as it lies in its image, mirrored if it is shown so; None if some of the image is not shown.

    `target` is in pixels of an input of `size` (height, width), the result in those of the image. It has boxes and
    areas, but neither masks nor keypoints.
    """
    scale, offset = np.array(target.scale_xy), np.array(target.offset_xy)
    ends = np.stack([offset, offset + scale * [target.image.width, target.image.height]])
    low, high = ends.min(0), ends.max(0)
    if (low < -EDGE).any() or (high > np.array(size[::-1]) + EDGE).any():
        return None
    return replace(
        target,
        boxes_xyxy=(target.boxes_xyxy - np.tile(low, 2)) / np.tile(abs(scale), 2),
        areas=target.areas / abs(scale.prod()),
        segmentations=(None,) * len(target.labels),
        keypoints=target.keypoints[:, :0],
        scale_xy=(1.0, 1.0),
        offset_xy=(0.0, 0.0),
    )


def _transform_segmentation(segmentation: MaskAnnotation | None, affine: Affine) -> MaskAnnotation | None:
    if segmentation is None:
        return None
    rings = rle_to_rings(segmentation) if isinstance(segmentation, dict) else segmentation
    return [affine.points(ring) for ring in rings] or None


def crop_to_object(
    target: Target, image: NDArray[np.uint8], index: int, padding: float, *, with_masks: bool = False
) -> tuple[Target, NDArray[np.uint8]]:
    """Crop an image (H, W, 3) around one object; the new target has only that object."""
    x0, y0, x1, y1 = padded_region(target.boxes_xyxy[index], image.shape[1], image.shape[0], padding)
    size = (y1 - y0, x1 - x0)
    return transform_target(target.only(index), Affine(1, 1, -x0, -y0), size, with_masks=with_masks), image[
        y0:y1, x0:x1
    ]
