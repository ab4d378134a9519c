"""Score a model on a data set, in pixels of the original pictures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pix2seq.data.folder import labels_by_name
from pix2seq.data.target import Dataset, Instance
from pix2seq.metrics.coco_ap import ApResult, average_precision
from pix2seq.predictor import Predictor


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    ap: ApResult
    num_images: int
    num_detections: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values: `metrics` by COCO's names, `per_class`, and how many images they rest on."""
        return {
            "task": "detection",
            **self.ap.to_json(),
            "num_images": self.num_images,
            "num_detections": self.num_detections,
            "seconds": round(self.seconds, 3),
        }

    def summary(self) -> str:
        """One line."""
        show = lambda value: "undefined" if value is None else f"{value:.3f}"  # noqa: E731
        metrics = self.ap.metrics
        return (
            f"AP {show(metrics['AP'])}, AP50 {show(metrics['AP50'])}, AR100 {show(metrics['AR100'])} "
            f"on {self.num_images} images in {self.seconds:.0f} s"
        )

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def evaluate(
    predictor: Predictor, dataset: Dataset, *, batch_size: int = 16, limit: int = 0, progress: bool = False
) -> EvalResult:
    """COCO AP of boxes on the first `limit` pictures, all where it is 0.

    Classes are matched by name, and every class of the data set must be known to the model; raises
    `InputError` otherwise.
    """
    labels_by_name(dataset.categories, predictor.model.categories)
    num_images = min(limit, len(dataset)) if limit else len(dataset)
    started = time.perf_counter()
    predictions: dict[int, list[Instance]] = {}
    targets = [dataset.target(index) for index in range(num_images)]
    with tqdm(total=num_images, unit="image", disable=not progress) as bar:
        for start in range(0, num_images, batch_size):
            some = targets[start : start + batch_size]
            encoded = predictor.encode_batch([target.image.path for target in some])
            for target, instances in zip(some, predictor.detect_batch(encoded, seed=start), strict=True):
                predictions[target.image.id] = instances
            bar.update(len(some))
    ap = average_precision(targets, dataset.categories, predictions)
    num_detections = sum(len(instances) for instances in predictions.values())
    return EvalResult(ap, num_images, num_detections, time.perf_counter() - started)
