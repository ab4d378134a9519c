"""Average precision by pycocotools, behind a check of its input.

pycocotools is the reference for COCO AP, and takes no care of what it is given: an annotation with
id 0 counts as missed, an empty list of results raises, one NaN in a polygon ends the process. Here
annotations are numbered anew, every number is checked, and what is undefined comes out as None.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.geometry.keypoints import point_key
from pix2seq.metrics.calibration import Graded
from pix2seq.metrics.confusion import Confusion, confusion
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.metrics.operating_points import THRESHOLDS, Matches, operating_points, point_metrics
from pix2seq.metrics.panoptic import PanopticQuality, Segment
from pix2seq.types import Category, ImageRecord, Instance, MaskAnnotation, Target, category_key

Kind = Literal["box", "mask", "keypoint"]

_FR_PY_OBJECTS: Any = mask_utils.frPyObjects  # takes more than its stubs say
_MERGE: Any = mask_utils.merge
_IOU_TYPES: dict[Kind, Literal["bbox", "segm", "keypoints"]] = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
# How far annotators differ about the points of a person, as a share of the square root of the person's area; published
# with COCO. Points of other names get the mean over the 17 points.
COCO_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
OTHER_SIGMA = (2 * sum(COCO_SIGMAS.values()) - COCO_SIGMAS["nose"]) / 17
_SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # areas, by COCO's names
_IGNORED_AREA = 1e11  # beyond all ranges of COCO's sizes: pycocotools ignores such an object, but finds it by IoU


@dataclass(frozen=True)
class ApResult(Scores):
    """COCO's numbers, 0 to 1. None stands for what is undefined: there was nothing of that kind to be found."""

    headline = ("AP", "AP50")

    # category, num_ground_truth, num_detections, AP, AP50, F1@0.5, precision@0.5, recall@0.5, threshold@0.5
    per_class: pd.DataFrame
    num_dropped: int  # detections that could not be scored: not finite, without area, or of an unknown class
    num_ignored: int = 0  # objects that are neither found nor missed: difficult ones, and those without a mask
    matches: Matches = field(kw_only=True)  # classes have the numbers of their rows in `per_class`, from 1
    overlap: str = field(default="IoU", kw_only=True)  # what the thresholds of `matches` are of: IoU or OKS
    confusion: Confusion | None = field(default=None, kw_only=True)  # of boxes, at the threshold of the best F1

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
            for row in self.per_class.to_dict(orient="records")
        ]
        return {
            "metrics": self.metrics,
            "per_class": rows,
            **({} if self.confusion is None else {"confusion": self.confusion.to_json()}),
            "num_dropped": self.num_dropped,
            "num_ignored": self.num_ignored,
        }

    def text(self) -> str:
        """A table for the terminal."""
        show = lambda value: "    -" if value is None or np.isnan(value) else f"{value:5.3f}"  # noqa: E731
        width = max([len("category"), *(len(name) for name in self.per_class["category"])])
        lines = [f"{'category':<{width}}  objects  found     AP   AP50     F1  score"]
        seen = self.per_class[self.per_class[["num_ground_truth", "num_detections"]].any(axis=1)]
        lines += [
            f"{name:<{width}}  {num_truths:7d}{num_found:7d}  {show(ap)}  {show(ap50)}  {show(f1)}  {show(threshold)}"
            for name, num_truths, num_found, ap, ap50, f1, _, _, threshold in seen.itertuples(index=False)
        ]
        coco = (f"{name} {show(value)}" for name, value in self.metrics.items() if "@" not in name)
        lines.append("  ".join(coco))
        for name, value in self.metrics.items():
            at = name.removeprefix("F1")
            if at != name and value is not None:
                others = (f"{each} {show(self.metrics[each + at])}" for each in ("precision", "recall", "threshold"))
                lines.append(f"{name:<11} {show(value)}  {'  '.join(others)}")
        if self.num_ignored:
            lines.append(f"{self.num_ignored} objects ignored: difficult, or without a mask")
        return "\n".join(lines)


class ApMetric(Metric):
    """Average precision of objects found in the images of a data set with these categories."""

    def __init__(self, categories: Sequence[Category], kind: Kind, sigmas: Mapping[str, float] | None = None) -> None:
        """`sigmas` by names of keypoints go over COCO's; see `keypoint_sigmas`."""
        self.categories, self.kind, self.sigmas = tuple(categories), kind, dict(sigmas or {})
        self.targets: list[Target] = []
        self.predictions: dict[int, list[Instance]] = {}

    def add(self, target: Target, answers: Sequence[Instance]) -> None:
        """See `Metric`."""
        self.targets.append(target)
        self.predictions[target.image.id] = list(answers)

    def merge(self, other: ApMetric) -> None:
        """See `Metric`."""
        self.targets += other.targets
        self.predictions |= other.predictions

    def result(self) -> ApResult:
        """See `Metric`."""
        return average_precision(self.targets, self.categories, self.predictions, kind=self.kind, sigmas=self.sigmas)


