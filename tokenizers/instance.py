"""Prompts about single objects, for segmentation and keypoints: the task, a box and a class.

Shapes: I objects. Reference: google-research/pix2seq, `tasks/task_utils.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.vocab import Vocab

PROMPT_LENGTH = 6  # task, y0, x0, y1, x1, class


def instance_prompts(
    task: str, boxes_yxyx: NDArray[np.floating], labels: NDArray[np.integer], vocab: Vocab
) -> NDArray[np.int64]:
    """Return prompts (I, 6) for boxes (I, 4), `yxyx` in [0, 1] of the model's input, and labels (I,) from 1."""
    ids = np.empty((len(labels), PROMPT_LENGTH), np.int64)
    ids[:, 0] = vocab.task_id(task)
    ids[:, 1:5] = vocab.coord_ids(boxes_yxyx.reshape(-1, 4))
    ids[:, 5] = vocab.class_ids(labels)
    return ids
