"""Score a model on a data set: every task asks its questions, and its metric scores the answers."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pix2seq.data.companions import ObjectsByClass
from pix2seq.data.dataset import ClassMap, needed_categories
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.image import batch_by_pixels, read_record_image
from pix2seq.errors import InputError
from pix2seq.files import output_file, read_json, report_write_errors, write_atomically
from pix2seq.metrics.calibration import MIN_SCORE, CalibrationReport
from pix2seq.metrics.metric import Metric, Scores
from pix2seq.predictor import Predictor
from pix2seq.tasks import get_task
from pix2seq.tasks.request import EncodedImage
from pix2seq.tasks.task import Task
from pix2seq.types import Category, Target

TIMED_IMAGES = 20  # of those that are scored

Measured = dict[tuple[str, str], Metric]
"""The metric of each question of each task."""

Observer = Callable[[Task[Any], str, Target, EncodedImage, Sequence[Any], Sequence[Category]], None]
"""Sees a task, a question, the annotated image, its pixels, the answers and the classes, as they come."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    scores: dict[str, Scores]  # by task and question: `detection`, `segmentation/true_boxes`, `captioning`
    metrics: dict[str, float | None]  # all numbers by full name: `AP`, `segmentation/true_boxes/AP50`
    num_images: int
    seconds: float
    calibration: dict[str, CalibrationReport] = field(default_factory=dict)  # by task whose answers are right or wrong

    @classmethod
    def of(cls, measured: Measured, *, num_images: int, seconds: float) -> EvalResult:
        """Compute the scores of what was measured."""
        scores: dict[str, Scores] = {}
        metrics: dict[str, float | None] = {}
        calibration: dict[str, CalibrationReport] = {}
        for (name, question), metric in measured.items():
            found = metric.result()
            scores[f"{name}/{question}" if question else name] = found
            task = get_task(name)
            metrics |= {task.metric_name(key, question): value for key, value in found.metrics.items()}
            if found.graded is not None and question == task.graded_question:
                calibration[name] = CalibrationReport.of(found.graded)
                metrics |= {f"{name}/{key}": value for key, value in calibration[name].metrics.items()}
        return cls(scores, metrics, num_images, seconds, calibration)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: `metrics` by name, `scores` and `calibration` in full, and the number of images."""
        return {
            "metrics": self.metrics,
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "num_images": self.num_images,
            "seconds": round(self.seconds, 3),
            "calibration": {name: report.to_json() for name, report in self.calibration.items()},
        }

    def text(self) -> str:
        """Return tables for the terminal."""
        parts = [f"{name}\n{score.text()}" for name, score in self.scores.items()]
        if len(self.scores) == 1:
            parts = [next(iter(self.scores.values())).text()]
        for name, report in self.calibration.items():
            if report.overall.error is not None:
                parts.append(
                    f"{name}/ECE {report.overall.error:.3f}  {name}/Brier {report.overall.brier:.3f}  "
                    f"({report.overall.count} answers of a score of at least {MIN_SCORE})"
                )
        return "\n\n".join(parts)

    def summary(self) -> str:
        """Return the main numbers in one line."""
        alone = len(self.scores) == 1
        parts = [score.summary() if alone else f"{name} {score.summary()}" for name, score in self.scores.items()]
        return f"{'; '.join(parts)} on {self.num_images} images in {self.seconds:.0f} s"

    def save(self, path: Path) -> None:
        """Write `to_json` to a file. Raises `InputError`, with the numbers, if it cannot be written."""
        content = json.dumps(self.to_json(), indent=2) + "\n"
        with report_write_errors(path, "writing metrics", then=f"copy them from here: {json.dumps(self.metrics)}"):
            write_atomically(path, content)


def check_output(path: Path, *, inputs: Iterable[Path], overwrite: bool) -> None:
    """Create the folder of a file for metrics. Raises `InputError` if they cannot, or should not, be written there.

    An earlier file of metrics may be replaced, other files only with `overwrite`, and files below `inputs` never.
    """
    output_file(path)
    if not path.exists():
        return
    try:
        earlier = read_json(path)
    except InputError:
        earlier = None
    needed = {each.name for each in fields(EvalResult) if each.default_factory is MISSING}
    if isinstance(earlier, dict) and needed <= earlier.keys() <= {each.name for each in fields(EvalResult)}:
        return
    read = next((folder for folder in inputs if path.resolve().is_relative_to(folder.resolve())), None)
    if read is not None:
        raise InputError(f"{path} is a file of {read}, which is read; give another file with --out")
    if not overwrite:
        raise InputError(
            f"{path} exists and holds no metrics; give another file with --out, or replace it by --overwrite"
        )


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    tasks: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    limit: int = 0,
    seed: int = 0,
    progress: bool = False,
    observe: Observer | None = None,
) -> EvalResult:
    """Score `tasks`, by default all that the model knows, on the first `limit` images (0: all).

    Classes are matched by name, and every class of the data set must be known to the model. Raises `InputError` if
    the model does not know a task or a class, and if there is no image. `observe` sees all answers.
    """
    if batch_size < 1 or limit < 0:
        raise InputError(f"expected batch_size of at least 1 and limit of at least 0, got {batch_size} and {limit}")
    started = time.perf_counter()
    images = range(min(limit or len(dataset), len(dataset)))
    names = tuple(predictor.tasks) if tasks is None else tasks
    measured = measure(
        predictor, dataset, names, images, batch_size=batch_size, seed=seed, progress=progress, observe=observe
    )
    result = EvalResult.of(measured, num_images=len(images), seconds=time.perf_counter() - started)
    return replace(result, metrics=result.metrics | time_questions(predictor, dataset, names, images[:TIMED_IMAGES]))


def time_questions(
    predictor: Predictor, dataset: Dataset, tasks: Sequence[str], images: range
) -> dict[str, float | None]:
    """Return the median milliseconds of the questions that tasks want timed, each asked alone, after encoding."""
    milliseconds: dict[str, list[float]] = {}
    for target in map(dataset.target, images):
        asked = [(name, *each) for name in tasks for each in predictor.tasks[name].timed(target).items()]
        image = predictor.encode(read_record_image(target.image)) if asked else None
        for name, metric, about in asked:
            assert image is not None
            started = time.perf_counter()
            predictor.ask(name, [image], [about])
            milliseconds.setdefault(get_task(name).metric_name(metric), []).append(
                1e3 * (time.perf_counter() - started)
            )
    return {name: float(np.median(values)) for name, values in milliseconds.items()}


def measure(
    predictor: Predictor,
    dataset: Dataset,
    tasks: Sequence[str],
    images: range,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    observe: Observer | None = None,
) -> Measured:
    """Ask all questions about the images of these numbers; several processes can share the images.

    A question that no image has an answer for, such as captions of a data set without any, is left out.
    """
    for name in tasks:
        predictor.require(name)
    if not len(dataset):
        raise InputError(f"{dataset.root} has no image in split {dataset.split!r} to evaluate on")
    uses_classes = any(predictor.tasks[name].uses_classes for name in tasks)
    classes: ClassMap | None = None
    if uses_classes:
        known = predictor.model.categories
        classes = ClassMap(needed_categories(dataset, known), known)
    categories = dataset.categories if classes is None else classes.categories
    captions = dataset.annotations.all_captions()
    asking = {name: predictor.tasks[name].with_data(captions, categories) for name in tasks}
    beside = Companions(dataset, list(asking.values()), seed)
    measured: Measured = {}
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        sizes = [(dataset.images[index].width, dataset.images[index].height) for index in images]
        for part in batch_by_pixels(sizes, batch_size):
            targets = [dataset.target(index) for index in images[part.start : part.stop]]
            encoded = predictor.encode_batch([read_record_image(target.image) for target in targets])
            shown = {name: [beside.draw(task, target) for target in targets] for name, task in asking.items()}
            if classes is not None:
                targets = [classes.to_model(target) for target in targets]
                shown = {name: [list(map(classes.to_model, each)) for each in some] for name, some in shown.items()}
            needed = {need for name in tasks for need in predictor.tasks[name].needs if need in predictor.tasks}
            found = {name: predictor.ask(name, encoded, seed=seed) for name in sorted(needed)}
            for name, task in asking.items():
                supply = found.get(task.needs[0]) if task.needs else None
                asked = [
                    (i, question, about)
                    for i, target in enumerate(targets)
                    for question, about in task.questions(
                        replace(target, companions=tuple(shown[name][i])), None if supply is None else supply[i]
                    ).items()
                ]
                if name in found and all(about is None for _, _, about in asked):
                    answers = [found[name][i] for i, _, _ in asked]
                else:
                    abouts = [about for _, _, about in asked]
                    answers = predictor.ask(name, [encoded[i] for i, _, _ in asked], abouts, seed=seed)
                for (i, question, _), answer in zip(asked, answers, strict=True):
                    if (name, question) not in measured:
                        measured[name, question] = task.metric(categories)
                    measured[name, question].add(targets[i], answer)
                    if observe is not None:
                        observe(task, question, targets[i], encoded[i], answer, categories)
            bar.update(len(targets))
    return measured


class Companions:
    """Draws what tasks show beside the images that are scored: a function of the seed and the image."""

    def __init__(self, dataset: Dataset, tasks: Sequence[Task[Any]], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.objects = ObjectsByClass(dataset) if any(task.shows_companions for task in tasks) else None

    def draw(self, task: Task[Any], target: Target) -> list[Target]:
        """Return the annotated images that a task shows beside one, each with one object."""
        if self.objects is None:
            return []
        rng = np.random.default_rng((self.seed, target.image.id % 2**64, zlib.crc32(task.name.encode())))
        drawn = task.companions(target, self.objects, rng, scoring=True)
        return [self.dataset.target(each.image).only(each.object) for each in drawn]


def merge_measured(parts: Sequence[Mapping[tuple[str, str], Metric]]) -> Measured:
    """Join what several processes measured on different images."""
    merged: Measured = {}
    for part in parts:
        for key, metric in part.items():
            if key in merged:
                merged[key].merge(metric)
            else:
                merged[key] = metric
    return merged