def average_precision(
    targets: Sequence[Target],
    categories: Sequence[Category],
    predictions: Mapping[int, Sequence[Instance]],
    *,
    kind: Kind = "box",
    sigmas: Mapping[str, float] | None = None,
) -> ApResult:
    """Score predictions, lists of instances by image id, against targets, both in pixels of the image.

    Classes are matched by name, in any case. Keypoints of a class are in the order of its category in `categories`;
    for `sigmas`, see `keypoint_sigmas`. With ground truth and no detections everything is 0; without ground
    truth everything is None. Crowd regions are ignored as COCO does: what lies in them is neither
    right nor wrong. Difficult objects are ignored as VOC does: each may be found once, by IoU. So are objects without
    a mask, by their box, where masks are scored.
    """
    keys = dict.fromkeys(category_key(category.name) for category in categories)
    ids = {key: position for position, key in enumerate(keys, start=1)}
    id_of_label = {category.label: ids[category_key(category.name)] for category in categories}
    sigmas_of = {id_of_label[category.label]: keypoint_sigmas(category.keypoints, sigmas) for category in categories}
    annotations = _ground_truth(targets, id_of_label, sigmas_of, kind)
    known_images = {target.image.id: target.image for target in targets}
    detections: list[dict[str, Any]] = []
    dropped = 0
    for image_id, instances in predictions.items():
        for instance in instances:
            image = known_images.get(image_id)
            entry = None if image is None else _detection(instance, image.width, image.height, ids, sigmas_of, kind)
            if entry is None:
                dropped += 1
            else:
                detections.append(entry | {"image_id": image_id})

    names = _KEYPOINT_METRICS if kind == "keypoint" else _METRICS
    counted = [a for a in annotations if _is_counted(a) and (kind != "keypoint" or a["num_keypoints"])]
    scored = (
        _evaluate(list(known_images.values()), annotations, detections, sigmas_of, kind)
        if counted and detections
        else None
    )
    if scored is not None:
        metrics = {name: _defined(value) for name, value in zip(names, scored.stats, strict=True)}
    else:
        metrics = dict.fromkeys(names, 0.0 if counted else None)
        if counted:
            # Sizes of which there is no object stay undefined.
            for letter, low, high in (("s", 0, 32**2), ("m", 32**2, 96**2), ("l", 96**2, 1e10)):
                if not any(low <= a["area"] <= high for a in counted):
                    metrics |= {name: None for name in metrics if name in (f"AP{letter}", f"AR{letter}")}
    names_of = {id_of_label[category.label]: category.name for category in categories}
    ignored = sum(not a["iscrowd"] and not _is_counted(a) for a in annotations)
    matches = _matches(scored, counted, detections)
    metrics |= point_metrics(matches)
    threshold = metrics["threshold@0.5"]
    if kind == "mask":
        metrics |= _panoptic(known_images, annotations, detections, categories, id_of_label, threshold)
    return ApResult(
        metrics,
        _per_class(scored, names_of, counted, detections, matches),
        dropped,
        ignored,
        matches=matches,
        overlap="OKS" if kind == "keypoint" else "IoU",
        confusion=confusion(annotations, detections, list(names_of.values()), threshold) if kind == "box" else None,
        graded=_graded(matches, names_of),
    )


def _panoptic(
    images: Mapping[int, ImageRecord],
    annotations: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    id_of_label: Mapping[int, int],
    threshold: float | None,
) -> dict[str, float | None]:
    """Score masks as one map an image: those of at least `threshold`."""
    stuff = {id_of_label[category.label] for category in categories if category.is_stuff}
    quality = PanopticQuality(set(id_of_label.values()), stuff)
    truths: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in images}
    found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in images}
    for annotation in annotations:
        if annotation["area"] != _IGNORED_AREA:
            truths[annotation["image_id"]].append(annotation)
    for detection in detections:
        if threshold is not None and detection["score"] >= threshold:
            found[detection["image_id"]].append(detection)
    decode = lambda each: mask_utils.decode(each["segmentation"]).astype(np.bool_)  # noqa: E731
    for image_id in images:
        smallest_first = sorted(truths[image_id], key=lambda each: each["area"])
        best_first = sorted(found[image_id], key=lambda each: -each["score"])
        quality.add(
            [Segment(decode(each), each["category_id"], bool(each["iscrowd"])) for each in smallest_first],
            [Segment(decode(each), each["category_id"]) for each in best_first],
        )
    return quality.result()


