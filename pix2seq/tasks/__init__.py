"""The table of tasks. A new one is a tokenizer, a file here, and a line in this table."""

from __future__ import annotations

from typing import Any

from pix2seq.tasks.captioning import Captioning
from pix2seq.tasks.detection import Detection
from pix2seq.tasks.keypoint import Keypoint
from pix2seq.tasks.segmentation import Segmentation
from pix2seq.tasks.task import Task

TASKS: dict[str, type[Task[Any]]] = {task.name: task for task in (Detection, Segmentation, Keypoint, Captioning)}
