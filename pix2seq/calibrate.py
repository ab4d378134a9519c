"""Make the scores of a checkpoint probabilities, and choose the least score that is worth showing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.formats.builder import Dataset
from pix2seq.errors import InputError
from pix2seq.evaluation import measure
from pix2seq.files import MANIFEST_FILE, output_folder, read_json, report_write_errors, write_atomically, write_manifest
from pix2seq.metrics.calibration import (
    FITS,
    NUM_FOLDS,
    CalibrationReport,
    Graded,
    Maps,
    TaskCalibration,
    fit_maps,
)
from pix2seq.model.pretrained import CALIBRATION_KEY, CONFIG_FILE, STATE_FILES
from pix2seq.predictor import Predictor

MIN_RECALL = 0.01  # of what a precision is promised for
MIN_GRADED = 100  # answers of a task; from fewer nothing can be learned about its scores


@dataclass(frozen=True)
class Calibrated:
    """What calibration did to the scores of a task."""

    name: str
    calibration: TaskCalibration
    how: str  # the kind of the maps, and whether classes have their own
    before: CalibrationReport
    after: CalibrationReport  # by maps that did not see the image: each fold by those of the other folds
    is_precise: bool  # whether the wanted precision was reached

    def text(self) -> str:
        """Return a line for the terminal."""
        found = self.calibration
        reached = "" if found.precision is None else f", precision {found.precision:.3f} and recall {found.recall:.3f}"
        return (
            f"{self.name}: {self.how}; ECE {_shown(self.before.overall.error)} -> {_shown(self.after.overall.error)} "
            f"on images left out, {self.before.overall.count} answers; threshold {found.threshold:.3f}{reached}"
        )


def calibrate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    precision: float | None = None,
    limit: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> list[Calibrated]:
    """Fit maps from scores to probabilities for every task whose answers can be graded on the data.

    `predictor` must not be calibrated. `precision` is what answers of the threshold shall have at least; None takes
    the threshold of the best F1. Raises `InputError` if no task can be graded.
    """
    if predictor.calibration:
        raise InputError("this predictor is calibrated already; set its `calibration` to {} to begin anew")
    images = range(min(limit or len(dataset), len(dataset)))
    measured = measure(
        predictor, dataset, tuple(predictor.tasks), images, batch_size=batch_size, seed=seed, progress=progress
    )
    found = []
    for (name, question), metric in measured.items():
        graded = metric.result().graded if question == predictor.tasks[name].graded_question else None
        if graded is not None and _is_enough(graded):
            found.append(calibrate_scores(name, graded, precision))
    if not found:
        raise InputError(
            f"no task has {MIN_GRADED} answers about these {len(images)} images, some right and some wrong; "
            "give more images"
        )
    return found


def calibrate_scores(name: str, graded: Graded, precision: float | None = None) -> Calibrated:
    """Fit maps to graded answers of a task. The kind of map with the least squared error on images left out wins."""
    best: tuple[float, str, Maps, Graded] | None = None
    for kind, fit in FITS.items():
        for by_class in (False, True) if len(set(graded.classes.tolist())) > 1 and kind != "identity" else (False,):
            left_out = graded.scores.copy()
            for fold in _folds(graded):
                maps = fit_maps(graded[~fold], fit, by_class=by_class)
                left_out[fold] = TaskCalibration(0.0, None, None, maps).apply(graded[fold]).scores
            error = float(((left_out - graded.is_right) ** 2).mean())
            if best is None or error < best[0]:
                how = f"{kind}, {'one map a class' if by_class else 'one map'}"
                best = error, how, fit_maps(graded, fit, by_class=by_class), graded.with_scores(left_out)
    assert best is not None
    _, how, maps, checked = best
    fitted = TaskCalibration(0.0, None, None, maps)
    point = choose_threshold(fitted.apply(graded), precision)
    is_precise = point is not None
    point = point or choose_threshold(fitted.apply(graded), None)
    assert point is not None
    before, after = CalibrationReport.of(graded), CalibrationReport.of(checked)
    return Calibrated(name, TaskCalibration(*point, maps), how, before, after, is_precise)


def choose_threshold(graded: Graded, precision: float | None) -> tuple[float, float, float] | None:
    """Return the lowest score from which on answers have a precision, None for the best F1, with precision and recall.

    Returns None if no score gives the precision with a recall of `MIN_RECALL`: of a few answers, all can be right by
    luck.
    """
    order = np.argsort(-graded.scores, kind="stable")
    scores = graded.scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    right = graded.is_right[order].cumsum()[last]
    precisions, recalls = right / (last + 1), right / max(graded.num_truths, 1)
    if precision is None:
        best = int((2 * right / (last + 1 + graded.num_truths)).argmax())
    elif (enough := np.flatnonzero((precisions >= precision) & (recalls >= MIN_RECALL))).size:
        best = int(enough[-1])
    else:
        return None
    # Rounded down, so that the answer of exactly this score stays above it.
    return float(np.floor(scores[last[best]] * 1e6) / 1e6), float(precisions[best]), float(recalls[best])


def write_calibration(checkpoint: Path, found: Sequence[Calibrated], out: Path | None = None) -> Path:
    """Write calibrations into a checkpoint's config.json, or into a copy of the checkpoint in `out`, without its state.

    Returns the folder. Raises `InputError` if it cannot be written.
    """
    folder = checkpoint if out is None else output_folder(out)
    with report_write_errors(folder, "writing a calibration", then="calibrate again"):
        if out is not None and out.resolve() != checkpoint.resolve():
            for path in checkpoint.iterdir():
                if path.is_file() and path.name not in (*STATE_FILES, MANIFEST_FILE):
                    shutil.copyfile(path, out / path.name)
        content = read_json(folder / CONFIG_FILE)
        content[CALIBRATION_KEY] = {each.name: each.calibration.to_json() for each in found}
        has_manifest = (folder / MANIFEST_FILE).exists()
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # first: a crash must not leave one that disagrees
        write_atomically(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
        if has_manifest:
            write_manifest(folder)
    return folder


def _folds(graded: Graded) -> list[NDArray[np.bool_]]:
    """Return which answers belong to each fold; those of an image stay together."""
    _, number = np.unique(graded.image_ids, return_inverse=True)
    return [number % NUM_FOLDS == fold for fold in range(NUM_FOLDS)]


def _is_enough(graded: Graded) -> bool:
    """Whether there are answers enough, right and wrong ones, of an image at least for each fold."""
    many, right = len(graded.scores), int(graded.is_right.sum())
    return many >= MIN_GRADED and 0 < right < many and len(np.unique(graded.image_ids)) >= NUM_FOLDS


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