def _is_counted(annotation: Mapping[str, Any]) -> bool:
    return not annotation["iscrowd"] and annotation["area"] != _IGNORED_AREA


def keypoint_sigmas(names: Sequence[str], given: Mapping[str, float] | None = None) -> NDArray[np.float64]:
    """Return the tolerance (K,) of each keypoint in OKS, as a share of the square root of the object's area.

    It is that of `given` for the name, or for the name without its side (`eye` for `left_eye`); else COCO's for that
    point of a person; else the mean of COCO's.
    """
    own = {point_key(name): sigma for name, sigma in (given or {}).items()}
    found = []
    for side, rest in map(point_key, names):
        default = own.get(("", rest), COCO_SIGMAS.get(rest, OTHER_SIGMA))
        found.append(own.get((side, rest), default))
    return np.array(found, np.float64)


def _ground_truth(
    targets: Sequence[Target],
    id_of_label: dict[int, int],
    sigmas_of: dict[int, NDArray[np.float64]],
    kind: Kind,
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for target in targets:
        difficult = np.zeros(len(target.labels), np.bool_) if target.difficult is None else target.difficult
        for i in range(len(target.labels)):
            x0, y0, x1, y1 = map(float, target.boxes_xyxy[i])
            category_id = id_of_label[int(target.labels[i])]
            points = target.keypoints[i, : len(sigmas_of[category_id])]
            entry = {
                "id": len(annotations) + 1,
                "image_id": target.image.id,
                "category_id": category_id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": _IGNORED_AREA if difficult[i] else float(target.areas[i]),
                "iscrowd": int(target.iscrowd[i] and not difficult[i]),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            }
            if kind == "mask":
                entry["segmentation"] = _run_lengths(target.segmentations[i], target.image.width, target.image.height)
                if entry["segmentation"] is None:
                    sides = [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])]
                    entry["segmentation"] = _run_lengths(sides, target.image.width, target.image.height)
                    entry["area"] = _IGNORED_AREA
            if kind == "keypoint":
                entry["keypoints"] = points.ravel().astype(float).tolist()
            annotations.append(entry)
    return annotations


def _detection(
    instance: Instance,
    width: int,
    height: int,
    ids: dict[str, int],
    sigmas_of: dict[int, NDArray[np.float64]],
    kind: Kind,
) -> dict[str, Any] | None:
    box = np.array(instance.box_xyxy, np.float64)
    category_id = ids.get(category_key(instance.category.name))
    if category_id is None or not np.isfinite([*box, instance.score]).all():
        return None
    x0, y0, x1, y1 = np.clip(box, 0, [width, height, width, height]).tolist()
    if x1 <= x0 or y1 <= y0:
        return None
    entry: dict[str, Any] = {"category_id": category_id, "score": float(instance.score)}
    # With a box, pycocotools would take a mask or points to be as large as their box, and sort them by that size.
    if kind == "box":
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    elif kind == "mask" and instance.rle is not None:
        entry["segmentation"] = instance.rle
    elif kind == "mask":
        rings = [np.clip(ring, 0, [width, height]) for ring in instance.polygons if len(ring) >= 3]
        if not rings or not all(np.isfinite(ring).all() for ring in rings):
            return None
        entry["segmentation"] = _run_lengths(rings, width, height)
    if kind == "keypoint":
        points = instance.keypoints
        expected = (len(sigmas_of[category_id]), 3)
        if points is None or not points.size or points.shape != expected or not np.isfinite(points).all():
            return None
        entry["keypoints"] = points.ravel().astype(float).tolist()
    return entry


def _run_lengths(segmentation: MaskAnnotation | None, width: int, height: int) -> dict[str, Any] | None:
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return _FR_PY_OBJECTS(segmentation, height, width) if isinstance(counts, list) else segmentation
    rings = [ring.ravel().astype(float).tolist() for ring in segmentation]
    return _MERGE(_FR_PY_OBJECTS(rings, height, width))


