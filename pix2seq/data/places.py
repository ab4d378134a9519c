"""What of a data set a task can learn from, told from the columns of all images at once.

`learns_from` is what an image must have, in a task's own words: an object, a mask, a labelled keypoint or a
caption. Objects of a crowd never count. Shapes use I images and N annotations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.annotations import Annotations
from pix2seq.data.target import Target

WHOLE = -1  # in place of an object's number


def find_places(annotations: Annotations, learns_from: str, *, each_object: bool) -> NDArray[np.int32]:
    """An (image, object) for each training sample, (S, 2): whole images, or `each_object` that can be learned from."""
    if learns_from == "caption":
        images = np.unique(annotations.caption_owner)
        return _pairs(images, np.full(len(images), WHOLE))
    usable = _OBJECTS[learns_from](annotations) & ~annotations.iscrowd  # (N,)
    first = annotations.first
    if each_object:
        objects = np.flatnonzero(usable)
        images = first.searchsorted(objects, side="right") - 1
        return _pairs(images, objects - first[images])
    before = np.append(0, np.cumsum(usable, dtype=np.int32))  # usable ones before each annotation
    images = np.flatnonzero(before[first[1:]] > before[first[:-1]])
    return _pairs(images, np.full(len(images), WHOLE))


def contents(target: Target) -> frozenset[str]:
    """The same of a single target: all that can be learned from it, as `learns_from` has it."""
    real = ~target.iscrowd
    found = {
        "object": bool(real.any()),
        "mask": any(bool(s) and r for s, r in zip(target.segmentations, real.tolist(), strict=True)),
        "labelled keypoint": bool((target.keypoints[real, :, 2] > 0).any()),
        "caption": bool(target.captions),
    }
    return frozenset(name for name, is_there in found.items() if is_there)


def _pairs(images: NDArray[np.integer], objects: NDArray[np.integer]) -> NDArray[np.int32]:
    return np.stack([images, objects], axis=1).astype(np.int32)


def _with_mask(annotations: Annotations) -> NDArray[np.bool_]:
    found = np.zeros(len(annotations), np.bool_)
    found[annotations.ring_owner] = True
    found[annotations.run_owner] = True
    return found


def _with_keypoints(annotations: Annotations) -> NDArray[np.bool_]:
    found = np.zeros(len(annotations), np.bool_)
    found[annotations.keypoint_owner] = (annotations.keypoints[..., 2] > 0).any(axis=1)
    return found


_OBJECTS: dict[str, Callable[[Annotations], NDArray[np.bool_]]] = {
    "object": lambda annotations: np.ones(len(annotations), np.bool_),
    "mask": _with_mask,
    "labelled keypoint": _with_keypoints,
}
