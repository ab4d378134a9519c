"""How far scores are probabilities before and after calibration, and what ranks masks and keypoints best.

    python benchmarks/scores.py CHECKPOINT [--images 1000] [--ranked 300] [--charts docs] [--json]

Generates images of three seeds. The checkpoint is calibrated on the first and measured on the second, which calibration
did not see. Masks and keypoints about the third are ranked by the mean likelihood of their tokens and by the agreement
of samples. Nothing in the checkpoint changes. Dated results: benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from scipy.stats import rankdata, spearmanr

from pix2seq.calibrate import calibrate
from pix2seq.charts import Bar, reliability_chart
from pix2seq.cli import run_guarded
from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.evaluation import measure
from pix2seq.files import output_folder, write_atomically
from pix2seq.metrics.calibration import CalibrationReport
from pix2seq.metrics.coco_ap import ApMetric, average_precision, keypoint_sigmas
from pix2seq.model.decoding.generate import Completion
from pix2seq.predictor import Predictor
from pix2seq.tasks.keypoint import Keypoint
from pix2seq.tasks.objects import FOUND_BOXES, TRUE_BOXES
from pix2seq.tasks.request import Frame
from pix2seq.types import Instance

FIT_SEED, TEST_SEED, RANKED_SEED = 20_261_301, 20_261_302, 20_261_303
NUM_SAMPLES = 8
Quality = Callable[[Instance], float]


class SampledKeypoint(Keypoint):
    """Keypoints of the first of some samples, with the agreement of the samples as their `keypoint_score`."""

    @property
    def num_samples(self) -> int:
        """See `ObjectTask`."""
        return NUM_SAMPLES

    def answer(self, instance: Instance, completion: Completion, frame: Frame, size: tuple[int, int]) -> Instance:
        """Score by the mean OKS of the samples with their mean, for an object that fills its box."""
        rows = [
            Completion(*(None if part is None else part[s : s + 1] for part in vars(completion).values()))
            for s in range(NUM_SAMPLES)
        ]
        points = np.stack([self.points(row, instance.category, frame)[:, :2] for row in rows])
        x0, y0, x1, y1 = instance.box_xyxy
        scale = 8 * keypoint_sigmas(instance.category.keypoints) ** 2 * max((x1 - x0) * (y1 - y0), 1.0)
        agreement = np.exp(-((points - points.mean(axis=0)) ** 2).sum(axis=2) / scale).mean()
        return replace(super().answer(instance, rows[0], frame, size), keypoint_score=float(agreement))


def generated(folder: Path, seed: int, num_images: int) -> Dataset:
    """Write images of the default world and open them."""
    write_shapes(folder / str(seed), num_train=0, num_val=num_images, seed=seed)
    return open_dataset(folder / str(seed), "val")


def measure_calibration(predictor: Predictor, fit: Dataset, test: Dataset, charts: Path | None) -> dict[str, Any]:
    """Calibrate on one data set, and return the errors on the other before and after."""
    found = calibrate(predictor, fit, progress=True)
    measured = measure(predictor, test, tuple(predictor.tasks), range(len(test)), progress=True)
    results = {}
    for each in found:
        graded = measured[each.name, predictor.tasks[each.name].graded_question].result().graded
        assert graded is not None
        reports = {
            "before": CalibrationReport.of(graded),
            "after": CalibrationReport.of(each.calibration.apply(graded)),
        }
        results[each.name] = {"map": each.how} | {name: report.to_json() for name, report in reports.items()}
        for name, report in reports.items() if charts is not None else ():
            title = f"{each.name}, {name} calibration: ECE {report.overall.error:.3f}"
            bars = [Bar(**vars(part)) for part in report.overall.bins]
            write_atomically(charts / f"scores-{each.name}-{name}.svg", reliability_chart(bars, title=title) + "\n")
    return results


def measure_ranking(predictor: Predictor, dataset: Dataset) -> dict[str, Any]:
    """Return how well likelihood and agreement rank masks and keypoints."""
    qualities: dict[str, Quality] = {"likelihood": lambda i: i.mask_score or 0.0, "agreement": _mask_agreement}
    found: dict[str, Any] = {}
    predictor.configure(num_samples=NUM_SAMPLES)
    for name, kind in {"segmentation": "mask", "keypoint": "keypoint"}.items():
        measured = measure(predictor, dataset, [name], range(len(dataset)), progress=True)
        if kind == "mask":
            found[name] = {key: _ranking(measured, name, each) for key, each in qualities.items()}
        else:
            found[name] = {"likelihood": _ranking(measured, name, _points)}
    plain = predictor.tasks["keypoint"]
    for top_p in (0.4, 0.9):
        config = replace(plain.config, top_p=top_p)
        predictor.tasks["keypoint"] = SampledKeypoint(config, plain.vocab, tuple(plain.categories.values()), plain.text)
        measured = measure(predictor, dataset, ["keypoint"], range(len(dataset)), progress=True)
        found["keypoint"][f"agreement, top_p {top_p}"] = _ranking(measured, "keypoint", _points)
    predictor.tasks["keypoint"] = plain
    return found


def _points(instance: Instance) -> float:
    return instance.keypoint_score or 0.0


def _mask_agreement(instance: Instance) -> float:
    return instance.mask_agreement or 0.0


def _ranking(measured: Any, name: str, quality: Quality) -> dict[str, float]:
    """Rank the answers about annotated boxes by a quality alone, those about found ones by box score times quality."""
    on_true, on_found = measured[name, TRUE_BOXES], measured[name, FOUND_BOXES]
    alone = _scored(on_true, quality)
    scores, is_right = alone.matches.scores, alone.matches.is_right
    ranks, right = rankdata(scores), is_right[0]
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    product = _scored(on_found, lambda instance: instance.score * quality(instance))
    return {
        "answers": len(scores),
        "AUROC": float((ranks[right].sum() - num_right * (num_right + 1) / 2) / max(num_right * num_wrong, 1)),
        "Spearman": float(spearmanr(scores, is_right.sum(axis=0)).statistic),  # with how many thresholds are passed
        "AP_found_boxes": product.metrics["AP"] or 0.0,
        "AP_found_boxes_as_is": on_found.result().metrics["AP"],
    }


def _scored(metric: ApMetric, quality: Quality) -> Any:
    answers = {image: [replace(i, score=quality(i)) for i in each] for image, each in metric.predictions.items()}
    return average_precision(metric.targets, metric.categories, answers, kind=metric.kind, sigmas=metric.sigmas)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="to calibrate on, and as many to measure on")
    parser.add_argument("--ranked", type=int, default=300, help="images whose masks and keypoints are ranked")
    parser.add_argument("--charts", type=Path, help="folder for reliability diagrams")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args(argv)
    if args.charts is not None:
        output_folder(args.charts)
    about = machine()
    predictor = Predictor.from_pretrained(args.checkpoint, device="cpu")
    predictor.calibration = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = [generated(folder, seed, args.images) for seed in (FIT_SEED, TEST_SEED)]
        calibration = measure_calibration(predictor, *data, args.charts)
        ranking = measure_ranking(predictor, generated(folder, RANKED_SEED, args.ranked))
    for name, each in calibration.items():
        print(f"{name:14} ECE {each['before']['ECE']:.3f} -> {each['after']['ECE']:.3f}  ({each['map']})")
    for name, each in ranking.items():
        for key, values in each.items():
            print(f"{name:14} {key:22} AUROC {values['AUROC']:.3f}  Spearman {values['Spearman']:.3f}")
    if args.json:
        print(json.dumps({"benchmark": "scores", "machine": about, "images": args.images, "ranked": args.ranked,
                          "calibration": calibration, "ranking": ranking}))  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