def _evaluate(
    images: list[ImageRecord],
    annotations: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    sigmas_of: dict[int, NDArray[np.float64]],
    kind: Kind,
) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        dataset: Any = {
            "images": [{"id": i.id, "width": i.width, "height": i.height} for i in images],
            "annotations": annotations,
            "categories": [{"id": category_id} for category_id in sigmas_of],
            "info": {},
        }
        truth.dataset = dataset
        truth.createIndex()
        results: Any = detections
        evaluation = _Evaluation(truth, truth.loadRes(results), _IOU_TYPES[kind])
        evaluation.sigmas_of = sigmas_of
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _matches(
    scored: COCOeval | None, counted: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]
) -> Matches:
    """Gather what pycocotools decided about each detection, of all sizes."""
    num_truths: dict[int, int] = {}
    for annotation in counted:
        num_truths[annotation["category_id"]] = num_truths.get(annotation["category_id"], 0) + 1
    parts: list[tuple[Any, ...]] = []
    if scored is not None:
        all_sizes = scored.params.areaRng[0]
        for entry in filter(None, scored.evalImgs):
            if entry["aRng"] == all_sizes and entry["dtIds"]:
                many = len(entry["dtIds"])
                areas = [scored.cocoDt.anns[number]["area"] for number in entry["dtIds"]]
                where = [[entry[name]] * many for name in ("image_id", "category_id")]
                parts.append(
                    (*where, entry["dtScores"], areas, entry["dtMatches"] > 0, ~entry["dtIgnore"].astype(bool))
                )
    elif not counted and detections:  # nothing is there to be found, so all of them are wrong
        many = len(detections)
        wrong, all_counted = np.zeros((len(THRESHOLDS), many), bool), np.ones((len(THRESHOLDS), many), bool)
        values = [[each[name] for each in detections] for name in ("image_id", "category_id", "score")]
        parts.append((*values, [0.0] * many, wrong, all_counted))
    if not parts:
        nobody = np.zeros((len(THRESHOLDS), 0), np.bool_)
        whole, real = np.zeros(0, np.int64), np.zeros(0)
        return Matches(whole, whole, real, real, nobody, nobody, num_truths)
    images, classes, scores, sizes, right, valid = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return Matches(images.astype(np.int64), classes.astype(np.int64), scores, sizes, right, valid, num_truths)


def _graded(matches: Matches, names_of: Mapping[int, str]) -> Graded:
    """Return what is right at IoU or OKS 0.5, without what is ignored."""
    valid = matches.is_counted[0]
    sizes = np.full(len(valid), "large", dtype="U6")
    for name, (low, high) in _SIZES.items():
        sizes[(matches.areas >= low) & (matches.areas < high)] = name
    return Graded(
        matches.scores[valid],
        matches.is_right[0][valid],
        matches.image_ids[valid],
        np.array([names_of[number] for number in matches.category_ids[valid].tolist()], dtype=np.str_),
        sizes[valid],
        sum(matches.num_truths.values()),
    )


class _Evaluation(COCOeval):
    """COCO's evaluation for classes with different skeletons."""

    sigmas_of: Mapping[int, NDArray[np.float64]]  # by category id

    def computeOks(self, imgId: int, catId: int) -> Any:
        """Return the OKS of the detections and objects of a class in an image."""
        self.params.kpt_oks_sigmas = self.sigmas_of[catId]
        return super().computeOks(imgId, catId)


def _per_class(
    scored: COCOeval | None,
    names_of: dict[int, str],
    counted: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    matches: Matches,
) -> pd.DataFrame:
    truths = np.bincount([a["category_id"] for a in counted], minlength=len(names_of) + 1)
    found = np.bincount([d["category_id"] for d in detections], minlength=len(names_of) + 1)
    rows = []
    for position, (category_id, name) in enumerate(sorted(names_of.items())):
        ap = ap50 = 0.0 if truths[category_id] else float("nan")
        if scored is not None and truths[category_id]:
            # (IoU thresholds, recalls, classes, areas, detections): all sizes, most detections
            precision: NDArray[np.float64] = scored.eval["precision"][:, :, position, 0, -1]
            ap, ap50 = round(float(precision.mean()), 12), round(float(precision[0].mean()), 12)
        best = operating_points(matches.of(category_id))["0.5"]
        point = [np.nan] * 4 if best is None else [np.nan if each is None else each for each in vars(best).values()]
        rows.append((name, int(truths[category_id]), int(found[category_id]), ap, ap50, *point))
    names = ["F1@0.5", "precision@0.5", "recall@0.5", "threshold@0.5"]
    return pd.DataFrame(rows, columns=["category", "num_ground_truth", "num_detections", "AP", "AP50", *names])


def _defined(value: float) -> float | None:
    # pycocotools adds 2e-16 to every denominator, so that a perfect score falls that much short of 1.
    return None if value < 0 else round(float(value), 12)
