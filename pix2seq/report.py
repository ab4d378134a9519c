"""An evaluation as one HTML page: tables, curves, the worst images, and how it was made. It loads nothing."""

from __future__ import annotations

import base64
import io
import platform
import shlex
import sys
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pix2seq.charts import Bar, Line, line_chart, matrix_chart, reliability_chart
from pix2seq.drawing import Canvas, draw_target
from pix2seq.errors import InputError
from pix2seq.evaluation import EvalResult
from pix2seq.files import output_file, output_folder, report_write_errors, write_atomically
from pix2seq.metrics.coco_ap import ApResult
from pix2seq.metrics.operating_points import SHOWN, curve
from pix2seq.predictor import Predictor
from pix2seq.tasks.request import EncodedImage
from pix2seq.tasks.task import Task
from pix2seq.types import Category, Target

NUM_WORST = 6  # images of each question
PACKAGES = ("pix2seq", "torch", "numpy", "pycocotools", "timm")  # whose versions the page names
MARK = "<!-- a report of pix2seq eval -->"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #24292f;
  background: white }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #eaeef2 }
td:first-child, th:first-child { text-align: left }
code { overflow-wrap: anywhere }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
.pairs { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem }
.pairs img { width: 100%; display: block } figure { margin: 0 } figcaption { color: #57606a; font-size: 0.85rem }
"""


@dataclass(order=True)
class _Kept:
    """An image whose answers scored low."""

    value: float  # of the task's main metric, on this image alone
    number: int  # of those seen, which orders equal ones
    task: Task[Any] = field(compare=False)
    target: Target = field(compare=False)
    image: EncodedImage = field(compare=False)
    answers: Sequence[Any] = field(compare=False)
    categories: Sequence[Category] = field(compare=False)


class Report:
    """Collects the worst images while an evaluation runs, and writes the page once it is done."""

    def __init__(self, predictor: Predictor, checkpoint: Path, data: Path, split: str, seed: int) -> None:
        self.thresholds = predictor.thresholds
        self.is_calibrated = bool(predictor.calibration)
        self.made = {
            "checkpoint": str(checkpoint),
            "data": f"{data}, split {split}",
            "seed": str(seed),
            "command": shlex.join(["pix2seq", *sys.argv[1:]]),
            "device": str(predictor.model.device),
        }
        self._kept: dict[tuple[str, str], list[_Kept]] = {}
        self._number = 0

    def __call__(
        self,
        task: Task[Any],
        question: str,
        target: Target,
        image: EncodedImage,
        answers: Sequence[Any],
        categories: Sequence[Category],
    ) -> None:
        """Keep an image if its answers are among the worst so far; those without a score are left out."""
        metric = task.metric(categories)
        metric.add(target, answers)
        value = metric.result().metrics.get(task.main_metric.rpartition("/")[2])
        if value is None:
            return
        self._number += 1
        kept = self._kept.setdefault((task.name, question), [])
        insort(kept, _Kept(value, self._number, task, target, image, answers, categories))
        del kept[NUM_WORST:]

    def save(self, path: Path, result: EvalResult) -> None:
        """Write the page. Raises `InputError` if it cannot be written."""
        with report_write_errors(path, "writing a report", then="evaluate again"):
            write_atomically(path, self.html(result))

    def html(self, result: EvalResult) -> str:
        """Return the page."""
        made = self.made | {
            "images": f"{result.num_images}, in {result.seconds:.0f} s",
            "calibrated": "yes" if self.is_calibrated else "no",
            "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
            "platform": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        }
        charts = figures(result)
        sections = []
        for name, score in result.scores.items():
            task, _, question = name.partition("/")
            of_it = f"{name.replace('/', '-')}."
            own = "".join(svg for key, svg in charts.items() if key.startswith(of_it) and "reliability" not in key)
            part = [f"<h2>{escape(name)}</h2>", _metrics(score.metrics), f'<div class="charts">{own}</div>']
            if isinstance(score, ApResult):
                part.append(_classes(score.per_class))
            part.append(self._worst(self._kept.get((task, question), [])))
            sections.append("".join(part))
        if result.calibration:
            sections.append(_calibration(result, charts))
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td><code>{escape(text)}</code></td></tr>" for key, text in made.items()
        )
        return (
            f"<!doctype html>{MARK}<html lang=en><meta charset=utf-8><title>Evaluation of {escape(made['checkpoint'])}"
            f"</title><style>{STYLE} table.made td {{ text-align: left }}</style>"
            f"<h1>Evaluation of {escape(made['checkpoint'])}</h1><p>{escape(result.summary())}</p>"
            f"{''.join(sections)}<h2>How this was made</h2><table class=made>{rows}</table></html>\n"
        )

    def _worst(self, kept: Sequence[_Kept]) -> str:
        if not kept:
            return ""
        task = kept[0].task
        least = self.thresholds.get(task.name, 0.0)
        parts = [
            f"<h3>Worst images</h3><p>By {escape(task.main_metric.rpartition('/')[2])} of the image alone; truth "
            f"on the left, answers on the right, objects of a score of at least {least:.2f}.</p><div class=pairs>"
        ]
        for each in kept:
            canvas = Canvas(each.image.pixels, min_score=least)
            task.draw(canvas, each.answers)
            truth = draw_target(each.image.pixels, each.target, each.categories)
            name = escape(each.target.image.path.name)
            parts += [_figure(truth, f"{name}: truth"), _figure(canvas.finish(), f"{name}: {each.value:.3f}")]
        return "".join([*parts, "</div>"])


def check_report(path: Path, *, overwrite: bool) -> None:
    """Create the folder of a report. Raises `InputError` if it cannot be written, or replaces another file."""
    output_file(path)
    if path.exists() and not overwrite and MARK not in path.read_text("utf-8", errors="replace")[:200]:
        raise InputError(f"{path} exists and is no report; give another file with --html, or replace it by --overwrite")


def write_charts(folder: Path, result: EvalResult) -> None:
    """Write all charts as SVG files. Raises `InputError` if they cannot be written."""
    output_folder(folder)
    with report_write_errors(folder, "writing charts", then="evaluate again"):
        for name, svg in figures(result).items():
            write_atomically(folder / f"{name}.svg", svg + "\n")


def figures(result: EvalResult) -> dict[str, str]:
    """Return the charts of an evaluation as SVG by name: `detection.precision-recall`, `keypoint.reliability`."""
    charts = {}
    for name, score in result.scores.items():
        key = name.replace("/", "-")
        if isinstance(score, ApResult) and any(score.matches.num_truths.values()):
            found = curve(score.matches)
            lines = [
                Line(f"{score.overlap} {level}", found.recall[row], found.precision[row])
                for level, row in SHOWN.items()
            ]
            charts[f"{key}.precision-recall"] = line_chart(
                lines, title=f"{name}: precision and recall", x_label="recall", y_label="precision"
            )
            lines = [Line(f"{score.overlap} {level}", found.scores, found.f1[row]) for level, row in SHOWN.items()]
            charts[f"{key}.f1"] = line_chart(lines, title=f"{name}: F1 by score", x_label="least score", y_label="F1")
        if isinstance(score, ApResult) and score.confusion is not None and score.confusion.threshold is not None:
            charts[f"{key}.confusion"] = matrix_chart(
                [*score.confusion.names, "nothing"],
                score.confusion.counts,
                title=f"{name}: confusion, scores of at least {score.confusion.threshold:.2f}",
                rows="truth",
                columns="answer",
            )
    for name, report in result.calibration.items():
        if report.overall.error is not None:
            bars = [Bar(**vars(each)) for each in report.overall.bins]
            title = f"{name}: ECE {report.overall.error:.3f}"
            charts[f"{name}.reliability"] = reliability_chart(bars, title=title)
    return charts


def _calibration(result: EvalResult, charts: Mapping[str, str]) -> str:
    rows = []
    for name, report in result.calibration.items():
        groups = {"all": report.overall} | report.by_size | report.by_class
        rows += [
            {"task": name, "answers": group, "count": each.count, "ECE": each.error, "Brier": each.brier}
            for group, each in groups.items()
        ]
    diagrams = "".join(charts.get(f"{name}.reliability", "") for name in result.calibration)
    return (
        "<h2>Calibration</h2><p>Is an answer of score 0.8 right in 8 of 10 cases? Expected calibration error in 15 "
        "bins, over answers of a score of at least 0.05; pale bars count them.</p>"
        f'<div class="charts">{diagrams}</div>{_table(pd.DataFrame(rows))}'
    )


def _metrics(metrics: Mapping[str, float | None]) -> str:
    points: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        kind, at, level = key.partition("@")
        if at:
            points.setdefault(level, {"at": level})[kind] = value
    plain = pd.DataFrame([{key: value for key, value in metrics.items() if "@" not in key}])
    return _table(plain) + (_table(pd.DataFrame(list(points.values()))) if points else "")


def _classes(per_class: pd.DataFrame) -> str:
    seen = per_class[per_class[["num_ground_truth", "num_detections"]].any(axis=1)]
    return _table(seen.rename(columns={"num_ground_truth": "objects", "num_detections": "found"}))


def _table(frame: pd.DataFrame) -> str:
    """Return a table; numbers have three digits, and what is undefined is a dash."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in frame.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in frame.itertuples(index=False)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _figure(image: Image.Image, caption: str) -> str:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )
