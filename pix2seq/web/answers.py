"""What the server answers about an image: the content of NAME.json, and on request sequences and drawings."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pix2seq.drawing import Canvas
from pix2seq.predictor import Prediction
from pix2seq.tasks.task import Task
from pix2seq.tasks.transcript import transcribe
from pix2seq.types import Caption, Instance

JPEG_QUALITY = 90


def without_unlikely(prediction: Prediction, threshold: float) -> Prediction:
    """Drop objects that score below `threshold`; answers of other types stay."""
    answers = {
        name: [each for each in some if not (isinstance(each, Instance) and each.score < threshold)]
        for name, some in prediction.answers.items()
    }
    return replace(prediction, answers=answers)


def sequences_to_json(prediction: Prediction, tasks: Mapping[str, Task[Any]]) -> list[dict[str, Any]]:
    """Return all sequences about an image, token by token.

    `parts` say which tokens of a response belong to which answer: `answer` is the key and the index of its entry in
    `Prediction.to_json`, or None.
    """
    places = _places(prediction)
    found = []
    for name, exchange in prediction.exchanges.items():
        for transcript in transcribe(tasks[name], prediction.image, exchange):
            value = {"task": name} | transcript.to_json()
            for entry, part in zip(value["parts"], transcript.parts, strict=True):
                entry["answer"] = None if part.answer is None else places.get(_identity(part.answer))
            found.append(value)
    return found


def drawings_to_json(prediction: Prediction) -> dict[str, str]:
    """Return JPEG images, as data URLs by task, of answers that only their own task can draw."""
    drawings = {}
    for name, answers in prediction.answers.items():
        if answers and not all(isinstance(each, Instance | Caption) for each in answers):
            canvas = Canvas(prediction.image.pixels)
            prediction.tasks[name].draw(canvas, answers)
            stream = io.BytesIO()
            canvas.finish().save(stream, "JPEG", quality=JPEG_QUALITY)
            drawings[name] = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return drawings


def _places(prediction: Prediction) -> dict[str, dict[str, Any]]:
    """Return where the entry of each answer stands in `Prediction.to_json`, by the answer's identity."""
    places: dict[str, dict[str, Any]] = {}
    for name, answers in prediction.answers.items():
        for key, entries in prediction.tasks[name].to_json(answers).items():
            if isinstance(entries, list) and len(entries) == len(answers):
                for index, answer in enumerate(answers):
                    places.setdefault(_identity(answer), {"key": key, "index": index})
    return places


def _identity(answer: Any) -> str:
    """Return what an answer keeps while tasks add to it: an object its box and class, others all they say."""
    if isinstance(answer, Instance):
        return repr((answer.box_xyxy, answer.category.label))
    return json.dumps(answer.to_json(), sort_keys=True)
