"""Clicks on an object as tokens, and what is answered to them: a quality and a box, then an outline.

    find      task  y x sign ...  [y0 x0 y1 x1]  [SEPARATOR rings]                        ->  quality y0 x0 y1 x1
    outline   task  y x sign ...  [SEPARATOR rings]  SEPARATOR y0 x0 y1 x1                ->  rings, end
    rate      task  y x sign ...  [SEPARATOR rings]  SEPARATOR y0 x0 y1 x1  rings, end    ->  quality

The first prompt is about the whole image, with the box that a user may have drawn; the others are about the
surroundings of the found box, and their coordinates are relative to those. The rings in brackets are the previous
answer in few points. Rings are those of `pix2seq.tokenizers.segmentation`. A quality is an IoU in tenths.

Converts to ids and back, without model or I/O. Points are `yx` in [0, 1] of what the model sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.tokenizers.segmentation import TOKENS_PER_POINT, encode_short
from pix2seq.vocab import NEGATIVE, POSITIVE, QUALITY, SEPARATOR, Vocab

TOKENS_PER_CLICK = 3
BOX_LENGTH = 4
FIND_LENGTH = 1 + BOX_LENGTH  # of the answer

Rings = Sequence[NDArray[np.floating]]


def prompt_length(max_clicks: int, short_points: int) -> int:
    """Return the length of the longest prompt before an outline."""
    return 1 + TOKENS_PER_CLICK * max_clicks + 1 + TOKENS_PER_POINT * short_points + 1 + BOX_LENGTH


def find_prompt(
    task_id: int,
    points_yx: NDArray[np.floating],
    positive: NDArray[np.bool_],
    vocab: Vocab,
    *,
    box_yxyx: NDArray[np.floating] | None = None,
    previous: Rings = (),
    short_points: int,
) -> NDArray[np.int64]:
    """Return the prompt (P,) that asks which object is meant by clicks at points (N, 2)."""
    box = np.zeros(0, np.int64) if box_yxyx is None else vocab.coord_ids(box_yxyx)
    clicks = _click_ids(points_yx, positive, vocab)
    return np.concatenate([[task_id], clicks, box, encode_short(previous, vocab, short_points)])


def outline_prompt(
    task_id: int,
    points_yx: NDArray[np.floating],
    positive: NDArray[np.bool_],
    vocab: Vocab,
    *,
    box_yxyx: NDArray[np.floating],
    previous: Rings = (),
    short_points: int,
) -> NDArray[np.int64]:
    """Return the prompt (P,) that asks for the outline of the object in a box."""
    clicks, before = _click_ids(points_yx, positive, vocab), encode_short(previous, vocab, short_points)
    return np.concatenate([[task_id], clicks, before, [SEPARATOR], vocab.coord_ids(box_yxyx)])


def quality_id(iou: float) -> int:
    """Return the id of an IoU from 0 to 1, rounded to tenths."""
    return QUALITY[int(np.rint(np.clip(iou, 0, 1) * (len(QUALITY) - 1)))]


def decode_quality(token: int) -> float:
    """Return the IoU that an id says; 0 for any id that is no quality."""
    return (token - QUALITY[0]) / (len(QUALITY) - 1) if token in QUALITY else 0.0


def decode_found(ids: NDArray[np.integer], vocab: Vocab) -> tuple[float, NDArray[np.float32]]:
    """Read a quality and a box (4,), `yxyx`, from any ids (L,) with L >= 5."""
    return decode_quality(int(ids[0])), vocab.coords(ids[1:FIND_LENGTH])


def _click_ids(points_yx: NDArray[np.floating], positive: NDArray[np.bool_], vocab: Vocab) -> NDArray[np.int64]:
    signs = np.where(positive, POSITIVE, NEGATIVE)
    return np.column_stack([vocab.coord_ids(points_yx.reshape(-1, 2)), signs]).ravel()
