"""Outlines of objects as answers: polygons of points at equal distances, in the frame that the model sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pix2seq.geometry.polygons import clip_rings, rle_to_rings, space_evenly
from pix2seq.model.decoding.grammar import PolygonGrammar
from pix2seq.tasks.request import Frame
from pix2seq.tokenizers.segmentation import decode_polygons, encode_polygons
from pix2seq.types import Target
from pix2seq.vocab import EOS, SEPARATOR, Vocab

Ring = NDArray[np.floating]
"""Points (P, 2) as x, y, the last joined to the first."""


def bounds(rings: Sequence[Ring]) -> NDArray[np.float64]:
    """Return the box (4,), `xyxy`, around rings, of which there must be one."""
    points = np.concatenate(list(rings)).astype(np.float64)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def visible_rings(target: Target, i: int, size: tuple[int, int]) -> list[Ring]:
    """Return the outline of object `i` within an input of `size` (height, width); its box, if it has no mask."""
    found = target.segmentations[i]
    if found is not None:
        rings = rle_to_rings(found) if isinstance(found, dict) else found
        return [*clip_rings(rings, size[1], size[0])]
    x0, y0, x1, y1 = target.boxes_xyxy[i].tolist()
    return [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])]


def in_input(rings: Sequence[Ring], frame: Frame, size: tuple[int, int]) -> list[Ring]:
    """Return rings in pixels of an input of `size` (height, width) that shows a frame."""
    return [(ring - frame.origin) / frame.size * size[::-1] for ring in rings]


def outline_ids(
    rings: Sequence[Ring], frame: Frame, size: tuple[int, int], vocab: Vocab, *, even_points: int, max_points: int
) -> NDArray[np.int64]:
    """Return the ids (L,) of rings within a frame, without an end; L is 0 if nothing of them is left.

    They have about `even_points` points at equal distances, and at most `max_points`. `size` is the (height, width) of
    the model's input, which the frame fills.
    """
    height, width = size
    near = clip_rings(in_input(rings, frame, size), width, height)
    even = [ring[:, ::-1] / [height, width] for ring in space_evenly(near, even_points)]
    return encode_polygons(even, vocab, max_points=max_points)


def read_outline(
    ids: NDArray[np.integer], frame: Frame, size: tuple[int, int], vocab: Vocab
) -> list[NDArray[np.float32]]:
    """Return rings from any ids (L,) of a frame, within an image of `size` (width, height)."""
    rings = clip_rings([frame.to_image_xy(ring) for ring in decode_polygons(ids, vocab)], *size)
    return [ring.astype(np.float32) for ring in rings]


def outline_grammar(vocab: Vocab, max_points: int) -> PolygonGrammar:
    """Return the grammar: rings of three points or more, then an end."""
    return PolygonGrammar(vocab.coord_base, vocab.num_bins, SEPARATOR, EOS, max_points=max_points)
