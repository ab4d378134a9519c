"""What examples are worth: against a detector that is told the class, and nearest neighbours, on the same images.

    python benchmarks/by_example.py --checkpoint checkpoints/by_example --data scenes [--detector checkpoints/shapes]

All answer the questions of `pix2seq eval --task by_example`. `told_class` are the detections of the true class, by a
detector that knows it; without --detector it is left out. `nearest` are the boxes that the model lists, scored by the
cosine of the encoder's features in the box and in the example's, both from closeups; the score that counts as found is
the best for the presence of objects on these very images, which favours it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray
from tqdm import tqdm

from pix2seq import Predictor
from pix2seq.data.dataset import open_dataset
from pix2seq.data.image import read_record_image
from pix2seq.evaluation import Companions
from pix2seq.metrics.correlation import matthews
from pix2seq.metrics.presence import Found, PresenceMetric
from pix2seq.model.closeups import sample_maps
from pix2seq.tasks.by_example import ByExample, Kind
from pix2seq.tasks.request import EncodedImage
from pix2seq.types import Category, Instance, Target, category_key

PADDING = 0.1  # of a box's size around it, where features are compared
NUM_LIMITS = 200  # scores that are tried as the least of what counts as found

Answers = list[tuple[Target, list[Found]]]


def main() -> None:
    """Measure, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="model that is asked by examples")
    parser.add_argument("--detector", type=Path, help="model that detects, and knows the classes of the data")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=0, help="only the first N images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asked = Predictor.from_pretrained(args.checkpoint)
    detector = args.detector and Predictor.from_pretrained(args.detector)
    task = asked.tasks["by_example"]
    assert isinstance(task, ByExample)
    dataset = open_dataset(args.data, args.split)
    beside, names = Companions(dataset, [task], args.seed), {each.label: each.name for each in dataset.categories}
    by_example, told, nearest = Answers(), Answers(), Answers()
    for index in tqdm(range(min(args.limit or len(dataset), len(dataset))), mininterval=5):
        target = dataset.target(index)
        exam = task.questions(replace(target, companions=tuple(beside.draw(task, target))), None)[""]
        if not exam.asked:
            continue
        pixels = read_record_image(target.image)
        image = asked.encode(pixels)
        answers = asked.ask("by_example", [image], [exam], seed=args.seed, outlines=False)[0]
        by_example.append((target, answers))
        listed = answers[0].instances
        nearest.append((target, [like(asked, image, listed, kind) for kind in exam.asked]))
        if detector:
            found = detector.detect(pixels)
            told.append((target, [of_class(found, kind, names[kind.label]) for kind in exam.asked]))
    if not by_example:
        raise SystemExit(
            f"no image of {args.data}, split {args.split}, has a class of which another image has an object"
        )
    least = task.config.min_score
    numbers = {
        "by_example": scores(by_example, dataset.categories, least),
        "nearest": scores(nearest, dataset.categories, best_limit(nearest)),
        **({"told_class": scores(told, dataset.categories, least)} if detector else {}),
    }
    about = {"data": args.data.name, "checkpoint": args.checkpoint.name, "images": len(by_example)}
    print(json.dumps({"benchmark": "by_example", "machine": machine(), **about, **numbers}, indent=2))


def of_class(found: Sequence[Instance], kind: Kind, name: str) -> Found:
    """Return the detections of a class."""
    key = category_key(name)
    return Found(kind.label, tuple(each for each in found if category_key(each.category.name) == key), kind.is_unseen)


def like(model: Predictor, image: EncodedImage, boxes: Sequence[Instance], kind: Kind) -> Found:
    """Return boxes with the similarity of their features to the example's, 0 to 1, as the score, best first."""
    (example,) = features(model, model.encode(kind.shown.image), [kind.shown.box_xyxy])
    if not boxes:
        return Found(kind.label, (), kind.is_unseen)
    similarity = (1 + features(model, image, [each.box_xyxy for each in boxes]) @ example) / 2
    order = np.argsort(-similarity, kind="stable").tolist()
    found = tuple(replace(boxes[i], score=float(similarity[i]), polygons=[]) for i in order)
    return Found(kind.label, found, kind.is_unseen)


@torch.inference_mode()
def features(
    predictor: Predictor, image: EncodedImage, boxes: Sequence[tuple[float, float, float, float]]
) -> NDArray[np.float32]:
    """Return the encoder's mean features (N, C) in boxes of an image, of unit length."""
    model = predictor.model
    corners = np.stack([image.frame().around(np.array(box), PADDING).xyxy for box in boxes])
    frames = torch.from_numpy(image.frame().to_input_yxyx(corners)).float().to(model.device)
    maps = tuple(each[None] for each in image.maps)
    sampled = sample_maps(maps, frames, [0] * len(boxes), model.encoder.grid(*model.config.image_size))
    mean = model.encoder.look_closer(sampled).mean(dim=1)
    unit: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
    return unit


def scores(answers: Answers, categories: Sequence[Category], min_score: float) -> dict[str, Any]:
    """Score answers, of which those of at least `min_score` count as found."""
    metric = PresenceMetric(categories, min_score)
    for target, found in answers:
        metric.add(target, found)
    return metric.result().metrics


def best_limit(answers: Answers) -> float:
    """Return the least score that says best whether there is an object of a kind, by Matthews' correlation."""
    is_there = np.array([bool((target.labels == found.label).any()) for target, some in answers for found in some])
    best = [max((each.score for each in found.instances), default=-1.0) for _, some in answers for found in some]
    known = [score for score in best if score >= 0]
    limits = np.quantile(known, np.linspace(0, 1, NUM_LIMITS)).tolist() if known else [0.5]
    return max(limits, key=lambda limit: matthews(is_there, np.array(best) >= limit) or 0.0)


if __name__ == "__main__":
    main()
