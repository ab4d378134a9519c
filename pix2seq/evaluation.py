"""Score a model on a data set, in pixels of the original images."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pix2seq.data.dataset import Dataset, labels_by_name
from pix2seq.data.image import read_record_image
from pix2seq.errors import InputError
from pix2seq.metrics.captions import CaptionScores, caption_scores
from pix2seq.metrics.coco_ap import ApResult, Kind, average_precision
from pix2seq.predictor import EncodedImage, Predictor
from pix2seq.types import Category, Instance, Target

KINDS: dict[str, Kind] = {"detection": "box", "segmentation": "mask", "keypoint": "keypoint"}
TRUE_BOXES, FOUND_BOXES = "true_boxes", "found_boxes"  # what masks and keypoints were asked for


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    `scores` by name: `detection`, `captioning`, and `segmentation/found_boxes`,
    `segmentation/true_boxes` and alike for keypoints, which are asked for about boxes that the model
    found and, apart from that, about those that were annotated.
    """

    scores: dict[str, ApResult | CaptionScores]
    num_images: int
    num_detections: int
    seconds: float

    @property
    def metrics(self) -> dict[str, float | None]:
        """All numbers by name: `AP` for boxes, else as in `segmentation/true_boxes/AP50`."""
        return {
            metric if name == "detection" else f"{name}/{metric}": value
            for name, score in self.scores.items()
            for metric, value in score.metrics.items()
        }

    @classmethod
    def joined(cls, results: Sequence[EvalResult]) -> EvalResult:
        """Evaluations of different tasks as one."""
        scores = {name: score for result in results for name, score in result.scores.items()}
        return cls(
            scores,
            max(result.num_images for result in results),
            sum(result.num_detections for result in results),
            sum(result.seconds for result in results),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: `metrics` by name, `scores` in full, and how many images they rest on."""
        return {
            "metrics": self.metrics,
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "num_images": self.num_images,
            "num_detections": self.num_detections,
            "seconds": round(self.seconds, 3),
        }

    def text(self) -> str:
        """Tables for the terminal."""
        if list(self.scores) == ["detection"]:
            return self.scores["detection"].text()
        return "\n\n".join(f"{name}\n{score.text()}" for name, score in self.scores.items())

    def summary(self) -> str:
        """One line."""
        show = lambda value: "undefined" if value is None else f"{value:.3f}"  # noqa: E731
        parts = []
        for name, score in self.scores.items():
            chosen = ["BLEU-4"] if isinstance(score, CaptionScores) else ["AP", "AP50"]
            chosen += ["AR100"] if name == "detection" else []
            prefix = "" if name == "detection" else f"{name} "
            parts.append(prefix + ", ".join(f"{metric} {show(score.metrics[metric])}" for metric in chosen))
        return f"{'; '.join(parts)} on {self.num_images} images in {self.seconds:.0f} s"

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Answers:
    """What a model said about some images, by image id."""

    instances: dict[str, dict[int, list[Instance]]]  # under the names of `EvalResult.scores`
    captions: dict[int, str]

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Those about different images as one."""
        names = dict.fromkeys(name for part in parts for name in part.instances)
        instances = {
            name: {image_id: found for part in parts for image_id, found in part.instances.get(name, {}).items()}
            for name in names
        }
        return cls(instances, {image_id: text for part in parts for image_id, text in part.captions.items()})


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    tasks: Sequence[str] = ("detection",),
    *,
    batch_size: int = 16,
    limit: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> EvalResult:
    """COCO AP of boxes, masks and keypoints, and caption scores, on the first `limit` images (0: all).

    Classes are matched by name, and every class of the data set must be known to the model. Images
    without captions are left out of the caption scores, and a data set without any has none. Raises
    `InputError` where the model does not know a task or a class, and where there is no image.
    """
    started = time.perf_counter()
    images = range(min(limit or len(dataset), len(dataset)))
    answers = answer(predictor, dataset, tasks, images, batch_size=batch_size, seed=seed, progress=progress)
    return score(dataset, answers, images, seconds=time.perf_counter() - started)


def answer(
    predictor: Predictor,
    dataset: Dataset,
    tasks: Sequence[str],
    images: range,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Answers:
    """The part of `evaluate` that several processes can share: ask about the images of these numbers."""
    for name in tasks:
        predictor.require(name)
    if not len(dataset):
        raise InputError(f"{dataset.root} has no image in split {dataset.split!r} to evaluate on")
    instance_tasks = [name for name in ("segmentation", "keypoint") if name in tasks]
    categories = {}
    if "detection" in tasks or instance_tasks:
        known = {category.label: category for category in predictor.model.categories}
        found = labels_by_name(dataset.categories, predictor.model.categories)
        categories = {label: known[model_label] for label, model_label in found.items()}
    instances: dict[str, dict[int, list[Instance]]] = {}
    captions: dict[int, str] = {}
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            some = [dataset.target(index) for index in images[start : start + batch_size]]
            encoded = predictor.encode_batch([read_record_image(target.image) for target in some])
            found_boxes: list[list[Instance]] = [[] for _ in some]
            if "detection" in tasks or (instance_tasks and "detection" in predictor.tasks):
                found_boxes = predictor.detect_batch(encoded, seed=seed)
            described = [i for i, target in enumerate(some) if target.captions and "captioning" in tasks]
            if described:
                texts = predictor.caption_batch([encoded[i] for i in described], seed=seed)
                captions |= {some[i].image.id: text.text for i, text in zip(described, texts, strict=True)}
            for target, image, boxes in zip(some, encoded, found_boxes, strict=True):
                by_name = {"detection": boxes} if "detection" in tasks else {}
                for name in instance_tasks:
                    by_name |= _about_boxes(predictor, name, image, boxes, target, categories, seed)
                for name, asked in by_name.items():
                    instances.setdefault(name, {})[target.image.id] = asked
                bar.update()
    return Answers(instances, captions)


def score(dataset: Dataset, answers: Answers, images: range, *, seconds: float) -> EvalResult:
    """Compare answers about the images of these numbers, all of them, with what is annotated."""
    targets = [dataset.target(index) for index in images]
    scores: dict[str, ApResult | CaptionScores] = {
        name: average_precision(targets, dataset.categories, found, kind=KINDS[name.partition("/")[0]])
        for name, found in sorted(answers.instances.items())
    }
    if answers.captions:
        described = {target.image.id: target.captions for target in targets if target.captions}
        scores["captioning"] = caption_scores(described, answers.captions)
    num_detections = sum(len(found) for found in answers.instances.get("detection", {}).values())
    return EvalResult(scores, len(images), num_detections, seconds)


def _about_boxes(
    predictor: Predictor,
    task: str,
    image: EncodedImage,
    found: Sequence[Instance],
    target: Target,
    categories: Mapping[int, Category],
    seed: int,
) -> dict[str, list[Instance]]:
    """Masks or keypoints of boxes that were found and of those that were annotated."""
    ask = predictor.segment if task == "segmentation" else predictor.keypoints
    true = [
        Instance((float(b[0]), float(b[1]), float(b[2]), float(b[3])), categories[int(label)], 1.0)
        for b, label, crowd in zip(target.boxes_xyxy, target.labels, target.iscrowd, strict=True)
        if not crowd
    ]
    answers = {f"{task}/{TRUE_BOXES}": ask(image, true, seed=seed)}
    if "detection" in predictor.tasks:
        answers[f"{task}/{FOUND_BOXES}"] = ask(image, predictor.worth_asking(task, found), seed=seed)
    return answers
