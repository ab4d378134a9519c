"""Types shared by all modules: categories, images, annotations and predictions, in pixels.

Pixel coordinates are x to the right and y down; the left edge of the first column is 0.0 and the
right edge of the last is `width`. Shapes use N objects and K keypoints.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

ATTRIBUTES = ("colour", "texture", "seen")
"""Fields of an annotation that describe an object in a word; `seen` is no if the training split has none of its name.
"""

MaskAnnotation: TypeAlias = list[NDArray[np.float32]] | dict[str, Any]
"""A mask as outer rings, each (P, 2) as x, y with P >= 3, or as a COCO RLE with `size` (h, w) and `counts`."""


@dataclass(frozen=True)
class Category:
    """A class of objects, numbered `label` by the model and `id` by the data set."""

    label: int  # 1 to 899; its token is 100 + label
    id: int  # as in the data set's files
    name: str
    keypoints: tuple[str, ...] = ()  # names of the K points, in order
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of indices into `keypoints`, from 0
    flip_pairs: tuple[tuple[str, str], ...] | None = None  # points that swap in a mirror; None: their names say it
    is_stuff: bool = False  # a region without number, such as sky; COCO writes `isthing: 0`

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a config file, the inverse of `from_json`."""
        value = {
            "label": self.label,
            "id": self.id,
            "name": self.name,
            "keypoints": list(self.keypoints),
            "skeleton": [list(pair) for pair in self.skeleton],
        }
        pairs = {} if self.flip_pairs is None else {"flip_pairs": [list(pair) for pair in self.flip_pairs]}
        return value | pairs | ({"is_stuff": True} if self.is_stuff else {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Category:
        """Read what `to_json` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        label, number, name = value["label"], value["id"], value["name"]
        keypoints = tuple(value.get("keypoints", ()))
        skeleton = tuple((a, b) for a, b in value.get("skeleton", ()))
        flip_pairs = tuple((a, b) for a, b in value["flip_pairs"]) if "flip_pairs" in value else None
        if type(label) is not int or type(number) is not int or label < 1:
            raise ValueError(f"a class has label {label!r} and id {number!r}; expected whole numbers, labels from 1")
        if not all(isinstance(text, str) for text in (name, *keypoints)):
            raise ValueError(f"the class of label {label} has a name that is no text: {[name, *keypoints]}")
        if not all(type(i) is int and 0 <= i < len(keypoints) for pair in skeleton for i in pair):
            raise ValueError(f"the skeleton of {name!r} names other points than its {len(keypoints)} keypoints")
        if not all(isinstance(text, str) for pair in flip_pairs or () for text in pair):
            raise ValueError(f"the flip pairs of {name!r} must be names of its keypoints, got {flip_pairs}")
        is_stuff = value.get("is_stuff", False)
        if type(is_stuff) is not bool:
            raise ValueError(f"is_stuff of {name!r} must be true or false, got {is_stuff!r}")
        return cls(label, number, name, keypoints, skeleton, flip_pairs, is_stuff)


def category_key(name: str) -> str:
    """Return the key by which class names are compared: case, Unicode form and spaces around them aside."""
    return text_key(name).strip()


def text_key(text: str) -> str:
    """Return the key by which texts are compared where Unicode forms and case do not count."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


@dataclass(frozen=True)
class ImageRecord:
    """The path of an image, and its size after its EXIF orientation is applied."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Target:
    """The annotations of one image that passed the checks of the reader."""

    image: ImageRecord
    boxes_xyxy: NDArray[np.float32]  # (N, 4) in pixels, x1 > x0 and y1 > y0, inside the image
    labels: NDArray[np.int64]  # (N,) `Category.label`
    areas: NDArray[np.float32]  # (N,) mask area in square pixels, or the box area if there is no mask
    iscrowd: NDArray[np.bool_]  # (N,) neither trained on nor scored: crowds, and what VOC calls difficult
    annotation_ids: NDArray[np.int64]  # (N,)
    segmentations: tuple[MaskAnnotation | None, ...]  # N entries
    keypoints: NDArray[np.float32]  # (N, K, 3) x, y and COCO visibility 0, 1 or 2; K is 0 without keypoints
    captions: tuple[str, ...] = ()
    attributes: tuple[Mapping[str, str], ...] = ()  # N entries of `ATTRIBUTES`, or none if no object has any
    difficult: NDArray[np.bool_] | None = None  # (N,) which of `iscrowd` are one object each; None: none
    # How pixels of the image became those of the annotations: x' = scale * x + offset on each axis.
    scale_xy: tuple[float, float] = (1.0, 1.0)
    offset_xy: tuple[float, float] = (0.0, 0.0)
    companions: tuple[Target, ...] = ()  # other images that a task shows beside this one, each with one object or none

    def only(self, index: int) -> Target:
        """Return the target with one of its objects."""
        return self.subset([index])

    def subset(self, indices: Sequence[int]) -> Target:
        """Return the target with these of its objects, in this order."""
        rows = np.asarray(indices, np.int64)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            iscrowd=self.iscrowd[rows],
            annotation_ids=self.annotation_ids[rows],
            segmentations=tuple(self.segmentations[i] for i in indices),
            keypoints=self.keypoints[rows],
            attributes=tuple(self.attributes[i] for i in indices if self.attributes),
            difficult=None if self.difficult is None else self.difficult[rows],
        )


@dataclass(frozen=True)
class Caption:
    """A sentence about an image."""

    text: str
    score: float  # mean log-probability of its tokens, at most 0
    truncated: bool = False  # whether it was cut at the maximum length
    probability: float | None = None  # of being true, where the checkpoint is calibrated for it

    @property
    def confidence(self) -> float:
        """The probability of being true, or else the geometric mean of the likelihood of its tokens; 0 to 1."""
        return math.exp(min(self.score, 0.0)) if self.probability is None else self.probability

    def to_json(self) -> dict[str, Any]:
        """Return the entry for NAME.json; JSON has no minus infinity, the score of impossible words."""
        entry = {"text": self.text, "score": round(self.score, 6) if math.isfinite(self.score) else None}
        return entry if self.probability is None else entry | {"probability": round(self.probability, 6)}


@dataclass(frozen=True)
class Match:
    """A sentence and whether it is true of an image."""

    text: str
    score: float  # the probability that it is, 0 to 1

    def to_json(self) -> dict[str, Any]:
        """Return the entry for NAME.json."""
        return {"text": self.text, "score": round(self.score, 6)}


@dataclass(frozen=True)
class Instance:
    """One predicted object, in pixels of the original image."""

    box_xyxy: tuple[float, float, float, float]
    category: Category
    score: float  # 0 to 1; objects are ranked by it
    polygons: list[NDArray[np.float32]] = field(default_factory=list)  # rings (P, 2) as x, y
    keypoints: NDArray[np.float32] | None = None  # (K, 3) x, y, visibility
    rle: dict[str, Any] | None = None  # the mask as a COCO RLE, if rings cannot express it: holes
    mask_score: float | None = None  # mean likelihood of the polygon tokens
    keypoint_score: float | None = None  # mean likelihood of the keypoint tokens
    mask_agreement: float | None = None  # how well the sampled masks that voted agree, 0 to 1; None: there was one
    raw_score: float | None = None  # `score` before calibration; None: the score is not calibrated

    @property
    def uncalibrated(self) -> float:
        """The score before calibration."""
        return self.score if self.raw_score is None else self.raw_score

    def to_json(self) -> dict[str, Any]:
        """Return the COCO-like entry for NAME.json: `bbox` is x, y, width, height."""
        x0, y0, x1, y1 = self.box_xyxy
        points = [] if self.keypoints is None else [round(float(v), 2) for v in self.keypoints.ravel()]
        parts = {
            "mask_score": self.mask_score,
            "mask_agreement": self.mask_agreement,
            "keypoint_score": self.keypoint_score,
            "raw_score": self.raw_score,
        }
        return {
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "category_id": self.category.id,
            "category": self.category.name,
            "score": round(self.score, 6),
            "segmentation": [[round(float(v), 2) for v in ring.ravel()] for ring in self.polygons],
            "keypoints": points,
            **{name: round(value, 6) for name, value in parts.items() if value is not None},
        }


@dataclass(frozen=True)
class Clicks:
    """What a user points at in an image, in its pixels."""

    points: tuple[tuple[float, float], ...]  # x, y
    positive: tuple[bool, ...]  # whether what lies at each point belongs to the object
    box_xyxy: tuple[float, float, float, float] | None = None  # drawn by the user
    previous: tuple[NDArray[np.float32], ...] = ()  # rings (P, 2) of the answer to the clicks but the last
    num_candidates: int | None = None  # answers at most; None: as the task is set


@dataclass(frozen=True)
class ObjectMask:
    """The mask of an object of no class, in pixels of the original image."""

    box_xyxy: tuple[float, float, float, float]
    polygons: list[NDArray[np.float32]]  # rings (P, 2) as x, y
    score: float  # the model's estimate of its IoU, 0 to 1

    def to_json(self) -> dict[str, Any]:
        """Return a COCO-like entry: `bbox` is x, y, width, height."""
        x0, y0, x1, y1 = self.box_xyxy
        return {
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "segmentation": [[round(float(v), 2) for v in ring.ravel()] for ring in self.polygons],
            "score": round(self.score, 6),
        }
